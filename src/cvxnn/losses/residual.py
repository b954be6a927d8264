"""Losses of the residual t - y: squared and Huber. Their conjugate is l^2 / 2 + l y, on a box for Huber."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cvxnn.errors import InvalidInputError
from cvxnn.losses.base import (
    Loss,
    finite_or_infinity,
    per_sample,
    unused_rows_are_zero,
    used_rows,
    weighted_mean,
    weighted_rows,
    weighted_sum,
)
from cvxnn.losses.roots import increasing_root


class ResidualLoss(Loss):
    """A loss with f*(l; y) = ||l||^2 / 2 + <l, y> for |l| <= bound, infinite elsewhere."""

    def _bound(self) -> float:
        """Largest absolute value of an entry of a gradient of f."""
        return math.inf

    def conjugate(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F*(L) = sum_i ||L_i||^2 / (2 w_i) + <L_i, y_i>, a 0-d tensor (maths, section 3).

        Infinite where a row of weight 0 is not 0, and for Huber where an entry of L_i / w_i is above
        ``delta * (1 + 16 eps)`` in absolute value.
        """
        scaled = per_sample(L, w)
        inside = (scaled.abs() <= self._bound() * (1 + 16 * torch.finfo(L.dtype).eps)).all()
        value = (L * (0.5 * scaled + used_rows(Y, w))).sum()
        return finite_or_infinity(value, inside & unused_rows_are_zero(L, w))

    def conjugate_terms_magnitude(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Sum of L^2 / (2 w) and |L Y|, a 0-d tensor."""
        return (L.abs() * (0.5 * per_sample(L, w).abs() + used_rows(Y, w).abs())).sum()

    def infimum(self, Y: Tensor, w: Tensor) -> float:
        """Infimum of F, 0."""
        return 0.0

    def center_dual(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """``nu`` less w times its column sums over sum w, (n, c); the second pass removes rounding errors."""
        total = w.sum()
        total = torch.where(total > 0, total, 1.0)
        centered = used_rows(nu, w)
        for _ in range(2):
            centered = centered - w[:, None] * (centered.sum(0) / total)
        return centered

    def largest_scale(self, nu: Tensor, Y: Tensor, w: Tensor) -> float:
        """Supremum of the s >= 0 with s ``nu`` in the domain of F*, rounded down."""
        if not bool(unused_rows_are_zero(nu, w)):
            return 0.0
        largest = float(per_sample(nu, w).abs().amax())
        return self._bound() / largest * (1 - 4 * torch.finfo(nu.dtype).eps) if largest > 0 else math.inf

    def dual_scale(self, nu: Tensor, Y: Tensor, w: Tensor, s_max: float) -> float:
        """The s in [0, min(s_max, largest_scale)] nearest to -<nu, Y> / sum(nu^2 / w); 0 for ``nu`` 0."""
        largest = float(nu.abs().amax())
        if largest == 0:
            return 0.0
        direction = nu / largest
        curvature = float((direction * per_sample(direction, w)).sum())
        end = min(s_max, self.largest_scale(nu, Y, w))
        best = -float((direction * used_rows(Y, w)).sum()) / curvature / largest if curvature > 0 else 0.0
        return max(0.0, min(best, end))


@dataclass(frozen=True)
class Squared(ResidualLoss):
    """f(t, y) = 1/2 ||t - y||^2."""

    name: ClassVar[str] = "squared"
    smoothness: ClassVar[float] = 1.0

    def value(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F(T), a 0-d tensor."""
        return 0.5 * weighted_sum((T - Y).square(), w)

    def gradient(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """w (T - Y), (n, c)."""
        return weighted_rows(T - Y, w)

    def hessian_product(self, T: Tensor, Y: Tensor, w: Tensor, D: Tensor) -> Tensor:
        """w D, (..., n, c)."""
        return weighted_rows(D, w)

    def prox(self, T: Tensor, Y: Tensor, w: Tensor, sigma: float, start: Tensor | None = None) -> Tensor:
        """(w Y + sigma T) / (w + sigma), (n, c)."""
        return torch.where(w[:, None] > 0, (w[:, None] * Y + sigma * T) / (w[:, None] + sigma), T)

    def best_intercept(self, T: Tensor, Y: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
        """Weighted mean of Y - T, (c,)."""
        first = weighted_mean(Y - T, w)
        return first + weighted_mean(Y - (T + first), w)

    def intercept_bound(self, value: float, Y: Tensor, w: Tensor) -> Tensor:
        """|Y| plus the weighted mean of |T - Y|, at most the root of 2 value / sum w."""
        return Y.abs().amax(0) + math.sqrt(2 * value / float(w.sum()))


@dataclass(frozen=True)
class Huber(ResidualLoss):
    """f(t, y) = sum over outputs of r^2 / 2 for |r| <= delta and delta |r| - delta^2 / 2 beyond, r = t - y.

    Parameters
    ----------
    delta : float
        Positive: where the loss turns linear.
    """

    delta: float = 1.0

    name: ClassVar[str] = "huber"
    smoothness: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Refuse a ``delta`` that is not a positive finite number."""
        if not (isinstance(self.delta, int | float) and 0 < self.delta < math.inf):
            raise InvalidInputError(f"delta is {self.delta!r}; wanted a positive finite number.")

    def _bound(self) -> float:
        return float(self.delta)

    def value(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F(T), a 0-d tensor."""
        size = (T - Y).abs()
        inner = size.clamp(max=self.delta)
        return weighted_sum(inner * (size - 0.5 * inner), w)

    def gradient(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """w clip(T - Y, -delta, delta), (n, c)."""
        return weighted_rows((T - Y).clamp(-self.delta, self.delta), w)

    def hessian_product(self, T: Tensor, Y: Tensor, w: Tensor, D: Tensor) -> Tensor:
        """w D where the error is at most delta, else 0, (..., n, c)."""
        return weighted_rows(torch.where((T - Y).abs() <= self.delta, D, 0.0), w)

    def prox(self, T: Tensor, Y: Tensor, w: Tensor, sigma: float, start: Tensor | None = None) -> Tensor:
        """Closed form, (n, c): that of the squared loss, or T moved by delta w / sigma where Y is far."""
        weight = w[:, None]
        residual = T - Y
        near = (weight * Y + sigma * T) / (weight + sigma)
        far = T - residual.sign() * (self.delta * weight / sigma)
        moved = torch.where(sigma * residual.abs() <= self.delta * (weight + sigma), near, far)
        return torch.where(weight > 0, moved, T)

    def best_intercept(self, T: Tensor, Y: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
        """Minimiser (c,) over b of F(T + 1 b^T): one root of a piecewise linear function per output."""
        keep = w > 0
        shift, weight = (Y - T)[keep], w[keep]
        if not len(weight):
            return T.new_zeros(T.shape[1])
        lower, upper = shift.amin(0), shift.amax(0)

        def slope(b: Tensor) -> tuple[Tensor, Tensor]:
            residual = b - shift
            inside = residual.abs() <= self.delta
            first = weight[:, None] * residual.clamp(-self.delta, self.delta)
            return first.sum(0), torch.where(inside, weight[:, None], 0.0).sum(0)

        first = (weight @ shift) / weight.sum() if start is None else start
        return increasing_root(slope, lower, upper, start=first, tolerance=2 * torch.finfo(T.dtype).eps)

    def intercept_bound(self, value: float, Y: Tensor, w: Tensor) -> Tensor:
        """|Y| plus the weighted mean of |T - Y|, as the loss is at least delta |t - y| - delta^2 / 2."""
        return Y.abs().amax(0) + value / (self.delta * float(w.sum())) + self.delta / 2
