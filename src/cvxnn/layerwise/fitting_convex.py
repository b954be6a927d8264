"""One stage by the convex solver, and its solution as columns."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from cvxnn.columns import Columns
from cvxnn.errors import CertificationWarning
from cvxnn.layerwise.network import TrainedStage
from cvxnn.layerwise.options import StageOptions
from cvxnn.layerwise.results import StageResult
from cvxnn.problem import Problem
from cvxnn.solvers import Result, solve

if TYPE_CHECKING:
    from cvxnn.layerwise.fitting import LayerwiseRun

__all__ = ["train_convexly"]

#: Columns of convex solutions with less than this part of the largest singular value are rounding.
_NO_COLUMN = {torch.float32: 1e-6, torch.float64: 1e-12}


def train_convexly(
    run: LayerwiseRun, stage: StageOptions, problem: Problem, begin: float
) -> tuple[StageResult, TrainedStage]:
    """Solve the problem of a stage; its work began at `begin`, by ``time.perf_counter``."""

    def called(entry: dict[str, Any]) -> bool:
        stop = [callback({"stage": stage.number} | entry) for callback in run.callbacks]
        return any(stop)

    solution = solve(
        problem,
        tol=stage.tol,
        max_iter=stage.max_iter,
        checkpoint=None if run.folder is None else run.folder.solver_file(stage.number),
        resume=run.folder is not None,
        callbacks=(called,) if run.callbacks else (),
        verbose=run.verbose,
    )
    columns = _columns(solution, problem)
    trained = run.trained_stage(stage, problem, columns, solution.intercept.to(problem.Y))
    result = run.result(stage, problem, trained, solution.status, solution.trace)
    result.seconds = time.perf_counter() - begin
    result.certificate = solution.certificate
    intercept = solution.intercept.to(columns.u)
    result.accuracy = run.train.accuracy(problem.operator.local.apply_columns(columns) + intercept)
    checked = run.validation_operator(problem)
    if checked is not None:
        assert run.validation is not None
        result.validation_accuracy = run.validation.accuracy(checked.apply_columns(columns) + intercept)
    if solution.status not in ("certified", "interrupted"):
        warnings.warn(
            f"stage {stage.number} ended as {solution.status!r} at a relative duality gap of "
            f"{solution.certificate.relative_gap:.1e}, above tol={stage.tol:g}; raise max_iter",
            CertificationWarning,
            stacklevel=2,
        )
    return result, trained


def _columns(solution: Result, problem: Problem) -> Columns:
    """The columns of a solution; one that is 0 where there is none."""
    if solution.factors is not None:
        columns = Columns.from_factors(*solution.factors)
    else:
        assert solution.Z is not None
        columns = Columns.from_blocks(solution.Z.double())
    columns = columns.without_zeros(_NO_COLUMN[problem.dtype]).to(problem.Y)
    if len(columns) > 0:
        return columns
    _, p, q = problem.operator.block_shape
    like = problem.Y
    gate = torch.zeros(1, dtype=torch.long, device=like.device)
    return Columns(gate, like.new_zeros(1, p), like.new_zeros(1, q))
