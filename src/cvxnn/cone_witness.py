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
    fits : bool
        Whether there is room for it: a column of zeros, or two columns of a gate that can be merged so that the
        objective falls all the same. Then the point is not optimal with the columns that it has; otherwise it is
        not optimal among wider networks, and may be so with its own columns.
    """

    gate: int
    u: Tensor
    v: Tensor
    ratio: float
    step: float
    decrease: float
    fits: bool

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
    problem: Problem,
    point: Evaluation,
    nu: Tensor,
    prices: ConePrices,
    free: Tensor,
    only_free: bool = False,
) -> DescentNeuron | None:
    """The steepest neuron that lowers the objective; None where none is found.

    Parameters
    ----------
    free : Tensor of shape (P,), bool
        Gates with a column of zeros that can become the neuron.
    only_free : bool
        Only neurons of these gates are wanted.
    """
    values = prices.neurons.lower
    if only_free:
        values = torch.where(free[prices.neurons.gate], values, 0.0)
    best = int(values.argmax())
    ratio = float(values[best]) / problem.beta
    if not ratio > 1:
        return None
    gate, u, v = prices.neurons.gate[best], prices.neurons.u[best], -prices.neurons.v[best]
    column = Columns(gate.unsqueeze(0), u.unsqueeze(0), v.unsqueeze(0))
    direction = problem.operator.double().network_outputs(column)
    step = best_step(problem, point.predictions, direction)
    predictions = point.predictions + step * direction
    decrease = point.loss - _loss(problem, predictions) - problem.beta * step
    if not decrease > 0:
        return None
    fits = bool(free[gate]) or _merging_costs(problem, point, predictions, int(gate)) < decrease
    return DescentNeuron(int(gate), u.clone(), v, ratio, step, decrease, fits)


def _loss(problem: Problem, predictions: Tensor) -> float:
    return float(problem.loss.value(predictions, problem.Y64, problem.weights))


def _merging_costs(problem: Problem, point: Evaluation, predictions: Tensor, gate: int) -> float:
    """What it costs to merge two columns of a gate: those whose v are closest in direction.

    (u_1, v) and (u_2, t v) are (u_1 + t u_2, v), in the cone too, at no larger penalty. A network may merge any two
    neurons of one cell to have room for another in any cell; (19) those of the gate of the new one.
    """
    assert point.factors is not None
    U, V = (part.double() for part in point.factors)
    if problem.scope == "relu_network":
        gates = ((U != 0).any(1) & (V != 0).any(1)).sum(1).ge(2).nonzero()[:, 0].tolist()
    else:
        gates = [gate]
    best = math.inf
    for k in gates:
        used = ((U[k] != 0).any(0) & (V[k] != 0).any(0)).nonzero()[:, 0]
        if len(used) < 2:
            continue
        u, v = U[k, :, used].T, V[k, :, used].T
        sizes = torch.linalg.vector_norm(v, dim=1)
        cosines = (v / sizes[:, None]) @ (v / sizes[:, None]).T
        cosines.fill_diagonal_(-2.0)
        i, j = divmod(int(cosines.argmax()), len(used))
        pair = torch.tensor([i, j], device=u.device)
        unit = v[pair].sum(0) / torch.linalg.vector_norm(v[pair].sum(0)).clamp_min(1e-300)
        joined = (sizes[pair, None] * u[pair]).sum(0)
        place = torch.full((3,), k, device=u.device)
        columns = Columns(place, torch.cat([u[pair], joined[None]]), torch.cat([-v[pair], unit[None]]))
        after = _loss(problem, predictions + problem.operator.double().network_outputs(columns))
        sides = u[pair].square().sum() + v[pair].square().sum()
        penalty = problem.beta * float(torch.linalg.vector_norm(joined) - sides / 2)
        best = min(best, after - _loss(problem, predictions) + penalty)
    return best


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
