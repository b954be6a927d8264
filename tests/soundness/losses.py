"""The losses in NumPy, in extended precision: value, gradient, conjugate, and dual points made feasible.

Written from the definitions, without any code of the package. Samples of weight 0 must have been left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

__all__ = ["ReferenceLoss", "make_loss"]

Array = np.ndarray


class ReferenceLoss(ABC):
    """F(T) = sum_i w_i f(t_i, y_i) for predictions T (n, c); w (n,) is positive.

    A dual point nu (n, c) is written as nu_i = w_i l_i below.
    """

    def __init__(self, Y: Array, w: Array) -> None:
        self.Y = Y.astype(np.longdouble)
        self.w = w.astype(np.longdouble)[:, None]

    def value(self, T: Array) -> np.longdouble:
        """F(T)."""
        return (self.w * self._terms(np.asarray(T, np.longdouble))).sum()

    def gradient(self, T: Array) -> Array:
        """Gradient of F at T, (n, c)."""
        return self.w * self._slopes(np.asarray(T, np.longdouble))

    def conjugate(self, nu: Array) -> np.longdouble:
        """F*(nu) for nu in its domain."""
        return (self.w * self._conjugate_terms(nu / self.w)).sum()

    def largest_scale(self, nu: Array) -> float:
        """The s <= 1e6 up to which s nu is certainly in the domain of F*, for nu in it (so at least 1)."""
        return 1e6

    @abstractmethod
    def repair(self, nu: Array, centered: bool) -> Array:
        """A point of the domain of F* near nu; with `centered` its columns sum to zero."""

    def best_intercept(self, T: Array, start: Array | None = None) -> Array:
        """A good intercept (c,); any one gives a valid upper bound."""
        T = np.asarray(T, np.longdouble)

        def objective(b: Array) -> tuple[float, Array]:
            shifted = T + b
            return float(self.value(shifted)), self.gradient(shifted).sum(0).astype(float)

        b = np.zeros(T.shape[1]) if start is None else np.asarray(start, float)
        scale = float(self.value(T + b)) or 1.0
        found = minimize(lambda x: tuple(part / scale for part in objective(x)), b, jac=True, options={"gtol": 1e-13}).x
        return found if objective(found)[0] <= objective(b)[0] else b

    @abstractmethod
    def _terms(self, T: Array) -> Array:
        """f(t_i, y_i) by entries, (n, c)."""

    @abstractmethod
    def _slopes(self, T: Array) -> Array:
        """Derivatives of f(t_i, y_i) in t_i, (n, c)."""

    @abstractmethod
    def _conjugate_terms(self, rows: Array) -> Array:
        """f*(l_i, y_i) by entries, (n, c)."""

    def _center(self, rows: Array) -> Array:
        """Rows less their weighted mean."""
        return rows - (self.w * rows).sum(0) / self.w.sum()


class _Huber(ReferenceLoss):
    """r^2 / 2 up to |r| = delta and linear beyond; the squared loss has an infinite delta."""

    def __init__(self, Y: Array, w: Array, delta: float) -> None:
        super().__init__(Y, w)
        self.delta = delta

    def _terms(self, T: Array) -> Array:
        size = abs(T - self.Y)
        return np.where(size <= self.delta, size**2 / 2, self.delta * (size - self.delta / 2))

    def _slopes(self, T: Array) -> Array:
        return np.clip(T - self.Y, -self.delta, self.delta)

    def _conjugate_terms(self, rows: Array) -> Array:
        return rows**2 / 2 + rows * self.Y

    def largest_scale(self, nu: Array) -> float:
        largest = float(abs(nu / self.w).max())
        return max(1.0, min(1e6, self.delta / largest * (1 - 1e-15))) if largest > 0 else 1e6

    def repair(self, nu: Array, centered: bool) -> Array:
        rows = np.clip(nu / self.w, -self.delta, self.delta)
        if centered:
            rows = self._center(rows)
            rows = rows * min(1, self.delta / max(abs(rows).max(), np.finfo(float).tiny))
        return self.w * rows


class _Squared(_Huber):
    def __init__(self, Y: Array, w: Array) -> None:
        super().__init__(Y, w, np.inf)

    def _terms(self, T: Array) -> Array:
        return (T - self.Y) ** 2 / 2

    def repair(self, nu: Array, centered: bool) -> Array:
        return self.w * self._center(nu / self.w) if centered else nu


def _xlogx(Q: Array, mass: Array | float = 1.0) -> Array:
    positive = Q > 0
    return np.where(positive, Q * np.log(np.where(positive, Q / mass, 1)), 0)


def _share(Q: Array, inner: Array) -> Array:
    """Smallest share of `inner` >= 0 to mix into Q so that no entry is negative; 1 where inner is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(Q < 0, -Q / (inner - Q), 0)


class _Logistic(ReferenceLoss):
    """log(1 + exp(t)) - y t; Q = l + y must be in [0, 1]."""

    def _terms(self, T: Array) -> Array:
        return self.Y * np.logaddexp(0, -T) + (1 - self.Y) * np.logaddexp(0, T)

    def _slopes(self, T: Array) -> Array:
        up, down = np.exp(-np.logaddexp(0, -T)), np.exp(-np.logaddexp(0, T))
        return (1 - self.Y) * up - self.Y * down

    def _conjugate_terms(self, rows: Array) -> Array:
        Q = np.clip(rows + self.Y, 0, 1)
        return _xlogx(Q) + _xlogx(1 - Q)

    def largest_scale(self, nu: Array) -> float:
        rows = nu / self.w
        room = np.where(rows > 0, 1 - self.Y, self.Y)
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = np.where(rows == 0, 1e6, room / abs(rows))
        return max(1.0, min(1e6, float(limits.min()) * (1 - 1e-15)))

    def repair(self, nu: Array, centered: bool) -> Array:
        if not centered:
            return self.w * (np.clip(nu / self.w + self.Y, 0, 1) - self.Y)
        mean = (self.w * self.Y).sum(0) / self.w.sum()
        Q = self.Y + self._center(nu / self.w)
        share = np.maximum(_share(Q, mean), _share(1 - Q, 1 - mean)).max(0)
        share = np.where((mean <= 0) | (mean >= 1), 1, np.minimum(1, share))
        return self.w * ((1 - share) * Q + share * mean - self.Y)


class _CrossEntropy(ReferenceLoss):
    """sum_c y_c (log sum_k exp(t_k) - t_c); Q = l + y must be non-negative with the row sums of y."""

    def __init__(self, Y: Array, w: Array) -> None:
        super().__init__(Y, w)
        self.mass = self.Y.sum(1, keepdims=True)
        self.frequencies = (self.w * self.Y).sum(0) / (self.w * self.mass).sum()

    def _terms(self, T: Array) -> Array:
        others = np.where(np.eye(T.shape[1], dtype=bool), -np.inf, T[:, None, :] - T[:, :, None])
        return self.Y * np.logaddexp(0, np.logaddexp.reduce(others, axis=2))

    def _slopes(self, T: Array) -> Array:
        softmax = np.exp(T - np.logaddexp.reduce(T, axis=1, keepdims=True))
        return self.mass * softmax - self.Y

    def _conjugate_terms(self, rows: Array) -> Array:
        return _xlogx(np.maximum(rows + self.Y, 0), self.mass)

    def largest_scale(self, nu: Array) -> float:
        rows = nu / self.w
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = np.where(rows < 0, self.Y / -rows, 1e6)
        return max(1.0, min(1e6, float(limits.min()) * (1 - 1e-15)))

    def repair(self, nu: Array, centered: bool) -> Array:
        rows = nu / self.w
        Q = self._normalise(np.maximum(self.Y + rows, 0), self.Y)
        if not centered:
            return self.w * (Q - self.Y)
        inner = self.mass * self.frequencies
        Q = self._normalise(Q * (self.frequencies > 0), inner)
        weight = self.w * self.mass
        excess = (self.w * (Q - self.Y)).sum(0) / weight.sum()
        Q = Q - self.mass * excess
        share = min(1, _share(Q, inner)[:, self.frequencies > 0].max())
        return self.w * ((1 - share) * Q + share * inner - self.Y)

    def _normalise(self, Q: Array, otherwise: Array) -> Array:
        """Rows Q >= 0 brought to the sums of the targets; rows that are 0 replaced."""
        total = Q.sum(1, keepdims=True)
        return np.where(total > 0, Q * (self.mass / np.where(total > 0, total, 1)), otherwise)


def make_loss(name: str, Y: Array, w: Array, delta: float) -> ReferenceLoss:
    """The loss of a name, for targets Y (n, c) and positive weights w (n,)."""
    if name == "huber":
        return _Huber(Y, w, delta)
    kinds: dict[str, Callable[[Array, Array], ReferenceLoss]] = {
        "squared": _Squared,
        "logistic": _Logistic,
        "cross_entropy": _CrossEntropy,
    }
    return kinds[name](Y, w)
