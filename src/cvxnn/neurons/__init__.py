"""The dual norm over all ReLU neurons: max over ||u||_2 <= 1 of ||sum_i (x_i . u)_+ nu_i||_2, with sound bounds."""

import math
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxnn.errors import InvalidInputError
from cvxnn.neurons.ascent import LocalMaxima, check_arguments, distinct_neurons, neuron_ascent, neuron_values
from cvxnn.neurons.branching import Branching, branch_and_bound
from cvxnn.neurons.upper import neuron_upper_bound
from cvxnn.norms.base import EPS

__all__ = [
    "MAX_RANK",
    "Branching",
    "LocalMaxima",
    "NeuronBound",
    "branch_and_bound",
    "distinct_neurons",
    "neuron_ascent",
    "neuron_dual_norm",
    "neuron_upper_bound",
]

MAX_RANK = 10  # branch and bound starts from 2^rank cones


@dataclass(frozen=True)
class NeuronBound:
    """Bounds of q(X, nu) = max over ||u||_2 <= 1 of ||sum_i (x_i . u)_+ nu_i||_2, and the neuron of the lower one.

    Attributes
    ----------
    lower, upper : float
        lower <= q <= upper for every perturbation that `error` speaks of, rounding included.
    u : Tensor of shape (d,)
        Unit vector with a value of at least `lower`.
    v : Tensor of shape (c,)
        Unit direction of its value (zero where that is zero): the loss falls along (u, -v).
    exact : bool
        Whether upper <= (1 + 2 tol) lower + 2 error, but for 1e-12 sum_i ||x_i|| ||nu_i|| of rounding.
    nodes : int
        Cones that branch and bound looked at.
    """

    lower: float
    upper: float
    u: Tensor
    v: Tensor
    exact: bool
    nodes: int


@dataclass(frozen=True)
class _Reduced:
    """X close to Z Q^T: q(X, nu) <= stretch q(Z, nu) + residual."""

    Z: Tensor
    Q: Tensor
    stretch: float
    residual: float


def neuron_dual_norm(
    X: Tensor,
    nu: Tensor,
    *,
    error: float = 0.0,
    target: float | None = None,
    tol: float = 1e-6,
    max_nodes: int = 300_000,
    time_limit: float = 10.0,
    starts: int = 128,
    init: Tensor | None = None,
    random_state: int = 0,
) -> NeuronBound:
    """Two-sided bounds of max over ||u||_2 <= 1 of ||sum_i (x_i . u)_+ nu_i||_2, without any list of patterns.

    Local ascent gives the lower bound; branch and bound (rank of X up to `MAX_RANK`) and closed-form bounds give
    the upper one. Sound whenever it stops.

    Parameters
    ----------
    X : Tensor of shape (n, d), float64
        Samples in rows; a penalised hidden bias is a column of ones.
    nu : Tensor of shape (n, c), float64
        Dual candidate, such as the gradient of the loss in the predictions.
    error : float
        Bound of the change of the value at any unit u that the bounds must allow for, such as
        ||X||_2 ||E||_F for an uncertainty E of nu.
    target : float, optional
        The caller asks only on which side of it the maximum is: stop when the upper bound is at most this, or
        when the lower bound is above it.
    tol : float
        Relative width at which to stop.
    max_nodes : int
        Limit of the cones of branch and bound.
    time_limit : float
        Seconds for branch and bound.
    starts : int
        Random starts of the ascent.
    init : Tensor of shape (m, d), optional
        Further starts, such as the neurons of a network.
    random_state : int
        Seed of the random starts.

    Returns
    -------
    NeuronBound

    Raises
    ------
    InvalidInputError
        Where X and nu are not finite float64 matrices with as many rows, or `error` or `tol` is negative or NaN.
    """
    check_arguments(X, nu, init)
    for name, number in (("error", error), ("tol", tol)):
        if not number >= 0:
            raise InvalidInputError(f"{name} must not be negative or NaN, got {number!r}.")
    deadline = time.monotonic() + time_limit
    used = (X != 0).any(1) & (nu != 0).any(1)
    if not bool(used.any()):
        u = torch.eye(1, X.shape[1], dtype=X.dtype, device=X.device)[0]
        return NeuronBound(0.0, error * 1.0, u, nu.new_zeros(nu.shape[1]), True, 0)
    (A, shift_x), (W, shift_nu) = _scaled(X[used]), _scaled(nu[used])
    shift = shift_x + shift_nu
    u, _, value = neuron_ascent(A, W, starts=starts, random_state=random_state, init=init)
    reduced = _reduce(A, W, 0.05 * tol * value)
    goal = None if target is None else (_power(target - error, -shift) - reduced.residual) / reduced.stretch
    goal = None if goal is None else goal * (1 - 16 * EPS) if goal > 0 else -1.0
    point = reduced.Q.mT @ u
    upper, found, nodes = _upper(
        reduced.Z, W, point / torch.linalg.vector_norm(point).clamp_min(1e-300), goal, tol, max_nodes, deadline
    )
    candidates = torch.stack([u, *([] if found is None else [_unit(reduced.Q @ found)])])
    values, directions = neuron_values(A, W, candidates)
    best = int(values.argmax())
    lower = float(values[best]) * (1 - (A.shape[1] + 16) * EPS) - _allowance(A, W)
    low = _power(max(lower, 0.0), shift) * (1 - 4 * EPS) - error * (1 + EPS)
    high = (_power(upper * reduced.stretch + reduced.residual, shift) + error) * (1 + 16 * EPS)
    low, high = low if low > 1e-290 else 0.0, high + 1e-290
    lengths = torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(W, dim=1)
    rounding = _power(1e-12 * float((lengths[0] * lengths[1]).sum()), shift)
    exact = high <= (1 + 2 * tol) * low + 2 * error + rounding
    return NeuronBound(min(low, sys.float_info.max), high, candidates[best], directions[best], exact, nodes)


def _upper(
    Z: Tensor, nu: Tensor, point: Tensor, goal: float | None, tol: float, max_nodes: int, deadline: float
) -> tuple[float, Tensor | None, int]:
    """Upper bound of q(Z, nu), a better point where branch and bound met one, and its number of cones."""
    r = Z.shape[1]
    if r == 0:
        return 0.0, None, 0
    first = r > 6 or (r > 3 and goal is not None)
    upper = neuron_upper_bound(Z, nu) if first else math.inf
    if r > MAX_RANK or (goal is not None and upper <= goal):
        return upper, None, 0
    search = branch_and_bound(Z, nu, point, tol=tol, target=goal, max_nodes=max_nodes, deadline=deadline)
    upper = min(upper, search.upper)
    undecided = search.open and not (goal is not None and search.lower > goal)
    if undecided:
        cover = nu.shape[1] > 1 and time.monotonic() < deadline
        upper = min(upper, neuron_upper_bound(Z, nu, cover=cover))
    return upper, search.point, search.nodes


def _scaled(M: Tensor) -> tuple[Tensor, int]:
    """M times a power of two that brings its largest entry to [1/2, 1), and the exponent that undoes it."""
    largest = float(M.abs().amax()) if M.numel() else 0.0
    if largest == 0:
        return M, 0
    exponent = math.frexp(largest)[1]
    half = exponent // 2
    return M * 2.0**-half * 2.0 ** (half - exponent), exponent


def _power(value: float, exponent: int) -> float:
    """value 2^exponent, infinite where it overflows."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def _unit(u: Tensor) -> Tensor:
    return u / torch.linalg.vector_norm(u).clamp_min(1e-300)


def _allowance(X: Tensor, nu: Tensor) -> float:
    """Rounding of the value at one point, and of what scaling lost to underflow."""
    n = sum(X.shape) + nu.shape[1] + 16
    lengths = torch.linalg.vector_norm(X, dim=1), torch.linalg.vector_norm(nu, dim=1)
    return 2 * n * EPS * float((lengths[0] * lengths[1]).sum()) + n * 1e-290


def _reduce(X: Tensor, nu: Tensor, allowed: float) -> _Reduced:
    """Coordinates in the leading right singular vectors: as few as `allowed` permits for the residual.

    ||x_i - Q z_i|| bounds the change of (x_i . u)_+, and ||Q^T u|| <= sqrt(||Q^T Q||) ||u||.
    """
    weights = torch.linalg.vector_norm(nu, dim=1)
    basis = torch.linalg.svd(X, full_matrices=False).Vh.mT if X.shape[0] else X.new_zeros(X.shape[1], 0)
    parts = X @ basis
    tails = parts.square().flip(1).cumsum(1).flip(1).sqrt()  # what is left from coordinate k on
    costs = (tails * weights[:, None]).sum(0).tolist()
    floor = 8 * (X.shape[1] + 8) * EPS * float((torch.linalg.vector_norm(X, dim=1) * weights).sum())
    r = next((k for k, cost in enumerate(costs) if cost <= max(allowed, floor)), len(costs))
    Q, Z = basis[:, :r].contiguous(), parts[:, :r].contiguous()
    rest = torch.linalg.vector_norm(X - Z @ Q.mT, dim=1)
    rounding = 4 * (X.shape[1] + 8) * EPS * (torch.linalg.vector_norm(X, dim=1) + torch.linalg.vector_norm(Z, dim=1))
    residual = float(((rest + rounding) * weights).sum()) * (1 + (sum(X.shape) + 16) * EPS)
    gram = Q.mT @ Q - torch.eye(r, dtype=X.dtype, device=X.device)
    stretch = 1 + float(torch.linalg.matrix_norm(gram)) + 4 * (X.shape[1] + 8) * (r + 1) * EPS
    return _Reduced(Z, Q, stretch, residual + X.shape[0] * 1e-290)
