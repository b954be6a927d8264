"""How far a point is from an optimum that is known from elsewhere."""

from __future__ import annotations

import math
from typing import Any

from cvxnn.certificates import Certificate, relative_gap
from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem

__all__ = ["true_gap"]

#: An optimum may be above the objective by this fraction of it, as it may have been computed roughly.
_SLACK = 1e-3


def _same_problem(a: Problem, b: Problem) -> bool:
    """Whether two problems have the same data, gates, loss and norm; beta is compared elsewhere."""
    pairs = [(a.Y64, b.Y64), (a.weights, b.weights), (a.patterns, b.patterns)]
    pairs += list(zip(a.operator.double().data_tensors(), b.operator.double().data_tensors(), strict=True))
    facts = [(p.activation, repr(p.loss), p.norm.name, p.output_bias) for p in (a, b)]
    return facts[0] == facts[1] and all(x.shape == y.shape and bool((x == y).all()) for x, y in pairs)


def true_gap(problem: Problem, optimum: Any, certificate: Certificate) -> tuple[float, float] | None:
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
