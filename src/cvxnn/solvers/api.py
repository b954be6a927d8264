"""`solve` and `path`: choose a solver, check the request, run it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.distributed import common_seed
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.operators import MLPOperator
from cvxnn.problem import Problem
from cvxnn.solvers.admm import Admm
from cvxnn.solvers.base import Iterate, Solver, make_options
from cvxnn.solvers.burer_monteiro import BmGd, BmGlobal, BmLbfgs, BmNoisyGd, BmPrecGd, BmProjectedGd, BmSgd
from cvxnn.solvers.driver import Callback, run
from cvxnn.solvers.fista import Fista
from cvxnn.solvers.frank_wolfe import FrankWolfe
from cvxnn.solvers.interior_point import InteriorPoint
from cvxnn.solvers.memory import check_solver_memory
from cvxnn.solvers.result import Result
from cvxnn.solvers.ssnal import Ssnal
from cvxnn.solvers.vector_admm import VectorAdmm
from cvxnn.solvers.vector_costs import choose_system, is_worthwhile
from cvxnn.solvers.working_set import WorkingSet
from cvxnn.validation import check_flag, check_integer, check_positive

__all__ = ["SOLVERS", "choose_solver", "path", "solve"]

#: "auto" takes "working_set" from so many gates and samples, and features P d per sample, on.
_LEAST_GATES, _LEAST_SAMPLES, _MANY_FEATURES = 256, 256, 25
#: With several outputs from this number of gates times beta / beta_max on, with another loss from this beta / beta_max.
_MANY_UNUSED, _LARGE_BETA = 30, 0.03
#: From the latter on also from so many gates and features per sample on, where conjugate gradients solve the system.
_SOME_GATES, _SOME_FEATURES = 50, 5

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (
        Admm,
        VectorAdmm,
        WorkingSet,
        Fista,
        FrankWolfe,
        InteriorPoint,
        Ssnal,
        BmGd,
        BmSgd,
        BmNoisyGd,
        BmProjectedGd,
        BmPrecGd,
        BmLbfgs,
        BmGlobal,
    )
}


def choose_solver(problem: Problem) -> str:
    """What ``solver="auto"`` takes.

    "admm" wherever its factorisation fits in memory or can be done without (perceptrons with X in memory), or
    "vector_admm" where that can serve and the kernel of the samples is the cheaper one to factor, or "working_set" for
    perceptrons with many gates; "fista" elsewhere, and "frank_wolfe" for norms without a prox. For ReLU "ssnal" with
    one output, and "bm_global" with several.
    """
    group, known = problem.operator.group, list(SOLVERS)
    if group is None:
        return _choose_here(problem)
    # Processes may see different amounts of free memory.
    return known[int(group.of_first(known.index(_choose_here(problem))))]


def _choose_here(problem: Problem) -> str:
    names = ("admm", "fista", "frank_wolfe") if problem.cones is None else ("ssnal", "bm_global")
    vector = _lacking(VectorAdmm, problem) is None and is_worthwhile(problem)
    if _few_gates_will_do(problem, vector):
        return WorkingSet.name
    if vector:
        return VectorAdmm.name
    for name in names:
        if _lacking(SOLVERS[name], problem) is None:
            return name
    raise UnsupportedError(f"no solver can serve {problem!r}")


def _few_gates_will_do(problem: Problem, vector: bool) -> bool:
    """Whether rounds on a part of the gates save more than they cost.

    So it is where the pass over the gates is most of a step: where they have many features for each sample. Where a
    step takes long in any case, as with several outputs, the share of the gates in use matters too, and so beta.
    """
    op = problem.operator
    if type(op) is not MLPOperator or _lacking(WorkingSet, problem) is not None or problem.cones is not None:
        return False
    per_sample = op.n_features / op.n_samples
    if vector and op.n_gates >= _SOME_GATES and per_sample >= _SOME_FEATURES and choose_system(problem) == "iterative":
        return problem.beta >= _LARGE_BETA * problem.beta_max
    if op.n_gates < _LEAST_GATES or per_sample < _MANY_FEATURES or op.n_samples < _LEAST_SAMPLES:
        return False
    if vector:
        return True
    if problem.loss.name == "squared":
        return op.n_gates * problem.beta >= _MANY_UNUSED * problem.beta_max
    return per_sample >= 10 * _MANY_FEATURES or problem.beta >= _LARGE_BETA * problem.beta_max


def solve(
    problem: Problem,
    solver: str = "auto",
    *,
    rank: int | None = None,
    tol: float = 1e-4,
    max_iter: int | None = None,
    time_limit: float | None = None,
    random_state: Any = None,
    init: Any = None,
    solver_options: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    verbose: int = 0,
) -> Result:
    """Solve a problem to a certified relative duality gap.

    Parameters
    ----------
    problem : Problem
    solver : {"auto", "admm", "vector_admm", "working_set", "fista", "frank_wolfe", "interior_point", "ssnal", \
            "bm_gd", "bm_sgd", "bm_noisy_gd", "bm_projected_gd", "bm_precgd", "bm_lbfgs", "bm_global"}
        "auto" takes ADMM where its factorisation fits in memory or can be done without ("vector_admm" for one output
        and the squared loss, "working_set" for many gates), otherwise FISTA; Frank-Wolfe for norms without a prox. For
        ReLU it takes "ssnal" with one output and "bm_global" with several.
    rank : int, optional
        Number of columns per gate of a Burer-Monteiro factorisation: fixed, except in "bm_global", which starts
        with it. None leaves it to the solver; the convex solvers take None only.
    tol : float
        Relative duality gap at which the run ends as "certified".
    max_iter : int, optional
        Limit of iterations; a default per solver.
    time_limit : float, optional
        Limit in seconds.
    random_state : int, RandomState or None
        Seed of the first factors, of mini-batches and of noise; the convex solvers are deterministic.
    init : Result, array-like (P, p, q) or pair (U, V), optional
        Warm start. Convex solvers of gated and linear problems drop one whose objective is above that of Z = 0.
    solver_options : dict, optional
        Options of the solver; an unknown name is an error.
    checkpoint : path, optional
        File to which the state is written every 30 seconds and at the end.
    resume : bool
        Go on from `checkpoint` where it exists.
    callbacks : sequence of callables
        Each is called with the newest entry of the trace; a true return value ends the run as
        "interrupted".
    verbose : {0, 1, 2}
        Silent, a progress bar, or a line per certificate (on standard error).

    Returns
    -------
    Result
        Ctrl-C ends a run with the best point so far and status "interrupted".

    Raises
    ------
    InvalidInputError
        Unknown names or wrong values.
    UnsupportedError
        The solver cannot serve the problem; the message says what it lacks.
    MemoryShortageError
        The solver needs more memory than there is in all. Where it needs more than is free, a
        ``MemoryWarning`` is raised.
    """
    return _solve(
        problem,
        solver,
        {},
        rank=rank,
        tol=tol,
        max_iter=max_iter,
        time_limit=time_limit,
        random_state=random_state,
        init=init,
        solver_options=solver_options,
        checkpoint=checkpoint,
        resume=resume,
        callbacks=callbacks,
        verbose=verbose,
    )


def _solve(
    problem: Problem,
    solver: str,
    kept: dict[str, Any],
    *,
    rank: int | None = None,
    tol: float = 1e-4,
    max_iter: int | None = None,
    time_limit: float | None = None,
    random_state: Any = None,
    init: Any = None,
    solver_options: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    verbose: int = 0,
) -> Result:
    """:func:`solve` with what the runs of a path share, by solver; it is filled by the first of them."""
    if not isinstance(problem, Problem):
        raise InvalidInputError(f"problem is a {type(problem).__name__}; a cvxnn Problem is wanted")
    tol = check_positive(tol, "tol", allow_zero=True)
    if not isinstance(verbose, (bool, int)) or verbose < 0:
        raise InvalidInputError(f"verbose is {verbose!r}; 0, 1 or 2 is wanted")
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise InvalidInputError(f"checkpoint is {checkpoint!r}; the path of a file is wanted")
    check_integer(max_iter, "max_iter", allow_none=True)
    check_positive(time_limit, "time_limit", allow_none=True)
    name = choose_solver(problem) if solver == "auto" else solver
    if not isinstance(name, str) or name not in SOLVERS:
        known = ", ".join(["auto", *SOLVERS])
        raise InvalidInputError(f"solver is {solver!r}; one of {known} is wanted")
    kind = SOLVERS[name]
    if rank is not None and not kind.factored:
        raise UnsupportedError(f"rank={rank!r} is for Burer-Monteiro solvers; {name!r} takes rank=None")
    check_integer(rank, "rank", allow_none=True)
    options = make_options(kind, solver_options)
    lacking = _lacking(kind, problem)
    if lacking is not None:
        raise UnsupportedError(f"solver {name!r} cannot serve this problem: {lacking}")
    if not isinstance(callbacks, Iterable) or not all(callable(callback) for callback in callbacks):
        raise InvalidInputError("callbacks holds something that cannot be called; a sequence of functions is wanted")
    if check_flag(resume, "resume") and checkpoint is None:
        raise InvalidInputError("resume=True needs the path of a checkpoint")
    check_solver_memory(problem, name, rank, getattr(options, "side", None))
    if problem.operator.group is not None:
        random_state = common_seed(random_state)
    running = kind(problem, options, tol, time_limit, rank, random_state)
    running.kept = kept.setdefault(name, {})
    return run(
        running,
        max_iter=kind.default_max_iter if max_iter is None else max_iter,
        time_limit=time_limit,
        init=_as_iterate(problem, init, kind.factored or problem.cones is not None),
        checkpoint=checkpoint,
        resume=resume,
        callbacks=callbacks,
        verbose=verbose,
    )


def _lacking(kind: type[Solver], problem: Problem) -> str | None:
    """What a solver lacks for a problem, or None."""
    if problem.cones is not None and not kind.cones:
        able = ", ".join(repr(name) for name, solver in SOLVERS.items() if solver.cones)
        return f"it does not keep the columns of ReLU networks in their cones; one of {able} is wanted"
    if problem.operator.shares_gates and not kind.shares_gates:
        able = ", ".join(repr(name) for name, solver in SOLVERS.items() if solver.shares_gates)
        return f"the gates are shared out to several processes; one of {able} is wanted"
    if problem.operator.group is not None and not kind.sharded:
        able = ", ".join(repr(name) for name, solver in SOLVERS.items() if solver.sharded)
        return f"the samples are shared out to several processes; one of {able} is wanted"
    return kind.unsupported(problem)


def _as_iterate(problem: Problem, init: Any, factored: bool) -> Iterate | None:
    """A warm start in the working type: blocks, or factors for the solvers that work on these."""
    if init is None:
        return None
    dual: torch.Tensor | None = None
    Z: Any = init
    factors: Any = None
    if isinstance(init, tuple):
        if len(init) != 2:
            raise InvalidInputError(f"init is a tuple of {len(init)}; a pair (U, V), blocks or a Result is wanted")
        Z, factors = None, init
    elif isinstance(init, Result):
        Z, factors = init.Z, init.factors
        if init.problem.Y.shape == problem.Y.shape:
            dual = init.dual
    _, p, q = problem.operator.block_shape
    n_gates, own = problem.n_gates, problem.operator.own_gates
    try:
        if factors is not None:
            U, V = (torch.as_tensor(part, dtype=torch.float64, device=problem.device).detach() for part in factors)
            if U.ndim != 3 or V.ndim != 3 or U.shape[2] != V.shape[2]:
                shapes = f"{tuple(U.shape)} and {tuple(V.shape)}"
                raise InvalidInputError(f"init has factors of shapes {shapes}; (P, p, m) and (P, q, m) are wanted")
            seen, factors = (len(U) if len(U) == len(V) else 0, U.shape[1], V.shape[1]), (U, V)
            parts: tuple[torch.Tensor, ...] = (U, V)
        if Z is not None:
            Z = torch.as_tensor(Z, dtype=problem.dtype, device=problem.device).detach()
            seen, parts = tuple(Z.shape), (Z,)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"init cannot be read as blocks or factors: {error}") from error
    if seen != (n_gates, p, q):
        raise InvalidInputError(f"init has shape {seen}; {(n_gates, p, q)} is wanted")
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise InvalidInputError("init contains NaN or infinity; finite numbers are wanted")
    if problem.operator.shares_gates and factored:
        raise UnsupportedError("init is given, but solvers on factors start at random where gates are shared out")
    Z = None if Z is None else own(Z)
    factors = None if factors is None else (own(factors[0]), own(factors[1]))
    if factored:
        if factors is None and problem.cones is not None:
            raise InvalidInputError("init is given as blocks; a ReLU problem starts from factors (U, V) or a Result")
        if factors is None:
            factors = Columns.from_blocks(Z.double()).factors(n_gates)
        return Iterate(None, dual=dual, factors=factors)
    if Z is None:
        Z = (factors[0] @ factors[1].mT).to(problem.dtype)
    # Where the norm has a closed form, it is at most the cost of the factors.
    return Iterate(Z, dual=dual, factors=None if problem.norm.exact else factors)


def path(
    problem: Problem,
    betas: Iterable[float] | None = None,
    *,
    n_betas: int = 20,
    ratio: float = 1e-3,
    **options: Any,
) -> list[Result]:
    """Solutions for a sequence of betas, each started from the last.

    What does not depend on beta, such as the kernel of ADMM, is formed once.

    Parameters
    ----------
    problem : Problem
        Its own beta is not used.
    betas : sequence of float, optional
        Solved from the largest down; by default `n_betas` values, evenly spaced in the logarithm, from
        ``problem.beta_max`` to `ratio` times it.
    n_betas : int
    ratio : float
    **options
        Passed on to :func:`solve`. With `checkpoint` there is one file per beta, with -0, -1, ... added to
        its name.

    Returns
    -------
    list of Result
        In decreasing order of beta; ``result.problem.beta`` is the value.
    """
    if not isinstance(problem, Problem):
        raise InvalidInputError(f"problem is a {type(problem).__name__}; a cvxnn Problem is wanted")
    if betas is not None and (isinstance(betas, str) or not isinstance(betas, Iterable)):
        raise InvalidInputError(f"betas is {betas!r}; a sequence of positive numbers is wanted")
    if betas is None:
        check_integer(n_betas, "n_betas")
        if not 0 < check_positive(ratio, "ratio") < 1:
            raise InvalidInputError(f"ratio is {ratio!r}; a number between 0 and 1 is wanted")
        if problem.beta_max <= 0:
            raise InvalidInputError("beta_max is 0: Z = 0 is optimal for every beta; give betas")
        values = np.geomspace(problem.beta_max, ratio * problem.beta_max, n_betas)
    else:
        values = np.array([check_positive(beta, "betas") for beta in betas])
        if len(values) == 0:
            raise InvalidInputError("betas is empty; at least one value is wanted")
    results: list[Result] = []
    kept: dict[str, Any] = {}
    solver = options.pop("solver", "auto")
    start = options.pop("init", None)
    checkpoint = options.pop("checkpoint", None)
    for i, beta in enumerate(np.sort(values)[::-1]):
        if checkpoint is not None:
            file = Path(checkpoint)
            options["checkpoint"] = file.with_name(f"{file.stem}-{i}{file.suffix}")
        results.append(_solve(problem.with_beta(float(beta)), solver, kept, init=start, **options))
        start = results[-1]
    return results
