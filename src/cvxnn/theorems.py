"""Which theorems of the paper say something about a point of (14), each with all that it asks for (math section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cvxnn.certificates import Certificate
from cvxnn.curvature import Curvature

__all__ = [
    "CONSISTENT",
    "PointFacts",
    "Theorem",
    "global_proof",
    "not_minimum",
    "proven_gap",
    "short",
    "theorems",
    "verdict",
]

#: A theorem that rests on numerical ranks is believed where ||G_k|| / beta exceeds 1 by at most so many times tol.
CONSISTENT = 10
SADDLE = "the point is a saddle"
GLOBAL = "global optimum"


@dataclass(frozen=True)
class Theorem:
    """Whether a statement of the paper (or beyond it) says something here.

    Attributes
    ----------
    name, statement : str
    applies : bool
        The statement is one about this kind of problem, and everything that it asks for holds.
    holds_everywhere : bool
        Whether its condition on the gates holds in every gate.
    failing_gates : tuple of int
        The gates where it fails.
    conclusion : str
        What follows where it applies.
    reason : str
        Why it does not apply; empty where it does.
    """

    name: str
    statement: str
    applies: bool
    holds_everywhere: bool
    failing_gates: tuple[int, ...]
    conclusion: str
    reason: str


@dataclass(frozen=True)
class PointFacts:
    """The numbers that the theorems rest on.

    Attributes
    ----------
    activation, norm : str
    m, d_c, d_r : int
    ratios : sequence of float
        ||G_k|| / beta.
    ranks_left, ranks_right, ranks : sequence of int
        Of U_k, V_k and [U_k; V_k].
    stationary : bool
    not_minimum : str
        Why the point is not a local minimum as far as second order tells; empty where it is one.
    theorem_bound : float or None
    tol : float
    gates : sequence of int, optional
        Indices of the gates that the sequences are about, where these are not all.
    """

    activation: str
    norm: str
    m: int
    d_c: int
    d_r: int
    ratios: Sequence[float]
    ranks_left: Sequence[int]
    ranks_right: Sequence[int]
    ranks: Sequence[int]
    stationary: bool
    not_minimum: str
    theorem_bound: float | None
    tol: float
    gates: Sequence[int] | None = None

    @property
    def constrained(self) -> bool:
        """Whether columns are constrained to cones, as for ReLU."""
        return self.activation not in ("linear", "gated_relu")

    @property
    def dual_norm(self) -> str:
        """What q is the largest of."""
        return "max ||G_k^T u|| over the unit u of the cone" if self.constrained else "||G_k||_2"

    @property
    def short_norm(self) -> str:
        """The same in tables."""
        return "max ||G_k^T u||" if self.constrained else "||G_k||"

    @property
    def blocked(self) -> str:
        """Why the theorems about l2 norms without constraints say nothing; empty where they do."""
        if self.constrained:
            return f"does not carry over to activation {self.activation!r}, whose columns are constrained to cones"
        if self.norm != "nuclear":
            return f"does not carry over to the norm {self.norm!r}; l2 with l2 is needed"
        return ""

    @property
    def full_rank(self) -> int:
        """min(d_c, d_r)."""
        return min(self.d_c, self.d_r)

    def failing(self, condition: Callable[[int], bool]) -> tuple[int, ...]:
        """The gates where a condition is not met."""
        return tuple(k for k in range(len(self.ratios)) if not condition(k))

    def named(self, places: Sequence[int]) -> tuple[int, ...]:
        """The gates at places of the sequences."""
        return tuple(places) if self.gates is None else tuple(self.gates[k] for k in places)

    def is_full(self, k: int) -> bool:
        """Full rank min(d_c, d_r) on both sides of gate k."""
        return self.ranks_left[k] == self.ranks_right[k] == self.full_rank

    def is_deficient(self, k: int) -> bool:
        """Fewer than m independent columns in [U_k; V_k]."""
        return self.ranks[k] < self.m


def theorems(facts: PointFacts) -> tuple[Theorem, ...]:
    """An entry for each of Theorems 2.1, 3.3 (two parts), 3.4, 3.5 and for two statements beyond the paper.

    With several gates every condition is asked for in every gate.
    """
    local, stationary = facts.not_minimum, "" if facts.stationary else "the point is not stationary"
    violated = facts.failing(lambda k: facts.ratios[k] <= 1 + facts.tol)
    either = facts.failing(lambda k: facts.is_full(k) or facts.is_deficient(k))
    spurious = f"no local minimum at m = {facts.m} is spurious"
    least = facts.full_rank
    return (
        _entry(
            facts,
            "Theorem 2.1",
            f"a stationary point with {facts.dual_norm} <= beta in every gate is a global optimum",
            violated,
            f"{facts.short_norm} > beta",
            stationary,
            GLOBAL,
            carries_over=facts.constrained,
        ),
        _entry(
            facts,
            "Theorem 3.3, m >= d_c + d_r",
            "all local minima are global where m >= d_c + d_r",
            facts.failing(lambda _: facts.m >= facts.d_c + facts.d_r),
            f"m = {facts.m} < d_c + d_r = {facts.d_c + facts.d_r}",
            "",
            spurious,
        ),
        _entry(
            facts,
            "Theorem 3.3, rank-deficient",
            "a local minimum with rank [U_k; V_k] < m in every gate is global",
            facts.failing(facts.is_deficient),
            f"rank [U; V] = m = {facts.m}",
            local,
            GLOBAL,
        ),
        _optimality_gap(facts, stationary),
        _entry(
            facts,
            "Theorem 3.5",
            "a stationary point with rank U_k = rank V_k = min(d_c, d_r) in every gate is a global optimum",
            facts.failing(facts.is_full),
            f"rank < min(d_c, d_r) = {least}",
            stationary,
            GLOBAL,
        ),
        _entry(
            facts,
            "beyond: m >= min(d_c, d_r)",
            "all local minima are global where m >= min(d_c, d_r)",
            facts.failing(lambda _: facts.m >= least),
            f"m = {facts.m} < min(d_c, d_r) = {least}",
            "",
            spurious,
        ),
        _entry(
            facts,
            "beyond: gate by gate",
            "a local minimum where each gate has full rank min(d_c, d_r) or rank [U_k; V_k] < m is global",
            either,
            f"rank [U; V] = m = {facts.m} < min(d_c, d_r) = {least}",
            local,
            GLOBAL,
        ),
    )


def _entry(
    facts: PointFacts,
    name: str,
    statement: str,
    failing: tuple[int, ...],
    failure: str,
    point: str,
    conclusion: str,
    carries_over: bool = False,
) -> Theorem:
    """An entry for linear and gated ReLU networks with l2 norms; `point` is an objection that is not about gates.

    With `carries_over` it is one for ReLU too.
    """
    n_gates = len(facts.ratios) if facts.gates is None else None
    objections = [f"{failure} in {name_gates(facts.named(failing), n_gates)}"] if failing else []
    objections += [point] if point else []
    inconsistent = facts.failing(lambda k: facts.ratios[k] <= 1 + CONSISTENT * facts.tol)
    if conclusion == GLOBAL and inconsistent and not objections:
        objections = [f"||G_k|| > beta in {name_gates(inconsistent)} contradicts the numerical ranks"]
    if conclusion == GLOBAL and facts.not_minimum == SADDLE and not objections:
        objections = ["negative curvature contradicts the numerical ranks"]
    if facts.blocked and not carries_over:
        objections = [facts.blocked]
    failing = facts.named(failing)
    return Theorem(name, statement, not objections, not failing, failing, conclusion, "; ".join(objections))


def _optimality_gap(facts: PointFacts, stationary: str) -> Theorem:
    """Theorem 3.4 holds for every pair of norms, and for ReLU with the maximum over the cones as q."""
    reason = stationary
    if not reason and facts.theorem_bound is None:
        reason = "the point is not stationary enough"
    conclusion = "" if facts.theorem_bound is None else f"at most {facts.theorem_bound:.2e} above p*, relative"
    over = f", q the largest {facts.dual_norm}" if facts.constrained else ""
    statement = f"(p - p*) / p* <= max(0, q / beta - 1) at a stationary point{over}"
    return Theorem("Theorem 3.4", statement, not reason, True, (), conclusion, reason)


def name_gates(gates: Sequence[int], n_gates: int | None = None) -> str:
    """A few gates by their numbers, many by their count."""
    if n_gates is not None and len(gates) == n_gates > 1:
        return "every gate"
    if len(gates) == 1:
        return f"gate {gates[0]}"
    if len(gates) <= 4:
        return f"gates {', '.join(map(str, gates))}"
    return f"{len(gates)} gates ({', '.join(map(str, gates[:3]))}, ...)"


def short(value: float) -> str:
    """Two digits, without zeros in the exponent: -3.1e-3."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def not_minimum(stationary: bool, curvature: Curvature | None, threshold: float) -> str:
    """Why a point is not a local minimum as far as second order tells; empty where it is one."""
    if not stationary:
        return "the point is not stationary"
    if curvature is None:
        return "second order was not looked at"
    if curvature.value < -threshold:
        return SADDLE
    return "" if curvature.converged else "Lanczos did not converge"


def proven_gap(certificate: Certificate) -> str:
    """The duality gap in words."""
    gap = certificate.relative_gap
    return "nothing is proven" if gap == math.inf else f"the proven gap is {gap:.1e}"


def global_proof(facts: PointFacts, entries: Sequence[Theorem], certificate: Certificate) -> str:
    """Why a point is a global optimum, in words; empty where nothing says so."""
    if certificate.relative_gap <= facts.tol:
        return f"global optimum (certified): relative gap {certificate.relative_gap:.1e}"
    proof = next((entry.name for entry in entries if entry.applies and entry.conclusion == GLOBAL), None)
    return "" if proof is None else f"global optimum ({proof}); {proven_gap(certificate)}"


def verdict(
    facts: PointFacts, entries: Sequence[Theorem], certificate: Certificate, stationarity: float,
    curvature: Curvature | None,
) -> tuple[str, str, str]:  # fmt: skip
    """Status, the sentence for it, and what follows from it."""
    proven, proof = proven_gap(certificate), global_proof(facts, entries, certificate)
    if certificate.relative_gap <= facts.tol:
        return "global_optimum", proof, ""
    if not facts.stationary:
        return "not_stationary", f"not stationary: relative residual {stationarity:.1e}; {proven}", ""
    if facts.blocked:
        return "undecided", f"stationary along the columns, nothing follows for the norm {facts.norm!r}; {proven}", ""
    if proof:
        return "global_optimum", proof, ""
    if curvature is None:
        return "undecided", f"stationary, second order was not looked at; {proven}", ""
    if facts.not_minimum == SADDLE:
        place = f"smallest eigenvalue {short(curvature.value)} in gate {curvature.gate}"
        return "saddle", f"saddle, not a local minimum: {place}", _way_out(facts)
    if facts.not_minimum:
        return "undecided", f"no negative curvature found, but Lanczos did not converge; {proven}", _way_out(facts)
    found = "no negative curvature found: a local minimum as far as second order tells"
    return "local_minimum", f"{found}; {proven}", _way_out(facts)


def _way_out(facts: PointFacts) -> str:
    """How to go on from a stationary point that is not a global optimum."""
    k = max(range(len(facts.ratios)), key=lambda gate: facts.ratios[gate])
    if facts.ratios[k] <= 1 + facts.tol:
        return ""
    seen = f"||G_k|| is {facts.ratios[k]:.4g} beta in gate {k}"
    if facts.is_deficient(k):
        return f"{seen}, which has a free column: along the top singular pair of -G_k the objective falls"
    if facts.m < facts.full_rank:
        return f"{seen}, whose columns are all in use: a further one along the top singular pair of -G_k leads down"
    return seen
