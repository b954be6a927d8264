"""Samples and targets as `vector_admm` takes them; those of all sets of gates on the same data are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cvxnn.problem import Problem
from cvxnn.solvers.gated_rows import GatedRows

__all__ = ["ScaledSamples"]

Array = NDArray[Any]


class ScaledSamples:
    """X and y times the roots of the weights, and scaled so that their largest entry is 1; beta and Z go with them.

    Parameters
    ----------
    problem : Problem
        A perceptron with data in memory and one output.

    Attributes
    ----------
    root : ndarray of shape (n,)
        Roots of the weights.
    x_size, y_size : float
        What was divided by.
    y : ndarray of shape (n,)
    """

    def __init__(self, problem: Problem) -> None:
        given: Array = problem.operator.double().data_tensors()[0].numpy()
        self.root: Array = problem.weights.sqrt().numpy()
        y = np.where(self.root > 0, problem.Y64.numpy()[:, 0] * self.root, 0.0)
        # Without a copy of the signs of X.
        sizes = np.maximum(given.max(1), -given.min(1))
        self.x_size = float((sizes * self.root).max()) or 1.0
        self.y_size = float(np.abs(y).max()) or 1.0
        self.y = y / self.y_size
        X = given
        if not bool((self.root / self.x_size == 1).all()):
            X = given * self.root[:, None]
            X /= self.x_size
        self._copies = {X.dtype: np.ascontiguousarray(X)}

    def rows(self, patterns: torch.Tensor) -> GatedRows:
        """The map of some gates (n, s) in float64; the samples are shared, in either precision."""
        return GatedRows(self._copies[np.dtype(np.float64)], patterns.numpy().astype(np.float64), self._copies)
