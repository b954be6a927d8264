"""Anderson acceleration of a fixed-point iteration, with a safeguard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["Anderson"]


class Anderson:
    """Type-II Anderson acceleration of v -> F(v) (Walker, Ni 2011), restarted where it does not help.

    Vectors are tensors, or NumPy arrays for loops in which a call of torch costs more than its arithmetic.

    Parameters
    ----------
    memory : int
        Number of differences that are kept.
    interval : int
        Steps between two extrapolations (as in SCS: O'Donoghue 2021); the others are plain.
    regularization : float
        Relative to the trace of the small Gram matrix.
    total : callable, optional
        Adds up, in place, what several processes have of inner products, where each has a part of the vectors.
    counted : slice
        The entries of this process that count in these.
    """

    def __init__(
        self,
        memory: int = 10,
        interval: int = 5,
        regularization: float = 1e-10,
        total: Callable[[torch.Tensor], object] | None = None,
        counted: slice = slice(None),
    ) -> None:
        self.memory = memory
        self.interval = interval
        self.regularization = regularization
        self.total, self.counted = total, counted
        self.reset()

    def reset(self) -> None:
        """Forget everything: after the map has changed."""
        self._count = self._used = 0
        self._last: tuple[Any, Any] | None = None
        self._steps: Any = None
        self._fallback: tuple[Any, float] | None = None
        self._rejected = False

    @property
    def unsettled(self) -> bool:
        """Whether the last step was an extrapolation that may be taken back, or took one back."""
        return self._fallback is not None or self._rejected

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        state: dict[str, Any] = {"count": self._count, "used": self._used}
        if self._last is not None:
            state["last_image"], state["last_residual"] = self._last
        if self._steps is not None:
            state["steps"] = self._steps
        if self._fallback is not None:
            state["plain"], state["before"] = self._fallback
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self._count, self._used = state["count"], state["used"]
        self._last = (state["last_image"], state["last_residual"]) if "last_image" in state else None
        self._steps = state.get("steps")
        self._fallback = (state["plain"], state["before"]) if "plain" in state else None

    def next(self, v: Any, image: Any) -> Any:
        """The point to go on from, given a flat point v and its image F(v)."""
        residual = image - v
        size = self._norm(residual)
        self._rejected = False
        if self._fallback is not None:
            plain, before = self._fallback
            self._fallback = None
            if not size <= before:
                self.reset()
                self._rejected = True
                return plain
        if self._last is not None:
            self._store(image - self._last[0], residual - self._last[1])
        self._last = (image, residual)
        self._count += 1
        if self._count % self.interval or self._steps is None:
            return image
        extrapolated = self._extrapolate(image, residual)
        self._fallback = (image, size)
        return extrapolated

    def _store(self, image_step: Any, residual_step: Any) -> None:
        if self._steps is None:
            shape = 2, self.memory, len(image_step)
            self._steps = np.zeros(shape) if isinstance(image_step, np.ndarray) else image_step.new_zeros(shape)
        slot = self._used % self.memory
        self._steps[0, slot], self._steps[1, slot] = image_step, residual_step
        self._used += 1

    def _extrapolate(self, image: Any, residual: Any) -> Any:
        m = min(self._used, self.memory)
        images, residuals = self._steps[0, :m], self._steps[1, :m]
        counted = residuals[:, self.counted]
        gram, right = counted @ counted.T, counted @ residual[self.counted]
        if self.total is not None:
            products = torch.cat([gram, right.unsqueeze(1)], 1)
            self.total(products)
            gram, right = products[:, :-1].clone(), products[:, -1]
        weights = _solve(gram, right, self.regularization)
        return image if weights is None else image - weights @ images

    def _norm(self, vector: Any) -> float:
        vector = vector[self.counted]
        if isinstance(vector, np.ndarray):
            return float(np.linalg.norm(vector))
        size = torch.linalg.vector_norm(vector)
        if self.total is None:
            return float(size)
        square = size.double().square()
        self.total(square)
        return math.sqrt(float(square))


def _solve(gram: Any, right: Any, regularization: float) -> Any:
    """gram^-1 right, regularised; None where that fails."""
    if isinstance(gram, np.ndarray):
        size = max(regularization, 10 * np.finfo(gram.dtype).eps) * np.trace(gram) + np.finfo(gram.dtype).tiny
        try:
            return np.linalg.solve(gram + size * np.eye(len(gram)), right)
        except np.linalg.LinAlgError:
            return None
    finfo = torch.finfo(gram.dtype)
    gram.diagonal().add_(max(regularization, 10 * finfo.eps) * gram.trace() + finfo.tiny)
    weights, info = torch.linalg.solve_ex(gram, right)
    return weights if int(info) == 0 else None
