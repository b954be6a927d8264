"""Samples that are read when they are needed: arrays on disk, Parquet files, and any other source of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from cvxnn.operators.base import row_batches

__all__ = ["MappedRows", "RowSource", "Rows"]

#: Bytes of rows that are read at once in a pass.
_READ_BYTES = 2**26


class RowSource(ABC):
    """Samples (n, d) that need not be in memory.

    A source of one's own gives `shape` and :meth:`read`. Reading the same rows twice must give the same numbers:
    certificates are computed in passes over the samples.

    Attributes
    ----------
    shape : (int, int)
        Samples n and features d.
    """

    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some of the samples, (rows, d), for a slice without a step or an array of indices."""


class MappedRows(RowSource):
    """The rows of an array, as a rule one that is mapped into memory; it is never copied as a whole.

    Parameters
    ----------
    array : numpy.ndarray or numpy.memmap of shape (n, d)
        Of any real type.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = (int(array.shape[0]), int(array.shape[1]))

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.array[rows]


class Rows:
    """Rows of a source as a tensor (n, d) that is formed a few rows at a time.

    Parameters
    ----------
    source : RowSource
    rounded : torch.dtype
        What is read is rounded to this type, the data of the problem.
    dtype : torch.dtype, optional
        Type of the tensors; that of `rounded`, or float64 for the same numbers.
    device : torch.device
    ones : bool
        Whether a column of ones follows the features.
    part : slice, optional
        The rows of the source that these are; all by default.
    """

    def __init__(
        self,
        source: RowSource,
        rounded: torch.dtype,
        device: torch.device,
        ones: bool = False,
        dtype: torch.dtype | None = None,
        part: slice | None = None,
    ) -> None:
        self.source, self.rounded, self.ones = source, rounded, ones
        self.dtype, self.device = dtype or rounded, device
        start, stop, _ = (part or slice(None)).indices(len(source))
        self.range = slice(start, stop)
        self.shape = torch.Size((stop - start, source.shape[1] + ones))

    def __len__(self) -> int:
        return self.shape[0]

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def new_zeros(self, *size: int) -> torch.Tensor:
        """A tensor of the type and on the device of the rows."""
        return torch.zeros(*size, dtype=self.dtype, device=self.device)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some of the rows, read now."""
        first = self.range.start
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            read = self.source.read(slice(first + start, first + stop))
        else:
            read = self.source.read(rows.cpu().numpy() + first)
        kind = np.float64 if self.rounded == torch.float64 else np.float32
        values = np.empty((len(read), self.shape[1]), dtype=kind)
        values[:, : self.source.shape[1]] = read
        if self.ones:
            values[:, -1] = 1.0
        return torch.from_numpy(values).to(self.device, self.dtype)

    def double(self) -> Rows:
        """The same numbers in float64."""
        return Rows(self.source, self.rounded, self.device, self.ones, torch.float64, self.range)

    def part(self, rows: slice) -> Rows:
        """A range of these rows, not read yet."""
        start, stop, _ = rows.indices(len(self))
        first = self.range.start
        chosen = slice(first + start, first + stop)
        return Rows(self.source, self.rounded, self.device, self.ones, self.dtype, chosen)

    def batches(self) -> list[slice]:
        """Slices of rows to read at once."""
        return row_batches(len(self), self.shape[1] * 8, _READ_BYTES)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All rows, a batch at a time."""
        return (self[rows] for rows in self.batches())
