"""Gradient descent preconditioned by the Gram matrices of the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.base import BurerMonteiro
from cvxnn.validation import check_positive

__all__ = ["BmPrecGd"]

_STATIONARY = {torch.float32: 1e-5, torch.float64: 1e-10}
#: Share of the decrease that the slope promises at which a step is taken (Armijo).
_SUFFICIENT = 1e-2
_SHORTEST = 1e-18


@dataclass(frozen=True)
class PreconditionedOptions:
    """Options of ``bm_precgd``.

    Attributes
    ----------
    damping : float
        eta is this times the mean squared length of a column.
    step : float
        Length of the first step; it then follows a line search.
    growth : float
        Factor by which the step grows after each iteration, at least 1.
    """

    damping: float = 1e-2
    step: float = 1.0
    growth: float = 1.5

    def __post_init__(self) -> None:
        check_positive(self.damping, "damping")
        check_positive(self.step, "step")
        if not check_positive(self.growth, "growth") >= 1:
            raise InvalidInputError(f"growth is {self.growth!r}; a number of at least 1 is wanted")


class BmPrecGd(BurerMonteiro):
    """U_k <- U_k - t grad (V_k^T V_k + eta I)^-1 and alike for V (Zhang, Fattahi, Zhang 2023), with line search.

    The preconditioner makes the steps independent of the sizes of the columns, not of the data. To their eta, which
    is for losses without a penalty, 2 t beta is added: where columns vanish, as in all gates that the optimum does
    not use, the objective has the Hessian [[beta I, G], [G^T, beta I]] with ||G|| <= beta, at most 2 beta. Divided by
    eta alone, which is small beside beta, it would make t that small for all columns.
    """

    name = "bm_precgd"
    l2_only = True
    Options = PreconditionedOptions
    default_max_iter: ClassVar[int] = 20_000

    def start(self, point: Iterate | None) -> None:
        super().start(point)
        self.length = self.options.step
        self._look()

    def _look(self) -> None:
        self.slopes = self.loss.slopes(self.columns, self.intercept)
        self.value = self.slopes.value + self.penalty(self.columns)

    def _divide(self, slope: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """slope (other^T other + (eta + 2 t beta) I)^-1 gate by gate; columns are rows here, m a gate."""
        n_gates = self.op.n_gates
        blocks = other.view(n_gates, -1, other.shape[1])
        m = blocks.shape[1]
        eta = self.options.damping * float(other.square().sum()) / len(other)
        eta += 2 * self.length * self.problem.beta
        gram = blocks @ blocks.mT + max(eta, 1e-300) * torch.eye(m, dtype=other.dtype, device=other.device)
        return torch.linalg.solve(gram, slope.view(n_gates, m, -1)).reshape(slope.shape)

    def step(self) -> None:
        columns, beta, slopes = self.columns, self.problem.beta, self.slopes
        if self.residual(columns, slopes) <= _STATIONARY[columns.u.dtype]:
            self.finished = True
            return
        left, right = slopes.left + beta * columns.u, slopes.right + beta * columns.v
        # The intercept moves by the gradient over the largest curvature that it can have.
        db = slopes.intercept / (self.problem.loss.smoothness * float(self.loss.weights.sum()))
        fall = float((slopes.intercept * db).sum())
        while True:
            du, dv = self._divide(left, columns.v), self._divide(right, columns.u)
            promised = float((left * du).sum() + (right * dv).sum()) + fall
            moved = Columns(columns.gate, columns.u - self.length * du, columns.v - self.length * dv)
            b = self.intercept - self.length * db
            slopes = self.loss.slopes(moved, b)
            value = slopes.value + self.penalty(moved)
            if value <= self.value - _SUFFICIENT * self.length * promised:
                break
            self.length /= 2
            if self.length < _SHORTEST:
                self.finished = True
                return
        self.columns, self.intercept, self.slopes, self.value = moved, b, slopes, value
        self.length *= self.options.growth

    def state(self) -> dict[str, Any]:
        return super().state() | {"length": self.length}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.length = state["length"]
        self._look()
