"""Gradient descent with momentum on the factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.factored import Slopes
from cvxnn.norms import VECTOR_NORMS
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.base import BurerMonteiro
from cvxnn.validation import check_integer, check_positive

__all__ = ["BmGd", "Descent", "DescentOptions"]

#: Relative residual of stationarity at which a point counts as stationary, per type.
_STATIONARY = {torch.float32: 1e-5, torch.float64: 1e-10}
#: A value so many times that of the start means that the step is too long.
_EXPLODED = 1e3


@dataclass(frozen=True)
class DescentOptions:
    """Options of the gradient methods.

    Attributes
    ----------
    step : float or None
        Length of the first steps; None estimates 1 / (largest curvature) and follows it.
    momentum : float
        Of the heavy ball, in [0, 1).
    decay : float
        The step is multiplied by it on a plateau, in (0, 1].
    patience : int
        A plateau is so many iterations without a relative improvement of 1e-4. The paper does not give it;
        of 10 (torch's default), 100 and 1000, the last gets closest to the optimum on its spirals.
    min_step : float
        The step does not decay below it.
    init_scale : float
        Size of the random start.
    """

    step: float | None = 1.0
    momentum: float = 0.9
    decay: float = 0.9
    patience: int = 1000
    min_step: float = 1e-7
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.step, "step", allow_none=True)
        check_positive(self.min_step, "min_step", allow_zero=True)
        check_positive(self.init_scale, "init_scale")
        check_integer(self.patience, "patience")
        if not 0 <= check_positive(self.momentum, "momentum", allow_zero=True) < 1:
            raise InvalidInputError(f"momentum is {self.momentum!r}; a number in [0, 1) is wanted")
        if not check_positive(self.decay, "decay") <= 1:
            raise InvalidInputError(f"decay is {self.decay!r}; a number in (0, 1] is wanted")


class Descent(BurerMonteiro):
    """x <- x - step (momentum times the last direction + gradient), and a prox for other norms than l2.

    A step that makes the objective explode is halved, and the run starts again from its first point.
    """

    Options = DescentOptions
    default_max_iter: ClassVar[int] = 20_000
    check_every: int = 10
    sharded: ClassVar[bool] = True
    shares_gates: ClassVar[bool] = True
    per_gate: ClassVar[tuple[str, ...]] = (
        *("gate", "u", "v", "velocity0", "velocity1", "probe0", "probe1", "first_u", "first_v"),
    )
    #: Iterations between two estimates of the curvature, with ``step=None``.
    estimate_every: ClassVar[int] = 100

    def start(self, point: Iterate | None) -> None:
        super().start(point)
        self.iteration = 0
        self.plateau = 0
        self.lowest = math.inf
        self.first_value = math.inf
        self.first_offset = 0.0
        self.shortened = 1.0
        self.decayed = 1.0
        self.first = (self.columns.clone(), self.intercept.clone())
        self.smooth = self.problem.norm.name == "nuclear"
        self.curvature = 0.0
        self.probe: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reset()

    def random_columns(self, scale: float = 1.0) -> Columns:
        return super().random_columns(scale * self.options.init_scale)

    def _reset(self) -> None:
        columns = self.columns
        self.velocity = (torch.zeros_like(columns.u), torch.zeros_like(columns.v), torch.zeros_like(self.intercept))

    def step(self) -> None:
        slopes = self.loss.slopes(self.columns, self.intercept)
        value = slopes.value + self.penalty(self.columns)
        if not self._accept(value):
            return
        self._watch(slopes)
        if not self.finished:
            self.move(slopes, self.step_length())
            self._decay(value)
            self.iteration += 1

    def _accept(self, value: float) -> bool:
        """False, and a new start with half the step, if the objective exploded."""
        if self.first_value == math.inf and math.isfinite(value):
            self.first_value = value
        if math.isfinite(value) and value <= _EXPLODED * self.first_value:
            return True
        self.shortened /= 2
        self.columns, self.intercept = self.first[0].clone(), self.first[1].clone()
        self.curvature = 0.0
        self._reset()
        return False

    def _watch(self, slopes: Slopes) -> None:
        """Called with the slopes of each point, before it moves."""
        if self.iteration % 10 == 0 and self.smooth:
            residual = self.residual(self.columns, slopes)
            self.finished = residual <= _STATIONARY[self.loss.Y.dtype] and not self._offset(slopes)

    def _offset(self, slopes: Slopes) -> bool:
        """Whether the intercept is not yet stationary, relative to the slope at the start."""
        size = float(slopes.intercept.abs().max())
        self.first_offset = max(self.first_offset, size)
        return size > _STATIONARY[self.loss.Y.dtype] * self.first_offset

    def step_length(self) -> float:
        """Length of the next step."""
        length = self.options.step
        if length is None:
            if self.iteration % self.estimate_every == 0 or self.curvature == 0:
                self.curvature = self._curvature()
            length = 1 / self.curvature
        return max(length * self.decayed, min(length, self.options.min_step)) * self.shortened

    def _curvature(self) -> float:
        """Largest curvature of the objective at the point, by ten steps of a power iteration."""
        if self.probe is None:
            u, v = self.columns.u, self.columns.v
            self.probe = (self.draw(*u.shape).to(u), self.draw(*v.shape).to(v))
        beta, (du, dv) = self.problem.beta, self.probe
        largest = beta
        for _ in range(10):
            size = self.euclidean(du, dv)
            du, dv = du / size, dv / size
            product = self.loss.hessian_product(self.columns, self.intercept, du, dv)
            du, dv = product.left + beta * du, product.right + beta * dv
            largest = max(largest, self.euclidean(du, dv))
        self.probe = (du, dv)
        return 1.1 * largest

    def move(self, slopes: Slopes, length: float) -> None:
        """One step."""
        beta, mu, columns = self.problem.beta, self.options.momentum, self.columns
        if self.smooth:
            left, right = slopes.left.add_(columns.u, alpha=beta), slopes.right.add_(columns.v, alpha=beta)
        else:
            left, right = slopes.left, slopes.right
        for speed, slope in zip(self.velocity, (left, right, slopes.intercept), strict=True):
            speed.mul_(mu).add_(slope)
        columns.u.add_(self.velocity[0], alpha=-length)
        columns.v.add_(self.velocity[1], alpha=-length)
        if self.problem.output_bias:
            self.intercept.add_(self.velocity[2], alpha=-length)
        if not self.smooth:
            columns.u = VECTOR_NORMS[self.norms[0]].prox_square(columns.u, length * beta)
            columns.v = VECTOR_NORMS[self.norms[1]].prox_square(columns.v, length * beta)

    def _decay(self, value: float) -> None:
        """Shorten the step on a plateau, as torch's ReduceLROnPlateau does."""
        if value < self.lowest * (1 - 1e-4):
            self.lowest, self.plateau = value, 0
            return
        self.plateau += 1
        if self.plateau > self.options.patience:
            self.decayed, self.plateau = self.decayed * self.options.decay, 0

    _NUMBERS: ClassVar[tuple[str, ...]] = (
        "iteration",
        "plateau",
        "lowest",
        "first_value",
        "first_offset",
        "shortened",
        "decayed",
        "curvature",
    )

    def state(self) -> dict[str, Any]:
        state = super().state()
        state |= {name: _finite(getattr(self, name)) for name in self._NUMBERS}
        for i, speed in enumerate(self.velocity):
            state[f"velocity{i}"] = speed.clone()
        for i, part in enumerate(self.probe or ()):
            state[f"probe{i}"] = part.clone()
        state["first_u"], state["first_v"], state["first_b"] = self.first[0].u, self.first[0].v, self.first[1]
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        for name in self._NUMBERS:
            setattr(self, name, math.inf if state[name] is None else state[name])
        self.velocity = tuple(state[f"velocity{i}"] for i in range(3))
        self.probe = (state["probe0"], state["probe1"]) if "probe0" in state else None
        self.first = (Columns(self.columns.gate, state["first_u"], state["first_v"]), state["first_b"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class BmGd(Descent):
    """Gradient descent with momentum 0.9 and step 1.0, times 0.9 on plateaus: the choices of the paper (C.1)."""

    name = "bm_gd"
