"""Cells of a central hyperplane arrangement, by deletion and restriction, as points inside them.

Only one of each two opposite cells is found. Normals are unit rows, pairwise not proportional, that span the
space; each has a tolerance, the angle by which its direction is uncertain.
"""

from fractions import Fraction

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from cvxnn.errors import CvxnnError
from cvxnn.patterns.activation import pack_columns
from cvxnn.patterns.concurrency import Concurrences, gap_ends

_Matrix = NDArray[np.float64]

_BLOCK_ENTRIES = 1 << 22
_MAX_TOLERANCE = 0.1
_REDRAWS = 40


class DegenerateArrangementError(CvxnnError):
    """Hyperplanes too close to a degenerate position for the tolerance."""


def cell_points(normals: _Matrix, tolerances: _Matrix, record: Concurrences | None = None) -> _Matrix:
    """A point inside each cell of the arrangement, one for each two opposite cells.

    Parameters
    ----------
    normals : array (N, r)
        Unit normals, no two proportional, of rank r >= 1.
    tolerances : array (N,)
        Uncertainty of each normal's direction.
    record : Concurrences, optional
        Gets what was taken for equal.

    Returns
    -------
    points : array (r, M)
        Unit vectors in columns; 2 M is the number of cells.

    Raises
    ------
    DegenerateArrangementError
        The number of cells found is not the one that follows from the faces.

    Notes
    -----
    Rank 2 sorts angles. In rank 3 every edge of every cell is visited, and a cell gets the mean of the
    midpoints of its edges. From rank 4 on hyperplanes are added one at a time: hyperplane i splits as many
    cells as the previous hyperplanes cut it into (Zaslavsky 1975), found by recursion.
    """
    if not np.all(tolerances < _MAX_TOLERANCE):
        raise DegenerateArrangementError("hyperplanes nearly coincide")
    count, rank = normals.shape
    if count == rank:
        return _simplex_points(normals)
    if rank == 2:
        return _planar_points(normals, tolerances)
    record = Concurrences(np.arange(count)) if record is None else record
    if rank == 3:
        return _spatial_points(normals, tolerances, record)
    return _incremental_points(normals, tolerances, record)


def distinct_lines(normals: _Matrix, tolerances: _Matrix) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Unit rows (N, r), one for each line up to the tolerances (N,).

    Returns
    -------
    kept : int array (M,)
        Increasing indices.
    leaders : int array (N,)
        The row kept for each row.
    """
    direction = np.random.default_rng(0).standard_normal(normals.shape[1])
    keys = np.abs(normals @ (direction / np.linalg.norm(direction)))
    order = np.argsort(keys - tolerances, kind="stable")
    left, right = (keys - tolerances)[order], np.maximum.accumulate((keys + tolerances)[order])
    starts = np.concatenate([[0], np.flatnonzero(left[1:] > right[:-1]) + 1, [len(order)]])
    sizes = np.diff(starts)
    leaders = np.arange(len(normals))
    for start, size in zip(starts[:-1][sizes > 1], sizes[sizes > 1], strict=True):
        rest = np.sort(order[start : start + size])
        while rest.size:
            leader = rest[0]
            away = normals[rest] - normals[leader]
            opposite = normals[rest] + normals[leader]
            distance = np.minimum(np.linalg.norm(away, axis=1), np.linalg.norm(opposite, axis=1))
            apart = distance > tolerances[rest] + tolerances[leader]
            leaders[rest[~apart]] = leader
            rest = rest[apart]
    return np.flatnonzero(leaders == np.arange(len(normals))), leaders


class _CellTable:
    """Cells by their signs, each with the sum of the unit points given for it."""

    def __init__(self, normals: _Matrix) -> None:
        self.normals = normals
        self.ids: dict[bytes, int] = {}
        self.sums = np.zeros((normals.shape[1], 0))

    def add(self, signs: NDArray[np.bool_], points: _Matrix) -> None:
        """Add points (r, M) of the cells with signs (N, M); points may lie on the boundary of the cell."""
        flip = ~signs[0]
        points = np.where(flip, -points, points)
        keys = pack_columns(signs ^ flip)
        ids = np.array([self.ids.setdefault(key, len(self.ids)) for key in keys])
        if len(self.ids) > self.sums.shape[1]:
            wider = np.zeros((len(self.sums), max(len(self.ids), 2 * self.sums.shape[1])))
            wider[:, : self.sums.shape[1]] = self.sums
            self.sums = wider
        for row, values in zip(self.sums, points, strict=True):
            row += np.bincount(ids, weights=values, minlength=len(row))

    def points(self, expected: int | Fraction) -> _Matrix:
        """Unit points (r, M) of the cells, after checking their number and their signs."""
        if len(self.ids) != expected:
            raise DegenerateArrangementError(f"{len(self.ids)} cells found where their faces make {expected}")
        points = self.sums[:, : len(self.ids)]
        norms = np.linalg.norm(points, axis=0)
        if not np.all(norms > 0.0):
            raise DegenerateArrangementError("a cell without a point inside")
        points = points / norms
        keys = list(self.ids)
        columns = max(1, _BLOCK_ENTRIES // len(self.normals))
        for k in range(0, len(keys), columns):
            if pack_columns(self.normals @ points[:, k : k + columns] > 0.0) != keys[k : k + columns]:
                raise DegenerateArrangementError("a point is not inside its cell")
        return points


def _simplex_points(normals: _Matrix) -> _Matrix:
    """Independent hyperplanes: all signs, the first positive, equally far from all."""
    rank = len(normals)
    codes = np.arange(2 ** (rank - 1))
    signs = np.ones((rank, len(codes)))
    for j in range(1, rank):
        signs[j] = 1.0 - 2.0 * ((codes >> (j - 1)) & 1)
    points = np.linalg.solve(normals, signs)
    if not np.array_equal(normals @ points > 0.0, signs > 0.0):
        raise DegenerateArrangementError("hyperplanes nearly dependent")
    return points / np.linalg.norm(points, axis=0)


def _gaps(angles: _Matrix, tolerances: _Matrix) -> tuple[NDArray[np.int64], _Matrix, NDArray[np.int64]]:
    """Arcs between lines through the origin: the gaps of the union of angles +- tolerances modulo pi.

    Parameters
    ----------
    angles : array (B, m)
        Angles in [0, pi) of the lines of B arrangements. Either all are finite, or one in each row is
        infinite and stands for no line.
    tolerances : array (B, m)

    Returns
    -------
    rows, middles, sizes : arrays (number of arcs,)
        The arrangement of each arc, its middle, and the number of lines that meet where the arc begins.
    """
    order = np.argsort(angles - tolerances, axis=1)
    left = np.take_along_axis(angles - tolerances, order, axis=1)
    right = np.take_along_axis(angles + tolerances, order, axis=1)
    if np.isinf(left[0, -1]):
        left, right = left[:, :-1], right[:, :-1]
    m = left.shape[1]
    right, following = gap_ends(left, right)
    rows, places = np.nonzero(following > right)
    counts = np.bincount(rows, minlength=len(left))
    if not np.all(counts >= 2):
        raise DegenerateArrangementError("intersections nearly coincide")
    ends = np.cumsum(counts)
    previous = np.roll(places, 1)
    previous[ends - counts] = places[ends - 1] - m
    return rows, 0.5 * (right[rows, places] + following[rows, places]), places - previous


def _planar_points(normals: _Matrix, tolerances: _Matrix) -> _Matrix:
    angles = np.arctan2(normals[:, 0], -normals[:, 1]) % np.pi
    _, middles, sizes = _gaps(angles[None], tolerances[None])
    if not np.all(sizes == 1):
        raise DegenerateArrangementError("lines nearly coincide")
    return np.stack([np.cos(middles), np.sin(middles)])


def _spatial_points(normals: _Matrix, tolerances: _Matrix, record: Concurrences) -> _Matrix:
    """Rank 3: the edges on plane i are the arcs between its intersections with the other planes."""
    count = len(normals)
    table = _CellTable(normals)
    faces = Fraction(1)
    planes = max(1, _BLOCK_ENTRIES // (4 * count * count))
    for start in range(0, count, planes):
        own = np.arange(start, min(start + planes, count))
        first, second = _plane_bases(normals[own])
        x, y = first @ normals.T, second @ normals.T
        sines = np.hypot(x, y)
        angles = np.arctan2(x, -y) % np.pi
        angles[np.arange(len(own)), own] = np.inf
        sines[np.arange(len(own)), own] = 1.0
        spread = np.maximum(tolerances[own, None], tolerances) / sines
        if not np.all(spread < _MAX_TOLERANCE):
            raise DegenerateArrangementError("planes nearly coincide")
        rows, middles, sizes = _gaps(angles, spread)
        if np.any(sizes > 1):
            record.meet(own, angles, spread)
        for size, times in enumerate(np.bincount(sizes)):
            faces += Fraction(int(times) * size, size + 1)
        points = (np.cos(middles)[:, None] * first[rows] + np.sin(middles)[:, None] * second[rows]).T
        signs = normals @ points > 0.0
        for side in (True, False):
            signs[own[rows], np.arange(len(rows))] = side
            table.add(signs, points)
    return table.points(faces)


def _plane_bases(normals: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Orthonormal bases (N, 3), (N, 3) of the planes with unit normals (N, 3)."""
    axes = np.zeros_like(normals)
    axes[np.arange(len(normals)), np.abs(normals).argmin(axis=1)] = 1.0
    first = np.cross(normals, axes)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(normals, first)


def _incremental_points(normals: _Matrix, tolerances: _Matrix, record: Concurrences) -> _Matrix:
    """Rank >= 4: start from independent hyperplanes, then add the cells that each further hyperplane splits.

    A cell of the full arrangement is alone on its side of the last hyperplane that split it from others, so a
    point on each piece of each hyperplane, seen from both sides, meets every cell.
    """
    rank = normals.shape[1]
    order = scipy.linalg.qr(normals.T, mode="r", pivoting=True)[1]
    normals, tolerances = normals[order], tolerances[order]
    rng = np.random.default_rng(0)
    table = _CellTable(normals)
    points = _move_off(_simplex_points(normals[:rank]), normals, rank, None, rng)
    table.add(normals @ points > 0.0, points)
    cells = points.shape[1]
    for i in range(rank, len(normals)):
        points = _restricted_points(normals[: i + 1], tolerances[: i + 1], record.restricted(order[i], order[:i]))
        cells += points.shape[1]
        points = _move_off(points, normals, i, normals[i], rng)
        values = normals @ points
        slopes = np.abs(normals @ normals[i])
        slopes[i] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.abs(values) / slopes[:, None]
        steps[i] = np.inf
        step = np.minimum(0.5 * np.nanmin(steps, axis=0), 1.0)
        signs = values > 0.0
        for side in (True, False):
            signs[i] = side
            inside = points + (step if side else -step) * normals[i][:, None]
            table.add(signs, inside / np.linalg.norm(inside, axis=0))
    return table.points(cells)


def _restricted_points(normals: _Matrix, tolerances: _Matrix, record: Concurrences) -> _Matrix:
    """Points on the last hyperplane, one in each piece that the others cut it into (opposite ones once)."""
    last = normals[-1]
    basis = scipy.linalg.null_space(last[None])
    traces = normals[:-1] @ basis
    sines = np.linalg.norm(traces, axis=1)
    spread = np.maximum(tolerances[:-1], tolerances[-1]) / sines
    traces /= sines[:, None]
    kept, leaders = distinct_lines(traces, spread)
    merged = np.flatnonzero(leaders != np.arange(len(leaders)))
    record.merge(merged, leaders[merged])
    return basis @ cell_points(traces[kept], spread[kept], record.among(kept))


def _move_off(
    points: _Matrix, normals: _Matrix, previous: int, within: _Matrix | None, rng: np.random.Generator
) -> _Matrix:
    """Move points off the hyperplanes to come, inside their cells of the first ``previous`` hyperplanes.

    ``within`` is the normal of the hyperplane ``previous`` on which the points lie and stay, if any.
    """
    coming = normals[previous + (within is not None) :]
    if len(coming) == 0:
        return points
    best = np.abs(coming @ points).min(axis=0)
    room = np.abs(normals[:previous] @ points).min(axis=0)
    centres, points = points, points.copy()
    for _ in range(_REDRAWS):
        bad = np.flatnonzero(best < 1e-3 * room)
        if bad.size == 0:
            break
        moves = rng.standard_normal((len(points), bad.size))
        if within is not None:
            moves -= within[:, None] * (within @ moves)
        moves /= np.linalg.norm(moves, axis=0)
        moved = centres[:, bad] + 0.5 * room[bad] * moves
        moved /= np.linalg.norm(moved, axis=0)
        margin = np.abs(coming @ moved).min(axis=0)
        better = margin > best[bad]
        points[:, bad[better]] = moved[:, better]
        best[bad[better]] = margin[better]
    return points
