"""Support function of {G^T u : u in the cone, ||u|| <= 1}, and its maximum over directions by alternation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvxnn.norms.base import EPS

if TYPE_CHECKING:
    from cvxnn.cones.cones import Cones
    from cvxnn.cones.projection import Projection

__all__ = ["Support", "alternate", "direction_starts", "support"]

KEPT = 8  # starts of each gate that go on after the first rounds
FIRST_ROUNDS = 3
JUMP_EVERY = 4  # rounds of alternation between jumps


@dataclass
class Support:
    """Bounds of max {z . u : u in C, ||u|| <= 1} = ||Proj_C(z)||.

    Attributes
    ----------
    u : Tensor of shape (r, d)
        Unit maximisers (zero where the projection is), as feasible as the projection is.
    value : Tensor of shape (r,)
        ||Proj_C(z)|| up to rounding.
    point : Tensor of shape (r, d)
        z + K^T lambda for multipliers lambda >= 0: the projection where that was exact, and always such that
        ||point|| + error bounds the support function from above.
    error : Tensor of shape (r,)
        Bound on the distance from `point` to the nearest exact z + K^T lambda, lambda >= 0.
    projection : Projection
    """

    u: Tensor
    value: Tensor
    point: Tensor
    error: Tensor
    projection: Projection

    @property
    def upper(self) -> Tensor:
        """Rigorous upper bounds of the support function, (r,)."""
        return self.point.norm(dim=1) * (1 + (self.point.shape[1] + 4) * EPS) + self.error


def support(cones: Cones, gate: Tensor, z: Tensor) -> Support:
    """Support functions of the parts of cones inside the unit ball, by projection; sound if that is unfinished.

    Unit rows carry a relative error of some eps in each entry beside the exact rows, and forming K^T lambda and
    the sum with z one of (a + 1) eps: `error` holds all of it.

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (r,), long
    z : Tensor of shape (r, d)
    """
    projection = cones.project(gate, z)
    norms = z.norm(dim=1)
    weights = projection.multiplier.sum(1)
    point = z + projection.polar
    error = (projection.multiplier.shape[1] + 24) * EPS * (norms + weights)
    valid = (projection.multiplier >= 0).all(1) & point.isfinite().all(1) & error.isfinite()
    valid &= point.norm(dim=1) + error < norms
    point = torch.where(valid[:, None], point, z)
    error = torch.where(valid, error, 8 * EPS * norms)
    value = projection.point.norm(dim=1)
    u = projection.point / torch.where(value > 0, value, 1.0)[:, None]
    return Support(u, value, point, error, projection)


def direction_starts(cones: Cones, gate: Tensor, G: Tensor, n_random: int, random_state: int = 0) -> Tensor:
    """Unit directions v to alternate from, (B, s, c).

    The right singular vectors with both signs, the images G^T x of a few rows, G^T g of the gate vectors where the
    cones have them, and `n_random` Gaussian directions.
    """
    generator = torch.Generator().manual_seed(random_state)
    B, _, c = G.shape
    singular = torch.linalg.eigh(G.mT @ G).eigenvectors.mT.flip(1)[:, :KEPT]
    draws = torch.randn(n_random, c, generator=generator, dtype=torch.float64).to(G.device)
    starts = [singular, -singular, draws.expand(B, -1, -1)]
    rows = cones.rows
    if len(rows):
        chosen = torch.randperm(len(rows), generator=generator)[: max(2, n_random // 4)].to(rows.device)
        images = torch.einsum("bsd,bdc->bsc", (cones.signs(gate)[:, chosen, None] * rows[chosen]), G)
        starts.append(images)
    if cones.gates is not None:
        vectors = cones.gates.to(dtype=G.dtype, device=G.device)[:, gate].T
        starts.append(
            torch.einsum("bd,bdc->bc", vectors / vectors.abs().amax(1, keepdim=True).clamp_min(1e-300), G)[:, None]
        )
    v = torch.cat(starts, 1)
    norms = v.norm(dim=2, keepdim=True)
    fallback = torch.zeros_like(v)
    fallback[:, :, 0] = 1.0
    return torch.where(norms > 0, v / torch.where(norms > 0, norms, 1.0), fallback)


def alternate(
    cones: Cones,
    gate: Tensor,
    G: Tensor,
    v: Tensor,
    max_iter: int = 200,
    tolerance: float = 1e-13,
    deadline: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating maximisation of u^T G v over u in the cone and v in the unit ball, from many v at once.

    u <- Proj_C(G v) / ||.||, v <- G^T u / ||.||: the value never falls. After a few rounds only the best starts of
    each gate go on.

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (B,), long
    G : Tensor of shape (B, d, c)
    v : Tensor of shape (B, s, c)
        Unit directions.
    deadline : float
        Value of ``time.perf_counter()`` at which to stop.

    Returns
    -------
    u : Tensor of shape (B, d)
    v : Tensor of shape (B, c)
    value : Tensor of shape (B,)
        The best ||G^T u|| of each gate, without allowance for rounding.
    """
    B = len(gate)
    u, v, value = _iterate(cones, gate, G, v, FIRST_ROUNDS, tolerance, deadline)
    if v.shape[1] > KEPT:
        best = value.topk(KEPT, dim=1).indices[:, :, None]
        v = v.gather(1, best.expand(-1, -1, v.shape[2]))
    u, v, value = _iterate(cones, gate, G, v, max_iter, tolerance, deadline)
    best, each = value.argmax(1), torch.arange(B, device=G.device)
    return u[each, best], v[each, best], value[each, best]


def _iterate(
    cones: Cones, gate: Tensor, G: Tensor, v: Tensor, max_iter: int, tolerance: float, deadline: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The alternation itself; a start leaves it when its value no longer rises."""
    B, s, c = v.shape
    owner = torch.arange(B, device=G.device).repeat_interleave(s)
    v = v.reshape(B * s, c).clone()
    u = v.new_zeros(B * s, G.shape[1])
    value = v.new_zeros(B * s)
    active = torch.arange(B * s, device=G.device)
    for k in range(max_iter):
        if len(active) == 0 or time.perf_counter() > deadline:
            break
        which = owner[active]
        before = value[active]
        found = _advance(cones, gate[which], G[which], active, u, v, value)
        if k % JUMP_EVERY == JUMP_EVERY - 1:
            jump = _face_maximiser(cones, gate[which], G[which], found, v[active])
            kept = v[active].clone()
            v[active] = jump
            _advance(cones, gate[which], G[which], active, u, v, value, kept)
        active = active[value[active] > before * (1 + tolerance)]
    return u.reshape(B, s, -1), v.reshape(B, s, c), value.reshape(B, s)


def _advance(
    cones: Cones,
    gate: Tensor,
    G: Tensor,
    active: Tensor,
    u: Tensor,
    v: Tensor,
    value: Tensor,
    otherwise: Tensor | None = None,
) -> Support:
    """One step from v[active], kept in u, v and value where it is better (else v returns to `otherwise`)."""
    found = support(cones, gate, torch.einsum("rdc,rc->rd", G, v[active]))
    image = torch.einsum("rdc,rd->rc", G, found.u)
    norm = image.norm(dim=1)
    better = norm > value[active]
    stay = v[active] if otherwise is None else otherwise
    v[active] = torch.where(better[:, None], image / torch.where(better, norm, 1.0)[:, None], stay)
    u[active] = torch.where(better[:, None], found.u, u[active])
    value[active] = torch.where(better, norm, value[active])
    return found


def _face_maximiser(cones: Cones, gate: Tensor, G: Tensor, found: Support, v: Tensor) -> Tensor:
    """The direction that would be best if the active rows did not change, on the side of v."""
    face = cones.tangent(found.projection, gate) @ G
    top = torch.linalg.eigh(face.mT @ face).eigenvectors[:, :, -1]
    return torch.where((top * v).sum(1, keepdim=True) < 0, -top, top)
