"""CIFAR-10 in its forms, and pickles that are read without executing anything."""

import dataclasses
import hashlib
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cvxnn.errors import StorageError
from cvxnn.images import IMAGE_SOURCES, fetch_images, load_images
from cvxnn.images.cifar import decode_cifar_binary, decode_cifar_python
from cvxnn.images.pickles import read_plain_pickle
from tests.image_files import (
    CIFAR,
    SHARED,
    binary_batch,
    bytes_like,
    make_official,
    needs_cifar,
    no_data_elsewhere,
    python2_batch,
    python3_batch,
    quietly,
    write_cifar,
)

__all__ = ["no_data_elsewhere"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestCifar:
    FORMS = (
        (0, binary_batch),
        (1, python2_batch),
        *((1, python3_batch(p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)),
    )

    @pytest.mark.parametrize(("which", "write"), FORMS)
    @pytest.mark.parametrize("archived", [False, True])
    def test_forms(self, tmp_path, monkeypatch, which, write, archived):
        layout = CIFAR.layouts[which]
        folder = tmp_path / "data" / layout.folder
        parts = write_cifar(folder, layout, write)
        archive = tmp_path / "data" / layout.archive
        if archived:
            with tarfile.open(archive, "w:gz") as stream:
                stream.add(folder, arcname=layout.folder)
        make_official(monkeypatch, CIFAR, folder, archive if archived else None)
        if archived:
            folder.rename(tmp_path / "elsewhere")
        for split in ("train", "test"):
            data = quietly("cifar10", split, tmp_path / "data")
            rows, labels = (np.concatenate([parts[n][i] for n in layout.files[split]]) for i in (0, 1))
            np.testing.assert_array_equal(data.images, rows.reshape(-1, 3, 32, 32))
            np.testing.assert_array_equal(data.labels, labels)
            assert (data.note, data.classes[9]) == ("", "truck")
            assert data.labels.dtype == np.int64

    def test_planes_are_red_green_blue_in_row_major_order(self):
        row = np.zeros(3072, np.uint8)
        row[1024 + 2 * 32 + 5] = 77  # green, third row, sixth column
        images, labels = decode_cifar_binary(binary_batch(row[None], np.array([4], np.uint8)), "x")
        assert images[0, 1, 2, 5] == 77 and images.sum() == 77 and labels.tolist() == [4]

    @pytest.mark.parametrize("form", [0, 1])
    def test_other_bytes_are_a_note(self, tmp_path, monkeypatch, form):
        layout = CIFAR.layouts[form]
        write_cifar(tmp_path / layout.folder, layout, (binary_batch, python2_batch)[form])
        monkeypatch.setitem(IMAGE_SOURCES, "cifar10", dataclasses.replace(CIFAR, counts={"train": 30, "test": 20}))
        assert "not the official bytes" in quietly("cifar10", "train", tmp_path).note

    def test_known_copies_are_named(self, tmp_path, monkeypatch):
        layout = CIFAR.layouts[0]
        write_cifar(tmp_path / "data", layout, binary_batch)
        hashes = {hashlib.md5((tmp_path / "data" / n).read_bytes()).hexdigest(): "JPEG" for n in layout.files["train"]}
        changed = dataclasses.replace(CIFAR, counts={"train": 30, "test": 20}, copies=hashes)
        monkeypatch.setitem(IMAGE_SOURCES, "cifar10", changed)
        assert quietly("cifar10", "train", tmp_path / "data").note == "JPEG"
        assert "not the official bytes" in quietly("cifar10", "test", tmp_path / "data").note
        name = layout.files["train"][2]
        (tmp_path / "data" / name).write_bytes(binary_batch(bytes_like(6, 3072), bytes_like(6, high=10)))
        assert "not the official bytes" in quietly("cifar10", "train", tmp_path / "data").note

    def test_cut_at_a_record_is_a_warning(self, tmp_path):
        write_cifar(tmp_path, CIFAR.layouts[0], binary_batch)
        with pytest.warns(UserWarning, match="has 20 test images; the official CIFAR-10 has 10000"):
            load_images("cifar10", "test", tmp_path)

    @pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3073 * 2 - 1)])
    def test_cut_binary_batch(self, content):
        with pytest.raises(StorageError, match=r"some/file is cut .* whole number of records of 3073"):
            decode_cifar_binary(content, "some/file")

    def test_wrong_label(self):
        labels = np.array([0, 3, 10, 200], np.uint8)
        with pytest.raises(StorageError, match="image 2 has the label 10"):
            decode_cifar_binary(binary_batch(bytes_like(4, 3072), labels), "x")
        with pytest.raises(StorageError, match="image 2 has the label 10"):
            decode_cifar_python(python2_batch(bytes_like(4, 3072), labels), "x")

    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            ([1, 2], "its 'data' is not"),
            ({"labels": [1]}, "its 'data' is not"),
            ({"data": [1], "labels": [1]}, "its 'data' is not"),
            ({"data": bytes_like(2, 3071), "labels": [1, 2]}, "its 'data' is not"),
            ({"data": bytes_like(0, 3072), "labels": []}, "its 'data' is not"),
            ({"data": bytes_like(2, 3072)}, "its 'labels' are not"),
            ({"data": bytes_like(2, 3072), "labels": (1, 2)}, "its 'labels' are not"),
            ({"data": bytes_like(2, 3072), "labels": [1, True]}, "its 'labels' are not"),
            ({"data": bytes_like(2, 3072), "labels": [1, -1]}, "its 'labels' are not"),
            ({"data": bytes_like(2, 3072), "labels": [1, 10**30]}, "its 'labels' are not"),
            ({"data": bytes_like(2, 3072), "labels": [1]}, "2 images and 1 labels"),
        ],
    )
    def test_not_a_batch(self, batch, words):
        with pytest.raises(StorageError, match=words):
            decode_cifar_python(pickle.dumps(batch, protocol=4), "x")

    def test_cut_archive(self, tmp_path):
        layout = CIFAR.layouts[0]
        write_cifar(tmp_path / "x", layout, binary_batch)
        with tarfile.open(tmp_path / layout.archive, "w:gz") as stream:
            stream.add(tmp_path / "x", arcname=layout.folder)
        content = (tmp_path / layout.archive).read_bytes()
        (tmp_path / layout.archive).write_bytes(content[: len(content) // 2])
        with pytest.raises(StorageError, match=f"{layout.archive} is cut or damaged"):
            load_images("cifar10", "test", tmp_path)
        with tarfile.open(tmp_path / layout.archive, "w:gz") as stream:
            stream.add(tmp_path / "x", arcname="another-folder")
        with pytest.raises(StorageError, match=f"lacks {layout.folder}/test_batch.bin"):
            load_images("cifar10", "test", tmp_path)

    @pytest.fixture
    def unpacked(self):
        """The shared JPEG copy as binary batches; 184 MB, gone after the test."""
        pytest.importorskip("PIL")
        script = SHARED / "cifar10-jpeg" / "unpack.py"
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(script), folder], check=True, capture_output=True)
            yield Path(folder)

    @pytest.mark.slow
    @needs_cifar
    def test_jpeg_copy(self, unpacked):
        for split, n in CIFAR.counts.items():
            data = quietly("cifar10", split, unpacked)
            assert data.images.shape == (n, 3, 32, 32)
            assert np.bincount(data.labels).tolist() == 10 * [n // 10]
            assert "JPEG" in data.note or "not the official bytes" in data.note  # other decoders, other bytes
        fetched = fetch_images("cifar10", data_dir=unpacked)
        assert len(fetched.files) == 6 and fetched.note and not fetched.downloaded


class TestPickles:
    def test_code_is_refused_and_not_run(self, tmp_path):
        target = tmp_path / "touched"
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            content = pickle.dumps({"data": Malicious(target)}, protocol=protocol)
            with pytest.raises(StorageError, match=r"some/file names .*, which could run code"):
                decode_cifar_python(content, "some/file")
        assert not target.exists()
        pickle.loads(content)
        assert target.exists()  # so it would have run

    @pytest.mark.parametrize(
        "content",
        [
            b"cos\nsystem\n(S'true'\ntR.",
            b"(S'true'\nios\nsystem\n.",
            b"cbuiltins\neval\n(S'1'\ntR.",
            b"cnumpy\nload\n.",
            b"\x80\4\x8c\5numpy\x8c\x0fndarray.tofile\x93.",  # a dotted name
            b"c__builtin__\ngetattr\n.",
            b"\x80\2\x82\1.",  # the extension registry
            b"Psome id\n.",
        ],
    )
    def test_names_are_refused(self, content):
        with pytest.raises(StorageError):
            read_plain_pickle(content, "x")

    @pytest.mark.parametrize("name", ["numpy\ndtype", "numpy\nndarray", "_codecs\nencode"])
    def test_stand_ins_cannot_be_changed(self, name):
        from cvxnn.images.pickles import _STAND_INS

        before = [dict(vars(kind)) for kind in _STAND_INS.values()]
        for state in (b"}S'array'\nK\1s", b"N}S'array'\nK\1s\x86"):  # attributes; None and slots
            with pytest.raises(StorageError):
                read_plain_pickle(b"\x80\2c" + name.encode() + b"\n" + state + b"b.", "x")
        assert [dict(vars(kind)) for kind in _STAND_INS.values()] == before

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((2, 3), np.float32),
            np.array([{}, []], dtype=object),
            np.asfortranarray(bytes_like(3, 4)),
            np.zeros(3, np.dtype([("a", "u1")])),
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_only_arrays_of_bytes(self, array, protocol):
        with pytest.raises(StorageError):
            read_plain_pickle(pickle.dumps({"data": array}, protocol=protocol), "x")

    @pytest.mark.parametrize("end", [1, 20, 100, 400, -2])
    def test_cut(self, end):
        content = python2_batch(bytes_like(1, 3072), [3])
        assert decode_cifar_python(content, "x")[1].tolist() == [3]
        with pytest.raises(StorageError, match="cannot be read as a pickle"):
            read_plain_pickle(content[:end], "x")

    def test_shape_that_does_not_fit(self):
        content = python2_batch(bytes_like(1, 3072), [3])
        wrong = content.replace(b"J" + struct.pack("<i", 3072), b"J" + struct.pack("<i", 3073))
        with pytest.raises(StorageError, match="as many bytes as its shape"):
            read_plain_pickle(wrong, "x")

    def test_random_damage_is_an_error_or_data(self):
        content = bytearray(python2_batch(bytes_like(1, 3072), [3]))
        random = np.random.default_rng(0)
        for _ in range(300):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[random.choice([random.integers(200), random.integers(len(content))])] = random.integers(256)
            try:
                decode_cifar_python(bytes(damaged), "x")
            except StorageError:
                continue
