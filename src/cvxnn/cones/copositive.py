"""Upper bounds of the cone-constrained dual norm from multipliers of products of constraints.

For u with K u >= 0 and every symmetric N >= 0 (entrywise), ||G^T u||^2 <= u^T (G G^T + K^T N K) u, hence
q^2 <= lambda_max(G G^T + K^T N K) (section 3 of the maths). The best N solves a semidefinite program whose dual is
max <G G^T, U>, U psd, tr U = 1, K U K^T >= 0. Here only the entries of N that matter are variables: pairs of rows
violated by U enter, those with a zero multiplier leave, and each restricted program is solved by a primal-dual
interior-point method, batched over gates. Every N on the way gives a bound.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvxnn.errors import DependencyError
from cvxnn.norms.base import EPS
from cvxnn.norms.nuclear import spectral_bounds

if TYPE_CHECKING:
    from cvxnn.cones.cones import Cones

__all__ = ["copositive_bounds", "sdp_bounds"]

_CHUNK = 2**22  # entries of the largest temporaries
_LEAST_PAIRS = 32  # pairs added in a round, at least
_MOST_PAIRS = 320
_KEEP = 1e-6  # multipliers below this, relative to the largest, are dropped between rounds
_TO_BOUNDARY = 0.98
_STUCK = 1e-6  # step length below which a program is given up


def multiplier_upper(G: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Rigorous bound sqrt(lambda_max(G G^T + sum_e weight_e (a_e b_e^T + b_e a_e^T) / 2)), (B,).

    Parameters
    ----------
    G : Tensor of shape (B, d, c)
        Largest entries near 1.
    first, second : Tensor of shape (B, E, d)
        The unit rows a_e, b_e of the cones, each entry correct to some eps.
    weight : Tensor of shape (B, E)
        Negative ones count as zero.
    """
    (_, d, c), E = G.shape, weight.shape[1]
    weight = weight.clamp_min(0)
    S = _quadratic(G @ G.mT, first, second, weight)
    squares = G.square().sum((1, 2))
    terms = (c + 8) * squares + (E + d + 16) * weight.sum(1) + 8 * d * S.flatten(1).norm(dim=1)
    upper = (_top(S) + 2 * EPS * terms).clamp_min(0).sqrt() * (1 + 4 * EPS)
    return torch.where(upper.isnan(), torch.inf, upper)


def copositive_bounds(
    cones: Cones,
    gate: Tensor,
    G: Tensor,
    lower: Tensor,
    max_rounds: int = 8,
    tolerance: float = 1e-6,
    deadline: float = math.inf,
) -> Tensor:
    """Upper bounds of the dual norms (B,), never above the spectral norm's.

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (B,), long
    G : Tensor of shape (B, d, c)
        Largest entries near 1.
    lower : Tensor of shape (B,)
        Values known to be reached: a gate is finished when its bound is within `tolerance` of it.
    max_rounds : int
        Rounds of choosing pairs of rows; 0 gives the spectral norm.
    deadline : float
        Value of ``time.perf_counter()`` at which to stop; the bounds are sound wherever that is.
    """
    spectral = spectral_bounds(G)[1]
    n = len(cones.rows)
    todo = (spectral > lower * (1 + tolerance)) & (spectral > 0)
    chosen = todo.nonzero()[:, 0]
    if n < 2 or max_rounds == 0 or len(chosen) == 0:
        return spectral
    d = G.shape[1]
    growth = max(_LEAST_PAIRS, d * (d + 1) // 2)
    sizes = [min(n * (n - 1) // 2, _MOST_PAIRS, growth * k) for k in range(1, max_rounds + 1)]
    upper = spectral.clone()
    for part in chosen.split(max(1, _CHUNK // max(n * n, 4 * sizes[-1] ** 2))):
        if time.perf_counter() > deadline:
            break
        K = cones.signs(gate[part])[:, :, None] * cones.rows
        bound = _column_generation(K, G[part], lower[part], sizes, tolerance, deadline)
        upper[part] = torch.minimum(spectral[part], bound)
    return upper


def _column_generation(
    K: Tensor, G: Tensor, lower: Tensor, sizes: list[int], tolerance: float, deadline: float
) -> Tensor:
    """Best bounds over rounds of restricted programs with `sizes` pairs, for rows K (B, n, d)."""
    B, n, d = K.shape
    M = G @ G.mT
    scale = _top(M)[:, None, None]
    M = M / scale
    density = M / _trace(M)[:, None, None]
    upper = torch.full((B,), torch.inf, dtype=M.dtype, device=M.device)
    kept = M.new_zeros(B, n, n)
    active = torch.arange(B, device=M.device)
    for n_pairs in sizes:
        left, right = _choose_pairs(K[active], density[active], kept[active], n_pairs)
        first, second = (K[active].gather(1, index[:, :, None].expand(-1, -1, d)) for index in (left, right))
        target = lower[active].square() / scale[active, 0, 0]
        weight, U = _restricted_program(M[active], first, second, target, tolerance, deadline)
        bound = multiplier_upper(G[active], first, second, weight * scale[active, 0])
        upper[active] = torch.minimum(upper[active], bound)
        kept[active] = 0.0
        least = weight.amax(1, keepdim=True) * _KEEP
        if n_pairs == _MOST_PAIRS:  # make room
            least = torch.maximum(least, weight.median(1, keepdim=True).values)
        kept[active[:, None], left, right] = torch.where(weight > least, weight, 0.0)
        density[active] = U
        active = active[upper[active] > lower[active] * (1 + tolerance)]
        if len(active) == 0 or n_pairs == n * (n - 1) // 2 or time.perf_counter() > deadline:
            break
    return upper


def _choose_pairs(K: Tensor, density: Tensor, kept: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    """Rows i < j of the pairs kept and of those with negative (K U K^T)_ij, (B, n_pairs) each.

    The most negative one of each row comes first, as those of one row resemble each other.
    """
    n = K.shape[1]
    products = K @ density @ K.mT
    least = products.amin(2, keepdim=True)
    foremost = (products < 0) & ((products <= least) | (products <= least.mT))
    score = torch.where(foremost, products - 10.0, products)
    score = torch.where(kept > 0, -1e3 - kept, score)
    above = torch.ones(n, n, dtype=torch.bool, device=K.device).triu(1)
    score = score.masked_fill(~above, torch.inf)
    flat = score.flatten(1).topk(n_pairs, dim=1, largest=False).indices
    return flat // n, flat % n


def _restricted_program(
    M: Tensor,
    first: Tensor,
    second: Tensor,
    target: Tensor,
    tolerance: float,
    deadline: float = math.inf,
    max_iter: int = 40,
) -> tuple[Tensor, Tensor]:
    """Weights nu >= 0 that make lambda_max(M + sum_e nu_e A_e) small, A_e = (a_e b_e^T + b_e a_e^T) / 2.

    A primal-dual interior-point method (Helmberg, Kojima and Monteiro's direction) for min s subject to
    Z = s I - M - sum_e nu_e A_e psd, with U psd of trace 1 and w_e = <A_e, U> >= 0 in the dual. lambda_max(M) = 1.

    Returns
    -------
    weight : Tensor of shape (B, E)
        The best found.
    U : Tensor of shape (B, d, d)
        The last dual iterate.
    """
    B, d, _ = M.shape
    E = first.shape[1]
    eye = torch.eye(d, dtype=M.dtype, device=M.device)
    nu = M.new_full((B, E), 1.0 / E)
    w = M.new_full((B, E), 1.0 / d)
    U = (eye / d).expand(B, d, d).clone()
    s = _top(_quadratic(M, first, second, nu)) + 1.0
    best, weight, density = torch.ones_like(s), torch.zeros_like(nu), U.clone()
    going = torch.arange(B, device=M.device)
    for _ in range(max_iter):
        Z = s[:, None, None] * eye - _quadratic(M, first, second, nu)
        ds, dnu, dZ, dU, dw = _Newton(Z, U, nu, w, first, second).corrected(Z)
        primal = torch.minimum(_step(nu, dnu), _matrix_step(Z, dZ))
        dual = torch.minimum(_step(w, dw), _matrix_step(U, dU))
        s, nu = _move(s, primal, ds), _move(nu, primal, dnu)
        w, U = _move(w, dual, dw), _move(U, dual, dU)
        value = _top(_quadratic(M, first, second, nu))
        better = value < best[going]
        best[going] = torch.where(better, value, best[going])
        weight[going] = torch.where(better[:, None], nu, weight[going])
        density[going] = U
        gap = (U * Z).sum((1, 2)) + (w * nu).sum(1)
        finished = (gap < tolerance / 4) | (best[going] <= target * (1 + tolerance))
        left = ~finished & (torch.maximum(primal, dual) > _STUCK)
        if not bool(left.any()) or time.perf_counter() > deadline:
            break
        going = going[left]
        M, first, second, target, s, nu, w, U = (x[left] for x in (M, first, second, target, s, nu, w, U))
    return weight, density


class _Newton:
    """Newton systems at one point: the Schur complement is factorised once for predictor and corrector."""

    def __init__(self, Z: Tensor, U: Tensor, nu: Tensor, w: Tensor, first: Tensor, second: Tensor) -> None:
        self.U, self.nu, self.w, self.first, self.second = U, nu, w, first, second
        eye = torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device).expand_as(Z)
        self.inverse = torch.cholesky_solve(eye, torch.linalg.cholesky_ex(Z).L)
        H = _hessian(U, self.inverse, first, second)
        H.diagonal(dim1=1, dim2=2).mul_(1 + 1e-14).add_(w / nu)
        self.factor = torch.linalg.cholesky_ex(H).L
        product = _symmetric(U @ self.inverse)
        self.g = _entries(product, first, second)
        self.solved = torch.cholesky_solve(self.g[:, :, None], self.factor)[:, :, 0]
        self.pivot = (self.g * self.solved).sum(1) - _trace(product)

    def direction(self, mu: Tensor, matrix: Tensor | float = 0.0, vector: Tensor | float = 0.0) -> tuple[Tensor, ...]:
        """(ds, dnu, dZ, dU, dw) towards U Z = mu I - matrix Z, w nu = mu - vector nu, in first order."""
        target = mu[:, None, None] * self.inverse - matrix
        r = mu[:, None] / self.nu - vector - _entries(target, self.first, self.second)
        r = torch.cholesky_solve(r[:, :, None], self.factor)[:, :, 0]
        ds = (1 - _trace(target) - (self.g * r).sum(1)) / self.pivot
        dnu = r + ds[:, None] * self.solved
        eye = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
        dZ = ds[:, None, None] * eye - _quadratic(torch.zeros_like(target), self.first, self.second, dnu)
        dU = target - self.U - _symmetric(self.U @ dZ @ self.inverse)
        dw = (mu[:, None] - self.w * dnu) / self.nu - vector - self.w
        return ds, dnu, dZ, dU, dw

    def corrected(self, Z: Tensor) -> tuple[Tensor, ...]:
        """Mehrotra's direction: how far the predictor gets sets the centring, its products the correction."""
        zero = torch.zeros_like(self.pivot)
        _, dnu, dZ, dU, dw = self.direction(zero)
        primal = torch.minimum(_step(self.nu, dnu), _matrix_step(Z, dZ))
        dual = torch.minimum(_step(self.w, dw), _matrix_step(self.U, dU))
        gap = (self.U * Z).sum((1, 2)) + (self.nu * self.w).sum(1)
        p, q = primal[:, None], dual[:, None]
        after = ((self.U + q[..., None] * dU) * (Z + p[..., None] * dZ)).sum((1, 2))
        after = after + ((self.nu + p * dnu) * (self.w + q * dw)).sum(1)
        share = (after / gap).clamp(0, 1)
        centring = share ** torch.where(torch.minimum(primal, dual) > 0.1, 3.0, 1.0)
        mu = centring.clamp(1e-4, 0.9) * gap / (self.nu.shape[1] + Z.shape[1])
        return self.direction(mu, _symmetric(dU @ dZ @ self.inverse), dnu * dw / self.nu)


def _hessian(U: Tensor, inverse: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<A_e, U A_f Z^-1> made symmetric, (B, E, E)."""
    aU, bU, aZ, bZ = a @ U, b @ U, a @ inverse, b @ inverse
    aUb, aZb = aU @ b.mT, aZ @ b.mT
    H = (aU @ a.mT) * (bZ @ b.mT) + (bU @ b.mT) * (aZ @ a.mT) + aUb * aZb.mT + aUb.mT * aZb
    return H / 4


def _quadratic(M: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """M + sum_e weight_e (a_e b_e^T + b_e a_e^T) / 2."""
    return M + _symmetric((first * weight[:, :, None]).mT @ second)


def _entries(S: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """<A_e, S> for symmetric S, (B, E)."""
    return (first @ S * second).sum(2)


def _symmetric(S: Tensor) -> Tensor:
    return (S + S.mT) / 2


def _top(S: Tensor) -> Tensor:
    """Largest eigenvalues; infinite where S is not finite."""
    finite = S.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], S, 0.0))[:, -1]
    return torch.where(finite, values, torch.inf)


def _trace(S: Tensor) -> Tensor:
    return S.diagonal(dim1=1, dim2=2).sum(1)


def _move(x: Tensor, step: Tensor, dx: Tensor) -> Tensor:
    """x + step dx, x itself where the step is 0 (and dx perhaps not finite)."""
    step = step.reshape(-1, *(1 for _ in range(x.ndim - 1)))
    return torch.where(step > 0, x + step * dx, x)


def _step(x: Tensor, dx: Tensor) -> Tensor:
    """Largest steps that keep x positive, shortened; 0 where the direction is not finite."""
    ratio = torch.where(dx < 0, -x / dx, torch.inf).amin(1)
    step = (_TO_BOUNDARY * ratio).clamp(max=1.0)
    return torch.where(dx.isfinite().all(1), step, 0.0)


def _matrix_step(S: Tensor, dS: Tensor) -> Tensor:
    """Largest steps that keep S positive definite, shortened; 0 where that cannot be told."""
    factor, info = torch.linalg.cholesky_ex(S)
    left = torch.linalg.solve_triangular(factor, dS, upper=False)
    inner = torch.linalg.solve_triangular(factor, left.mT, upper=False)
    usable = inner.isfinite().all(-1).all(-1) & (info == 0)
    lowest = torch.linalg.eigvalsh(_symmetric(torch.where(usable[:, None, None], inner, 0.0)))[:, 0]
    step = torch.where(lowest < 0, _TO_BOUNDARY / -lowest, 1.0).clamp(max=1.0)
    return torch.where(usable, step, 0.0)


def sdp_bounds(cones: Cones, gate: Tensor, G: Tensor, solver: str = "CLARABEL") -> Tensor:
    """The same bound with N over all pairs of rows by CVXPY, one gate at a time: a reference for small cones.

    Whatever the solver returned, negative entries of N are set to zero and the bound is computed anew, so that it
    is sound.

    Raises
    ------
    DependencyError
        If CVXPY is not installed.
    """
    if importlib.util.find_spec("cvxpy") is None:
        raise DependencyError("method='sdp' needs cvxpy, which is not installed: pip install 'cvxnn[reference]'")
    spectral = spectral_bounds(G)[1]
    n = len(cones.rows)
    upper = spectral.clone()
    for b in (spectral > 0).nonzero()[:, 0].tolist() if n else []:
        K = cones.signs(gate[b : b + 1])[0][:, None] * cones.rows
        N = _solve_sdp((G[b] @ G[b].T).cpu().numpy(), K.cpu().numpy(), solver)
        if N is None:
            continue
        weight = torch.as_tensor(N, dtype=G.dtype, device=G.device)
        weight = torch.where(weight.isfinite(), weight, 0.0).flatten()
        first, second = K.repeat_interleave(n, 0), K.repeat(n, 1)
        bound = multiplier_upper(G[b : b + 1], first[None], second[None], weight[None])[0]
        upper[b] = torch.minimum(upper[b], bound)
    return upper


def _solve_sdp(M, K, solver: str):
    """The best symmetric N >= 0, or None where the solver failed."""
    import cvxpy as cp

    N = cp.Variable((K.shape[0], K.shape[0]), symmetric=True)
    program = cp.Problem(cp.Minimize(cp.pos(cp.lambda_max(M + K.T @ N @ K))), [N >= 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program.solve(solver=solver)
        except cp.SolverError:
            return None
    return N.value
