"""A loss of one output on arrays of shape (n,), for loops in which a call of torch costs more than its arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cvxnn.losses import Squared
from cvxnn.problem import Problem

__all__ = ["ArrayLoss"]

Array = NDArray[np.float64]


class ArrayLoss:
    """F of the predictions of a problem with one output: the squared loss in NumPy, others through torch.

    Parameters
    ----------
    problem : Problem
    """

    def __init__(self, problem: Problem) -> None:
        self.loss, self.Y, self.weights = problem.loss, problem.Y64.cpu(), problem.weights.cpu()
        self.ones = torch.ones_like(self.Y)
        self.w: Array = self.weights.numpy()
        self.squared = type(self.loss) is Squared
        #: Targets that count; those of weight 0 do not.
        self.y: Array = np.where(self.w > 0, self.Y.numpy()[:, 0], 0.0)

    def value(self, T: Array) -> float:
        """F(T)."""
        if self.squared:
            residual = T - self.y
            return 0.5 * float((self.w * residual) @ residual)
        return float(self.loss.value(_column(T), self.Y, self.weights))

    def prox(self, T: Array, sigma: float) -> Array:
        """Minimiser over S of F(S) + sigma/2 ||S - T||^2."""
        if self.squared:
            found: Array = (self.w * self.y + sigma * T) / (self.w + sigma)
            return found
        return self.loss.prox(_column(T), self.Y, self.weights, sigma).numpy()[:, 0]

    def curvature(self, T: Array) -> Array:
        """Second derivatives of F at T, generalised ones at kinks; F is a sum over samples."""
        if self.squared:
            return self.w
        return self.loss.hessian_product(_column(T), self.Y, self.weights, self.ones).numpy()[:, 0]


def _column(T: Array) -> torch.Tensor:
    return torch.from_numpy(T)[:, None]
