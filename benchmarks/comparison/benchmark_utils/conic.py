"""The program in CVXPY, written as a user would."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy as cp
import numpy as np

from benchmark_utils.programs import features
from benchmark_utils.sampling import Reached

__all__ = ["Conic"]


class Conic:
    """CVXPY with one of its backends; forming the program and its translation are timed."""

    sampling_strategy = "tolerance"
    stopping_criterion = Reached()
    backend = ""

    def set_objective(self, X: Any, Y: Any, gates: Any, beta: float, cap: float, **_: Any) -> None:
        """Keep what is needed."""
        self.data, self.beta, self.cap = (X, Y, gates), beta, cap

    def get_next(self, tol: float) -> float:
        """Tolerances 1e-4, 1e-6, ..."""
        return 1e-4 if tol > 1 else tol / 100

    def warm_up(self) -> None:
        """A program of two variables, which loads the backend."""
        x = cp.Variable(2)
        cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.norm(x))).solve(solver=self.backend)

    def settings(self, tol: float) -> dict[str, Any]:
        """Arguments of ``solve``."""
        raise NotImplementedError

    def run(self, tol: float) -> None:
        """Solve, or stay at zero where the backend gives up."""
        X, Y, gates = self.data
        d, c, n_gates = X.shape[1], Y.shape[1], gates.shape[1]
        self.Z = np.zeros((n_gates, d, c))
        if tol > 1:
            return
        blocks = [cp.Variable((d, c)) for _ in range(n_gates)]
        norm = (lambda Z: cp.norm(Z, 2)) if c == 1 else cp.normNuc
        residual = features(X, gates) @ cp.vstack(blocks) - Y
        penalty = cp.sum([norm(Z) for Z in blocks])
        # Tolerances are relative to the objective, as backends also know absolute ones.
        scale = float(np.square(Y).sum()) / 2
        program = cp.Problem(cp.Minimize((cp.sum_squares(residual) / 2 + self.beta * penalty) / scale))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program.solve(solver=self.backend, **self.settings(tol))
            except cp.SolverError:
                return
        if all(Z.value is not None and np.isfinite(Z.value).all() for Z in blocks):
            self.Z = np.stack([Z.value for Z in blocks])

    def get_result(self) -> dict[str, Any]:
        """Blocks Z."""
        return {"Z": self.Z}
