"""Checks of what users pass in; each failure names the argument, what was seen and what is wanted."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from cvxnn.errors import InvalidInputError

__all__ = [
    "as_array",
    "as_images",
    "as_matrix",
    "as_numbers",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_pair",
    "check_positive",
    "check_range",
    "check_sample_weight",
    "encode_targets",
    "read_images",
    "resolve_device",
    "resolve_dtype",
    "smallest_squared",
    "without_copy",
]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def check_positive(value: Any, name: str, *, allow_none: bool = False, allow_zero: bool = False) -> Any:
    """Return `value` as a finite positive float."""
    if value is None and allow_none:
        return None
    wanted = "a non-negative number" if allow_zero else "a positive number"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidInputError(f"{name} is {value!r}; {wanted} is wanted")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not allow_zero):
        raise InvalidInputError(f"{name} is {value!r}; {wanted} is wanted")
    return number


def check_integer(value: Any, name: str, *, minimum: int = 1, allow_none: bool = False) -> Any:
    """Return `value` as an int of at least `minimum`."""
    if value is None and allow_none:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise InvalidInputError(f"{name} is {value!r}; an integer of at least {minimum} is wanted")
    return int(value)


def check_pair(value: Any, name: str, minimum: int) -> tuple[int, int]:
    """Return an int, or a pair of them, as a pair of ints of at least `minimum`."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    whole = all(isinstance(part, Integral) and not isinstance(part, bool) for part in pair)
    if len(pair) != 2 or not whole or min(pair) < minimum:
        raise InvalidInputError(f"{name} is {value!r}; an integer of at least {minimum}, or a pair of them, is wanted")
    return int(pair[0]), int(pair[1])


def check_flag(value: Any, name: str) -> bool:
    """Return `value` as a bool; only True and False (and 0 and 1) are taken."""
    if not isinstance(value, (bool, np.bool_, Integral)) or value not in (0, 1):
        raise InvalidInputError(f"{name} is {value!r}; True or False is wanted")
    return bool(value)


def check_choice(value: Any, name: str, choices: tuple[str, ...] | list[str]) -> str:
    """Return `value` if it is one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInputError(f"{name} is {value!r}; one of {', '.join(map(repr, choices))} is wanted")
    return value


def resolve_device(device: Any) -> torch.device:
    """Turn "auto", "cpu", "cuda", ... into a torch device that exists."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(f"device is {device!r}; 'auto', 'cpu' or 'cuda' is wanted") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(f"device is {device!r}, but torch sees no CUDA device; use 'cpu' or 'auto'")
    return resolved


def resolve_dtype(dtype: Any) -> torch.dtype:
    """Turn "float32" or "float64" (or the torch or NumPy type) into a torch type."""
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    try:
        name = np.dtype(dtype).name if not isinstance(dtype, str) else dtype
    except TypeError:
        name = str(dtype)
    if name not in _DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r}; 'float32' or 'float64' is wanted")
    return _DTYPES[name]


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if hasattr(value, "to_numpy"):
        return np.asarray(value.to_numpy())
    return np.asarray(value)


def without_copy(data: np.ndarray) -> torch.Tensor:
    """An array as a tensor on the same memory, which may be read-only."""
    with warnings.catch_warnings():
        # torch warns of arrays that cannot be written to; nothing writes to the data.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)


def all_finite(array: np.ndarray, rows: int = 65_536) -> bool:
    """Whether all entries are finite, a part of the rows at a time."""
    return all(bool(np.isfinite(array[i : i + rows]).all()) for i in range(0, len(array), rows))


def as_numbers(value: Any, name: str, kind: str = "an array") -> np.ndarray:
    """Return `value` as float64 numbers of any shape, finite or not."""
    try:
        array = _to_numpy(value)
        if array.dtype.kind == "c":
            raise InvalidInputError(f"{name} is complex; real numbers are wanted")
        return array.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{name} cannot be read as {kind} of numbers: {error}") from error


def as_matrix(value: Any, name: str, *, n_rows: int | None = None) -> np.ndarray:
    """Return `value` as a finite float64 matrix with at least one row and one column."""
    array = as_numbers(value, name, "a matrix")
    if array.ndim != 2:
        raise InvalidInputError(f"{name} has {array.ndim} dimension(s), shape {array.shape}; 2 are wanted")
    if min(array.shape) == 0:
        raise InvalidInputError(f"{name} is empty, shape {array.shape}; at least one row and column is wanted")
    if n_rows is not None and len(array) != n_rows:
        raise InvalidInputError(f"{name} has {len(array)} rows; {n_rows}, one per sample, are wanted")
    if not all_finite(array):
        kind = "NaN" if np.isnan(array).any() else "infinity"
        raise InvalidInputError(f"{name} contains {kind}; finite numbers are wanted")
    return np.ascontiguousarray(array)


#: Numbers of channels of grey, colour and transparent images: where they come last, as in square images of others.
_CHANNELS_LAST = (1, 3, 4)


def as_images(value: Any, name: str) -> np.ndarray:
    """Return `value` as finite numbers (n, channels, H, W), in its own type where torch has it."""
    try:
        array = _to_numpy(value)
        if array.dtype.kind == "c":
            raise InvalidInputError(f"{name} is complex; real numbers are wanted")
        if array.dtype not in (np.uint8, np.float32, np.float64):
            array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{name} cannot be read as an array of numbers: {error}") from error
    if array.ndim != 4 or min(array.shape) == 0:
        raise InvalidInputError(f"{name} has shape {array.shape}; (n, channels, height, width) is wanted")
    if array.shape[1] == array.shape[2] >= 8 and array.shape[3] in _CHANNELS_LAST:
        raise InvalidInputError(
            f"{name} has shape {array.shape}, which seems to have channels last; (n, channels, height, width) is "
            "wanted, which transpose(0, 3, 1, 2) makes of it"
        )
    if not all_finite(array):
        raise InvalidInputError(f"{name} contains NaN or infinity; finite numbers are wanted")
    return np.ascontiguousarray(array)


def read_images(value: Any, image_shape: tuple[int, int, int] | None) -> np.ndarray:
    """Images (n, channels, H, W), (n, H, W), or rows of pixels of images of a known shape, as (n, channels, H, W)."""
    if isinstance(value, torch.Tensor) or hasattr(value, "to_numpy"):
        value = _to_numpy(value)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidInputError(f"X cannot be read as images: {error}") from error
    if image_shape is not None:
        shape = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else ()
        if len(shape) != 3 or not all(isinstance(side, Integral) and side >= 1 for side in shape):
            raise InvalidInputError(f"image_shape is {image_shape!r}; (channels, height, width) is wanted")
        if array.ndim == 2:
            if array.shape[1] != math.prod(shape):
                raise InvalidInputError(
                    f"X has {array.shape[1]} columns; {math.prod(shape)}, one per pixel of {shape}, are wanted"
                )
            array = array.reshape(len(array), *shape)
    elif array.ndim == 2:
        raise InvalidInputError(
            f"X has shape {array.shape}; images (n, channels, height, width) or (n, height, width) are wanted, or "
            "image_shape=(channels, height, width) for images in rows"
        )
    return as_images(array[:, None] if array.ndim == 3 else array, "X")


def as_array(value: Any, name: str) -> np.ndarray:
    """Return `value` as an array of whatever it holds."""
    try:
        return _to_numpy(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name} cannot be read as an array: {error}") from error


def encode_targets(Y: Any, n_samples: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Targets as a float64 matrix, and the class labels where Y was labels.

    1-D integers, booleans or strings are class labels (one-hot, a column per class in sorted order);
    1-D floats are one regression output; 2-D is taken as it is.
    """
    array = as_array(Y, "Y")
    if array.ndim == 2:
        return as_matrix(array, "Y", n_rows=n_samples), None
    if array.ndim != 1:
        raise InvalidInputError(f"Y has shape {array.shape}; a vector or a matrix with a row per sample is wanted")
    if len(array) != n_samples:
        raise InvalidInputError(f"Y has {len(array)} entries but X has {n_samples} rows; as many are wanted")
    if array.dtype.kind == "O" and _are_fractions(array):
        array = array.astype(np.float64)
    if array.dtype.kind == "f":
        return as_matrix(array[:, None], "Y"), None
    if array.dtype.kind not in "biuUSO":
        raise InvalidInputError(f"Y has type {array.dtype}; numbers or class labels are wanted")
    try:
        classes, index = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise InvalidInputError("Y mixes labels of different types; labels of one type are wanted") from error
    if len(classes) < 2:
        raise InvalidInputError(f"Y has only one class, {classes.tolist()}; at least two are wanted")
    return np.eye(len(classes))[index], classes


def _are_fractions(values: np.ndarray) -> bool:
    """Whether objects are all real numbers, and not all of them integers: targets, not labels."""
    numbers = all(isinstance(value, Real) and not isinstance(value, bool) for value in values)
    return numbers and not all(float(value).is_integer() for value in values)


def smallest_squared(dtype: torch.dtype) -> float:
    """The smallest number whose square does not underflow."""
    return math.sqrt(torch.finfo(dtype).tiny)


def check_range(values: torch.Tensor, name: str, *, least: float | None = None) -> None:
    """Refuse finite numbers whose squares overflow in their type, or all underflow there, or are all below `least`."""
    largest = max(float(part.abs().max()) for part in values.split(65_536))
    kind = str(values.dtype).removeprefix("torch.")
    seen = f"{name} has entries of up to {largest:g}, whose squares"
    if largest > math.sqrt(torch.finfo(values.dtype).max / values.numel()):
        raise InvalidInputError(f"{seen} overflow in {kind}; rescale it")
    if 0 < largest < (smallest_squared(values.dtype) if least is None else least):
        raise InvalidInputError(f"{seen} underflow in {kind}; rescale it")


def check_sample_weight(sample_weight: Any, n_samples: int) -> np.ndarray:
    """Return the weights as a float64 vector; ones where None."""
    if sample_weight is None:
        return np.ones(n_samples)
    try:
        weights = _to_numpy(sample_weight).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"sample_weight cannot be read as numbers: {error}") from error
    if weights.shape != (n_samples,):
        raise InvalidInputError(f"sample_weight has shape {weights.shape}; ({n_samples},) is wanted")
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not np.isfinite(total) or (weights < 0).any() or total <= 0:
        raise InvalidInputError("sample_weight must be finite (its sum too), non-negative and not all zero")
    return weights
