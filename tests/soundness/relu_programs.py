"""Good networks: the convex program of fixed output directions in CVXPY, and many long runs of L-BFGS."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import cvxpy as cp
import numpy as np
from scipy.optimize import minimize

from tests.soundness.conic import loss_expression, solve_with_clarabel

if TYPE_CHECKING:
    from tests.soundness.relu_reference import ReluReference

__all__ = ["long_runs", "solve_directions"]

#: Columns u (m, r), gates (m,), outputs v (m, c), an intercept (c,) and a dual point (n, c).
Solution = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None


def solve_directions(
    reference: ReluReference, gate: np.ndarray, directions: np.ndarray, scale: float, tolerance: float
) -> Solution:
    """minimise F(sum_j P D_j X u_j v_j^T + 1 b^T) + beta sum_j ||u_j||, K_j u_j >= 0, for unit v_j (m, c).

    With one output and both signs of v in every cell this is the whole convex program.
    """
    Z = reference.Z / reference.size
    patterns = reference.patterns[gate].astype(float)
    u = cp.Variable((len(gate), Z.shape[1]))
    T = cp.Variable(reference.Y.shape)
    b = cp.Variable((1, reference.Y.shape[1]))
    hidden = u @ Z.T
    active = cp.multiply(patterns, hidden)
    tie = reference.pool @ active.T @ directions + np.ones((len(reference.Y), 1)) @ b - T == 0
    row = np.linalg.norm(Z, axis=1)
    unit = (Z / np.where(row > 0, row, 1)[:, None])[row > 0]
    inside = cp.multiply(2 * patterns[:, row > 0] - 1, u @ unit.T) >= 0
    fixed = [] if reference.instance.output_bias else [b == 0]
    penalty = reference.beta / reference.size * cp.sum(cp.norm(u, 2, axis=1))
    program = cp.Problem(
        cp.Minimize((loss_expression(reference, T) + penalty) / scale),
        [tie, inside, *fixed],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not solve_with_clarabel(program, tolerance):
            return None
    columns = np.asarray(u.value) / reference.size
    return columns, gate, directions, np.asarray(b.value)[0], scale * np.asarray(tie.dual_value)


def long_runs(
    reference: ReluReference, rng: np.random.Generator, starts: int, m: int = 12, max_iter: int = 1000
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Networks (u, v, b) of m neurons trained by L-BFGS from many starts, in the coordinates of the row space."""
    Z = reference.Z[reference.used] / reference.size
    beta, scale = reference.beta / reference.size, reference.plain_loss
    r, c = Z.shape[1], reference.Y.shape[1]
    has_bias = reference.instance.output_bias
    cut = m * r, m * (r + c)

    def unpack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return x[: cut[0]].reshape(m, r), x[cut[0] : cut[1]].reshape(m, c), x[cut[1] :] if has_bias else np.zeros(c)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        u, v, b = unpack(x)
        hidden = np.maximum(Z @ u.T, 0)
        T = hidden @ v + b
        slope = reference.loss.gradient(T).astype(float)
        value = float(reference.loss.value(T)) + beta / 2 * ((u**2).sum() + (v**2).sum())
        to_u = ((slope @ v.T) * (hidden > 0)).T @ Z + beta * u
        to_v = hidden.T @ slope + beta * v
        parts = [to_u.ravel(), to_v.ravel(), slope.sum(0) if has_bias else np.zeros(0)]
        return value / scale, np.concatenate(parts) / scale

    found = []
    size = float(np.sqrt(np.abs(reference.Y).mean() + 1e-3))
    for start in range(starts):
        x = rng.normal(size=cut[1] + (c if has_bias else 0)) * size * (1.0, 0.1, 0.3)[start % 3]
        options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "ftol": 1e-15, "gtol": 1e-12}
        x = minimize(objective, x, jac=True, method="L-BFGS-B", options=options).x
        u, v, b = unpack(x)
        root = np.sqrt(reference.size)
        found.append((u / root, v / root, b))
    return found
