"""Anderson acceleration of a fixed-point iteration, with a safeguard."""

from __future__ import annotations

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
    """

    def __init__(self, memory: int = 10, interval: int = 5, regularization: float = 1e-10) -> None:
        self.memory = memory
        self.interval = interval
        self.regularization = regularization
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
        size = _norm(residual)
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
        weights = _solve(residuals @ residuals.T, residuals @ residual, self.regularization)
        return image if weights is None else image - weights @ images


def _norm(vector: Any) -> float:
    return float(np.linalg.norm(vector) if isinstance(vector, np.ndarray) else torch.linalg.vector_norm(vector))


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
