"""Branch and bound over the sphere of v: the dual norm of a cone for up to three outputs, to any tolerance.

q = max over unit v in R^c of h(v) = ||Proj_C(G v)||. For v = sum_i t_i v_i with t >= 0 and multipliers lambda_i >= 0
of the projections p_i = G v_i + K^T lambda_i at the vertices, sum_i t_i lambda_i are multipliers of v, so
h(v) <= ||sum_i t_i p_i||. The bound of a spherical simplex is therefore

    max { ||P t|| / ||V t|| : t >= 0 },

which is exact as soon as the active rows are the same all over the simplex: the search ends in finitely many
splits unless the maximum lies where they change, and converges quadratically there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from itertools import combinations, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvxnn.cones.alternating import alternate, support
from cvxnn.norms.base import EPS

if TYPE_CHECKING:
    from cvxnn.cones.cones import Cones

__all__ = ["MAX_OUTPUTS", "branch_and_bound", "simplex_bounds"]

MAX_OUTPUTS = 3
_POLISH = 12  # rounds of alternation from a better direction
_CHUNK = 256  # gates searched together
_ROUND = 4096  # simplices split together


@dataclass
class _Simplices:
    """Spherical simplices of several gates: gate (s,), unit vertices V (s, c, c) by rows, P (s, c, d), error, bound."""

    gate: Tensor
    V: Tensor
    P: Tensor
    error: Tensor
    bound: Tensor

    def select(self, chosen: Tensor) -> _Simplices:
        return _Simplices(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def join(parts: list[_Simplices]) -> _Simplices:
        return _Simplices(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(_Simplices)))


def branch_and_bound(
    cones: Cones,
    gate: Tensor,
    G: Tensor,
    u: Tensor,
    value: Tensor,
    tolerance: float = 1e-6,
    max_evaluations: int = 4000,
    deadline: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Upper bounds of the dual norms (B,), and the best feasible directions found (B, d).

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (B,), long
    G : Tensor of shape (B, d, c)
        c <= 3; largest entries near 1.
    u, value : Tensor of shape (B, d) and (B,)
        Directions known, with ||G^T u||.
    tolerance : float
        Simplices with a bound below (1 + tolerance) times the best value are not split.
    max_evaluations : int
        Projections per gate, at most; the bounds are sound wherever the search stops.
    deadline : float
        Value of ``time.perf_counter()`` at which to stop.
    """
    parts = [
        _search(cones, gate[k], G[k], u[k], value[k], tolerance, max_evaluations, deadline)
        for k in torch.arange(len(gate), device=G.device).split(_CHUNK)
    ]
    return torch.cat([upper for upper, _ in parts]), torch.cat([u for _, u in parts])


def _search(
    cones: Cones,
    gate: Tensor,
    G: Tensor,
    u: Tensor,
    value: Tensor,
    tolerance: float,
    max_evaluations: int,
    deadline: float,
) -> tuple[Tensor, Tensor]:
    B = len(gate)
    u, value = u.clone(), value.clone()
    leaves = _octants(cones, gate, G)
    settled = value.new_zeros(B)  # largest bound of the simplices that are not split any more
    evaluations = torch.full((B,), 2 * G.shape[2], device=G.device)
    while True:
        limit = value * (1 + tolerance)
        going = (leaves.bound > limit[leaves.gate]) & (evaluations < max_evaluations)[leaves.gate]
        if time.perf_counter() > deadline:
            going = torch.zeros_like(going)
        stopped = leaves.select(~going)
        settled.scatter_reduce_(0, stopped.gate, stopped.bound, "amax")
        leaves = leaves.select(going)
        if len(leaves.gate) == 0:
            return settled, u
        order = leaves.bound.argsort(descending=True)
        now = leaves.select(order[:_ROUND])
        children = _split(cones, gate, G, now, u, value)
        evaluations.index_add_(0, now.gate, torch.ones_like(now.gate))
        leaves = _Simplices.join([leaves.select(order[_ROUND:]), children])


def _octants(cones: Cones, gate: Tensor, G: Tensor) -> _Simplices:
    """The 2^c simplices spanned by plus or minus the unit vectors, for each gate."""
    B, d, c = G.shape
    images = torch.stack([G.mT, -G.mT], 1).reshape(B * 2 * c, d)
    found = support(cones, gate.repeat_interleave(2 * c), images)
    P = found.point.reshape(B, 2, c, d)
    error = _vertex_error(found.error, found.point, G, gate.new_tensor(range(B)).repeat_interleave(2 * c))
    error = error.reshape(B, 2, c)
    eye = torch.eye(c, dtype=G.dtype, device=G.device)
    each = torch.arange(c, device=G.device)
    parts = []
    for signs in product((0, 1), repeat=c):
        side = torch.tensor(signs, device=G.device)
        V = (eye * (1 - 2 * side)[:, None]).expand(B, c, c)
        owner = torch.arange(B, device=G.device)
        bound = simplex_bounds(V, P[:, side, each], error[:, side, each])
        parts.append(_Simplices(owner, V, P[:, side, each], error[:, side, each], bound))
    return _Simplices.join(parts)


def _vertex_error(error: Tensor, point: Tensor, G: Tensor, owner: Tensor) -> Tensor:
    """Errors of the points, that of forming G v included."""
    norms = G.flatten(1).norm(dim=1)[owner]
    return error + (G.shape[2] + 4) * EPS * norms + 4 * EPS * point.norm(dim=1)


def _split(cones: Cones, gate: Tensor, G: Tensor, parents: _Simplices, u: Tensor, value: Tensor) -> _Simplices:
    """Both halves of each simplex, cut at the middle of its longest edge; improves u and value in place."""
    s, c, _ = parents.V.shape
    pairs = torch.tensor(list(combinations(range(c), 2)), device=G.device)
    edges = torch.stack([(parents.V[:, i] - parents.V[:, j]).norm(dim=1) for i, j in pairs.tolist()], 1)
    longest = pairs[edges.argmax(1)]
    each = torch.arange(s, device=G.device)
    middle = parents.V[each, longest[:, 0]] + parents.V[each, longest[:, 1]]
    middle = middle / middle.norm(dim=1, keepdim=True)
    owner = parents.gate
    found = support(cones, gate[owner], torch.einsum("sdc,sc->sd", G[owner], middle))
    error = _vertex_error(found.error, found.point, G, owner)
    _improve(cones, gate, G, owner, middle, found.value, u, value)
    halves = []
    for end in (0, 1):
        V, P, errors = parents.V.clone(), parents.P.clone(), parents.error.clone()
        V[each, longest[:, end]] = middle
        P[each, longest[:, end]] = found.point
        errors[each, longest[:, end]] = error
        bound = torch.minimum(simplex_bounds(V, P, errors), parents.bound)
        halves.append(_Simplices(owner, V, P, errors, bound))
    return _Simplices.join(halves)


def _improve(
    cones: Cones, gate: Tensor, G: Tensor, owner: Tensor, v: Tensor, values: Tensor, u: Tensor, value: Tensor
) -> None:
    """Alternate from the best new direction of each gate where it beats the value known."""
    best = torch.zeros_like(value).scatter_reduce_(0, owner, values, "amax")
    chosen = ((values > value[owner] * (1 + 1e-12)) & (values == best[owner])).nonzero()[:, 0]
    if len(chosen) == 0:
        return
    which = owner[chosen]
    new, _, reached = alternate(cones, gate[which], G[which], v[chosen][:, None], _POLISH)
    better = reached > value[which]
    u[which[better]] = new[better]
    value[which[better]] = reached[better]


def simplex_bounds(V: Tensor, P: Tensor, error: Tensor) -> Tensor:
    """Rigorous bounds of max { ||P^T t|| + error . t : t >= 0, ||V^T t|| = 1 }, (s,).

    The square of the first term is the least mu for which M = mu V V^T - P P^T is copositive. An estimate of mu is
    made sound by a decomposition M = S + N with N >= 0: if S + eps I is psd, then so is the bound mu + c eps, as
    (sum t)^2 <= c ||V^T t||^2 within an orthant.

    Parameters
    ----------
    V : Tensor of shape (s, c, c)
        Unit vertices, by rows, of simplices within one orthant; c = 2 or 3.
    P : Tensor of shape (s, c, d)
    error : Tensor of shape (s, c)
        Bounds on the errors of the rows of P.
    """
    c, d = P.shape[1:]
    A, B = P @ P.mT, V @ V.mT
    mu = _estimate(A, B)
    M = mu[:, None, None] * B - A
    lowest = torch.linalg.eigvalsh(M - _nonnegative_part(M))[:, 0]
    largest = A.diagonal(dim1=1, dim2=2).amax(1)
    rounding = (4 * d + 64) * EPS * (largest + mu)
    square = mu + c * ((-lowest).clamp_min(0) + rounding) * (1 + 64 * EPS)
    bound = square.sqrt() * (1 + 8 * EPS) + c**0.5 * error.amax(1) * (1 + 64 * EPS)
    return torch.where(bound.isnan(), torch.inf, bound)


def _estimate(A: Tensor, B: Tensor) -> Tensor:
    """The largest t^T A t / t^T B t over t >= 0, up to rounding: on the edges, or inside for c = 3."""
    c = A.shape[1]
    mu = torch.stack([_edge(A, B, i, j) for i, j in combinations(range(c), 2)], 1).amax(1)
    if c == 2:
        return mu
    M = mu[:, None, None] * B - A
    inside = _angles(M).sum(1) > 2 * torch.pi * (1 - 1e-12)
    factor, info = torch.linalg.cholesky_ex(B)
    left = torch.linalg.solve_triangular(factor, A, upper=False)
    inner = torch.linalg.solve_triangular(factor, left.mT, upper=False)
    usable = inside & (info == 0) & inner.isfinite().all(-1).all(-1)
    top = torch.linalg.eigvalsh(torch.where(usable[:, None, None], inner, 0.0))[:, -1]
    return torch.where(usable, torch.maximum(mu, top), mu)


def _edge(A: Tensor, B: Tensor, i: int, j: int) -> Tensor:
    """The largest ratio on an edge: an end, or the root of det(mu B - A) beyond both, written without cancellation."""
    first, second = torch.maximum(A[:, i, i], A[:, j, j]), torch.minimum(A[:, i, i], A[:, j, j])
    b = B[:, i, j]
    E = (A[:, i, j] - b * first).clamp_min(0)
    D = first - second + 2 * b * E
    root = (D.square() + 4 * (1 - b.square()).clamp_min(0) * E.square()).sqrt()
    return first + torch.where(E > 0, 2 * E.square() / (D + root), 0.0)


def _angles(M: Tensor) -> Tensor:
    """arccos of the off-diagonal entries of M scaled to a unit diagonal: (s, 3) for the pairs 12, 13, 23.

    M is copositive where their sum is at most 2 pi, and psd where in addition none exceeds the sum of the others.
    """
    scale = M.diagonal(dim1=1, dim2=2).clamp_min(1e-300).sqrt()
    pairs = list(combinations(range(M.shape[1]), 2))
    cosines = torch.stack([M[:, i, j] / scale[:, i] / scale[:, j] for i, j in pairs], 1)
    return cosines.clamp(-1, 1).acos()


def _nonnegative_part(M: Tensor) -> Tensor:
    """N >= 0 with M - N psd, if M is copositive (up to rounding)."""
    c = M.shape[1]
    angles = _angles(M)
    if c == 3:  # raise one of the smaller angles until the triangle inequality holds
        excess = 2 * angles.amax(1) - angles.sum(1)
        raised = (angles.argmax(1) + 1) % 3
        each = torch.arange(len(angles), device=M.device)
        angles[each, raised] += excess.clamp_min(0)
    scale = M.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    N = torch.zeros_like(M)
    for k, (i, j) in enumerate(combinations(range(c), 2)):
        N[:, i, j] = N[:, j, i] = (M[:, i, j] - scale[:, i] * scale[:, j] * angles[:, k].cos()).clamp_min(0)
    return N
