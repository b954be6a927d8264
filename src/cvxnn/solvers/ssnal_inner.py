"""The inner program of a round of ``ssnal``: a smooth convex function of n multipliers, and Newton's method on it.

Everything here is in NumPy and on the CPU, as working sets are small: a call of torch would cost more than its
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lstsq
from scipy.linalg.lapack import dposv

from cvxnn.operators import Operator
from cvxnn.problem import Problem
from cvxnn.solvers.array_loss import ArrayLoss
from cvxnn.solvers.face_lists import ArrayProjections, Long

__all__ = ["Centre", "InnerPoint", "InnerProgram"]

Array = NDArray[np.float64]

_ARMIJO = 1e-4
_SHORTEST_STEP = 1e-10
#: What a line search leaves of a step that is too long.
_SHARE = 0.4
#: Rounding errors of the value of a trial, relative to it.
_TRIAL_ERROR = 1e-12
#: Patterns of the working set are kept as numbers up to this size.
_KEPT_ENTRIES = 1 << 24


@dataclass
class Centre:
    """Where a round starts: x (2, B, d), T (n,), intercept b, and the penalty parameters of their movements."""

    x: Array
    T: Array
    b: float
    sigma: float
    tau: float
    rho: float


@dataclass
class Groups:
    """The vectors x of every (gate, sign), at first those of sign +1: shrunken projections onto the cones.

    `chosen` are the groups that are not zero, `unit` their directions, `shares` what the shrinkage left of the
    projections, `faces` the projectors on the spans of their faces, `hidden` (s, n) the activations D_k X unit,
    `lengths` the norms of x.
    """

    chosen: NDArray[np.int64]
    masks: Array
    x: Array
    unit: Array
    shares: Array
    lengths: Array
    faces: Array
    hidden: Array


@dataclass
class Trial:
    """The inner function at a multiplier, up to rounding, and what was needed for it; `rest` is all but the groups."""

    dual: Array
    T: Array
    loss: float
    total: float
    rest: float
    value: float
    long: Long


@dataclass
class InnerPoint:
    """The inner function at a multiplier: value, gradient, and the point that belongs to it, with the loss at T."""

    dual: Array
    value: float
    gradient: Array
    T: Array
    loss: float
    penalty: float
    groups: Groups
    outputs: Array
    intercept: float


class InnerProgram:
    """min over lambda of lambda^T T - F(T) - ||T - T_old||^2 / (2 tau) + sum ||x_kj||^2 / (2 sigma) + ...

    with T, x and the intercept the best ones for lambda. It is what the augmented Lagrangian leaves after these are
    eliminated; its gradient is T - A(x) - b.

    Parameters
    ----------
    problem : Problem
    part : Operator
        The operator of the gates of the working set, in float64.
    gates : torch.Tensor of shape (B,), long
        Which these are.
    """

    def __init__(self, problem: Problem, part: Operator, gates: torch.Tensor) -> None:
        assert problem.cones is not None
        self.problem, self.part, self.n_gates = problem, part, len(gates)
        self.X: Array = part.data_tensors()[0].cpu().numpy()
        self.loss = ArrayLoss(problem)
        self.projections = ArrayProjections(problem.cones, gates)
        few = part.patterns.numel() <= _KEPT_ENTRIES
        self.bits = np.ascontiguousarray(part.patterns.cpu().numpy().T, dtype=np.float64) if few else None

    def minimise(
        self, centre: Centre, dual: Array, tolerance: float, most_steps: int, late: Callable[[], bool]
    ) -> tuple[InnerPoint, int]:
        """Semismooth Newton from a multiplier; the point found, and the number of steps."""
        with np.errstate(all="ignore"):
            point = self._at(centre, dual)
            for steps in range(most_steps):
                size = math.sqrt(float(point.dual @ point.dual) * float(point.gradient @ point.gradient))
                if size <= tolerance * (point.loss + self.problem.beta * point.penalty) or late():
                    return point, steps
                found = self._search(centre, point, self._newton_direction(centre, point))
                if found is None:
                    return point, steps
                point = found
        return point, most_steps

    def _search(self, centre: Centre, point: InnerPoint, direction: Array) -> InnerPoint | None:
        """The longest of the steps 1, 0.4, 0.16, ... that decreases the inner function enough."""
        step, slope = 1.0, float(direction @ point.gradient)
        while step > _SHORTEST_STEP:
            enough = point.value + _ARMIJO * step * slope + 1e-15 * abs(point.value)
            trial = self._try(centre, point.dual + step * direction)
            if trial.value <= enough + _TRIAL_ERROR * abs(point.value):
                found = self._complete(centre, trial)
                if found.value <= enough:
                    return found
            step *= _SHARE
        return None

    def _at(self, centre: Centre, dual: Array) -> InnerPoint:
        return self._complete(centre, self._try(centre, dual))

    def _try(self, centre: Centre, dual: Array) -> Trial:
        """The value alone: the groups are measured, not formed."""
        sigma, tau, rho = centre.sigma, centre.tau, centre.rho
        T = self.loss.prox(centre.T + tau * dual, 1 / tau)
        loss, change = self.loss.value(T), T - centre.T
        total = float(dual.sum()) if self.problem.output_bias else 0.0
        rest = float(dual @ T) - loss - float(change @ change) / (2 * tau) - centre.b * total + rho / 2 * total**2
        # z = x -+ sigma X^T D_k dual, whose prox is x where it is not zero.
        G = sigma * self._adjoint(dual)
        threshold = sigma * self.problem.beta
        long = self.projections.measure(np.stack([centre.x[0] - G, centre.x[1] + G]), threshold)
        excess = long.lengths - threshold
        return Trial(dual, T, loss, total, rest, rest + float(excess @ excess) / (2 * sigma), long)

    def _complete(self, centre: Centre, trial: Trial) -> InnerPoint:
        groups = self._groups(trial.long, centre.sigma * self.problem.beta)
        lengths = groups.lengths
        value = trial.rest + float(lengths @ lengths) / (2 * centre.sigma)
        intercept = centre.b - centre.rho * trial.total
        outputs = np.where(groups.chosen < self.n_gates, lengths, -lengths) @ groups.hidden
        gradient = trial.T - outputs - intercept
        penalty = float(lengths.sum())
        return InnerPoint(trial.dual, value, gradient, trial.T, trial.loss, penalty, groups, outputs, intercept)

    def _groups(self, long: Long, threshold: float) -> Groups:
        chosen, point, faces = long.find()
        sizes = np.sqrt(np.einsum("sd,sd->s", point, point))
        lengths = np.maximum(sizes - threshold, 0.0)
        unit = point / sizes[:, None]
        masks = self._masks(chosen % self.n_gates)
        hidden = unit @ self.X.T
        hidden *= masks
        return Groups(chosen, masks, lengths[:, None] * unit, unit, lengths / sizes, lengths, faces, hidden)

    def _adjoint(self, dual: Array) -> Array:
        """X^T D_k dual for the gates of the working set, (B, d)."""
        if self.bits is not None:
            return self.bits @ (self.X * dual[:, None])
        on_device = torch.from_numpy(dual).to(self.part.device)[:, None]
        return self.part.adjoint(on_device)[:, :, 0].cpu().numpy()

    def _masks(self, place: NDArray[np.int64]) -> Array:
        """The diagonals of D_k of some gates, (s, n)."""
        if self.bits is not None:
            return self.bits[place]
        return self.part.patterns[:, torch.from_numpy(place)].T.cpu().numpy().astype(np.float64)

    def _newton_direction(self, centre: Centre, point: InnerPoint) -> Array:
        """Solve (diag + B B^T) d = -gradient on its smaller side, scaled to a unit diagonal."""
        root = np.sqrt((1 + centre.tau * self.loss.curvature(point.T)) / centre.tau)
        rows = [math.sqrt(centre.sigma) * part for part in self._directions(point.groups)]
        if self.problem.output_bias:
            rows.append(np.full((1, len(root)), math.sqrt(centre.rho)))
        B = np.concatenate(rows)
        B *= root
        right = -root * point.gradient
        if len(B) >= len(right):
            return root * _solve(B.T @ B, right)
        return root * (right - _solve(B @ B.T, B @ right) @ B)

    def _directions(self, groups: Groups) -> list[Array]:
        """Columns, as rows, of D_k X M^(1/2), with M the derivative of the prox: the face, shortened across x.

        One for each group on a ray, d for the others.
        """
        more = np.einsum("sdd->s", groups.faces) > 1.5
        wide = more.nonzero()[0]
        if len(wide) == 0:
            return [groups.hidden]
        unit, root = groups.unit[wide], np.sqrt(groups.shares[wide])[:, None, None]
        roots = root * groups.faces[wide] + (1 - root) * unit[:, :, None] * unit[:, None]
        spans = (roots @ self.X.T) * groups.masks[wide][:, None]
        return [groups.hidden[~more], spans.reshape(-1, spans.shape[2])]


def _solve(matrix: Array, right: Array) -> Array:
    """Solve with the identity added to a positive semidefinite matrix."""
    if len(matrix) == 0:
        return right
    matrix.flat[:: len(matrix) + 1] += 1.0
    _, solution, failed = dposv(matrix.T, right)
    if not failed:
        return solution
    if not np.isfinite(matrix).all():
        raise torch.linalg.LinAlgError("the Newton matrix is not finite")
    found: Any = lstsq(matrix, right, lapack_driver="gelsy", check_finite=False)
    return found[0]
