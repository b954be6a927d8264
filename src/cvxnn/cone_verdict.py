"""The verdict about a point of the ReLU problem (19), in words."""

from __future__ import annotations

from collections.abc import Sequence

from cvxnn.certificates import Certificate
from cvxnn.cone_points import SLACK, ConePoint
from cvxnn.cone_witness import DescentNeuron
from cvxnn.cones import FEASIBILITY
from cvxnn.theorems import PointFacts, Theorem, global_proof, proven_gap, short

__all__ = ["cone_verdict"]


def cone_verdict(
    facts: PointFacts,
    entries: Sequence[Theorem],
    certificate: Certificate,
    stationarity: float,
    found: ConePoint | None,
    true_gap: tuple[float, float] | None,
) -> tuple[str, str, str]:
    """Status, the sentence for it, and what follows from it.

    Parameters
    ----------
    found : ConePoint or None
        Of points that are stationary and not yet known to be global optima.
    true_gap : pair of float or None
        Bounds of (p - p*) / p*.
    """
    proof, proven = global_proof(facts, entries, certificate), proven_gap(certificate)
    if proof:
        return "global_optimum", proof, ""
    if certificate.infeasibility > FEASIBILITY:
        outside = f"columns leave their cones by {certificate.infeasibility:.1e}"
        return "infeasible", f"infeasible, no point of (19): {outside}; {proven}", "Cones.repair moves columns inside"
    if found is None:
        return "not_stationary", f"not stationary: relative residual {stationarity:.1e}; {proven}", ""
    return _stationary(facts, found, proven, true_gap)


def _stationary(
    facts: PointFacts, found: ConePoint, proven: str, true_gap: tuple[float, float] | None
) -> tuple[str, str, str]:
    """The verdict about a stationary point."""
    faces, way = found.faces, _way_down(found.witness)
    reasons = {
        "not looked at": "stationary, second order was not looked at",
        "weak": "negative curvature found, but only across active rows without a clear multiplier",
        "unconverged": "no negative curvature found, but Lanczos did not converge",
        "open": "no way down found, but the bounds of the norms over the cones do not exclude one",
    }
    if found.conclusion == "crossing":
        residual = f"relative residual {faces.crossing:.1e} in the next cell"
        text = f"not stationary as a network: a neuron on the boundary of two cells has a {residual}; {proven}"
        return "not_stationary", text, way
    if found.conclusion == "free column":
        text = "saddle, not a local minimum: a column of zeros leads down"
        if found.witness is not None and found.curvature is not None:
            ratio, gate = found.witness.ratio, found.witness.gate
            text += f", ||G_k^T u|| is {ratio:.4g} beta for a u in the cone of gate {gate}"
        return "saddle", f"{text}; {proven}", way
    if found.conclusion == "saddle" and found.curvature is not None:
        place = f"smallest eigenvalue on the faces {short(found.curvature.value)} in gate {found.curvature.gate}"
        return "saddle", f"saddle, not a local minimum: {place}; {proven}", way
    if found.conclusion in reasons:
        return "undecided", f"{reasons[found.conclusion]}; {proven}", way
    globally = "whether it is global is open"
    if found.witness is not None and found.witness.ratio > 1 + SLACK * facts.tol:
        among = "not global" if found.witness.fits else "not global among wider networks"
        globally = f"{among}: ||G_k^T u|| is {found.witness.ratio:.4g} beta for a u in gate {found.witness.gate}"
    elif true_gap is not None and true_gap[0] > facts.tol:
        globally = "not global: the optimum is lower"
    kind = (
        "local minimum" if faces.proven else "no negative curvature found: a local minimum as far as second order tells"
    )
    return "local_minimum", f"{kind}, {globally}; {proven}", way


def _way_down(witness: DescentNeuron | None) -> str:
    if witness is None:
        return ""
    room = "" if witness.fits else ", all columns being in use"
    return (
        f"the witness, a further column in gate {witness.gate}, lowers the objective by {witness.decrease:.4g}"
        f" (step {witness.step:.4g}){room}"
    )
