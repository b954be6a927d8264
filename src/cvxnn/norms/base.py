"""The interface of matrix norms: checks, scaling and rounding shared by all of them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.norms.vector import VECTOR_NORMS

__all__ = ["EPS", "MatrixNorm"]

EPS = 2.0**-53  # unit roundoff of float64, in which all bounds are computed


class MatrixNorm(ABC):
    """A norm of (p, q) matrices induced by a left norm on R^p and a right norm on R^q.

    Every method takes a batch (P, p, q) of floating-point matrices. Blocks with a single row or column are
    vectors: their norm is the right or left vector norm, whichever the pair.

    Attributes
    ----------
    left, right : str
        Names of the vector norms of the left and right factors.
    name : str
        "nuclear" for l2 with l2, else for example "l1-l2".
    exact : bool
        Whether value and dual norm have a closed form for every shape.
    has_prox : bool
        Whether `prox` is available for every shape.
    """

    exact: bool = True
    has_prox: bool = True

    def __init__(self, left: str, right: str) -> None:
        self.left = left
        self.right = right
        self._left = VECTOR_NORMS[left]
        self._right = VECTOR_NORMS[right]
        self.name = "nuclear" if (left, right) == ("l2", "l2") else f"{left}-{right}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(left={self.left!r}, right={self.right!r})"

    def value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of ||Z_k||_D, equal where `exact` (then correct to rounding).

        Parameters
        ----------
        Z : Tensor of shape (P, p, q)

        Returns
        -------
        lower, upper : Tensor of shape (P,)
            NaN for blocks with NaN or infinite entries.
        """
        _check_blocks("Z", Z)
        scaled, scale, finite = _rescale(Z)
        lower, upper = self._vector_value(scaled) if _is_vector(Z) else self._value(scaled)
        scale = scale.masked_fill(~finite, math.nan)
        return lower * scale, upper * scale

    def dual(self, G: Tensor, error: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Rigorous bounds of the dual norm of every matrix within `error` of G_k (section 3 of the maths).

        Parameters
        ----------
        G : Tensor of shape (P, p, q)
        error : float or Tensor of shape (P,)
            Bound on the Frobenius norm of the perturbations E_k, such as the rounding error of forming G.

        Returns
        -------
        lower, upper : Tensor of shape (P,)
            lower_k <= ||G_k + E_k||_D* <= upper_k for all ||E_k||_F <= error_k, the rounding of this
            computation included. They are computed in float64 and rounded outwards to the dtype of G. Blocks
            with NaN or infinite entries get 0 and infinity.

        Raises
        ------
        InvalidInputError
            If G is not a batch of matrices or `error` is negative or NaN.
        """
        _check_blocks("G", G)
        device = torch.device("cpu") if G.device.type == "mps" else G.device  # MPS has no float64
        scaled, scale, finite = _rescale(G.to(device=device, dtype=torch.float64))
        if _is_vector(G):
            lower, upper = _widen(self._vector_dual(scaled), max(G.shape[1:]))
        else:
            lower, upper = self._dual_bounds(scaled)
        slack = _check_error(error, scale) * (self.radius(*G.shape[1:]) * (1 + 16 * EPS))
        upper = (upper * scale + slack) * (1 + 16 * EPS)
        lower = (lower * scale * (1 - 16 * EPS) - slack) * (1 - 16 * EPS)
        upper = torch.where(finite & ~upper.isnan(), upper, math.inf)
        lower = torch.where(finite & (lower > 0), lower, 0.0)
        return _round_outwards(lower, upper, G)

    def radius(self, p: int, q: int) -> float:
        """The largest Frobenius norm of u v^T, u of p and v of q entries in their unit balls."""
        return self._left.radius(p) * self._right.radius(q)

    def dual_estimate(self, G: Tensor) -> Tensor:
        """Dual norm of each block without allowance for rounding, in the dtype of G: fast, for solvers.

        Parameters
        ----------
        G : Tensor of shape (P, p, q)

        Returns
        -------
        Tensor of shape (P,)
            The dual norm up to rounding; for norms that are not `exact` possibly less (the best value found).
        """
        _check_blocks("G", G)
        scaled, scale, finite = _rescale(G)
        estimate = self._vector_dual(scaled) if _is_vector(G) else self._dual_estimate(scaled)
        return (estimate * scale).masked_fill(~finite, math.nan)

    def atom(self, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-ball vectors that maximise u^T G v (for norms that are not `exact`: the best found).

        Parameters
        ----------
        G : Tensor of shape (P, p, q)

        Returns
        -------
        u : Tensor of shape (P, p)
        v : Tensor of shape (P, q)
        value : Tensor of shape (P,)
            u^T G v >= 0.
        """
        _check_blocks("G", G)
        scaled, scale, finite = _rescale(G)
        if G.shape[2] == 1:
            u = self._left.maximiser(scaled[:, :, 0])
            v = torch.ones_like(scaled[:, 0, :])
        elif G.shape[1] == 1:
            v = self._right.maximiser(scaled[:, 0, :])
            u = torch.ones_like(scaled[:, :, 0])
        else:
            u, v = self._atom(scaled)
        value = torch.einsum("ka,kab,kb->k", u, scaled, v).clamp_min(0) * scale
        return u, v, value.masked_fill(~finite, math.nan)

    def prox(self, Z: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        """Proximal operator argmin_W threshold ||W||_D + 1/2 ||W - Z||_F^2 of each block.

        Parameters
        ----------
        Z : Tensor of shape (P, p, q)
        threshold : float or Tensor of shape (P,)
            Not negative.

        Returns
        -------
        W : Tensor of shape (P, p, q)
        values : Tensor of shape (P,)
            ||W_k||_D.

        Raises
        ------
        UnsupportedError
            If the norm has no closed-form proximal operator.
        """
        _check_blocks("Z", Z)
        if not (self.has_prox or _is_vector(Z)):
            raise UnsupportedError(
                f"the norm {self.name!r} (norms=({self.left!r}, {self.right!r})) has no closed-form proximal"
                " operator; use solver='frank_wolfe', which needs none."
            )
        t = _check_threshold(threshold, Z)
        largest = float(Z.abs().amax()) if Z.shape[0] else 1.0
        safe = torch.finfo(Z.dtype).tiny ** 0.4
        if safe < largest < 1 / safe:
            return self._any_prox(Z, t)
        scaled, scale, finite = _rescale(Z)
        scale = scale.masked_fill(~finite, math.nan)
        t = t / scale[:, None, None]
        W, values = self._any_prox(scaled, t)
        return W * scale[:, None, None], values * scale

    def _any_prox(self, Z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        if not _is_vector(Z):
            return self._prox(Z, t)
        t = t if isinstance(t, float) else t[:, :, 0]
        if Z.shape[2] == 1:
            w, values = self._left.prox(Z[:, :, 0], t)
        else:
            w, values = self._right.prox(Z[:, 0, :], t)
        return w.reshape(Z.shape), values

    def _vector_value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        value = self._left.value(Z[:, :, 0]) if Z.shape[2] == 1 else self._right.value(Z[:, 0, :])
        return value, value

    def _vector_dual(self, G: Tensor) -> Tensor:
        return self._left.dual(G[:, :, 0]) if G.shape[2] == 1 else self._right.dual(G[:, 0, :])

    @abstractmethod
    def _value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the norms; Z is finite, scaled to largest entry 1, with p, q >= 2 (as in all hooks)."""

    @abstractmethod
    def _dual_bounds(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Rigorous bounds of the dual norms of G in float64."""

    @abstractmethod
    def _dual_estimate(self, G: Tensor) -> Tensor:
        """Dual norms without allowance for rounding."""

    @abstractmethod
    def _atom(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Maximising pair (u, v)."""

    def _prox(self, Z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Proximal operator; `t` is a float or has shape (P, 1, 1). Only called where `has_prox`."""
        raise UnsupportedError(f"the norm {self.name!r} has no closed-form proximal operator.")


def _is_vector(Z: Tensor) -> bool:
    return min(Z.shape[1:]) == 1


def _widen(values: Tensor, n_terms: int) -> tuple[Tensor, Tensor]:
    """Bounds of positive quantities computed in float64 as sums, or roots of sums of squares, of n terms."""
    relative = (n_terms + 16) * EPS
    return values * (1 - relative), values * (1 + relative)


def _rescale(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks divided by their largest magnitude, these magnitudes (P,), and which blocks are finite (P,).

    Zero blocks have scale 1; blocks with NaN or infinite entries come back as zeros with scale 1.
    """
    largest = G.abs().amax((-2, -1))
    finite = largest.isfinite()
    scale = torch.where(finite & (largest > 0), largest, 1.0)
    scaled = G / scale[:, None, None]
    if not bool(finite.all()):
        scaled = torch.where(finite[:, None, None], scaled, 0.0)
    return scaled, scale, finite


def _round_outwards(lower: Tensor, upper: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of non-negative quantities in the dtype and on the device of `like`, no tighter than given.

    Below the normal numbers of that dtype, where rounding is not relative, they become 0 and a normal number.
    """
    info = torch.finfo(like.dtype)
    upper = upper * (1 + info.eps) + (upper > 0) * info.tiny
    lower = lower.clamp(max=info.max) * (1 - info.eps)
    lower = torch.where(lower < 4 * info.tiny, 0.0, lower)
    return lower.to(device=like.device, dtype=like.dtype), upper.to(device=like.device, dtype=like.dtype)


def _check_blocks(name: str, Z: Tensor) -> None:
    if not isinstance(Z, Tensor) or not Z.is_floating_point():
        seen = f"a tensor of {Z.dtype}" if isinstance(Z, Tensor) else type(Z).__name__
        raise InvalidInputError(f"{name} must be a floating-point tensor of shape (P, p, q), got {seen}.")
    if Z.ndim != 3 or min(Z.shape[1:]) == 0:
        raise InvalidInputError(f"{name} must have shape (P, p, q) with p, q >= 1, got {tuple(Z.shape)}.")


def _check_error(error: float | Tensor, scale: Tensor) -> Tensor:
    bound = torch.as_tensor(error, dtype=scale.dtype, device=scale.device)
    if bound.ndim > 0 and bound.shape != scale.shape:
        raise InvalidInputError(f"error must be a number or have shape ({scale.shape[0]},), got {tuple(bound.shape)}.")
    if not bool((bound >= 0).all()):
        raise InvalidInputError(f"error must not be negative or NaN, got a minimum of {float(bound.min())}.")
    return bound


def _check_threshold(threshold: float | Tensor, Z: Tensor) -> float | Tensor:
    if not isinstance(threshold, Tensor) or threshold.ndim == 0:
        t = float(threshold)
        if not t >= 0:
            raise InvalidInputError(f"threshold must not be negative or NaN, got {t}.")
        return t
    if threshold.shape != Z.shape[:1]:
        raise InvalidInputError(
            f"threshold must be a number or have shape ({Z.shape[0]},), got {tuple(threshold.shape)}."
        )
    if not bool((threshold >= 0).all()):
        raise InvalidInputError("threshold must not be negative or NaN.")
    return threshold.to(dtype=Z.dtype, device=Z.device)[:, None, None]
