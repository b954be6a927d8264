"""cvxnn with solver="fista"."""

from __future__ import annotations

from benchmark_utils.sampling import Cvxnn
from benchopt import BaseSolver


class Solver(Cvxnn, BaseSolver):
    """To tolerances 1e-2, 1e-4, 1e-6 of the certified relative gap."""

    name = "cvxnn-fista"
    cvxnn_name = "fista"
