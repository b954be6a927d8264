"""A(Z) of a perceptron with one output on NumPy arrays, in either precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

__all__ = ["GatedRows", "centred", "norms"]

Array = NDArray[Any]


class GatedRows:
    """A(V)_i = sum_k D_ik <x_i, v_k> and its adjoint.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    D : ndarray of shape (n, P)
        Patterns as numbers of the type of X.
    copies : dict, optional
        X in each precision, shared with the maps of other gates.
    """

    def __init__(self, X: Array, D: Array, copies: dict[Any, Array] | None = None) -> None:
        self.X, self.D = np.ascontiguousarray(X), np.ascontiguousarray(D)
        self._copies = {} if copies is None else copies
        #: Of the blocks.
        self.shape = D.shape[1], X.shape[1]
        self._by_gate = D.shape[1] <= X.shape[1]

    def astype(self, dtype: type) -> GatedRows:
        """The same map in another precision."""
        if self.X.dtype == dtype:
            return self
        key = np.dtype(dtype)
        if key not in self._copies:
            self._copies[key] = self.X.astype(dtype)
        return GatedRows(self._copies[key], self.D.astype(dtype), self._copies)

    def apply(self, V: Array) -> Array:
        """Predictions (n,) of blocks V (P, d)."""
        if self._by_gate:
            return np.einsum("ik,ik->i", self.X @ V.T, self.D)
        return np.einsum("ia,ia->i", self.D @ V, self.X)

    def adjoint(self, r: Array) -> Array:
        """Blocks (P, d) of r (n,)."""
        if self._by_gate:
            return (self.D * r[:, None]).T @ self.X
        return self.D.T @ (self.X * r[:, None])

    def columns(self, gates: Array, directions: Array) -> Array:
        """Predictions (n, s) of one vector (s, d) in the block of each of s gates."""
        return self.D[:, gates] * (self.X @ directions.T)

    def kernel_rows(self, chosen: Array) -> Array:
        """The rows (m, n) of A A* for some samples."""
        return (self.X[chosen] @ self.X.T) * (self.D[chosen] @ self.D.T)

    def kernel(self, buffer: Array) -> Array:
        """The n x n matrix of A A*, its lower triangle only, by columns; the buffer is one like it."""
        K = np.zeros_like(buffer)
        (syrk,) = blas.get_blas_funcs(("syrk",), (self.X,))
        K = syrk(1.0, self.X.T, trans=1, lower=1, c=K, overwrite_c=1)
        K *= syrk(1.0, self.D.T, trans=1, lower=1, c=buffer, overwrite_c=1)
        return K


def norms(blocks: Array) -> Array:
    """Norms (P,) of blocks (P, d)."""
    return np.sqrt(np.einsum("ka,ka->k", blocks, blocks))


def centred(values: Array, ones: Array | None) -> Array:
    """Values (n, ...) less their part along the column of the intercept, where there is one."""
    if ones is None:
        return values
    share = (ones @ values) / float(ones @ ones)
    return values - (ones * share if values.ndim == 1 else np.outer(ones, share))
