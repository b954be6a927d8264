"""All activation patterns of a matrix: one gate for each full-dimensional cell of its arrangement."""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from cvxnn.errors import CvxnnError, InvalidInputError, UnsupportedError
from cvxnn.patterns.activation import check_matrix
from cvxnn.patterns.arrangement import DegenerateArrangementError, cell_points, distinct_lines
from cvxnn.patterns.concurrency import Concurrences, angle_error, required_tolerance
from cvxnn.patterns.coverage import Coverage, cover, span, span_error
from cvxnn.patterns.exact import all_dependent, has_rank

DEFAULT_MAX_CELLS = 500_000

RANK_TOLERANCE = 1e-10
"""Singular values below this fraction of the largest count as zero (columns and rows scaled to about 1)."""

TOLERANCES = (1e-12, 1e-13, 1e-11, 1e-14)
"""Distances (of unit normals, of intersections) that count as zero, tried until the cells add up."""

_CHECK_COLUMNS = 8192
_EPS = 2.0**-53
_FARTHEST = 2.0**900


@dataclass(frozen=True)
class CellList:
    """A gate inside each cell of an arrangement, and what is proven about the cells that are not there.

    Attributes
    ----------
    gates : array (d, P)
    exact : bool
        Whether these are all cells.
    coverage : Coverage or None
        Where that is not so, what the others can add to ReLU neurons; None where nothing is proven.
    """

    gates: NDArray[np.float64]
    exact: bool
    coverage: Coverage | None = None


@dataclass(frozen=True)
class _ReducedRows:
    """Unit normals of the distinct hyperplanes in rank coordinates y, where g = basis @ y.

    ``kept`` says which of the non-zero rows of X they are, ``leaders`` which of them each non-zero row was merged
    with, and ``opposite`` whether that has the opposite direction. Normals are off by ``error`` at most; ``regular``
    says that the columns of the basis are surely independent, and free of underflow. ``columns`` are powers of two,
    diag(columns)^-1 basis has orthonormal columns.
    """

    normals: NDArray[np.float64]
    kept: NDArray[np.int64]
    leaders: NDArray[np.int64]
    opposite: NDArray[np.bool_]
    basis: NDArray[np.float64]
    columns: NDArray[np.float64]
    error: float
    regular: bool


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
    Intersections of hyperplanes whose distance float64 cannot tell from zero count as equal:
    :func:`enumerate_cells` says whether any of these are different. The number of cells found is checked
    against the number of their faces (Euler, deletion and restriction), and every gate has every sample on
    its side by more than the rounding of a float64 product, in whatever order that is summed.
    """
    return enumerate_cells(X, max_cells=max_cells).gates


def enumerate_cells(X: NDArray[np.floating], *, max_cells: int = DEFAULT_MAX_CELLS) -> CellList:
    """The gates of :func:`enumerate_gates`, and a proof that no cell is missing, or of what missing ones can do.

    Parameters, errors : as for :func:`enumerate_gates`

    Notes
    -----
    With the directions of distinct hyperplanes known up to an error, all cells are found if (Cover 1965)

    - there are as many as in general position, with points inside that the error cannot move out, or
    - the tolerance is so large that different intersections are in the right order, and those that were taken for
      equal are equal: that is decided in integers.

    Merged rows must be proportional, and the rank exact, which is decided in integers as well. Elsewhere, in rank 3
    at most (or, in any rank, if only merged rows and the rank are inexact), the bound of :class:`Coverage` holds.
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
        return CellList(np.eye(X.shape[1], 1), exact=True)
    reason = ""
    for tolerance in TOLERANCES:
        try:
            return _list_cells(X[X.any(axis=1)], reduced, tolerance, general=bound)
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
        return _ReducedRows(
            np.empty((0, 0)), rows, rows, rows > 0, np.empty((X.shape[1], 0)), np.ones(X.shape[1]), 0.0, True
        )
    scaled, columns = _equilibrate(X[rows])
    factor = np.linalg.qr(scaled, mode="r") if len(scaled) > scaled.shape[1] else scaled
    _, singular, vt = np.linalg.svd(factor, full_matrices=False)
    rank = int((singular > RANK_TOLERANCE * singular[0]).sum())
    normals = scaled @ vt[:rank].T
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals /= lengths
    kept, leaders = distinct_lines(normals, np.full(len(normals), TOLERANCES[0]))
    opposite = np.einsum("nr,nr->n", normals, normals[leaders]) < 0.0
    # Entries of unit rows have two roundings, and a product with d entries d more; the norm drops out.
    error = 1.1 * (math.sqrt(rank) * X.shape[1] + 6) * _EPS / float(lengths.min())
    basis = vt[:rank].T
    regular = _FARTHEST > columns.max() >= columns.min() > 1 / _FARTHEST
    regular &= bool(np.abs(basis.T @ basis - np.eye(rank)).max() * rank < 0.5)
    return _ReducedRows(normals[kept], kept, leaders, opposite, columns[:, None] * basis, columns, error, regular)


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


def _list_cells(X: NDArray[np.float64], reduced: _ReducedRows, tolerance: float, general: int) -> CellList:
    """Cells of non-zero rows; ``general`` is their number in general position."""
    rank = reduced.basis.shape[1]
    whole = has_rank(X, rank)
    basis, error = reduced.basis, reduced.error
    if not whole:
        basis = span(basis, reduced.columns)
        error = span_error(X[reduced.kept], basis, reduced.normals)
    record = Concurrences(np.arange(len(reduced.normals)), share=min(1.0, angle_error(error) / tolerance))
    points = cell_points(reduced.normals, np.full(len(reduced.normals), tolerance), record)
    gates = reduced.basis @ points
    gates /= np.abs(gates).max(axis=0)
    gates /= np.linalg.norm(gates, axis=0)
    margin = _check_margins(X, gates, reduced, points)
    gates = np.concatenate([gates, -gates], axis=1)
    if not reduced.regular or margin <= 2 * error + 4 * rank * _EPS:
        return CellList(gates, exact=False)
    width: float | None = None
    if gates.shape[1] == general:
        width = 0.0
    elif tolerance >= required_tolerance(error, rank):
        if all_dependent(X[reduced.kept], record.sets):
            width = 0.0
        elif rank == 3:
            width = record.width()
    if width is None:
        return CellList(gates, exact=False)
    merged = np.flatnonzero(reduced.leaders != np.arange(len(X)))
    pairs = np.stack([merged, reduced.leaders[merged]], axis=1)
    if whole and width == 0.0 and all_dependent(X, [pairs]):
        return CellList(gates, exact=True)
    return CellList(gates, False, cover(X, basis, reduced.leaders, reduced.opposite, width))


def _check_margins(
    X: NDArray[np.float64], gates: NDArray[np.float64], reduced: _ReducedRows, points: NDArray[np.float64]
) -> float:
    """The least margin of a point; each sample must lie on its side by more than the rounding of any summation."""
    X = X / np.abs(X).max(axis=1, keepdims=True)
    rounding = (X.shape[1] + 2) * np.finfo(np.float64).eps
    size = np.abs(X)
    least = math.inf
    for k in range(0, gates.shape[1], _CHECK_COLUMNS):
        block = gates[:, k : k + _CHECK_COLUMNS]
        values = X @ block
        if np.any(np.abs(values) <= rounding * (size @ np.abs(block))):
            raise DegenerateArrangementError("a cell is thinner than the rounding of a float64 product")
        derived = reduced.normals @ points[:, k : k + _CHECK_COLUMNS]
        active = values > 0.0
        if not np.array_equal(active[reduced.kept], derived > 0.0):
            raise DegenerateArrangementError("a gate has lost its pattern in rounding")
        if not np.array_equal(active ^ reduced.opposite[:, None], active[reduced.leaders]):
            raise DegenerateArrangementError("a gate is between two rows that nearly coincide")
        least = min(least, float(np.abs(derived).min()))
    return least
