"""L-BFGS of torch on the factors."""

from __future__ import annotations

from typing import Any

import torch
from benchmark_utils.descent import Factors
from benchopt import BaseSolver


class Solver(Factors, BaseSolver):
    """Strong Wolfe line search, 20 pairs; ten iterations count as one."""

    name = "torch-lbfgs"

    def run(self, callback: Any) -> None:
        """Steps until the benchmark has seen enough."""
        lbfgs = torch.optim.LBFGS(
            self.prepare(), max_iter=10, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0.0
        )

        def closure() -> torch.Tensor:
            lbfgs.zero_grad()
            value = self.loss()
            value.backward()
            return value

        while callback():
            lbfgs.step(closure)
