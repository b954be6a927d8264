"""What is found out about one trained network: certificates, what is left at its width, and where improve() ends."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from cvxnn.audit import certify_network, read_network
from cvxnn.audit.descent import descend
from cvxnn.audit.task import Point, Task, first_point, make_task
from cvxnn.certificates import STATIONARITY_TOLERANCE, relative_gap
from cvxnn.experiments.networks_escape import Escape, find_escape
from cvxnn.losses import get_loss

__all__ = ["OPTIMAL", "VERDICTS", "Audit", "Limits", "audit_network", "verdict_of"]

#: Relative excess up to which a network counts as optimal.
OPTIMAL = 1e-6
#: Negative curvature counts from here.
_CURVED = 1 + 1e-6
#: Iterations of L-BFGS after the training.
_CONTINUATION = 1000

#: Verdicts, by the word in the columns `verdict` and `continued_verdict`.
VERDICTS = {
    "optimal": "certified to a relative 1e-6",
    "saddle": "stationary and not optimal, with a direction of negative curvature",
    "plateau": "stationary and not optimal; neurons that are the same can be merged, and the one that is then free "
    "lowers the objective",
    "stuck": "stationary and not optimal; better networks are known for larger widths only",
    "not_stationary": "not stationary to 1e-6, and not certified",
}

Weights = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Limits:
    """Tolerances and seconds of an audit."""

    tol: float
    certify_seconds: float
    improve_seconds: float
    continue_seconds: float


@dataclass(frozen=True)
class Audit:
    """Rows of a network and its neighbours; docs/reproduce.md explains the columns."""

    objective: float
    balanced_objective: float
    loss: float
    stationarity: float
    n_dead: int
    n_patterns: int
    n_distinct: int
    own_gap: float
    lower_network_gates: float
    gap_network_gates: float
    lower_relu_network: float
    gap_relu_network: float
    best_objective: float
    excess_least: float
    excess_most: float
    proven_suboptimal: bool
    within_1_percent: bool
    ratio_network_gates: float
    ratio_relu_network: float
    witness_ratio: float | None
    witness_decrease: float | None
    curvature_ratio: float | None
    same_width_decrease: float | None
    verdict: str
    continued_objective: float
    continued_stationarity: float
    continued_curvature_ratio: float | None
    continued_same_width_decrease: float | None
    continued_verdict: str
    improved_objective: float
    improved_gap: float
    improved_neurons: int
    certify_seconds: float
    improve_seconds: float


def audit_network(
    weights: Weights, X: torch.Tensor, Y: torch.Tensor, beta: float, optimum: float, limits: Limits
) -> tuple[Audit, Weights]:
    """Certificates of a network, its continuation at the same width, and its improvement.

    Parameters
    ----------
    weights : pair of tensors (m, d) and (c, m)
    optimum : float
        Lower bound of the optimum over all ReLU networks, for the verdicts.

    Returns
    -------
    Audit, and the weights of the improved network
    """
    begin = time.perf_counter()
    report = certify_network(weights, X, Y, beta=beta, time_limit=limits.certify_seconds, tol=limits.tol)
    middle = time.perf_counter()
    better = report.improve(time_limit=limits.improve_seconds, tol=limits.tol)
    end = time.perf_counter()
    own = certify_network(weights, X, Y, beta=beta, time_limit=0)
    task, point = _read(weights, X, Y, beta)
    escape = find_escape(task, point)
    improved = [part.detach() for part in better.network().parameters()]
    narrow, wide = report.certificates["network_gates"], report.certificates["relu_network"]
    witness = report.witness
    audit = Audit(
        objective=report.objective,
        balanced_objective=report.balanced_objective,
        loss=report.loss_value,
        stationarity=report.stationarity,
        n_dead=report.n_dead,
        n_patterns=report.n_patterns,
        n_distinct=escape.n_distinct,
        own_gap=own.certificates["relu_network"].relative_gap,
        lower_network_gates=narrow.lower_bound,
        gap_network_gates=narrow.relative_gap,
        lower_relu_network=wide.lower_bound,
        gap_relu_network=wide.relative_gap,
        best_objective=report.best_objective,
        excess_least=report.excess[0],
        excess_most=report.excess[1],
        proven_suboptimal=report.proven_suboptimal,
        within_1_percent=report.excess[1] <= 0.01,
        ratio_network_gates=narrow.dual_norm_ratio_lower,
        ratio_relu_network=wide.dual_norm_ratio_lower,
        witness_ratio=None if witness is None else witness.ratio,
        witness_decrease=None if witness is None else witness.decrease,
        curvature_ratio=escape.curvature_ratio,
        same_width_decrease=escape.same_width_decrease,
        verdict=verdict_of(relative_gap(report.balanced_objective, optimum), report.stationarity, escape),
        **_continued(task, point, optimum, limits.continue_seconds),
        improved_objective=better.objective,
        improved_gap=better.certificate.relative_gap,
        improved_neurons=better.n_neurons,
        certify_seconds=middle - begin,
        improve_seconds=end - middle,
    )
    return audit, (improved[0], improved[1])


def verdict_of(excess: float, stationarity: float, escape: Escape) -> str:
    """One of ``VERDICTS``.

    Parameters
    ----------
    excess : float
        Upper bound of (objective - optimum) / optimum.
    stationarity : float
        Relative residual.
    escape : Escape
    """
    if excess <= OPTIMAL:
        return "optimal"
    if not stationarity <= STATIONARITY_TOLERANCE:
        return "not_stationary"
    if escape.curvature_ratio is not None and escape.curvature_ratio > _CURVED:
        return "saddle"
    return "stuck" if escape.same_width_decrease is None else "plateau"


def _read(weights: Weights, X: torch.Tensor, Y: torch.Tensor, beta: float) -> tuple[Task, Point]:
    """A network as `certify_network` reads it."""
    network, data, _ = read_network(weights, X, Y.shape[1], "relu", None)
    loss = get_loss("squared")
    task = make_task(network, data, Y, beta=beta, loss=loss, reduction="mean", penalize_biases=False)
    return task, first_point(task, network)


def _continued(task: Task, point: Point, optimum: float, seconds: float) -> dict[str, Any]:
    """Where L-BFGS on the same objective, at the same width, goes from here."""
    deadline = time.perf_counter() + seconds
    found = descend(task, point, max_iter=_CONTINUATION, deadline=deadline)
    weights = (found.columns.u, found.columns.v.T.contiguous())
    report = certify_network(weights, task.X, task.Y, beta=task.beta, time_limit=0)
    excess = relative_gap(report.balanced_objective, optimum)
    escape = find_escape(task, found)
    return {
        "continued_objective": report.balanced_objective,
        "continued_stationarity": report.stationarity,
        "continued_curvature_ratio": escape.curvature_ratio,
        "continued_same_width_decrease": escape.same_width_decrease,
        "continued_verdict": verdict_of(excess, report.stationarity, escape),
    }
