"""Ways out of a trained network that need no more neurons than it has: spare neurons, and what they could do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvxnn.audit.cells import live_point, neuron_bits
from cvxnn.audit.task import Point, Task
from cvxnn.audit.witness import find_witness
from cvxnn.bounds import worst_neuron
from cvxnn.columns import Columns

__all__ = ["Escape", "find_escape", "merged"]

#: Neurons are one where both sides have directions with at least this cosine (an angle of 1.4e-3).
_PARALLEL = 1 - 1e-6
_ROUNDING = 1e-10
#: Neurons of at most this part of the largest size have decayed to rounding.
_FADED = 1e-14


@dataclass(frozen=True)
class Escape:
    """What the spare neurons of a network could do: dead ones, and all but one of those with the same directions.

    Attributes
    ----------
    n_distinct : int
        Neurons that are neither dead nor the same as another.
    curvature_ratio : float or None
        At a stationary point there is a direction along which the objective changes by t^2 beta (1 - curvature_ratio)
        times half the squared length; above 1 the point is a strict saddle. Dead neurons at zero can grow in any
        direction (u, v): the largest ||G^T u|| / beta. Two neurons with the same directions can part within their
        cell k: ||G_k||_2 / beta. None where no neuron is spare.
    same_width_decrease : float or None
        How much lower, relative to the objective after balancing, a network of the same width is in which the same
        neurons are merged and a spare one is put where it does best. None where there is none.
    """

    n_distinct: int
    curvature_ratio: float | None
    same_width_decrease: float | None


def find_escape(task: Task, point: Point) -> Escape:
    """The ways out of a ReLU network whose patterns can be enumerated."""
    width = len(point)
    live = live_point(task, point)
    few = merged(live)
    if len(few) >= width:
        return Escape(len(few), None, None)
    nu = task.gradient(task.outputs(live))
    ratios = [0.0]
    if len(_present(live)) < width:
        ratios.append(float(worst_neuron(task.enumerated, nu).lower))
    twins = _twins(live)
    if len(twins):
        bits = torch.from_numpy(neuron_bits(task, twins)).to(task.X)
        blocks = task.X.T @ (bits.T.unsqueeze(2) * nu)
        ratios.append(float(torch.linalg.matrix_norm(blocks, 2).max()))
    return Escape(len(few), max(ratios) / task.beta, _decrease(task, live, few))


def merged(point: Point) -> Point:
    """The network with all neurons of the same directions in one: its outputs differ by rounding, or by 1e-6."""
    columns = _present(point)
    sizes, sides, alike = _compared(columns)
    left = torch.ones(len(columns), dtype=torch.bool)
    first, second = [columns.u[:0]], [columns.v[:0]]
    while bool(left.any()):
        group = alike[int(left.nonzero()[0])] & left
        left &= ~group
        # Directions with their shares, so that nothing underflows.
        whole = sizes[group].sum()
        u, v = ((sizes[group].unsqueeze(1) / whole * part[group]).sum(0, keepdim=True) for part in sides)
        long = torch.linalg.vector_norm(v)
        first.append((whole * long).sqrt() * _unit(u))
        second.append((whole * long).sqrt() * _unit(v))
    u, v = torch.cat(first), torch.cat(second)
    return Point(Columns(torch.zeros(len(u), dtype=torch.long), u, v), point.bias)


def _present(point: Point) -> Columns:
    """Balanced neurons, without those that have decayed to rounding."""
    return point.columns.balanced().without_zeros(_FADED)


def _compared(columns: Columns) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Sizes ||u_j|| ||v_j||, unit directions of both sides, and which pairs of neurons have the same."""
    sides = [_unit(part) for part in (columns.u, columns.v)]
    alike = (sides[0] @ sides[0].T >= _PARALLEL) & (sides[1] @ sides[1].T >= _PARALLEL)
    return columns.sizes(), sides, alike | torch.eye(len(columns), dtype=torch.bool)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1; squares neither under- nor overflow."""
    scaled = rows / rows.abs().amax(1, keepdim=True)
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)


def _twins(point: Point) -> torch.Tensor:
    """Weights (r, d) of the neurons that are the same as others."""
    columns = _present(point)
    return columns.u[_compared(columns)[2].sum(1) > 1]


def _decrease(task: Task, live: Point, few: Point) -> float | None:
    witness = find_witness(task, task.enumerated, few)
    if witness is None:
        return None
    before = task.value(live).objective
    decrease = (before - task.value(few.with_neuron(0, *witness.neuron)).objective) / before
    return decrease if decrease > _ROUNDING else None
