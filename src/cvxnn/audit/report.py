"""What is known about a trained network: objective, stationarity, certificates by scope, and a way to improve it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cvxnn.audit.bounding import Scope, choose_scopes, raised, scope_certificate
from cvxnn.audit.cells import live_point
from cvxnn.audit.search import Findings, explore
from cvxnn.audit.task import Point, Task
from cvxnn.audit.text import summary_text
from cvxnn.audit.witness import Witness, find_witness
from cvxnn.certificates import Certificate
from cvxnn.validation import check_positive

__all__ = ["NetworkReport", "audit"]

#: A better network proves suboptimality where its objective is lower by this much, relative.
PROVEN = 1e-10


@dataclass(frozen=True, eq=False)
class NetworkReport:
    """How good a trained two-layer network is, with proofs.

    Attributes
    ----------
    architecture : {"mlp", "attention"}
        For attention neurons are heads, samples sequences, and features those of a token.
    activation : {"relu", "linear", "gated_relu"}
    source : str
        What the network was read from.
    n_samples, n_features, n_outputs, n_neurons : int
    n_dead : int
        Neurons that are zero on all samples, or have zero weights on one side, or decayed to rounding: dropped.
    n_patterns : int
        Different activation patterns of the other neurons.
    loss, reduction, beta : str, str, float
    penalize_biases : bool
    objective : float
        F plus beta/2 times the sum of the squares of all penalised weights, as trained.
    loss_value : float
        F as trained.
    balanced_objective : float
        After dropping dead neurons and rescaling each other one so that its two sides have the same norm.
    best_bias_objective : float or None
        After that, with the output bias that is best for the neurons; None without one.
    stationarity : float
        Relative residual of the stationarity conditions of the balanced network in its own cells.
    certificates : dict of str to Certificate
        By scope, from the narrowest to the widest; ``primal`` is the objective after balancing, with the better of
        the two output biases.
    witness : Witness or None
        A neuron that lowers the objective when it is added.
    best_objective : float
        Objective of the best network that was found: the optimum is at most this.
    seconds : float
    """

    architecture: str
    activation: str
    source: str
    n_samples: int
    n_features: int
    n_outputs: int
    n_neurons: int
    n_dead: int
    n_patterns: int
    loss: str
    reduction: str
    beta: float
    penalize_biases: bool
    objective: float
    loss_value: float
    balanced_objective: float
    best_bias_objective: float | None
    stationarity: float
    certificates: dict[str, Certificate]
    witness: Witness | None
    best_objective: float
    seconds: float
    _task: Task = field(repr=False)
    _point: Point = field(repr=False)
    _findings: Findings = field(repr=False)
    _request: dict[str, Any] = field(repr=False)

    @property
    def certificate(self) -> Certificate:
        """That of the widest scope with a positive lower bound; that of the narrowest where there is none."""
        proven = [found for found in self.certificates.values() if found.lower_bound > 0]
        return proven[-1] if proven else next(iter(self.certificates.values()))

    @property
    def optimum_bracket(self) -> tuple[float, float]:
        """Lower bound of the optimum in the scope of :attr:`certificate`, and the best objective found."""
        return self.certificate.lower_bound, self.best_objective

    @property
    def excess(self) -> tuple[float, float]:
        """Bounds of what the objective is above the optimum, relative to the optimum.

        The lower one from the best network found, the upper one from the lower bound (infinite without one).
        """
        primal = self.certificate.primal
        above = max(0.0, primal - self.best_objective)
        least = above / self.best_objective if self.best_objective > 0 else (math.inf if above > 0 else 0.0)
        return least, max(least, self.certificate.relative_gap)

    @property
    def proven_suboptimal(self) -> bool:
        """Whether a better network was found, of the same kind and of any width."""
        primal = self.certificate.primal
        return primal - self.best_objective > PROVEN * abs(primal)

    def improve(self, *, time_limit: float = 60.0, tol: float = 1e-6) -> NetworkReport:
        """The report of a better network, or of the same one where none is found.

        Goes on from the best network found so far: neurons are added where the bound asks for them, and all of them
        trained on, in the widest scope of this report.

        Parameters
        ----------
        time_limit : float
            Seconds for the training; bounds and the new report come on top.
        tol : float
            Relative gap at which it ends.

        Returns
        -------
        NetworkReport
            Its objective is never above that of this one after balancing.
        """
        time_limit = check_positive(time_limit, "time_limit")
        tol = check_positive(tol, "tol")
        findings = Findings(self._task, self._findings.best, self._findings.value, list(self._findings.duals))
        wide = choose_scopes(self._task, findings.best, self._request["gates"], self._request["random_state"])[-1]
        explore(findings, [wide], tol=tol, time_limit=time_limit)
        return audit(
            self._task,
            findings.best,
            findings=findings,
            source=f"improved {self.source.removeprefix('improved ')}",
            request={**self._request, "time_limit": 0.0, "bound_time": max(time_limit / 2, 1.0)},
        )

    def network(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network of this report: balanced, without dead neurons, with the output bias of the certificate.

        Returns
        -------
        torch.nn.Module
            ``Sequential(Linear, ReLU, Linear)``, without the activation for a linear network, and a
            :class:`cvxnn.networks.TwoLayerNetwork` for a gated one; for attention a
            :class:`cvxnn.networks.AttentionNetwork`.
        """
        return self._task.module(self._point, dtype)

    def summary(self) -> str:
        """The report in words and an aligned table, at most 30 lines."""
        return summary_text(self)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; infinities become None."""
        names = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
        plain = {name: getattr(self, name) for name in names if name not in ("certificates", "witness")}
        lower, upper = self.optimum_bracket
        document = {
            **plain,
            "certificates": {name: found.to_dict() for name, found in self.certificates.items()},
            "certificate": self.certificate.to_dict(),
            "witness": None if self.witness is None else self.witness.to_dict(),
            "optimum_bracket": [lower, _finite(upper)],
            "excess": [_finite(bound) for bound in self.excess],
            "proven_suboptimal": self.proven_suboptimal,
        }
        return {key: _finite(value) for key, value in document.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def audit(
    task: Task,
    given: Point,
    *,
    source: str,
    request: dict[str, Any],
    findings: Findings | None = None,
) -> NetworkReport:
    """The report of one network.

    Parameters
    ----------
    request : dict
        gates, random_state, tol, time_limit (of the search) and bound_time (of bounds and witness).
    findings : Findings, optional
        Of an earlier search; without them there is a new one.
    """
    begin = time.perf_counter()
    trained = task.value(given)
    live = live_point(task, given)
    balanced = task.value(live)
    point = task.with_best_bias(live)
    value = task.value(point)
    scopes = choose_scopes(task, point, request["gates"], request["random_state"])
    if findings is None:
        findings = Findings(task, point, value.objective)
    if request["time_limit"] > 0:
        explore(findings, scopes, tol=request["tol"], time_limit=request["time_limit"])
    certificates = _certificates(task, scopes, point, findings, request["bound_time"])
    narrow = next(iter(certificates.values()))
    return NetworkReport(
        architecture=task.architecture,
        activation=task.activation,
        source=source,
        n_samples=len(task.X),
        n_features=task.n_features,
        n_outputs=task.n_outputs,
        n_neurons=len(given),
        n_dead=len(given) - len(live),
        n_patterns=_n_patterns(task, scopes, point),
        loss=task.base.loss.name,
        reduction=task.reduction,
        beta=task.beta,
        penalize_biases=request["penalize_biases"],
        objective=trained.objective,
        loss_value=trained.loss,
        balanced_objective=balanced.objective,
        best_bias_objective=value.objective if task.output_bias else None,
        stationarity=narrow.stationarity,
        certificates=certificates,
        witness=find_witness(task, scopes[-1].problem, point),
        best_objective=min(findings.value, value.objective),
        seconds=time.perf_counter() - begin,
        _task=task,
        _point=point,
        _findings=findings,
        _request=request,
    )


def _n_patterns(task: Task, scopes: list[Scope], point: Point) -> int:
    if task.activation == "linear":
        return min(1, len(point))
    if task.activation == "gated_relu":
        return len(point.columns.gate.unique())
    problem = scopes[0].problem
    return problem.n_gates if problem is not None and len(point) else 0


def _certificates(
    task: Task, scopes: list[Scope], point: Point, findings: Findings, time_limit: float
) -> dict[str, Certificate]:
    """By scope, from the narrowest to the widest; a bound of a wider scope is one of the narrower."""
    found: list[Certificate] = []
    for scope in scopes:
        found.append(scope_certificate(task, scope, point, findings.duals, found[0] if found else None, time_limit))
    lower = 0.0
    for i in reversed(range(len(found))):
        lower = max(lower, found[i].lower_bound)
        found[i] = raised(found[i], lower)
    return {scope.name: certificate for scope, certificate in zip(scopes, found, strict=True)}
