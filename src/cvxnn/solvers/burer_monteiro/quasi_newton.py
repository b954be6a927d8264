"""L-BFGS on the factors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from cvxnn.columns import Columns
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.base import BurerMonteiro
from cvxnn.solvers.lbfgs import minimise
from cvxnn.solvers.shared_lbfgs import minimise_shared
from cvxnn.validation import check_integer

__all__ = ["BmLbfgs"]


@dataclass(frozen=True)
class LbfgsOptions:
    """Options of ``bm_lbfgs``.

    Attributes
    ----------
    history : int
        Number of pairs that approximate the Hessian.
    inner_iter : int
        Iterations between two certificates; the approximation of the Hessian starts anew after each.
    """

    history: int = 20
    inner_iter: int = 200

    def __post_init__(self) -> None:
        check_integer(self.history, "history")
        check_integer(self.inner_iter, "inner_iter")


class BmLbfgs(BurerMonteiro):
    """L-BFGS on U, V and the intercept together (always in float64); one iteration is `inner_iter` of L-BFGS."""

    name = "bm_lbfgs"
    l2_only = True
    Options = LbfgsOptions
    default_max_iter: ClassVar[int] = 500
    sharded: ClassVar[bool] = True
    shares_gates: ClassVar[bool] = True
    per_gate: ClassVar[tuple[str, ...]] = ("gate", "u", "v")
    check_every: int = 1
    double = True

    def start(self, point: Iterate | None) -> None:
        super().start(point)
        self.begin = time.perf_counter()

    def step(self) -> None:
        gate, beta = self.columns.gate, self.problem.beta

        def objective(u: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
            columns = Columns(gate, u, v)
            slopes = self.loss.slopes(columns, b)
            gradients = [slopes.left.add_(u, alpha=beta), slopes.right.add_(v, alpha=beta), slopes.intercept]
            return slopes.value + self.penalty(columns), gradients

        start = [self.columns.u, self.columns.v, self.intercept]
        limit, history, gtol = self.options.inner_iter, self.options.history, 1e-12 * beta
        if self.op.shares_gates:
            found = minimise_shared(objective, start, limit, operator=self.op, n_common=1, gtol=gtol, history=history)
        else:
            deadline = None if self.time_limit is None or self.op.group is not None else self.begin + self.time_limit
            found = minimise(objective, start, limit, gtol=gtol, ftol=0.0, history=history, deadline=deadline)
        self.columns, self.intercept = Columns(gate, *found.parts[:2]), found.parts[2]
        self.finished = not found.at_limit
