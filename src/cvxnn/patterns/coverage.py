"""What a list of cells that is complete up to rounding can miss of the neurons of a ReLU network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Coverage", "cover", "span", "span_error"]

_Matrix = NDArray[np.float64]
_Indices = NDArray[np.int64]

_EPS = 2.0**-53
_TINY = 2.0**-900
_FARTHEST_POWER = 2.0**900
_MOST_GROWTH = 1e-6  # neurons longer than this are no proof worth having


@dataclass(frozen=True)
class Coverage:
    """Bound of the neurons of all cells by those of the listed ones.

    For every dual point nu and every unit vector u

        || sum_i nu_i (x_i . u)_+ || <= growth * q(nu) + sum_i ||nu_i|| row_error_i,

    q the maximum of ||(X^T D_k nu)^T u|| over the listed patterns D_k and the unit vectors u whose signs on the rows
    ``rows`` are those of D_k.

    Attributes
    ----------
    rows : int array
        One row of X of each hyperplane.
    row_error : array (n,)
    growth : float
        At least 1.

    Notes
    -----
    Four steps lead from u to a listed cell.

    1. Let V be the range of ``basis``: everything, or the row space of X up to rounding. The projection of u onto V
       changes x_i . u by dist(x_i, V) at most.
    2. In V, where u = basis y, consider the arrangement of the hyperplanes of ``rows``, with x_i . u = a_i . y. In
       rank 3 the intersections of a plane with the others are in intervals; both sides of each gap between intervals
       are listed, with signs that rounding cannot change. So a cell that is not listed has all its edges inside of
       intervals, and its perimeter is at most the ``width`` w of :class:`Concurrences`. Each of its points is within
       w / 2 of each of its vertices, and a vertex within w / 2 of the end of its interval, which is in a closed
       listed cell. Moving y by the angle w changes x_i . u by ||a_i|| w / s, s the least singular value of ``basis``.
       Where all cells are listed, w = 0.
    3. The norm of u has grown by at most w times the condition number of ``basis``.
    4. A row i merged with a row l has, in every D_k, the sign s of x_l . u or -s, always the same of the two. For every
       t of that sign |(x_i . u)_+ - D_ki x_i . u| <= |x_i . u - t x_l . u| <= ||x_i - t x_l|| ||u||.
    """

    rows: _Indices
    row_error: _Matrix
    growth: float

    def among(self, index: _Indices, n: int) -> Coverage:
        """The same where the rows are rows ``index`` of n rows, and the others are zero."""
        errors = np.zeros(n)
        errors[index] = self.row_error
        return Coverage(index[self.rows], errors, self.growth)

    def allowance(self, sizes: _Matrix) -> float:
        """sum_i ||nu_i|| row_error_i for the norms of the rows of nu, rounded up."""
        return float(sizes @ self.row_error) * (1 + 4 * (len(sizes) + 8) * _EPS)


def cover(X: _Matrix, basis: _Matrix, leaders: _Indices, opposite: NDArray[np.bool_], width: float) -> Coverage | None:
    """Coverage of the rows of X, none of them zero; None where it is of no use, or out of the range of float64.

    Parameters
    ----------
    X : array (n, d)
    basis : array (d, r)
        Of :func:`span`.
    leaders : int array (n,)
        The row that each row is merged with (itself, if it is in ``rows``).
    opposite : bool array (n,)
        Whether the two have opposite signs.
    width : float
    """
    sizes = np.abs(X).max(axis=1)
    largest = np.abs(basis).max()
    if not (_TINY < largest < _FARTHEST_POWER and sizes.min() > _TINY and sizes.max() < _FARTHEST_POWER):
        return None
    rows, basis = X / sizes[:, None], basis / np.exp2(np.frexp(largest)[1])
    growth, error = 1.0, _distance_to_range(rows, basis)
    if width > 0.0:
        singular = np.linalg.svd(basis, compute_uv=False)
        least = singular[-1] - 8 * (basis.size + 8) * _EPS * singular[0]
        if not 1.01 * width * singular[0] < _MOST_GROWTH * least:
            return None
        growth = 1.0 + 1.01 * width * singular[0] / least
        error = error + 1.01 * width / least * _norms(rows @ basis, np.abs(rows) @ np.abs(basis), len(basis))
    merged = np.flatnonzero(leaders != np.arange(len(leaders)))
    error[merged] += growth * _distance_to_line(rows[merged], rows[leaders[merged]], opposite[merged])
    return Coverage(np.unique(leaders), error * sizes * (1 + 16 * _EPS), growth)


def span(basis: _Matrix, columns: _Matrix) -> _Matrix:
    """Basis M (d, r) of the row space of X in which x_i has the coordinates s_i n_i, for s_i > 0.

    Parameters
    ----------
    basis : array (d, r)
        B with x_i B = s_i n_i; M has the same images, and is orthogonal to what the rows do not see.
    columns : array (d,)
        diag(columns)^-1 B has orthonormal columns.
    """
    d, rank = basis.shape
    if d == rank:
        return basis
    dual = basis / np.square(columns)[:, None]
    q, r = np.linalg.qr(dual)
    return q @ np.linalg.inv(r).T


def span_error(X: _Matrix, basis: _Matrix, normals: _Matrix) -> float:
    """Bound on the distance of the unit vectors ``normals`` to the directions of the exact x_i . basis."""
    rows = X / np.abs(X).max(axis=1, keepdims=True)
    images = rows @ basis
    lengths = np.linalg.norm(images, axis=1, keepdims=True)
    rounding = _norms(np.zeros_like(images), np.abs(rows) @ np.abs(basis), len(basis)) / lengths[:, 0]
    distance = np.linalg.norm(images / lengths - normals, axis=1) + 2 * rounding + 16 * _EPS
    return float(distance.max())


def _distance_to_range(rows: _Matrix, basis: _Matrix) -> _Matrix:
    """Upper bounds of the distances of rows from the range of the basis: 0 where that is everything."""
    d, rank = basis.shape
    if d == rank:
        return np.zeros(len(rows))
    weights = np.linalg.lstsq(basis, rows.T, rcond=None)[0].T
    return _norms(rows - weights @ basis.T, np.abs(rows) + np.abs(weights) @ np.abs(basis.T), rank)


def _distance_to_line(rows: _Matrix, others: _Matrix, opposite: NDArray[np.bool_]) -> _Matrix:
    """Upper bounds of ||x - t z|| with some t of a given sign, for pairs of rows."""
    side = np.where(opposite, -1.0, 1.0)
    cosines = np.einsum("nd,nd->n", rows, others) / np.einsum("nd,nd->n", others, others)
    images = (side * np.maximum(side * cosines, 0.0))[:, None] * others
    return _norms(rows - images, np.abs(rows) + np.abs(images), 1)


def _norms(values: _Matrix, sizes: _Matrix, terms: int) -> _Matrix:
    """Upper bounds of the norms of rows that are sums of products of so many terms, with sums of absolute values."""
    rounded = np.abs(values) + (terms + 8) * _EPS * sizes + _TINY
    return np.linalg.norm(rounded, axis=1) * (1 + (values.shape[1] + 8) * _EPS)
