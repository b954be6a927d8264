"""Stochastic gradient descent on the factors, over a torch DataLoader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, TensorDataset

from cvxnn.factored import FactoredLoss
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.gradient import Descent, DescentOptions
from cvxnn.validation import check_integer

__all__ = ["BmSgd"]


@dataclass(frozen=True)
class SgdOptions(DescentOptions):
    """Options of ``bm_sgd``: those of the gradient methods, with other defaults, and the batches.

    Attributes
    ----------
    batch_size : int
    decay_every : int
        The step is multiplied by `decay` after so many epochs.
    """

    step: float | None = None
    decay: float = 0.2
    batch_size: int = 128
    decay_every: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.batch_size, "batch_size")
        check_integer(self.decay_every, "decay_every")


class BmSgd(Descent):
    """Mini-batches in a new order per epoch, with momentum; one iteration is one epoch.

    Only the rows of one batch are touched at a time, so that X may be a memory-mapped array that is larger
    than memory. The default step is (1 - momentum) over the largest curvature, which a batch estimates.
    """

    name = "bm_sgd"
    Options = SgdOptions
    default_max_iter: ClassVar[int] = 50
    check_every: int = 1

    def start(self, point: Iterate | None) -> None:
        super().start(point)
        self.seed = int(self.rng.randint(2**31))

    def state(self) -> dict[str, Any]:
        return super().state() | {"seed": self.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.seed = state["seed"]

    def _batches(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed + self.iteration)
        index = TensorDataset(torch.arange(self.problem.n_samples))
        return DataLoader(index, batch_size=self.options.batch_size, shuffle=True, generator=order)

    def step(self) -> None:
        length = self.step_length()
        total = 0.0
        for (rows,) in self._batches():
            part = FactoredLoss(self.problem, rows=rows.to(self.problem.device))
            slopes = part.slopes(self.columns, self.intercept)
            total += slopes.value * len(rows) / self.problem.n_samples
            self.move(slopes, length)
        if self._accept(total + self.penalty(self.columns)):
            self.iteration += 1
            if self.iteration % self.options.decay_every == 0:
                self.decayed *= self.options.decay

    def step_length(self) -> float:
        if self.options.step is not None:
            return super().step_length()
        if self.curvature == 0:
            n = self.problem.n_samples
            rows = torch.from_numpy(self.rng.permutation(n)[: max(self.options.batch_size, 1024)])
            full, self.loss = self.loss, FactoredLoss(self.problem, rows=rows.to(self.problem.device))
            self.curvature = self._curvature()
            self.loss = full
        return (1 - self.options.momentum) / self.curvature * self.decayed * self.shortened
