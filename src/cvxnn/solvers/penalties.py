"""How ADMM fits its penalties to residuals."""

from __future__ import annotations

from cvxnn.problem import Problem

__all__ = ["balance", "tolerated_imbalance"]


def tolerated_imbalance(problem: Problem) -> float:
    """How far residuals may be apart; further where a new factorisation costs as much as many steps."""
    op = problem.operator
    n, c = op.n_samples, op.n_outputs
    features = op.n_features // op.n_gates * op.total_gates
    # The same whichever side is factored, so that all find the same points.
    order = min(n, features)
    step = 4 * n * features * c + 2 * order**2 * c
    return 2.0 if order**3 / 3 < 5 * step else 3.0


def balance(lengths: list[float], tolerated: float) -> float:
    """Factor for a penalty from the lengths of Z, W, Z - W, the change of W, and U; 1 where they are balanced."""
    Z, W, apart, moved, multiplier = lengths
    size = max(Z, W)
    if size == 0 or multiplier == 0:
        return 1.0
    primal, dual = apart / size, moved / multiplier
    if primal == 0 or dual == 0:
        return 1.0
    ratio = primal / dual
    return 1.0 if 1 / tolerated <= ratio <= tolerated else min(max(ratio**0.6, 0.1), 10.0)
