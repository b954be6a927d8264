"""L-BFGS over a list of tensors, by SciPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from threadpoolctl import threadpool_limits

__all__ = ["Minimum", "minimise"]


@dataclass
class Minimum:
    """Where L-BFGS ended: the tensors, the value, its iterations and whether it used them all."""

    parts: list[torch.Tensor]
    value: float
    n_iter: int
    at_limit: bool


def minimise(
    objective: Callable[..., tuple[Any, Sequence[torch.Tensor]]],
    start: list[torch.Tensor],
    limit: int,
    *,
    gtol: float,
    ftol: float = 1e-15,
    history: int = 20,
    n_positive: int = 0,
    deadline: float | None = None,
    stop: Callable[[float], bool] | None = None,
) -> Minimum:
    """Minimise a smooth function of float64 tensors (L-BFGS-B).

    Parameters
    ----------
    objective : callable
        Gets one tensor per entry of `start`; returns the value and the gradients.
    start : list of torch.Tensor
    limit : int
        Limit of iterations.
    gtol : float
        End where no entry of the gradient is larger.
    ftol : float
        End where a step lowers the value by a smaller fraction.
    history : int
        Number of pairs that approximate the Hessian.
    n_positive : int
        The first so many entries are kept >= 0.
    deadline : float, optional
        Value of ``time.perf_counter`` at which to end.
    stop : callable, optional
        Called with the value after each iteration; a true return value ends.
    """
    device = start[0].device
    sizes = [part.numel() for part in start]

    def split(x: np.ndarray) -> list[torch.Tensor]:
        flat = torch.from_numpy(x).to(device).split(sizes)
        return [part.view_as(like) for part, like in zip(flat, start, strict=True)]

    def flat_objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slopes = objective(*split(x))
        return float(value), torch.cat([part.flatten() for part in slopes]).cpu().numpy()

    def after_iteration(intermediate_result: Any) -> None:
        late = deadline is not None and time.perf_counter() >= deadline
        if late or (stop is not None and stop(float(intermediate_result.fun))):
            raise StopIteration

    bounds = None
    if n_positive:
        lower = np.full(sum(sizes), -np.inf)
        lower[:n_positive] = 0.0
        bounds = Bounds(lower, np.inf)
    # L-BFGS-B calls BLAS on short vectors between calls of torch; threads of both would wait for each other.
    with threadpool_limits(limits=1, user_api="blas"):
        solution = minimize(
            flat_objective,
            torch.cat([part.flatten() for part in start]).cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            callback=after_iteration,
            options={"maxiter": limit, "maxfun": 20 * limit, "maxcor": history, "ftol": ftol, "gtol": gtol},
        )
    return Minimum(split(solution.x), float(solution.fun), int(solution.nit), int(solution.nit) >= limit)
