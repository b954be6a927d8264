"""Small files of image data sets, as published ones are, for the tests of cvxnn.images."""

import dataclasses
import gzip
import hashlib
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from cvxnn.images import IMAGE_SOURCES, load_images

SHARED = Path(os.environ.get("CVXNN_SHARED", Path(__file__).parents[2] / "shared")) / "data"
FASHION, CIFAR = IMAGE_SOURCES["fashion_mnist"], IMAGE_SOURCES["cifar10"]
GZ = FASHION.layouts[0]
IDX_NAMES = [*GZ.files["train"], *GZ.files["test"]]
needs_fashion = pytest.mark.skipif(
    not (SHARED / "fashion-mnist" / IDX_NAMES[0]).is_file(), reason="the shared folder of data is not here"
)
needs_cifar = pytest.mark.skipif(
    not (SHARED / "cifar10-jpeg" / "unpack.py").is_file(), reason="the shared folder of data is not here"
)


@pytest.fixture(autouse=True)
def no_data_elsewhere(monkeypatch, tmp_path):
    """No folder of data, an empty cache, no proxy."""
    monkeypatch.delenv("CVXNN_DATA_DIR", raising=False)
    monkeypatch.setenv("CVXNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def idx(array, code=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def bytes_like(*shape, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, size=shape, dtype=np.uint8)


def write_fashion(folder, n_train=30, n_test=20, pack=gzip.compress, names=IDX_NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for i, n in enumerate((n_train, n_test)):
        arrays += [bytes_like(n, 28, 28, seed=i), bytes_like(n, seed=i + 2, high=10)]
    for name, array in zip(names, arrays, strict=True):
        (folder / name).write_bytes(pack(idx(array)))
    return arrays


def make_official(monkeypatch, source, folder, archive=None):
    """Take the files of the folder (or the archive) for the official ones, with their numbers of images."""
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    sha256 = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in [archive or folder] if p.is_file()}
    layouts = [
        dataclasses.replace(layout, md5=md5, archive_sha256=sha256.get(layout.archive, ""))
        if set(md5) & set(layout.md5)
        else layout
        for layout in source.layouts
    ]
    names = sha256 or {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in md5}
    changed = dataclasses.replace(
        source,
        layouts=tuple(layouts),
        counts={"train": 30, "test": 20},
        download=dataclasses.replace(source.download, sha256=names),
    )
    monkeypatch.setitem(IMAGE_SOURCES, source.name, changed)


def quietly(*arguments, **options):
    """Load without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_images(*arguments, **options)


def python2_batch(rows, labels):
    """The bytes of a batch as Python 2 wrote the official ones: protocol 2, NumPy of its time, no memo."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    n, width = rows.shape
    kind = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNN" + 2 * integer(-1) + b"K\0tb"
    content = b"T" + struct.pack("<i", rows.size) + rows.tobytes()
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
    array = empty + b"(K\1(" + integer(n) + integer(width) + b"t" + kind + b"\x89" + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + text(b"ship_s_000001.png") + b"e"
    title = text(b"batch_label") + text(b"training batch 1 of 5")
    items = text(b"data") + array + text(b"labels") + numbers + title + text(b"filenames") + names
    return b"\x80\2}(" + items + b"u."


def python3_batch(protocol):
    def write(rows, labels):
        return pickle.dumps({b"data": rows, b"labels": labels.tolist()}, protocol=protocol)

    return write


def binary_batch(rows, labels):
    return np.hstack([labels[:, None], rows]).tobytes()


def write_cifar(folder, layout, write, n_train=6, n_test=20):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for i, name in enumerate([*layout.files["train"], *layout.files["test"]]):
        n = n_test if i == 5 else n_train
        parts[name] = bytes_like(n, 3072, seed=i), bytes_like(n, seed=i + 10, high=10)
        (folder / name).write_bytes(write(*parts[name]))
    return parts
