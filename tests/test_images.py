"""Image data sets by name: IDX files, Fashion-MNIST, hashes, and what is refused."""

import gzip
import json
import struct

import numpy as np
import pytest

from cvxnn.cli import main
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.images import IMAGE_SOURCES, fetch_images, load_images, read_idx
from tests.image_files import (
    FASHION,
    IDX_NAMES,
    SHARED,
    bytes_like,
    idx,
    make_official,
    needs_fashion,
    no_data_elsewhere,
    quietly,
    write_fashion,
)

__all__ = ["no_data_elsewhere"]


class TestIdx:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    @pytest.mark.parametrize(
        ("code", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
    )
    def test_every_type(self, tmp_path, pack, code, dtype):
        array = np.arange(-10, 14).astype(dtype).reshape(2, 3, 4)
        path = tmp_path / "x"
        path.write_bytes(pack(idx(array, code)))
        read = read_idx(path)
        assert read.dtype.isnative and read.dtype.kind == array.dtype.kind and read.dtype.itemsize == int(dtype[-1])
        np.testing.assert_array_equal(read, array)

    def test_no_entries(self, tmp_path):
        (tmp_path / "x").write_bytes(idx(np.zeros((0, 4), np.uint8)))
        assert read_idx(tmp_path / "x").shape == (0, 4)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "no IDX file"),
            (b"\x89PNG....", "no IDX file"),
            (b"\0\0\x07\x01\0\0\0\x01x", "no IDX file"),
            (b"\0\0\x08\x00", "no IDX file"),
            (b"\0\0\x08\x02\0\0\0\x01", "header ends early"),
            (idx(np.zeros((3, 4), np.uint8))[:-1], "12 bytes, it has only 11"),
            (idx(np.zeros((3, 4), np.uint8)) + b"x", "12 bytes, it has more"),
            (struct.pack(">BBBB3I", 0, 0, 14, 3, *3 * [2**32 - 1]), "has only 0"),
            (gzip.compress(idx(bytes_like(400)))[:200], "cut or damaged"),
            (gzip.compress(idx(bytes_like(400)))[:-12] + 12 * b"\xff", "cut or damaged"),
        ],
    )
    def test_refused(self, tmp_path, content, words):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(StorageError, match=words) as caught:
            read_idx(tmp_path / "x")
        assert str(tmp_path / "x") in str(caught.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(StorageError, match="cannot read"):
            read_idx(tmp_path / "absent")


class TestFashionMnist:
    @pytest.mark.parametrize("inside", ["", "fashion-mnist"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_found_in_a_folder(self, tmp_path, monkeypatch, inside, zipped):
        names = IDX_NAMES if zipped else [name.removesuffix(".gz") for name in IDX_NAMES]
        place = tmp_path / "data" / inside
        arrays = write_fashion(place, pack=gzip.compress if zipped else bytes, names=names)
        make_official(monkeypatch, FASHION, place)
        for split, (images, labels) in zip(("train", "test"), (arrays[:2], arrays[2:]), strict=True):
            data = quietly("fashion_mnist", split, tmp_path / "data")
            np.testing.assert_array_equal(data.images, images[:, None])
            np.testing.assert_array_equal(data.labels, labels)
            assert (data.images.dtype, data.labels.dtype) == (np.uint8, np.int64)
            assert (data.note, data.name, data.split, len(data)) == ("", "fashion_mnist", split, len(labels))
            assert data.classes[9] == "Ankle boot" and len(data.classes) == 10

    def test_environment_variable(self, tmp_path, monkeypatch):
        write_fashion(tmp_path / "data")
        make_official(monkeypatch, FASHION, tmp_path / "data")
        with pytest.raises(StorageError, match="cvxnn datasets fetch fashion_mnist"):
            load_images("fashion_mnist")
        monkeypatch.setenv("CVXNN_DATA_DIR", str(tmp_path / "data"))
        assert len(quietly("fashion_mnist")) == 30

    def test_argument_before_environment(self, tmp_path, monkeypatch):
        write_fashion(tmp_path / "data")
        (tmp_path / "empty").mkdir()
        monkeypatch.setenv("CVXNN_DATA_DIR", str(tmp_path / "data"))
        with pytest.raises(StorageError, match="empty has no Fashion-MNIST"):
            load_images("fashion_mnist", data_dir=tmp_path / "empty")

    def test_only_the_split_has_to_be_there(self, tmp_path, monkeypatch):
        write_fashion(tmp_path / "data")
        make_official(monkeypatch, FASHION, tmp_path / "data")
        (tmp_path / "data" / IDX_NAMES[3]).unlink()
        assert len(quietly("fashion_mnist", "train", tmp_path / "data")) == 30
        with pytest.raises(StorageError, match=f"data lacks {IDX_NAMES[3]} of Fashion-MNIST"):
            load_images("fashion_mnist", "test", tmp_path / "data")

    def test_other_bytes_are_a_warning(self, tmp_path, monkeypatch):
        write_fashion(tmp_path / "data")
        make_official(monkeypatch, FASHION, tmp_path / "data")
        changed = idx(bytes_like(30, 28, 28, seed=9))
        (tmp_path / "data" / IDX_NAMES[0]).write_bytes(gzip.compress(changed))
        with pytest.warns(UserWarning, match=f"{IDX_NAMES[0]} is not the file of the official Fashion-MNIST") as caught:
            data = load_images("fashion_mnist", "train", tmp_path / "data")
        assert len(caught) == 1 and caught[0].filename == __file__
        assert "not the official bytes" in data.note
        assert quietly("fashion_mnist", "test", tmp_path / "data").note == ""

    @pytest.mark.filterwarnings("ignore:.*its MD5 is")
    def test_another_number_of_images_is_a_warning(self, tmp_path):
        write_fashion(tmp_path / "data")
        with pytest.warns(UserWarning, match="has 30 train images; the official Fashion-MNIST has 60000"):
            load_images("fashion_mnist", "train", tmp_path / "data")

    @pytest.mark.parametrize(
        ("position", "array", "words"),
        [
            (0, bytes_like(30, 27, 28), r"shape \(n, 28, 28\) are wanted"),
            (0, bytes_like(0, 28, 28), r"shape \(n, 28, 28\) are wanted"),
            (1, bytes_like(29, high=10), "a label for each image"),
            (1, np.full(30, 10, np.uint8), "has the label 10; 0 to 9"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_refused(self, tmp_path, position, array, words):
        write_fashion(tmp_path / "data")
        (tmp_path / "data" / IDX_NAMES[position]).write_bytes(gzip.compress(idx(array)))
        with pytest.raises(StorageError, match=words):
            load_images("fashion_mnist", "train", tmp_path / "data")

    @needs_fashion
    def test_official_files(self, monkeypatch):
        monkeypatch.setenv("CVXNN_DATA_DIR", str(SHARED))
        for split, n in FASHION.counts.items():
            data = quietly("fashion_mnist", split)
            assert data.images.shape == (n, 1, 28, 28)
            assert data.note == ""
            assert np.bincount(data.labels).tolist() == 10 * [n // 10]
        assert fetch_images("fashion_mnist").downloaded == ()


@pytest.mark.parametrize("name", ["mnist", "", 3, None])
def test_unknown_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="'fashion_mnist', 'cifar10' or a folder"):
        load_images(name)
    with pytest.raises(InvalidInputError, match="one of 'fashion_mnist', 'cifar10' is wanted"):
        fetch_images(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "valid"}, "split is 'valid'"),
        ({"data_dir": "no/such/folder"}, "data_dir is 'no/such/folder'"),
        ({"data_dir": ""}, "data_dir is ''"),
        ({"data_dir": 3}, "data_dir is 3"),
        ({"cache_dir": 3}, "cache_dir is 3"),
        ({"size": 8}, "size and channels are for folders"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(InvalidInputError, match=words):
        load_images("fashion_mnist", **options)


def test_environment_names_no_folder(monkeypatch):
    monkeypatch.setenv("CVXNN_DATA_DIR", "no/such/folder")
    with pytest.raises(InvalidInputError, match="CVXNN_DATA_DIR is 'no/such/folder'"):
        load_images("cifar10")
    monkeypatch.setenv("CVXNN_DATA_DIR", "")
    with pytest.raises(StorageError, match="not in the cache"):
        load_images("cifar10")


def test_list_command(capsys):
    assert main(["datasets", "list", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [images["name"] for images in document["images"]] == list(IMAGE_SOURCES)
    assert "breast_cancer" in [data["name"] for data in document["datasets"]]
    assert main(["datasets", "list"]) == 0
    assert "Fashion-MNIST" in capsys.readouterr().out


@pytest.mark.parametrize("source", IMAGE_SOURCES.values(), ids=list(IMAGE_SOURCES))
def test_every_file_has_a_hash(source):
    for layout in source.layouts:
        names = [name for split in ("train", "test") for name in layout.files[split]]
        assert set(names) == set(layout.md5)
        assert all(len(value) == 32 for value in layout.md5.values())
        assert bool(layout.archive) == (len(layout.archive_sha256) == 64)
    assert all(len(value) == 64 for value in source.download.sha256.values())
    fetchable = {name for layout in source.layouts for name in (*layout.md5, layout.archive)}
    assert set(source.download.sha256) <= fetchable
    assert len(set(source.classes)) == 10
