"""The system of the quadratic step of `vector_admm` by a Cholesky factor of the kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from cvxnn.solvers.gate_kernels import KernelsOfSet
from cvxnn.solvers.gated_rows import GatedRows, centred
from cvxnn.solvers.ridge import kernel_fit_norm
from cvxnn.solvers.row_system import RowSystem, largest_eigenvalue

__all__ = ["KernelSystem"]

Array = NDArray[Any]

#: From so many samples on the kernel is kept and factored in float32.
_SINGLE_FROM = 300


class KernelSystem(RowSystem):
    """Two triangular solves for each correction."""

    kept: ClassVar[tuple[str, ...]] = ("r", "image", "b")

    def __init__(self, rows: GatedRows, ones: Array | None, kernels: KernelsOfSet | None = None) -> None:
        super().__init__(rows, ones, kernels, np.float32 if len(rows.X) >= _SINGLE_FROM else np.float64)

    def restart(self) -> None:
        super().restart()
        self.b = 0.0

    def set_precision(self, dtype: type) -> None:
        super().set_precision(dtype)
        # What there is in the other precision goes first.
        for name in ("_kernel", "_buffer", "_factor"):
            self.__dict__.pop(name, None)
        self._buffer: Array = np.zeros((len(self.r), len(self.r)), dtype=dtype, order="F")
        self._kernel = self.low.kernel(self._buffer) if self.kernels is None else self.kernels.kernel(self.low)
        self._symv, self._trsv, self._trsm = blas.get_blas_funcs(("symv", "trsv", "trsm"), (self._kernel,))
        (self._potrf,) = lapack.get_lapack_funcs(("potrf",), (self._kernel,))
        self.largest = largest_eigenvalue(self.product, np.ones(len(self._kernel), dtype=dtype))

    def product(self, v: Array) -> Array:
        """K v in the precision of the kernel, for v of that type."""
        image: Array = self._symv(1.0, self._kernel, v, lower=1)
        return image

    def fit_norm(self, target: Array) -> float:
        scale = float(np.einsum("ii->i", self._kernel).mean())
        right = torch.from_numpy(target.astype(self.dtype))

        def product(v: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.product(v.numpy()))

        return kernel_fit_norm(product, scale, right)

    def _prepare(self) -> None:
        if self.too_coarse or (self.single and not self._factored(0.0)):
            self.set_precision(np.float64)
        raised = 0.0
        while not (self.single or self._factored(raised)):
            raised = 10 * raised or len(self.r) * np.finfo(np.float64).eps * self.condition
            if not raised < self.condition:
                raise np.linalg.LinAlgError("the system of the quadratic step is not positive definite")
        if self.ones is not None:
            self._half_ones = self._half(self.ones)
            self._weights = self._other_half(self._half_ones)
            self._total = float(self.ones @ self._weights)

    def _factored(self, raised: float) -> bool:
        np.multiply(self._kernel, self.dtype(1 / self.rho), out=self._buffer)
        np.einsum("ii->i", self._buffer)[:] += self.dtype(1 + raised)
        self._factor, info = self._potrf(self._buffer, lower=1, overwrite_a=1, clean=0)
        return bool(info == 0)

    def _half(self, right: Array) -> Array:
        half: Array = self._trsv(self._factor, right.astype(self.dtype), lower=1, overwrite_x=1)
        return half.astype(np.float64, copy=False)

    def _other_half(self, half: Array) -> Array:
        full: Array = self._trsv(self._factor, half.astype(self.dtype), lower=1, trans=1, overwrite_x=1)
        return full.astype(np.float64, copy=False)

    def metric(self, columns: Array) -> tuple[Array, Array]:
        """With F^-1 columns, where F F^T is K / rho + I; without their part along F^-1 ones, if there is such."""
        right: Array = np.asfortranarray(columns, dtype=self.dtype)
        half: Array = self._trsm(1.0, self._factor, right, lower=1, overwrite_b=1).astype(np.float64, copy=False)
        if self.ones is not None:
            half = centred(half, self._half_ones)
        return half.T @ half, half

    def step(self, prepared: Array, weights: Array) -> Array:
        return self._other_half(prepared @ weights)

    def change(self, c: Array) -> Array:
        known = self.r + self.image / self.rho
        if self.ones is not None:
            known += self.b * self.ones
        step = self._other_half(self._half(c - known))
        if self.ones is not None:
            shift = float(self.ones @ (self.r + step)) / self._total
            self.b += shift
            step -= shift * self._weights
        self.r += step
        step = step.astype(self.dtype, copy=False)
        self.image += self.product(step)
        return self.low.adjoint(step)
