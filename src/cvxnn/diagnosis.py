"""What is known about a point of the Burer-Monteiro objective (14), and which theorem says so (math section 3)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate, certify, evaluate
from cvxnn.cone_points import FaceFacts
from cvxnn.cone_witness import DescentNeuron
from cvxnn.curvature import Curvature
from cvxnn.diagnosis_table import diagnosis_table
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.judgement import Options, judge_cones, judge_factors
from cvxnn.problem import Problem
from cvxnn.stationarity import GateDiagnosis, overall_balance
from cvxnn.theorems import Theorem
from cvxnn.true_gap import true_gap
from cvxnn.validation import check_flag, check_integer, check_positive

__all__ = ["Diagnosis", "diagnose"]

#: About so long is spent on each dual norm of ReLU problems where tight bounds are dear.
_SECONDS = 30.0


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; print it for a table.

    Attributes
    ----------
    status : {"global_optimum", "not_stationary", "saddle", "local_minimum", "undecided", "infeasible"}
        "local_minimum" is meant as far as second order tells, unless ``faces.proven``.
    verdict, advice : str
        The status in words, and what follows from it.
    certificate : Certificate
    stationary : bool
        ``stationarity <= tol``.
    stationarity : float
        The residuals (68), (69) together, relative to beta times the size of the factors, or that of the intercept
        where it is larger; for ReLU (72) in place of (68), and infinite for points outside the cones; for norms
        other than l2 a radial residual, their inner product with the columns.
    residual_left, residual_right, residual_intercept : float or None
        (68) or (72), (69), and the gradient in the intercept relative to its terms; None where there is none.
    balance : float
        The largest imbalance of a gate, relative to the largest gate.
    m, d_c, d_r : int
        Columns per gate, and the lengths of the columns of U_k and V_k.
    curvature : Curvature or None
        The smallest eigenvalue of the Hessian; None for norms other than l2, and where it was not asked for. For
        ReLU that on the faces of the cones, or that of a column of zeros, where they were needed; where it is
        negative, its direction stays in the cones.
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
        Of ReLU problems with more than 2,000 gates those with columns, and the worst ones.
    unavailable : tuple of str
        Parts that this kind of problem does not have, and why.
    faces : FaceFacts or None
        For ReLU, how the columns lie in their cones; None unless the point is stationary and not known to be a
        global optimum.
    witness : DescentNeuron or None
        For ReLU, a neuron that lowers the objective when it is added as a further column.
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
    faces: FaceFacts | None = None
    witness: DescentNeuron | None = None

    @property
    def thresholds(self) -> dict[str, int]:
        """Numbers of columns per gate from which no local minimum is spurious (l2 norms, linear and gated ReLU)."""
        return {"min(d_c, d_r)": min(self.d_c, self.d_r), "d_c + d_r": self.d_c + self.d_r}

    def theorem(self, name: str) -> Theorem:
        """The entry of this name."""
        return next(entry for entry in self.theorems if entry.name == name)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; infinities and NaN become None, the direction of the eigenvector is left out."""
        nested = ("certificate", "curvature", "theorems", "gates", "faces", "witness")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in nested}
        fields["thresholds"] = self.thresholds
        fields["certificate"] = self.certificate.to_dict()
        fields["curvature"] = None if self.curvature is None else self.curvature.to_dict()
        fields["theorems"] = [dataclasses.asdict(entry) for entry in self.theorems]
        fields["gates"] = [dataclasses.asdict(entry) for entry in self.gates]
        fields["faces"] = None if self.faces is None else dataclasses.asdict(self.faces)
        fields["witness"] = None if self.witness is None else self.witness.to_dict()
        return _json(fields)

    def table(self) -> str:
        """The diagnosis for people, in at most about 40 lines."""
        return diagnosis_table(self)

    def __str__(self) -> str:
        return self.table()


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
    padding: bool = False,
) -> Diagnosis:
    """What is known about a point of the Burer-Monteiro objective (14), in float64 at exactly the factors given.

    For ReLU that is (19): the columns are in the cones of their gates.

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
    padding : bool
        For ReLU, whether columns of zeros only fill the factors up to the same number in every gate. Otherwise they
        are columns that can move; but with all gates enumerated, where the point is a network, gates of zeros alone
        are always padding, as they hold none of its neurons.

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

    With all gates of a ReLU problem enumerated, "local_minimum" is one of the network: its neurons may cross from
    cell to cell.
    """
    if not isinstance(problem, Problem):
        raise InvalidInputError(f"problem is a {type(problem).__name__}; a cvxnn Problem is wanted")
    if problem.operator.shares_gates:
        raise UnsupportedError("diagnose needs all gates in one process; they are shared out here (shard='gates')")
    tol, curvature_tol = check_positive(tol, "tol"), check_positive(curvature_tol, "curvature_tol")
    second_order = check_flag(second_order, "second_order")
    check_integer(max_products, "max_products")
    padding = check_flag(padding, "padding")
    factors, intercept, dual = _read_result(factors, intercept, dual)
    point = evaluate(problem, factors=factors, intercept=intercept)
    assert point.factors is not None
    if point.factors[0].shape[2] == 0:
        raise InvalidInputError("factors have no columns (m = 0); at least one per gate is wanted")
    relu = problem.activation == "relu"
    if padding and not relu:
        raise InvalidInputError(f"padding is True for activation {problem.activation!r}; it is for 'relu' only")
    certificate = certify(
        problem,
        factors=point.factors,
        intercept=point.intercept,
        dual=dual,
        seconds=_SECONDS if relu else None,
    )
    gap = true_gap(problem, optimum, certificate)
    nu = problem.loss.gradient(point.predictions, problem.Y64, problem.weights)
    options = Options(tol, curvature_tol, second_order, max_products, padding)
    judged = (
        judge_cones(problem, point, certificate, nu, options, gap)
        if relu
        else judge_factors(problem, point, certificate, nu, options)
    )
    found, facts = judged.found, judged.facts
    return Diagnosis(
        status=judged.status,
        verdict=judged.verdict,
        advice=judged.advice,
        activation=problem.activation,
        norm=problem.norm.name,
        scope=problem.scope,
        tol=tol,
        certificate=certificate,
        stationary=facts.stationary,
        stationarity=found.overall,
        residual_left=found.left,
        residual_right=found.right,
        residual_intercept=found.intercept,
        balance=overall_balance(problem, point),
        m=facts.m,
        d_c=facts.d_c,
        d_r=facts.d_r,
        curvature=judged.curvature,
        curvature_threshold=judged.curvature_threshold,
        duality_gap=certificate.relative_gap,
        theorem_bound=facts.theorem_bound,
        true_gap=gap,
        theorems=judged.theorems,
        gates=judged.gates,
        unavailable=_unavailable(problem, second_order),
        faces=judged.faces,
        witness=judged.witness,
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


def _unavailable(problem: Problem, second_order: bool) -> tuple[str, ...]:
    if problem.norm.name != "nuclear":
        return (f"(68), (69) and the Hessian for the norm {problem.norm.name!r}: only a radial residual",)
    return () if second_order else ("second order: second_order=False",)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
