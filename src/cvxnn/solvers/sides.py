"""How ADMM solves its quadratic step: which matrix is factored, or none, and what that takes."""

from __future__ import annotations

import torch

from cvxnn.memory import available_bytes
from cvxnn.operators import Operator
from cvxnn.problem import Problem
from cvxnn.solvers.iterative_ridge import IterativeRidge, n_landmarks
from cvxnn.solvers.ridge import FeatureRidge, KernelRidge, Ridge

__all__ = [
    "SHARE",
    "SIDES",
    "cheaper_side",
    "choose_side",
    "factor_bytes",
    "fits",
    "make_ridge",
    "side_costs",
    "step_cost",
]

SIDES = ("samples", "features", "iterative")
#: Part of the free memory that the matrices may take.
SHARE = 0.8
#: A factor is read as fast as so many columns are solved with.
_SOLVED_AT_ONCE = 30
#: Steps of conjugate gradients per step of ADMM, about.
_PASSES = 2.5


def step_cost(n: int, c: int, features: int, side: str, constant_target: bool) -> float:
    """Floating-point operations of a step of ADMM, or as many as take the time of reading the factor."""
    if side == "iterative":
        return _PASSES * 4.0 * n * features * c
    order = n if side == "samples" else features
    passes = 0.0 if side == "features" and constant_target else 4.0 * n * features * c
    return passes + 2.0 * order**2 * max(c, _SOLVED_AT_ONCE)


def side_costs(operator: Operator, constant_target: bool, iterations: int = 100) -> dict[str, float]:
    """Floating-point operations of ADMM on each side that can be factored."""
    n, c, features = operator.n_samples, operator.n_outputs, operator.n_features
    gram = n * features**2 + features**3 / 3 + iterations * step_cost(n, c, features, "features", constant_target)
    if not (operator.has_rows or operator.shares_gates):
        return {"features": gram}
    samples = n**3 / 3 + n**2 * (features / max(1, operator.n_gates) + operator.n_gates)
    samples += iterations * step_cost(n, c, features, "samples", constant_target)
    # The Gram matrix is a sum over the samples, the kernel one over the gates.
    return {"samples": samples} if operator.shares_gates else {"samples": samples, "features": gram}


def cheaper_side(operator: Operator, constant_target: bool) -> str:
    """The side, "samples" or "features", on which ADMM needs fewer floating-point operations."""
    costs = side_costs(operator, constant_target)
    return min(costs, key=lambda side: costs[side])


def factor_bytes(problem: Problem, side: str, memory: int) -> int:
    """Memory of the matrices on a side, and of the acceleration of a length."""
    op = problem.operator
    if side == "iterative":
        numbers = n_landmarks(op.n_samples) * (op.local.n_samples + 4 * n_landmarks(op.n_samples))
    else:
        numbers = 2 * (op.n_samples if side == "samples" else op.n_features) ** 2
    unknowns = op.n_features * op.n_outputs + (0 if problem.loss.name == "squared" else problem.Y.numel())
    return (numbers + 2 * memory * unknowns) * problem.Y.element_size()


def fits(problem: Problem, needed: int) -> bool:
    """Whether matrices of so many bytes fit in the memory that is free, for each of several processes."""
    group, free = problem.operator.group, SHARE * available_bytes(problem.device)
    if group is None:
        return needed <= free
    beside = group.size_here if problem.device.type == "cpu" else 1
    return not group.any(needed * beside > free)


def choose_side(problem: Problem, memory: int) -> str:
    """The cheaper side to factor; conjugate gradients where that does not fit in memory."""
    side = cheaper_side(problem.operator, problem.loss.name == "squared")
    if problem.operator.has_kernel_columns and not fits(problem, factor_bytes(problem, side, memory)):
        return "iterative"
    return side


def make_ridge(
    side: str, operator: Operator, weights: torch.Tensor, intercept: bool, target: torch.Tensor | None = None
) -> Ridge:
    """The quadratic step on the given side; `target` is its C where that is constant."""
    if side == "samples":
        return KernelRidge(operator, weights, intercept)
    if side == "iterative":
        return IterativeRidge(operator, weights, intercept)
    return FeatureRidge(operator, weights, intercept, target)
