"""The one loop around every solver: budget, trace, callbacks, progress, checkpoints, Ctrl-C, certificate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cvxnn.bounds import dual_bound
from cvxnn.certificates import Certificate, Evaluation, certificate_of, evaluate, relative_gap
from cvxnn.dual_norms import bounds_are_cheap
from cvxnn.errors import CvxnnError, DistributedError, InvalidInputError
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.solvers.checkpoint import Checkpoint
from cvxnn.solvers.progress import Progress
from cvxnn.solvers.result import Result

__all__ = ["Callback", "run"]

#: Seconds for the dual norms of one certificate, where they are dear: at first, and per second of the run.
_FIRST_SECONDS = 1.0
_CERTIFICATE_SHARE = 0.1
#: Called with the newest entry of the trace; a true return value stops the run.
Callback = Callable[[dict[str, Any]], Any]


@dataclass
class _Best:
    """The best point and the best dual bound so far; both are of the same problem."""

    primal: float = float("inf")
    lower: float = float("-inf")
    point: Evaluation | None = None
    Z: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    dual: torch.Tensor | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    improved_to: float = float("inf")
    improved_at: int = 0

    @property
    def gap(self) -> float:
        return relative_gap(self.primal, self.lower)

    @property
    def intercept(self) -> torch.Tensor | None:
        return None if self.point is None else self.point.intercept

    def update(self, problem: Problem, point: Iterate, seconds: float) -> bool:
        """Take in a point, with about so long for its dual norms; False if it is not finite."""
        parts = (point.Z,) if point.factors is None else point.factors
        finite = all(part is not None and bool(torch.isfinite(part).all()) for part in parts)
        if problem.operator.over_gates(float(not finite))[0] > 0:
            return False
        Z = point.Z if point.factors is None else None
        seen = evaluate(problem, Z, factors=point.factors, intercept=point.intercept)
        if not seen.primal < float("inf"):
            return False
        if seen.primal < self.primal and seen.is_feasible(problem):
            U, V = point.factors or (None, None)
            self.primal = seen.primal
            self.factors = None if U is None or V is None else (U.detach().clone(), V.detach().clone())
            self.Z = None if point.Z is None else point.Z.detach().clone()
            self.point = seen.at(None if seen.Z is None else self.Z, self.factors)
        nu = problem.dual_candidate(seen.predictions) if point.dual is None else point.dual.double()
        # What certify makes of the candidate is what is bounded here, so that it finds the same bound.
        nu = problem.centred(nu)
        bound = dual_bound(problem, problem.centred(nu), seconds).lower_bound
        if bound > self.lower:
            self.lower, self.dual = bound, nu
        return True

    def certificate(self, problem: Problem, seconds: float | None = None) -> Certificate:
        """What :func:`certify` says of exactly the best point and dual, without the passes that were made already."""
        assert self.point is not None
        lower, cones = self.lower, problem.cones
        if self.dual is not None and not (cones is None or bounds_are_cheap(problem.operator, cones)):
            # The bound depends on the time there is.
            lower = dual_bound(problem, problem.centred(self.dual), seconds).lower_bound
        return certificate_of(problem, self.point, lower, seconds)

    def record(self, iteration: int, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Append the state to the trace, with what the solver adds to it."""
        if self.gap < 0.99 * self.improved_to:
            self.improved_to, self.improved_at = self.gap, iteration
        self.trace.append(
            {
                "iteration": iteration,
                "seconds": seconds,
                "primal": self.primal,
                "lower_bound": self.lower,
                "relative_gap": self.gap,
                **facts,
            }
        )
        return self.trace[-1]

    def replay(self) -> None:
        """What the trace of a run that goes on says of its improvement."""
        self.improved_to, self.improved_at = float("inf"), 0
        for entry in self.trace:
            if entry["relative_gap"] < 0.99 * self.improved_to:
                self.improved_to, self.improved_at = entry["relative_gap"], entry["iteration"]

    def stalled(self, iteration: int) -> bool:
        """Whether the gap has stood still for long."""
        return iteration - self.improved_at > max(1000, iteration // 2)


def run(
    solver: Solver,
    *,
    max_iter: int,
    time_limit: float | None,
    init: Iterate | None,
    checkpoint: str | Path | None,
    resume: bool,
    callbacks: Sequence[Callback],
    verbose: int,
) -> Result:
    """Run a solver to the tolerance or a limit, and certify exactly the point that is returned."""
    begin = time.perf_counter()
    problem, tol = solver.problem, solver.tol
    operator, group = problem.operator, problem.operator.group
    best = _Best()
    store = Checkpoint(checkpoint, problem, solver) if checkpoint is not None else None
    iteration, spent = 0, 0.0
    state: dict[str, Any] | None = None

    def elapsed() -> float:
        return spent + time.perf_counter() - begin

    def share() -> float:
        """Time for the bounds of one certificate: a part of what was spent so far."""
        return _FIRST_SECONDS + _CERTIFICATE_SHARE * elapsed()

    status, next_check, stopped = "max_iter", 0, False
    with Progress(solver.name, tol, verbose if group is None or group.rank == 0 else 0) as progress:
        try:
            best.update(problem, init if init is not None else solver.zero(), share())
            if init is not None and _is_worse_than_zero(solver, best):
                init = None
                best.update(problem, solver.zero(), share())
            if best.gap <= tol:
                status = "certified"
                best.record(0, elapsed(), {})
            else:
                solver.start(init)
                saved = store.load() if store is not None and resume else None
                if saved is not None:
                    solver.load_state(saved.solver_state)
                    iteration, spent, best.trace = saved.iteration, saved.seconds, saved.trace
                    best.update(problem, Iterate(saved.Z, saved.intercept, saved.dual, saved.factors), share())
                    best.replay()
                    state = saved.solver_state
                    if best.gap <= tol:
                        status = "certified"
                next_check = _next_check(iteration, solver.check_every)
                if saved is not None and saved.next_check is not None:
                    next_check = saved.next_check
                while status != "certified" and iteration < max_iter:
                    solver.step()
                    iteration += 1
                    if store is not None:
                        # Kept for Ctrl-C in the middle of the next step.
                        state = solver.state()
                    out_of_time = time_limit is not None and operator.agreed(elapsed() >= time_limit)
                    last = out_of_time or solver.finished or iteration >= max_iter
                    due = iteration >= next_check
                    if due:
                        # A run that goes on from its last iteration keeps to the same checks.
                        next_check = _next_check(iteration, solver.check_every)
                    estimate = solver.estimated_gap() if due else None
                    asked = due and (estimate is None or estimate <= tol)
                    if not (asked or last):
                        if estimate is not None:
                            progress.estimate(iteration, estimate)
                        if store is not None and state is not None:
                            store.save_if_due(iteration, elapsed(), best, state, next_check)
                        continue
                    finite = best.update(problem, solver.iterate(), share())
                    if store is not None and asked:
                        # To be asked for its point may change a solver; one that is asked because it ends goes on
                        # as if it had not been.
                        state = solver.state()
                    if group is not None:
                        group.check_agreement(best.primal, best.lower)
                    entry = best.record(iteration, elapsed(), solver.facts())
                    progress.update(entry)
                    stop = [callback(entry) for callback in callbacks]
                    called_off = bool(callbacks) and operator.agreed(any(stop))
                    if best.gap <= tol:
                        status = "certified"
                    elif not finite:
                        status = "diverged"
                    elif called_off:
                        status = "interrupted"
                    elif out_of_time:
                        status = "time_limit"
                    elif solver.finished or (best.stalled(iteration) and solver.limited_by_rounding()):
                        status = "stationary"
                    elif iteration < max_iter:
                        if store is not None and state is not None:
                            store.save_if_due(iteration, elapsed(), best, state, next_check)
                        continue
                    break
        except (KeyboardInterrupt, Exception) as cause:
            if isinstance(cause, DistributedError) or (group is not None and not isinstance(cause, CvxnnError)):
                # The other processes may be anywhere in their work, or gone: there is no certificate to be had.
                # Gates that are shared out cannot be put together any more; their last checkpoint stays.
                if store is not None and state is not None and not problem.operator.shares_gates:
                    store.save(iteration, elapsed(), best, state, next_check)
                if group is None or isinstance(cause, DistributedError):
                    raise
                if isinstance(cause, Exception):
                    raise group.failed(cause) from cause
                first = group.first_error()
                why = "" if first is None else f": {first}"
                raise DistributedError(f"the run was interrupted after {iteration} iterations{why}") from cause
            if not isinstance(cause, (KeyboardInterrupt, torch.linalg.LinAlgError)):
                raise
            stopped = isinstance(cause, KeyboardInterrupt)
            status = "interrupted" if stopped else "diverged"
            if best.intercept is None:
                best.update(problem, solver.zero(), share())
            elif solver.cones or iteration > (best.trace[-1]["iteration"] if best.trace else 0):
                # A step that was cut short may have left anything; what it left counts if it is a point.
                with contextlib.suppress(TypeError, AttributeError, RuntimeError, InvalidInputError):
                    if best.update(problem, solver.iterate(), share()):
                        best.record(iteration, elapsed(), solver.facts())
        if store is not None and state is not None:
            store.save(iteration, elapsed(), best, state, next_check)

    if best.intercept is None:
        raise InvalidInputError(
            "the objective is not finite even at Z = 0; rescale X and Y (their values are too large)"
        )
    certificate = best.certificate(problem, None if time_limit is None else share())
    if status == "certified" and certificate.relative_gap > tol:
        # The time for dear bounds ran out where it had sufficed in the run.
        certificate = best.certificate(problem)
    if status != "certified" and not stopped and certificate.relative_gap <= tol:
        status = "certified"
    whole = operator.all_gates
    return Result(
        problem=problem,
        solver=solver.name,
        status=status,
        n_iter=iteration,
        seconds=elapsed(),
        certificate=certificate,
        Z=None if best.Z is None else whole(best.Z),
        factors=None if best.factors is None else (whole(best.factors[0]), whole(best.factors[1])),
        intercept=best.intercept,
        dual=best.dual,
        trace=best.trace,
        message=solver.message(certificate) if status == "stationary" else "",
    )


def _is_worse_than_zero(solver: Solver, best: _Best) -> bool:
    """Whether a convex solver is better off without its warm start; in factors zero is a saddle."""
    if solver.factored or solver.problem.cones is not None:
        return False
    return not best.primal <= evaluate(solver.problem, solver.zero().Z).primal


def _next_check(iteration: int, every: int) -> int:
    """Every few iterations, and in long runs every five percent of them."""
    return iteration + max(every, iteration // 20)
