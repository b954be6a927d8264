"""Better networks and better dual points: the convex problems solved, and where cells are too many, grown."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from cvxnn.audit.bounding import Scope, all_neurons
from cvxnn.audit.cells import live_point, neuron_bits, place
from cvxnn.audit.descent import descend
from cvxnn.audit.task import Point, Task
from cvxnn.cone_witness import best_step
from cvxnn.networks import AttentionNetwork, TwoLayerNetwork
from cvxnn.neurons import distinct_neurons
from cvxnn.patterns import deduplicate_gates
from cvxnn.problem import Problem
from cvxnn.solvers import solve

__all__ = ["Findings", "explore"]

#: Part of the time left that the widest of several scopes may take.
_SHARE = 0.6
#: Neurons added in a round, at most.
_NEW_NEURONS = 16
#: Iterations of L-BFGS between two looks for new neurons.
_TRAINING_STEPS = 300
#: Training goes on as long as a round lowers the objective by this, relative; kinks stop it then.
_WORTHWHILE = 1e-3
#: Convex problems in a row that may fail to lower the objective.
_PATIENCE = 2
#: Random starts of the ascent between two trainings.
_FEW_STARTS = 64
#: Dual points kept, the last ones.
_MOST_DUALS = 3


@dataclass
class Findings:
    """The best network found so far, and dual points that prove bounds."""

    task: Task
    best: Point
    value: float
    duals: list[torch.Tensor] = field(default_factory=list)

    def offer(self, point: Point) -> bool:
        """Take a network if it is better; whether it was."""
        point = self.task.with_best_bias(live_point(self.task, point))
        value = self.task.value(point).objective
        if not value < self.value:
            return False
        self.best, self.value = point, value
        return True

    def remember(self, dual: torch.Tensor | None) -> None:
        """Keep a dual point."""
        if dual is not None:
            self.duals = [*self.duals, dual.double()][-_MOST_DUALS:]


def explore(findings: Findings, scopes: list[Scope], *, tol: float, time_limit: float) -> None:
    """Look for better networks and dual points in each scope, from the widest to the narrowest.

    Parameters
    ----------
    findings : Findings
        Changed in place.
    scopes : list of Scope
        From the narrowest to the widest.
    tol : float
        Relative gap at which a scope is done.
    time_limit : float
        Seconds for all of them.
    """
    deadline = time.perf_counter() + time_limit
    start = findings.best
    for scope in reversed(scopes):
        left = deadline - time.perf_counter()
        if left <= 0:
            return
        limit = left if scope is scopes[0] else _SHARE * left
        if scope.problem is None:
            _grow(findings, tol, time.perf_counter() + limit)
        else:
            # Narrower scopes are searched from the network itself: what was found may not be in them.
            _solve(findings, scope.problem, findings.best if scope is scopes[-1] else start, tol, limit)


def _solve(findings: Findings, problem: Problem, start: Point, tol: float, time_limit: float) -> None:
    """Solve one problem; its point and its dual point count."""
    task = findings.task
    init = place(task, problem, start.columns).factors(problem.n_gates) if len(start) else None
    result = solve(problem, tol=tol, time_limit=max(time_limit, 1e-3), init=init, random_state=0)
    findings.remember(result.dual)
    network = result.network(dtype=torch.float64)
    assert isinstance(network, (TwoLayerNetwork, AttentionNetwork))
    findings.offer(task.point_of(network))


def _grow(findings: Findings, tol: float, deadline: float) -> None:
    """From any network towards the best of all ReLU networks, the patterns not enumerated.

    In turns: neurons that ascent finds above the level are added and all of them trained on, free to leave their
    cells; where that stalls, the convex problem of the cells that they are in gives the dual point, with which
    ascent, and at last branching over all neurons, ask for more.
    """
    task = findings.task
    level = task.beta * (1 + tol / 4)
    stalled, idle, gates = False, 0, task.X.new_zeros(task.X.shape[1], 0)
    while idle < _PATIENCE and time.perf_counter() < deadline:
        before = findings.value
        if not stalled:
            _train(findings, level, deadline)
            stalled = not findings.value < before * (1 - max(_WORTHWHILE, tol / 4))
            continue
        gates = torch.cat([gates, _unseen(task, gates, findings.best.columns.u)], dim=1)
        if gates.shape[1] == 0:
            return
        left = deadline - time.perf_counter()
        _solve(findings, task.problem(gates, "network_gates"), findings.best, tol / 4, left / 2)
        fresh = _asked_for(findings, findings.duals[-1], gates, level, deadline) if findings.duals else None
        if fresh is None:
            return
        gates = torch.cat([gates, fresh], dim=1)
        idle = 0 if findings.value < before * (1 - tol / 10) else idle + 1


def _train(findings: Findings, level: float, deadline: float) -> None:
    """Add the neurons that the gradient asks for, and train all."""
    task, point = findings.task, findings.best
    outputs = task.outputs(point)
    nu = task.gradient(outputs)
    init = point.columns.u if len(point) else None
    found = distinct_neurons(task.X, nu, _NEW_NEURONS, starts=_FEW_STARTS, init=init)
    chosen = found.value > level
    for u, v in zip(found.u[chosen], found.v[chosen], strict=True):
        hidden = (task.X @ u).clamp_min(0).unsqueeze(1)
        root = math.sqrt(best_step(task.base, outputs, -hidden * v) / int(chosen.sum()))
        point = point.with_neuron(0, root * u, -root * v)
    findings.offer(descend(task, point, max_iter=_TRAINING_STEPS, deadline=deadline))


def _asked_for(
    findings: Findings, nu: torch.Tensor, gates: torch.Tensor, level: float, deadline: float
) -> torch.Tensor | None:
    """New gates (d, r) of neurons with a slope above the level; None where there are none, or none is known."""
    task = findings.task
    init = findings.best.columns.u if len(findings.best) else None
    found = distinct_neurons(task.X, nu, _NEW_NEURONS, init=init)
    fresh = _unseen(task, gates, found.u[found.value > level])
    if fresh.shape[1] == 0:
        # Ascent finds none: now the bound decides, and its neuron.
        left = max(1e-3, deadline - time.perf_counter())
        bound = all_neurons(task, nu, time_limit=left, target=level, init=init)
        if bound.ratio_lower > level / task.beta:
            fresh = _unseen(task, gates, bound.u.unsqueeze(0))
    return fresh if fresh.shape[1] else None


def _unseen(task: Task, gates: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gates (d, r) of the neurons u (m, d) whose patterns none of the gates has."""
    if len(u) == 0:
        return gates[:, :0]
    n_known = gates.shape[1]
    bits = neuron_bits(task, torch.cat([gates.T, u]))
    kept = torch.from_numpy(deduplicate_gates(bits[task.informative]))
    fresh = u[kept[kept >= n_known] - n_known]
    return (fresh / torch.linalg.vector_norm(fresh, dim=1, keepdim=True)).T.contiguous()
