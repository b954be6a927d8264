"""Newton's method for the columns of a ReLU problem in their cones: damped models, solved over the cones."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from cvxnn.columns import Columns
from cvxnn.cones import Cones, Projection
from cvxnn.factored import FactoredLoss, Slopes
from cvxnn.solvers.burer_monteiro.cone_cg import ConeProducts
from cvxnn.solvers.burer_monteiro.cone_model import ConeModel, ModelStep

__all__ = ["ConePoint", "ConeProgress", "cone_newton", "evaluate_columns", "natural_step", "projected_gradient"]

_LARGEST_DAMPING = 1e8
_SMALLEST_DAMPING = 1e-14
#: Relative decreases of the objective below this are not seen reliably.
_ROUNDING = 1e-12
_SHORTEST = 1e-12


@dataclass
class ConePoint:
    """Feasible columns and the intercept, with the objective and the slopes of the loss there."""

    columns: Columns
    b: torch.Tensor
    value: float
    slopes: Slopes


@dataclass
class ConeProgress:
    """Where a local method ended: residual of stationarity, damping to go on with, why it ended."""

    point: ConePoint
    residual: float
    damping: float
    stuck: bool
    converged: bool
    n_iter: int


def evaluate_columns(loss: FactoredLoss, columns: Columns, b: torch.Tensor) -> ConePoint:
    """The objective (19) and its slopes."""
    slopes = loss.slopes(columns, b)
    penalty = loss.problem.beta / 2 * float(columns.u.square().sum() + columns.v.square().sum())
    return ConePoint(columns, b, slopes.value + penalty, slopes)


def natural_step(
    loss: FactoredLoss, cones: Cones, point: ConePoint, start: Projection | None = None
) -> tuple[Projection, float]:
    """Proj_k(-G_k v_j / beta), which is u_j at a stationary point (72), and the relative residual of all conditions."""
    beta, columns = loss.problem.beta, point.columns
    natural = cones.project(columns.gate, -point.slopes.left / beta, start)
    total = (natural.point - columns.u).square().sum() + (columns.v + point.slopes.right / beta).square().sum()
    size = columns.u.square().sum() + columns.v.square().sum()
    residual = math.sqrt(float(total / size)) if float(size) > 0 else 0.0
    if loss.problem.output_bias:
        # In units of the loss: what a step of the size of the columns could gain.
        scale = float(loss.weights.sum()) * loss.problem.loss.smoothness
        residual = max(residual, float(point.slopes.intercept.norm()) / max(scale, 1e-300))
    return natural, residual


def cone_newton(
    kind: type[ConeModel] | type[ConeProducts],
    loss: FactoredLoss,
    cones: Cones,
    point: ConePoint,
    limit: int,
    damping: float,
    tolerance: float,
    at_least: int = 0,
    deadline: float | None = None,
) -> ConeProgress:
    """Minimise over the columns, which stay in their cones.

    Parameters
    ----------
    kind : type
        Model of the objective: with a matrix, or through products.
    limit : int
        Limit of steps.
    damping : float
        Multiple of the metric that is added to the curvature at first (Levenberg-Marquardt).
    tolerance : float
        Residual at which to end.
    at_least : int
        Take so many steps even where the residual is small.
    deadline : float, optional
        Value of ``time.perf_counter`` at which to end.
    """
    natural: Projection | None = None
    residual = math.inf
    for step in range(limit):
        natural, residual = natural_step(loss, cones, point, natural)
        if residual <= tolerance and step >= at_least:
            return ConeProgress(point, residual, damping, False, True, step)
        if deadline is not None and time.perf_counter() >= deadline:
            return ConeProgress(point, residual, damping, False, False, step)
        model = kind(loss, cones, point.columns, point.b, point.slopes)
        moved, damping = _damped_step(loss, cones, point, model, natural, residual, damping, deadline)
        if moved is None:
            moved = projected_gradient(loss, cones, point)
            damping = 1e-3
        if moved is None:
            return ConeProgress(point, residual, damping, True, False, step)
        point = moved
    return ConeProgress(point, residual, damping, False, False, limit)


def _damped_step(
    loss: FactoredLoss,
    cones: Cones,
    point: ConePoint,
    model: ConeModel | ConeProducts,
    natural: Projection,
    residual: float,
    damping: float,
    deadline: float | None,
) -> tuple[ConePoint | None, float]:
    """A step that lowers the objective, None if no damping gives one, and the damping for the next."""
    while damping <= _LARGEST_DAMPING:
        target = model.minimise(natural, damping)
        if target is not None:
            trial = evaluate_columns(loss, Columns(point.columns.gate, target.u, target.v), target.b)
            ratio = _ratio(loss, cones, point, trial, target, natural, residual)
            if ratio > 1e-4:
                if ratio > 0.5:
                    damping = max(damping / 10, _SMALLEST_DAMPING)
                elif ratio < 0.2:
                    damping *= 3
                return trial, damping
        damping = max(8 * damping, 1e-8)
        if deadline is not None and time.perf_counter() >= deadline:
            break
    return None, damping


def _ratio(
    loss: FactoredLoss,
    cones: Cones,
    point: ConePoint,
    trial: ConePoint,
    target: ModelStep,
    natural: Projection,
    residual: float,
) -> float:
    """Decrease over what was promised; where rounding hides it, whether the residual falls."""
    decrease = point.value - trial.value
    if not math.isfinite(decrease):
        return -1.0
    if target.promised > _ROUNDING * abs(point.value):
        return decrease / target.promised
    if decrease < -_ROUNDING * abs(point.value):
        return -1.0
    after = natural_step(loss, cones, trial, natural)[1]
    return 1.0 if after < residual else -1.0


def projected_gradient(loss: FactoredLoss, cones: Cones, point: ConePoint) -> ConePoint | None:
    """One projected gradient step that lowers the objective enough, or None."""
    beta, columns = loss.problem.beta, point.columns
    left, right = point.slopes.left + beta * columns.u, point.slopes.right + beta * columns.v
    scale = max(float(columns.u.square().sum() + columns.v.square().sum()), 1e-300)
    slope = math.sqrt(float(left.square().sum() + right.square().sum()))
    length = min(1 / beta, math.sqrt(scale) / max(slope, 1e-300))
    shift = loss.problem.loss.smoothness * float(loss.weights.sum())
    projection: Projection | None = None
    while length * slope > _SHORTEST * math.sqrt(scale):
        projection = cones.project(columns.gate, columns.u - length * left, projection)
        v = columns.v - length * right
        b = point.b - min(length, 1 / shift) * point.slopes.intercept if loss.problem.output_bias else point.b
        trial = evaluate_columns(loss, Columns(columns.gate, projection.point, v), b)
        moved = (projection.point - columns.u).square().sum() + (v - columns.v).square().sum()
        if point.value - trial.value >= 0.1 * float(moved) / length and trial.value < point.value:
            return trial
        length /= 4
    return None
