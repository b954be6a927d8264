"""Intersections that an enumeration took for equal, and how wide the cells between them can be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Concurrences", "angle_error", "gap_ends", "required_tolerance"]

_Matrix = NDArray[np.float64]
_Indices = NDArray[np.int64]

_EPS = 2.0**-53


def required_tolerance(error: float, rank: int) -> float:
    """The least tolerance at which the order of distinct intersections is certain, for unit normals off by ``error``.

    Notes
    -----
    In rank 3 the coordinates of a normal in the basis of a plane are off by 2 (error + 10 eps), and its angle there by
    a multiple 1.5 / sine of that; ``tolerance / sine`` must be twice as much (:func:`angle_error`). Each restriction to
    a hyperplane doubles the error relative to the tolerance, and adds a few r eps.
    """
    if rank <= 3:
        return 2 * angle_error(error)
    return 2.0 ** (rank - 3) * 16 * (error + (4 * rank + 8) * _EPS)


def angle_error(error: float) -> float:
    """Bound on the error of the angle of an intersection in a plane, times the sine of the angle of the planes."""
    return 4 * error + 56 * _EPS


def gap_ends(left: _Matrix, right: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Where what intervals modulo pi cover ends, and where they begin again: there is a gap where that is later.

    Parameters
    ----------
    left, right : array (B, m)
        Intervals, with increasing left ends in [-pi, pi]; they may reach beyond 0 and pi.

    Returns
    -------
    ends, begins : arrays (B, m)
        After each interval, counted from the first one.
    """
    right = np.maximum.accumulate(right, axis=1)
    again = left[:, :1] + np.pi
    # Those that reach beyond pi cover what is behind 0, and the first one, from below 0, what is before pi.
    return np.maximum(right, right[:, -1:] - np.pi), np.minimum(np.concatenate([left[:, 1:], again], axis=1), again)


class Concurrences:
    """Sets of hyperplanes taken to meet in a flat of one dimension more than they would in general position.

    Attributes
    ----------
    index : int array (N,)
        Numbers of the hyperplanes of an arrangement in the arrangement that was asked for.
    within : tuple of int
        Hyperplanes whose intersection the arrangement is in; empty for the arrangement asked for.
    sets : list of int array (k, m)
        Sets of m hyperplanes each, taken to have rank m - 1; filled by the restrictions, too.
    share : float
        Bound on the errors of normals and angles, as a part of their tolerances.
    """

    def __init__(
        self, index: _Indices, within: tuple[int, ...] = (), sets: list[_Indices] | None = None, share: float = 1.0
    ) -> None:
        self.index, self.within, self.share = index, within, share
        self.sets: list[_Indices] = [] if sets is None else sets
        self._clusters: list[tuple[_Indices, _Indices, _Indices]] = []
        self._widths: list[_Matrix] = [np.zeros(0)]
        self._n_clusters = 0

    def restricted(self, to: int, index: _Indices) -> Concurrences:
        """Those in hyperplane ``to`` among the hyperplanes ``index``, counted in this arrangement."""
        return Concurrences(self.index[index], (*self.within, int(self.index[to])), self.sets)

    def among(self, kept: _Indices) -> Concurrences:
        """Those of some of the hyperplanes."""
        return Concurrences(self.index[kept], self.within, self.sets)

    def merge(self, rows: _Indices, leaders: _Indices) -> None:
        """Hyperplanes taken to be equal to others."""
        if len(rows):
            self._add(np.stack([rows, leaders], axis=1))

    def _add(self, chosen: _Indices) -> None:
        outer = np.broadcast_to(np.array(self.within, dtype=np.int64), (len(chosen), len(self.within)))
        self.sets.append(np.unique(np.sort(np.hstack([outer, self.index[chosen]]), axis=1), axis=0))

    def meet(self, planes: _Indices, angles: _Matrix, spread: _Matrix) -> None:
        """Rank 3: intersections of ``planes`` (B,) with the others (B, N), taken for equal where intervals overlap.

        Parameters
        ----------
        angles : array (B, N)
            Angles in [0, pi), infinite for the plane itself.
        spread : array (B, N)
            Half the lengths of the intervals; ``share`` times that bounds the errors of the angles.
        """
        order = np.argsort(angles - spread, axis=1)[:, :-1]
        centre, half = np.take_along_axis(angles, order, axis=1), np.take_along_axis(spread, order, axis=1)
        right, following = gap_ends(centre - half, centre + half)
        ends = following > right
        total = ends.sum(axis=1, keepdims=True)
        number: _Indices = np.cumsum(ends, axis=1) - ends
        wraps = number == total
        centre = np.where(wraps, centre - np.pi, centre)
        number = np.where(wraps, 0, number) + (np.cumsum(total) - total[:, 0])[:, None]
        sizes = np.bincount(number.ravel(), minlength=int(total.sum()))
        shared = sizes > 1
        several = shared[number]
        names = np.cumsum(shared) - 1
        count = int(shared.sum())
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        cluster, other = names[number[several]], order[several]
        np.minimum.at(low, cluster, (centre - self.share * half)[several])
        np.maximum.at(high, cluster, (centre + self.share * half)[several])
        plane = np.broadcast_to(planes[:, None], order.shape)[several]
        self._clusters.append((cluster + self._n_clusters, plane, other))
        self._widths.append(high - low)
        self._n_clusters += count
        first = np.zeros(count, dtype=np.int64)
        first[cluster[::-1]] = other[::-1]
        rest = other != first[cluster]
        if rest.any():
            self._add(np.stack([plane, first[cluster], other], axis=1)[rest])

    def width(self) -> float:
        """Rank 3: bound on the perimeters of the cells all of whose edges are between intersections taken for equal.

        Notes
        -----
        Such a cell has an edge between two intersections of one cluster on each of its planes, at most one on each;
        an edge shares its end, where planes i and j meet, with the next one. So the edges lie in clusters that are
        connected by the relation "(i, j) is in one, (j, i) in the other", and the perimeter is at most the sum of the
        widths of a connected set of clusters.
        """
        if self._n_clusters == 0:
            return 0.0
        cluster, plane, other = (np.concatenate(part) for part in zip(*self._clusters, strict=True))
        widths = np.concatenate(self._widths)
        size = len(self.index)
        keys, mirrored = plane * size + other, other * size + plane
        order = np.argsort(keys)
        place = np.searchsorted(keys, mirrored, sorter=order).clip(max=len(keys) - 1)
        partner = order[place]
        joined = keys[partner] == mirrored
        graph = coo_array(
            (np.ones(int(joined.sum())), (cluster[joined], cluster[partner[joined]])), shape=(len(widths),) * 2
        )
        _, component = connected_components(graph, directed=False)
        return float(np.bincount(component, weights=widths).max()) * (1 + 1e-9)
