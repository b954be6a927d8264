"""A neuron that lowers the objective of a network when it is added, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from cvxnn.audit.task import Point, Task
from cvxnn.bounds import worst_neuron
from cvxnn.cone_witness import best_step
from cvxnn.neurons import neuron_ascent
from cvxnn.problem import Problem

__all__ = ["Witness", "find_witness"]

#: Slopes and decreases below this, relative to beta and to the objective, are rounding.
_ROUNDING = 1e-10


@dataclass(frozen=True, eq=False)
class Witness:
    """A unit neuron (u, v), and what adding it does.

    Attributes
    ----------
    u : torch.Tensor of shape (d,)
        Weights of the features; for a head of attention its matrix W1, (d, d).
    bias : float or None
        Hidden bias, where the network has one; ||(u, bias)|| = 1.
    v : torch.Tensor of shape (c,)
        For a head its matrix W2, (d, c).
    ratio : float
        ||G^T u|| / beta, G the gradient of the loss in the cell of u; above 1 the neuron lowers the objective.
    n_active : int
        Samples that it is active on; rows of the predictions for attention.
    step : float
        The neuron is added as (sqrt(step) u, sqrt(step) v); the best step along it.
    decrease : float
        The objective without it minus the objective with it, both evaluated.
    gate : int
        For a gated network, the gate that it uses.
    """

    u: torch.Tensor
    bias: float | None
    v: torch.Tensor
    ratio: float
    n_active: int
    step: float
    decrease: float
    gate: int = 0

    @property
    def neuron(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The neuron as it is added: (d + 1,) with a hidden bias, and (c,)."""
        root = math.sqrt(self.step)
        u = self.u if self.bias is None else torch.cat([self.u, self.u.new_tensor([self.bias])])
        return root * u, root * self.v

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "u": self.u.tolist(),
            "bias": self.bias,
            "v": self.v.tolist(),
            "ratio": self.ratio,
            "n_active": self.n_active,
            "step": self.step,
            "decrease": self.decrease,
        }


def find_witness(task: Task, problem: Problem | None, point: Point) -> Witness | None:
    """The neuron along which the objective falls fastest; None where none is found that lowers it.

    Parameters
    ----------
    problem : Problem or None
        Problem whose gates are looked at; None: all ReLU neurons, by local ascent from many starts.
    """
    outputs = task.outputs(point)
    nu = task.gradient(outputs)
    if not bool(nu.any()):
        return None
    gate, u = _steepest(task, problem, point, nu)
    return _added(task, point, outputs, nu, gate, u)


def _steepest(task: Task, problem: Problem | None, point: Point, nu: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Gate and unit u with the largest ||G_k^T u||."""
    if problem is None:
        init = point.columns.u if len(point) else None
        return 0, neuron_ascent(task.X, nu, init=init)[0]
    if problem.cones is not None:
        return 0, worst_neuron(problem, nu).u[0]
    op = problem.operator.double()
    best, gate, u = -1.0, 0, task.X.new_zeros(op.block_shape[1])
    for gates in op.gate_batches():
        left, values, _ = torch.linalg.svd(op.adjoint_blocks(nu, gates), full_matrices=False)
        k = int(values[:, 0].argmax())
        if float(values[k, 0]) > best:
            best, gate, u = float(values[k, 0]), gates.start + k, left[k, :, 0]
    return gate, u


def _added(
    task: Task, point: Point, outputs: torch.Tensor, nu: torch.Tensor, gate: int, u: torch.Tensor
) -> Witness | None:
    size = float(torch.linalg.vector_norm(u))
    if size == 0:
        return None
    u = u / size
    blank = nu.new_zeros(task.base.operator.block_shape[2])
    hidden = task.hidden(point.with_neuron(gate, u, blank).columns[torch.tensor([len(point)])])
    slope = task.base.operator.merge_right(hidden.T @ nu)[0]
    steepness = float(torch.linalg.vector_norm(slope))
    if not steepness > task.beta * (1 + _ROUNDING):
        return None
    v = -slope / steepness
    step = best_step(task.base, outputs, hidden @ task.split_right(v.unsqueeze(0)))
    root = math.sqrt(step)
    before, after = task.value(point).objective, task.value(point.with_neuron(gate, root * u, root * v)).objective
    if not before - after > _ROUNDING * abs(before):
        return None
    left, right, bias = task.weights_of(u, v)
    return Witness(
        u=left,
        bias=bias,
        v=right,
        ratio=steepness / task.beta,
        n_active=int((hidden != 0).any(1).sum()),
        step=step,
        decrease=before - after,
        gate=gate,
    )
