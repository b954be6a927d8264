"""How far a point of (14) is from stationary: residuals of (68) and (69), balance, ranks, gate by gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cvxnn.certificates import Certificate, Evaluation
from cvxnn.columns import Columns
from cvxnn.norms import VECTOR_NORMS
from cvxnn.problem import Problem

__all__ = [
    "GateDiagnosis",
    "Residuals",
    "examine_gates",
    "is_constrained",
    "is_smooth",
    "overall_balance",
    "residuals",
    "spectral_norms",
]

#: Singular values of factors above this, relative to the largest of all gates, count for the rank.
RANK_TOLERANCE = 1e-4


@dataclass(frozen=True)
class GateDiagnosis:
    """One gate.

    Attributes
    ----------
    gate : int
        Its index: ``problem.gates[:, gate]``, ``U[gate]``.
    dual_norm_ratio : float
        ||G_k||_D* / beta.
    residual_left, residual_right : float or None
        (68) and (69), relative to beta times the size of all factors; None for norms other than l2.
    balance : float
        ||U_k^T U_k - V_k^T V_k||_F over the larger of ||U_k||_F^2 and ||V_k||_F^2; for norms other than l2
        the largest difference of the squared norms of a pair of columns in place of the numerator.
    rank_left, rank_right, rank : int
        Numerical ranks of U_k, V_k and [U_k; V_k].
    curvature_bound : float or None
        beta - ||G_k||_2 where [U_k; V_k] has fewer than m independent columns: an upper bound of the smallest
        eigenvalue of the Hessian (up to the rank tolerance).
    """

    gate: int
    dual_norm_ratio: float
    residual_left: float | None
    residual_right: float | None
    balance: float
    rank_left: int
    rank_right: int
    rank: int
    curvature_bound: float | None


@dataclass(frozen=True)
class Residuals:
    """Relative residuals of stationarity; per gate where they are there."""

    overall: float
    left: float | None
    right: float | None
    intercept: float | None
    gates_left: list[float] | None
    gates_right: list[float] | None


def is_constrained(problem: Problem) -> bool:
    return problem.activation not in ("linear", "gated_relu")


def is_smooth(problem: Problem) -> bool:
    """Whether (68), (69) and the Hessian describe the problem: l2 norms and no cones."""
    return problem.norm.name == "nuclear" and not is_constrained(problem)


def residuals(problem: Problem, point: Evaluation, certificate: Certificate, nu: torch.Tensor) -> Residuals:
    """(68), (69), and the gradient in the intercept, at exactly this point."""
    U, V = _factors(point)
    total = float(nu.abs().sum())
    slope = float(nu.sum(0).abs().max()) / total if total > 0 else 0.0
    intercept = slope if problem.output_bias else None
    if not math.isfinite(point.primal):
        return Residuals(math.inf, None, None, intercept, None, None)
    if problem.norm.name != "nuclear":
        return Residuals(certificate.stationarity, None, None, intercept, None, None)
    columns = Columns.from_factors(U, V)
    size = math.sqrt(float(U.square().sum() + V.square().sum()))
    sides = []
    for slopes, part in zip(
        problem.operator.double().adjoint_columns(columns, nu), (columns.u, columns.v), strict=True
    ):
        rows = (slopes / problem.beta + part) / size if size > 0 else torch.zeros_like(part)
        sides.append(rows.square().sum(1).view(len(U), -1).sum(1))
    left, right = (math.sqrt(float(side.sum())) for side in sides)
    overall = max(math.hypot(left, right), intercept or 0.0)
    overall = math.inf if math.isnan(overall) else overall
    return Residuals(overall, left, right, intercept, sides[0].sqrt().tolist(), sides[1].sqrt().tolist())


def _factors(point: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
    assert point.factors is not None
    return point.factors


def spectral_norms(problem: Problem, nu: torch.Tensor) -> torch.Tensor:
    """||G_k||_2 of every gate, a few gates at a time."""
    op = problem.operator.double()
    return torch.cat([problem.norm.dual_estimate(op.adjoint_blocks(nu, gates)) for gates in op.gate_batches()])


def _imbalance(problem: Problem, point: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each gate: the imbalance, and the larger squared size of U_k and V_k."""
    U, V = _factors(point)
    if problem.norm.name == "nuclear":
        difference = torch.linalg.matrix_norm(U.mT @ U - V.mT @ V)
        return difference, torch.maximum(U.square().sum((1, 2)), V.square().sum((1, 2)))
    left, right = (
        VECTOR_NORMS[name].value(part.mT).square() for name, part in ((problem.norm.left, U), (problem.norm.right, V))
    )
    return (left - right).abs().amax(1), torch.maximum(left.sum(1), right.sum(1))


def overall_balance(problem: Problem, point: Evaluation) -> float:
    difference, size = _imbalance(problem, point)
    return float(difference.max() / size.max()) if float(size.max()) > 0 else 0.0


def examine_gates(
    problem: Problem, point: Evaluation, certificate: Certificate, norms: torch.Tensor | None, found: Residuals
) -> tuple[GateDiagnosis, ...]:
    U, V = _factors(point)
    n_gates, _, m = U.shape
    difference, size = _imbalance(problem, point)
    balance = torch.where(size > 0, difference / size, 0.0).tolist()
    stacked = torch.linalg.qr(torch.cat([U, V], dim=1), mode="r")[1]
    ranks = [_ranks(part) for part in (U, V, stacked)]
    nothing = [None] * n_gates
    return tuple(
        GateDiagnosis(
            gate=k,
            dual_norm_ratio=certificate.gate_ratios[k],
            residual_left=(found.gates_left or nothing)[k],
            residual_right=(found.gates_right or nothing)[k],
            balance=balance[k],
            rank_left=ranks[0][k],
            rank_right=ranks[1][k],
            rank=ranks[2][k],
            curvature_bound=problem.beta - float(norms[k]) if norms is not None and ranks[2][k] < m else None,
        )
        for k in range(n_gates)
    )


def _ranks(parts: torch.Tensor) -> list[int]:
    values = torch.linalg.svdvals(parts)
    return (values > RANK_TOLERANCE * values.max()).sum(1).tolist()
