"""An interval around the optimal value of a problem, independent of the package.

CVXPY with Clarabel gives a primal point, evaluated as it is, and a dual point, made feasible and evaluated.
Both ends are proven by weak duality up to rounding, which extended precision keeps small; Clarabel's own
values and statuses are not trusted with anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import minimize_scalar

from tests.soundness.conic import solve_dual, solve_primal
from tests.soundness.losses import make_loss
from tests.soundness.norms import dual_norm, matrix_norm
from tests.soundness.problems import Instance

__all__ = ["Interval", "Reference"]

#: Programs and tolerances of Clarabel, tried in turn until the interval is narrow.
_ATTEMPTS = (
    (solve_primal, 1e-10),
    (solve_primal, 1e-12),
    (solve_dual, 1e-10),
    (solve_dual, 1e-13),
    (solve_primal, 1e-8),
)
_NARROW = 1e-8


@dataclass(frozen=True)
class Interval:
    """lower <= p* <= upper, with the points that prove it: Z (P, d, c), intercept (c,), nu (n, c).

    ``size`` is what differences are compared with: upper, but at least 1e-9 of the loss without a network (an
    infimum of 0 is not attained where all the labels of an output are equal).
    """

    lower: float
    upper: float
    size: float
    Z: np.ndarray
    intercept: np.ndarray
    nu: np.ndarray

    @property
    def relative_width(self) -> float:
        """(upper - lower) / size."""
        return max(0.0, self.upper - self.lower) / self.size


class Reference:
    """One problem in NumPy."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.used = instance.weights > 0
        self.w = instance.weights[self.used]
        self.Y = instance.Y[self.used]
        self.loss = make_loss(instance.loss, self.Y, self.w, instance.delta)
        self.block_shape, features = self.make_features()
        self.features = features.astype(float)
        self._features = features.astype(np.longdouble)

    def make_features(self) -> tuple[tuple[int, int, int], np.ndarray]:
        """The shape (P, p, q) of Z, and the features (n, P p q / c): predictions are their products with Z (-1, c)."""
        patterns, X = self.instance.patterns[self.used], self.instance.X[self.used]
        shape = (patterns.shape[1], X.shape[1], self.Y.shape[1])
        return shape, (patterns[:, :, None] * X[:, None, :]).reshape(len(self.Y), -1)

    def predictions(self, Z: np.ndarray) -> np.ndarray:
        """A(Z) = sum_k D_k X Z_k of the samples with a weight, in extended precision."""
        return self._features @ np.asarray(Z, np.longdouble).reshape(self._features.shape[1], -1)

    def objective(self, Z: np.ndarray, intercept: np.ndarray) -> float:
        """F(A(Z) + 1 b^T) + beta Omega(Z)."""
        penalty = sum(matrix_norm(block, self.instance.norms) for block in Z)
        return float(self.loss.value(self.predictions(Z) + intercept) + self.beta * penalty)

    def dual_norm(self, nu: np.ndarray) -> float:
        """max_k ||(D_k X)^T nu||_D*."""
        blocks = (self._features.T @ nu).astype(float).reshape(self.block_shape)
        return max(dual_norm(block, self.instance.norms) for block in blocks)

    def best_intercept(self, Z: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """A good intercept for Z; zeros where the problem has none."""
        if not self.instance.output_bias:
            return np.zeros(self.Y.shape[1])
        return self.loss.best_intercept(self.predictions(Z), start)

    @cached_property
    def plain_loss(self) -> float:
        """The loss of predictions that are all 0 (and a little, where that is 0)."""
        return float(self.loss.value(np.zeros(self.Y.shape))) or np.finfo(float).tiny

    @cached_property
    def beta_max(self) -> float:
        """The dual norm of the gradient at Z = 0."""
        zero = np.zeros(self.block_shape)
        gradient = self.loss.gradient(self.predictions(zero) + self.best_intercept(zero))
        return self.dual_norm(self.loss.repair(gradient, self.instance.output_bias))

    @cached_property
    def beta(self) -> float:
        """beta of the problem; 1 where Z = 0 is optimal for every beta, up to rounding."""
        gradient = self.loss.gradient(np.zeros(self.Y.shape)).astype(float)
        rounding = 1e-12 * np.linalg.norm(self.features) * np.linalg.norm(gradient)
        return self.instance.fraction * self.beta_max if self.beta_max > rounding else 1.0

    def dual_value(self, candidate: np.ndarray) -> tuple[float, np.ndarray]:
        """A lower bound of p* from any candidate (n, c), and the feasible point that proves it."""
        nu = self.loss.repair(np.asarray(candidate, np.longdouble), self.instance.output_bias)
        if not np.isfinite(nu).all():
            return 0.0, np.zeros_like(nu)
        q = self.dual_norm(nu) * (1 + 1e-14)
        end = self.loss.largest_scale(nu)
        if q > 0:
            end = min(end, self.beta / q)
        found = minimize_scalar(
            lambda s: float(self.loss.conjugate(s * nu)), bounds=(0, end), method="bounded", options={"xatol": 1e-9}
        )
        best = max((end, min(1.0, end), float(found.x)), key=lambda s: -self.loss.conjugate(s * nu))
        value = -float(self.loss.conjugate(best * nu))
        return (value, best * nu) if value > 0 else (0.0, np.zeros_like(nu))

    @cached_property
    def interval(self) -> Interval:
        """The interval around p*, as narrow as a few runs of Clarabel make it."""
        zero = np.zeros(self.block_shape)
        best = self._take(None, zero, self.best_intercept(zero), [])
        if best.upper < best.size:
            return best
        for solve, tolerance in _ATTEMPTS:
            if best.relative_width <= _NARROW:
                break
            solution = solve(self, best.upper, tolerance)
            if solution is not None:
                Z, intercept, nu = solution
                best = self._take(best, Z, self.best_intercept(Z, intercept), [nu])
        return best

    def dual_without_intercept(self) -> np.ndarray:
        """Optimal dual point (n, c) of the problem without output bias: tempting, and wrong with one."""
        plain = type(self)(replace(self.instance, output_bias=False))
        plain.beta = self.beta
        solution = solve_primal(plain, plain.plain_loss, 1e-8)
        gradient = plain.loss.gradient(np.zeros(self.Y.shape))
        return plain.dual_value(gradient if solution is None else solution[2])[1]

    def _take(
        self, best: Interval | None, Z: np.ndarray, intercept: np.ndarray, candidates: list[np.ndarray]
    ) -> Interval:
        """The interval narrowed by a point and dual candidates."""
        gradient = self.loss.gradient(self.predictions(Z) + intercept)
        bounds = [self.dual_value(nu) for nu in [gradient, *candidates]]
        lower, nu = max(bounds, key=lambda bound: bound[0])
        upper = self.objective(Z, intercept)
        if best is not None and best.lower >= lower:
            lower, nu = best.lower, best.nu
        if best is not None and best.upper <= upper:
            upper, Z, intercept = best.upper, best.Z, best.intercept
        return Interval(lower, upper, max(upper, 1e-9 * self.plain_loss), Z, intercept, nu)
