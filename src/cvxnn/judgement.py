"""Everything that is concluded about a point of (14) or (19), from its residuals to the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cvxnn.certificates import Certificate, Evaluation
from cvxnn.columns import Columns
from cvxnn.cone_points import SLACK, ConeColumns, ConePoint, FaceFacts, examine_point
from cvxnn.cone_verdict import cone_verdict
from cvxnn.cone_witness import MOST_GATES, DescentNeuron, descent_neuron, gate_prices
from cvxnn.cones import FEASIBILITY
from cvxnn.curvature import Curvature, smallest_curvature
from cvxnn.dual_norms import ConePrices
from cvxnn.problem import Problem
from cvxnn.stationarity import (
    GateDiagnosis,
    Residuals,
    examine_gates,
    is_smooth,
    residuals,
    spectral_norms,
)
from cvxnn.theorems import PointFacts, Theorem, global_proof, not_minimum, theorems, verdict

__all__ = ["Judgement", "Options", "judge_cones", "judge_factors"]

_EPS = 2.0**-53
#: Of many gates so many of the worst ones are listed, beside those with columns.
_LISTED = 50


@dataclass(frozen=True)
class Options:
    """The parameters of :func:`cvxnn.diagnose` that conclusions depend on."""

    tol: float
    curvature_tol: float
    second_order: bool
    max_products: int
    padding: bool


@dataclass(frozen=True)
class Judgement:
    """What was found about a point; the fields are those of :class:`cvxnn.Diagnosis`."""

    status: str
    verdict: str
    advice: str
    found: Residuals
    facts: PointFacts
    gates: tuple[GateDiagnosis, ...]
    theorems: tuple[Theorem, ...]
    curvature: Curvature | None
    curvature_threshold: float
    faces: FaceFacts | None = None
    witness: DescentNeuron | None = None


def judge_factors(
    problem: Problem, point: Evaluation, certificate: Certificate, nu: Tensor, options: Options
) -> Judgement:
    """The judgement about a point of (14) without constraints."""
    assert point.factors is not None
    found = residuals(problem, point, certificate, nu)
    norms = spectral_norms(problem, nu) if is_smooth(problem) else None
    gates = examine_gates(problem, point, found, _ratios(problem, certificate, nu), norms)
    curvature, threshold = None, options.curvature_tol * problem.beta
    if options.second_order and norms is not None and math.isfinite(found.overall):
        curvature = smallest_curvature(
            problem,
            *point.factors,
            point.intercept,
            nu,
            norms,
            tolerance=10 * threshold,
            max_products=options.max_products,
        )
        threshold += 64 * _EPS * curvature.scale
    facts = _point_facts(problem, point, certificate, gates, found, options)
    facts = replace(facts, not_minimum=not_minimum(facts.stationary, curvature, threshold))
    entries = theorems(facts)
    status, sentence, advice = verdict(facts, entries, certificate, found.overall, curvature)
    return Judgement(status, sentence, advice, found, facts, gates, entries, curvature, threshold)


def judge_cones(
    problem: Problem,
    point: Evaluation,
    certificate: Certificate,
    nu: Tensor,
    options: Options,
    true_gap: tuple[float, float] | None,
) -> Judgement:
    """The judgement about a point of the ReLU problem (19)."""
    tol, threshold = options.tol, options.curvature_tol * problem.beta
    if not (math.isfinite(point.primal) and bool(nu.isfinite().all())):
        return _not_finite(problem, point, certificate, nu, options)
    prices = gate_prices(problem, nu, problem.beta * (1 + SLACK * tol))
    columns = ConeColumns.of(problem, point, nu, tol, options.padding)
    found = residuals(problem, point, certificate, nu, (columns.residuals, columns.places))
    gates = examine_gates(
        problem,
        point,
        found,
        prices.upper / problem.beta,
        prices.lower,
        free=columns.gates_with(columns.counted, problem.n_gates),
        chosen=_listed(columns.every, prices),
    )
    facts = _point_facts(problem, point, certificate, gates, found, options)
    entries = theorems(facts)
    is_global = bool(global_proof(facts, entries, certificate))
    seen: ConePoint | None = None
    if facts.stationary and not is_global:
        seen = examine_point(
            problem,
            point,
            nu,
            columns,
            prices,
            tol=tol,
            threshold=threshold,
            second_order=options.second_order,
            max_products=options.max_products,
        )
    status, sentence, advice = cone_verdict(facts, entries, certificate, found.overall, seen, true_gap)
    judgement = Judgement(status, sentence, advice, found, facts, gates, entries, None, threshold)
    if seen is not None:
        return replace(
            judgement,
            curvature=seen.curvature,
            curvature_threshold=seen.threshold,
            faces=seen.faces,
            witness=seen.witness,
        )
    if is_global or point.infeasibility > FEASIBILITY:
        return judgement
    return replace(judgement, witness=descent_neuron(problem, point, nu, prices, columns.free_gates(problem)))


def _not_finite(
    problem: Problem, point: Evaluation, certificate: Certificate, nu: Tensor, options: Options
) -> Judgement:
    """Nothing follows for a ReLU point with an infinite objective."""
    found = residuals(problem, point, certificate, nu)
    found = replace(found, overall=math.inf)
    used = Columns.from_factors(*point.factors).without_zeros().gate.unique() if point.factors is not None else None
    ratios = torch.full((problem.n_gates,), math.inf, dtype=torch.float64)
    chosen = used if problem.n_gates > MOST_GATES else None
    gates = examine_gates(problem, point, found, ratios, None, chosen=chosen)
    facts = _point_facts(problem, point, certificate, gates, found, options)
    entries = theorems(facts)
    status, sentence, advice = cone_verdict(facts, entries, certificate, math.inf, None, None)
    threshold = options.curvature_tol * problem.beta
    return Judgement(status, sentence, advice, found, facts, gates, entries, None, threshold)


def _ratios(problem: Problem, certificate: Certificate, nu: Tensor) -> Tensor:
    """||G_k||_D* / beta; certificates leave them out where there are very many gates."""
    if certificate.gate_ratios:
        return torch.tensor(certificate.gate_ratios, dtype=torch.float64)
    return problem.dual_norms(nu, problem.operator.double().adjoint_rounding(nu))[1] / problem.beta


def _listed(columns: Columns, prices: ConePrices) -> Tensor | None:
    """The gates worth a line: all, or of very many those with columns and the worst ones."""
    if len(prices.upper) <= MOST_GATES:
        return None
    used = columns.gate[(columns.u != 0).any(1) | (columns.v != 0).any(1)]
    return torch.cat([used, prices.upper.topk(_LISTED).indices, prices.lower.topk(_LISTED).indices]).unique()


def _point_facts(
    problem: Problem,
    point: Evaluation,
    certificate: Certificate,
    gates: tuple[GateDiagnosis, ...],
    found: Residuals,
    options: Options,
) -> PointFacts:
    assert point.factors is not None
    U, V = point.factors
    stationary = found.overall <= options.tol
    return PointFacts(
        activation=problem.activation,
        norm=problem.norm.name,
        m=U.shape[2],
        d_c=U.shape[1],
        d_r=V.shape[1],
        ratios=[gate.dual_norm_ratio for gate in gates],
        ranks_left=[gate.rank_left for gate in gates],
        ranks_right=[gate.rank_right for gate in gates],
        ranks=[gate.rank for gate in gates],
        stationary=stationary,
        not_minimum="" if stationary else "the point is not stationary",
        theorem_bound=certificate.theorem_bound if stationary else None,
        tol=options.tol,
        gates=None if len(gates) == problem.n_gates else [gate.gate for gate in gates],
    )
