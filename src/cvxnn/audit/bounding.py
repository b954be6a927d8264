"""Certificates of one network relative to several scopes, each bound taken from the best dual point at hand."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from cvxnn.audit.cells import distinct_gates, place
from cvxnn.audit.task import Point, Task
from cvxnn.bounds import dual_bound_from
from cvxnn.certificates import Certificate, certify, relative_gap
from cvxnn.errors import InvalidInputError
from cvxnn.neurons import NeuronBound, neuron_ascent, neuron_dual_norm
from cvxnn.patterns import activation_patterns, count_cells_bound, deduplicate_gates, sample_gates
from cvxnn.problem import Problem
from cvxnn.validation import as_matrix, check_integer

__all__ = ["AllNeurons", "Scope", "all_neurons", "choose_scopes", "raised", "scope_certificate", "with_extra_gates"]

#: Patterns are enumerated without being asked for up to this number.
MOST_CELLS = 20_000


@dataclass(frozen=True)
class Scope:
    """A set of networks that a certificate is relative to.

    Attributes
    ----------
    name : str
    problem : Problem or None
        None for all ReLU neurons where their patterns are not enumerated.
    """

    name: str
    problem: Problem | None


@dataclass(frozen=True)
class AllNeurons:
    """Lower bound of the optimum over all ReLU networks from one dual point, and its neuron of largest slope."""

    lower_bound: float
    ratio: float
    ratio_lower: float
    u: torch.Tensor


def choose_scopes(task: Task, point: Point, gates: Any, random_state: Any) -> list[Scope]:
    """The scopes to certify in, from the narrowest to the widest.

    Parameters
    ----------
    gates : None, "enumerate", int or array (d, P)
        For a ReLU network, patterns beyond its own: given, or a number of draws. Those of a gated network are in
        its task (:func:`with_extra_gates`).
    """
    if task.activation == "linear":
        return [Scope("linear_network", task.base)]
    if task.gates is not None:
        own = task.gates[:, : task.n_own_gates]
        scopes = [Scope(task.gates_scope, task.problem(task.gates, task.gates_scope))]
        if own.shape[1] < task.gates.shape[1] and bool((point.columns.gate < own.shape[1]).all()):
            scopes.insert(0, Scope("network_gates", task.problem(own, "network_gates")))
        return scopes
    own = _network_gates(task, point)
    scopes = [Scope("network_gates", task.problem(own, "network_gates"))]
    if gates is not None and not isinstance(gates, str):
        extra, name = _extra_gates(task, gates, random_state)
        scopes.append(Scope(name, task.problem(_joined(task, own, extra), name)))
    return [*scopes, Scope("relu_network", _enumerated(task, gates))]


def with_extra_gates(task: Task, gates: Any, random_state: Any) -> Task:
    """A task whose gates are checked; for a gated network with the given or drawn ones beside its own."""
    if gates is None:
        return task
    if task.activation == "linear":
        raise InvalidInputError("gates are given but the network is linear, which has none; leave gates=None")
    if isinstance(gates, str) and gates != "enumerate":
        raise InvalidInputError(f"gates is {gates!r}; 'enumerate', a number of draws or an array (d, P) is wanted")
    if task.gates is None:
        return task
    extra, name = _extra_gates(task, gates, random_state)
    return dataclasses.replace(task, gates=_joined(task, task.gates, extra), gates_scope=name)


def _network_gates(task: Task, point: Point) -> torch.Tensor:
    own = distinct_gates(task, point.columns.u) if len(point) else task.X.new_zeros(task.X.shape[1], 0)
    if own.shape[1]:
        return own
    # A network without live neurons: any pattern is more than it has.
    rows = task.X[torch.from_numpy(task.informative)]
    return (rows[0] if len(rows) else torch.ones_like(task.X[0])).unsqueeze(1)


def _extra_gates(task: Task, gates: Any, random_state: Any) -> tuple[torch.Tensor, str]:
    if isinstance(gates, str):
        found = task.enumerated.gates
        assert found is not None
        return found, task.enumerated.scope
    X = task.X.numpy()
    if isinstance(gates, int):
        check_integer(gates, "gates")
        drawn = sample_gates(X, gates, bias_column=task.hidden_bias, random_state=random_state)
        return torch.from_numpy(drawn), "sampled_gates"
    given = torch.from_numpy(as_matrix(gates, "gates"))
    if len(given) != X.shape[1]:
        last = " (the last for the hidden bias)" if task.hidden_bias else ""
        raise InvalidInputError(f"gates has {len(given)} rows; {X.shape[1]}{last}, one per feature, are wanted")
    return given, "given_gates"


def _joined(task: Task, own: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    """The network's gates, and those others whose patterns it does not have."""
    both = torch.cat([own, extra], dim=1)
    bits = activation_patterns(task.X.numpy(), both.numpy())[task.informative]
    kept = torch.from_numpy(deduplicate_gates(bits))
    return torch.cat([own, both[:, kept[kept >= own.shape[1]]]], dim=1)


def _enumerated(task: Task, gates: Any) -> Problem | None:
    """The problem of all patterns, where these are asked for or few, and proven to be all that count."""
    few = isinstance(gates, str) or count_cells_bound(task.X.numpy()) <= MOST_CELLS
    problem = task.enumerated if few else None
    return problem if problem is not None and problem.scope == "relu_network" else None


def all_neurons(
    task: Task, nu: torch.Tensor, *, time_limit: float, target: float | None = None, init: torch.Tensor | None = None
) -> AllNeurons:
    """Lower bound of all ReLU networks from a dual point, the patterns not enumerated.

    Parameters
    ----------
    nu : torch.Tensor of shape (n, c)
    target : float, optional
        Stop where the dual norm is known to be above or below this.
    """
    found: list[tuple[NeuronBound, float]] = []
    if task.output_bias:
        nu = task.base.loss.center_dual(nu, task.base.Y64, task.base.weights)

    def dual_norm(scaled: torch.Tensor, error: float) -> float:
        scale = float(scaled.abs().max() / nu.abs().max()) if bool(nu.any()) else 1.0
        aim = None if target is None else target * scale
        bound = neuron_dual_norm(task.X, scaled, error=error, target=aim, time_limit=time_limit, init=init)
        found.append((bound, scale * task.beta))
        return float(bound.upper)

    lower = dual_bound_from(task.base, nu, dual_norm)
    bound, unit = found[0]
    return AllNeurons(lower, float(bound.upper) / unit, max(0.0, float(bound.lower) / unit), bound.u)


def scope_certificate(
    task: Task, scope: Scope, point: Point, duals: list[torch.Tensor], narrow: Certificate | None, time_limit: float
) -> Certificate:
    """Certificate of a network relative to one scope.

    Parameters
    ----------
    duals : list of tensors (n, c)
        Dual candidates besides the network's own gradient.
    narrow : Certificate or None
        One of a narrower scope, for what does not depend on the scope.
    time_limit : float
        Seconds for bounds of all neurons.
    """
    if scope.problem is None:
        assert narrow is not None
        return _all_neurons_certificate(task, point, duals, narrow, time_limit)
    columns = place(task, scope.problem, point.columns)
    found = certify(
        scope.problem,
        factors=columns.factors(scope.problem.n_gates),
        intercept=point.bias if task.output_bias else None,
        dual=duals or None,
    )
    return _with_bias_penalty(task, point, found)


def raised(found: Certificate, lower: float) -> Certificate:
    """The certificate with a lower bound that is known from elsewhere."""
    if lower <= found.lower_bound:
        return found
    is_point = math.isfinite(found.relative_gap) or found.lower_bound == 0
    gap = relative_gap(found.primal, lower) if is_point else math.inf
    return dataclasses.replace(found, lower_bound=lower, relative_gap=gap)


def _with_bias_penalty(task: Task, point: Point, found: Certificate) -> Certificate:
    """With the penalty of the output bias in the objective: the bound, of the problem without it, stays one."""
    if not task.penalised_bias or (found.lower_bound > 0 and found.relative_gap == math.inf):
        return found
    extra = task.bias_penalty(point)
    primal = found.primal + task.beta * extra
    return dataclasses.replace(
        found,
        primal=primal,
        penalty=found.penalty + extra,
        relative_gap=relative_gap(primal, found.lower_bound),
        theorem_bound=None,
    )


def _promise(task: Task, nu: torch.Tensor, init: torch.Tensor | None) -> float:
    """The bound that a dual point would prove if ascent had found the largest slope: to compare, not to prove."""
    return dual_bound_from(task.base, nu, lambda scaled, _: neuron_ascent(task.X, scaled, starts=64, init=init)[2])


def _all_neurons_certificate(
    task: Task, point: Point, duals: list[torch.Tensor], narrow: Certificate, time_limit: float
) -> Certificate:
    own = task.base.dual_candidate(task.outputs(point))
    init = point.columns.u if len(point) else None
    # The network's own dual point tells of its neurons; the most promising of all gets the time that is left.
    natural = all_neurons(task, own, time_limit=time_limit / 2 if duals else time_limit, init=init)
    lower = natural.lower_bound
    promising = max(duals, key=lambda nu: _promise(task, nu, init), default=None)
    if promising is not None:
        lower = max(lower, all_neurons(task, promising, time_limit=time_limit, init=init).lower_bound)
    return dataclasses.replace(
        narrow,
        lower_bound=lower,
        relative_gap=relative_gap(narrow.primal, lower),
        dual_norm_ratio=natural.ratio,
        dual_norm_ratio_lower=natural.ratio_lower,
        theorem_bound=None,
        scope="relu_network",
        gate_ratios=(),
    )
