"""Anderson acceleration of a fixed-point iteration, with a safeguard."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Anderson"]


class Anderson:
    """Type-II Anderson acceleration of v -> F(v) (Walker, Ni 2011), restarted where it does not help.

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
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps: torch.Tensor | None = None
        self._fallback: tuple[torch.Tensor, float] | None = None
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

    def next(self, v: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The point to go on from, given a flat point v and its image F(v)."""
        residual = image - v
        size = float(torch.linalg.vector_norm(residual))
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

    def _store(self, image_step: torch.Tensor, residual_step: torch.Tensor) -> None:
        if self._steps is None:
            self._steps = image_step.new_zeros(2, self.memory, len(image_step))
        slot = self._used % self.memory
        self._steps[0, slot], self._steps[1, slot] = image_step, residual_step
        self._used += 1

    def _extrapolate(self, image: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        assert self._steps is not None
        m = min(self._used, self.memory)
        images, residuals = self._steps[0, :m], self._steps[1, :m]
        gram = residuals @ residuals.T
        regularization = max(self.regularization, 10 * torch.finfo(gram.dtype).eps)
        gram.diagonal().add_(regularization * gram.trace() + torch.finfo(gram.dtype).tiny)
        weights, info = torch.linalg.solve_ex(gram, residuals @ residual)
        return image - weights @ images if int(info) == 0 else image
