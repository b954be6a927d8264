"""CVXPY with SCS, a first-order method."""

from __future__ import annotations

from typing import Any

from benchmark_utils.conic import Conic
from benchopt import BaseSolver


class Solver(Conic, BaseSolver):
    """Tolerances 1e-4, 1e-6, ..."""

    name = "cvxpy-scs"
    requirements = ["pip::cvxpy", "pip::scs"]
    backend = "SCS"

    def settings(self, tol: float) -> dict[str, Any]:
        """Both tolerances, and the cap."""
        return {"eps_abs": tol, "eps_rel": tol, "max_iters": 10**7, "time_limit_secs": float(self.cap)}
