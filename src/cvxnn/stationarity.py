"""How far a point of (14) is from stationary: residuals of (68), (69) and (72), balance, ranks, gate by gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cvxnn.certificates import Certificate, Evaluation
from cvxnn.columns import Columns
from cvxnn.cone_stationarity import ConeResiduals
from cvxnn.cones import FEASIBILITY
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
        ||G_k||_D* / beta; for ReLU the maximum of ||G_k^T u|| / beta over the unit vectors of the cone, or an
        upper bound of it.
    residual_left, residual_right : float or None
        (68) and (69), relative to beta times the size of all factors; for ReLU (72) in place of (68). None for
        norms other than l2.
    balance : float
        ||U_k^T U_k - V_k^T V_k||_F over the larger of ||U_k||_F^2 and ||V_k||_F^2; for ReLU and for norms other
        than l2 the largest difference of the squared norms of a pair of columns in place of the numerator.
    rank_left, rank_right, rank : int
        Numerical ranks of U_k, V_k and [U_k; V_k].
    curvature_bound : float or None
        beta - ||G_k||_2 where [U_k; V_k] has fewer than m independent columns: an upper bound of the smallest
        eigenvalue of the Hessian (up to the rank tolerance). For ReLU beta - ||G_k^T u||, u the best that was
        found in the cone, where there is a column of zeros.
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


def residuals(
    problem: Problem,
    point: Evaluation,
    certificate: Certificate,
    nu: torch.Tensor,
    cones: tuple[ConeResiduals, torch.Tensor] | None = None,
) -> Residuals:
    """(68) or for ReLU (72), (69), and the gradient in the intercept, at exactly this point.

    Parameters
    ----------
    cones : pair, optional
        For ReLU the residuals of some columns, and their places; the others are zero and have none.
    """
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
    if cones is None:
        slopes = problem.operator.double().adjoint_columns(columns, nu)
        parts = [side / problem.beta + part for side, part in zip(slopes, (columns.u, columns.v), strict=True)]
        gate = columns.gate
    else:
        parts, gate = [cones[0].left, cones[0].right], columns.gate[cones[1]]
    sides = []
    for part in parts:
        rows = part / size if size > 0 else torch.zeros_like(part)
        sides.append(part.new_zeros(len(U)).index_add_(0, gate, rows.square().sum(1)))
    left, right = (math.sqrt(float(side.sum())) for side in sides)
    overall = max(math.hypot(left, right), intercept or 0.0)
    overall = math.inf if math.isnan(overall) or point.infeasibility > FEASIBILITY else overall
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
    if is_smooth(problem):
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
    problem: Problem,
    point: Evaluation,
    found: Residuals,
    ratios: torch.Tensor,
    norms: torch.Tensor | None,
    free: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
) -> tuple[GateDiagnosis, ...]:
    """The facts about gates.

    Parameters
    ----------
    ratios : torch.Tensor of shape (P,)
        ||G_k||_D* / beta.
    norms : torch.Tensor of shape (P,), optional
        ||G_k||_2, for ReLU lower bounds of the maxima over the cones.
    free : torch.Tensor of shape (P,), bool, optional
        Gates with a free column; by default those of too low a rank.
    chosen : torch.Tensor of indices, optional
        The gates that are wanted, by default all.
    """
    U, V = _factors(point)
    difference, size = _imbalance(problem, point)
    balance = torch.where(size > 0, difference / size, 0.0)
    gates = torch.arange(len(U), device=U.device) if chosen is None else chosen
    used = size > 0
    stacked = torch.linalg.qr(torch.cat([U[used], V[used]], dim=1), mode="r")[1]
    left, right, rank = (_ranks(part, used)[gates].tolist() for part in (U[used], V[used], stacked))
    deficient = [own < U.shape[2] for own in rank] if free is None else free[gates].tolist()
    return tuple(
        GateDiagnosis(
            gate=k,
            dual_norm_ratio=float(ratios[k]),
            residual_left=None if found.gates_left is None else found.gates_left[k],
            residual_right=None if found.gates_right is None else found.gates_right[k],
            balance=float(balance[k]),
            rank_left=left[i],
            rank_right=right[i],
            rank=rank[i],
            curvature_bound=problem.beta - float(norms[k]) if norms is not None and deficient[i] else None,
        )
        for i, k in enumerate(gates.tolist())
    )


def _ranks(parts: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Numerical ranks (P,) from the matrices of the gates that are used."""
    ranks = torch.zeros(len(used), dtype=torch.long, device=used.device)
    if len(parts):
        values = torch.linalg.svdvals(parts)
        ranks[used] = (values > RANK_TOLERANCE * values.max()).sum(1)
    return ranks
