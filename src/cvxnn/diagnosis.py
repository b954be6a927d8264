"""What is known about a point of the Burer-Monteiro objective (14), and which theorem says so (math section 3)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate, certify, evaluate, relative_gap
from cvxnn.curvature import Curvature, smallest_curvature
from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem
from cvxnn.stationarity import (
    GateDiagnosis,
    examine_gates,
    is_constrained,
    is_smooth,
    overall_balance,
    residuals,
    spectral_norms,
)
from cvxnn.theorems import PointFacts, Theorem, not_minimum, short, theorems, verdict
from cvxnn.validation import check_flag, check_integer, check_positive

__all__ = ["Diagnosis", "diagnose"]

_EPS = 2.0**-53
_SHOWN_GATES = 8


#: An optimum may be above the objective by this fraction of it, as it may have been computed roughly.
_SLACK = 1e-3


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; print it for a table.

    Attributes
    ----------
    status : {"global_optimum", "not_stationary", "saddle", "local_minimum", "undecided"}
        "local_minimum" is meant as far as second order tells.
    verdict, advice : str
        The status in words, and what follows from it.
    certificate : Certificate
    stationary : bool
        ``stationarity <= tol``.
    stationarity : float
        The residuals (68), (69) together, relative to beta times the size of the factors, or that of the intercept
        where it is larger; for norms other than l2 a radial residual, their inner product with the columns.
    residual_left, residual_right, residual_intercept : float or None
        (68), (69), and the gradient in the intercept relative to its terms; None where there is none.
    balance : float
        The largest imbalance of a gate, relative to the largest gate.
    m, d_c, d_r : int
        Columns per gate, and the lengths of the columns of U_k and V_k.
    curvature : Curvature or None
        The smallest eigenvalue of the Hessian; None for norms other than l2, and where it was not asked for.
    curvature_threshold : float
        Eigenvalues above minus this are not told from zero (rotations of the factors have zero).
    duality_gap : float
        Proven at any point.
    theorem_bound : float or None
        Theorem 3.4; None unless the point is stationary.
    true_gap : pair of float or None
        Bounds of (p - p*) / p*, from `optimum`; equal where it was a number.
    theorems : tuple of Theorem
    gates : tuple of GateDiagnosis
    unavailable : tuple of str
        Parts that this kind of problem does not have, and why.
    """

    status: str
    verdict: str
    advice: str
    activation: str
    norm: str
    scope: str
    tol: float
    certificate: Certificate
    stationary: bool
    stationarity: float
    residual_left: float | None
    residual_right: float | None
    residual_intercept: float | None
    balance: float
    m: int
    d_c: int
    d_r: int
    curvature: Curvature | None
    curvature_threshold: float
    duality_gap: float
    theorem_bound: float | None
    true_gap: tuple[float, float] | None
    theorems: tuple[Theorem, ...]
    gates: tuple[GateDiagnosis, ...] = dataclasses.field(repr=False)
    unavailable: tuple[str, ...] = ()

    @property
    def thresholds(self) -> dict[str, int]:
        """Numbers of columns per gate from which no local minimum is spurious (l2 norms, linear and gated ReLU)."""
        return {"min(d_c, d_r)": min(self.d_c, self.d_r), "d_c + d_r": self.d_c + self.d_r}

    def theorem(self, name: str) -> Theorem:
        """The entry of this name."""
        return next(entry for entry in self.theorems if entry.name == name)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; infinities and NaN become None, the direction of the eigenvector is left out."""
        nested = ("certificate", "curvature", "theorems", "gates")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in nested}
        fields["thresholds"] = self.thresholds
        fields["certificate"] = self.certificate.to_dict()
        fields["curvature"] = None if self.curvature is None else self.curvature.to_dict()
        fields["theorems"] = [dataclasses.asdict(entry) for entry in self.theorems]
        fields["gates"] = [dataclasses.asdict(entry) for entry in self.gates]
        return _json(fields)

    def table(self) -> str:
        """The diagnosis for people, in at most about 40 lines."""
        advice = [self.advice] if self.advice else []
        parts = [self._facts(), self._theorem_lines(), self._gate_lines()]
        return "\n".join([self.verdict, *advice, *(line for part in parts for line in ("", *part))])

    def __str__(self) -> str:
        return self.table()

    def _facts(self) -> list[str]:
        cert, curvature = self.certificate, self.curvature
        kind = "" if self.norm == "nuclear" else "radial, "
        parts = [("(68)", self.residual_left), ("(69)", self.residual_right), ("intercept", self.residual_intercept)]
        parts_text = "".join(f", {name} {value:.1e}" for name, value in parts if value is not None)
        answer = "stationary" if self.stationary else "not stationary"
        bound = f"none: stationarity is above {min(self.tol, STATIONARITY_TOLERANCE):g}"
        if self.theorem_bound is not None:
            bound = f"{self.theorem_bound:.2e}"
        elif self.stationary and self.stationarity <= STATIONARITY_TOLERANCE:
            bound = "none"
        eigenvalue = "not computed"
        if curvature is not None:
            close = "" if curvature.converged else ", an upper bound only: Lanczos did not converge"
            place = ""
            if abs(curvature.value) <= self.curvature_threshold:
                place = ", zero within the tolerance"
            elif curvature.value < 0:
                place = f", {curvature.share:.0%} in gate {curvature.gate}"
            eigenvalue = f"{short(curvature.value)} (residual {curvature.residual:.1e}{place}{close})"
        ranks = [entry.rank for entry in self.gates]
        rows = [
            ("objective", f"{cert.primal:.8g}, at least {cert.lower_bound:.8g} is needed ({self.scope})"),
            ("stationarity", f"{self.stationarity:.1e}, {kind}{answer} to {self.tol:g}{parts_text}"),
            ("balance", f"{self.balance:.1e}"),
            ("columns per gate", f"m = {self.m}, min(d_c, d_r) = {min(self.d_c, self.d_r)}, "
             f"d_c + d_r = {self.d_c + self.d_r}"),
            ("rank of [U; V]", ", ".join(f"{rank} in {_count(ranks.count(rank))}" for rank in sorted(set(ranks)))),
            ("smallest eigenvalue", eigenvalue),
            ("Theorem 3.4", bound),
            ("duality gap", f"{self.duality_gap:.2e}"),
            ("true gap", "optimum not given" if self.true_gap is None else _interval(self.true_gap)),
        ]  # fmt: skip
        rows += [("not available", text) for text in self.unavailable]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {text}" for name, text in rows]

    def _theorem_lines(self) -> list[str]:
        width = max(len(entry.name) for entry in self.theorems)
        lines = [f"{'theorem':<{width}}  applies  what follows, or why not"]
        for entry in self.theorems:
            text = entry.conclusion if entry.applies else entry.reason
            lines.append(f"{entry.name:<{width}}  {'yes' if entry.applies else 'no':<7}  {text}")
        return lines

    def _gate_lines(self) -> list[str]:
        worst = sorted(self.gates, key=lambda entry: -entry.dual_norm_ratio)[:_SHOWN_GATES]
        lines = ["gate  ||G_k||/beta  rank U  rank V      (68)      (69)   balance  eigenvalue at most"]
        for entry in worst:
            left, right, bound = map(_cell, (entry.residual_left, entry.residual_right, entry.curvature_bound))
            lines.append(
                f"{entry.gate:>4}  {entry.dual_norm_ratio:>12.8g}  {entry.rank_left:>6}  {entry.rank_right:>6}"
                f"  {left:>8}  {right:>8}  {_cell(entry.balance):>8}  {bound:>18}"
            )
        if len(worst) < len(self.gates):
            violated = sum(entry.dual_norm_ratio > 1 + self.tol for entry in self.gates)
            lines.append(f"the worst {len(worst)} of {len(self.gates)} gates; {violated} have ||G_k|| > beta")
        return lines


def diagnose(
    problem: Problem,
    factors: Any,
    *,
    optimum: Any = None,
    intercept: Any = None,
    dual: Any = None,
    tol: float = STATIONARITY_TOLERANCE,
    curvature_tol: float = 1e-5,
    second_order: bool = True,
    max_products: int = 5000,
) -> Diagnosis:
    """What is known about a point of the Burer-Monteiro objective (14), in float64 at exactly the factors given.

    Parameters
    ----------
    problem : Problem
    factors : pair (U, V) of shapes (P, p, m) and (P, q, m), or Result
        Of a result, the intercept and the dual point are taken too, unless they are given.
    optimum : float, Result or Certificate, optional
        The optimal value of the problem (or a lower bound of it), or a result whose certificate encloses it.
    intercept : array-like of shape (c,), optional
        The unpenalised intercept; minimised out where none is given.
    dual : array-like of shape (n, c), or list of them, optional
        Further dual candidates for the duality gap.
    tol : float
        Relative residual up to which a point counts as stationary, and relative gap up to which it counts as
        an optimum.
    curvature_tol : float
        Eigenvalues of the Hessian below -curvature_tol * beta are negative.
    second_order : bool
        Whether the Hessian is looked at.
    max_products : int
        About so many Hessian-vector products at most.

    Returns
    -------
    Diagnosis

    Raises
    ------
    InvalidInputError
        Wrong shapes or values, a result without factors, or an `optimum` that cannot be one of this problem.

    Notes
    -----
    Theorems 3.3 and 3.5 of the paper, and the numbers of columns that follow from them, are applied to linear and
    gated ReLU networks with l2 norms only, and to all gates together only (math section 3).
    """
    if not isinstance(problem, Problem):
        raise InvalidInputError(f"problem is a {type(problem).__name__}; a cvxnn Problem is wanted")
    tol, curvature_tol = check_positive(tol, "tol"), check_positive(curvature_tol, "curvature_tol")
    second_order = check_flag(second_order, "second_order")
    check_integer(max_products, "max_products")
    factors, intercept, dual = _read_result(factors, intercept, dual)
    point = evaluate(problem, factors=factors, intercept=intercept)
    assert point.factors is not None
    if point.factors[0].shape[2] == 0:
        raise InvalidInputError("factors have no columns (m = 0); at least one per gate is wanted")
    certificate = certify(problem, factors=point.factors, intercept=point.intercept, dual=dual)
    true_gap = _true_gap(problem, optimum, certificate)
    nu = problem.loss.gradient(point.predictions, problem.Y64, problem.weights)
    found = residuals(problem, point, certificate, nu)
    norms = spectral_norms(problem, nu) if is_smooth(problem) else None
    gates = examine_gates(problem, point, certificate, norms, found)
    curvature, threshold = None, curvature_tol * problem.beta
    if second_order and norms is not None and math.isfinite(found.overall):
        curvature = smallest_curvature(
            problem, *point.factors, point.intercept, nu, norms, tolerance=10 * threshold, max_products=max_products
        )
        threshold += 64 * _EPS * curvature.scale
    stationary = found.overall <= tol
    facts = PointFacts(
        activation=problem.activation,
        norm=problem.norm.name,
        m=point.factors[0].shape[2],
        d_c=point.factors[0].shape[1],
        d_r=point.factors[1].shape[1],
        ratios=certificate.gate_ratios,
        ranks_left=[gate.rank_left for gate in gates],
        ranks_right=[gate.rank_right for gate in gates],
        ranks=[gate.rank for gate in gates],
        stationary=stationary,
        not_minimum=not_minimum(stationary, curvature, threshold),
        theorem_bound=certificate.theorem_bound if stationary and not is_constrained(problem) else None,
        tol=tol,
    )
    entries = theorems(facts)
    status, sentence, advice = verdict(facts, entries, certificate, found.overall, curvature)
    return Diagnosis(
        status=status,
        verdict=sentence,
        advice=advice,
        activation=problem.activation,
        norm=problem.norm.name,
        scope=problem.scope,
        tol=tol,
        certificate=certificate,
        stationary=stationary,
        stationarity=found.overall,
        residual_left=found.left,
        residual_right=found.right,
        residual_intercept=found.intercept,
        balance=overall_balance(problem, point),
        m=facts.m,
        d_c=facts.d_c,
        d_r=facts.d_r,
        curvature=curvature,
        curvature_threshold=threshold,
        duality_gap=certificate.relative_gap,
        theorem_bound=facts.theorem_bound,
        true_gap=true_gap,
        theorems=entries,
        gates=gates,
        unavailable=_unavailable(problem, second_order),
    )


def _read_result(factors: Any, intercept: Any, dual: Any) -> tuple[Any, Any, Any]:
    """Factors, intercept and dual point of a result, where `factors` is one."""
    if not hasattr(factors, "factors"):
        if factors is None:
            raise InvalidInputError("factors is None; a pair (U, V), or a result that has factors, is wanted")
        return factors, intercept, dual
    if factors.factors is None:
        solver = getattr(factors, "solver", None)
        raise InvalidInputError(
            f"the result of solver {solver!r} has no factors; one of a solver on factors ('bm_...') is wanted"
        )
    intercept = getattr(factors, "intercept", None) if intercept is None else intercept
    dual = getattr(factors, "dual", None) if dual is None else dual
    return factors.factors, intercept, dual


def _same_problem(a: Problem, b: Problem) -> bool:
    """Whether two problems have the same data, gates, loss and norm; beta is compared elsewhere."""
    pairs = [(a.Y64, b.Y64), (a.weights, b.weights), (a.patterns, b.patterns)]
    pairs += list(zip(a.operator.double().data_tensors(), b.operator.double().data_tensors(), strict=True))
    facts = [(p.activation, repr(p.loss), p.norm.name, p.output_bias) for p in (a, b)]
    return facts[0] == facts[1] and all(x.shape == y.shape and bool((x == y).all()) for x, y in pairs)


def _true_gap(problem: Problem, optimum: Any, certificate: Certificate) -> tuple[float, float] | None:
    """Bounds of (p - p*) / p* from what is known about p*."""
    if optimum is None:
        return None
    primal = certificate.primal
    known = getattr(optimum, "certificate", optimum)
    other = getattr(optimum, "problem", problem)
    if other is not problem and not _same_problem(other, problem):
        raise InvalidInputError("optimum is a result of another problem (other data, gates, loss or norms)")
    if hasattr(known, "lower_bound") and hasattr(known, "primal"):
        beta = getattr(known, "beta", problem.beta)
        if beta != problem.beta:
            raise InvalidInputError(
                f"optimum belongs to beta = {beta:g}; that of the problem, {problem.beta:g}, is wanted"
            )
        low, high = float(known.lower_bound), min(float(known.primal), primal)
    else:
        try:
            low = high = float(known)
        except (TypeError, ValueError):
            raise InvalidInputError(
                f"optimum is {type(known).__name__}; the optimal value, a Result or a Certificate is wanted"
            ) from None
        if not math.isfinite(low) or low < 0:
            raise InvalidInputError(f"optimum is {low}; a finite number of at least 0 is wanted")
    if low > primal * (1 + _SLACK):
        raise InvalidInputError(f"optimum is at least {low:.8g}, more than the objective {primal:.8g} of the factors")
    return relative_gap(primal, high), relative_gap(primal, low)


def _unavailable(problem: Problem, second_order: bool) -> tuple[str, ...]:
    if is_constrained(problem):
        return (f"cone multipliers and Hessian for {problem.activation!r}, so neither stationarity nor second order",)
    if problem.norm.name != "nuclear":
        return (f"(68), (69) and the Hessian for the norm {problem.norm.name!r}: only a radial residual",)
    return () if second_order else ("second order: second_order=False",)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _interval(gap: tuple[float, float]) -> str:
    low, high = gap
    return f"{high:.2e}" if low == high else f"{low:.2e} to {high:.2e}"


def _count(n: int) -> str:
    return "1 gate" if n == 1 else f"{n} gates"
