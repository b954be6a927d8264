"""Spherical caps around the cones of a planar or spatial arrangement: which of many gates can matter, cheaply.

The unit vectors of a cone lie within an angle of its gate vector g. In the cross-section g . u = 1 the cone is an
interval (rank 2) or a polygon (rank 3), {y : p_i . y <= 1 for every sample i}. Any selection of its samples gives a
larger set, so a radius computed from the nearest samples in a few directions is an upper bound; where it is finite,
no direction of the cone is orthogonal to g or beyond, as the cone is convex.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxnn.norms.base import EPS

__all__ = ["Caps", "bounding_caps"]

#: Rounds of looking for a further sample, each for the cones with a larger radius than this.
_ROUNDS = (0.0, 0.0, 0.0, 0.0, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0)
_TINY = 1e-12
_RANK_TOLERANCE = 1e-12
#: Cross-sections with a larger radius are left alone: there the rounding of a row would count for too much.
_LARGEST_RADIUS = 10.0
#: Sectors of a polygon narrower than this (radians) hold no corner that is worth computing.
_NARROW = 1e-5
#: Widening of radii, far more than their rounding and than the cosine of a narrow sector.
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
    stretch : Tensor of shape (P,)
        Factor of the bounds for rows that are in the row space to rounding only; 1 where they are in it.
    """

    basis: Tensor
    centre: Tensor
    angle: Tensor
    stretch: Tensor

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
        rounding = (8 * (G.shape[1] + G.shape[2]) + 32) * EPS * G.norm(dim=(1, 2))
        if self.basis.shape[0] == self.basis.shape[1]:
            return value + rounding
        outside = (G - self.basis @ inside).norm(dim=(1, 2))
        return (value + rounding) * self.stretch[gates] + outside


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
    whole = rank == rows.shape[1]
    basis = torch.eye(rank).to(rows) if whole else vectors[:rank].T.contiguous()
    reduced = rows @ basis
    centre = _unit(_unit(gates.T.to(rows)) @ basis)
    # Slacks and tangential parts of unit rows have such an error, and slack - x . y has 1 + |y| times it.
    shift = (1 + _LARGEST_RADIUS) * (2 * rows.shape[1] + 16) * EPS
    size = max(1, _BLOCK_ENTRIES // len(rows))
    parts = [slice(i, i + size) for i in range(0, len(centre), size)]
    found = [_angles(reduced, patterns[part], centre[part], shift) for part in parts]
    angle, margin = (torch.cat(values) for values in zip(*found, strict=True))
    stretch = torch.ones_like(angle)
    if not whole:
        # u = basis a + t: a + tau g is in the cone of the selected rows, tau = tilt / margin.
        tilt = float((rows - reduced @ basis.T).norm(dim=1).max()) + 8 * rows.shape[1] * EPS
        stretch += torch.where(angle < math.pi, 2 * tilt / margin, 0.0)
    return Caps(basis, centre, angle, stretch)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (B, r) of norm 1; the first unit vector in place of those that have no direction."""
    largest = vectors.abs().amax(1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    first = torch.zeros_like(vectors)
    first[:, 0] = 1.0
    scaled = torch.where(usable, vectors / torch.where(usable, largest, 1.0), first)
    return scaled / scaled.norm(dim=1, keepdim=True)


def _angles(rows: Tensor, patterns: Tensor, centre: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Angles (B,) of the caps around centres (B, r), and the least slack (B,) of the samples that they rest on.

    Samples are chosen in single precision, as any choice is sound; what is chosen is computed in double.
    """
    tangents = _tangents(centre)
    single = rows.float().T
    signs = patterns.to(single.dtype).mul_(2).sub_(1)
    scale = (centre.float() @ single).mul_(signs).clamp_min_(_TINY).reciprocal_().mul_(signs).neg_()
    polar = [(tangent.float() @ single).mul_(scale) for tangent in tangents]
    chosen = [part.argmax(1) for part in polar] + [part.argmin(1) for part in polar]
    points, slack = _polar_points(rows, patterns, centre, tangents, torch.stack(chosen, dim=1), shift)
    margin = slack.amin(1)
    if len(polar) == 1:
        radius = _interval_radius(points[:, :, 0])
    else:
        radius, _ = _polygon_radius(points)
        for width in _ROUNDS:
            open_ = (radius > width).nonzero()[:, 0]
            if len(open_) == 0:
                continue
            direction = _polygon_radius(points[open_])[1].float()
            score = polar[0][open_] * direction[:, :1] + polar[1][open_] * direction[:, 1:]
            more = [tangent[open_] for tangent in tangents]
            best = score.argmax(1, keepdim=True)
            added, slack = _polar_points(rows, patterns[open_], centre[open_], more, best, shift)
            points = torch.cat([points, points[:, :1]], dim=1)
            points[open_, -1] = added[:, 0]
            margin[open_] = torch.minimum(margin[open_], slack[:, 0])
            radius[open_] = torch.minimum(radius[open_], _polygon_radius(points[open_])[0])
    radius = radius * (1 + _WIDER)
    angle = torch.atan(radius) + 2 * shift
    return torch.where(radius <= _LARGEST_RADIUS, angle, math.pi), margin


def _polar_points(
    rows: Tensor, patterns: Tensor, centre: Tensor, tangents: list[Tensor], chosen: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """p = -(2 D - I) x / slack of chosen samples (B, M), in tangent coordinates (B, M, r - 1), and their slacks (B, M).

    NaN where there is no slack. It counts as larger by `shift`, which moves the half-plane outwards.
    """
    vectors = rows[chosen]
    signs = patterns.gather(1, chosen).to(rows.dtype).mul_(2).sub_(1)
    slack = torch.einsum("bmr,br->bm", vectors, centre) * signs
    factor = torch.where(slack > shift, -signs / (slack + shift), math.nan)
    points = torch.stack([torch.einsum("bmr,br->bm", vectors, tangent) * factor for tangent in tangents], dim=2)
    return points, slack - shift


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
    p . y' = p' . y' = 1; infinite where the sector is not convex. A corner in a narrow sector is no farther than
    1/|p| but for the cosine of its width. The direction is the normal of the worst pair.
    """
    angle, order = torch.atan2(points[:, :, 1], points[:, :, 0]).sort(dim=1)
    p = points.gather(1, order.unsqueeze(2).expand_as(points))
    q = p.roll(-1, dims=1)
    gap = angle.roll(-1, dims=1) - angle
    gap[:, -1] += 2 * math.pi
    lengths = p.norm(dim=2) * q.norm(dim=2)
    cross = p[:, :, 0] * q[:, :, 1] - p[:, :, 1] * q[:, :, 0] - 8 * EPS * lengths
    side = q - p
    corner = torch.where(cross > 0, side.norm(dim=2) / cross, math.inf)
    corner = corner.masked_fill(gap < _NARROW, 0.0)
    radius, worst = torch.maximum(corner, torch.maximum(1 / p.norm(dim=2), 1 / q.norm(dim=2))).max(1)
    row = torch.arange(len(p), device=p.device)
    normal = torch.stack([side[row, worst, 1], -side[row, worst, 0]], dim=1)
    alone = normal.abs().amax(1, keepdim=True) == 0
    return radius, torch.where(alone, -p[row, worst], normal)
