"""Pickles that hold only data, read without executing anything that they name."""

from __future__ import annotations

import io
import math
import pickle
import struct
from typing import Any

import numpy as np

from cvxnn.errors import StorageError

__all__ = ["read_plain_pickle"]

_DAMAGED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class _Type:
    """Stands for a NumPy type; only that of bytes is taken."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """The state is about byte order and fields, which bytes do not have."""


class _Array:
    """Stands for an array of bytes, in both ways that NumPy pickles one."""

    def __init__(self, *arguments: Any) -> None:
        self.shape: Any = None
        self.content: Any = None
        if len(arguments) == 4:  # of _frombuffer: buffer, type, shape, order
            content, kind, shape, order = arguments
            self._fill(shape, kind, order != "C", content)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self._fill(shape, kind, fortran, content)

    def _fill(self, shape: Any, kind: Any, fortran: Any, content: Any) -> None:
        if not isinstance(kind, _Type) or kind.code not in ("u1", b"u1") or fortran:
            raise ValueError("an array is not of bytes in row-major order")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("the shape of an array is not a tuple of sizes")
        if isinstance(content, str):
            content = content.encode("latin-1")
        if not isinstance(content, (bytes, bytearray)) or len(content) != math.prod(shape):
            raise ValueError("an array has not as many bytes as its shape says")
        self.shape, self.content = shape, content

    def array(self) -> np.ndarray:
        if self.shape is None:
            raise ValueError("an array has no contents")
        return np.frombuffer(self.content, dtype=np.uint8).reshape(self.shape)


class _Encoded(bytes):
    """Stands for codecs.encode, with which Python 3 writes bytes into old pickles."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("a text is encoded in another way than bytes are")
        return text.encode("latin-1")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("bytes have no state")


# All are classes with a __setstate__: a pickle can set attributes of anything else that it gets hold of.
_STAND_INS: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _Encoded,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise StorageError(
                f"{self._name} names {module}.{name}, which could run code; only arrays of bytes, numbers, texts, "
                "lists and dictionaries are read"
            ) from None


def read_plain_pickle(content: bytes, name: str) -> Any:
    """The numbers, texts, lists, dictionaries and byte arrays of a pickle.

    Nothing that the pickle names is imported or called: NumPy's names are bound to stand-ins that keep the bytes of
    an array, and any other name is refused. Texts of Python 2 become bytes.

    Parameters
    ----------
    content : bytes
    name : str
        The file, for messages.

    Returns
    -------
    The object, with uint8 arrays at the top of it or as values of its dictionary.

    Raises
    ------
    StorageError
        Damaged, or with anything else in it.
    """
    try:
        return _resolve(_Unpickler(content, name).load())
    except StorageError:
        raise
    except _DAMAGED as error:
        raise StorageError(
            f"{name} cannot be read as a pickle of plain data: {str(error) or type(error).__name__}"
        ) from error


def _resolve(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item) for key, item in value.items()}
    if isinstance(value, _Array):
        return value.array()
    return value
