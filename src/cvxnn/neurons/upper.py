"""Sound upper bounds of the dual norm of all ReLU neurons in any dimension, from one small eigenvalue problem each.

With one output and weights w, y_i = x_i.u, any m_i > 0 and any slopes s_i in [0, 1],

    w_i (y_i)_+ <= w_i (m_i y_i^2 + 2 y_i + 1 / m_i) / 4   (w_i > 0),     w_i (y_i)_+ <= w_i s_i y_i   (w_i < 0),

so that the value is at most a quadratic of u, hence at most kappa + tau + sum_i w_i / (4 m_i) wherever the
matrix [[kappa, -b^T], [-b, tau I - Q]] of that quadratic is positive semidefinite: the dual of the Shor
relaxation in the multipliers of h_i (h_i - y_i) = 0, convex in (kappa, tau, m, s). With several outputs

    u^T M v / 2 + sum_i |y_i| |nu_i.v| / 2 <= u^T M v / 2 + sum_i (m_i y_i^2 + (nu_i.v)^2 / m_i) / 4,   M = X^T nu.

Whatever multipliers the optimisation ends with, the bound is evaluated with an allowance for rounding.
"""

import math

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from torch import Tensor

from cvxnn.neurons.ascent import check_arguments
from cvxnn.neurons.relaxation import cap_bound, halved, orthants
from cvxnn.norms.base import EPS
from cvxnn.norms.nuclear import spectral_bounds

__all__ = ["neuron_upper_bound"]

MAX_NEWTON = 600  # unknowns of the linear systems of Newton's method
NEWTON_STEPS = 60
COVERS = {2: 4, 3: 5}  # bisections of the orthants of v, by the number of outputs


def neuron_upper_bound(X: Tensor, nu: Tensor, *, cover: bool = False) -> float:
    """An upper bound of max over ||u||_2 <= 1 of ||sum_i (x_i . u)_+ nu_i||_2, rounding included.

    Parameters
    ----------
    X : Tensor of shape (n, d), float64
    nu : Tensor of shape (n, c), float64
        Both of moderate scale (no entry whose square over- or underflows).
    cover : bool
        Two or three outputs only: also bound the value in many directions v and interpolate; slower, tighter.

    Returns
    -------
    float

    Raises
    ------
    InvalidInputError
        Where X and nu are not finite float64 matrices with as many rows.
    """
    check_arguments(X, nu)
    norms, weights = torch.linalg.vector_norm(X, dim=1), torch.linalg.vector_norm(nu, dim=1)
    used = (norms > 0) & (weights > 0)
    if not bool(used.any()):
        return 0.0
    X, nu = X[used], nu[used]
    total = float((norms[used] * weights[used]).sum()) * (1 + 4 * len(X) * EPS)
    if nu.shape[1] == 1:
        best = max(_scalar_bound(X, nu[:, 0]), _scalar_bound(X, -nu[:, 0]))
        return min(total, best)
    best = min(total, _matrix_bound(X, nu))
    if cover and nu.shape[1] in COVERS:
        best = min(best, _cover_bound(X, nu))
    return best


def _cover_bound(X: Tensor, nu: Tensor) -> float:
    """Bounds h_j for unit v_j; on the cone of some v_j the value is convex in v = sum_j t_j v_j: at most h.t."""
    cones = orthants(nu.shape[1], nu)
    for _ in range(COVERS[nu.shape[1]]):
        cones = halved(cones)
    points, where = torch.unique(cones.reshape(-1, cones.shape[2]), dim=0, return_inverse=True)
    values = nu.new_tensor([_scalar_bound(X, nu @ v) for v in points])
    bound = float(cap_bound(values[where].reshape(cones.shape[:2]), cones)[0].amax())
    total = float((torch.linalg.vector_norm(X, dim=1) * torch.linalg.vector_norm(nu, dim=1)).sum())
    return bound * (1 + 64 * EPS) + 128 * EPS * total  # products nu v, and slits between the cones


def _scalar_bound(X: Tensor, w: Tensor) -> float:
    """Upper bound of max sum_i w_i (x_i . u)_+ over the unit ball."""
    rows = (X * w.abs()[:, None]).detach().cpu().numpy()
    positive = (w > 0).cpu().numpy()
    convex, concave = rows[positive], rows[(w < 0).cpu().numpy()]
    scale = float(np.abs(convex).max(initial=0.0))
    if scale == 0:
        return 0.0
    convex, concave = convex / scale, concave / scale
    shor = _Shor(convex, concave)
    shor.optimise()
    rounding = 4 * EPS * (np.linalg.norm(convex, axis=1).sum() + np.linalg.norm(concave, axis=1).sum())
    return float((shor.certified() + rounding) * scale * (1 + 8 * EPS))


class _Shor:
    """The dual problem in theta = (m, s, kappa, tau) with a barrier of weight mu, for rows weighted by |w_i|."""

    def __init__(self, convex: np.ndarray, concave: np.ndarray) -> None:
        self.convex, self.concave = convex, concave
        self.r = convex.shape[1]
        lengths = np.maximum(np.linalg.norm(convex, axis=1), 1e-12)
        m, slopes = math.sqrt(self.r) / lengths, np.full(len(concave), 0.5)
        Q, b = self._quadratic(m, slopes)
        tau = 1.5 * float(np.linalg.eigvalsh(Q)[-1])
        kappa = 1.5 * float(b @ np.linalg.solve(tau * np.eye(self.r) - Q, b)) + 0.01 * tau
        self.theta = np.concatenate([m, slopes, [kappa, tau]])

    def _split(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
        n = len(self.convex)
        return theta[:n], theta[n:-2], float(theta[-2]), float(theta[-1])

    def _quadratic(self, m: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        Q = (self.convex.T * (m / 4)) @ self.convex
        return Q, self.convex.sum(0) / 4 - self.concave.T @ slopes / 2

    def _matrix(self, theta: np.ndarray) -> np.ndarray:
        m, slopes, kappa, tau = self._split(theta)
        Q, b = self._quadratic(m, slopes)
        A = np.empty((self.r + 1, self.r + 1))
        A[0, 0], A[0, 1:], A[1:, 0], A[1:, 1:] = kappa, -b, -b, tau * np.eye(self.r) - Q
        return A

    def value(self, theta: np.ndarray) -> float:
        m, _, kappa, tau = self._split(theta)
        return kappa + tau + float((1 / m).sum()) / 4

    def certified(self) -> float:
        """The bound at theta, whatever it is: a negative eigenvalue costs twice its size (||(1, u)||^2 <= 2)."""
        m, slopes, _, _ = self._split(self.theta)
        A = self._matrix(self.theta)
        n = len(self.convex) + len(self.concave)
        lengths = np.linalg.norm(self.convex, axis=1)
        terms = float(m @ lengths**2 + lengths.sum() + slopes @ np.linalg.norm(self.concave, axis=1))
        allowance = EPS * (2 * (n + self.r + 8) * terms + 8 * (self.r + 4) * float(np.linalg.norm(A)))
        worst = max(0.0, allowance - float(np.linalg.eigvalsh(A)[0]))
        return (self.value(self.theta) + 2 * worst) * (1 + (n + 8) * EPS)

    def _barrier(self, theta: np.ndarray, mu: float) -> float:
        m, slopes, kappa, tau = self._split(theta)
        if min(m.min(), slopes.min(initial=1.0), 1 - slopes.max(initial=0.0), kappa, tau) <= 0:
            return math.inf
        try:
            L = np.linalg.cholesky(self._matrix(theta))
        except np.linalg.LinAlgError:
            return math.inf
        logs = 2 * np.log(np.diag(L)).sum() + np.log(slopes * (1 - slopes)).sum() + math.log(kappa * tau)
        return self.value(theta) - mu * float(logs)

    def optimise(self) -> None:
        """Newton's method with a barrier that is lowered; stays feasible, so it may stop anywhere."""
        size = (self.r + 1) * (self.r + 2) // 2
        if min(size, len(self.theta)) > MAX_NEWTON:
            return
        value = self.value(self.theta)
        mu, last = 0.1 * value / len(self.theta), 1e-5 * value / len(self.theta)
        for _ in range(NEWTON_STEPS):
            step, decrement = self._newton(mu)
            here, length = self._barrier(self.theta, mu), 1.0
            while (
                length > 1e-6 and not self._barrier(self.theta + length * step, mu) <= here - 1e-3 * length * decrement
            ):
                length /= 2
            if length <= 1e-6 or decrement < 0.3 * mu:
                if mu <= last:
                    break
                mu *= 0.15
            if length > 1e-6:
                self.theta = self.theta + length * step

    def _newton(self, mu: float) -> tuple[np.ndarray, float]:
        """Newton step and decrement; the Hessian is diagonal plus mu J J^T."""
        m, slopes, kappa, tau = self._split(self.theta)
        L = np.linalg.cholesky(self._matrix(self.theta))  # feasible: `_barrier` was finite there
        T = solve_triangular(L, np.eye(self.r + 1), lower=True)
        first, rest = T[:, 0], T[:, 1:]
        q, p = self.convex @ rest.T, self.concave @ rest.T
        gradient = np.concatenate(
            [
                -1 / (4 * m**2) + mu / 4 * (q * q).sum(1),
                -mu * (p @ first) - mu / slopes + mu / (1 - slopes),
                [1 - mu * first @ first - mu / kappa, 1 - mu * (rest * rest).sum() - mu / tau],
            ]
        )
        upper = np.triu_indices(self.r + 1)
        weight = np.where(upper[0] == upper[1], 1.0, math.sqrt(2.0))
        i, j = upper
        J = np.concatenate(
            [
                -q[:, i] * q[:, j] / 4,
                (p[:, i] * first[j] + p[:, j] * first[i]) / 2,
                (first[i] * first[j])[None],
                (rest @ rest.T)[i, j][None],
            ]
        )
        J *= weight * math.sqrt(mu)
        D = np.concatenate([1 / (2 * m**3), mu / slopes**2 + mu / (1 - slopes) ** 2, [mu / kappa**2, mu / tau**2]])
        D = np.maximum(D, 1e-14 * D.max())
        if J.shape[0] <= J.shape[1]:
            step = -np.linalg.solve(np.diag(D) + J @ J.T, gradient)
        else:
            scaled = J / D[:, None]
            inner = np.eye(J.shape[1]) + J.T @ scaled
            step = -(gradient / D - scaled @ np.linalg.solve(inner, scaled.T @ gradient))
        return step, max(float(-gradient @ step), 0.0)


def _matrix_bound(X: Tensor, nu: Tensor) -> float:
    """Twice the largest eigenvalue of a block matrix, for the m that L-BFGS finds."""
    lengths = torch.linalg.vector_norm(X, dim=1), torch.linalg.vector_norm(nu, dim=1)
    root = (lengths[0] * lengths[1]).sqrt()
    rows, weights = X * (root / lengths[0])[:, None], nu * (root / lengths[1])[:, None]
    scale = float(root.amax())
    rows, weights = rows / scale, weights / scale
    x, w = rows.detach().cpu().numpy(), weights.detach().cpu().numpy()
    balance = math.sqrt(np.linalg.eigvalsh(w.T @ w)[-1] / np.linalg.eigvalsh(x.T @ x)[-1])
    log_m = np.full(len(x), math.log(balance))
    for smoothing in (1e-2, 1e-3, 1e-4):
        result = minimize(_smooth_eigenvalue, log_m, (x, w, smoothing), "L-BFGS-B", True, options={"maxiter": 60})
        log_m = result.x
    block, _ = _block(x, w, np.exp(log_m))
    terms = float((np.exp(log_m) * (x * x).sum(1) + (w * w).sum(1) / np.exp(log_m)).sum())
    spectral = float(spectral_bounds(X.new_tensor(_shifted(block))[None])[1])
    shift = float(np.abs(block).sum(1).max())
    cross = float((np.linalg.norm(x, axis=1) * np.linalg.norm(w, axis=1)).sum())
    allowance = EPS * ((len(x) + 16) * (terms + cross) + 16 * shift)
    return (2 * (spectral - shift + allowance)) * scale**2 * (1 + 64 * EPS)


def _shifted(block: np.ndarray) -> np.ndarray:
    """Plus a multiple of the identity that makes it positive semidefinite (Gershgorin)."""
    return block + np.abs(block).sum(1).max() * np.eye(len(block))


def _block(x: np.ndarray, w: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, int]:
    r = x.shape[1]
    cross = x.T @ w
    return np.block([[(x.T * m) @ x, cross], [cross.T, (w.T / m) @ w]]) / 4, r


def _smooth_eigenvalue(log_m: np.ndarray, x: np.ndarray, w: np.ndarray, smoothing: float) -> tuple[float, np.ndarray]:
    """Soft maximum of the eigenvalues and its gradient."""
    m = np.exp(log_m)
    block, r = _block(x, w, m)
    values, vectors = np.linalg.eigh(block)
    mu = smoothing * float(np.abs(values).max())
    weights = np.exp((values - values[-1]) / mu)
    total = weights.sum()
    squares = m[:, None] * (x @ vectors[:r]) ** 2 - (w @ vectors[r:]) ** 2 / m[:, None]
    return float(values[-1] + mu * math.log(total)), squares @ (weights / total) / 4
