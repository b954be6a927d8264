"""Maxima over cones in NumPy: max { ||G^T u|| : ||u|| <= 1, K u >= 0 } between a witness and a multiplier."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy.optimize import nnls

__all__ = ["ConeMaxima", "project"]

_ACCURATE = 1e-12
_FEASIBLE = 1e-13
_ASCENTS = 6
_ROUNDS = 30
_FEW = 12
_SAMPLES = 2000


def project(K: np.ndarray, g: np.ndarray) -> np.ndarray:
    """g + K^T lambda in extended precision with lambda >= 0: the projection of g onto {u : K u >= 0}, for unit rows K.

    Whatever lambda >= 0 is, its norm is an upper bound of max { g . u : ||u|| <= 1, K u >= 0 }. `nnls` can be wrong
    without saying so; where the point does not satisfy the conditions, the active rows are found by trial.
    """
    g = np.asarray(g, np.longdouble)
    size = np.linalg.norm(g.astype(float))
    if size == 0 or len(K) == 0:
        return g
    best = g
    unit = (g / size).astype(float)
    try:
        multipliers = nnls(K.T, -unit, maxiter=30 * len(K) + 100)[0]
        best = _better(K, g / size, best / size, np.arange(len(K)), multipliers)
    except RuntimeError:
        best = best / size
    if _is_projection(K, unit, best):
        return best * size
    for k in range(min(len(K), np.linalg.matrix_rank(K)) + 1):
        for chosen in combinations(range(len(K)), k):
            some = list(chosen)
            found = np.linalg.lstsq(K[some].T, -unit, rcond=None)[0] if some else np.zeros(0)
            if (found >= -_ACCURATE).all():
                best = _better(K, g / size, best, np.array(some, int), np.maximum(found, 0))
        if _is_projection(K, unit, best):
            break
    return best * size


def _better(K: np.ndarray, g: np.ndarray, best: np.ndarray, some: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """The shorter of `best` and the point of these multipliers."""
    point = g + K[some].astype(np.longdouble).T @ np.maximum(multipliers, 0)
    return point if (point**2).sum() < (best**2).sum() else best


def _is_projection(K: np.ndarray, g: np.ndarray, point: np.ndarray) -> bool:
    """Feasible and orthogonal to what was added, for a unit g."""
    near = point.astype(float)
    return bool((K @ near).min() >= -_ACCURATE and abs(near @ (g - near)) <= _ACCURATE)


class ConeMaxima:
    """The cones of patterns (P, n) of rows X (n, d), and the maxima of ||G_k^T u|| over them.

    Parameters
    ----------
    X : array of shape (n, d)
        Rows of zeros constrain nothing.
    patterns : array of shape (P, n), bool
    """

    def __init__(self, X: np.ndarray, patterns: np.ndarray) -> None:
        self.X, self.patterns = X, patterns
        size = np.linalg.norm(X, axis=1)
        self.kept = size > 0
        self.rows = X[self.kept] / size[self.kept][:, None]
        self._long = X.astype(np.longdouble)

    def normals(self, k: int) -> np.ndarray:
        """(2 D_k - I) X with unit rows."""
        return np.where(self.patterns[k][self.kept], 1.0, -1.0)[:, None] * self.rows

    def block(self, k: int, nu: np.ndarray) -> np.ndarray:
        """G_k = X^T D_k nu in extended precision, (d, c)."""
        return (self._long * self.patterns[k][:, None]).T @ nu

    def interval(self, nu: np.ndarray) -> tuple[float, float, np.ndarray]:
        """lower <= max over all cones <= upper, and the u that attains the lower one."""
        blocks = [self.block(k, nu) for k in range(len(self.patterns))]
        spectral = np.array([np.linalg.norm(G.astype(float), 2) if G.size else 0.0 for G in blocks])
        order = np.argsort(-spectral)
        lower, upper, best = 0.0, 0.0, np.zeros(self.X.shape[1])
        seen = []
        for k in order:
            if spectral[k] <= upper:
                break
            low, high, u = self.bounds(int(k), blocks[k], float(spectral[k]))
            upper = max(upper, high)
            seen.append(k)
            if low > lower:
                lower, best = low, u
        if nu.shape[1] == 1 or spectral.max(initial=0) == 0:
            return lower, upper, best
        # The upper bounds of the other cones are decided, but one of them may have the best witness.
        for k in set(self._promising(nu, order)).difference(seen):
            low, _, u = self.bounds(int(k), blocks[k], float(spectral[k]))
            if low > lower:
                lower, best = low, u
        return lower, upper, best

    def _promising(self, nu: np.ndarray, order: np.ndarray) -> list[int]:
        """The cones of the best of many random directions, and those with the largest spectral norms."""
        if len(order) <= _FEW:
            return [int(k) for k in order]
        numbers = {pattern[self.kept].tobytes(): k for k, pattern in enumerate(self.patterns)}
        u = np.random.default_rng(1).normal(size=(_SAMPLES, self.X.shape[1]))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        values = np.linalg.norm(np.maximum(u @ self.X.T, 0) @ nu.astype(float), axis=1)
        found: dict[int, None] = {}
        for direction in u[np.argsort(-values)]:
            k = numbers.get((self.rows @ direction > 0).tobytes())
            if k is not None:
                found[k] = None
            if len(found) == _FEW // 2:
                break
        return [*found, *(int(k) for k in order[: _FEW // 4])]

    def bounds(self, k: int, G: np.ndarray, spectral: float | None = None) -> tuple[float, float, np.ndarray]:
        """Bounds of max { ||G^T u|| } over cone k, and a feasible unit u that attains the lower one."""
        K, c = self.normals(k), G.shape[1]
        if c > 1:
            return self._matrix_bounds(K, G, spectral)
        lower, upper, best = 0.0, 0.0, np.zeros(len(G))
        for sign in (1, -1):
            point = project(K, sign * G[:, 0])
            upper = max(upper, float(np.sqrt((point**2).sum())))
            value, u = _value(K, G, point)
            if value > lower:
                lower, best = value, u
        return lower, upper * (1 + 1e-15), best

    def _matrix_bounds(self, K: np.ndarray, G: np.ndarray, spectral: float | None) -> tuple[float, float, np.ndarray]:
        """Ascent by turns in u and v from below; from above exactly on arcs, elsewhere the spectral norm."""
        lower, best = 0.0, np.zeros(len(G))
        V = np.linalg.svd(G.astype(float), full_matrices=False)[2]
        starts = [*V, *-V, *np.random.default_rng(0).normal(size=(_ASCENTS, G.shape[1]))]
        for v in starts:
            before = -1.0
            for _ in range(_ROUNDS):
                value, u = _value(K, G, project(K, G @ v))
                if value <= before * (1 + 1e-13) or value == 0:
                    break
                before, v = value, (G.T @ u).astype(float)
                v = v / np.linalg.norm(v)
                if value > lower:
                    lower, best = value, u
        if G.shape[0] <= 2:
            return lower, _planar_maximum(K, G.astype(float)), best
        upper = np.linalg.norm(G.astype(float), 2) if spectral is None else spectral
        return lower, float(upper) * (1 + 1e-13), best


def _value(K: np.ndarray, G: np.ndarray, point: np.ndarray) -> tuple[float, np.ndarray]:
    """||G^T u|| at the unit vector of a point, 0 where that is not in the cone."""
    size = np.sqrt((point**2).sum())
    if size <= 1e-13 * np.sqrt((G**2).sum()):
        return 0.0, np.zeros(len(point))
    u = point / size
    if len(K) and (K @ u).min() < -_FEASIBLE:
        return 0.0, np.zeros(len(point))
    return float(np.sqrt(((G.T @ u) ** 2).sum())), u


def _planar_maximum(K: np.ndarray, G: np.ndarray) -> float:
    """The maximum in at most two dimensions: at the ends of the arc, or at an eigenvector of G G^T inside it."""
    left = np.linalg.svd(G)[0].T
    ends = K @ np.array([[0.0, -1.0], [1.0, 0.0]]) if K.shape[1] == 2 else K
    candidates = np.vstack([left, -left, ends, -ends])
    inside = (candidates @ K.T >= -1e-12).all(1) if len(K) else np.ones(len(candidates), bool)
    values = np.linalg.norm(candidates[inside] @ G, axis=1)
    return float(values.max(initial=0.0)) * (1 + 1e-11) + 1e-11 * float(np.linalg.norm(G))
