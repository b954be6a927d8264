"""Known data sets from their files, and what is to be said where these are not the official ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cvxnn.errors import StorageError
from cvxnn.images.cifar import decode_cifar_binary, decode_cifar_python
from cvxnn.images.data import ImageData
from cvxnn.images.idx import decode_idx
from cvxnn.images.places import Found
from cvxnn.images.sources import ImageSource

__all__ = ["check_files", "read_split"]

_Arrays = tuple[np.ndarray, np.ndarray]
_CIFAR: dict[str, Callable[[bytes, str], _Arrays]] = {
    "cifar_binary": decode_cifar_binary,
    "cifar_python": decode_cifar_python,
}
_UNOFFICIAL = "not the official bytes: the images or their order may differ from the official release"


def read_split(source: ImageSource, found: Found, split: str) -> tuple[ImageData, list[str]]:
    """The images of a split, and sentences to warn of.

    Raises
    ------
    StorageError
        A file that is cut, damaged, or of another format or shape.
    """
    contents = found.contents(split)
    note, warnings = _judge(source, found, contents)
    images, labels = _images(source, found, contents)
    if len(images) != source.counts[split]:
        warnings.append(
            f"{found.place} has {len(images)} {split} images; the official {source.title} has {source.counts[split]}"
        )
    data = ImageData(images, labels.astype(np.int64), list(source.classes), source.name, split, note)
    return data, warnings


def check_files(source: ImageSource, found: Found, splits: Iterable[str]) -> tuple[str, list[str]]:
    """The note on the files of the splits, and sentences to warn of."""
    if found.in_archive:
        return _judge(source, found, {})
    contents: dict[str, bytes] = {}
    for split in splits:
        contents.update(found.contents(split))
    return _judge(source, found, contents)


def _judge(source: ImageSource, found: Found, contents: dict[str, bytes]) -> tuple[str, list[str]]:
    if found.in_archive:
        others = {found.place.name: _sha256(found.place)}
        wanted = {found.place.name: found.layout.archive_sha256}
        kind = "SHA256"
    else:
        others = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in contents.items()}
        wanted, kind = found.layout.md5, "MD5"
    differing = {name: seen for name, seen in others.items() if seen != wanted[name]}
    if not differing:
        return "", []
    remarks = {source.copies.get(seen) for seen in others.values()}
    note = remarks.pop() if len(remarks) == 1 else None
    if note is not None or not source.others_warn:
        return note or _UNOFFICIAL, []
    folder = found.place.parent if found.in_archive else found.place
    return _UNOFFICIAL, [
        f"{folder / name} is not the file of the official {source.title}: its {kind} is {seen}, not {wanted[name]}"
        for name, seen in differing.items()
    ]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _images(source: ImageSource, found: Found, contents: dict[str, bytes]) -> _Arrays:
    names = {name: str(found.place / name) for name in contents}
    if found.layout.form != "idx":
        decode = _CIFAR[found.layout.form]
        parts = [decode(data, names[name]) for name, data in contents.items()]
        return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    (images_name, images), (labels_name, labels) = ((names[n], decode_idx(c, names[n])) for n, c in contents.items())
    if images.dtype != np.uint8 or images.shape[1:] != source.shape[1:] or not len(images):
        raise StorageError(
            f"{images_name} has an array of {images.dtype} of shape {images.shape}; "
            f"bytes of shape (n, {source.shape[1]}, {source.shape[2]}) are wanted"
        )
    if labels.dtype != np.uint8 or labels.shape != (len(images),):
        raise StorageError(
            f"{labels_name} has an array of {labels.dtype} of shape {labels.shape}; "
            f"{len(images)} bytes, a label for each image, are wanted"
        )
    if labels.max() >= len(source.classes):
        raise StorageError(f"{labels_name} has the label {labels.max()}; 0 to {len(source.classes) - 1} are wanted")
    return images[:, None], labels
