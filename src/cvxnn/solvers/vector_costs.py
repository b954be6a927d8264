"""What the two systems of `vector_admm` take, and which one is taken."""

from __future__ import annotations

from cvxnn.problem import Problem
from cvxnn.solvers.nystrom_system import n_columns
from cvxnn.solvers.sides import fits, side_costs

__all__ = ["SYSTEMS", "choose_system", "factoring", "is_worthwhile", "passing", "vector_bytes"]

SYSTEMS = ("samples", "iterative")
#: Steps in a run of usual length, and conjugate gradients in one of them.
_STEPS = 30
_GRADIENTS = 2
#: Operations that take as long as reading a number of the kernel or its factor from memory; and how often a step does.
_READING = 40
#: From so many samples on conjugate gradients can be worth it.
_ITERATIVE_FROM = 2_500
#: Copies of the blocks: those of the iteration, and two for each difference of the acceleration.
_VECTORS = 32


def passing(n: int, n_gates: int, d: int) -> float:
    """Operations of an application and an adjoint."""
    return 4.0 * n * n_gates * d


def factoring(n: int, n_gates: int, d: int) -> float:
    """Operations of forming and factoring the kernel."""
    return n**3 / 3 + float(n) ** 2 * (n_gates + d)


def approximating(n: int, n_gates: int, d: int) -> float:
    """Operations of forming the low-rank approximation of the kernel."""
    m = n_columns(n)
    return 2.0 * n * m * (n_gates + d) + 3.0 * n * m**2


def system_costs(n: int, n_gates: int, d: int) -> dict[str, float]:
    """Operations of a run of usual length with each system."""
    samples = factoring(n, n_gates, d) + _STEPS * (passing(n, n_gates, d) + _READING * float(n) ** 2)
    gradients = (_GRADIENTS + 0.5) * passing(n, n_gates, d) + 8.0 * n * n_columns(n) * _GRADIENTS
    return {"samples": samples, "iterative": approximating(n, n_gates, d) + _STEPS * gradients}


def choose_system(problem: Problem) -> str:
    """The cheaper one, if it fits in the memory that is free."""
    n, (n_gates, d, _) = problem.operator.n_samples, problem.operator.block_shape
    costs = system_costs(n, n_gates, d)
    if n < _ITERATIVE_FROM or (costs["samples"] <= costs["iterative"] and fits(problem, vector_bytes(problem))):
        return "samples"
    return "iterative"


def is_worthwhile(problem: Problem) -> bool:
    """Whether a run takes fewer operations than ADMM with the Gram matrix of the features factored."""
    n, (n_gates, d, _) = problem.operator.n_samples, problem.operator.block_shape
    costs = system_costs(n, n_gates, d)
    return costs[choose_system(problem)] <= side_costs(problem.operator, True, _STEPS)["features"]


def vector_bytes(problem: Problem, system: str = "samples") -> int:
    """Memory of a system, in float64 at worst, of the data and patterns in two precisions, and of the blocks."""
    n, (n_gates, d, _) = problem.operator.n_samples, problem.operator.block_shape
    m = n_columns(n)
    matrices = 16 * n**2 if system == "samples" else 16 * n * m + 40 * m**2
    return matrices + 16 * n * (d + n_gates) + 8 * _VECTORS * n_gates * d
