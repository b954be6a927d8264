"""What the iteration of `vector_admm` asks of the linear system of its quadratic step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cvxnn.solvers.gate_kernels import KernelsOfSet
from cvxnn.solvers.gated_rows import GatedRows, centred

__all__ = ["RowSystem", "largest_eigenvalue"]

Array = NDArray[Any]

#: Largest condition number times rounding error at which a system in float32 still corrects well.
_SINGLE_LOSS = 0.3
#: From such a condition number on, float64 does not add up changes without loss either.
_DRIFTS = 1e8


def largest_eigenvalue(product: Callable[[Array], Array], start: Array) -> float:
    """About the largest eigenvalue of a positive semidefinite matrix, by a few of its products."""
    v = start
    for _ in range(4):
        v = product(v / max(float(np.linalg.norm(v)), 1e-30))
    return float(np.linalg.norm(v))


class RowSystem(ABC):
    """(K / rho + I) r + b ones = c with ones^T r = 0, K = A A*, solved again and again; b where there is an intercept.

    Each solution is the last one corrected, in float32 where that does. What it has left of error is small beside the
    change, and vanishes as the changes do.

    Parameters
    ----------
    rows : GatedRows
        In float64.
    ones : ndarray of shape (n,) or None
        The column of the intercept; None without one.
    kernels : KernelsOfSet, optional
        Forms the kernel, or columns of it, in either precision; by default they are formed from nothing.
    dtype : type
        Of the arithmetic of a correction, to begin with.

    Attributes
    ----------
    r : ndarray of shape (n,)
        The last solution.
    low : GatedRows
        The map in the precision of the corrections.
    largest : float
        About the largest eigenvalue of K.
    """

    #: What the next solutions depend on, beside the factor.
    kept: ClassVar[tuple[str, ...]] = ("r", "image")

    def __init__(
        self,
        rows: GatedRows,
        ones: Array | None,
        kernels: KernelsOfSet | None = None,
        dtype: type = np.float32,
    ) -> None:
        self.ones, self.rows, self.kernels = ones, rows, kernels
        #: That of the factor; 0 where there is none yet.
        self.rho = self.largest = 0.0
        self.restart()
        self.set_precision(dtype)

    def restart(self) -> None:
        """Forget the last solution, not what is factored."""
        self.r: Array = np.zeros(len(self.rows.X))
        #: K r.
        self.image: Array = np.zeros(len(self.rows.X))

    @property
    def single(self) -> bool:
        """Whether corrections are made in float32."""
        return self.dtype == np.float32

    @property
    def drifts(self) -> bool:
        """Whether rounding in what is added up from changes may count."""
        return self.single or self.largest > _DRIFTS * self.rho

    def set_precision(self, dtype: type) -> None:
        """Form what does not depend on rho, in a precision."""
        self.dtype, self.low = dtype, self.rows.astype(dtype)

    @property
    def condition(self) -> float:
        """About the condition number of K / rho + I."""
        return 1 + self.largest / self.rho

    @property
    def too_coarse(self) -> bool:
        """Whether float32 does not do for this rho."""
        return self.single and self.condition * float(np.finfo(np.float32).eps) > _SINGLE_LOSS

    @abstractmethod
    def fit_norm(self, target: Array) -> float:
        """About the norm of the blocks of a lightly regularised least-squares fit to a target."""

    def factor(self, rho: float) -> None:
        """Prepare for a value of rho; in float64 where it makes the system too ill-conditioned for float32."""
        if rho == self.rho:
            return
        self.rho = rho
        try:
            self._prepare()
        except BaseException:
            # The next run of a path starts anew.
            self.rho = 0.0
            raise

    @abstractmethod
    def _prepare(self) -> None:
        """What depends on the new value of rho."""

    @abstractmethod
    def change(self, c: Array) -> Array:
        """A* of the change of the solution for a new right side c, blocks (P, d); r is set."""

    @abstractmethod
    def metric(self, columns: Array) -> tuple[Array, Array]:
        """Gram matrix (s, s) of columns (n, s) in the metric (K / rho + I)^-1, and what :meth:`step` needs of them."""

    @abstractmethod
    def step(self, prepared: Array, weights: Array) -> Array:
        """(K / rho + I)^-1 columns weights, orthogonal to the intercept, from what :meth:`metric` prepared."""

    def centred(self, values: Array) -> Array:
        """Values less their part along the intercept."""
        return centred(values, self.ones)

    def refresh(self, blocks: Array) -> None:
        """Form K r anew from A*(r) in float64."""
        if self.drifts:
            self.image = self.rows.apply(blocks)

    def state(self) -> dict[str, Any]:
        """What the next solutions depend on."""
        return {name: getattr(self, name) for name in self.kept} | {"single": self.single, "rho": self.rho}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        for name in self.kept:
            setattr(self, name, state[name])
        if self.single and not state["single"]:
            self.set_precision(np.float64)
        self.rho = 0.0
        self.factor(state["rho"])
