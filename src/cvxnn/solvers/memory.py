"""What each solver needs in memory, estimated before it starts."""

from __future__ import annotations

from cvxnn.memory import check_memory, in_words
from cvxnn.problem import Problem
from cvxnn.solvers.admm import AdmmOptions
from cvxnn.solvers.burer_monteiro.base import MAX_DEFAULT_RANK
from cvxnn.solvers.sides import choose_side, factor_bytes
from cvxnn.solvers.vector_admm import VectorAdmm
from cvxnn.solvers.vector_costs import choose_system, vector_bytes

__all__ = ["check_solver_memory", "needed_bytes"]

#: Arrays of n c numbers in float64 that a certificate has at a time.
_OF_SAMPLES = 8
#: Arrays of the size of the blocks that solvers have at a time, and of that of the factors; those of "vector_admm" are
#: among what :func:`vector_bytes` counts.
_OF_BLOCKS = {"admm": 7, "vector_admm": 0, "working_set": 4, "fista": 7, "frank_wolfe": 4}
_OF_FACTORS = {"bm_gd": 8, "bm_sgd": 8, "bm_noisy_gd": 8, "bm_precgd": 12, "bm_lbfgs": 2 * 20 + 8}


def needed_bytes(problem: Problem, solver: str, rank: int | None = None, side: str | None = None) -> int | None:
    """About the memory that a solver will take beside the data; None where this depends on the way it goes.

    Parameters
    ----------
    problem : Problem
    solver : str
    rank : int, optional
        Columns per gate of the solvers on factors; by default what they take.
    side : {"samples", "features", "iterative"}, optional
        Of ADMM; the first and the last for "vector_admm".
    """
    op = problem.operator
    n_gates, p, q = op.block_shape
    size = problem.Y.element_size()
    common = _OF_SAMPLES * 8 * problem.Y.numel()
    if solver in _OF_FACTORS:
        m = rank or min(p, q, MAX_DEFAULT_RANK)
        width = 8 if solver == "bm_lbfgs" else size
        return common + _OF_FACTORS[solver] * n_gates * m * (p + q) * width
    if solver not in _OF_BLOCKS:
        return None
    factorisation = 0
    if solver == "vector_admm":
        system = choose_system(problem) if side in (None, "auto") else side
        factorisation = vector_bytes(problem, system)
    if solver == "admm":
        chosen = choose_side(problem, AdmmOptions.memory) if side in (None, "auto") else side
        factorisation = factor_bytes(problem, chosen, AdmmOptions.memory)
    if solver == "working_set":
        factorisation = _of_rounds(problem)
    # A certificate has the blocks of the point in float64.
    return common + factorisation + n_gates * p * q * (_OF_BLOCKS[solver] * size + 16)


def _of_rounds(problem: Problem) -> int:
    """That of a round on part of the gates, with X X^T and the counts of active gates where these are kept."""
    op = problem.operator
    if VectorAdmm.unsupported(problem) is None:
        return 32 * op.n_samples**2 if choose_system(problem) == "samples" else vector_bytes(problem, "iterative")
    return 2 * min(op.n_samples, op.n_features) ** 2 * problem.Y.element_size()


def check_solver_memory(problem: Problem, solver: str, rank: int | None, side: str | None = None) -> None:
    """Say before the work starts where it does not fit, and what would need less.

    Raises
    ------
    MemoryShortageError
        The solver needs more than there is in all.
    """
    needed = needed_bytes(problem, solver, rank, side)
    if needed is None:
        return
    what = f"solver {solver!r}" + (f" at rank {rank}" if rank else "")
    check_memory(needed, problem.device, what, _advice(problem, needed, rank))


def _advice(problem: Problem, needed: int, rank: int | None) -> str:
    """A solver on factors of a rank that takes much less, if there is one."""
    _, p, q = problem.operator.block_shape
    if problem.cones is not None:
        return ""
    for solver in ("bm_lbfgs", "bm_sgd"):
        for smaller in (4, 2, 1):
            if smaller >= min(rank or p, p, q) and smaller > 1:
                continue
            less = needed_bytes(problem, solver, smaller) or 0
            if less < needed / 2:
                return f"rank={smaller} ({solver}) would need {in_words(less)}"
    return ""
