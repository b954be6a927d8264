"""Which cells of the arrangement of the data the neurons of a ReLU network are in."""

from __future__ import annotations

import numpy as np
import torch

from cvxnn.audit.task import Point, Task
from cvxnn.columns import Columns
from cvxnn.patterns import activation_patterns, deduplicate_gates
from cvxnn.patterns.activation import pack_columns
from cvxnn.problem import Problem

__all__ = ["distinct_gates", "live_point", "neuron_bits", "place"]

#: Products |x . u| up to this, relative to both norms, count as zero when a neuron is on the border of cells.
_BORDER = 1e-12
#: Part of the objective up to which the penalty of a neuron is rounding.
_FADED = 1e-12


def neuron_bits(task: Task, u: torch.Tensor) -> np.ndarray:
    """Patterns (n, m) of neurons u (m, d), whatever their size."""
    largest = u.abs().amax(1, keepdim=True)
    scaled = u / torch.where(largest > 0, largest, 1.0)
    return activation_patterns(task.X.numpy(), scaled.T.contiguous().numpy())


def live_point(task: Task, point: Point) -> Point:
    """The network balanced and without neurons that do nothing on the data: dead ones, and those with u = 0 or v = 0.

    Both only lower the objective. Neurons that decayed to rounding go too, where that does not raise it.
    """
    columns = point.columns.balanced().without_zeros()
    if len(columns):
        columns = columns[task.live(columns)]
    live = Point(columns, point.bias)
    value = task.value(live).objective
    faded = task.beta * columns.sizes() <= _FADED * value
    if bool(faded.any()):
        other = Point(columns[~faded], point.bias)
        if task.value(other).objective <= value:
            return other
    return live


def distinct_gates(task: Task, u: torch.Tensor) -> torch.Tensor:
    """One gate (d, P) for each pattern of the neurons u (m, d) with an active sample, in their order."""
    bits = neuron_bits(task, u)
    kept = deduplicate_gates(bits[task.informative])
    size = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return (u / torch.where(size > 0, size, 1.0))[torch.from_numpy(kept)].T.contiguous()


def place(task: Task, problem: Problem, columns: Columns) -> Columns:
    """The neurons with their gates in a problem: those with their patterns, or else the nearest ones.

    Samples on the border of a neuron, x . u = 0, count for either side.
    """
    if task.activation != "relu" or len(columns) == 0:
        return columns
    rows = task.informative
    # Neurons whose pattern is that of a gate.
    known = {key: k for k, key in reversed(list(enumerate(pack_columns(problem.patterns.numpy()[rows]))))}
    keys = pack_columns(neuron_bits(task, columns.u)[rows])
    gate = torch.tensor([known.get(key, -1) for key in keys], dtype=torch.long)
    missing = (gate < 0).nonzero()[:, 0]
    if len(missing):
        gate[missing] = _nearest(task, problem.patterns, columns.u[missing])
    return Columns(gate, columns.u, columns.v)


def _nearest(task: Task, patterns: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The gate with the fewest samples on the wrong side, for each neuron."""
    values = task.X @ u.T
    scale = torch.linalg.vector_norm(task.X, dim=1).unsqueeze(1) * torch.linalg.vector_norm(u, dim=1)
    certain = torch.where(values.abs() > _BORDER * scale, values.sign(), 0.0)
    best = torch.full((len(u),), -torch.inf, dtype=torch.float64)
    gate = torch.zeros(len(u), dtype=torch.long)
    for start in range(0, patterns.shape[1], 4096):
        agreement = (2.0 * patterns[:, start : start + 4096].double() - 1).T @ certain
        value, index = agreement.max(dim=0)
        better = value > best
        best, gate = torch.where(better, value, best), torch.where(better, start + index, gate)
    return gate
