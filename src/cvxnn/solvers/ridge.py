"""The quadratic step of ADMM, through the kernel or the Gram matrix, whichever is smaller (math section 5)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cvxnn.columns import Columns
from cvxnn.operators import Operator
from cvxnn.operators.symmetric import add_product

__all__ = [
    "FeatureRidge",
    "KernelRidge",
    "Ridge",
    "RidgeSolution",
    "Step",
    "cholesky",
    "conjugate_gradients",
    "kernel_fit_norm",
    "solve_factored",
]


Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class RidgeSolution:
    """Minimiser of the quadratic step: blocks, predictions with intercept, and a o (C - predictions)."""

    Z: torch.Tensor
    residual: torch.Tensor | None


@dataclass
class ResidualNorms:
    """||R||^2 and <R, C> in the metric of the weights, C centred where there is an intercept."""

    square: float
    inner: float


class Ridge(ABC):
    """argmin over Z, b of 1/2 sum_i a_i |A(Z)_i + b - C_i|^2 + rho/2 ||Z - B||_F^2.

    Parameters
    ----------
    operator : Operator
    weights : torch.Tensor of shape (n,)
        The a_i >= 0.
    intercept : bool
        Whether there is a b (otherwise 0).
    """

    def __init__(self, operator: Operator, weights: torch.Tensor, intercept: bool) -> None:
        self.operator = operator
        self.intercept = intercept
        self.rho = 0.0
        self.set_weights(weights)
        # Stored by columns, as LAPACK wants it.
        self._factor = weights.new_empty(self.order, self.order).mT

    @abstractmethod
    def set_weights(self, weights: torch.Tensor) -> None:
        """Change the a_i; :meth:`factor` must follow."""

    @abstractmethod
    def fit_norm(self, C: torch.Tensor) -> float:
        """About the Frobenius norm of a lightly regularised least-squares fit to targets C."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Order of the matrix that is factored."""

    @abstractmethod
    def factor(self, rho: float) -> None:
        """Factor the system for a value of rho; where that fails, `rho` is 0 as before the first time."""

    @abstractmethod
    def solve(self, B: torch.Tensor, C: torch.Tensor, want_residual: bool = True) -> RidgeSolution:
        """The minimiser for given B and C; the residual only where wanted or free."""

    @abstractmethod
    def metric(self, columns: Columns, hidden: torch.Tensor) -> tuple[torch.Tensor, Step]:
        """Gram matrix (r, r) of hidden outputs in the metric M^-1, and weights (r, c) -> M^-1 hidden weights.

        M = K / rho + diag(1 / a), or about that, restricted to what is orthogonal to the intercept: the residual of the
        minimiser for B = 0 is M^-1 C. Only where each sample has one hidden output for a column.

        Parameters
        ----------
        columns : Columns
            In float64.
        hidden : torch.Tensor of shape (n, r), float64
            ``operator.hidden`` of these, for the samples of this process.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """What the next steps depend on besides the factorisation."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Go on from what :meth:`state` returned."""


class KernelRidge(Ridge):
    """Through the n x n kernel: I + diag(sqrt a) K diag(sqrt a) / rho is factored."""

    def __init__(self, operator: Operator, weights: torch.Tensor, intercept: bool) -> None:
        self._kernel = operator.kernel()
        super().__init__(operator, weights, intercept)

    @property
    def order(self) -> int:
        return len(self._kernel)

    def fit_norm(self, C: torch.Tensor) -> float:
        scale = float(self._kernel.diagonal().mean())
        return kernel_fit_norm(lambda v: self._kernel @ v, scale, C - C.mean(0) if self.intercept else C)

    def set_weights(self, weights: torch.Tensor) -> None:
        self._root = weights.sqrt().unsqueeze(1)
        self._uniform = bool((weights == weights[0]).all())

    def factor(self, rho: float) -> None:
        self.rho = 0.0
        scale = (self._root[0] ** 2 if self._uniform else self._root * self._root.T) / rho
        self._factor = cholesky(lambda system: torch.mul(self._kernel, scale, out=system.mT), 1.0, self._factor)
        if self.intercept:
            self._ones = self._root * solve_factored(self._factor, self._root)
            self._total = self._ones.sum()
        self.rho = rho

    def solve(self, B: torch.Tensor, C: torch.Tensor, want_residual: bool = True) -> RidgeSolution:
        gap = C - self.operator.apply(B)
        residual = self._root * solve_factored(self._factor, self._root * gap)
        if self.intercept:
            residual -= self._ones * (residual.sum(0) / self._total)
        return RidgeSolution(B + self.operator.adjoint(residual) / self.rho, residual)

    def metric(self, columns: Columns, hidden: torch.Tensor) -> tuple[torch.Tensor, Step]:
        half = self._half(self._root * hidden.to(self._root))
        if self.intercept:
            ones = self._half(self._root)
            half -= ones * ((ones.T @ half) / ones.square().sum())

        def step(weights: torch.Tensor) -> torch.Tensor:
            right = half @ weights.to(half)
            return (self._root * torch.linalg.solve_triangular(self._factor.mT, right, upper=True)).double()

        return (half.T @ half).double(), step

    def _half(self, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self._factor, right, upper=False)


class FeatureRidge(Ridge):
    """Through the (P p w) x (P p w) Gram matrix; with constant C the steps do not depend on n.

    Parameters
    ----------
    target : torch.Tensor of shape (n, c), optional
        The C of all steps, where it is constant: its products are formed in the pass that forms the Gram matrix.
    """

    def __init__(
        self, operator: Operator, weights: torch.Tensor, intercept: bool, target: torch.Tensor | None = None
    ) -> None:
        self._target = target
        super().__init__(operator, weights, intercept)

    def set_weights(self, weights: torch.Tensor) -> None:
        self._weights = weights.unsqueeze(1)
        self._total = weights.sum()
        ones = torch.ones_like(self._weights)
        targets = ones if self._target is None else torch.cat([ones, self._centred(self._target)], 1)
        self._gram, products = self.operator.moments(weights, targets)
        if self.intercept:
            mean = products[:, :1] / self._total
            add_product(self._gram, mean.T, -float(self._total))
        self._cached = None if self._target is None else (self._target, products[:, 1:])

    def _centred(self, C: torch.Tensor) -> torch.Tensor:
        return C - (self._weights * C).sum(0) / self._total if self.intercept else C

    def _products(self, C: torch.Tensor) -> torch.Tensor:
        """A* (a o C), C centred where there is an intercept; kept for the next call."""
        if self._cached is None or self._cached[0] is not C:
            self._cached = (C, self.operator.flatten(self.operator.adjoint(self._weights * self._centred(C))))
        return self._cached[1]

    @property
    def order(self) -> int:
        return len(self._gram)

    def fit_norm(self, C: torch.Tensor) -> float:
        right = self._products(C)
        # The mean of the kernel's diagonal is a trace over the number of samples.
        scale, size = float(self._gram.diagonal().sum()) / len(C), float(right.abs().max())
        if not (scale > 0 and size > 0):
            return 0.0
        fit = conjugate_gradients(lambda x: self._gram @ (x / scale), right / size)
        return float(torch.linalg.vector_norm(fit)) * (size / scale)

    def factor(self, rho: float) -> None:
        self.rho = 0.0
        self._factor = cholesky(lambda system: system.mT.copy_(self._gram), rho, self._factor)
        self.rho = rho

    def solve(self, B: torch.Tensor, C: torch.Tensor, want_residual: bool = True) -> RidgeSolution:
        flat = self._products(C) + self.rho * self.operator.flatten(B)
        Z = self.operator.unflatten(solve_factored(self._factor, flat))
        return RidgeSolution(Z, self.residual(Z, C) if want_residual else None)

    def metric(self, columns: Columns, hidden: torch.Tensor) -> tuple[torch.Tensor, Step]:
        # With F the features and G = F^T diag(a) F: M^-1 F = rho diag(a) F (G + rho I)^-1.
        p, index = self.operator.block_shape[1], torch.arange(len(columns), device=hidden.device)
        flat = self._gram.new_zeros(self.order, len(columns))
        flat[columns.gate * p + torch.arange(p, device=hidden.device).unsqueeze(1), index] = columns.u.T.to(flat)
        half = torch.linalg.solve_triangular(self._factor, flat, upper=False)

        def step(weights: torch.Tensor) -> torch.Tensor:
            right = self.rho * (half @ weights.to(half))
            Z = self.operator.unflatten(torch.linalg.solve_triangular(self._factor.mT, right, upper=True))
            return (self._weights * self._centred(self.operator.apply(Z))).double()

        # F^T M^-1 F = rho (I - rho (G + rho I)^-1).
        gram = (flat.T @ flat - self.rho * (half.T @ half)).double()
        return self.rho * gram, step

    def dual_values(self, Z: torch.Tensor) -> tuple[torch.Tensor, ResidualNorms]:
        """A*(a o R), flat, and norms of R = C - A(Z) - 1 b^T with the best b, for the constant C, without the data."""
        assert self._target is not None
        flat = self.operator.flatten(Z)
        products = self._products(self._target)
        image = self._gram @ flat
        centred = self._centred(self._target)
        size = float((self._weights * centred.square()).sum(dtype=torch.float64))
        cross = float((flat * products).sum(dtype=torch.float64))
        square = size - 2 * cross + float((flat * image).sum(dtype=torch.float64))
        return products - image, ResidualNorms(square, size - cross)

    def residual(self, Z: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """a o (C - A(Z) - 1 b^T) with the best b."""
        gap = C - self.operator.apply(Z)
        if self.intercept:
            gap = gap - (self._weights * gap).sum(0) / self._total
        return self._weights * gap


def _as_it_is(value: float) -> float:
    return value


def kernel_fit_norm(
    product: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    target: torch.Tensor,
    total: Callable[[float], float] = _as_it_is,
) -> float:
    """About the Frobenius norm of the blocks of a lightly regularised least-squares fit to a target.

    Parameters
    ----------
    product : callable
        Products with the kernel.
    scale : float
        Mean of its diagonal.
    target : torch.Tensor of shape (n, ...)
    total : callable
        Adds up what processes have of a sum over the samples.
    """
    if not scale > 0:
        return 0.0
    fit = conjugate_gradients(lambda x: product(x / scale), target, total=total)
    return math.sqrt(max(0.0, total(float((fit * product(fit / scale)).sum())))) / math.sqrt(scale)


def cholesky(fill: Callable[[torch.Tensor], object], shift: float, buffer: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of a symmetric matrix plus shift I, in place; fill(buffer) writes the matrix.

    Where rounding has made it indefinite, the shift is raised: the step is then solved inexactly, which the
    certificate shows if it matters.
    """
    info = torch.empty((), dtype=torch.int32, device=buffer.device)
    raised, largest = 0.0, math.inf
    while raised < largest:
        fill(buffer)
        buffer.diagonal().add_(shift + raised)
        if raised == 0:
            largest = float(buffer.diagonal().max())
        torch.linalg.cholesky_ex(buffer, out=(buffer, info))
        if int(info) == 0:
            return buffer
        raised = 10 * raised or len(buffer) * torch.finfo(buffer.dtype).eps * largest
    raise torch.linalg.LinAlgError("the system of the quadratic step is not positive definite")


def solve_factored(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two triangular solves; unlike ``torch.cholesky_solve`` they do not copy the factor."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    steps: int = 5,
    total: Callable[[float], float] = _as_it_is,
) -> torch.Tensor:
    """A few steps towards (M + 1e-3 I)^-1 right, for an estimate of its size; M through its products."""
    x, residual = torch.zeros_like(right), right
    direction, size = right, total(float(right.square().sum()))
    for _ in range(steps):
        image = product(direction) + 1e-3 * direction
        curvature = total(float((direction * image).sum()))
        if not (size > 0 and curvature > 0):
            break
        x = x + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        previous, size = size, total(float(residual.square().sum()))
        direction = residual + (size / previous) * direction
    return x
