"""Cones in the plane and in space by their facets and rays: projections and their multipliers in closed form.

A pointed cone {u : K u >= 0} with an interior has few facets, and all of its faces can be tried at once. With an
interior point w, the rows a_i of K meet the plane w . a = 1 in points, and the corners of their convex hull are the
facets, in cyclic order. Facets a_i and a_(i+1) meet in the ray a_i x a_(i+1). That no row excludes a ray by more than
rounding is checked, so the facets found are all there are; cones for which it fails are left to other methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cvxnn.cones.projection import NEGLIGIBLE, Projection

__all__ = ["ConeFaces", "Polygons"]

#: Facets of a cone that are looked for; cones with more are left to other methods.
_MOST_FACETS = 16
#: Least slack of an interior point, least sine of the angle between neighbouring facets, and violation of rays.
_INSIDE = 1e-9
_PARALLEL = 1e-7
_VIOLATION = 1e-13
#: Points of the plane closer than this, relative to their size, are one.
_SAME = 1e-12
#: Distance of z + K^T lambda from the point, relative to z, above which another method is asked.
_ACCURATE = 1e-11
#: Least singular value of the rows from which on they count as of full rank.
_FLAT = 1e-4
_BLOCK_ENTRIES = 1 << 20


@dataclass
class ConeFaces:
    """The faces of B cones in d = 2 or 3 dimensions, F rays and facets each (the first one again as padding).

    Faces are numbered: F rays, F facets (in the plane these never count, as they are rays), the cone itself.

    Attributes
    ----------
    rows : Tensor of shape (B, F, 2), long
        The rows of a facet and of the next one; their common ray has the same number.
    tests : Tensor of shape (B, 4, F, d)
        Unit vectors: minus the facet normals a; in the facet, the inner normals to the ray before and to its own;
        rays.
    gram : Tensor of shape (B, F, 2)
        Cosine of the angle between a facet normal and the next one, and 1 / sine.
    """

    rows: Tensor
    tests: Tensor
    gram: Tensor

    def select(self, cones: Tensor) -> ConeFaces:
        """The faces of some of the cones."""
        return ConeFaces(self.rows[cones], self.tests[cones], self.gram[cones])

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the projections of z (B, d, m) lie.

        Returns
        -------
        squares : Tensor of shape (B, m)
            Squared lengths of the projections; not positive where these are zero.
        face : Tensor of shape (B, m), long
            Where the projection is zero, the ray nearest to z.
        products : Tensor of shape (B, 4, F, m)
            Of the tests and z.
        """
        n_faces = self.tests.shape[2]
        # A batched product of such small matrices would be slower.
        products = self.tests[:, :, :, :1] * z[:, None, None, 0]
        for k in range(1, z.shape[1]):
            products.addcmul_(self.tests[:, :, :, k, None], z[:, None, None, k])
        outside, last, across, along = products.unbind(1)
        on_facet = torch.minimum(torch.minimum(outside, across), last) > 0
        # In a facet a ray and the inner normal to it are an orthonormal basis.
        squares = torch.where(on_facet, along.square() + across.square(), along * along.abs())
        squares, which = squares.max(1)
        face = which + n_faces * on_facet.gather(1, which.unsqueeze(1)).squeeze(1)
        inside = outside.amax(1) <= 0
        squares = torch.where(inside, z.square().sum(1), squares)
        return squares, torch.where(inside, 2 * n_faces, face), products

    def projectors(self, cone: Tensor, face: Tensor) -> Tensor:
        """Orthogonal projectors (s, d, d) onto the spans of faces (s,) of cones (s,)."""
        n_faces, d = self.tests.shape[2:]
        vectors = self.tests[cone, 2:, face % n_faces]
        across, ray = vectors[:, 0] * (face >= n_faces).unsqueeze(1), vectors[:, 1]
        span = ray.unsqueeze(2) * ray.unsqueeze(1) + across.unsqueeze(2) * across.unsqueeze(1)
        return torch.where((face == 2 * n_faces)[:, None, None], torch.eye(d).to(span), span)


class Polygons:
    """The faces of the cones {u : diag(signs_k) rows u >= 0}, found when they are first asked for.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
        Unit rows of rank d = 2 or 3, float64.
    patterns : Tensor of shape (P, n), bool
    points : Tensor of shape (P, d)
        Points inside the cones; where one is not, nothing is found.
    """

    def __init__(self, rows: Tensor, patterns: Tensor, points: Tensor) -> None:
        self.rows, self.patterns, self.points = rows, patterns, points
        self._slot = torch.full((len(patterns),), -1, dtype=torch.long, device=rows.device)
        self._known = torch.zeros(0, dtype=torch.bool, device=rows.device)
        self._faces: ConeFaces | None = None

    @staticmethod
    def suit(rows: Tensor) -> bool:
        """Whether the cones of these rows are pointed, and in the plane or in space."""
        n, d = rows.shape
        return d in (2, 3) and n >= d and float(torch.linalg.svdvals(rows)[-1]) > _FLAT

    def faces(self, gate: Tensor) -> tuple[ConeFaces, Tensor]:
        """Faces of the cones of gates (r,), and for which of them they are known, (r,) bool (else they are void)."""
        missing = gate[self._slot[gate] < 0].unique()
        if len(missing) or self._faces is None:
            size = max(1, _BLOCK_ENTRIES // len(self.rows))
            for part in missing.split(size):
                self._add(part)
        assert self._faces is not None
        slot = self._slot[gate]
        return self._faces.select(slot), self._known[slot]

    def project(self, gate: Tensor, z: Tensor) -> tuple[Projection, Tensor]:
        """Projections of z (r, d), and which of them (r,) are to be done by another method instead."""
        exponent = torch.frexp(z.abs().amax(1, keepdim=True)).exponent
        unit = torch.ldexp(z, -exponent)
        faces, known = self.faces(gate)
        squares, face, products = (part.squeeze(-1) for part in faces.nearest(unit.unsqueeze(2)))
        size = unit.norm(dim=1)
        projectors = faces.projectors(torch.arange(len(z), device=z.device), face)
        point = (projectors @ (projectors @ unit.unsqueeze(2))).squeeze(2)
        point = torch.where((squares > (NEGLIGIBLE * size).square()).unsqueeze(1), point, 0.0)
        index, multiplier = _multipliers(faces, face, products, z.shape[1])
        zero = (squares <= 0).nonzero()[:, 0]
        if len(zero):
            index[zero], multiplier[zero] = self._apex(gate[zero], faces.rows[zero, :, 0], unit[zero])
        polar = torch.einsum("ra,rad->rd", multiplier, self._normals(gate, index))
        failed = ~known | ~((unit + polar - point).norm(dim=1) <= _ACCURATE * size)
        index = torch.where(multiplier > 0, index, -1)
        point, multiplier, polar = (torch.ldexp(part, exponent) for part in (point, multiplier, polar))
        return Projection(point, index, multiplier, polar), failed

    def _normals(self, gate: Tensor, index: Tensor) -> Tensor:
        signs = self.patterns[gate.view(-1, *[1] * (index.ndim - 1)), index].to(self.rows.dtype).mul_(2).sub_(1)
        return self.rows[index] * signs.unsqueeze(-1)

    def _apex(self, gate: Tensor, facets: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """d rows each, and multipliers that take z (r, d) to zero: -z lies between the normals of some d facets."""
        d, n_faces = z.shape[1], facets.shape[1]
        fan = torch.arange(d - 1, n_faces, device=z.device)
        fan = torch.stack([torch.zeros_like(fan), *(fan - k for k in range(d - 1))], dim=1)
        index = facets[:, fan]
        normals = self._normals(gate, index)
        weights = torch.linalg.solve_ex(normals.mT, -z[:, None, :, None].expand(-1, len(fan), -1, -1))[0].squeeze(3)
        best = weights.amin(2).nan_to_num(-math.inf, -math.inf, -math.inf).argmax(1)
        pair = torch.arange(len(z), device=z.device)
        return index[pair, best], weights[pair, best].nan_to_num(0.0, 0.0, 0.0).clamp_min_(0)

    def _add(self, gate: Tensor) -> None:
        signs = self.patterns[gate].to(self.rows.dtype).mul_(2).sub_(1)
        points = self.points[gate]
        points = points / points.norm(dim=1, keepdim=True)
        slack = (points @ self.rows.T).mul_(signs)
        known = slack.amin(1) > _INSIDE
        corners, count = _corners(self.rows, signs, points, slack.clamp_min_(_INSIDE))
        known &= count > 1
        faces, regular = _build(self.rows, signs, corners, count.clamp_min(1))
        rays = faces.tests[:, 3]
        for part in torch.arange(len(gate), device=gate.device).split(
            max(1, _BLOCK_ENTRIES // (rays.shape[1] * len(self.rows)))
        ):
            slacks = (rays[part] @ self.rows.T).mul_(signs[part].unsqueeze(1))
            regular[part] &= slacks.amin((1, 2)) >= -_VIOLATION
        self._slot[gate] = len(self._known) + torch.arange(len(gate), device=gate.device)
        self._known = torch.cat([self._known, known & regular])
        self._faces = faces if self._faces is None else _joined(self._faces, faces)


def _corners(rows: Tensor, signs: Tensor, points: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, F) that are facets, in cyclic order, and how many there are (B,); 0 where there are too many."""
    scale = signs / slack
    planar = [(tangent @ rows.T).mul_(scale) for tangent in _tangents(points)]
    if len(planar) == 1:
        ends = torch.stack([planar[0].argmin(1), planar[0].argmax(1)], dim=1)
        return ends, torch.full_like(ends[:, 0], 2)
    return _hull(*planar)


def _tangents(points: Tensor) -> list[Tensor]:
    """Orthonormal bases e of the complements of unit vectors (B, d); in space e_1 x e_2 is the vector."""
    if points.shape[1] == 2:
        return [torch.stack([-points[:, 1], points[:, 0]], dim=1)]
    axis = torch.zeros_like(points).scatter_(1, points.abs().argmin(1, keepdim=True), 1.0)
    first = torch.linalg.cross(points, axis)
    first = first / first.norm(dim=1, keepdim=True)
    return [first, torch.linalg.cross(points, first)]


def _hull(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of the convex hulls of B sets of points (B, n), counterclockwise: gift wrapping."""
    B = len(x)
    across = x.new_tensor([0.8, 0.6])
    start = (across[0] * x + across[1] * y).argmax(1)
    direction = torch.stack([-across[1], across[0]]).repeat(B, 1)
    corners = start[:, None].repeat(1, _MOST_FACETS)
    count = torch.zeros_like(start)
    left, current = torch.arange(B, device=x.device), start
    first = _pick(x, y, start)
    for k in range(1, _MOST_FACETS + 1):
        here = _pick(x, y, current)
        dx, dy = x - here[:, :1], y - here[:, 1:]
        along = direction[:, :1] * dx + direction[:, 1:] * dy
        side = (direction[:, :1] * dy - direction[:, 1:] * dx).abs_()
        size = side.add_(along.abs())
        near = size <= _SAME * (1 + here.abs().sum(1, keepdim=True))
        current = along.div_(size).masked_fill_(near, -2.0).argmax(1)
        there = _pick(x, y, current)
        closed = (there - first).abs().sum(1) <= _SAME * (1 + first.abs().sum(1))
        count[left[closed]] = k
        still = (~closed).nonzero()[:, 0]
        if len(still) == 0 or k == _MOST_FACETS:
            break
        corners[left[still], k] = current[still]
        direction = there - here
        direction = direction / direction.norm(dim=1, keepdim=True)
        if len(still) < len(left):
            left, x, y, current, direction, first = (part[still] for part in (left, x, y, current, direction, first))
    return corners[:, : max(1, int(count.max())) if B else 1], count


def _pick(x: Tensor, y: Tensor, which: Tensor) -> Tensor:
    which = which[:, None]
    return torch.cat([x.gather(1, which), y.gather(1, which)], dim=1)


def _build(rows: Tensor, signs: Tensor, corners: Tensor, count: Tensor) -> tuple[ConeFaces, Tensor]:
    """Faces of B cones from the facets in cyclic order, and where neighbouring facets are not nearly parallel."""
    B, n_faces = corners.shape
    slot = torch.arange(n_faces, device=rows.device).expand(B, -1)
    slot = torch.where(slot < count[:, None], slot, 0)
    own, after, before = (corners.gather(1, (slot + shift) % count[:, None]) for shift in (0, 1, -1))
    a, b, c = (rows[which] * signs.gather(1, which).unsqueeze(2) for which in (own, after, before))
    cosine = (a * b).sum(2)
    inner, sine = _in_plane(a, b)
    if rows.shape[1] == 2:
        # A ray of the plane lies in its facet, and no other facet passes through it.
        ray, stretch, last, inner = inner, torch.zeros_like(sine), inner, torch.zeros_like(inner)
    else:
        ray, stretch, last = torch.linalg.cross(a, inner), 1 / sine.clamp_min(_PARALLEL), _in_plane(a, c)[0]
    faces = ConeFaces(
        torch.stack([own, after], dim=2),
        torch.stack([-a, last, inner, ray], dim=1),
        torch.stack([cosine, stretch], dim=2),
    )
    return faces, sine.amin(1) > _PARALLEL


def _in_plane(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Unit parts of vectors b orthogonal to unit vectors a, and their lengths before."""
    rest = b - a * (a * b).sum(-1, keepdim=True)
    length = rest.norm(dim=-1)
    rest = rest / length.clamp_min(1e-300).unsqueeze(-1)
    rest = rest - a * (a * rest).sum(-1, keepdim=True)
    return rest / rest.norm(dim=-1, keepdim=True).clamp_min(1e-300), length


def _joined(one: ConeFaces, two: ConeFaces) -> ConeFaces:
    """The faces of both lists, with the same padding."""
    width = max(one.rows.shape[1], two.rows.shape[1])
    one, two = _padded(one, width), _padded(two, width)
    names = ("rows", "tests", "gram")
    return ConeFaces(*(torch.cat([getattr(one, name), getattr(two, name)]) for name in names))


def _padded(faces: ConeFaces, width: int) -> ConeFaces:
    n_faces = faces.rows.shape[1]
    if n_faces == width:
        return faces
    slot = torch.arange(width, device=faces.rows.device)
    slot = torch.where(slot < n_faces, slot, 0)
    return ConeFaces(faces.rows[:, slot], faces.tests[:, :, slot], faces.gram[:, slot])


def _multipliers(faces: ConeFaces, face: Tensor, products: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows (r, width) and multipliers of projections that are not zero: one row for a facet, two for a ray."""
    n_faces = faces.rows.shape[1]
    pair, slot = torch.arange(len(face), device=face.device), face % n_faces
    cosine, stretch = faces.gram[pair, slot].unbind(1)
    second = torch.where(face < n_faces, -products[pair, 2, slot] * stretch, 0.0)
    first = torch.where(face < 2 * n_faces, products[pair, 0, slot] - cosine * second, 0.0)
    weights = torch.stack([first, second], dim=1).clamp_min_(0)
    index = faces.rows[pair, slot]
    return pad(index, (0, width - 2)), pad(weights, (0, width - 2))
