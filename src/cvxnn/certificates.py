"""How far a point can be from the global optimum: duality gaps that are valid at any point (math section 3)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from cvxnn.bounds import DualBound, dual_bound
from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY
from cvxnn.errors import InvalidInputError
from cvxnn.norms import VECTOR_NORMS
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
        cost = beta * _column_penalties(problem, columns.u, columns.v)
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


def _column_penalties(problem: Problem, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """1/2 (||u_j||_C^2 + ||v_j||_R^2) of each column, the penalty of (14)."""
    left = VECTOR_NORMS[problem.norm.left].value(u)
    right = VECTOR_NORMS[problem.norm.right].value(v)
    return (left.square() + right.square()) / 2


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


@dataclass(frozen=True)
class Evaluation:
    """A point in float64, with its objective."""

    Z: torch.Tensor | None
    factors: tuple[torch.Tensor, torch.Tensor] | None
    intercept: torch.Tensor
    outputs: torch.Tensor
    predictions: torch.Tensor
    loss: float
    penalty: float
    primal: float
    infeasibility: float = 0.0

    def at(self, Z: torch.Tensor | None, factors: tuple[torch.Tensor, torch.Tensor] | None) -> Evaluation:
        """The same for copies of the point, which may be of another type."""
        pair = None if factors is None else (factors[0].double(), factors[1].double())
        return replace(self, Z=None if Z is None else Z.double(), factors=pair)

    def is_feasible(self, problem: Problem) -> bool:
        """Whether this is a point of the problem: any network is, where all neurons are allowed."""
        return self.infeasibility <= FEASIBILITY or problem.scope == "relu_network"


def evaluate(
    problem: Problem, Z: Any = None, *, factors: tuple[Any, Any] | None = None, intercept: Any = None
) -> Evaluation:
    """Objective of a point in float64; parameters and errors as for :func:`certify`.

    For ReLU it is that of the true network, with the activations (X u)_+.
    """
    if (Z is None) == (factors is None):
        raise InvalidInputError("exactly one of Z and factors is wanted")
    op = problem.operator.double()
    blocks = pair = None
    infeasibility = 0.0
    if factors is not None:
        pair = _check_factors(problem, factors)
        columns = Columns.from_factors(*pair)
        outputs = op.network_outputs(columns)
        if problem.cones is not None:
            used = columns.without_zeros()
            infeasibility = float(problem.cones.violation(used.gate, used.u).max()) if len(used) else 0.0
        (penalty,) = op.over_gates(float(_column_penalties(problem, pair[0].mT, pair[1].mT).sum()))
    elif problem.cones is not None:
        raise InvalidInputError("Z is given for a ReLU problem; factors=(U, V), whose columns are in cones, are wanted")
    else:
        blocks = op.own_gates(_tensor(problem, Z, "Z"))
        if tuple(blocks.shape) != op.block_shape:
            raise InvalidInputError(f"Z has shape {tuple(blocks.shape)}; {op.block_shape} is wanted")
        outputs = op.apply(blocks)
        (penalty,) = op.over_gates(float(problem.norm.value(blocks)[1].sum()))

    offset = problem.best_intercept(outputs) if intercept is None else _tensor(problem, intercept, "intercept")
    if offset.shape != outputs.shape[1:]:
        raise InvalidInputError(f"intercept has shape {tuple(offset.shape)}; {tuple(outputs.shape[1:])} is wanted")
    if not problem.output_bias and bool(offset.any()):
        raise InvalidInputError("an intercept is given, but the problem has output_bias=False")
    predictions = outputs + offset
    loss = float(problem.loss.value(predictions, problem.Y64, problem.weights))
    if math.isnan(loss):
        loss = math.inf
    return Evaluation(
        Z=blocks,
        factors=pair,
        intercept=offset,
        outputs=outputs,
        predictions=predictions,
        loss=loss,
        penalty=penalty,
        primal=loss + problem.beta * penalty,
        infeasibility=infeasibility,
    )


def _check_factors(problem: Problem, factors: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    n_gates, p, q = problem.operator.block_shape
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise InvalidInputError("factors is not a pair; (U, V) is wanted")
    given = zip(factors, ("U", "V"), strict=True)
    U, V = (problem.operator.own_gates(_tensor(problem, part, name)) for part, name in given)
    m = U.shape[-1] if U.ndim == 3 else 0
    if U.shape != (n_gates, p, m) or V.shape != (n_gates, q, m):
        raise InvalidInputError(
            f"factors have shapes {tuple(U.shape)} and {tuple(V.shape)}; "
            f"({n_gates}, {p}, m) and ({n_gates}, {q}, m) are wanted"
        )
    return U, V


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
        residual = _factor_stationarity(problem, Columns.from_blocks(point.Z), nu)
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
        candidate = _tensor(problem, nu, "dual")
        if candidate.shape != problem.Y64.shape:
            raise InvalidInputError(f"dual has shape {tuple(candidate.shape)}; {tuple(problem.Y64.shape)} is wanted")
        out.append(problem.centred(candidate))
    return out


def _tensor(problem: Problem, value: Any, name: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=problem.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name} cannot be read as an array of numbers: {error}") from error
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidInputError(f"{name} contains NaN or infinity; finite numbers are wanted")
    return tensor
