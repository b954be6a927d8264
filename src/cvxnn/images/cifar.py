"""The batches of CIFAR-10, in the binary and in the Python form."""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxnn.errors import StorageError
from cvxnn.images.pickles import read_plain_pickle

__all__ = ["decode_cifar_binary", "decode_cifar_python"]

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_N_CLASSES = 10


def decode_cifar_binary(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a binary batch: records of a label byte and 3,072 pixel bytes.

    Parameters
    ----------
    content : bytes
    name : str
        The file, for messages.

    Returns
    -------
    images : ndarray of shape (n, 3, 32, 32), uint8
    labels : ndarray of shape (n,), uint8

    Raises
    ------
    StorageError
        Not a whole number of records, none, or labels above 9.
    """
    n, rest = divmod(len(content), _PIXELS + 1)
    if rest or not n:
        raise StorageError(
            f"{name} is cut or no binary CIFAR-10 batch: it has {len(content)} bytes, "
            f"which is not a whole number of records of {_PIXELS + 1}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(n, _PIXELS + 1)
    return _checked(records[:, 1:], records[:, 0], name)


def decode_cifar_python(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a Python batch, a pickled dictionary; nothing in it is executed.

    Parameters, returns and errors are those of :func:`decode_cifar_binary`.
    """
    batch = read_plain_pickle(content, name)
    data, labels = _entry(batch, "data"), _entry(batch, "labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS or not len(data):
        raise StorageError(f"{name} is no CIFAR-10 batch: its 'data' is not an array of rows of {_PIXELS} bytes")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise StorageError(f"{name} is no CIFAR-10 batch: its 'labels' are not a list of integers from 0 to 9")
    if len(labels) != len(data):
        raise StorageError(f"{name} is damaged: it has {len(data)} images and {len(labels)} labels")
    return _checked(data, np.array(labels, dtype=np.uint8), name)


def _entry(batch: Any, key: str) -> Any:
    """The value under a key that is text in Python 3 and bytes in Python 2."""
    if not isinstance(batch, dict):
        return None
    return batch.get(key, batch.get(key.encode()))


def _checked(rows: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    wrong = np.flatnonzero(labels >= _N_CLASSES)
    if len(wrong):
        raise StorageError(
            f"{name} is damaged or no CIFAR-10 batch: image {wrong[0]} has the label {labels[wrong[0]]}; "
            "labels from 0 to 9 are wanted"
        )
    return rows.reshape(-1, *_SHAPE), labels
