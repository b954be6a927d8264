"""Elementwise roots of non-decreasing functions."""

from collections.abc import Callable

import torch
from torch import Tensor


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    lower: Tensor,
    upper: Tensor,
    *,
    start: Tensor,
    tolerance: float,
    max_iterations: int = 120,
) -> Tensor:
    """Roots of non-decreasing functions, one per entry, by Newton steps kept inside a shrinking bracket.

    A Newton step that leaves the bracket, or that is longer than half of the step before it, is replaced by a
    bisection, so the steps at least halve every second time. Where a function has no root in its bracket, the
    result is the end of the bracket that is nearest to one.

    Parameters
    ----------
    function : callable
        Maps points to the values and the derivatives there, all of one shape.
    lower, upper : Tensor
        Ends of the brackets.
    start : Tensor
        First points, moved into the brackets; the lower ends where they are not a number.
    tolerance : float
        An entry is done after a step of at most ``tolerance * (1 + |x|)``.
    max_iterations : int
        Largest number of evaluations.

    Returns
    -------
    Tensor
        The roots.
    """
    x = torch.minimum(torch.maximum(torch.where(start.isnan(), lower, start), lower), upper)
    previous = 2 * (upper - lower)
    active = torch.ones_like(x, dtype=torch.bool)
    for _ in range(max_iterations):
        value, slope = function(x)
        lower = torch.where(value <= 0, x, lower)
        upper = torch.where(value >= 0, x, upper)
        newton = x - value / slope
        middle = lower + (upper - lower) / 2
        use_newton = (newton >= lower) & (newton <= upper) & ((newton - x).abs() <= 0.5 * previous)
        target = torch.where(use_newton, newton, middle)
        previous = (target - x).abs()
        x = torch.where(active, target, x)
        active &= previous > tolerance * (1 + x.abs())
        if not bool(active.any()):
            break
    return x
