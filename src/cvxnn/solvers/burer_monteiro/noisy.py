"""Gradient descent with noise, which leaves saddle points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.factored import Slopes
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.gradient import Descent, DescentOptions
from cvxnn.validation import check_integer, check_positive

__all__ = ["BmNoisyGd"]

#: Decrease of the objective below which a perturbation counts as without effect, relative.
_NO_EFFECT = 1e-9


@dataclass(frozen=True)
class NoisyOptions(DescentOptions):
    """Options of ``bm_noisy_gd``: those of the gradient methods, with other defaults, and the noise.

    Attributes
    ----------
    noise : float
        Length of a perturbation, relative to the length of all factors together.
    every : int
        Iterations between two perturbations.
    threshold : float
        Perturb only where the relative residual of stationarity is at most this; infinity perturbs always
        (Ge et al. 2015).
    attempts : int
        End, at a point that is stationary of second order as far as noise can tell, after so many
        perturbations in a row without effect.
    """

    step: float | None = None
    decay: float = 1.0
    noise: float = 1e-3
    every: int = 200
    threshold: float = 1e-4
    attempts: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.noise, "noise", allow_zero=True)
        check_integer(self.every, "every")
        check_integer(self.attempts, "attempts")
        if self.threshold != math.inf:
            check_positive(self.threshold, "threshold")


class BmNoisyGd(Descent):
    """Perturbed gradient descent (Ge, Huang, Jin, Yuan 2015; Jin et al. 2017)."""

    name = "bm_noisy_gd"
    Options = NoisyOptions
    default_max_iter: ClassVar[int] = 50_000

    def start(self, point: Iterate | None) -> None:
        super().start(point)
        self.since = 0
        self.attempts = 0
        self.value_before = math.inf
        self.quiet = False

    def _watch(self, slopes: Slopes) -> None:
        self.since += 1
        if self.since < self.options.every:
            return
        if self.smooth and self.residual(self.columns, slopes) > self.options.threshold:
            return
        value = slopes.value + self.penalty(self.columns)
        if self.value_before < math.inf and value >= self.value_before * (1 - _NO_EFFECT):
            self.attempts += 1
        else:
            self.attempts = 0
        self.value_before = value
        if self.attempts >= self.options.attempts:
            # No way down: the last steps go without noise, to the end of the accuracy.
            self.quiet = True
        if self.quiet:
            super()._watch(slopes)
        else:
            self._perturb()

    def _perturb(self) -> None:
        """Add a vector that is uniform on a sphere."""
        columns = self.columns
        length = self.euclidean(columns.u, columns.v)
        length = length if length > 0 else 1.0
        noise = [self.draw(*part.shape) for part in (columns.u, columns.v)]
        size = self.euclidean(*noise)
        for part, change in zip((columns.u, columns.v), noise, strict=True):
            part.add_(change.to(part), alpha=self.options.noise * length / size)
        self.since = 0

    _NUMBERS: ClassVar[tuple[str, ...]] = (*Descent._NUMBERS, "since", "attempts", "value_before", "quiet")

    def state(self) -> dict[str, Any]:
        _, keys, position, has_gauss, cached = self.rng.get_state()
        return super().state() | {
            "rng_keys": torch.from_numpy(keys.astype("int64")),
            "rng": [int(position), int(has_gauss), float(cached)],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        position, has_gauss, cached = state["rng"]
        keys = state["rng_keys"].cpu().numpy().astype("uint32")
        self.rng.set_state(("MT19937", keys, position, has_gauss, cached))
