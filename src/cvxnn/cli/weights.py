"""Weights of networks that others trained, read from files without executing anything in them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cvxnn.errors import StorageError
from cvxnn.networks import TwoLayerNetwork
from cvxnn.storage import load

__all__ = ["holds_foreign_weights", "read_weights"]

_TORCH = (".pt", ".pth", ".ckpt", ".bin")
_OWN_KEY = "cvxnn"


def holds_foreign_weights(path: str) -> bool:
    """Whether a file is to be read as weights, and not as a model that ``cvxnn fit`` wrote."""
    source = Path(path)
    if source.suffix.lower() in (*_TORCH, ".npz"):
        return True
    try:
        with safe_open(source, framework="numpy") as stream:
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError):
        return False
    return _OWN_KEY not in metadata or isinstance(_own(path), TwoLayerNetwork)


def _own(path: str) -> Any:
    try:
        return load(path)
    except StorageError:
        return None


def read_weights(path: str) -> Any:
    """A mapping of names to arrays, or a network that cvxnn saved.

    torch files are read with ``weights_only=True``, .npz files with ``allow_pickle=False``.

    Raises
    ------
    StorageError
        No such file, damaged, or one that would have to be executed to be read.
    """
    source = Path(path)
    if not source.is_file():
        seen = "is a folder" if source.is_dir() else "does not exist"
        raise StorageError(f"{path} {seen}; a file of weights is wanted")
    suffix = source.suffix.lower()
    reader = _read_torch if suffix in _TORCH else _read_npz if suffix == ".npz" else _read_safetensors
    try:
        return reader(source)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _read_torch(source: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise StorageError(
            f"{source} is damaged, or has more in it than tensors, and would have to be executed to be read; save only "
            "the weights: torch.save(model.state_dict(), path), or as safetensors"
        ) from error
    except OSError:
        raise
    except Exception as error:
        raise StorageError(f"{source} cannot be read as a state dict: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise StorageError(f"{source} holds a {type(found).__name__}; a state dict is wanted")
    return found


def _read_npz(source: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(source, allow_pickle=False) as archive:
            if isinstance(archive, np.ndarray):
                raise StorageError(f"{source} holds one array; an .npz file with two matrices is wanted")
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise StorageError(f"{source} is damaged or holds more than numbers: {_first_line(error)}") from error


def _read_safetensors(source: Path) -> Any:
    try:
        with safe_open(source, framework="pt") as stream:
            if _OWN_KEY in (stream.metadata() or {}):
                return load(source)
            # Keys are a method of the open file, which is no dictionary.
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError) as error:
        raise StorageError(f"{source} is damaged or no safetensors file: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
