"""Images and labels as they are given to the classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets

from cvxnn.errors import InvalidInputError
from cvxnn.validation import as_images

__all__ = ["read_labels", "read_pixels", "read_validation"]


def read_pixels(X: Any, name: str) -> np.ndarray:
    """Images (n, C, H, W); those without channels get one."""
    shape = getattr(X, "shape", None)
    if shape is None:
        try:
            X = np.asarray(X)
        except ValueError as error:
            raise InvalidInputError(f"{name} cannot be read as images of one size: {error}") from error
        shape = X.shape
    if len(shape) == 3:
        X = X[:, None]
    elif len(shape) != 4:
        raise InvalidInputError(
            f"{name} has shape {tuple(shape)}; (n, channels, height, width), or without channels, is wanted"
        )
    return as_images(X, name)


def read_labels(y: Any, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Classes and the index of each label."""
    y = np.asarray(y.to_numpy() if hasattr(y, "to_numpy") else y)
    if y.shape != (n,):
        raise InvalidInputError(f"{name} has shape {y.shape}; ({n},), a label per image, is wanted")
    try:
        check_classification_targets(y)
        classes, index = np.unique(y, return_inverse=True)
    except TypeError as error:
        raise InvalidInputError(f"{name} mixes labels of different types; labels of one type are wanted") from error
    except ValueError as error:
        raise InvalidInputError(f"{name} has no class labels: {error}") from error
    return classes, index.astype(np.int64)


def read_validation(
    validation: Any, shape: tuple[int, ...], classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (n, C, H, W) of a given shape, and the index in `classes` of each label; None where there are none."""
    if validation is None:
        return None
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise InvalidInputError("validation is not a pair; images and labels are wanted")
    images = read_pixels(validation[0], "validation images")
    if images.shape[1:] != shape:
        raise InvalidInputError(f"validation images have shape {images.shape[1:]}; {shape}, as in X, is wanted")
    found, index = read_labels(validation[1], len(images), "validation labels")
    place = {label: i for i, label in enumerate(classes.tolist())}
    unknown = [label for label in found.tolist() if label not in place]
    if unknown:
        raise InvalidInputError(f"validation labels have {unknown[0]!r}, which is not in y")
    return images, np.array([place[label] for label in found.tolist()], dtype=np.int64)[index]
