"""From the end of a descent to a stationary point nearby, so that theorems about these can be tested."""

from __future__ import annotations

import time

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, minres

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem

__all__ = ["nearby_stationary_point"]

_SMALLEST_STEP = 1e-6


def nearby_stationary_point(
    problem: Problem,
    factors: tuple[torch.Tensor, torch.Tensor],
    *,
    seconds: float,
    tol: float = 1e-7,
    max_iter: int = 1000,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Newton's method on the stationarity conditions (68), (69), with MINRES and backtracking on their residual.

    The residual never grows; a saddle point is as good as a minimum. Columns turned into each other by a
    rotation make the Hessian singular; MINRES takes the shortest step then.

    Parameters
    ----------
    problem : Problem
        With l2 norms and without an output bias.
    factors : pair (U, V), shapes (P, p, m) and (P, q, m)
    seconds : float
        Limit of time.
    tol : float
        End at this relative residual (that of :attr:`Certificate.stationarity`).
    max_iter : int
        Limit of Newton steps.

    Returns
    -------
    pair (U, V) of the same shapes
    """
    loss = FactoredLoss(problem, double=True)
    columns = Columns.from_factors(*(part.double() for part in factors))
    offset = torch.zeros(problem.Y.shape[1], dtype=torch.float64, device=columns.u.device)
    beta, size = problem.beta, columns.u.numel()

    def split(x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        flat = torch.from_numpy(np.ascontiguousarray(x)).to(columns.u)
        return flat[:size].view_as(columns.u), flat[size:].view_as(columns.v)

    def joined(u: torch.Tensor, v: torch.Tensor) -> np.ndarray:
        return torch.cat([u.flatten(), v.flatten()]).cpu().numpy()

    def gradient(x: np.ndarray) -> np.ndarray:
        u, v = split(x)
        slopes = loss.slopes(Columns(columns.gate, u, v), offset)
        return joined(slopes.left + beta * u, slopes.right + beta * v)

    def newton_step(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
        point = Columns(columns.gate, *split(x))

        def product(direction: np.ndarray) -> np.ndarray:
            du, dv = split(direction)
            change = loss.hessian_product(point, offset, du, dv)
            return joined(change.left + beta * du, change.right + beta * dv)

        hessian = LinearOperator((len(x), len(x)), matvec=product, dtype=np.float64)
        return minres(hessian, -slope, rtol=1e-7, maxiter=2000)[0]

    deadline = time.perf_counter() + seconds
    x = joined(columns.u, columns.v)
    slope = gradient(x)
    for _ in range(max_iter):
        residual = float(np.linalg.norm(slope))
        if residual <= tol * beta * float(np.linalg.norm(x)) or time.perf_counter() >= deadline:
            break
        step = newton_step(x, slope)
        length = 1.0
        while length >= _SMALLEST_STEP:
            trial = gradient(x + length * step)
            if float(np.linalg.norm(trial)) < residual * (1 - 1e-4 * length):
                break
            length /= 2
        else:
            break
        x, slope = x + length * step, trial
    return Columns(columns.gate, *split(x)).factors(problem.n_gates)
