"""Files of samples that do not fit in memory: Parquet, and arrays written from batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn.errors import DependencyError, InvalidInputError, StorageError
from cvxnn.files import write_atomically
from cvxnn.operators import RowSource
from cvxnn.operators.base import row_batches
from cvxnn.validation import all_finite, check_choice

__all__ = ["ParquetRows", "store_rows"]

#: Bytes of rows that are copied at once.
_COPY_BYTES = 2**26


class ParquetRows(RowSource):
    """The rows of one or several Parquet files, read a row group at a time.

    Passes take the row groups in turn. Rows in random order, as ``bm_sgd`` wants them, are slow: each batch reads
    all row groups that it has a row of. :func:`store_rows` writes a file for that.

    Parameters
    ----------
    paths : path or sequence of paths
        Files with the same columns, one after the other.
    columns : sequence of str, optional
        The features, in order; by default all columns of numbers but `target`.
    target : str, optional
        A column that is no feature; see :meth:`targets`.

    Raises
    ------
    StorageError
        A file that cannot be read as Parquet, or was changed after it was opened.
    InvalidInputError
        No such column, or one that does not hold numbers.
    DependencyError
        pyarrow is missing: ``pip install 'cvxnn[parquet]'``.

    Examples
    --------
    >>> import pandas as pd, cvxnn, tempfile, os
    >>> file = os.path.join(tempfile.mkdtemp(), "table.parquet")
    >>> pd.DataFrame({"a": [1.0, -1.0, 0.5], "b": [0, 2, 1], "y": [0.1, 0.2, 0.3]}).to_parquet(file)
    >>> rows = cvxnn.ParquetRows(file, target="y")
    >>> rows.shape, rows.targets()
    ((3, 2), array([0.1, 0.2, 0.3]))
    >>> problem = cvxnn.mlp_problem(rows, rows.targets(), n_gates=5, random_state=0)
    """

    def __init__(self, paths: Any, *, columns: Sequence[str] | None = None, target: str | None = None) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DependencyError("reading Parquet files needs pip install 'cvxnn[parquet]'") from error
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise InvalidInputError("paths is empty; at least one Parquet file is wanted")
        self.paths = [Path(path) for path in given]
        self.target = target
        self._state = [self._look(path) for path in self.paths]
        self._groups: list[tuple[int, int]] = []
        starts = [0]
        for i, path in enumerate(self.paths):
            file = self._open(path)
            names = self._numbers(file, columns, path)
            if i == 0:
                self.columns = names
            elif names != self.columns:
                raise InvalidInputError(f"{path} has the columns {names[:5]}; {self.columns[:5]} are wanted, as before")
            for group in range(file.metadata.num_row_groups):
                self._groups.append((i, group))
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
        self._starts = np.array(starts)
        self.shape = (starts[-1], len(self.columns))
        if 0 in self.shape:
            raise InvalidInputError(f"{self.paths[0]} has shape {self.shape}; at least one row and column are wanted")
        self._kept: tuple[int, np.ndarray] | None = None

    def _look(self, path: Path) -> tuple[int, int]:
        try:
            seen = path.stat()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        return seen.st_size, seen.st_mtime_ns

    def _open(self, path: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StorageError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error

    def _numbers(self, file: Any, columns: Sequence[str] | None, path: Path) -> list[str]:
        """Names of the features; all columns of numbers by default."""
        import pyarrow.types as kinds

        fields = {field.name: field.type for field in file.schema_arrow}

        def is_number(name: str) -> bool:
            kind = fields[name]
            return kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)

        for name in [*(columns or ()), *([] if self.target is None else [self.target])]:
            if name not in fields:
                raise InvalidInputError(f"{path} has no column {name!r}; its columns are {list(fields)[:12]}")
        if columns is None:
            return [name for name in fields if name != self.target and is_number(name)]
        for name in columns:
            if not is_number(name):
                raise InvalidInputError(f"column {name!r} of {path} holds {fields[name]}; numbers are wanted")
        return list(columns)

    def targets(self) -> np.ndarray:
        """The target column (n,), numbers or labels, in memory."""
        if self.target is None:
            raise InvalidInputError("target is None; the name of a column is wanted")
        parts = [self._open(path).read(columns=[self.target]).column(0).to_numpy() for path in self.paths]
        return np.concatenate(parts)

    def _group(self, number: int) -> np.ndarray:
        """One row group (rows, d), kept until another is wanted."""
        if self._kept is None or self._kept[0] != number:
            i, group = self._groups[number]
            path = self.paths[i]
            if self._look(path) != self._state[i]:
                raise StorageError(f"{path} was changed after it was opened; open it again")
            table = self._open(path).read_row_group(group, columns=self.columns)
            values = np.empty((len(table), len(self.columns)))
            for k, name in enumerate(self.columns):
                values[:, k] = table.column(name).to_numpy()
            self._kept = (number, values)
        return self._kept[1]

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            first, last = np.searchsorted(self._starts, [rows.start, rows.stop - 1], side="right") - 1
            parts = []
            for number in range(first, last + 1):
                start = self._starts[number]
                parts.append(self._group(number)[max(0, rows.start - start) : rows.stop - start])
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        values = np.empty((len(rows), self.shape[1]))
        where = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(where):
            chosen = where == number
            values[chosen] = self._group(int(number))[rows[chosen] - self._starts[number]]
        return values


def store_rows(batches: Any, path: str | os.PathLike[str], *, dtype: str = "float64") -> tuple[np.memmap, Any]:
    """Write batches of samples to a file in one pass, and map it into memory.

    Parameters
    ----------
    batches : iterable or RowSource
        A ``torch.utils.data.DataLoader``, or anything else that gives batches X (rows, ...) or pairs (X, Y), arrays
        or tensors; what a sample holds beyond one axis is flattened. Random changes that a data set makes are
        taken as they come in this pass.
    path : path
        File to write, as ``numpy.save`` does; written whole or not at all.
    dtype : {"float64", "float32"}

    Returns
    -------
    X : numpy.memmap of shape (n, d)
        For :func:`cvxnn.mlp_problem`.
    Y : numpy.ndarray or None
        The targets, in memory, where there were any.

    Raises
    ------
    InvalidInputError
        Batches of unequal width, with numbers that are not finite, or none at all.
    StorageError
        The file cannot be written.

    Examples
    --------
    >>> import cvxnn, os, tempfile, torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.randn(100, 5), torch.randint(3, (100,)))
    >>> X, y = cvxnn.store_rows(DataLoader(data, batch_size=32), os.path.join(tempfile.mkdtemp(), "X.npy"))
    >>> X.shape, y.shape
    ((100, 5), (100,))
    """
    kind = np.dtype(check_choice(dtype, "dtype", ("float64", "float32")))
    targets: list[np.ndarray] = []

    def write(temporary: Path) -> None:
        n, width = 0, None
        with temporary.open("wb") as stream:
            for X, Y in _pairs(batches):
                if width is None:
                    width = X.shape[1]
                    _header(stream, kind, (0, width))
                if X.shape[1] != width:
                    raise InvalidInputError(f"a batch has {X.shape[1]} features; {width}, as before, are wanted")
                if n > 0 and (Y is None) != (not targets):
                    raise InvalidInputError("some batches have targets and some have none; all or none are wanted")
                if Y is not None and len(Y) != len(X):
                    raise InvalidInputError(f"a batch has {len(X)} samples and {len(Y)} targets; as many are wanted")
                stream.write(np.ascontiguousarray(X, dtype=kind).data)
                n += len(X)
                if Y is not None:
                    targets.append(Y)
            if width is None or n == 0:
                raise InvalidInputError("batches is empty; at least one sample is wanted")
            # The header has room for a longer shape.
            stream.seek(0)
            _header(stream, kind, (n, width))

    written = write_atomically(path, write)
    return np.load(written, mmap_mode="r"), np.concatenate(targets) if targets else None


def _header(stream: Any, kind: np.dtype, shape: tuple[int, int]) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, description)


def _pairs(batches: Any) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """X (rows, d) and Y (rows, ...) of each batch."""
    if isinstance(batches, RowSource):
        for rows in row_batches(len(batches), 8 * batches.shape[1], _COPY_BYTES):
            yield batches.read(rows), None
        return
    if not isinstance(batches, Iterable):
        raise InvalidInputError(f"batches is a {type(batches).__name__}; an iterable of batches is wanted")
    for batch in batches:
        X, Y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        yield _array(X, "X").reshape(len(X), -1), None if Y is None else _array(Y, "Y")


def _array(value: Any, name: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.ndim == 0 or (name == "X" and array.dtype.kind not in "biuf"):
        raise InvalidInputError(f"a batch has {name} of shape {array.shape} and type {array.dtype}; rows are wanted")
    if array.dtype.kind == "f" and not all_finite(array):
        raise InvalidInputError(f"a batch has {name} with NaN or infinity; finite numbers are wanted")
    return array
