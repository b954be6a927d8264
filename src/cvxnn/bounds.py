"""Lower bounds of the optimum from dual points, with everything that rounding can take subtracted (math section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cvxnn.dual_norms import Neurons, price_cones
from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem

__all__ = ["DualBound", "dual_bound", "dual_bound_from", "intercept_leak", "worst_neuron"]

_EPS = 2.0**-53
#: More than what underflow can take from a dual norm, and the smallest scale whose rounding is still relative.
_UNDERFLOW = 2.0**-1000
_SMALLEST_SCALE = 2.0**-900


@dataclass(frozen=True)
class DualBound:
    """A lower bound of the optimum from one dual candidate nu, and what was found on the way."""

    lower_bound: float
    norms_lower: torch.Tensor
    norms_upper: torch.Tensor
    #: Upper bounds (P,) for the multiple of nu that the bound is of; 0 where it is that of the dual point 0.
    feasible_norms: torch.Tensor

    @property
    def dual_norm(self) -> float:
        """Upper bound of q = max_k ||A_k*(nu)||_D*."""
        return float(self.norms_upper.max())


#: Bounds of the dual norms of the blocks of A*(nu), each known up to an error of this Frobenius norm.
DualNorms = Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def dual_bound(
    problem: Problem, nu: torch.Tensor, seconds: float | None = None, norms: DualNorms | None = None
) -> DualBound:
    """Lower bound -F*(s nu) with the best s, |s| q(nu) <= beta, rounding subtracted.

    Parameters
    ----------
    nu : torch.Tensor of shape (n, c), float64
        Any dual direction; with an output bias it must come from ``center_dual``.
        What rounding leaves of 1^T nu = 0 is covered by :func:`intercept_leak`.
    seconds : float, optional
        About so long to spend on the dual norms of ReLU problems; the bound is sound however early they stop.
    norms : callable, optional
        Gives lower and upper bounds (P,) in place of :meth:`Problem.dual_norms`, for nu scaled by a power of two;
        the bound is as sound as the largest of the upper ones.

    Notes
    -----
    The blocks of A*(nu) are formed a few gates at a time (:meth:`Operator.gate_batches`) and not kept.
    """
    nu, exponent = _normalised(problem.loss.round_to_domain(nu, problem.Y64, problem.weights))
    error, leak_size = _adjoint_error(problem, nu)
    lower, upper = problem.dual_norms(nu, error, seconds) if norms is None else norms(nu, error)
    bound, scale = _best_multiple(problem, nu, float(upper.max()), leak_size)
    feasible = upper * (scale * (1 + 4 * _EPS)) if scale > 0 else torch.zeros_like(upper)
    return DualBound(bound, _times_power(lower, exponent), _times_power(upper, exponent), feasible)


def dual_bound_from(problem: Problem, nu: torch.Tensor, dual_norm: Callable[[torch.Tensor, float], float]) -> float:
    """Lower bound -F*(s nu) as in :func:`dual_bound`, with another upper bound of the dual norm.

    Parameters
    ----------
    dual_norm : callable
        Gets nu, scaled by a power of two, and a bound on the Frobenius norm of an error of each block; returns
        an upper bound of q for all blocks within it. The bound then holds for whatever q was a maximum over.
    """
    nu, _ = _normalised(problem.loss.round_to_domain(nu, problem.Y64, problem.weights))
    error, leak_size = _adjoint_error(problem, nu)
    return _best_multiple(problem, nu, dual_norm(nu, error), leak_size)[0]


def _adjoint_error(problem: Problem, nu: torch.Tensor) -> tuple[float, float]:
    """Bound of the error in each block of A*(nu), and what an intercept costs per unit of scale."""
    leak_error, leak_size = intercept_leak(problem, nu)
    error = problem.operator.double().adjoint_rounding(nu) + leak_error
    return math.inf if math.isnan(error) else error, leak_size


def _best_multiple(problem: Problem, nu: torch.Tensor, dual_norm: float, leak_size: float) -> tuple[float, float]:
    """The best -F*(s nu), s * dual_norm <= beta, less rounding, and s; at least the infimum of F, that of s = 0."""
    q = dual_norm + _UNDERFLOW
    Y, w = problem.Y64, problem.weights
    s_max = problem.beta / q * (1 - 8 * _EPS)
    scale = problem.loss.dual_scale(nu, Y, w, s_max) if s_max >= _SMALLEST_SCALE else 0.0
    at_zero = float(problem.loss.conjugate_terms_magnitude(torch.zeros_like(nu), Y, w))
    bound, best = max(0.0, problem.loss.infimum(Y, w) - 4 * nu.numel() * _EPS * at_zero), 0.0
    if scale > 0 and math.isfinite(scale):
        scaled = scale * nu
        conjugate = float(problem.loss.conjugate(scaled, Y, w))
        terms = float(problem.loss.conjugate_terms_magnitude(scaled, Y, w))
        allowance = nu.numel() * (4 * _EPS * terms + torch.finfo(nu.dtype).tiny)
        allowance += scale * leak_size
        if math.isfinite(conjugate) and -conjugate - allowance > bound:
            bound, best = -conjugate - allowance, scale
    return bound, best


def worst_neuron(problem: Problem, nu: torch.Tensor) -> Neurons:
    """The neuron of a ReLU problem along which the loss falls fastest, a list of one.

    Parameters
    ----------
    nu : torch.Tensor of shape (n, c), float64
        Gradient of the loss, as from :meth:`Problem.dual_candidate`.

    Raises
    ------
    InvalidInputError
        The problem has no cones.
    """
    if problem.cones is None:
        raise InvalidInputError(f"problem has activation {problem.activation!r}; 'relu' is wanted")
    op = problem.operator.double()
    neurons = price_cones(op, problem.norm, problem.cones, nu, op.adjoint_rounding(nu)).neurons
    return neurons[neurons.lower.argmax().unsqueeze(0)]


def intercept_leak(problem: Problem, nu: torch.Tensor) -> tuple[float, float]:
    """What delta = 1^T nu, not exactly 0, can cost: an error of A*(nu), and an amount per unit of scale.

    With an intercept b the bound is off by delta . b. Where the objective is no more than at Z = 0, b = 0, the
    entries of b are at most B + 2 R Omega(Z), with R the largest norm that a prediction can have where Omega is
    1, and B from the loss alone (:meth:`Loss.intercept_bound`). The part with Omega acts like an error of
    2 R ||delta||_1 in A*(nu), the other one is subtracted. Where B is infinite, as for a class that no sample
    has, delta must be exactly 0 (:meth:`Loss.center_dual`); its intercept then costs nothing.
    """
    if not problem.output_bias:
        return 0.0, 0.0
    rounding = 2 * len(nu).bit_length() * _EPS * nu.abs().sum(0)
    delta = _pairwise_sum(nu).abs() + rounding
    zero = torch.zeros_like(problem.Y64)
    value = float(problem.loss.value(zero, problem.Y64, problem.weights))
    sizes = problem.loss.intercept_bound(value, problem.Y64, problem.weights)
    cost = float(torch.where(delta > 0, delta * sizes, 0.0).sum())
    return 2 * problem.operator.double().prediction_norm * float(delta.sum()), cost


def _pairwise_sum(values: torch.Tensor) -> torch.Tensor:
    """Column sums by repeated halving: at most log2(rows) + 1 roundings of each term."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        folded = values[:half].clone()
        folded[: len(values) - half] += values[half:]
        values = folded
    return values[0]


def _normalised(nu: torch.Tensor) -> tuple[torch.Tensor, int]:
    """nu / 2^k with its largest entry in [1/2, 1), and k: no product with it over- or underflows by its size."""
    largest = float(nu.abs().max())
    exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    return _times_power(nu, -exponent), exponent


def _times_power(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """values * 2^exponent, also where 2^exponent is out of range."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)
