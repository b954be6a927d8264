"""All activation patterns of a matrix: one gate for each full-dimensional cell of its arrangement."""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from cvxnn.errors import CvxnnError, InvalidInputError, UnsupportedError
from cvxnn.patterns.activation import check_matrix
from cvxnn.patterns.arrangement import DegenerateArrangementError, cell_points, distinct_lines

DEFAULT_MAX_CELLS = 500_000

RANK_TOLERANCE = 1e-10
"""Singular values below this fraction of the largest count as zero (columns and rows scaled to about 1)."""

TOLERANCES = (1e-12, 1e-13, 1e-11, 1e-14)
"""Distances (of unit normals, of intersections) that count as zero, tried until the cells add up."""

_CHECK_COLUMNS = 8192


@dataclass(frozen=True)
class _ReducedRows:
    """Unit normals of the distinct hyperplanes in rank coordinates y, where g = basis @ y.

    ``kept`` says which of the non-zero rows of X they are.
    """

    normals: NDArray[np.float64]
    kept: NDArray[np.int64]
    basis: NDArray[np.float64]


def count_cells_bound(X: NDArray[np.floating]) -> int:
    """Upper bound on the number of full-dimensional cells, met in general position.

    Parameters
    ----------
    X : array (n, d)
        Samples in rows.

    Returns
    -------
    bound : int
        2 sum_{i<r} C(N - 1, i) for N distinct (up to scale and sign) non-zero rows of rank r; 1 for r = 0.

    Raises
    ------
    InvalidInputError
        ``X`` is not a matrix of finite numbers.

    Notes
    -----
    Cover (1965); section 2 of the maths. The rank is the number of singular values above
    ``RANK_TOLERANCE`` times the largest, columns and rows first scaled to about 1.
    """
    return _bound(_reduce(check_matrix("X", X)))


def enumerate_gates(X: NDArray[np.floating], *, max_cells: int = DEFAULT_MAX_CELLS) -> NDArray[np.float64]:
    """One strictly interior gate for every full-dimensional cell of {g : x_i . g = 0, i = 1..n}.

    Parameters
    ----------
    X : array (n, d)
        Samples in rows. Zero rows are ignored; proportional rows make one hyperplane.
    max_cells : int
        Refuse where ``count_cells_bound`` is above this.

    Returns
    -------
    gates : array (d, P)
        Unit vectors, one for each cell, the pattern without any active sample included where it is a cell.
        Gates k and k + P / 2 are opposite. Where all rows are zero, one gate.

    Raises
    ------
    InvalidInputError
        ``X`` is not a matrix of finite numbers, or ``max_cells`` is not a positive integer.
    UnsupportedError
        There may be more than ``max_cells`` cells.
    CvxnnError
        Hyperplanes so close to a common intersection that float64 cannot tell the cells apart.

    Notes
    -----
    Exact for arrangements whose distinct features (angles between hyperplanes, gaps between intersections)
    are above the tolerance, about 1e-12; closer ones count as equal. The number of cells found is checked
    against the number of their faces (Euler, deletion and restriction), and every gate has every sample on
    its side by more than the rounding of a float64 product, in whatever order that is summed.
    """
    X = check_matrix("X", X)
    if not isinstance(max_cells, Integral) or isinstance(max_cells, bool) or max_cells < 1:
        raise InvalidInputError(f"max_cells is {max_cells!r}; an integer of at least 1 is wanted.")
    reduced = _reduce(X)
    bound = _bound(reduced)
    if bound > max_cells:
        raise UnsupportedError(
            f"X may have {_format_count(bound)} activation patterns ({len(reduced.normals)} distinct rows of "
            f"rank {reduced.basis.shape[1]}) and the limit max_cells is {max_cells}; sample gates instead, "
            "or raise max_cells."
        )
    if reduced.basis.shape[1] == 0:
        return np.eye(X.shape[1], 1)
    reason = ""
    for tolerance in TOLERANCES:
        try:
            return _interior_gates(X, reduced, tolerance)
        except DegenerateArrangementError as error:
            reason = reason or str(error)
    raise CvxnnError(
        f"The rows of X are too close to a degenerate position to be enumerated in float64 ({reason}); "
        "round X, remove nearly equal rows, or sample gates."
    )


def _reduce(X: NDArray[np.float64]) -> _ReducedRows:
    """Scale columns and rows, drop zero rows, find the rank, merge proportional rows."""
    rows = np.flatnonzero(X.any(axis=1))
    if rows.size == 0:
        return _ReducedRows(np.empty((0, 0)), rows, np.empty((X.shape[1], 0)))
    scaled, columns = _equilibrate(X[rows])
    factor = np.linalg.qr(scaled, mode="r") if len(scaled) > scaled.shape[1] else scaled
    _, singular, vt = np.linalg.svd(factor, full_matrices=False)
    rank = int((singular > RANK_TOLERANCE * singular[0]).sum())
    normals = scaled @ vt[:rank].T
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    kept = distinct_lines(normals, np.full(len(normals), TOLERANCES[0]))
    return _ReducedRows(normals[kept], kept, columns[:, None] * vt[:rank].T)


def _equilibrate(X: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit rows of X diag(columns), with powers of two for columns: the signs of X g are untouched."""
    peak = np.abs(X).max(axis=1, keepdims=True)
    scaled = X / peak
    height = np.abs(scaled).max(axis=0)
    exponents = np.round(np.log2(np.where(height > 0.0, height, 1.0)))
    columns = np.exp2(np.clip(-exponents, -1000.0, 1000.0))
    scaled = scaled * columns
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True), columns


def _bound(reduced: _ReducedRows) -> int:
    rank = reduced.basis.shape[1]
    if rank == 0:
        return 1
    total, term, others = 0, 1, len(reduced.normals) - 1
    for i in range(rank):
        total += term
        term = term * (others - i) // (i + 1)
    return 2 * total


def _format_count(count: int) -> str:
    return str(count) if count < 10**15 else f"about 10^{math.floor(math.log10(count))}"


def _interior_gates(X: NDArray[np.float64], reduced: _ReducedRows, tolerance: float) -> NDArray[np.float64]:
    points = cell_points(reduced.normals, np.full(len(reduced.normals), tolerance))
    gates = reduced.basis @ points
    gates /= np.abs(gates).max(axis=0)
    gates /= np.linalg.norm(gates, axis=0)
    _check_margins(X, gates, reduced, points)
    return np.concatenate([gates, -gates], axis=1)


def _check_margins(
    X: NDArray[np.float64], gates: NDArray[np.float64], reduced: _ReducedRows, points: NDArray[np.float64]
) -> None:
    """Each sample must lie on its side by more than the rounding of any order of summation."""
    X = X[X.any(axis=1)]
    X = X / np.abs(X).max(axis=1, keepdims=True)
    rounding = (X.shape[1] + 2) * np.finfo(np.float64).eps
    size = np.abs(X)
    for k in range(0, gates.shape[1], _CHECK_COLUMNS):
        block = gates[:, k : k + _CHECK_COLUMNS]
        values = X @ block
        if np.any(np.abs(values) <= rounding * (size @ np.abs(block))):
            raise DegenerateArrangementError("a cell is thinner than the rounding of a float64 product")
        derived = reduced.normals @ points[:, k : k + _CHECK_COLUMNS] > 0.0
        if not np.array_equal(values[reduced.kept] > 0.0, derived):
            raise DegenerateArrangementError("a gate has lost its pattern in rounding")
