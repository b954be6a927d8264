"""An interval around the optimal value of a ReLU problem, independent of the package.

The upper end is the objective of a network, evaluated as it is: found by Clarabel from the convex program, or by long
runs of L-BFGS where there are several outputs. The lower end is a dual point, with an upper bound of the dual norm
over all cones from explicit multipliers. Both are proven by weak duality up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize_scalar

from tests.soundness.cnn_relu_problems import CNNReluInstance
from tests.soundness.losses import make_loss
from tests.soundness.relu_cells import cell_patterns, low_rank
from tests.soundness.relu_norms import ConeMaxima, project
from tests.soundness.relu_problems import ReluInstance
from tests.soundness.relu_programs import long_runs, solve_directions

__all__ = ["Network", "ReluInterval", "ReluReference"]

_TOLERANCES = (1e-10, 1e-12, 1e-8)
_NARROW = 1e-8
_STARTS = 8
_DIRECTIONS = 12
_FEASIBLE = 1e-13


@dataclass(frozen=True)
class Network:
    """Neurons u (m, d) and v (m, c), the gate of each (m,) (-1 where all are allowed), and the intercept (c,)."""

    u: np.ndarray
    v: np.ndarray
    gate: np.ndarray
    intercept: np.ndarray


@dataclass(frozen=True)
class ReluInterval:
    """lower <= p* <= upper with a network and a dual point nu (n, c), n the samples with a weight; see `Interval`."""

    lower: float
    upper: float
    size: float
    network: Network
    nu: np.ndarray

    @property
    def relative_width(self) -> float:
        """(upper - lower) / size."""
        return max(0.0, self.upper - self.lower) / self.size


class ReluReference:
    """One ReLU problem in NumPy; patterns (P, n) where other cones than those of its gates are wanted."""

    def __init__(
        self,
        instance: ReluInstance | CNNReluInstance,
        patterns: np.ndarray | None = None,
        beta: float | None = None,
    ) -> None:
        self.instance = instance
        self.X = instance.X
        self.used = instance.weights > 0
        self.Y = instance.Y[self.used]
        self.w = instance.weights[self.used]
        self.loss = make_loss(instance.loss, self.Y, self.w, instance.delta)
        self.all_neurons = instance.gates is None and patterns is None
        if patterns is not None:
            self.patterns = patterns
        elif instance.gates is not None:
            self.patterns = (self.X @ instance.gates >= 0).T
        else:
            cells, rows = cell_patterns(self.X), self.X.any(1)
            # Neurons that are not active on any sample do nothing.
            self.patterns = cells[cells[:, rows].any(1)] if rows.any() else cells
        self.Z, self.Q = self.X, np.eye(self.X.shape[1])
        if self.all_neurons:
            self.Z, self.Q = low_rank(self.X)
        self.cones = ConeMaxima(self.Z, self.patterns)
        # Output of a sample: the pooled neurons of its rows, of which a perceptron has one.
        self.pool = instance.pool[self.used]
        self._pool = self.pool.astype(np.longdouble)
        self.seen = self.pool.any(0)
        norms = np.linalg.norm(self.Z[self.seen], axis=1)
        self.size = float(np.sqrt(np.mean(norms[norms > 0] ** 2))) if norms.any() else 1.0
        self._long = self.X.astype(np.longdouble)
        if beta is not None:
            self.beta = beta

    @cached_property
    def _residual(self) -> np.ndarray:
        """Distances of the rows from the row space, (n,), with rounding."""
        rest = self._long - self.Z.astype(np.longdouble) @ self.Q.T.astype(np.longdouble)
        return np.linalg.norm(rest.astype(float), axis=1) * (1 + 1e-9)

    def full(self, nu: np.ndarray) -> np.ndarray:
        """What a dual point puts on the rows."""
        return self._pool.T @ nu if nu.dtype == np.longdouble else self.pool.T @ nu

    def samples(self, nu: np.ndarray) -> np.ndarray:
        """A dual point with zeros for the samples of weight 0."""
        rows = np.zeros(self.instance.Y.shape, nu.dtype)
        rows[self.used] = nu
        return rows

    def outputs(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """sum_j P (X u_j)_+ v_j^T of the samples with a weight, in extended precision."""
        hidden = np.maximum(self._long @ np.asarray(u, np.longdouble).T, 0)
        return self._pool @ hidden @ np.asarray(v, np.longdouble)

    def objective(self, network: Network) -> float:
        """Loss plus beta/2 times the squares of the weights."""
        u, v = (np.asarray(part, np.longdouble) for part in (network.u, network.v))
        penalty = ((u**2).sum() + (v**2).sum()) / 2
        return float(self.loss.value(self.outputs(u, v) + network.intercept) + self.beta * penalty)

    def violation(self, gate: np.ndarray, u: np.ndarray) -> float:
        """Largest violation of a cone by a column that is not 0, relative to the norms of row and column."""
        worst = 0.0
        kept = self.cones.kept
        rows = self._long[kept] / np.sqrt((self._long[kept] ** 2).sum(1, keepdims=True))
        for k, column in zip(gate, np.asarray(u, np.longdouble), strict=True):
            scale = abs(column).max(initial=0)
            if scale > 0 and len(rows):
                unit = column / scale
                slack = np.where(self.patterns[k][kept], 1, -1) * (rows @ unit)
                worst = max(worst, float(-slack.min() / np.sqrt((unit**2).sum())))
        return worst

    def dual_norm(self, nu: np.ndarray) -> tuple[float, float, np.ndarray]:
        """lower <= max ||G_k^T u|| over the unit vectors of the cones <= upper, and the u (d,) of the lower one.

        Where all neurons are allowed the lower one is the value at u by the definition of ReLU.
        """
        rows = self.full(nu)
        lower, upper, y = self.cones.interval(rows)
        if not self.all_neurons:
            return lower, upper, y
        upper = upper * (1 + 1e-14) + float((self._residual * np.linalg.norm(rows.astype(float), axis=1)).sum())
        u = self.Q.astype(np.longdouble) @ y
        size = np.sqrt((u**2).sum())
        u = u / size if size > 0 else u
        return float(np.sqrt(((np.maximum(self._long @ u, 0) @ rows) ** 2).sum())), upper, u

    def best_intercept(self, u: np.ndarray, v: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """A good intercept for the neurons; zeros where the problem has none."""
        if not self.instance.output_bias:
            return np.zeros(self.Y.shape[1])
        return self.loss.best_intercept(self.outputs(u, v), start)

    @cached_property
    def zero(self) -> Network:
        """No neurons."""
        u, v = np.zeros((0, self.X.shape[1])), np.zeros((0, self.Y.shape[1]))
        return Network(u, v, np.zeros(0, int), self.best_intercept(u, v))

    @cached_property
    def plain_loss(self) -> float:
        """The loss of predictions that are all 0 (and a little, where that is 0)."""
        return float(self.loss.value(np.zeros(self.Y.shape))) or np.finfo(float).tiny

    def gradient(self, network: Network) -> np.ndarray:
        """Gradient of the loss, (n, c)."""
        return self.loss.gradient(self.outputs(network.u, network.v) + network.intercept)

    @cached_property
    def beta_max(self) -> float:
        """A lower bound of the smallest beta that makes the zero network optimal."""
        return self.dual_norm(self.loss.repair(self.gradient(self.zero), self.instance.output_bias))[0]

    @cached_property
    def beta(self) -> float:
        """beta of the problem; 1 where the zero network is optimal for every beta, up to rounding."""
        gradient = self.loss.gradient(np.zeros(self.Y.shape)).astype(float)
        rounding = 1e-12 * np.linalg.norm(self.X[self.seen]) * np.linalg.norm(gradient)
        return self.instance.fraction * self.beta_max if self.beta_max > rounding else 1.0

    def dual_value(self, candidate: np.ndarray) -> tuple[float, np.ndarray]:
        """A lower bound of p* from any candidate (n, c), and the feasible point that proves it."""
        nu = self.loss.repair(np.asarray(candidate, np.longdouble), self.instance.output_bias)
        if not np.isfinite(nu).all():
            return 0.0, np.zeros_like(nu)
        q = self.dual_norm(nu)[1] * (1 + 1e-14)
        end = self.loss.largest_scale(nu)
        if q > 0:
            end = min(end, self.beta / q)
        found = minimize_scalar(
            lambda s: float(self.loss.conjugate(s * nu)), bounds=(0, end), method="bounded", options={"xatol": 1e-9}
        )
        best = max((end, min(1.0, end), float(found.x)), key=lambda s: -self.loss.conjugate(s * nu))
        value = -float(self.loss.conjugate(best * nu))
        return (value, best * nu) if value > 0 else (0.0, np.zeros_like(nu))

    def network(self, y: np.ndarray, v: np.ndarray, gate: np.ndarray, intercept: np.ndarray) -> Network:
        """Columns y in the coordinates of the cones as a balanced network, moved into them where they must be."""
        if not self.all_neurons:
            y = np.array([self._inside(int(k), column) for k, column in zip(gate, y, strict=True)]).reshape(y.shape)
        u = y @ self.Q.T
        sizes = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        kept = sizes > 1e-12 * sizes.max(initial=0)
        u, v, gate = u[kept], v[kept], gate[kept]
        root = np.sqrt(np.linalg.norm(v, axis=1) / np.linalg.norm(u, axis=1))[:, None]
        u, v = root * u, v / root
        return Network(u, v, gate, self.best_intercept(u, v, intercept))

    def _inside(self, k: int, column: np.ndarray) -> np.ndarray:
        """A feasible point near a column: its projection, or 0 where that is not feasible to rounding."""
        point = project(self.cones.normals(k), column).astype(float)
        return point if self.violation(np.array([k]), point[None]) <= _FEASIBLE else 0 * point

    @cached_property
    def interval(self) -> ReluInterval:
        """The interval around p*, as narrow as a few runs make it."""
        best = self._take(None, self.zero, [])
        if best.upper < best.size or not self.Z.any():
            return best
        P, c = len(self.patterns), self.Y.shape[1]
        rng = np.random.default_rng(P)
        if c == 1:
            directions, gate = np.tile([[1.0], [-1.0]], (P, 1)), np.repeat(np.arange(P), 2)
        elif self.all_neurons:
            for y, v, b in long_runs(self, rng, _STARTS):
                best = self._take(best, self.network(y, v, np.full(len(y), -1), b), [])
            return best
        else:
            directions = rng.normal(size=(P * _DIRECTIONS, c))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            gate = np.repeat(np.arange(P), _DIRECTIONS)
        for tolerance in _TOLERANCES if c == 1 else _TOLERANCES[:1]:
            solution = solve_directions(self, gate, directions, best.upper, tolerance)
            if solution is not None:
                y, gate, v, b, nu = solution
                best = self._take(best, self.network(y, v, gate, b), [nu])
            if best.relative_width <= _NARROW:
                break
        return best

    def offer(self, network: Network) -> None:
        """Lower the upper end by a network found elsewhere, after its evaluation here."""
        if self.all_neurons or self.violation(network.gate, network.u) <= _FEASIBLE:
            self.__dict__["interval"] = self._take(self.interval, network, [])

    def _take(self, best: ReluInterval | None, network: Network, candidates: list[np.ndarray]) -> ReluInterval:
        """The interval narrowed by a network and dual candidates."""
        upper = self.objective(network)
        if best is not None and upper >= best.upper and not candidates:
            return best
        bounds = [self.dual_value(nu) for nu in [self.gradient(network), *candidates]]
        lower, nu = max(bounds, key=lambda bound: bound[0])
        if best is not None and best.lower >= lower:
            lower, nu = best.lower, best.nu
        if best is not None and best.upper <= upper:
            upper, network = best.upper, best.network
        return ReluInterval(lower, upper, max(upper, 1e-9 * self.plain_loss), network, nu)
