"""How far a point can be from the global optimum: duality gaps that are valid at any point (math section 3)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from cvxnn.bounds import DualBound, dual_bound
from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY
from cvxnn.errors import InvalidInputError
from cvxnn.evaluation import Evaluation, as_tensor, column_penalties, evaluate
from cvxnn.operators import MLPOperator
from cvxnn.problem import Problem

__all__ = [
    "AT_ROUNDING",
    "STATIONARITY_TOLERANCE",
    "Certificate",
    "Evaluation",
    "certificate_of",
    "certify",
    "evaluate",
    "relative_gap",
]

#: Relative stationarity residual up to which the bound of Theorem 3.4 is reported.
STATIONARITY_TOLERANCE = 1e-6
#: Relative gaps below this are indistinguishable from zero in float64.
AT_ROUNDING = 1e-12
_MOST_RATIOS = 10_000

_SCOPES = {
    "linear_network": "all two-layer linear networks",
    "given_gates": "all networks with the given gates",
    "sampled_gates": "all networks with the sampled gates",
    "all_gates": "all networks with gates from every open cell of the arrangement of the data",
    "network_gates": "all networks with the activation patterns of this network",
    "relu_network": "all two-layer ReLU networks",
}


@dataclass(frozen=True)
class Certificate:
    """Proof of how good a point is, computed in float64 for exactly this point.

    Attributes
    ----------
    primal : float
        Objective of the point.
    lower_bound : float
        No point of the problem has an objective below it.
    relative_gap : float
        (primal - lower_bound) / lower_bound; 0/0 is 0, x/0 is infinity.
    dual_norm_ratio, dual_norm_ratio_lower : float
        Upper and lower bound of max_k ||G_k||_D* / beta, G = A*(gradient of the loss); an optimum has 1
        (or less, where Z = 0).
    theorem_bound : float or None
        Theorem 3.4 with its correction for the remaining residual; None unless
        ``stationarity <= STATIONARITY_TOLERANCE``.
    scope : str
        What the gap is relative to.
    loss, penalty : float
        The two parts of the objective: F, and Omega without beta.
    stationarity : float
        Relative residual of the stationarity conditions (68), (69).
    gate_ratios : tuple of float
        Upper bounds of ||G_k||_D* / beta, one per gate; left out where there are more than 10,000 gates.
    infeasibility : float
        For ReLU the largest violation of a cone, relative to the norms of the row and of the column; where it is
        above 1e-10 the point is none of a problem with a sample of gates, and its gap there is infinite.
    """

    primal: float
    lower_bound: float
    relative_gap: float
    dual_norm_ratio: float
    dual_norm_ratio_lower: float
    theorem_bound: float | None
    scope: str
    loss: float
    penalty: float
    beta: float
    stationarity: float
    gate_ratios: tuple[float, ...] = dataclasses.field(repr=False, default=())
    infeasibility: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; infinities become None."""
        fields = dataclasses.asdict(self)
        fields["gate_ratios"] = [_json_number(value) for value in self.gate_ratios]
        return {key: _json_number(value) for key, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Certificate:
        """The inverse of :meth:`to_dict`."""
        infinite = ("primal", "relative_gap", "dual_norm_ratio", "stationarity")
        values: dict[str, Any] = {
            key: math.inf if fields[key] is None and key in infinite else fields[key] for key in fields
        }
        values["gate_ratios"] = tuple(math.inf if r is None else r for r in fields["gate_ratios"])
        return cls(**values)

    def summary(self) -> str:
        """The certificate in words."""
        among = _SCOPES.get(self.scope, self.scope)
        lines = [
            f"objective      {self.primal:.8g}",
            f"lower bound    {self.lower_bound:.8g}",
            f"relative gap   {self.relative_gap:.2e}" + ("  (at rounding)" if self.at_rounding else ""),
            f"scope          {self.scope}",
        ]
        if self.infeasibility > FEASIBILITY and self.relative_gap == math.inf:
            verdict = f"Columns leave their cones by {self.infeasibility:.1e}: no point of this problem."
        elif not math.isfinite(self.primal):
            verdict = "The objective of this point is not finite."
        elif self.relative_gap == math.inf:
            verdict = "Nothing is proven about this point: the lower bound is zero."
        elif self.at_rounding:
            verdict = f"This is a global optimum among {among}, up to rounding."
        else:
            verdict = f"The objective is at most {_percent(self.relative_gap)} above the best possible among {among}."
        return "\n".join([*lines, verdict])

    @property
    def at_rounding(self) -> bool:
        """Whether the gap cannot be told from zero in float64."""
        return self.relative_gap < AT_ROUNDING


def _percent(gap: float) -> str:
    return f"{100 * gap:.2g}%"


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def relative_gap(primal: float, lower: float) -> float:
    """(primal - lower) / lower with 0/0 = 0 and x/0 = infinity."""
    difference = primal - lower
    if difference <= 0:
        return 0.0
    return difference / lower if lower > 0 else math.inf


def _factor_stationarity(problem: Problem, columns: Columns, nu: torch.Tensor) -> float:
    """Relative residual of (68), (69); for other norms, of their inner product with the columns.

    For ReLU that of u_j = Proj_k(-G_k v_j / beta), which is (72): G_k v_j + beta u_j = K_k^T mu_j with mu_j >= 0
    and mu_j^T K_k u_j = 0.
    """
    beta = problem.beta
    left, right = problem.operator.double().adjoint_columns(columns, nu)
    if problem.norm.name != "nuclear":
        cost = beta * column_penalties(problem, columns.u, columns.v)
        gap = cost + (left * columns.u).sum(1)
        distance, total = problem.operator.over_gates(float(gap.abs().sum()), float(cost.sum()))
        return distance / total if total > 0 else 0.0
    (size,) = problem.operator.over_gates(float(columns.u.square().sum() + columns.v.square().sum()))
    if size == 0:
        return 0.0
    right = right + beta * columns.v
    if problem.cones is None:
        left = left + beta * columns.u
    else:
        left = beta * (columns.u - problem.cones.project(columns.gate, -left / beta).point)
    (squares,) = problem.operator.over_gates(float(left.square().sum() + right.square().sum()))
    return math.sqrt(squares / size) / beta


def _block_stationarity(problem: Problem, Z: torch.Tensor, nu: torch.Tensor) -> float:
    """Relative residual of (68), (69) for the balanced singular pairs of blocks Z, not zero, from the blocks of A*."""
    beta, op = problem.beta, problem.operator.double()
    if type(op) is MLPOperator:
        # Blocks that are zero have no singular pairs that count.
        used = (Z != 0).any(2).any(1).nonzero()[:, 0]
        if 2 * len(used) <= op.n_gates:
            op, Z = op.select(used), Z[used]
    G = op.adjoint(nu)
    left, values, right = torch.linalg.svd(Z, full_matrices=False)
    first, second = G @ right.mT + beta * left, G.mT @ left + beta * right.mT
    squares = first.square().sum(1) + second.square().sum(1)
    distance, total = problem.operator.over_gates(float((values * squares).sum()), float(values.sum()))
    return math.sqrt(distance / total / 2) / beta


def certify(
    problem: Problem,
    Z: Any = None,
    *,
    factors: tuple[Any, Any] | None = None,
    intercept: Any = None,
    dual: Any = None,
    seconds: float | None = None,
) -> Certificate:
    """Certificate of any point, stationary or not.

    Parameters
    ----------
    problem : Problem
    Z : array-like of shape (P, p, q)
        Blocks; or give `factors`. ReLU points are certified from their factors.
    factors : pair (U, V), shapes (P, p, m) and (P, q, m)
        Burer-Monteiro factors; the primal value is then that of (14).
    intercept : array-like of shape (c,), optional
        The unpenalised intercept; minimised out where none is given.
    dual : array-like of shape (n, c), or list of them, optional
        Further dual candidates (such as ``result.dual``); the best lower bound counts.
    seconds : float, optional
        About so long to spend on each dual norm of a ReLU problem with several outputs and a rank above two,
        where tight bounds are dear; what is not looked at has the bound of the spectral norm.

    Returns
    -------
    Certificate

    Raises
    ------
    InvalidInputError
        Wrong shapes, NaN or infinities, or not exactly one of `Z` and `factors`.
    """
    if not isinstance(problem, Problem):
        raise InvalidInputError(f"problem is a {type(problem).__name__}; a cvxnn Problem is wanted")
    point = evaluate(problem, Z, factors=factors, intercept=intercept)
    bounds = (dual_bound(problem, candidate, seconds).lower_bound for candidate in _candidates(problem, dual))
    return certificate_of(problem, point, max(bounds, default=-math.inf), seconds)


def certificate_of(problem: Problem, point: Evaluation, lower: float, seconds: float | None = None) -> Certificate:
    """Certificate of an evaluated point, with the best that :func:`dual_bound` gave for further dual candidates."""
    nu = problem.dual_candidate(point.predictions)
    natural = dual_bound(problem, nu, seconds)
    lower = max(lower, natural.lower_bound)
    stationarity = _stationarity(problem, point, nu)
    ratios = natural.norms_upper / problem.beta
    gap = relative_gap(point.primal, lower)
    return Certificate(
        primal=point.primal,
        lower_bound=lower,
        relative_gap=gap if point.is_feasible(problem) else math.inf,
        dual_norm_ratio=float(ratios.max()),
        dual_norm_ratio_lower=float(natural.norms_lower.max()) / problem.beta,
        theorem_bound=_theorem_bound(problem, point, natural, nu, stationarity),
        scope=problem.scope,
        loss=point.loss,
        penalty=point.penalty,
        beta=problem.beta,
        stationarity=stationarity,
        gate_ratios=tuple(ratios.tolist()) if len(ratios) <= _MOST_RATIOS else (),
        infeasibility=point.infeasibility,
    )


def _stationarity(problem: Problem, point: Evaluation, nu: torch.Tensor) -> float:
    """Relative residual of the stationarity conditions, that of the intercept included."""
    if not math.isfinite(point.primal) or point.infeasibility > FEASIBILITY:
        return math.inf
    if point.factors is not None:
        columns = Columns.from_factors(*point.factors)
        used = (columns.u != 0).any(1) | (columns.v != 0).any(1)
        residual = _factor_stationarity(problem, columns if problem.cones is None else columns[used], nu)
    elif point.penalty == 0 or point.Z is None:
        residual = 0.0
    elif problem.norm.name == "nuclear":
        residual = _block_stationarity(problem, point.Z, nu)
    else:
        blocks = problem.operator.double().adjoint(nu)
        gap = problem.beta * problem.norm.value(point.Z)[1] + (blocks * point.Z).sum((1, 2))
        residual = problem.operator.over_gates(float(gap.abs().sum()))[0] / (problem.beta * point.penalty)
    if problem.output_bias:
        gradient = problem.loss.gradient(point.predictions, problem.Y64, problem.weights)
        size = float(gradient.abs().sum())
        if size > 0:
            residual = max(residual, float(gradient.sum(0).abs().max()) / size)
    return residual


def _theorem_bound(
    problem: Problem,
    point: Evaluation,
    bound: DualBound,
    nu: torch.Tensor,
    stationarity: float,
) -> float | None:
    """Theorem 3.4, (20), at stationary points; what is left of the residual is added.

    With s = min(1, beta/q) and F >= 0, convexity gives p* >= s (F - <G, Z>); at a stationary point
    -<G, Z> = beta Omega and this is (20), elsewhere it is off by the computed difference. What is left of the
    slope in an intercept (a part of `stationarity`) is centred out of G first.
    """
    if not stationarity <= STATIONARITY_TOLERANCE:
        return None
    s = min(1.0, problem.beta / bound.dual_norm) if bound.dual_norm > 0 else 1.0
    residual = problem.beta * point.penalty + float((nu * point.outputs).sum())
    floor = s * (point.primal - max(residual, 0.0))
    if floor > 0:
        return max(0.0, point.primal / floor - 1)
    return 0.0 if point.primal == 0 else math.inf


def _candidates(problem: Problem, dual: Any) -> list[torch.Tensor]:
    if dual is None:
        return []
    given = list(dual) if isinstance(dual, (list, tuple)) else [dual]
    out = []
    for nu in given:
        candidate = as_tensor(problem, nu, "dual")
        if candidate.shape != problem.Y64.shape:
            raise InvalidInputError(f"dual has shape {tuple(candidate.shape)}; {tuple(problem.Y64.shape)} is wanted")
        out.append(problem.centred(candidate))
    return out
