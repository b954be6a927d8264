"""Files of tensors with a JSON header: safetensors, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cvxnn._version import __version__
from cvxnn.errors import InvalidInputError, StorageError

__all__ = ["FORMAT_VERSION", "from_json", "read_tensors", "to_json", "write_atomically", "write_tensors"]

FORMAT_VERSION = 1
_KEY = "cvxnn"
_UNREADABLE = (
    SafetensorError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    MemoryError,
    RecursionError,
)


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fsdecode(path) or not os.fsdecode(path):
        raise InvalidInputError(f"path is {path!r}; the name of a file is wanted")
    return Path(os.fsdecode(path))


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Raises
    ------
    InvalidInputError
        `path` is no file name.
    StorageError
        The folder does not exist or cannot be written, or the disk is full; nothing is left behind.
    """
    target = _as_path(path)
    try:
        if target.is_dir():
            raise StorageError(f"cannot write {target}: it is a folder; the name of a file is wanted")
        # A link goes on to point at what is written.
        target = target.resolve() if target.is_symlink() else target
        if target.exists() and not target.is_file():
            raise StorageError(f"cannot write {target}: it is a device or a pipe; the name of a file is wanted")
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".cvxnn-", suffix=".tmp")
        os.close(handle)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {target}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _digest(document: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Checksum of the document as JSON gives it back (but for the checksum in it) and of the arrays."""
    signed = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(signed, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_tensors(
    path: str | os.PathLike[str], kind: str, header: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Path:
    """Write arrays and a JSON-able header of the given kind ("model", "checkpoint")."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    document = {"format": FORMAT_VERSION, "kind": kind, "version": __version__, "header": header}
    document["sha256"] = _digest(json.loads(json.dumps(document, allow_nan=False)), contiguous)
    metadata = {_KEY: json.dumps(document, allow_nan=False)}
    return write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_tensors` wrote; nothing in the file is executed.

    Raises
    ------
    InvalidInputError
        `path` is no file name.
    StorageError
        No such file, not one of ours, of another kind, from a newer version, or damaged.
    """
    source = _as_path(path)
    try:
        _check_regular(source)
        with safe_open(source, framework="numpy") as stream:
            document = _read_document(source, stream.metadata() or {}, kind)
            # Keys are a method of the open file, which is no dictionary.
            arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if _digest(document, arrays) != document["sha256"]:
            raise StorageError(f"{source} is damaged: its contents do not match their checksum")
        header = document["header"]
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {source}: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise StorageError(f"{source} is damaged or not a file written by cvxnn ({error})") from error
    if not isinstance(header, dict):
        raise StorageError(f"{source} is damaged: its header is a {type(header).__name__}; a dictionary is wanted")
    return header, arrays


def _check_regular(source: Path) -> None:
    if source.is_file():
        return
    seen = "is a folder" if source.is_dir() else "is not a regular file" if source.exists() else "does not exist"
    raise StorageError(f"{source} {seen}; a file written by cvxnn is wanted")


def _read_document(source: Path, metadata: dict[str, str], kind: str) -> dict[str, Any]:
    if _KEY not in metadata:
        raise StorageError(f"{source} is a safetensors file, but not one written by cvxnn")
    document = json.loads(metadata[_KEY])
    if not isinstance(document["format"], int) or document["format"] < 1:
        raise StorageError(f"{source} is damaged: its format is {document['format']!r}; an integer is wanted")
    if document["format"] > FORMAT_VERSION:
        raise StorageError(
            f"{source} was written by cvxnn {document['version']} in a newer format "
            f"({document['format']}, this version reads up to {FORMAT_VERSION}); upgrade cvxnn"
        )
    if document["kind"] != kind:
        raise StorageError(f"{source} holds a {document['kind']}; a {kind} is wanted")
    return document


def to_json(value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """A value as JSON that :func:`from_json` turns back, its arrays put into `arrays` under names from `name`.

    Tuples, dictionaries and numbers that are not finite are marked, types and devices become their names.

    Raises
    ------
    TypeError
        Part of the value is an object that JSON and arrays cannot hold.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        items = [to_json(item, arrays, f"{name}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_json(item, arrays, f"{name}.{key}") for key, item in value.items()}}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    arrays[name] = _as_array(value, name)
    return {"array": name}


def _as_array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    elif hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise TypeError(f"{name} is a {type(value).__name__}; numbers, strings, lists and arrays can be stored")
    return value


def from_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of :func:`to_json`.

    Raises
    ------
    ValueError
        Not what that function gives.
    """
    if isinstance(value, list):
        return [from_json(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items())) if len(value) == 1 else (None, None)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "tuple" and isinstance(content, list):
        return tuple(from_json(item, arrays) for item in content)
    if kind == "dict" and isinstance(content, dict):
        return {key: from_json(item, arrays) for key, item in content.items()}
    if kind == "array" and isinstance(content, str) and content in arrays:
        return arrays[content]
    raise ValueError(f"{str(value)[:60]} cannot be read")
