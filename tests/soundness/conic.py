"""The primal and the dual program of a problem in CVXPY, solved with Clarabel."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import cvxpy as cp
import numpy as np

if TYPE_CHECKING:
    from tests.soundness.reference import Reference
    from tests.soundness.relu_reference import ReluReference

__all__ = ["loss_expression", "solve_dual", "solve_primal", "solve_with_clarabel"]

_ORDERS: dict[str, Any] = {"l1": 1, "l2": 2, "linf": "inf"}
_DUALS: dict[str, Any] = {"l1": "inf", "l2": 2, "linf": 1}

#: Z (P, p, q), intercept (c,) and nu (n, c), or None where there is none.
Solution = tuple[np.ndarray, np.ndarray, np.ndarray] | None


def solve_primal(reference: Reference, scale: float, tolerance: float) -> Solution:
    """minimise F(T) + beta Omega(Z), T = A(Z) + 1 b^T, with the objective divided by `scale`.

    The variables are Z times the size of the features.
    """
    P, p, q = reference.block_shape
    c = reference.Y.shape[1]
    size = _size(reference.features)
    Z = [cp.Variable((p, q)) for _ in range(P)]
    T = cp.Variable(reference.Y.shape)
    b = cp.Variable((1, c))
    flat = cp.vstack([cp.reshape(block, (p * q // c, c), order="C") for block in Z])
    tie = (reference.features / size) @ flat + np.ones((len(reference.Y), 1)) @ b - T == 0
    fixed = [] if reference.instance.output_bias else [b == 0]
    penalty = cp.sum([_norm(block, reference.instance.norms) for block in Z])
    objective = (loss_expression(reference, T) + reference.beta / size * penalty) / scale
    if not solve_with_clarabel(cp.Problem(cp.Minimize(objective), [tie, *fixed]), tolerance):
        return None
    values = np.array([block.value for block in Z])
    return values / size, np.asarray(b.value)[0], scale * np.asarray(tie.dual_value)


def solve_dual(reference: Reference, scale: float, tolerance: float) -> Solution:
    """maximise -F*(nu) over ||A_k*(nu)||_D* <= beta, 1^T nu = 0; Z and b are multipliers.

    The objective is divided by `scale`, and the blocks A_k*(nu) by beta.
    """
    P, p, q = reference.block_shape
    n, c = reference.Y.shape
    nu = cp.Variable((n, c))
    blocks = [cp.Variable((p, q)) for _ in range(P)]
    features = reference.features.reshape(n, P, -1)
    size = _size(features)
    flat = [cp.reshape(block, (p * q // c, c), order="C") for block in blocks]
    ties = [features[:, k].T / size @ nu - reference.beta / size * flat[k] == 0 for k in range(P)]
    constraints = [_dual_norm(block, reference.instance.norms) <= 1 for block in blocks]
    centered = [cp.sum(nu, axis=0) == 0] if reference.instance.output_bias else []
    conjugate, domain = _conjugate(reference, nu)
    program = cp.Problem(cp.Minimize(conjugate / scale), [*ties, *constraints, *centered, *domain])
    if not solve_with_clarabel(program, tolerance):
        return None
    Z = np.array([-scale / size * tie.dual_value for tie in ties]).reshape(reference.block_shape)
    intercept = -scale * np.ravel(centered[0].dual_value) if centered else np.zeros(c)
    return Z, intercept, np.asarray(nu.value)


def _size(features: np.ndarray) -> float:
    """Root mean square of the entries that are not 0."""
    entries = features[features != 0]
    return float(np.sqrt(np.mean(entries**2))) if len(entries) else 1.0


def solve_with_clarabel(program: cp.Problem, tolerance: float) -> bool:
    """Whether Clarabel returned a point, however inaccurate."""
    settings = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.solve(solver=cp.CLARABEL, accept_unknown=True, **settings)
    except cp.SolverError:
        return False
    values = [part.value for part in program.variables()]
    values += [part.dual_value for part in program.constraints]
    return all(value is not None and np.isfinite(value).all() for value in values)


def _norm(Z: cp.Variable, norms: tuple[str, str]) -> cp.Expression:
    left, right = norms
    if Z.shape[1] == 1:
        return cp.norm(Z[:, 0], _ORDERS[left])
    if Z.shape[0] == 1:
        return cp.norm(Z[0], _ORDERS[right])
    if left == "l1":
        return cp.sum(cp.norm(Z, _ORDERS[right], axis=1))
    if right == "l1":
        return cp.sum(cp.norm(Z, _ORDERS[left], axis=0))
    return cp.normNuc(Z)


def _dual_norm(G: cp.Variable, norms: tuple[str, str]) -> cp.Expression:
    left, right = norms
    if G.shape[1] == 1:
        return cp.norm(G[:, 0], _DUALS[left])
    if G.shape[0] == 1:
        return cp.norm(G[0], _DUALS[right])
    if left == "l1":
        return cp.max(cp.norm(G, _DUALS[right], axis=1))
    if right == "l1":
        return cp.max(cp.norm(G, _DUALS[left], axis=0))
    return cp.sigma_max(G)


def loss_expression(reference: Reference | ReluReference, T: cp.Variable) -> cp.Expression:
    Y, name = reference.Y, reference.instance.loss
    w = np.repeat(reference.w[:, None], Y.shape[1], axis=1)
    if name == "squared":
        return cp.sum(cp.multiply(w / 2, cp.square(T - Y)))
    if name == "huber":
        delta: Any = reference.instance.delta
        return cp.sum(cp.multiply(w / 2, cp.huber(T - Y, delta)))
    if name == "logistic":
        return cp.sum(cp.multiply(w, cp.logistic(T))) - cp.sum(cp.multiply(w * Y, T))
    mass = reference.w * Y.sum(1)
    return cp.sum(cp.multiply(mass, cp.log_sum_exp(T, axis=1))) - cp.sum(cp.multiply(w * Y, T))


def _conjugate(reference: Reference, nu: cp.Variable) -> tuple[cp.Expression, list[cp.Constraint]]:
    """F*(nu), and the constraints of its domain."""
    Y, name = reference.Y, reference.instance.loss
    w = np.repeat(reference.w[:, None], Y.shape[1], axis=1)
    if name in ("squared", "huber"):
        value = cp.sum(cp.multiply(0.5 / w, cp.square(nu))) + cp.sum(cp.multiply(nu, Y))
        if name == "squared":
            return value, []
        return value, [cp.abs(nu) <= w * reference.instance.delta]
    Q = cp.multiply(1 / w, nu) + Y
    if name == "logistic":
        return -cp.sum(cp.multiply(w, cp.entr(Q) + cp.entr(1 - Q))), []
    mass = np.repeat(Y.sum(1, keepdims=True), Y.shape[1], axis=1)
    return -cp.sum(cp.multiply(w * mass, cp.entr(cp.multiply(1 / mass, Q)))), [cp.sum(nu, axis=1) == 0]
