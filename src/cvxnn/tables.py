"""Tables from files, and how their columns become the matrix of numbers that a network sees."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from cvxnn.errors import DependencyError, InvalidInputError, StorageError

__all__ = ["MAX_CATEGORIES", "TablePreprocessor", "as_text", "number_values", "read_table", "text_values"]

#: A column of texts with more distinct values than this is refused: it is an identifier, not a category.
MAX_CATEGORIES = 1000
_PARQUET = (".parquet", ".pq")


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table with a header: Parquet by its suffix (.parquet, .pq), and CSV otherwise.

    Raises
    ------
    StorageError
        No such file, unreadable, without rows, with repeated column names, or with rows of unequal length.
    DependencyError
        Parquet without the extra ``cvxnn[parquet]``.
    """
    source = Path(path)
    if source.is_dir() or not source.exists():
        seen = "is a folder" if source.is_dir() else "does not exist"
        raise StorageError(f"{source} {seen}; a CSV or Parquet file is wanted")
    try:
        frame = _read_parquet(source) if source.suffix.lower() in _PARQUET else _read_csv(source)
    except (StorageError, DependencyError):
        raise
    except OSError as error:
        raise StorageError(f"cannot read {source}: {error.strerror or error}") from error
    except (ValueError, csv.Error, MemoryError, OverflowError) as error:
        raise StorageError(f"{source} cannot be read as a table: {_first_line(error)}") from error
    if frame.empty:
        raise StorageError(f"{source} has no rows; a header and at least one row are wanted")
    frame.columns = frame.columns.map(str)
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise StorageError(f"{source} has more than one column {repeated[0]!r}; distinct column names are wanted")
    return frame


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read_parquet(source: Path) -> pd.DataFrame:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise DependencyError(f"{source} is a Parquet file; reading it needs pip install 'cvxnn[parquet]'") from error
    try:
        return pd.read_parquet(source, engine="pyarrow")
    except pa.ArrowException as error:
        raise StorageError(f"{source} cannot be read as Parquet: {_first_line(error)}") from error


def _read_csv(source: Path) -> pd.DataFrame:
    with source.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, strict=True)
        header = next((row for row in rows if row), None)
        if header is None:
            raise StorageError(f"{source} is empty; a header and at least one row are wanted")
        for row in rows:
            if row and len(row) != len(header):
                raise StorageError(
                    f"{source}, line {rows.line_num} has {len(row)} fields; "
                    f"{len(header)}, one per column of the header, are wanted"
                )
        names = [name.strip() for name in header]
        for name in names:
            if names.count(name) > 1:
                raise StorageError(f"{source} has more than one column {name!r}; distinct column names are wanted")
        stream.seek(0)
        return pd.read_csv(stream, header=0, names=names, index_col=False, low_memory=False, skip_blank_lines=True)


class TablePreprocessor:
    """Columns of a table to a matrix: numbers standardised, everything else one-hot encoded.

    Numbers get mean 0 and standard deviation 1 on the table given to :meth:`fit`. Booleans, texts and
    categories get a column of zeros and ones per value seen there; another value is all zeros in
    :meth:`transform`. Columns that do not vary are left out.

    Parameters
    ----------
    target : str, optional
        Name of the target column, which is no feature.
    split : dict, optional
        How a training part was split off the table (JSON-able); only carried along.

    Attributes
    ----------
    feature_names : list of str
        One per column of the matrix: "age", or "colour=red" for an encoded value.

    Examples
    --------
    >>> import pandas as pd
    >>> from cvxnn.tables import TablePreprocessor
    >>> table = pd.DataFrame({"size": [1.0, 3.0], "colour": ["red", "blue"]})
    >>> TablePreprocessor().fit(table).transform(table)
    array([[-1.,  0.,  1.],
           [ 1.,  1.,  0.]])
    """

    def __init__(self, target: str | None = None, split: dict[str, Any] | None = None) -> None:
        self.target = target
        self.split = split
        self._columns: list[dict[str, Any]] = []

    def fit(self, table: pd.DataFrame) -> TablePreprocessor:
        """Learn scales and categories of a data frame.

        Raises
        ------
        InvalidInputError
            No rows, missing values, infinities, dates, too many categories, or no column that varies.
        """
        features = table.drop(columns=[self.target], errors="ignore") if self.target is not None else table
        if not len(features) or not features.shape[1]:
            raise InvalidInputError(f"the table has shape {features.shape}; at least one row and one column are wanted")
        described = [_describe(str(name), features[name]) for name in features.columns]
        self._columns = [column for column in described if column is not None]
        if not self._columns:
            raise InvalidInputError("no column of the table varies; at least one feature that does is wanted")
        return self

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the table that are used."""
        return [column["name"] for column in self._columns]

    @property
    def feature_names(self) -> list[str]:
        """Names of the columns of the matrix."""
        return [feature for column in self._columns for feature in _features(column)]

    def transform(self, table: pd.DataFrame) -> np.ndarray:
        """The matrix of a table, (n, n_features) float64; columns not seen in :meth:`fit` are ignored.

        Raises
        ------
        InvalidInputError
            Missing columns or values, infinities, or text where numbers were.
        """
        if not self._columns:
            raise InvalidInputError("this TablePreprocessor is not fitted; call fit first")
        missing = [name for name in self.columns if name not in table.columns]
        if missing:
            names = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise InvalidInputError(f"the table lacks {names}; all columns that the model was trained on are wanted")
        parts = []
        for column in self._columns:
            series = table[column["name"]]
            if column["kind"] == "number":
                values = number_values(column["name"], series)
                parts.append(((values - column["mean"]) / column["scale"])[:, None])
            else:
                texts = text_values(column["name"], series)
                parts.append((texts[:, None] == np.array(column["categories"], dtype=object)).astype(np.float64))
        return np.ascontiguousarray(np.hstack(parts))

    def unknown_categories(self, table: pd.DataFrame) -> dict[str, list[str]]:
        """Values of category columns that :meth:`fit` has not seen; :meth:`transform` encodes them as all zeros."""
        unknown = {}
        for column in self._columns:
            if column["kind"] == "category":
                unseen = set(text_values(column["name"], table[column["name"]])) - set(column["categories"])
                if unseen:
                    unknown[column["name"]] = sorted(unseen)
        return unknown

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {"target": self.target, "split": self.split, "columns": [dict(column) for column in self._columns]}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> TablePreprocessor:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        InvalidInputError
            Not such a dictionary.
        """
        try:
            target, split = document["target"], document["split"]
            columns = [_check_column(column) for column in document["columns"]]
            if not isinstance(target, str | None) or not isinstance(split, dict | None):
                raise TypeError("target or split has a wrong type")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"this is no description of a table preprocessor ({error!r})") from error
        restored = cls(target, split)
        restored._columns = columns
        return restored


def _describe(name: str, series: pd.Series) -> dict[str, Any] | None:
    """What is learned of one column; None where it does not vary."""
    if types.is_numeric_dtype(series.dtype) and not types.is_bool_dtype(series.dtype):
        values = number_values(name, series)
        size = float(np.abs(values).max())
        mean = float((values / size).mean()) * size if size > 0 else 0.0
        scale = float((values / size - mean / size).std()) * size if size > 0 else 0.0
        if scale <= 1e-14 * size:
            return None
        return {"name": name, "kind": "number", "mean": mean, "scale": scale}
    categories = sorted(set(text_values(name, series)))
    if len(categories) > MAX_CATEGORIES:
        raise InvalidInputError(
            f"column {name!r} has {len(categories)} distinct texts; at most {MAX_CATEGORIES} are encoded, "
            "leave the column out"
        )
    return {"name": name, "kind": "category", "categories": categories} if len(categories) > 1 else None


def _features(column: dict[str, Any]) -> list[str]:
    if column["kind"] == "number":
        return [column["name"]]
    return [f"{column['name']}={category}" for category in column["categories"]]


def _check_column(column: dict[str, Any]) -> dict[str, Any]:
    """A copy of a column's description, its types checked."""
    name = column["name"]
    if not isinstance(name, str):
        raise TypeError("a column name is no text")
    if column["kind"] == "number":
        mean, scale = float(column["mean"]), float(column["scale"])
        if not (math.isfinite(mean) and math.isfinite(scale) and scale > 0):
            raise ValueError(f"mean or scale of {name!r} is not usable")
        return {"name": name, "kind": "number", "mean": mean, "scale": scale}
    categories = column["categories"]
    if column["kind"] != "category" or not all(isinstance(category, str) for category in categories):
        raise ValueError(f"column {name!r} is neither numbers nor categories")
    return {"name": name, "kind": "category", "categories": list(categories)}


def _check_present(name: str, series: pd.Series) -> None:
    n_missing = int(series.isna().sum())
    if n_missing:
        raise InvalidInputError(
            f"column {name!r} has missing values (NaN) in {n_missing} of {len(series)} rows; "
            "fill them in or leave these rows out"
        )


def number_values(name: str, series: pd.Series) -> np.ndarray:
    """A column as finite float64 numbers."""
    _check_present(name, series)
    if not types.is_numeric_dtype(series.dtype) or types.is_complex_dtype(series.dtype):
        example = str(series.iloc[0])[:40]
        raise InvalidInputError(f"column {name!r} has values such as {example!r}; real numbers are wanted")
    values = series.to_numpy(dtype=np.float64)
    n_infinite = int((~np.isfinite(values)).sum())
    if n_infinite:
        raise InvalidInputError(
            f"column {name!r} has infinite values in {n_infinite} of {len(values)} rows; finite numbers are wanted"
        )
    return values


def text_values(name: str, series: pd.Series) -> np.ndarray:
    """A column as an object array of texts; whole numbers are written without a decimal point."""
    _check_present(name, series)
    if types.is_datetime64_any_dtype(series.dtype) or types.is_timedelta64_dtype(series.dtype):
        raise InvalidInputError(f"column {name!r} has dates or durations; convert them to numbers or leave them out")
    return np.array([as_text(value) for value in series], dtype=object)


def as_text(value: Any) -> str:
    """A value as text; 1.0 is "1", so that a column of labels reads the same however it was stored."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)
