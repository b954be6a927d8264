"""Softmax cross-entropy with targets in the probability simplex."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
from cvxnn.losses.softmax import balance, intercept, log_softmax, prox_rows, softmax_error

SUM_TOLERANCE = 1e-6


def _product(factor: Tensor, log: Tensor) -> Tensor:
    """factor * log, 0 where the factor is 0."""
    return torch.where(factor == 0, 0.0, factor * log)


@dataclass(frozen=True)
class _DualRows:
    """Rows of a dual point divided by their weights; rows of weight 0 are replaced by harmless ones.

    ``scaled`` (n, c) is L / w with the entry of the largest target set to minus the sum of the others;
    ``excess`` (n, 1) is the row sum before that, ``size`` (n, 1) the sum of absolute values, ``main`` (n, 1)
    the index of the largest target, ``mass`` (n, 1) the sum of the targets.
    """

    scaled: Tensor
    targets: Tensor
    main: Tensor
    mass: Tensor
    excess: Tensor
    size: Tensor

    @classmethod
    def of(cls, L: Tensor, Y: Tensor, w: Tensor) -> "_DualRows":
        raw, targets = per_sample(L, w), used_rows(Y, w)
        main = targets.argmax(1, keepdim=True)
        mass = torch.where(w[:, None] > 0, targets.sum(1, keepdim=True), 1.0)
        excess, size = raw.sum(1, keepdim=True), raw.abs().sum(1, keepdim=True)
        return cls(balance(raw, main), targets, main, mass, excess, size)

    def rounding(self) -> float:
        """Relative rounding tolerance of one row, 4 (c + 4) eps."""
        return 4 * (self.scaled.shape[1] + 4) * torch.finfo(self.scaled.dtype).eps

    def point(self, s: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Q = s L / w + Y clipped at 0, log(Q / mass), and the smallest entry of each row before clipping.

        The entry of the largest target is one minus the sum of the others, so that its logarithm is exact
        for small ``scaled`` (log1p).
        """
        Q = self.targets + s * self.scaled
        lowest = Q.amin(1, keepdim=True)
        Q = Q.clamp(min=0).scatter(1, self.main, 0.0)
        others = Q.sum(1, keepdim=True)
        ratio = (others / self.mass).clamp(max=1)
        logs = (Q / self.mass).log().scatter(1, self.main, torch.log1p(-ratio))
        return Q.scatter(1, self.main, self.mass * (1 - ratio)), logs, lowest


@dataclass(frozen=True)
class CrossEntropy(EntropyLoss):
    """f(t, y) = sum_c y_c (log sum_k exp(t_k) - t_c), with y in the probability simplex.

    Where a target sums to m instead of 1 (within 1e-6), every formula is that of this function, so that
    value, gradient m softmax(t) - y and conjugate stay exactly consistent.
    """

    name: ClassVar[str] = "cross_entropy"
    smoothness: ClassVar[float] = 0.5

    def check_targets(self, Y: Tensor) -> None:
        """Raise `InvalidInputError` unless ``Y`` (n, c) has c >= 2 and rows in the probability simplex.

        Entries must not be negative, and the rows must sum to 1 within 1e-6.
        """
        super().check_targets(Y)
        if Y.shape[1] < 2:
            raise InvalidInputError(
                f"Y has {Y.shape[1]} column; cross-entropy wants one column for each of at least two classes."
            )
        sums = Y.double().sum(1)
        bad = (Y < 0).any(1) | ((sums - 1).abs() > SUM_TOLERANCE)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InvalidInputError(
                f"Y[{row}] has smallest entry {float(Y[row].min()):g} and sum {float(sums[row]):g}; "
                f"cross-entropy wants non-negative rows that sum to 1 (within {SUM_TOLERANCE:g})."
            )

    def value(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F(T), a 0-d tensor: a sum of non-negative terms."""
        return weighted_sum(-Y * log_softmax(T), w)

    def gradient(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """w (softmax(T) - Y), (n, c); the entry of the largest target is minus the sum of the others."""
        return weighted_rows(softmax_error(T, used_rows(Y, w))[0], w)

    def hessian_product(self, T: Tensor, Y: Tensor, w: Tensor, D: Tensor) -> Tensor:
        """w (diag(p) - p p^T) D row by row, p the softmax of T (times the mass of the target), (..., n, c)."""
        mass = used_rows(Y, w).sum(1, keepdim=True)
        p = torch.softmax(T, dim=1)
        return weighted_rows(mass * p * (D - (p * D).sum(-1, keepdim=True)), w)

    def _terms(self, L: Tensor, Y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Terms Q log(Q / mass) (n, c), and whether ``L`` is in the domain, 0-d."""
        rows = _DualRows.of(L, Y, w)
        Q, logs, lowest = rows.point()
        tolerance = rows.rounding() * (rows.mass + rows.size)
        inside = ((lowest >= -tolerance) & (rows.excess.abs() <= tolerance)).all()
        return _product(Q, logs), inside & unused_rows_are_zero(L, w)

    def conjugate(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F*(L) = sum_i w_i sum_c Q_ic log Q_ic, Q_i = L_i / w_i + y_i in the simplex; a 0-d tensor.

        Infinite where an entry of Q_i is below 0, or the sum of L_i / w_i differs from 0, by more than
        4 (c + 4) eps (1 + ||L_i / w_i||_1), or where a row of weight 0 is not 0.
        """
        terms, inside = self._terms(L, Y, w)
        return finite_or_infinity(weighted_sum(terms, w), inside)

    def conjugate_terms_magnitude(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Sum of w |Q log Q| and |L|, a 0-d tensor."""
        return weighted_sum(self._terms(L, Y, w)[0].abs(), w) + L.abs().sum()

    def prox(self, T: Tensor, Y: Tensor, w: Tensor, sigma: float, start: Tensor | None = None) -> Tensor:
        """Minimiser over S of F(S) + sigma/2 ||S - T||_F^2, (n, c).

        Newton steps from ``start`` (or ``T``), and a scalar dual problem for the rows where these do not
        converge.
        """
        first = T if start is None else start
        S = prox_rows(used_rows(T, w), used_rows(Y, w), w / sigma, used_rows(first, w))
        return torch.where(w[:, None] > 0, S, T)

    def best_intercept(self, T: Tensor, Y: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
        """Minimiser (c,) of mean 0 over b of F(T + 1 b^T), by Newton steps with backtracking.

        A class without any target has no finite best value: its entry makes each of its predicted
        probabilities at most eps.
        """
        keep = w > 0
        if not bool(keep.any()):
            return T.new_zeros(T.shape[1])
        return intercept(T[keep], Y[keep], w[keep], start)

    def center_dual(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Dual candidate (n, c) near ``nu`` with zero column sums, and Q_i = nu_i / w_i + y_i in the simplex.

        Section 3 of the maths: with the weighted mean of nu / w taken away, Q is moved to the class
        frequencies by the smallest share t that makes it non-negative. Before that, what ``nu`` holds in
        classes without any target, where Q must be 0, goes to the other classes in proportion to their
        frequencies.
        """
        rows = _DualRows.of(nu, Y, w)
        frequencies = weighted_mean(rows.targets, w)
        total = frequencies.sum()
        frequencies = frequencies / torch.where(total > 0, total, 1.0)
        present = frequencies > 0
        absent_part = torch.where(present, 0.0, rows.scaled).sum(1, keepdim=True)
        shift = torch.where(present, rows.scaled + absent_part * frequencies, 0.0)
        for _ in range(2):
            shift = shift - weighted_mean(shift, w)
        inner = rows.mass * frequencies
        below = -(rows.targets + shift)
        shares = torch.where((below > 0) & present, below / (inner + below), 0.0)
        share = used_rows(shares, w).amax() * (1 + 8 * torch.finfo(nu.dtype).eps)
        share = share.clamp(max=1)
        moved = (1 - share) * shift + share * (inner - rows.targets)
        return weighted_rows(balance(moved, rows.main), w)

    def round_to_domain(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Entries of classes without target mass at least 0, and rows that sum to 0."""
        nu = used_rows(nu, w)
        return balance(torch.where(Y > 0, nu, nu.clamp(min=0)), Y.argmax(1, keepdim=True))

    def intercept_bound(self, value: float, Y: Tensor, w: Tensor) -> Tensor:
        """Differences t_j - t_c are at most value / (w_i Y_ic) at every sample; infinite for absent classes."""
        shares = (w[:, None] * used_rows(Y, w)).amax(0)
        return torch.where(shares > 0, value / shares, math.inf)

    def largest_scale(self, nu: Tensor, Y: Tensor, w: Tensor) -> float:
        """Supremum of the s >= 0 with s ``nu`` in the domain of F*, rounded down.

        Row sums other than 0, and negative entries where the target is 0, give 0. Where they are within the
        rounding tolerance of `conjugate`, s may grow until that is used up.
        """
        if not bool(unused_rows_are_zero(nu, w)):
            return 0.0
        rows = _DualRows.of(nu, Y, w)
        down = (-rows.scaled).clamp(min=0)
        strict = torch.where((down > 0) & (rows.targets > 0), rows.targets / down, torch.inf)
        wrong = torch.where(rows.targets > 0, 0.0, down).amax(1, keepdim=True)
        wrong = torch.maximum(wrong, rows.excess.abs())
        tolerance = 0.5 * rows.rounding()
        over = wrong - tolerance * rows.size
        limit = torch.where(over > 0, tolerance * rows.mass / over, torch.inf)
        limit = torch.where(wrong > tolerance * (rows.mass + rows.size), 0.0, limit)
        smallest = torch.minimum(strict, limit)
        return float(smallest.amin()) * (1 - 4 * torch.finfo(nu.dtype).eps)

    def _conjugate_derivatives(self, s: float, nu: Tensor, Y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        rows = _DualRows.of(nu, Y, w)
        Q, logs, _ = rows.point(s)
        scaled = torch.where((rows.targets > 0) | (rows.scaled > 0), rows.scaled, 0.0)
        second = torch.where(scaled == 0, 0.0, scaled.square() / Q)
        return weighted_sum(_product(scaled, logs), w), weighted_sum(second, w)
