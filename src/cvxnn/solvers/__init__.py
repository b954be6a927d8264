"""Solvers, and the one function that runs them."""

from cvxnn.solvers.api import SOLVERS, path, solve
from cvxnn.solvers.result import Result

__all__ = ["SOLVERS", "Result", "path", "solve"]
