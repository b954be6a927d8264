"""From DATA on the command line to the arrays of a training: target, task, training and test rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types
from sklearn.base import is_classifier
from sklearn.model_selection import train_test_split

from cvxnn.datasets import DATASETS, load_dataset
from cvxnn.errors import CvxnnError, InvalidInputError, StorageError
from cvxnn.storage import load
from cvxnn.tables import as_text, number_values, read_table, text_values

__all__ = [
    "MAX_CLASSES",
    "DataError",
    "Source",
    "data_errors",
    "features_of",
    "label_indices",
    "load_model",
    "open_source",
    "scores",
    "split_rows",
    "target_values",
    "unknown_category_notes",
]

#: Integer targets with more distinct values than this are taken for numbers, not for classes.
MAX_CLASSES = 20
_BARE_NAME = re.compile(r"[A-Za-z0-9_-]+")


class DataError(CvxnnError):
    """The contents of the data cannot be used: no wrong use of the command, but a failure."""


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn errors about values into errors about the data (exit status 1)."""
    try:
        yield
    except InvalidInputError as error:
        raise DataError(str(error)) from error


@dataclass(frozen=True)
class Source:
    """A table and where it is from; `task` and `target` are known for bundled data sets only."""

    name: str
    frame: pd.DataFrame
    target: str | None = None
    task: str | None = None

    def choose_target(self, asked: str | None, default: str | None = None) -> str:
        """The target column: as asked, or the default given, or the last one."""
        columns = list(self.frame.columns)
        if len(columns) == 1:
            raise DataError(
                f"{self.name} has only one column, {columns[0]!r}; a target and features, separated by commas, are "
                "wanted"
            )
        if asked is not None and asked not in columns:
            shown = ", ".join(map(repr, columns[:12])) + (", ..." if len(columns) > 12 else "")
            raise InvalidInputError(f"--target is {asked!r}; one of the columns {shown} is wanted")
        if default is not None and asked is None and default not in columns:
            raise DataError(f"{self.name} lacks the target column {default!r}; give another with --target")
        return asked or default or self.target or columns[-1]


def open_source(data: str) -> Source:
    """The table of a bundled name or of a file.

    Raises
    ------
    InvalidInputError
        A bare word that is neither.
    StorageError
        A file that cannot be read.
    """
    if data in DATASETS:
        dataset = load_dataset(data)
        target = str(dataset.y.name)
        return Source(data, dataset.X.assign(**{target: dataset.y}), target, dataset.task)
    if _BARE_NAME.fullmatch(data) and not Path(data).exists():
        known = ", ".join(DATASETS)
        raise InvalidInputError(f"DATA is {data!r}; a CSV or Parquet file or one of {known} is wanted")
    return Source(data, read_table(data))


def target_values(series: pd.Series, task: str | None) -> tuple[np.ndarray, str]:
    """The target as an array, and the task.

    Without a task: texts, booleans and integers with at most `MAX_CLASSES` distinct values are classes,
    all other numbers are values to be predicted.

    Raises
    ------
    DataError
        Missing or infinite values, only one class.
    InvalidInputError
        Numbers that are not whole as classes.
    """
    name = str(series.name)
    is_text = types.is_bool_dtype(series.dtype) or not types.is_numeric_dtype(series.dtype)
    with data_errors():
        values = text_values(name, series) if is_text else number_values(name, series)
    if task is None:
        few = is_text or (types.is_integer_dtype(series.dtype) and len(np.unique(values)) <= MAX_CLASSES)
        task = "classification" if few else "regression"
    if task == "regression":
        if is_text:
            raise DataError(f"target {name!r} has values such as {values[0]!r}; numbers are wanted for regression")
        return values, task
    if types.is_bool_dtype(series.dtype):
        labels = series.to_numpy(dtype=bool)
    elif is_text:
        labels = values.astype(str)
    elif (values == np.floor(values)).all() and np.abs(values).max() < 2**53:
        labels = values.astype(np.int64)
    else:
        raise InvalidInputError(f"--task is 'classification', but target {name!r} has numbers that are not whole")
    if len(np.unique(labels)) < 2:
        raise DataError(f"target {name!r} has only one class, {as_text(labels[0])!r}; at least two are wanted")
    return labels, task


def split_rows(y: np.ndarray, task: str, test_size: float, random_state: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test rows; every class has its share in both where there are enough of it.

    Raises
    ------
    InvalidInputError
        `test_size` is not in [0, 1).
    DataError
        Too few rows, or a training part with a single class.
    """
    rows = np.arange(len(y))
    if not (math.isfinite(test_size) and 0 <= test_size < 1):
        raise InvalidInputError(f"--test-size is {test_size!r}; a fraction of at least 0 and below 1 is wanted")
    if test_size == 0:
        return rows, rows[:0]
    n_test = math.ceil(test_size * len(y))
    if n_test >= len(y):
        raise DataError(f"the data have {len(y)} rows, too few to hold out {test_size:g} of them; use --test-size 0")
    stratify = None
    if task == "classification":
        counts = np.unique(y, return_counts=True)[1]
        if counts.min() >= 2 and len(counts) <= min(n_test, len(y) - n_test):
            stratify = y
    train, test = train_test_split(rows, test_size=n_test, random_state=random_state, stratify=stratify)
    if task == "classification" and len(np.unique(y[train])) < 2:
        raise DataError("the training rows have only one class; use --test-size 0 or more data")
    return np.sort(train), np.sort(test)


def load_model(path: str) -> Any:
    """A model that was trained by an estimator of cvxnn.

    Raises
    ------
    StorageError
        Anything else.
    """
    model = load(path)
    if not hasattr(model, "certificate_"):
        raise StorageError(f"{path} holds a bare network; a trained model saved by cvxnn is wanted")
    return model


def unknown_category_notes(model: Any, frame: pd.DataFrame) -> list[str]:
    """A sentence per category column with values that the model was not trained on."""
    if not hasattr(model, "preprocessor_"):
        return []
    notes = []
    for name, values in model.preprocessor_.unknown_categories(frame).items():
        shown = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
        notes.append(f"Note: column {name!r} has values that were not there in training ({shown}); they count as none.")
    return notes


def features_of(model: Any, frame: pd.DataFrame, target: str | None) -> np.ndarray | pd.DataFrame:
    """What a model is to see, (n, n_features); with column names where it was fitted to some."""
    with data_errors():
        if hasattr(model, "preprocessor_"):
            return model.preprocessor_.transform(frame)
        names = list(getattr(model, "feature_names_in_", [name for name in frame.columns if name != target]))
        missing = [name for name in names if name not in frame.columns]
        if missing:
            raise DataError(f"the table lacks the columns {', '.join(map(repr, missing))}")
        if len(names) != model.n_features_in_:
            raise DataError(f"the table has {len(names)} feature columns; {model.n_features_in_} are wanted")
        table = pd.DataFrame({name: number_values(name, frame[name]) for name in names})
        return table if hasattr(model, "feature_names_in_") else table.to_numpy()


def label_indices(model: Any, series: pd.Series) -> np.ndarray:
    """Index of each label among the model's classes, -1 for a label that is none of them."""
    known = {as_text(label): index for index, label in enumerate(model.classes_.tolist())}
    with data_errors():
        return np.array([known.get(text, -1) for text in text_values(str(series.name), series)])


def scores(model: Any, X: Any, y: np.ndarray) -> dict[str, float]:
    """Accuracy, or R^2 and root mean squared error; `y` are labels or numbers."""
    predicted = model.predict(X)
    if is_classifier(model):
        return {"accuracy": float(np.mean(predicted == y))}
    squared = np.square(predicted - y)
    spread = float(np.square(y - y.mean()).sum())
    r2 = 1 - float(squared.sum()) / spread if spread > 0 else math.nan
    return {"r2": r2, "rmse": math.sqrt(float(squared.mean()))}
