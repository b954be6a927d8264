"""Positive models of the Hessian and the damped Newton steps that they give: dense, or by conjugate gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

__all__ = ["Curvature", "Dense", "MatrixFree"]


class Curvature(ABC):
    """A positive semi-definite model H of the Hessian, and a metric D in which steps are damped."""

    @abstractmethod
    def step(self, slope: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """x with (H + damping D) x = -slope, about, and H x; None where rounding makes the matrix indefinite."""


class Dense(Curvature):
    """H and D as matrices (N, N)."""

    def __init__(self, H: torch.Tensor, metric: torch.Tensor) -> None:
        self.H = H
        self.metric = metric

    def step(self, slope: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        factor, failed = torch.linalg.cholesky_ex(self.H + damping * self.metric)
        if bool(failed):
            return None
        move = -torch.cholesky_solve(slope.unsqueeze(1), factor).squeeze(1)
        return move, self.H @ move


class MatrixFree(Curvature):
    """H and D through products; the steps are those of preconditioned conjugate gradients.

    Parameters
    ----------
    product : callable
        x -> H x.
    metric : callable
        x -> D x.
    precondition : callable
        (x, damping) -> about (H + damping D)^-1 x, symmetric and positive.
    limit : int
        Limit of iterations.
    accuracy : float
        Residual at which to end, relative to the slope.
    """

    def __init__(
        self,
        product: Callable[[torch.Tensor], torch.Tensor],
        metric: Callable[[torch.Tensor], torch.Tensor],
        precondition: Callable[[torch.Tensor, float], torch.Tensor],
        limit: int,
        accuracy: float,
    ) -> None:
        self.product = product
        self.metric = metric
        self.precondition = precondition
        self.limit = limit
        self.accuracy = accuracy

    def step(self, slope: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        x, Hx = torch.zeros_like(slope), torch.zeros_like(slope)
        residual = -slope
        z = self.precondition(residual, damping)
        direction, inner = z, float(residual @ z)
        goal = self.accuracy**2 * inner
        for _ in range(self.limit):
            curved = self.product(direction)
            damped = curved + damping * self.metric(direction) if damping > 0 else curved
            bend = float(direction @ damped)
            if not bend > 0:
                break
            length = inner / bend
            x, Hx = x + length * direction, Hx + length * curved
            residual = residual - length * damped
            z = self.precondition(residual, damping)
            new = float(residual @ z)
            if new <= goal:
                break
            direction, inner = z + new / inner * direction, new
        return x, Hx
