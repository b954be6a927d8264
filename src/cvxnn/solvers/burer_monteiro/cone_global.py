"""``bm_global`` on ReLU problems (19): local solves in the cones, and columns where pricing finds neurons."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.dual_norms import Neurons, bounds_are_cheap
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.cone_cg import ConeProducts
from cvxnn.solvers.burer_monteiro.cone_columns import (
    Cells,
    best_lengths,
    feasible_columns,
    fresh_columns,
    merged,
    spread,
)
from cvxnn.solvers.burer_monteiro.cone_model import ConeModel, model_numbers, model_operations
from cvxnn.solvers.burer_monteiro.cone_newton import (
    ConePoint,
    ConeProgress,
    cone_newton,
    evaluate_columns,
    natural_step,
)
from cvxnn.solvers.burer_monteiro.cone_pricing import violated_neurons

__all__ = ["ConeGlobal", "ConeOptions"]

#: Columns smaller than this, relative to the largest, are removed.
_EMPTY = 1e-8
#: Newton's method with matrices where one step takes at most so many operations and so much memory (in numbers).
_NEWTON_OPERATIONS = 3e9
_NEWTON_NUMBERS = 5e7
#: Steps of a local method between two certificates.
_STEPS = 5
#: Parts of rounds between two certificates that are dear.
_PARTS = 20
#: Without new columns, rounds get longer, up to so many times.
_MOST_PATIENCE = 16
#: Neurons that are looked at for every one that is added, and the cosine from which two count as one.
_LOOKED_AT = 5
_SAME = 0.99
#: Columns that are added to all gates together, in units of the option `new_columns`.
_AT_ONCE = 10
#: Relative move in the neighbouring cell from which columns cross over.
_CROSSING = 1e-7
_ROUNDING = 1e-13


class ConeOptions(Protocol):
    """What is used of the options of ``bm_global``."""

    new_columns: int
    local: str
    newton_iter: int
    newton_cg_iter: int


class ConeGlobal:
    """The state of ``bm_global`` on a problem with cones.

    A round is a local solve between two pricings. Pricing bounds the dual norm of every gate; where a witness
    neuron has a value above beta, columns along the best of different directions are added. Columns that a facet
    holds cross to the neighbouring cell where they can go on there, parallel ones are joined and empty ones
    removed. Every point it stands at is feasible.

    Parameters
    ----------
    problem : Problem
    loss : FactoredLoss
        In float64.
    options : ConeOptions
    tol : float
    deadline : float or None
        Value of ``time.perf_counter`` after which to return early.
    """

    def __init__(
        self, problem: Problem, loss: FactoredLoss, options: ConeOptions, tol: float, deadline: float | None
    ) -> None:
        assert problem.cones is not None
        self.problem, self.loss, self.options = problem, loss, options
        self.cones = problem.cones
        self.tol, self.deadline = tol, deadline
        self.cells: Cells | None = None
        self.cheap_bounds = bounds_are_cheap(loss.op, problem.cones)
        self.damping = 1e-3
        self.patience = 1
        self.share = 0.1
        self.violation = 1.0
        self.descents = 0
        self.added = 0
        self.value = math.inf
        self.stalled = False
        self.finished = False
        self.point: ConePoint

    def start(self, columns: Columns, intercept: torch.Tensor) -> None:
        """Begin at given columns, made feasible."""
        if len(columns):
            columns = feasible_columns(self.cones, columns, self._cells())
            columns = merged(self.cones, columns, 0.0)
        if self.problem.output_bias:
            intercept = self.problem.best_intercept(self.loss.op.apply_columns(columns), start=None)
        self.point = evaluate_columns(self.loss, columns, intercept)
        self.stalled = len(columns) == 0

    def random_columns(self, rank: int, rng: np.random.RandomState) -> Columns:
        """`rank` columns for every gate: deep points of its cone, disturbed, with Gaussian v."""
        n_gates, p, q = self.loss.op.block_shape
        gate = torch.arange(n_gates, device=self.loss.Y.device).repeat_interleave(rank)
        deep, margin = self.cones.interior(gate)
        noise = torch.from_numpy(rng.standard_normal((len(gate), p))).to(deep)
        v = torch.from_numpy(rng.standard_normal((len(gate), q))).to(deep)
        size = margin.clamp(1e-3, 1.0)[:, None] / math.sqrt(p)
        u = self.cones.project(gate, deep + size * noise).point
        entry = 1 / math.sqrt(q * rank * n_gates * p)
        return Columns(gate, u * math.sqrt(entry), v * math.sqrt(entry))

    def step(self) -> None:
        """A part of a round; several rounds where a certificate is dear, until it is worth its time."""
        for _ in range(1 if self.cheap_bounds else _PARTS):
            self._part()
            late = self.deadline is not None and time.perf_counter() >= self.deadline
            if self.finished or late or (self.descents == 0 and self.violation <= 10 * self.tol):
                break

    def _part(self) -> None:
        """Pricing at the beginning of a round, then the local method."""
        if self.descents == 0:
            self.value = self.point.value
            self.added = self._add_columns()
        if len(self.point.columns) == 0:
            self.finished = True
            return
        progress = self._descend(fresh=self.added > 0 and self.descents == 0)
        self._clean()
        if self.descents == 0:
            self._end_round(moved=not progress.stuck)

    def _end_round(self, moved: bool) -> None:
        after = self.point.value
        self.patience = 1 if self.added else min(2 * self.patience, _MOST_PATIENCE)
        self.share = min(0.1, 2 * self.share) if after < self.value else self.share / 4
        no_progress = not self.value - after > _ROUNDING * abs(after)
        self.finished = no_progress and self.stalled and self.patience == _MOST_PATIENCE
        self.stalled = no_progress or not moved

    def _add_columns(self) -> int:
        """Price all gates and add columns along violated neurons; returns how many."""
        point, problem = self.point, self.problem
        outputs = self.loss.op.apply_columns(point.columns) + point.b
        nu = problem.dual_candidate(outputs)
        level = problem.beta * (1 + 0.1 * self.tol)
        most = _AT_ONCE * self.options.new_columns
        found = violated_neurons(
            self.loss.op, problem.norm, self.cones, nu, level, _LOOKED_AT * most, self.cheap_bounds
        )
        self.violation = float(found.lower.max()) / problem.beta - 1 if len(found) else 0.0
        found = self._new_directions(found)
        if len(found) == 0:
            return 0
        # First what is violated most: the others often follow.
        found = found[found.lower > problem.beta * (1 + 0.1 * self.violation)]
        found = found[spread(found, most, _SAME)]
        self.point = fresh_columns(self.loss, point, found)
        return int(self.point is not point)

    def _new_directions(self, found: Neurons) -> Neurons:
        """Without the neurons of cells that have a column of the same direction: it has not converged there."""
        columns = self.point.columns
        if len(columns) == 0 or len(found) == 0:
            return found
        columns = columns[columns.sizes() > self.share / 2 * float(columns.sizes().median())]
        u = columns.u / columns.u.norm(dim=1, keepdim=True)
        v = columns.v / columns.v.norm(dim=1, keepdim=True)
        near = (found.u @ u.T) * (-found.v @ v.T) > 1 - 1e-3 * min(1.0, self.violation)
        near &= found.gate[:, None] == columns.gate
        return found[~near.any(1)]

    def _descend(self, fresh: bool) -> ConeProgress:
        columns = self.point.columns
        cheap = model_operations(columns, self.loss) <= _NEWTON_OPERATIONS
        dense = cheap and model_numbers(columns, self.loss) <= _NEWTON_NUMBERS
        if self.options.local != "auto":
            dense = self.options.local == "newton"
        total = self.patience * (self.options.newton_iter if dense else self.options.newton_cg_iter)
        progress = cone_newton(
            ConeModel if dense else ConeProducts,
            self.loss,
            self.cones,
            self.point,
            limit=min(_STEPS, total - self.descents),
            damping=max(self.damping, 1e-4) if fresh else self.damping,
            tolerance=self._accuracy(),
            at_least=2 if fresh else 0,
            deadline=self.deadline,
        )
        self.point, self.damping = progress.point, progress.damping
        self.descents += progress.n_iter
        if progress.stuck or progress.converged or self.descents >= total:
            self.descents = 0
        return progress

    def _accuracy(self) -> float:
        """Residual at which a local method may end: what is violated by more than it is seen first."""
        return min(1e-2, max(0.03 * self.violation, 1e-2 * self.tol)) if self.patience == 1 else 1e-13

    def _clean(self) -> None:
        """Columns cross, join and go."""
        self.point = best_lengths(self.loss, self.point)
        natural, _ = natural_step(self.loss, self.cones, self.point)
        self.point = self._cells().crossed(self.loss, self.point, natural.point, _CROSSING)
        columns = merged(self.cones, self.point.columns, _EMPTY)
        if len(columns) == len(self.point.columns):
            return
        joined = evaluate_columns(self.loss, columns, self.point.b)
        if joined.value <= self.point.value * (1 + _ROUNDING):
            self.point = joined

    def _cells(self) -> Cells:
        if self.cells is None:
            self.cells = Cells(self.cones)
        return self.cells

    def iterate(self) -> Iterate:
        """The point as factors."""
        factors = self.point.columns.balanced().factors(self.loss.op.n_gates)
        return Iterate(None, intercept=self.point.b if self.problem.output_bias else None, factors=factors)

    _NUMBERS = ("damping", "patience", "share", "violation", "descents", "added", "stalled")

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` goes on from."""
        columns = self.point.columns
        numbers = {name: getattr(self, name) for name in self._NUMBERS}
        numbers["value"] = self.value if math.isfinite(self.value) else None
        return {"gate": columns.gate, "u": columns.u, "v": columns.v, "intercept": self.point.b} | numbers

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        columns = Columns(state["gate"], state["u"], state["v"])
        self.point = evaluate_columns(self.loss, columns, state["intercept"])
        self.value = math.inf if state["value"] is None else state["value"]
        for name in self._NUMBERS:
            setattr(self, name, state[name])
