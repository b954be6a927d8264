"""The system of the quadratic step of `vector_admm` by conjugate gradients, without a matrix of n x n."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import blas

from cvxnn.solvers.ridge import kernel_fit_norm
from cvxnn.solvers.row_system import RowSystem, largest_eigenvalue

__all__ = ["NystromSystem", "n_columns"]

Array = NDArray[Any]

#: Columns of the kernel in the approximation: at least (or all there are), at most, and per sample.
_LEAST, _MOST = 100, 500
_SHARE = 4
#: A correction ends where the residual of the system is below this times that of its start, or after so many steps.
_REDUCTION = 0.3
_STEPS = 10


def n_columns(n_samples: int) -> int:
    """Columns of the kernel that the approximation is made of."""
    return min(n_samples, max(_LEAST, min(_MOST, n_samples // _SHARE)))


class NystromSystem(RowSystem):
    """A step of conjugate gradients takes an application and an adjoint, of which the iteration needs one anyway.

    They are preconditioned by K_S K_SS^-1 K_S^T / rho + I for some samples S (Nystrom; as CRONOS does: Feng,
    Frangella, Pilanci 2024). Few eigenvalues of K are above rho, so one to three steps are enough.
    """

    kept: ClassVar[tuple[str, ...]] = ("r", "image", "spent")

    def restart(self) -> None:
        super().restart()
        #: Steps of conjugate gradients since then.
        self.spent = 0

    def set_precision(self, dtype: type) -> None:
        super().set_precision(dtype)
        used = np.flatnonzero(self.rows.X.any(1))
        chosen = np.sort(np.random.default_rng(0).permutation(used)[: n_columns(len(self.r))])
        columns = self.low.kernel_rows(chosen) if self.kernels is None else self.kernels.kernel_rows(self.low, chosen)
        core = columns[:, chosen].astype(np.float64)
        core = (core + core.T) / 2
        # Rounding of the columns is what limits the smallest eigenvalues.
        diagonal = np.einsum("ii->i", core)
        diagonal += 10 * len(core) * np.finfo(dtype).eps * diagonal.mean()
        factor: Array = np.asfortranarray(np.linalg.cholesky(core), dtype=dtype)
        (trsm,) = blas.get_blas_funcs(("trsm",), (columns,))
        #: W (m, n) with W^T W the approximation of K.
        self._low_rank: Array = trsm(1.0, factor, columns.T, side=1, lower=1, trans_a=1, overwrite_b=1).T
        self._gram = (self._low_rank @ self._low_rank.T).astype(np.float64)
        self.largest = largest_eigenvalue(self._gram.dot, self._gram.sum(1))

    def fit_norm(self, target: Array) -> float:
        scale = float(np.einsum("ii->", self._gram)) / len(target)
        right = torch.from_numpy(target.astype(self.dtype))
        low_rank = torch.from_numpy(self._low_rank)
        return kernel_fit_norm(lambda v: (low_rank @ v) @ low_rank, scale, right)

    def _prepare(self) -> None:
        if self.too_coarse:
            self.set_precision(np.float64)
        inner = self._gram / self.rho
        np.einsum("ii->i", inner)[:] += 1.0
        self._factor: Array = np.asfortranarray(np.linalg.cholesky(inner), dtype=self.dtype)
        self._trsm, self._trsv = blas.get_blas_funcs(("trsm", "trsv"), (self._factor,))
        if self.ones is not None:
            self._solved_ones = self._solved(self.ones)

    def _solved(self, v: Array) -> Array:
        """(W^T W / rho + I)^-1 v."""
        inner = self._trsv(self._factor, self._low_rank @ v.astype(self.dtype), lower=1)
        inner = self._trsv(self._factor, inner, lower=1, trans=1)
        return v - (inner @ self._low_rank).astype(np.float64) / self.rho

    def _orthogonal(self, z: Array) -> Array:
        """What was solved with the preconditioner, moved within its metric to be orthogonal to the intercept."""
        if self.ones is None:
            return z
        share = (self.ones @ z) / float(self.ones @ self._solved_ones)
        return z - (self._solved_ones * share if z.ndim == 1 else np.outer(self._solved_ones, share))

    def metric(self, columns: Array) -> tuple[Array, Array]:
        right: Array = np.asfortranarray(self._low_rank @ columns.astype(self.dtype))
        inner = self._trsm(1.0, self._factor, right, lower=1, overwrite_b=1)
        inner = self._trsm(1.0, self._factor, inner, lower=1, trans_a=1, overwrite_b=1)
        solved = self._orthogonal(columns - (inner.T @ self._low_rank).T.astype(np.float64) / self.rho)
        return columns.T @ solved, solved

    def step(self, prepared: Array, weights: Array) -> Array:
        return prepared @ weights

    def change(self, c: Array) -> Array:
        residual = self.centred(c - self.r - self.image / self.rho)
        size = float(np.linalg.norm(residual))
        rounding = 10 * float(np.finfo(np.float64).eps) * float(np.linalg.norm(c))
        goal = max(_REDUCTION * size, rounding)
        change: Array = np.zeros(self.rows.shape, dtype=self.dtype)
        direction, last = np.zeros_like(residual), 1.0
        for _ in range(_STEPS):
            if not size > goal:
                break
            z = self._orthogonal(self._solved(residual))
            inner = float(residual @ z)
            direction = z + direction * (inner / last)
            last = inner
            blocks = self.low.adjoint(direction.astype(self.dtype))
            image = self.low.apply(blocks)
            curved = self.centred(direction + image / self.rho)
            bend = float(direction @ curved)
            self.spent += 1
            if not (inner > 0 and bend > 0):
                break
            length = inner / bend
            self.r += length * direction
            self.image += length * image
            change += self.dtype(length) * blocks
            residual = residual - length * curved
            size = float(np.linalg.norm(residual))
        return change
