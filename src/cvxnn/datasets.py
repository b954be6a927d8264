"""Bundled data sets, as data frames, and a generator of spirals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn import datasets as sklearn_datasets
from sklearn.utils import check_random_state

from cvxnn.errors import InvalidInputError
from cvxnn.validation import check_integer, check_positive

__all__ = ["DATASETS", "Dataset", "load_dataset", "spiral"]


@dataclass(frozen=True)
class Dataset:
    """A table of features and its target.

    Attributes
    ----------
    name : str
    X : pandas.DataFrame of shape (n, d)
    y : pandas.Series of shape (n,)
        Labels (numbers or texts), or real numbers.
    task : {"classification", "regression"}
    """

    name: str
    X: pd.DataFrame
    y: pd.Series
    task: str


@dataclass(frozen=True)
class _Source:
    task: str
    description: str
    load: Callable[[], tuple[pd.DataFrame, pd.Series]]


def spiral(
    n_samples: int = 150, n_classes: int = 3, noise: float = 0.2, random_state: Any = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Points on the arms of a spiral, an arm per class, the same number on each (within one).

    Arm k has radius r from 0 to 1/2 and angle 4 (2 r + k) (in radians, four per class), plus normal noise.

    Parameters
    ----------
    n_samples : int
    n_classes : int
    noise : float
        Standard deviation of the angle.
    random_state : int, RandomState or None

    Returns
    -------
    X : ndarray of shape (n_samples, 2), in [-0.5, 0.5]
    y : ndarray of shape (n_samples,), int

    Raises
    ------
    InvalidInputError
        Fewer than two classes, fewer samples than classes, or a negative noise.
    """
    check_integer(n_classes, "n_classes", minimum=2)
    check_integer(n_samples, "n_samples", minimum=n_classes)
    check_positive(noise, "noise", allow_zero=True)
    random = check_random_state(random_state)
    sizes = [n_samples // n_classes + (k < n_samples % n_classes) for k in range(n_classes)]
    arms = []
    for k, size in enumerate(sizes):
        radius = np.linspace(0.0, 1.0, size)
        angle = 4 * (radius + k) + noise * random.standard_normal(size)
        arms.append(radius[:, None] / 2 * np.column_stack([np.sin(angle), np.cos(angle)]))
    return np.vstack(arms), np.repeat(np.arange(n_classes), sizes)


def _from_sklearn(loader: Callable[..., Any], named_classes: bool = False) -> tuple[pd.DataFrame, pd.Series]:
    bunch = loader(as_frame=True)
    y = bunch.target
    if named_classes:
        y = pd.Series(np.array(bunch.target_names, dtype=str)[y.to_numpy()], name="target", dtype=object)
    return bunch.data, y.rename("target")


def _spiral_table() -> tuple[pd.DataFrame, pd.Series]:
    X, y = spiral(150)
    return pd.DataFrame(X, columns=["x1", "x2"]), pd.Series(y, name="target")


_CLASSES, _NUMBERS = "classification", "regression"

#: Names that :func:`load_dataset` knows, each with its task, a description in a line, and its loader.
DATASETS: dict[str, _Source] = {
    "breast_cancer": _Source(
        _CLASSES,
        "569 tumours, 30 measurements of cell nuclei; malignant or benign",
        lambda: _from_sklearn(sklearn_datasets.load_breast_cancer, named_classes=True),
    ),
    "diabetes": _Source(
        _NUMBERS,
        "442 patients, 10 measurements; progression of diabetes after a year",
        lambda: _from_sklearn(sklearn_datasets.load_diabetes),
    ),
    "digits": _Source(
        _CLASSES,
        "1797 handwritten digits, 8 x 8 pixels; 10 classes",
        lambda: _from_sklearn(sklearn_datasets.load_digits),
    ),
    "iris": _Source(
        _CLASSES,
        "150 flowers, 4 measurements; 3 species",
        lambda: _from_sklearn(sklearn_datasets.load_iris, named_classes=True),
    ),
    "spiral": _Source(_CLASSES, "150 points in the plane on a spiral with 3 arms; 3 classes", _spiral_table),
    "wine": _Source(
        _CLASSES,
        "178 wines, 13 chemical measurements; 3 cultivars",
        lambda: _from_sklearn(sklearn_datasets.load_wine, named_classes=True),
    ),
}


def load_dataset(name: str) -> Dataset:
    """A bundled data set; nothing is downloaded.

    Raises
    ------
    InvalidInputError
        An unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in DATASETS:
        known = ", ".join(DATASETS)
        raise InvalidInputError(f"name is {name!r}, which is no bundled data set; one of {known} is wanted")
    source = DATASETS[name]
    X, y = source.load()
    return Dataset(name, X, y, source.task)
