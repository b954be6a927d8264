"""A(Z) of a perceptron with one output on NumPy arrays, and the system of its kernel, in two precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from cvxnn.solvers.ridge import kernel_fit_norm

__all__ = ["GatedRows", "KernelSystem", "centred", "norms"]

Array = NDArray[Any]

#: From so many samples on the kernel is kept and factored in float32.
_SINGLE_FROM = 1_000
#: Largest condition number times rounding error at which a factor in float32 still corrects well.
_SINGLE_LOSS = 0.3


class GatedRows:
    """A(V)_i = sum_k D_ik <x_i, v_k> and its adjoint.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    D : ndarray of shape (n, P)
        Patterns as numbers of the type of X.
    """

    def __init__(self, X: Array, D: Array) -> None:
        self.X, self.D = np.ascontiguousarray(X), np.ascontiguousarray(D)
        #: Of the blocks.
        self.shape = D.shape[1], X.shape[1]
        self._by_gate = D.shape[1] <= X.shape[1]

    def astype(self, dtype: type) -> GatedRows:
        """The same map in another precision."""
        if self.X.dtype == dtype:
            return self
        return GatedRows(self.X.astype(dtype), self.D.astype(dtype))

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


class KernelSystem:
    """(K / rho + I) r + b ones = c with ones^T r = 0, where there is an intercept b; solved again and again.

    The kernel and its factor may be in float32. Each solution is then the last one, corrected once: the error that is
    left is small beside the change, and vanishes as the changes do.

    Parameters
    ----------
    rows : GatedRows
        In float64.
    ones : ndarray of shape (n,) or None
        The column of the intercept; None without one.
    form : callable, optional
        Makes the kernel of rows in either precision; by default it is formed from nothing.

    Attributes
    ----------
    r : ndarray of shape (n,)
        The last solution.
    low : GatedRows
        The map in the precision of the kernel.
    """

    def __init__(self, rows: GatedRows, ones: Array | None, form: Callable[[GatedRows], Array] | None = None) -> None:
        self.ones = ones
        self.rho = 0.0
        self._rows, self._form = rows, form
        self.restart()
        self._set_kernel(np.float32 if len(rows.X) >= _SINGLE_FROM else np.float64)

    def restart(self) -> None:
        """Forget the last solution, not what is factored."""
        self.r: Array = np.zeros(len(self._rows.X))
        self._image: Array = np.zeros(len(self._rows.X))
        self._b = 0.0

    @property
    def single(self) -> bool:
        """Whether the kernel is in float32."""
        return self.dtype == np.float32

    def _set_kernel(self, dtype: type) -> None:
        self.dtype, self.low = dtype, self._rows.astype(dtype)
        # What there is in the other precision goes first.
        for name in ("_kernel", "_buffer", "_factor"):
            self.__dict__.pop(name, None)
        self._buffer: Array = np.zeros((len(self.r), len(self.r)), dtype=dtype, order="F")
        self._kernel = self.low.kernel(self._buffer) if self._form is None else self._form(self.low)
        self._symv, self._trsv, self._trsm = blas.get_blas_funcs(("symv", "trsv", "trsm"), (self._kernel,))
        (self._potrf,) = lapack.get_lapack_funcs(("potrf",), (self._kernel,))
        v: Array = np.ones(len(self._kernel), dtype=dtype)
        for _ in range(4):
            v = self.product(v / max(float(np.linalg.norm(v)), 1e-30))
        #: About the largest eigenvalue of the kernel.
        self.largest = float(np.linalg.norm(v))

    def product(self, v: Array) -> Array:
        """K v in the precision of the kernel, for v of that type."""
        image: Array = self._symv(1.0, self._kernel, v, lower=1)
        return image

    def fit_norm(self, target: Array) -> float:
        """About the norm of the blocks of a lightly regularised least-squares fit to a target."""
        scale = float(np.einsum("ii->i", self._kernel).mean())
        right = torch.from_numpy(target.astype(self.dtype))

        def product(v: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.product(v.numpy()))

        return kernel_fit_norm(product, scale, right)

    def factor(self, rho: float) -> None:
        """Factor K / rho + I; in float64 where it is too ill-conditioned for float32."""
        if rho == self.rho:
            return
        self.rho = rho
        condition = 1 + self.largest / rho
        if self.single and (condition * np.finfo(np.float32).eps > _SINGLE_LOSS or not self._factored(0.0)):
            self._set_kernel(np.float64)
        raised = 0.0
        while not (self.single or self._factored(raised)):
            raised = 10 * raised or len(self.r) * np.finfo(np.float64).eps * condition
            if not raised < condition:
                raise np.linalg.LinAlgError("the system of the quadratic step is not positive definite")
        if self.ones is not None:
            self._half_ones = self._half(self.ones)
            self._weights = self.other_half(self._half_ones)
            self._total = float(self.ones @ self._weights)

    def _factored(self, raised: float) -> bool:
        np.multiply(self._kernel, self.dtype(1 / self.rho), out=self._buffer)
        np.einsum("ii->i", self._buffer)[:] += self.dtype(1 + raised)
        self._factor, info = self._potrf(self._buffer, lower=1, overwrite_a=1, clean=0)
        return bool(info == 0)

    def _half(self, right: Array) -> Array:
        half: Array = self._trsv(self._factor, right.astype(self.dtype), lower=1, overwrite_x=1)
        return half.astype(np.float64, copy=False)

    def half_solve(self, columns: Array) -> Array:
        """F^-1 columns (n, s), where F F^T is K / rho + I; without their part along F^-1 ones, if there is such."""
        right: Array = np.asfortranarray(columns, dtype=self.dtype)
        half: Array = self._trsm(1.0, self._factor, right, lower=1, overwrite_b=1).astype(np.float64, copy=False)
        return half if self.ones is None else centred(half, self._half_ones)

    def other_half(self, half: Array) -> Array:
        """F^-T half, the step r for which the metric is ||half||^2; its sum is zero where there is an intercept."""
        full: Array = self._trsv(self._factor, half.astype(self.dtype), lower=1, trans=1, overwrite_x=1)
        return full.astype(np.float64, copy=False)

    def change(self, c: Array) -> Array:
        """By what the solution r changes for a new right side, in the precision of the kernel; r is set."""
        known = self.r + self._image / self.rho
        if self.ones is not None:
            known += self._b * self.ones
        step = self.other_half(self._half(c - known))
        if self.ones is not None:
            shift = float(self.ones @ (self.r + step)) / self._total
            self._b += shift
            step -= shift * self._weights
        self.r += step
        step = step.astype(self.dtype, copy=False)
        self._image += self.product(step)
        return step

    def refresh(self, blocks: Array) -> None:
        """Form K r anew from A*(r) in float64."""
        if self.single:
            self._image = self._rows.apply(blocks)

    def state(self) -> dict[str, Any]:
        """What the next solutions depend on."""
        return {"r": self.r, "image": self._image, "b": self._b, "single": self.single, "rho": self.rho}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.r, self._image, self._b = state["r"], state["image"], state["b"]
        if self.single and not state["single"]:
            self._set_kernel(np.float64)
        self.rho = 0.0
        self.factor(state["rho"])
