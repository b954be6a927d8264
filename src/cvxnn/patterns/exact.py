"""Dependence of rows of float64 numbers, decided exactly: floats are integers times powers of two."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["all_dependent", "has_rank", "integer_rows"]

_MOST_ENTRIES = 1 << 20


def integer_rows(X: NDArray[np.float64]) -> Iterator[list[int]]:
    """Rows of integers, each a positive multiple of the row of ``X``; columns of zeros are left out."""
    mantissas, exponents = np.frexp(X[:, X.any(axis=0)])
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    lowest = np.where(whole != 0, exponents, np.iinfo(np.int32).max).min(axis=1, keepdims=True)
    shifts = np.where(whole != 0, exponents - lowest, 0)
    for row, shift in zip(whole, shifts, strict=True):
        yield [a << b for a, b in zip(row.tolist(), shift.tolist(), strict=True)]


def all_dependent(X: NDArray[np.float64], sets: Iterable[NDArray[np.int64]]) -> bool:
    """Whether the rows of ``X`` in each line of each array of ``sets`` are linearly dependent, exactly."""
    rows: list[list[int]] = []
    for chosen in sets:
        rows = rows or list(integer_rows(X))
        if not all(_rank([rows[i] for i in line]) < len(line) for line in chosen.tolist()):
            return False
    return True


def has_rank(X: NDArray[np.float64], rank: int) -> bool:
    """Whether the rank of ``X`` is at most ``rank``, exactly; False where that is too much work to decide."""
    if min(X.shape) <= rank:
        return True
    if X.size > _MOST_ENTRIES:
        return False
    return _rank(integer_rows(X), most=rank) <= rank


def _rank(rows: Iterable[list[int]], most: int | None = None) -> int:
    """Rank by elimination without fractions; stops above ``most``."""
    pivots: list[tuple[int, list[int]]] = []
    for row in rows:
        previous = 1
        for column, pivot in pivots:
            head, factor = pivot[column], row[column]
            row = [(head * a - factor * b) // previous for a, b in zip(row, pivot, strict=True)]
            previous = head
        column = next((j for j, a in enumerate(row) if a), -1)
        if column >= 0:
            pivots.append((column, row))
            if most is not None and len(pivots) > most:
                break
    return len(pivots)
