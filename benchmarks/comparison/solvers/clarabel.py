"""CVXPY with Clarabel, an interior-point method."""

from __future__ import annotations

from typing import Any

from benchmark_utils.conic import Conic
from benchopt import BaseSolver


class Solver(Conic, BaseSolver):
    """Tolerances 1e-4, 1e-6, ..."""

    name = "cvxpy-clarabel"
    requirements = ["pip::cvxpy", "pip::clarabel"]
    backend = "CLARABEL"

    def settings(self, tol: float) -> dict[str, Any]:
        """All three tolerances, and the cap."""
        names = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
        return dict.fromkeys(names, tol) | {"time_limit": float(self.cap), "accept_unknown": True}
