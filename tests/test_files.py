"""Files of tensors: round trips, damage, full disks, runs that are killed."""

import errno
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from cvxnn import files
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.files import FORMAT_VERSION, from_json, read_tensors, to_json, write_tensors

HEADER = {"name": "näme", "values": [1, 2.5, None, True, "x"], "nested": {"a": [1e-300, 0.1]}}
ARRAYS = {
    "weights": np.arange(6, dtype=np.float64).reshape(2, 3),
    "index": np.array([3, 1], dtype=np.int64),
    "none": np.zeros((0, 4), dtype=np.float32),
}


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def write_document(path, document, arrays=None):
    """A safetensors file with any text in the place of our document."""
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(ARRAYS if arrays is None else arrays, path, metadata={"cvxnn": text})


def signed(**changes):
    """A document with a correct checksum."""
    document = {"format": FORMAT_VERSION, "kind": "model", "version": "0", "header": HEADER} | changes
    return document | {"sha256": files._digest(document, ARRAYS)}


def same(found, wanted):
    header, arrays = found
    return (
        header == wanted[0]
        and set(arrays) == set(wanted[1])
        and all(arrays[k].dtype == v.dtype and np.array_equal(arrays[k], v) for k, v in wanted[1].items())
    )


def test_round_trip(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", "model", HEADER, ARRAYS)
    assert path == tmp_path / "a.safetensors"
    assert same(read_tensors(str(path), "model"), (HEADER, ARRAYS))
    assert listing(tmp_path) == ["a.safetensors"]


def test_arrays_that_are_not_contiguous(tmp_path):
    array = np.arange(12.0).reshape(3, 4)[:, ::2].T
    path = write_tensors(tmp_path / "a", "model", {}, {"a": array})
    assert np.array_equal(read_tensors(path, "model")[1]["a"], array)


def test_keys_that_json_turns_into_strings(tmp_path):
    path = write_tensors(tmp_path / "a", "model", {"counts": {10: 1, 9: (2, 3)}}, {})
    assert read_tensors(path, "model")[0] == {"counts": {"10": 1, "9": [2, 3]}}


def test_every_truncation_is_refused(tmp_path):
    content = write_tensors(tmp_path / "a", "model", HEADER, ARRAYS).read_bytes()
    short = tmp_path / "short"
    for length in range(len(content)):
        short.write_bytes(content[:length])
        with pytest.raises(StorageError):
            read_tensors(short, "model")
    short.write_bytes(content + b"\0")
    with pytest.raises(StorageError):
        read_tensors(short, "model")


@pytest.mark.parametrize("mask", [0x01, 0x10, 0xFF])
def test_every_flipped_byte_is_refused_or_harmless(tmp_path, mask):
    content = write_tensors(tmp_path / "a", "model", HEADER, ARRAYS).read_bytes()
    flipped, refused = tmp_path / "flipped", 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= mask
        flipped.write_bytes(damaged)
        try:
            found = read_tensors(flipped, "model")
        except StorageError:
            refused += 1
        else:
            assert same(found, (HEADER, ARRAYS)), position
    assert refused > 0.9 * len(content)


def test_changed_header_is_refused(tmp_path):
    write_document(tmp_path / "good", signed())
    assert same(read_tensors(tmp_path / "good", "model"), (HEADER, ARRAYS))
    write_document(tmp_path / "bad", signed() | {"header": HEADER | {"name": "other"}})
    with pytest.raises(StorageError, match="damaged: its contents do not match their checksum"):
        read_tensors(tmp_path / "bad", "model")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (signed(format=FORMAT_VERSION + 1, version="9.9"), "cvxnn 9.9 in a newer format .*upgrade cvxnn"),
        (signed(kind="checkpoint"), "holds a checkpoint; a model is wanted"),
        (signed(format=0), "its format is 0; an integer is wanted"),
        (signed(format="1"), "its format is '1'; an integer is wanted"),
        (signed(header=[1]), "its header is a list; a dictionary is wanted"),
        (signed(header=None), "its header is a NoneType; a dictionary is wanted"),
        ({"format": 1, "kind": "model"}, "damaged"),
        ([], "damaged"),
        ("3", "damaged"),
        ("{", "damaged"),
        ("[" * 200_000, "damaged"),
        ('{"format": 1, "kind": "model", "header": NaN, "sha256": ""}', "damaged"),
    ],
)
def test_wrong_documents(tmp_path, document, message):
    write_document(tmp_path / "a", document)
    with pytest.raises(StorageError, match=message):
        read_tensors(tmp_path / "a", "model")


def test_foreign_safetensors_file(tmp_path):
    save_file(ARRAYS, tmp_path / "a")
    with pytest.raises(StorageError, match="is a safetensors file, but not one written by cvxnn"):
        read_tensors(tmp_path / "a", "model")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 1000, b"\xff" * 1000, b"PK\x03\x04" + b"x" * 500, b"\x80\x04."]
)
def test_foreign_file(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(StorageError, match="damaged or not a file written by cvxnn"):
        read_tensors(tmp_path / "a", "model")


@pytest.mark.parametrize(("dtype", "n_bytes"), [("BF16", 16), ("F8_E4M3", 8), ("F4", 4)])
def test_tensor_types_without_numpy_equivalent(tmp_path, dtype, n_bytes):
    tensor = {"dtype": dtype, "shape": [8], "data_offsets": [0, n_bytes]}
    header = json.dumps({"__metadata__": {"cvxnn": json.dumps(signed())}, "a": tensor}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"\1" * n_bytes)
    with pytest.raises(StorageError):
        read_tensors(tmp_path / "a", "model")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(StorageError, match="is a folder; a file written by cvxnn is wanted"):
        read_tensors(tmp_path, "model")
    with pytest.raises(StorageError, match="does not exist"):
        read_tensors(tmp_path / "missing", "model")
    with pytest.raises(StorageError, match=r"cannot read .*name too long"):
        read_tensors(tmp_path / ("x" * 300), "model")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="is not a regular file"):
        read_tensors(tmp_path / "pipe", "model")


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*No such file or directory"):
        write_tensors(tmp_path / "missing" / "a", "model", HEADER, ARRAYS)
    with pytest.raises(StorageError, match=r"cannot write .*Not a directory"):
        write_tensors(tmp_path / "file" / "a", "model", HEADER, ARRAYS)
    with pytest.raises(StorageError, match="it is a folder"):
        write_tensors(tmp_path, "model", HEADER, ARRAYS)
    with pytest.raises(StorageError, match=r"cannot write .*name too long"):
        write_tensors(tmp_path / ("x" * 300), "model", HEADER, ARRAYS)
    assert listing(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_permission(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises(StorageError, match=r"cannot write .*Permission denied"):
        write_tensors(folder / "a", "model", HEADER, ARRAYS)
    folder.chmod(0)
    with pytest.raises(StorageError, match=r"cannot read .*Permission denied"):
        read_tensors(folder / "a", "model")
    folder.chmod(0o700)


def test_permission_denied(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write_tensors(tmp_path / "a", "model", HEADER, ARRAYS)
    monkeypatch.setattr(files.tempfile, "mkstemp", denied)
    with pytest.raises(StorageError, match=r"cannot write .*a: Permission denied"):
        write_tensors(path, "model", {}, {})
    monkeypatch.setattr(files, "safe_open", denied)
    with pytest.raises(StorageError, match=r"cannot read .*a: Permission denied"):
        read_tensors(path, "model")


def test_long_names_are_possible(tmp_path):
    path = tmp_path / ("x" * 250)
    write_tensors(path, "model", HEADER, ARRAYS)
    assert same(read_tensors(path, "model"), (HEADER, ARRAYS))


@pytest.mark.parametrize("path", [None, 3, "", "a\0b", ["a"]])
def test_paths_that_are_none(path):
    with pytest.raises(InvalidInputError, match=r"path is .*; the name of a file is wanted"):
        read_tensors(path, "model")
    with pytest.raises(InvalidInputError, match=r"path is .*; the name of a file is wanted"):
        write_tensors(path, "model", HEADER, ARRAYS)


@pytest.mark.parametrize("failing", ["save_file", "fsync"])
def test_full_disk(tmp_path, monkeypatch, failing):
    path = write_tensors(tmp_path / "a", "model", {"old": 1}, ARRAYS)

    def half(arrays, target, metadata):
        Path(target).write_bytes(b"half of the file")
        raise OSError(errno.ENOSPC, "No space left on device")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "save_file":
        monkeypatch.setattr(files, "save_file", half)
    else:
        monkeypatch.setattr(files.os, "fsync", fsync)
    for target in (path, tmp_path / "new"):
        with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
            write_tensors(target, "model", HEADER, ARRAYS)
    assert listing(tmp_path) == ["a"]
    assert read_tensors(path, "model")[0] == {"old": 1}


def test_interrupted_by_the_user(tmp_path, monkeypatch):
    def interrupted(arrays, target, metadata):
        Path(target).write_bytes(b"half of the file")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "a", "model", HEADER, ARRAYS)
    assert listing(tmp_path) == []


LIMITED = """
    import resource, sys
    import numpy as np
    from cvxnn.errors import StorageError
    from cvxnn.files import write_tensors
    write_tensors(sys.argv[1], "model", {"old": 1}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    for path in sys.argv[1:]:
        try:
            write_tensors(path, "model", {}, {"a": np.ones(100_000)})
        except StorageError as error:
            print(error)
"""


def run_python(code, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_limit_of_the_operating_system(tmp_path):
    with run_python(LIMITED, tmp_path / "a", tmp_path / "new") as process:
        lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert len(lines) == 2
    assert all("cannot write" in line and "File too large" in line for line in lines)
    assert listing(tmp_path) == ["a"]
    assert read_tensors(tmp_path / "a", "model")[0] == {"old": 1}


SLOW = """
    import sys, time
    from cvxnn import files

    def slow(arrays, target, metadata):
        original(arrays, target, metadata=metadata)
        content = open(target, "rb").read()
        with open(target, "wb", buffering=0) as stream:
            for i, byte in enumerate(content):
                stream.write(bytes([byte]))
                if i == len(content) // 2:
                    print("half", flush=True)
                    time.sleep(60)

    original, files.save_file = files.save_file, slow
    files.write_tensors(sys.argv[1], "model", {"new": 1}, {})
"""


@pytest.mark.parametrize("exists", [True, False])
def test_run_killed_while_writing(tmp_path, exists):
    path = tmp_path / "model.safetensors"
    if exists:
        write_tensors(path, "model", {"old": 1}, ARRAYS)
    with run_python(SLOW, path) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    if exists:
        assert same(read_tensors(path, "model"), ({"old": 1}, ARRAYS))
    else:
        assert not path.exists()
    write_tensors(path, "model", {"new": 2}, ARRAYS)
    assert read_tensors(path, "model")[0] == {"new": 2}


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    path = write_tensors(tmp_path / "a", "model", HEADER, ARRAYS)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_headers_that_json_cannot_hold(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        write_tensors(tmp_path / "a", "model", {"x": math.nan}, {})
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "a", "model", {"x": object()}, {})
    assert listing(tmp_path) == []


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
arrays = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)
)
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


@settings(max_examples=200, deadline=None)
@given(values)
def test_values_survive_json(value):
    found = {}
    text = json.dumps(to_json(value, found, "value"), allow_nan=False)
    assert equal(from_json(json.loads(text), found), value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.float64(0.1), 0.1),
        (np.int32(7), 7),
        (np.str_("a"), "a"),
        (torch.float32, "float32"),
        (np.float64, "float64"),
        (np.dtype("float32"), "float32"),
        (torch.device("cpu"), "cpu"),
        (-math.inf, -math.inf),
    ],
)
def test_values_with_a_plain_equivalent(value, wanted):
    found = from_json(to_json(value, {}, "value"), {})
    assert type(found) is type(wanted)
    assert found == wanted


def test_nan_and_tensors():
    assert math.isnan(from_json(to_json(math.nan, {}, "value"), {}))
    found = {}
    assert to_json({"a": (torch.arange(3),)}, found, "p") == {"dict": {"a": {"tuple": [{"array": "p.a.0"}]}}}
    assert found["p.a.0"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [object(), len, {1: 2}, {1, 2}, [object()], 1j, np.array(["a"]), b"x"])
def test_values_that_cannot_be_stored(value):
    with pytest.raises(TypeError, match="can be stored"):
        to_json(value, {}, "value")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"float": "1.0"},
        {"tuple": 3},
        {"dict": []},
        {"array": "missing"},
        {"array": []},
        {"x": 1},
        [{"a": 1, "b": 2}],
    ],
)
def test_json_that_is_not_ours(value):
    with pytest.raises(ValueError, match="cannot be read"):
        from_json(value, {"present": np.ones(1)})


def test_links_stay_and_pipes_are_refused(tmp_path):
    target, link, pipe = tmp_path / "there.safetensors", tmp_path / "link.safetensors", tmp_path / "pipe"
    link.symlink_to(target)
    for number in (1.0, 2.0):
        write_tensors(link, "model", {}, {"x": np.full(2, number)})
        assert link.is_symlink() and read_tensors(target, "model")[1]["x"][0] == number
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="it is a device or a pipe"):
        write_tensors(pipe, "model", {}, {"x": np.zeros(2)})
    assert pipe.is_fifo()
