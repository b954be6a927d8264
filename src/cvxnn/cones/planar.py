"""Cones of rank two: arcs of the circle, on which the dual norm has a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvxnn.norms.base import EPS
from cvxnn.norms.nuclear import spectral_bounds

if TYPE_CHECKING:
    from cvxnn.cones.cones import Cones

__all__ = ["Plane", "find_plane", "planar_bounds"]

FLAT = 1e-13  # rows this close to a plane lie in it; the bounds account for the distance
NO_GAP = 1e-13  # half-planes that miss a common direction by less (radians) are taken to have one
_CHUNK = 2**21


@dataclass
class Plane:
    """A plane through the origin that holds the rows of all cones.

    Attributes
    ----------
    basis : Tensor of shape (d, 2)
        Orthonormal columns; with d = 1 the second one is zero.
    angles : Tensor of shape (n,)
        Directions of the rows in the plane, in (-pi, pi].
    rounding : float
        Bound on the errors of the angles.
    tilt : float
        Bound on the distance of a unit row from the plane.
    """

    basis: Tensor
    angles: Tensor
    rounding: float
    tilt: float


def find_plane(rows: Tensor) -> Plane | None:
    """The plane of unit rows (n, d), or None if they do not lie in one to within rounding."""
    n, d = rows.shape
    if d <= 2:
        basis = torch.eye(d, 2, dtype=rows.dtype, device=rows.device)
    else:
        padded = torch.cat([rows, rows.new_zeros(2, d)])
        basis = torch.linalg.svd(padded, full_matrices=False).Vh[:2].T
    images = rows @ basis
    tilt = 0.0 if d <= 2 else 8 * d * EPS
    if d > 2 and n:
        tilt += float((rows - images @ basis.T).norm(dim=1).amax())
    if tilt > FLAT + 8 * d * EPS:
        return None
    return Plane(basis, torch.atan2(images[:, 1], images[:, 0]), (4 * d + 32) * EPS, tilt)


def planar_bounds(cones: Cones, plane: Plane, gate: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Exact dual norms of cones whose rows lie in a plane (section 3 of the maths).

    The cone is an arc of directions between two half-planes (times the complement of the plane, which only matters
    to the part of G outside it). On the arc the maximum of ||G^T u||, whose square is a sinusoid, is at an end or at
    the top eigenvector of G G^T. ||G^T u|| changes by at most ||G|| per radian, so an error of the rows by delta,
    which moves the ends by as much, costs a multiple of ||G|| delta.

    Parameters
    ----------
    cones : Cones
    plane : Plane
    gate : Tensor of shape (B,), long
    G : Tensor of shape (B, d, c)
        Largest entries near 1.

    Returns
    -------
    upper : Tensor of shape (B,)
    u : Tensor of shape (B, d)
        Unit maximisers, zero where the cone is {0}.
    """
    chunk = max(1, _CHUNK // max(1, len(plane.angles)))
    parts = [_bounds(cones, plane, k, g) for k, g in zip(gate.split(chunk), G.split(chunk), strict=True)]
    return torch.cat([upper for upper, _ in parts]), torch.cat([u for _, u in parts])


def _bounds(cones: Cones, plane: Plane, gate: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    image = torch.einsum("de,bdc->bec", plane.basis, G)
    outside = (G - plane.basis @ image).flatten(1).norm(dim=1) + 8 * G.shape[1] * EPS * G.flatten(1).norm(dim=1)
    centre, half_width = _arcs(plane.angles, cones.signs(gate))
    angle = _best_angle(image, centre, half_width.clamp_min(0))
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    value = torch.einsum("bec,be->bc", image, direction).norm(dim=1)
    largest = spectral_bounds(image)[1]
    missing = (-2 * half_width).clamp_min(0)  # angle by which the half-planes have no common direction
    exists = missing <= max(NO_GAP, 16 * plane.rounding)
    slack = largest * (16 * (plane.rounding + plane.tilt) + 8 * missing + 64 * EPS)
    # Where the cone is {0} in the plane, tilted rows leave room for directions of length 16 tilt / gap at most.
    thin = largest * (16 * plane.tilt / missing.clamp_min(NO_GAP)).clamp(max=1.0)
    upper = torch.where(exists, torch.minimum(value + slack, largest), thin) + outside
    u = torch.where(exists[:, None], direction @ plane.basis.T, 0.0)
    norm = u.norm(dim=1, keepdim=True)
    return upper * (1 + 16 * EPS), u / torch.where(norm > 0, norm, 1.0)


def _arcs(angles: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and half widths of the arcs of directions within a right angle of all rows; negative where none is.

    The rows of a pointed cone lie in the arc left over by their largest gap; with w its width (at most pi), the
    directions are the arc of width pi - w around its middle.
    """
    if signs.shape[1] == 0:
        zero = signs.new_zeros(signs.shape[0])
        return zero, zero + math.pi
    turned = torch.where(signs > 0, angles, torch.where(angles > 0, angles - math.pi, angles + math.pi))
    ordered = turned.sort(1).values
    gaps = torch.cat([ordered[:, 1:], ordered[:, :1] + 2 * math.pi], 1) - ordered
    largest, after = gaps.max(1)
    start = ordered.gather(1, after[:, None])[:, 0]
    centre = start + largest / 2 + math.pi
    return centre, (largest - math.pi) / 2


def _best_angle(G: Tensor, centre: Tensor, half_width: Tensor) -> Tensor:
    """Angle within `half_width` of `centre` at which ||G^T (cos, sin)|| is largest, for G (B, 2, c)."""
    M = G @ G.mT
    top = torch.atan2(2 * M[:, 0, 1], M[:, 0, 0] - M[:, 1, 1]) / 2
    offset = torch.remainder(top - centre + math.pi / 2, math.pi) - math.pi / 2  # both signs of the eigenvector
    return centre + torch.minimum(torch.maximum(offset, -half_width), half_width)
