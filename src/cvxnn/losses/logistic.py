"""Logistic loss of each output on its own, with targets in [0, 1]."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cvxnn.errors import InvalidInputError
from cvxnn.losses.base import (
    EntropyLoss,
    finite_or_infinity,
    per_sample,
    unused_rows_are_zero,
    used_rows,
    weighted_mean,
    weighted_rows,
    weighted_sum,
)
from cvxnn.losses.roots import increasing_root


def _error(T: Tensor, Y: Tensor) -> Tensor:
    """sigmoid(T) - Y, without cancellation where Y is 0 or 1."""
    return (1 - Y) * torch.sigmoid(T) - Y * torch.sigmoid(-T)


def _logs(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of two numbers that sum to one, each taken from the smaller of them."""
    log_up = torch.where(down < 0.5, torch.log1p(-down.clamp(max=0.5)), up.log())
    log_down = torch.where(up < 0.5, torch.log1p(-up.clamp(max=0.5)), down.log())
    return log_up, log_down


def _product(factor: Tensor, log: Tensor) -> Tensor:
    """factor * log, 0 where the factor is 0."""
    return torch.where(factor == 0, 0.0, factor * log)


@dataclass(frozen=True)
class Logistic(EntropyLoss):
    """f(t, y) = sum over outputs of log(1 + exp(t)) - y t, with y in [0, 1]."""

    name: ClassVar[str] = "logistic"
    smoothness: ClassVar[float] = 0.25

    def check_targets(self, Y: Tensor) -> None:
        """Raise `InvalidInputError` unless ``Y`` (n, c) is floating, finite, and in [0, 1]."""
        super().check_targets(Y)
        bad = (Y < 0) | (Y > 1)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise InvalidInputError(
                f"Y[{row}, {column}] is {float(Y[row, column])}; the logistic loss wants targets in [0, 1]."
            )

    def value(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F(T), a 0-d tensor: a sum of non-negative terms."""
        return weighted_sum(-(1 - Y) * logsigmoid(-T) - Y * logsigmoid(T), w)

    def gradient(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """w (sigmoid(T) - Y), (n, c)."""
        return weighted_rows(_error(T, Y), w)

    def hessian_product(self, T: Tensor, Y: Tensor, w: Tensor, D: Tensor) -> Tensor:
        """w p (1 - p) D, p the sigmoid of T, (..., n, c)."""
        return weighted_rows(torch.sigmoid(T) * torch.sigmoid(-T) * D, w)

    def _terms(self, L: Tensor, Y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two terms of f* for each entry, (n, c), and whether ``L`` is in the domain, 0-d."""
        scaled, targets = per_sample(L, w), used_rows(Y, w)
        up, down = targets + scaled, (1 - targets) - scaled
        inside = (torch.minimum(up, down) >= -16 * torch.finfo(L.dtype).eps).all()
        up, down = up.clamp(min=0), down.clamp(min=0)
        log_up, log_down = _logs(up, down)
        return _product(up, log_up), _product(down, log_down), inside & unused_rows_are_zero(L, w)

    def conjugate(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F*(L) = sum w (Q log Q + (1 - Q) log(1 - Q)), Q = L / w + Y in [0, 1]; a 0-d tensor.

        Infinite where an entry of Q is more than 16 eps outside of [0, 1], or a row of weight 0 is not 0.
        """
        first, second, inside = self._terms(L, Y, w)
        return finite_or_infinity(weighted_sum(first + second, w), inside)

    def conjugate_terms_magnitude(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Sum of w |Q log Q|, w |(1 - Q) log(1 - Q)| and |L|, a 0-d tensor."""
        first, second, _ = self._terms(L, Y, w)
        return weighted_sum(first.abs() + second.abs(), w) + L.abs().sum()

    def prox(self, T: Tensor, Y: Tensor, w: Tensor, sigma: float, start: Tensor | None = None) -> Tensor:
        """Minimiser over S of F(S) + sigma/2 ||S - T||_F^2, (n, c).

        With a = w / sigma, and signs chosen so that the root is not negative, S solves s - tau = a
        sigmoid(-s) with tau = t - a (1 - y). The root is between max(tau, 0) and max(max(tau, 0) + 1, log
        a).
        """
        weight, targets = w[:, None] / sigma, used_rows(Y, w)
        points = used_rows(T, w)
        sign = torch.where(points >= weight * (0.5 - targets), 1.0, -1.0).to(T.dtype)
        tau = sign * points - weight * torch.where(sign > 0, 1 - targets, targets)
        lower = tau.clamp(min=0)
        upper = torch.maximum(lower + 1, weight.clamp(min=1).log())

        def residual(s: Tensor) -> tuple[Tensor, Tensor]:
            low = torch.sigmoid(-s)
            return s - tau - weight * low, 1 + weight * low * (1 - low)

        first = lower if start is None else sign * start
        tolerance = math.sqrt(torch.finfo(T.dtype).eps)
        S = sign * increasing_root(residual, lower, upper, start=first, tolerance=tolerance)
        low, high = torch.sigmoid(S), torch.sigmoid(-S)
        gradient = S - points + weight * ((1 - targets) * low - targets * high)
        S = S - gradient / (1 + weight * low * high)
        return torch.where(w[:, None] > 0, S, T)

    def best_intercept(self, T: Tensor, Y: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
        """Minimiser (c,) over b of F(T + 1 b^T), one root for each output.

        Where all targets of an output are 0 (or all are 1) no minimiser exists: the result then makes every
        predicted probability at most (at least) about eps away from the targets.
        """
        keep = w > 0
        T, Y, weight = T[keep], Y[keep], w[keep]
        if not len(weight):
            return T.new_zeros(T.shape[1])
        eps = torch.finfo(T.dtype).eps
        logit = torch.logit(weighted_mean(Y, weight).clamp(eps, 1 - eps))

        def slope(b: Tensor) -> tuple[Tensor, Tensor]:
            up, down = torch.sigmoid(T + b), torch.sigmoid(-T - b)
            first = weight[:, None] * ((1 - Y) * up - Y * down)
            return first.sum(0), (weight[:, None] * up * down).sum(0)

        first = logit - weighted_mean(T, weight) if start is None else start
        lower, upper = logit - T.amax(0), logit - T.amin(0)
        return increasing_root(slope, lower, upper, start=first, tolerance=2 * eps)

    def center_dual(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Dual candidate (n, c) near ``nu`` with zero column sums, and Q = nu / w + Y in [0, 1].

        Each column of Q is moved to the mean target by the smallest share t that brings it into [0, 1]: the
        construction of section 3 of the maths, with bounds on both sides.
        """
        targets = used_rows(Y, w)
        means = weighted_mean(targets, w)
        shift = per_sample(nu, w)
        for _ in range(2):
            shift = shift - weighted_mean(shift, w)
        below, above = -(targets + shift), (targets - 1) + shift
        share = torch.maximum(
            torch.where(below > 0, below / (means + below), 0.0),
            torch.where(above > 0, above / ((1 - means) + above), 0.0),
        )
        share = used_rows(share, w).amax(0) * (1 + 8 * torch.finfo(nu.dtype).eps)
        share = share.clamp(max=1)
        return weighted_rows((1 - share) * shift + share * (means - targets), w)

    def round_to_domain(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Entries with target 0 at least 0, entries with target 1 at most 0."""
        nu = used_rows(nu, w)
        nu = torch.where(Y > 0, nu, nu.clamp(min=0))
        return torch.where(Y < 1, nu, nu.clamp(max=0))

    def intercept_bound(self, value: float, Y: Tensor, w: Tensor) -> Tensor:
        """t <= value / (w_i (1 - Y_ic)) and -t <= value / (w_i Y_ic) at every sample; infinite for one class."""
        ones = (w[:, None] * used_rows(Y, w)).amax(0)
        zeros = (w[:, None] * used_rows(1 - Y, w)).amax(0)
        return value / torch.minimum(ones, zeros)

    def largest_scale(self, nu: Tensor, Y: Tensor, w: Tensor) -> float:
        """Supremum of the s >= 0 with s ``nu`` in the domain of F*, rounded down.

        An entry of nu / w of the wrong sign where the target is 0 or 1 gives 0, unless it is at most 16 eps
        in absolute value: then s may grow until the tolerance of `conjugate` is used up.
        """
        if not bool(unused_rows_are_zero(nu, w)):
            return 0.0
        scaled, targets = per_sample(nu, w), used_rows(Y, w)
        eps = torch.finfo(nu.dtype).eps
        room = torch.where(scaled > 0, 1 - targets, targets)
        slack = torch.where(scaled.abs() <= 16 * eps, 8 * eps, 0.0)
        limits = torch.where(room > 0, room, slack) / scaled.abs()
        limits = torch.where(scaled == 0, torch.inf, limits)
        return float(limits.amin()) * (1 - 4 * eps)

    def _conjugate_derivatives(self, s: float, nu: Tensor, Y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        scaled, targets = per_sample(nu, w), used_rows(Y, w)
        room = torch.where(scaled > 0, 1 - targets, targets)
        scaled = torch.where(room > 0, scaled, 0.0)
        up, down = (targets + s * scaled).clamp(min=0), ((1 - targets) - s * scaled).clamp(min=0)
        log_up, log_down = _logs(up, down)
        second = torch.where(scaled == 0, 0.0, scaled.square() / (up * down))
        return weighted_sum(_product(scaled, log_up - log_down), w), weighted_sum(second, w)
