"""L-BFGS over vectors of which every process has a part: inner products go around, vectors stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cvxnn.operators import Operator
from cvxnn.solvers.lbfgs import Minimum
from cvxnn.solvers.line_search import LineSearch

__all__ = ["minimise_shared"]

#: Evaluations of one line search at most, as in L-BFGS-B.
_EVALUATIONS = 20


def minimise_shared(
    objective: Callable[..., tuple[Any, Sequence[torch.Tensor]]],
    start: list[torch.Tensor],
    limit: int,
    *,
    operator: Operator,
    n_common: int,
    gtol: float,
    history: int = 20,
) -> Minimum:
    """Minimise a smooth function of float64 tensors by the steps of L-BFGS-B without bounds.

    The search direction is a combination of the kept differences and the gradient, whose weights follow from inner
    products alone (Chen, Wang, Zhou 2014): an iteration adds up one small matrix and a number per evaluation.

    Parameters
    ----------
    objective : callable
        Gets one tensor per entry of `start`; returns the value, which is the same in all processes, and the gradients.
    start : list of torch.Tensor
        What this process has.
    limit : int
        Limit of iterations.
    operator : Operator
        Whose gates are shared out.
    n_common : int
        The last so many tensors are the same in all processes; the others belong to the gates of this one.
    gtol : float
        End where no entry of the gradient is larger.
    history : int
        Number of pairs that approximate the Hessian.
    """
    sizes = [part.numel() for part in start]
    n_own = sum(sizes[: len(sizes) - n_common])
    counted = slice(None) if operator.counts_common else slice(n_own)
    memory = _Memory(history, counted, operator)

    def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        parts = [part.view_as(like) for part, like in zip(x.split(sizes), start, strict=True)]
        value, slopes = objective(*parts)
        return float(value), torch.cat([part.flatten() for part in slopes])

    x = torch.cat([part.flatten() for part in start])
    value, gradient = evaluate(x)
    evaluations, iterations = 1, 0
    while iterations < limit and evaluations <= 20 * limit:
        if not operator.largest_over_gates(float(gradient.abs().max())) > gtol:
            break
        direction = memory.direction(gradient)
        slope, square = memory.products(direction, [gradient, direction])
        first = 1 / math.sqrt(square) if iterations == 0 and square > 0 else 1.0
        before = x, value, gradient
        search = LineSearch(value, slope, first) if slope < 0 and math.isfinite(slope) else None
        tried = 0
        while search is not None and not search.done and tried < _EVALUATIONS:
            length = search.step
            x = before[0] + length * direction
            value, gradient = evaluate(x)
            tried += 1
            new_slope = memory.products(direction, [gradient])[0]
            search.tell(value, new_slope)
            if not (math.isfinite(value) and math.isfinite(search.step)):
                break
        evaluations += tried
        if search is None or not search.done:
            x, value, gradient = before
            if memory.count == 0:
                break
            memory.forget()
            continue
        iterations += 1
        if not before[1] > value:
            break
        # As much as the slope has changed along the step.
        bend = (new_slope - slope) * length
        if bend > torch.finfo(x.dtype).eps * -slope * length:
            memory.add(x - before[0], gradient - before[2])
    parts = [part.view_as(like) for part, like in zip(x.split(sizes), start, strict=True)]
    return Minimum(parts, value, iterations, iterations >= limit)


class _Memory:
    """The last steps s and changes y of the gradient, and their inner products over all processes."""

    def __init__(self, history: int, counted: slice, operator: Operator) -> None:
        self.history, self._counted, self._operator = history, counted, operator
        self._pairs: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Start anew from the gradient."""
        #: Places in memory, the oldest first.
        self._order: list[int] = []
        self._products = torch.zeros(2, self.history, 2, self.history, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Pairs that are kept."""
        return len(self._order)

    def products(self, vector: torch.Tensor, others: list[torch.Tensor]) -> list[float]:
        """Inner products of a vector with some others."""
        part = vector[self._counted]
        return self._operator.over_gates(*(float(part @ other[self._counted]) for other in others))

    def add(self, step: torch.Tensor, change: torch.Tensor) -> None:
        """Keep a pair, in place of the oldest where there are too many."""
        if self._pairs is None:
            self._pairs = step.new_zeros(2, self.history, len(step))
        place = self._order.pop(0) if self.count == self.history else self.count
        self._order.append(place)
        self._pairs[0, place], self._pairs[1, place] = step, change
        new = self._with_all(self._pairs[:, place])
        for kind in (0, 1):
            self._products[kind, place] = new[kind]
            self._products[:, :, kind, place] = new[kind]

    def _with_all(self, vectors: torch.Tensor) -> torch.Tensor:
        """Inner products (r, 2, history) of vectors (r, N) with all that is kept."""
        assert self._pairs is not None
        kept = self._pairs[:, :, self._counted].flatten(0, 1)
        found = vectors[:, self._counted] @ kept.T
        self._operator.add_outputs(found)
        return found.view(len(vectors), 2, self.history).cpu()

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Minus the approximate inverse Hessian times the gradient: the two loops of L-BFGS on weights."""
        if self._pairs is None or not self._order:
            return -gradient
        steps, changes = self._with_all(gradient.unsqueeze(0))[0]
        inner = self._products
        weights = torch.zeros(2, self.history, dtype=torch.float64)
        newest = self._order[-1]
        scale = float(inner[0, newest, 1, newest] / inner[1, newest, 1, newest])
        alphas = {}
        for i in reversed(self._order):
            along = steps[i] + (weights[1] * inner[0, i, 1]).sum()
            alphas[i] = along / inner[0, i, 1, i]
            weights[1, i] -= alphas[i]
        weights[1] *= scale
        for i in self._order:
            along = scale * changes[i] + (weights * inner[1, i]).sum()
            weights[0, i] += alphas[i] - along / inner[0, i, 1, i]
        combined = weights.flatten().to(gradient) @ self._pairs.flatten(0, 1)
        return -(combined + scale * gradient)
