"""Newton's method with a positive model of the curvature, damped by a metric."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cvxnn.solvers.burer_monteiro.local import LocalProblem

__all__ = ["NewtonResult", "newton"]

_LARGEST_DAMPING = 1e8
_SMALLEST_DAMPING = 1e-14
#: Relative decreases of the objective below this are not seen reliably.
_ROUNDING = 1e-11


@dataclass
class NewtonResult:
    """Where Newton's method ended, the damping to go on with, and why it ended: stuck, converged or at its limit."""

    parts: list[torch.Tensor]
    value: float
    damping: float
    stuck: bool
    converged: bool
    n_iter: int


def newton(
    local: LocalProblem,
    parts: Sequence[torch.Tensor],
    limit: int,
    damping: float,
    tolerance: float,
    dense: bool = True,
    at_least: int = 0,
    deadline: float | None = None,
) -> NewtonResult:
    """Minimise a local problem.

    Parameters
    ----------
    local : LocalProblem
    parts : list of torch.Tensor
        Start.
    limit : int
        Limit of steps.
    damping : float
        Multiple of the metric that is added to the curvature at first (Levenberg-Marquardt); it follows the
        ratio of the decrease to what the model promised.
    tolerance : float
        End where the gradient is at most this times beta times the length of the columns.
    dense : bool
        Form the curvature; otherwise steps are by conjugate gradients.
    at_least : int
        Take so many steps even where the gradient is small: new columns have small gradients at first.
    deadline : float, optional
        Value of ``time.perf_counter`` at which to end.
    """
    shapes = [part.shape for part in parts]
    sizes = [part.numel() for part in parts]
    x = torch.cat([part.flatten() for part in parts])

    def split(flat: torch.Tensor) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    value, slopes = local.evaluate(split(x))
    slope = torch.cat([part.flatten() for part in slopes])
    if not math.isfinite(value):
        return NewtonResult(split(x), value, damping, True, False, 0)
    for step in range(limit):
        if step >= at_least and float(slope.norm()) <= tolerance * local.beta * local.length(split(x)):
            return NewtonResult(split(x), value, damping, False, True, step)
        curvature = local.curvature(split(x), dense)
        while True:
            solved = curvature.step(slope, damping)
            if solved is not None:
                move, curved = solved
                promised = -float(slope @ move + move @ curved / 2)
                new_value, new_slopes = local.evaluate(split(x + move))
                ratio = _ratio(value - new_value, promised, value, slope, new_slopes)
                if ratio > 1e-4:
                    break
            damping = max(8 * damping, 1e-8)
            if damping > _LARGEST_DAMPING:
                local.evaluate(split(x))
                return NewtonResult(split(x), value, 1e-3, True, False, step)
        x, value = x + move, new_value
        slope = torch.cat([part.flatten() for part in new_slopes])
        if ratio > 0.5:
            damping = max(damping / 10, _SMALLEST_DAMPING)
        elif ratio < 0.2:
            damping *= 3
        if deadline is not None and time.perf_counter() >= deadline:
            return NewtonResult(split(x), value, damping, False, False, step + 1)
    return NewtonResult(split(x), value, damping, False, False, limit)


def _ratio(
    decrease: float, promised: float, value: float, slope: torch.Tensor, new_slopes: Sequence[torch.Tensor]
) -> float:
    """Decrease of the value over what was promised.

    Where rounding hides it, any step is good that does not raise the value visibly: near a minimum the steps
    contract, and at a saddle point they lead away, with a gradient that grows at first.
    """
    if not math.isfinite(decrease):
        return -1.0
    if promised > _ROUNDING * abs(value):
        return decrease / promised
    if decrease < -_ROUNDING * abs(value):
        return -1.0
    size = math.sqrt(sum(float(part.square().sum()) for part in new_slopes))
    return 1.0 if size < float(slope.norm()) else 0.3
