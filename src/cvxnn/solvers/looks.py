"""When ADMM looks for better points, and the best of those that it found."""

from __future__ import annotations

import math
from typing import Any

import torch

from cvxnn.certificates import relative_gap
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.ridge import Ridge
from cvxnn.solvers.spectral import SpectralPoints

__all__ = ["Looks"]

#: Steps between two looks while the gap is above this, and at most else; looks are after multiples of so many steps.
_FAR_APART = 10
_FAR = 1e-3
_MOST_APART = 20
_UNIT = 5
#: The threshold beta / rho is so many times the mean of the singular values in use.
_SHARE = 2.2
#: Steps after which the point is certified all the same: for the trace, callbacks and stalled runs.
_CERTIFY_EVERY = 50
#: What the next looks depend on: always, and after a first one.
_NUMBERS = ("next", "apart", "looked", "certified_at", "dear")
_FOUND = ("Z", "residual", "primal", "lower")


class Looks:
    """Every few steps the points of :class:`~cvxnn.solvers.spectral.SpectralPoints`; the best of them are the result.

    Attributes
    ----------
    dear : bool
        Whether the last look would have taken too long, and was not done.
    looked : int
        Step of the last look.
    check_every : int
        Steps between two questions for a gap.
    """

    check_every = _UNIT

    def __init__(self, problem: Problem, ridge: Ridge) -> None:
        self.problem = problem
        self.points = SpectralPoints(problem, ridge)
        self.dear, self.looked = False, 0
        self.next, self.apart, self.certified_at = _FAR_APART, _FAR_APART, 0
        self.primal, self.lower = math.inf, -math.inf
        self.Z: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None

    @staticmethod
    def serve(problem: Problem) -> bool:
        """Whether there are such points."""
        return SpectralPoints.serves(problem)

    @property
    def gap(self) -> float:
        """About the relative gap of the best points."""
        return relative_gap(self.primal, self.lower)

    def look(self, iteration: int, W: torch.Tensor, residual: torch.Tensor, tol: float) -> float | None:
        """Look once; returns the penalty that goes with the singular values in use, or None where it is dear."""
        self.looked = iteration
        found = self.points.look(W, residual, tol)
        self.dear = found is None
        if found is None:
            self.next, self.apart = iteration + _FAR_APART, _FAR_APART
            return None
        before = self.gap
        if found.primal < self.primal:
            self.primal, self.Z = found.primal, found.Z
        if found.lower > self.lower:
            self.lower, self.residual = found.lower, found.residual
        self.apart = self._until_next(before, tol)
        self.next = iteration + self.apart
        return self.problem.beta / (_SHARE * found.mean_size)

    def _until_next(self, before: float, tol: float) -> int:
        """Steps until the gap is below the tolerance if it goes on to fall as it did since the last look."""
        gap = self.gap
        if gap > _FAR or before == math.inf or not tol > 0:
            return _FAR_APART
        rate = math.log(before / gap) / self.apart if 0 < gap < before else 0.0
        steps = math.log(gap / tol) / rate if rate > 0 else _MOST_APART
        return _UNIT * max(1, math.ceil(min(steps, _MOST_APART) / _UNIT))

    def estimated_gap(self, iteration: int, tol: float) -> float | None:
        """That of the best points; None where the point at hand is to be certified."""
        plain = self.Z is None or self.dear
        apart = _FAR_APART if plain else _CERTIFY_EVERY
        due = (plain or self.gap > tol) and iteration - self.certified_at >= apart
        return None if due else self.gap

    def best(self, iteration: int) -> Iterate | None:
        """The best points, to be certified; None where the last look was dear, or there was none."""
        self.certified_at = iteration
        if self.Z is None or self.residual is None or self.dear:
            return None
        return Iterate(self.Z.to(self.problem.dtype), dual=-self.residual)

    def state(self) -> dict[str, Any]:
        """What the next looks depend on."""
        names = _NUMBERS if self.Z is None else _NUMBERS + _FOUND
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
