"""Neurons of ReLU problems that lower the objective when they are added to a point, and by how much."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvxnn.certificates import Evaluation
from cvxnn.columns import Columns
from cvxnn.cones import cone_dual_norms
from cvxnn.dual_norms import ConePrices, Neurons, blocks_of, bounds_are_cheap, price_cones
from cvxnn.problem import Problem

__all__ = ["DescentNeuron", "best_step", "descent_neuron", "gate_prices"]

#: Up to so many gates all have their exact norms, where those are cheap; of more, the worst ones.
MOST_GATES = 2_000
_SECONDS = 30.0
_DOUBLINGS = 200
_BISECTIONS = 100


@dataclass(frozen=True, eq=False)
class DescentNeuron:
    """A unit neuron in the cone of a gate, and what adding it as a further column does.

    Attributes
    ----------
    gate : int
    u : torch.Tensor of shape (d,)
        In the cone of the gate.
    v : torch.Tensor of shape (c,)
        -G_k^T u / ||G_k^T u||.
    ratio : float
        ||G_k^T u|| / beta, above 1.
    step : float
        The column (sqrt(step) u, sqrt(step) v) lowers the objective most of all its multiples.
    decrease : float
        By so much.
    """

    gate: int
    u: Tensor
    v: Tensor
    ratio: float
    step: float
    decrease: float

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"u": self.u.tolist(), "v": self.v.tolist()}


def gate_prices(problem: Problem, nu: Tensor, above: float) -> ConePrices:
    """Bounds of max ||G_k^T u|| over the unit vectors of each cone, with the neurons that were looked at.

    Parameters
    ----------
    above : float
        All gates whose norm may be larger are looked at closely (up to a limit, where there are very many, or in
        the time there is, where bounds are dear).
    """
    op, cones = problem.operator.double(), problem.cones
    assert cones is not None
    error = op.adjoint_rounding(nu)
    if problem.n_gates > MOST_GATES or not bounds_are_cheap(op, cones):
        return price_cones(op, problem.norm, cones, nu, error, above=above, most=MOST_GATES, seconds=_SECONDS)
    every = torch.arange(problem.n_gates, device=nu.device)
    seen = cone_dual_norms(cones, every, blocks_of(op, nu, every), error)
    return ConePrices(seen.lower, seen.upper, Neurons(every, seen.u, seen.v, seen.lower, seen.upper))


def descent_neuron(
    problem: Problem, point: Evaluation, nu: Tensor, prices: ConePrices, allowed: Tensor | None = None
) -> DescentNeuron | None:
    """The steepest neuron that lowers the objective; None where none is found.

    Parameters
    ----------
    allowed : Tensor of shape (P,), bool, optional
        Gates that it may be in.
    """
    values = prices.neurons.lower
    if allowed is not None:
        values = torch.where(allowed[prices.neurons.gate], values, 0.0)
    best = int(values.argmax())
    ratio = float(values[best]) / problem.beta
    if not ratio > 1:
        return None
    gate, u, v = prices.neurons.gate[best], prices.neurons.u[best], -prices.neurons.v[best]
    column = Columns(gate.unsqueeze(0), u.unsqueeze(0), v.unsqueeze(0))
    direction = problem.operator.double().network_outputs(column)
    step = best_step(problem, point.predictions, direction)
    after = problem.loss.value(point.predictions + step * direction, problem.Y64, problem.weights)
    decrease = point.loss - float(after) - problem.beta * step
    if not decrease > 0:
        return None
    return DescentNeuron(int(gate), u.clone(), v, ratio, step, decrease)


def best_step(problem: Problem, predictions: Tensor, direction: Tensor) -> float:
    """Minimiser over t >= 0 of the convex F(predictions + t direction) + beta t, by bisection of its slope."""
    loss, Y, w = problem.loss, problem.Y64, problem.weights

    def slope(t: float) -> float:
        return float((loss.gradient(predictions + t * direction, Y, w) * direction).sum()) + problem.beta

    curvature = float((loss.hessian_product(predictions, Y, w, direction) * direction).sum())
    start = -slope(0.0) / curvature if curvature > 0 else 1.0
    low, high = 0.0, start if math.isfinite(start) and start > 0 else 1.0
    for _ in range(_DOUBLINGS):
        if slope(high) >= 0:
            break
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
