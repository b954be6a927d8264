"""What a diagnosis says, as lines for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cvxnn.certificates import STATIONARITY_TOLERANCE
from cvxnn.cone_points import FaceFacts
from cvxnn.cone_witness import DescentNeuron
from cvxnn.theorems import short

if TYPE_CHECKING:
    from cvxnn.diagnosis import Diagnosis

__all__ = ["diagnosis_table"]

_SHOWN_GATES = 8


def diagnosis_table(diagnosis: Diagnosis) -> str:
    """The verdict, numbers, theorems and worst gates."""
    advice = [diagnosis.advice] if diagnosis.advice else []
    parts = [_facts(diagnosis), _theorem_lines(diagnosis), _gate_lines(diagnosis)]
    return "\n".join([diagnosis.verdict, *advice, *(line for part in parts for line in ("", *part))])


def _left_name(diagnosis: Diagnosis) -> str:
    return "(72)" if diagnosis.activation == "relu" else "(68)"


def _facts(diagnosis: Diagnosis) -> list[str]:
    cert, curvature = diagnosis.certificate, diagnosis.curvature
    kind = "" if diagnosis.norm == "nuclear" else "radial, "
    parts = [
        (_left_name(diagnosis), diagnosis.residual_left),
        ("(69)", diagnosis.residual_right),
        ("intercept", diagnosis.residual_intercept),
    ]
    parts_text = "".join(f", {name} {value:.1e}" for name, value in parts if value is not None)
    answer = "stationary" if diagnosis.stationary else "not stationary"
    bound = f"none: stationarity is above {min(diagnosis.tol, STATIONARITY_TOLERANCE):g}"
    if diagnosis.theorem_bound is not None:
        bound = f"{diagnosis.theorem_bound:.2e}"
    elif diagnosis.stationary and diagnosis.stationarity <= STATIONARITY_TOLERANCE:
        bound = "none"
    proven = diagnosis.faces is not None and diagnosis.faces.proven
    eigenvalue = "not needed: no small change is better" if proven else "not computed"
    if curvature is not None:
        close = "" if curvature.converged else ", an upper bound only: Lanczos did not converge"
        place = ""
        if abs(curvature.value) <= diagnosis.curvature_threshold:
            place = ", zero within the tolerance"
        elif curvature.value < 0:
            place = f", {curvature.share:.0%} in gate {curvature.gate}"
        eigenvalue = f"{short(curvature.value)} (residual {curvature.residual:.1e}{place}{close})"
        if diagnosis.activation == "relu" and curvature.method == "free column":
            eigenvalue = f"{short(curvature.value)} at most, of a column of zeros in gate {curvature.gate}"
    ranks = [entry.rank for entry in diagnosis.gates]
    rows = [
        ("objective", f"{cert.primal:.8g}, at least {cert.lower_bound:.8g} is needed ({diagnosis.scope})"),
        ("stationarity", f"{diagnosis.stationarity:.1e}, {kind}{answer} to {diagnosis.tol:g}{parts_text}"),
        ("balance", f"{diagnosis.balance:.1e}"),
        ("columns per gate", f"m = {diagnosis.m}, min(d_c, d_r) = {min(diagnosis.d_c, diagnosis.d_r)}, "
         f"d_c + d_r = {diagnosis.d_c + diagnosis.d_r}"),
        ("rank of [U; V]", ", ".join(f"{rank} in {_count(ranks.count(rank))}" for rank in sorted(set(ranks)))),
        *_cone_rows(diagnosis),
        ("smallest eigenvalue", eigenvalue),
        ("Theorem 3.4", bound),
        ("duality gap", f"{diagnosis.duality_gap:.2e}"),
        ("true gap", "optimum not given" if diagnosis.true_gap is None else _interval(diagnosis.true_gap)),
    ]  # fmt: skip
    rows += [("not available", text) for text in diagnosis.unavailable]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _cone_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """What there is for ReLU only."""
    rows = []
    if diagnosis.activation == "relu":
        rows.append(("outside the cones", f"{abs(diagnosis.certificate.infeasibility):.1e}"))
    if diagnosis.faces is not None:
        rows += _face_rows(diagnosis.faces)
    if diagnosis.witness is not None:
        rows.append(("witness", _witness_text(diagnosis.witness)))
    return rows


def _theorem_lines(diagnosis: Diagnosis) -> list[str]:
    width = max(len(entry.name) for entry in diagnosis.theorems)
    lines = [f"{'theorem':<{width}}  applies  what follows, or why not"]
    for entry in diagnosis.theorems:
        text = entry.conclusion if entry.applies else entry.reason
        lines.append(f"{entry.name:<{width}}  {'yes' if entry.applies else 'no':<7}  {text}")
    return lines


def _gate_lines(diagnosis: Diagnosis) -> list[str]:
    worst = sorted(diagnosis.gates, key=lambda entry: -entry.dual_norm_ratio)[:_SHOWN_GATES]
    name = _left_name(diagnosis)
    lines = [f"gate  ||G_k||/beta  rank U  rank V      {name}      (69)   balance  eigenvalue at most"]
    for entry in worst:
        left, right, bound = map(_cell, (entry.residual_left, entry.residual_right, entry.curvature_bound))
        lines.append(
            f"{entry.gate:>4}  {entry.dual_norm_ratio:>12.8g}  {entry.rank_left:>6}  {entry.rank_right:>6}"
            f"  {left:>8}  {right:>8}  {_cell(entry.balance):>8}  {bound:>18}"
        )
    if len(worst) < len(diagnosis.gates):
        violated = sum(entry.dual_norm_ratio > 1 + diagnosis.tol for entry in diagnosis.gates)
        lines.append(f"the worst {len(worst)} of {len(diagnosis.gates)} gates; {violated} have ||G_k|| > beta")
    if diagnosis.activation == "relu":
        lines.append("||G_k|| is the largest ||G_k^T u|| of unit vectors u in the cone, or a bound of it")
    return lines


def _face_rows(faces: FaceFacts) -> list[tuple[str, str]]:
    padding = f", {faces.n_padding} of padding" if faces.n_padding else ""
    least = "" if faces.least_multiplier is None else f", multipliers from {faces.least_multiplier:.1e} beta"
    weak = f", {faces.n_weak} active rows without one" if faces.n_weak else ""
    rows = [
        ("columns", f"{faces.n_columns} in use, {faces.n_zero} of zeros{padding}"),
        ("faces of the cones", f"{faces.n_on_faces} columns on them{least}{weak}"),
        ("||P_S G_k||_2 / beta", f"{faces.ratio:.8g} at most, S the span of the face of a column"),
    ]
    if faces.proven:
        among = "any feasible u" if faces.radius == math.inf else f"v within a relative {faces.radius:.1e}"
        rows.append(("minimum among", among))
    if faces.crossing is not None:
        rows.append(("in the next cells", f"residual {faces.crossing:.1e} of {faces.n_crossings} neighbours"))
    return rows


def _witness_text(witness: DescentNeuron) -> str:
    return (
        f"||G_k^T u|| = {witness.ratio:.4g} beta in gate {witness.gate}; added with step {witness.step:.4g} it lowers"
        f" the objective by {witness.decrease:.4g}"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _interval(gap: tuple[float, float]) -> str:
    low, high = gap
    return f"{high:.2e}" if low == high else f"{low:.2e} to {high:.2e}"


def _count(n: int) -> str:
    return "1 gate" if n == 1 else f"{n} gates"
