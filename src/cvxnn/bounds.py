"""Lower bounds of the optimum from dual points, with everything that rounding can take subtracted (math section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cvxnn.problem import Problem

__all__ = ["DualBound", "dual_bound"]

_EPS = 2.0**-53
#: More than what underflow can take from a dual norm, and the smallest scale whose rounding is still relative.
_UNDERFLOW = 2.0**-1000
_SMALLEST_SCALE = 2.0**-900


@dataclass(frozen=True)
class DualBound:
    """A lower bound of the optimum from one dual candidate nu, and what was found on the way."""

    lower_bound: float
    blocks: torch.Tensor
    norms_lower: torch.Tensor
    norms_upper: torch.Tensor

    @property
    def dual_norm(self) -> float:
        """Upper bound of q = max_k ||A_k*(nu)||_D*."""
        return float(self.norms_upper.max())


def dual_bound(problem: Problem, nu: torch.Tensor, magnitude: torch.Tensor) -> DualBound:
    """Lower bound -F*(s nu) with the best s, |s| q(nu) <= beta, rounding subtracted.

    Parameters
    ----------
    nu : torch.Tensor of shape (n, c), float64
        Any dual direction; with an output bias it must come from ``center_dual``.
    magnitude : torch.Tensor of shape (c,)
        Size of the intercepts that are to be covered; only what rounding leaves of 1^T nu = 0 is
        multiplied with it.
    """
    op = problem.operator.double()
    nu, exponent = _normalised(problem.loss.round_to_domain(nu, problem.Y64, problem.weights))
    blocks = op.adjoint(nu)
    n, c = nu.shape
    rounding = op.adjoint_rounding(nu) * (1 + c / n)
    lower, upper = problem.norm.dual(blocks, math.inf if math.isnan(rounding) else rounding)
    q = float(upper.max()) + _UNDERFLOW
    Y, w = problem.Y64, problem.weights
    s_max = problem.beta / q * (1 - 8 * _EPS)
    scale = problem.loss.dual_scale(nu, Y, w, s_max) if s_max >= _SMALLEST_SCALE else 0.0
    at_zero = float(problem.loss.conjugate_terms_magnitude(torch.zeros_like(nu), Y, w))
    bound = max(0.0, problem.loss.infimum(Y, w) - 4 * nu.numel() * _EPS * at_zero)
    if scale > 0 and math.isfinite(scale):
        scaled = scale * nu
        conjugate = float(problem.loss.conjugate(scaled, Y, w))
        terms = float(problem.loss.conjugate_terms_magnitude(scaled, Y, w))
        allowance = nu.numel() * (4 * _EPS * terms + torch.finfo(nu.dtype).tiny)
        if problem.output_bias:
            leak = scaled.sum(0).abs() + n * _EPS * scaled.abs().sum(0)
            allowance += float(leak @ magnitude)
        if math.isfinite(conjugate):
            bound = max(bound, -conjugate - allowance)
    blocks, lower, upper = (_times_power(part, exponent) for part in (blocks, lower, upper))
    return DualBound(bound, blocks, lower, upper)


def _normalised(nu: torch.Tensor) -> tuple[torch.Tensor, int]:
    """nu / 2^k with its largest entry in [1/2, 1), and k: no product with it over- or underflows by its size."""
    largest = float(nu.abs().max())
    exponent = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    return _times_power(nu, -exponent), exponent


def _times_power(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """values * 2^exponent, also where 2^exponent is out of range."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)
