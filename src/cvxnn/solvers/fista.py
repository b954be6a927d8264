"""Accelerated proximal gradient with backtracking and adaptive restarts (Beck, Teboulle 2009)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.validation import check_flag, check_positive

__all__ = ["Fista"]


@dataclass(frozen=True)
class FistaOptions:
    """Options of ``fista``.

    Attributes
    ----------
    restart : bool
        Drop the momentum where it points uphill (O'Donoghue, Candes 2015).
    step_growth : float
        The step may grow by this factor per iteration before backtracking shortens it; at least 1.
    """

    restart: bool = True
    step_growth: float = 1.05

    def __post_init__(self) -> None:
        check_flag(self.restart, "restart")
        if not check_positive(self.step_growth, "step_growth") >= 1:
            raise InvalidInputError(f"step_growth is {self.step_growth!r}; a number of at least 1 is wanted")


class Fista(Solver):
    """Proximal gradient on Z; an intercept is minimised out at every point.

    Z is scaled so that A has about norm 1: its squares, and those of A, then neither overflow nor underflow.
    """

    name = "fista"
    Options = FistaOptions
    default_max_iter: ClassVar[int] = 100_000
    sharded: ClassVar[bool] = True
    shares_gates: ClassVar[bool] = True
    per_gate: ClassVar[tuple[str, ...]] = ("Z", "moved_Z")

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if not problem.norm.has_prox:
            return f"it needs the prox of the norm, which {problem.norm.name} does not have; use 'frank_wolfe'"
        return None

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        self.op = problem.operator
        self.weights = problem.weights.to(problem.dtype)

    def start(self, point: Iterate | None) -> None:
        problem = self.problem
        largest = self._largest_eigenvalue()
        Z = problem.Y.new_zeros(self.op.block_shape) if point is None else point.blocks().to(problem.Y).clone()
        self.outputs = self.op.apply(Z)
        self.Z = Z * self.size
        self.moved_Z, self.moved_outputs = self.Z, self.outputs
        self.momentum = 1.0
        self.intercept: torch.Tensor | None = None
        # A short power iteration underestimates the Lipschitz constant; backtracking corrects it.
        self.lipschitz = largest * problem.loss.smoothness * float(self.weights.max())
        if not self.lipschitz > 0:
            self.lipschitz = 1.0

    def _largest_eigenvalue(self) -> float:
        """About that of A A* for the scaled Z; sets the size of A, a power of two."""
        generator = torch.Generator().manual_seed(0)
        L = torch.randn(self.problem.Y.shape, generator=generator, dtype=torch.float64).to(self.problem.Y)
        value = 0.0
        self.size = 0.0
        for _ in range(5):
            L = L / torch.linalg.vector_norm(L).clamp_min(torch.finfo(L.dtype).tiny)
            blocks = self.op.adjoint(L)
            if not self.size:
                (entry,) = self.op.over_gates(float(blocks.abs().max()))
                self.size = 2.0 ** math.frexp(entry)[1] if 0 < entry < math.inf else 1.0
            L = self.op.apply(blocks / self.size / self.size)
            value = float(torch.linalg.vector_norm(L))
        return value

    def _smooth(self, outputs: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Loss with the best intercept, and the predictions that it gives."""
        if self.problem.output_bias:
            start = self.intercept
            self.intercept = self.problem.loss.best_intercept(outputs, self.problem.Y, self.weights, start=start)
            outputs = outputs + self.intercept
        return float(self.problem.loss.value(outputs, self.problem.Y, self.weights)), outputs

    def step(self) -> None:
        problem = self.problem
        value, predictions = self._smooth(self.moved_outputs)
        gradient = self.op.adjoint(problem.loss.gradient(predictions, problem.Y, self.weights)) / self.size
        self.lipschitz /= self.options.step_growth
        rounding = 10 * torch.finfo(problem.dtype).eps * abs(value)
        for _ in range(60):
            threshold = problem.beta / self.size / self.lipschitz
            Z, _ = problem.norm.prox(self.moved_Z - gradient / self.lipschitz, threshold)
            difference = Z - self.moved_Z
            outputs = self.op.apply(Z / self.size)
            slope, squares = self.op.over_gates(float((gradient * difference).sum()), float(difference.square().sum()))
            model = value + slope + self.lipschitz / 2 * squares
            if self.op.agreed(self._smooth(outputs)[0] <= model + rounding):
                break
            self.lipschitz *= 2
        self._accelerate(Z, outputs)

    def _accelerate(self, Z: torch.Tensor, outputs: torch.Tensor) -> None:
        (angle,) = self.op.over_gates(float(((self.moved_Z - Z) * (Z - self.Z)).sum()))
        uphill = self.options.restart and angle > 0
        previous = 1.0 if uphill else self.momentum
        self.momentum = (1 + math.sqrt(1 + 4 * previous**2)) / 2
        weight = 0.0 if uphill else (previous - 1) / self.momentum
        self.moved_Z = Z + weight * (Z - self.Z)
        self.moved_outputs = outputs + weight * (outputs - self.outputs)
        self.Z, self.outputs = Z, outputs

    def iterate(self) -> Iterate:
        return Iterate(self.Z / self.size)

    def state(self) -> dict[str, Any]:
        intercept = {} if self.intercept is None else {"intercept": self.intercept}
        return {
            **intercept,
            "Z": self.Z,
            "outputs": self.outputs,
            "moved_Z": self.moved_Z,
            "moved_outputs": self.moved_outputs,
            "momentum": self.momentum,
            "lipschitz": self.lipschitz,
            "size": self.size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
