"""GroupBCD of skglm: block coordinate descent with working sets and Anderson acceleration, compiled by numba."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from benchmark_utils.programs import features
from benchmark_utils.sampling import Restarted
from benchopt import BaseSolver
from skglm.datafits.group import QuadraticGroup
from skglm.penalties.block_separable import WeightedGroupL2
from skglm.solvers import GroupBCD
from skglm.utils.data import grp_converter


class Solver(Restarted, BaseSolver):
    """A group lasso in the features D_k X, for one output; iterations varied, compilation not timed."""

    name = "skglm-groupbcd"
    requirements = ["pip::skglm"]

    def skip(self, Y: Any, **_: Any) -> tuple[bool, str | None]:
        """Vectors per group."""
        return (True, "its groups are vectors: one output only") if Y.shape[1] > 1 else (False, None)

    def set_objective(self, X: Any, Y: Any, gates: Any, beta: float, cap: float, **_: Any) -> None:
        """Keep what is needed; its loss is divided by n."""
        self.X, self.y, self.gates, self.alpha, self.cap = X, Y[:, 0].copy(), gates, beta / len(X), cap

    def warm_up(self) -> None:
        """Compile."""
        self.run(1)

    def run(self, iterations: int) -> None:
        """So many rounds of at most 100 epochs on a working set."""
        begin = time.perf_counter()
        d, n_gates = self.X.shape[1], self.gates.shape[1]
        self.w = np.zeros(n_gates * d)
        if iterations > 0:
            indices, starts = grp_converter(d, n_gates * d)
            penalty = WeightedGroupL2(self.alpha, np.ones(n_gates), starts, indices)
            solver = GroupBCD(max_iter=iterations, tol=1e-14)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                matrix = features(self.X, self.gates)
                self.w = solver.solve(matrix, self.y, QuadraticGroup(starts, indices), penalty)[0]
        self.run_timed(time.perf_counter() - begin, iterations)

    def get_result(self) -> dict[str, Any]:
        """Blocks Z."""
        return {"Z": self.w.reshape(self.gates.shape[1], -1, 1)}
