"""What every loss offers, and the few sums that all of them share."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from cvxnn.errors import InvalidInputError
from cvxnn.losses.roots import increasing_root


class Loss(ABC):
    """A convex, differentiable loss of the predictions, F(T) = sum_i w_i f(t_i, y_i).

    Predictions ``T`` and targets ``Y`` are (n, c); the weights ``w`` are (n,), n >= 1, non-negative, and
    already contain the reduction (1 or 1/n). A sample of weight 0 contributes nothing anywhere, whatever its
    prediction and target are. All tensors share one floating dtype and device. Losses hold no state and
    compare by value.

    Attributes
    ----------
    name : str
        Name in `cvxnn.losses.LOSSES`.
    smoothness : float
        Lipschitz constant of the gradient of f in t (Euclidean norm).
    """

    name: ClassVar[str]
    smoothness: ClassVar[float]

    def check_targets(self, Y: Tensor) -> None:
        """Raise `InvalidInputError` where ``Y`` (n, c) cannot be the targets of this loss."""
        if Y.ndim != 2 or not Y.is_floating_point():
            raise InvalidInputError(
                f"Y has shape {tuple(Y.shape)} and dtype {Y.dtype}; wanted a floating (n, c) array."
            )
        bad = ~torch.isfinite(Y)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise InvalidInputError(f"Y[{row}, {column}] is {float(Y[row, column])}; wanted finite targets only.")

    @abstractmethod
    def value(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F(T), a 0-d tensor."""

    @abstractmethod
    def gradient(self, T: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Gradient of F at ``T``, (n, c), weights included."""

    @abstractmethod
    def hessian_product(self, T: Tensor, Y: Tensor, w: Tensor, D: Tensor) -> Tensor:
        """Derivative of the gradient at ``T`` along ``D``, (..., n, c); a generalised one at a kink.

        ``D`` is (n, c) or a batch of such directions.
        """

    @abstractmethod
    def conjugate(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """F*(L) = sum_i w_i f*(L_i / w_i; y_i), a 0-d tensor; infinite outside the domain of F*.

        The domain is widened by a rounding tolerance, which each loss states. A row of weight 0 must be 0.
        """

    @abstractmethod
    def conjugate_terms_magnitude(self, L: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """Sum of the absolute values of the terms summed in `conjugate`, to bound its rounding error; 0-d."""

    @abstractmethod
    def prox(self, T: Tensor, Y: Tensor, w: Tensor, sigma: float, start: Tensor | None = None) -> Tensor:
        """Minimiser over S of F(S) + sigma/2 ||S - T||_F^2, (n, c), to about the precision of the dtype.

        Parameters
        ----------
        T, Y : Tensor
            (n, c).
        w : Tensor
            (n,).
        sigma : float
            Positive.
        start : Tensor, optional
            (n, c), a guess of the result; used by the losses that iterate.
        """

    @abstractmethod
    def best_intercept(self, T: Tensor, Y: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
        """A finite minimiser (c,) over b of F(T + 1 b^T), or a point near the infimum where none exists.

        ``start`` (c,) is a guess of the result; used by the losses that iterate.
        """

    @abstractmethod
    def center_dual(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """A dual candidate (n, c) near ``nu`` whose columns sum to zero, up to rounding.

        Small positive multiples of it are in the domain of F*. It is what an unpenalised output intercept
        asks of a dual point: at a stationary intercept, the gradient of F is returned unchanged up to
        rounding.
        """

    def round_to_domain(self, nu: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        """``nu`` (n, c) without what keeps its small multiples out of the domain of F*, as a rule rounding errors.

        The conjugates forgive errors of a few eps. Where a bound is far below 1, so are the multiples of ``nu``,
        and errors that are forgiven there, but count in A*(nu), could lift the bound above the optimum.
        """
        return used_rows(nu, w)

    @abstractmethod
    def intercept_bound(self, value: float, Y: Tensor, w: Tensor) -> Tensor:
        """Bounds (c,) of the predictions that the loss allows, with which those of a best intercept follow.

        Where F(T) <= ``value``, every output c with a finite bound has samples, or a weighted mean of them, at
        which the size of t_c (or, for losses that see differences of outputs only, t_j - t_c for every j) is at
        most the bound. An intercept with T = A(Z) + 1 b^T, whose largest entry among these outputs is shifted to
        0 for such losses, is then at most the bound plus what A(Z) is at these samples. Where the bound is
        infinite the intercept may be anything, or have no best value.
        """

    @abstractmethod
    def largest_scale(self, nu: Tensor, Y: Tensor, w: Tensor) -> float:
        """Supremum of the s >= 0 with s ``nu`` in the domain of F*, rounded down; may be infinite."""

    @abstractmethod
    def dual_scale(self, nu: Tensor, Y: Tensor, w: Tensor, s_max: float) -> float:
        """The s in [0, min(s_max, largest_scale)] that maximises -F*(s nu); 0 where ``nu`` is 0."""

    def infimum(self, Y: Tensor, w: Tensor) -> float:
        """Infimum of F over all predictions, -F*(0)."""
        return 0.0 - float(self.conjugate(torch.zeros_like(Y), Y, w))


def weighted_sum(terms: Tensor, w: Tensor) -> Tensor:
    """Sum of w_i terms_ic, a 0-d tensor; rows of weight 0 are left out, whatever they hold."""
    return torch.where(w[:, None] > 0, w[:, None] * terms, 0.0).sum()


def weighted_rows(terms: Tensor, w: Tensor) -> Tensor:
    """Rows w_i terms_i, (n, c), exactly 0 where the weight is 0."""
    return torch.where(w[:, None] > 0, w[:, None] * terms, 0.0)


def weighted_mean(terms: Tensor, w: Tensor) -> Tensor:
    """Columnwise mean (c,) of rows with weights ``w``; 0 where all weights are 0."""
    total = w.sum()
    return weighted_rows(terms, w).sum(0) / torch.where(total > 0, total, 1.0)


def per_sample(L: Tensor, w: Tensor) -> Tensor:
    """Rows L_i / w_i, (n, c), exactly 0 where the weight is 0."""
    positive = w[:, None] > 0
    return torch.where(positive, L / torch.where(positive, w[:, None], 1.0), 0.0)


def used_rows(values: Tensor, w: Tensor) -> Tensor:
    """``values`` (n, c) with the rows of weight 0 set to 0."""
    return torch.where(w[:, None] > 0, values, 0.0)


def unused_rows_are_zero(L: Tensor, w: Tensor) -> Tensor:
    """Whether ``L`` is 0 in all rows of weight 0, a 0-d bool tensor."""
    return ((w[:, None] > 0) | (L == 0)).all()


def finite_or_infinity(value: Tensor, in_domain: Tensor) -> Tensor:
    """``value`` inside the domain, +infinity outside, a 0-d tensor."""
    return torch.where(in_domain, value, torch.inf)


class EntropyLoss(Loss):
    """A loss whose conjugate is an entropy: the scale of a dual point is found by a scalar search."""

    @abstractmethod
    def _conjugate_derivatives(self, s: float, nu: Tensor, Y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of s -> F*(s nu) at s > 0, two 0-d tensors."""

    def dual_scale(self, nu: Tensor, Y: Tensor, w: Tensor, s_max: float) -> float:
        """The s in [0, min(s_max, largest_scale)] that maximises -F*(s nu); 0 where ``nu`` is 0.

        The end point is returned where the derivative is not positive there. Otherwise the root of the
        derivative is found to relative 1e-10 (16 eps in single precision) in the variable u of s = end / (1
        + exp(-u)), in which the logarithmic growth of the derivative at both ends is nearly linear.
        """
        end = min(s_max, self.largest_scale(nu, Y, w))
        if not 0 < end < math.inf or not bool((nu != 0).any()):
            return 0.0
        if float(self._conjugate_derivatives(end, nu, Y, w)[0]) <= 0:
            return end

        def derivative(u: Tensor) -> tuple[Tensor, Tensor]:
            share = float(torch.sigmoid(u))
            first, second = self._conjugate_derivatives(end * share, nu, Y, w)
            chain = end * share * float(torch.sigmoid(-u))
            return first.double().cpu(), second.double().cpu() * chain

        tolerance = max(1e-10, 16 * torch.finfo(nu.dtype).eps)
        edge = torch.tensor(36.0, dtype=torch.float64)
        u = increasing_root(derivative, -edge, edge, start=0 * edge, tolerance=tolerance)
        return 0.0 if float(u) <= -35.0 else min(end * float(torch.sigmoid(u)), end)
