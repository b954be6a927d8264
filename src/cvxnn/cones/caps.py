"""Spherical caps around the cones of a planar or spatial arrangement: which of many gates can matter, cheaply.

The unit vectors of a cone lie within an angle of its gate vector g. In the cross-section g . u = 1 the cone is an
interval (rank 2) or a polygon (rank 3), {y : p_i . y <= 1 for every sample i}. Any selection of its samples gives a
larger set, so a radius computed from the nearest samples in a few directions is an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Caps", "bounding_caps"]

#: Rounds of looking for a further sample, each for the cones with a larger radius than this.
_ROUNDS = (0.0, 0.0, 0.0, 0.0, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0)
_TINY = 1e-12
_RANK_TOLERANCE = 1e-12
#: Outward shifts of the samples' half-planes and of the angles, far more than their rounding.
_SHIFT = 1e-14
_WIDER = 1e-9
_BLOCK_ENTRIES = 1 << 20


@dataclass
class Caps:
    """Unit centres and the angles within which the unit vectors of each cone lie, in the row space of X.

    Attributes
    ----------
    basis : Tensor of shape (d, r)
        Orthonormal basis of the row space.
    centre : Tensor of shape (P, r)
    angle : Tensor of shape (P,)
        pi where nothing is known.
    """

    basis: Tensor
    centre: Tensor
    angle: Tensor

    def dual_norm_bounds(self, G: Tensor, gates: slice) -> Tensor:
        """Upper bounds of max ||G_k^T u|| over the unit vectors of the cones of some gates; G is (B, d, c).

        With a = ||G^T g|| and b = ||(I - g g^T) G||_F they are the maximum of a cos t + b sin t over the cap.
        """
        inside = torch.einsum("dr,kdc->krc", self.basis, G)
        centre, angle = self.centre[gates], self.angle[gates]
        along = torch.einsum("kr,krc->kc", centre, inside)
        a = along.norm(dim=1)
        b = (inside - centre.unsqueeze(2) * along.unsqueeze(1)).norm(dim=(1, 2))
        value = torch.where(torch.atan2(b, a) <= angle, torch.hypot(a, b), a * angle.cos() + b * angle.sin())
        size = G.norm(dim=(1, 2))
        # What the basis leaves out of G, and the rounding of all this.
        return value + size * (_RANK_TOLERANCE if len(self.basis) > self.basis.shape[1] else 1e-14)


def bounding_caps(rows: Tensor, patterns: Tensor, gates: Tensor) -> Caps | None:
    """Caps of all cones where the rows have rank 2 or 3; None otherwise.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
        Unit rows, float64.
    patterns : Tensor of shape (P, n), bool
    gates : Tensor of shape (d, P)
        A point inside each cone; where one is not strictly inside, nothing is known of its cone.
    """
    if rows.shape[0] < 2 or rows.shape[1] < 2:
        return None
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum())
    if rank not in (2, 3) or (rank < len(values) and float(values[rank:].norm()) > 1e-13):
        return None
    basis = torch.eye(rank).to(rows) if rank == rows.shape[1] else vectors[:rank].T.contiguous()
    reduced = rows @ basis
    centre = gates.T.to(rows) @ basis
    centre = centre / centre.norm(dim=1, keepdim=True)
    size = max(1, _BLOCK_ENTRIES // len(rows))
    parts = [slice(i, i + size) for i in range(0, len(centre), size)]
    angle = torch.cat([_angles(reduced, patterns[part], centre[part]) for part in parts])
    return Caps(basis, centre, angle)


def _angles(rows: Tensor, patterns: Tensor, centre: Tensor) -> Tensor:
    """Angles (B,) of the caps around centres (B, r).

    Samples are chosen in single precision, as any choice is sound; what is chosen is computed in double.
    """
    tangents = _tangents(centre)
    single = rows.float().T
    signs = patterns.to(single.dtype).mul_(2).sub_(1)
    scale = (centre.float() @ single).mul_(signs).clamp_min_(_TINY).reciprocal_().mul_(signs).neg_()
    polar = [(tangent.float() @ single).mul_(scale) for tangent in tangents]
    chosen = [part.argmax(1) for part in polar] + [part.argmin(1) for part in polar]
    points = _polar_points(rows, patterns, centre, tangents, torch.stack(chosen, dim=1))
    if len(polar) == 1:
        radius = _interval_radius(points[:, :, 0])
    else:
        radius = _polygon_radius(points)[0]
        for width in _ROUNDS:
            open_ = (radius > width).nonzero()[:, 0]
            if len(open_) == 0:
                continue
            _, direction = _polygon_radius(points[open_])
            score = polar[0][open_] * direction[:, :1].float() + polar[1][open_] * direction[:, 1:].float()
            more = [tangent[open_] for tangent in tangents]
            added = _polar_points(rows, patterns[open_], centre[open_], more, score.argmax(1, keepdim=True))
            points = torch.cat([points, points[:, :1]], dim=1)
            points[open_, -1] = added[:, 0]
            radius[open_] = torch.minimum(radius[open_], _polygon_radius(points[open_])[0])
    angle = torch.atan(radius * (1 + _WIDER)) + _SHIFT
    return torch.where(radius.isfinite(), angle, math.pi)


def _polar_points(rows: Tensor, patterns: Tensor, centre: Tensor, tangents: list[Tensor], chosen: Tensor) -> Tensor:
    """p = -(2 D - I) x / slack of chosen samples (B, M), in tangent coordinates (B, M, r - 1); NaN without slack."""
    vectors = rows[chosen]
    signs = patterns.gather(1, chosen).to(rows.dtype).mul_(2).sub_(1)
    slack = torch.einsum("bmr,br->bm", vectors, centre) * signs + _SHIFT
    factor = torch.where(slack > 2 * _SHIFT, -signs / slack, math.nan)
    return torch.stack([torch.einsum("bmr,br->bm", vectors, tangent) * factor for tangent in tangents], dim=2)


def _tangents(centre: Tensor) -> list[Tensor]:
    """Orthonormal bases of the planes (lines) orthogonal to unit vectors (B, r): r - 1 tensors (B, r)."""
    if centre.shape[1] == 2:
        return [torch.stack([-centre[:, 1], centre[:, 0]], dim=1)]
    axis = torch.zeros_like(centre).scatter_(1, centre.abs().argmin(1, keepdim=True), 1.0)
    first = torch.linalg.cross(centre, axis)
    first = first / first.norm(dim=1, keepdim=True)
    return [first, torch.linalg.cross(centre, first)]


def _interval_radius(points: Tensor) -> Tensor:
    """Largest |y| with p y <= 1 for the points (B, 2); infinite where one of the two sides is open."""
    right, left = points.amax(1), -points.amin(1)
    return torch.where((right > 0) & (left > 0), torch.maximum(1 / right, 1 / left), math.inf)


def _polygon_radius(points: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bound (B,) of max |y| over {y : p_m . y <= 1}, and the direction (B, 2) in which to look for a further p.

    In the sector between p and the next p', ordered by angle, it is at most 1/|p|, 1/|p'| or |y'| for the corner
    p . y' = p' . y' = 1; infinite where the sector is not convex. The direction is the normal of the worst pair.
    """
    order = torch.atan2(points[:, :, 1], points[:, :, 0]).argsort(dim=1)
    p = points.gather(1, order.unsqueeze(2).expand_as(points))
    q = p.roll(-1, dims=1)
    same = (p == q).all(2)
    same &= ~same.all(1, keepdim=True)
    cross = p[:, :, 0] * q[:, :, 1] - p[:, :, 1] * q[:, :, 0]
    side = q - p
    corner = side.norm(dim=2) / cross
    sector = torch.maximum(corner, torch.maximum(1 / p.norm(dim=2), 1 / q.norm(dim=2)))
    sector = torch.where(cross > 0, sector, math.inf).masked_fill(same, 0.0)
    radius, worst = sector.max(1)
    row = torch.arange(len(p), device=p.device)
    normal = torch.stack([side[row, worst, 1], -side[row, worst, 0]], dim=1)
    alone = normal.abs().amax(1, keepdim=True) == 0
    return radius, torch.where(alone, -p[row, worst], normal)
