"""Better primal and dual points of a group lasso from rough ones, by small systems in the sizes of the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from cvxnn.solvers.gated_rows import GatedRows, centred, norms
from cvxnn.solvers.row_system import RowSystem

__all__ = ["best_sizes", "corrected_dual"]

Array = NDArray[Any]

#: Rounds in which sizes below zero are set to zero, and corrections of the dual.
_ROUNDS = 10
_CORRECTIONS = 2
#: Added to the diagonals of small systems, relative to their mean.
_RIDGE = 1e-10


def best_sizes(U: Array, y: Array, beta: float, ones: Array | None) -> Array:
    """About the t >= 0 that minimise 1/2 ||y - U t - b ones||^2 + beta sum(t), over b too.

    Sizes that come out negative are set to zero and stay there: any t >= 0 serves.

    Parameters
    ----------
    U : ndarray of shape (n, s)
        Predictions of the directions of the blocks.
    y : ndarray of shape (n,)
    ones : ndarray of shape (n,) or None
        The column of an intercept.
    """
    U = centred(U, ones)
    gram, right = U.T @ U, U.T @ y - beta
    t = np.zeros(len(right))
    used = np.arange(len(right))
    for _ in range(_ROUNDS):
        if len(used) == 0:
            break
        found = _solve(gram[np.ix_(used, used)], right[used])
        positive = found > 0
        if positive.all():
            t[used] = found
            break
        used = used[positive]
    return t


def corrected_dual(
    rows: GatedRows, system: RowSystem, r: Array, G: Array, beta: float, used: Array
) -> tuple[Array, Array]:
    """r moved so that ||A_k*(r)|| is nearly beta for the blocks in use, and no more for the others; and A*(r).

    Newton's method for these equations. The step is the smallest in the metric of the quadratic step, K / rho + I,
    in which blocks that turn cost as much as r itself; so the dual value falls by the square of the step only.

    Parameters
    ----------
    rows : GatedRows
        In float64.
    system : RowSystem
        Factored.
    r : ndarray of shape (n,)
    G : ndarray of shape (P, d)
        A*(r).
    used : ndarray of shape (P,), bool
        Blocks that are not zero.
    """
    sizes = norms(G)
    chosen = np.flatnonzero((used & (sizes > 0)) | (sizes > beta))
    if len(chosen) == 0:
        return r, G
    columns = rows.columns(chosen, G[chosen] / sizes[chosen, None])
    gram, prepared = system.metric(columns)
    for _ in range(_CORRECTIONS):
        excess = sizes[chosen] - beta
        excess = np.where(used[chosen], excess, np.maximum(excess, 0.0))
        r = system.centred(r - system.step(prepared, _solve(gram, excess)))
        G = rows.adjoint(r)
        sizes = norms(G)
    return r, G


def _solve(gram: Array, right: Array) -> Array:
    shifted = gram + _RIDGE * (np.trace(gram) / len(gram) + 1e-300) * np.eye(len(gram))
    try:
        return cho_solve(cho_factor(shifted, check_finite=False), right, check_finite=False)
    except LinAlgError:
        return np.linalg.lstsq(shifted, right, rcond=None)[0]
