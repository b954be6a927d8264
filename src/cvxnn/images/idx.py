"""The IDX format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from cvxnn.errors import StorageError

__all__ = ["decode_idx", "read_idx"]

_GZIP = b"\x1f\x8b"
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CHUNK = 1 << 20


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, gzipped or not.

    A file has two zero bytes, a type, the number of dimensions, the sizes as big-endian 32-bit integers, and the
    entries in row-major order.

    Returns
    -------
    ndarray
        Of the shape and type that the file states (bytes: uint8), in the machine's byte order.

    Raises
    ------
    StorageError
        No such file, not IDX, or shorter or longer than its header says.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    return decode_idx(content, str(path))


def decode_idx(content: bytes, name: str) -> np.ndarray:
    """The array in the bytes of an IDX file; see :func:`read_idx`. `name` is for messages."""
    raw = io.BytesIO(content)
    try:
        return _decode(gzip.GzipFile(fileobj=raw) if content.startswith(_GZIP) else raw, name)
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{name} is cut or damaged: {error}") from error


def _decode(stream: io.BufferedIOBase, name: str) -> np.ndarray:
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES or not start[3]:
        raise StorageError(f"{name} is no IDX file: it begins with {start.hex(' ') or 'nothing'}")
    header = stream.read(4 * start[3])
    if len(header) < 4 * start[3]:
        raise StorageError(f"{name} is cut: its header ends early")
    shape = struct.unpack(f">{start[3]}I", header)
    dtype = np.dtype(_TYPES[start[2]])
    wanted = math.prod(shape) * dtype.itemsize
    body = _read(stream, wanted + 1)
    if len(body) != wanted:
        seen = "more" if len(body) > wanted else f"only {len(body)}"
        raise StorageError(f"{name} is cut or damaged: its header announces {wanted} bytes, it has {seen}")
    return np.frombuffer(body, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read(stream: io.BufferedIOBase, limit: int) -> bytearray:
    """At most `limit` bytes, without memory for more than there are."""
    body = bytearray()
    while len(body) < limit:
        part = stream.read(min(_CHUNK, limit - len(body)))
        if not part:
            break
        body += part
    return body
