"""Full-batch Adam of torch on the factors."""

from __future__ import annotations

from typing import Any

import torch
from benchmark_utils.descent import Factors
from benchopt import BaseSolver


class Solver(Factors, BaseSolver):
    """Constant learning rate."""

    name = "torch-adam"
    parameters = {"lr": [1e-2, 1e-3]}

    def run(self, callback: Any) -> None:
        """Steps until the benchmark has seen enough."""
        adam = torch.optim.Adam(self.prepare(), lr=self.lr)
        while callback():
            adam.zero_grad()
            self.loss().backward()
            adam.step()
