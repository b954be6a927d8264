"""Kernels of one set of gates after another: what a set has in common with the last one is not formed again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from cvxnn.solvers.gated_rows import GatedRows

__all__ = ["GateKernels", "KernelsOfSet"]

Array = NDArray[Any]


class GateKernels:
    """X X^T o D D^T for the patterns D of changing sets of gates on the same X.

    X X^T, or the rows of it that are wanted, is formed once in each precision. D D^T counts the gates that are active
    on both samples, whole numbers that float32 holds exactly: those of gates that join or leave are added and taken
    away.
    """

    def __init__(self) -> None:
        self._row_products: dict[Any, Array] = {}
        self._products: dict[Any, Array] = {}
        self._counts: Array | None = None
        self._gates = np.empty(0, dtype=np.int64)
        self._patterns: Array = np.empty((0, 0), dtype=np.float32)

    def kernel(self, rows: GatedRows, gates: Array) -> Array:
        """The lower triangle, by columns, in the precision of the rows; a new array.

        Parameters
        ----------
        rows : GatedRows
            Of the gates.
        gates : ndarray of shape (s,)
            Their numbers, by which they are known from set to set.
        """
        dtype = rows.X.dtype
        if dtype not in self._products:
            self._products[dtype] = _add_square(rows.X, 1.0, np.zeros((len(rows.X),) * 2, dtype=dtype, order="F"))
        patterns = rows.D.astype(np.float32, copy=False)
        joining, leaving = ~np.isin(gates, self._gates), ~np.isin(self._gates, gates)
        if self._counts is None or joining.sum() + leaving.sum() >= len(gates):
            n = len(rows.X)
            self._counts = _add_square(patterns, 1.0, np.zeros((n, n), dtype=np.float32, order="F"))
        else:
            for part, sign in ((patterns[:, joining], 1.0), (self._patterns[:, leaving], -1.0)):
                if part.shape[1]:
                    self._counts = _add_square(part, sign, self._counts)
        self._gates, self._patterns = gates.copy(), patterns
        kernel: Array = np.multiply(self._products[dtype], self._counts, dtype=dtype)
        return kernel

    def kernel_rows(self, rows: GatedRows, chosen: Array) -> Array:
        """The rows (m, n) for some samples, always the same ones; a new array."""
        key = rows.X.dtype
        if key not in self._row_products:
            self._row_products[key] = rows.X[chosen] @ rows.X.T
        part: Array = rows.D[chosen] @ rows.D.T
        part *= self._row_products[key]
        return part


class KernelsOfSet:
    """What :class:`GateKernels` has for one set.

    Parameters
    ----------
    kernels : GateKernels
    gates : ndarray of shape (s,)
        Numbers of the gates.
    """

    def __init__(self, kernels: GateKernels, gates: Array) -> None:
        self._kernels, self._gates = kernels, gates

    def kernel(self, rows: GatedRows) -> Array:
        """:meth:`GateKernels.kernel` of this set."""
        return self._kernels.kernel(rows, self._gates)

    def kernel_rows(self, rows: GatedRows, chosen: Array) -> Array:
        """:meth:`GateKernels.kernel_rows`, which needs no numbers."""
        return self._kernels.kernel_rows(rows, chosen)


def _add_square(A: Array, factor: float, total: Array) -> Array:
    """total + factor A A^T, in place, its lower triangle."""
    (syrk,) = blas.get_blas_funcs(("syrk",), (A,))
    summed: Array = syrk(factor, np.ascontiguousarray(A).T, trans=1, lower=1, beta=1.0, c=total, overwrite_c=1)
    return summed
