"""Exact Euclidean projection onto polyhedral cones {u : K u >= 0}, many at once.

The dual of min 1/2 ||u - z||^2 s.t. K u >= b is a quadratic program in the multipliers; for b = 0 it is the
non-negative least squares problem min_{lambda >= 0} 1/2 ||z + K^T lambda||^2 with u = z + K^T lambda. The dual
active-set method of Goldfarb and Idnani (1983) solves it in finitely many steps: take the most violated row, step
until a multiplier reaches zero (drop that row) or the row is satisfied (add it). All pairs take their steps together;
pairs that do not end (rounding, in degenerate cones) are finished one by one by `scipy.optimize.nnls`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import nnls
from torch import Tensor

from cvxnn.cones.active_sets import DEPENDENT, NEGATIVE, ActiveSets, apply, split

__all__ = ["Constraints", "Projection", "project_cones", "solve", "tangent"]

TOLERANCE = 1e-12  # violation of the returned point, relative to its norm
NEGLIGIBLE = 1e-13  # a projection shorter than this, relative to z, is zero
SOLVED, UNFINISHED, INFEASIBLE = 0, 1, 2
_ACCURATE = 1e-11  # point - z and K^T lambda may differ by this, relative to z, before another method is tried
_RESTORES = 4
_ROUNDS = 20  # per coordinate, before a pair is finished by other means


@dataclass
class Projection:
    """Projections of z onto cones, with the multipliers that prove them.

    Attributes
    ----------
    point : Tensor of shape (r, d)
        The projections; feasible to 1e-11 relative to their norms, exactly zero where negligible beside z.
    index : Tensor of shape (r, a), long
        Active rows (of the reduced, unit rows), -1 in the padding.
    multiplier : Tensor of shape (r, a)
        lambda >= 0 for these rows, 0 in the padding.
    polar : Tensor of shape (r, d)
        K^T lambda, which is point - z up to rounding. It is formed from the multipliers, so that ||z + polar||
        bounds max {z . u : K u >= 0, ||u|| <= 1} from above however the computation ended.
    """

    point: Tensor
    index: Tensor
    multiplier: Tensor
    polar: Tensor

    def put(self, pairs: Tensor, other: Projection) -> None:
        """Replace the projections of some of the pairs."""
        for name in ("point", "index", "multiplier", "polar"):
            getattr(self, name)[pairs] = getattr(other, name)

    def select(self, pairs: Tensor) -> Projection:
        """The projections of some of the pairs (an index or mask tensor)."""
        return Projection(self.point[pairs], self.index[pairs], self.multiplier[pairs], self.polar[pairs])

    @staticmethod
    def stack(parts: list[Projection]) -> Projection:
        """One projection out of several, in order."""
        if len(parts) == 1:
            return parts[0]
        fields = zip(*((part.point, part.index, part.multiplier, part.polar) for part in parts), strict=True)
        return Projection(*(torch.cat(field) for field in fields))


@dataclass
class Constraints:
    """Polyhedra {y : diag(signs) X u >= rhs, u = basis y} of r pairs, which share the unit rows X up to sign.

    Attributes
    ----------
    rows : Tensor of shape (n, d)
    signs : Tensor of shape (r, n)
    rhs : Tensor of shape (r, n) or None
        None is zero: cones.
    basis : Tensor of shape (r, d, d) or None
        None is the identity.
    """

    rows: Tensor
    signs: Tensor
    rhs: Tensor | None = None
    basis: Tensor | None = None

    def select(self, pairs: Tensor) -> Constraints:
        """The polyhedra of some of the pairs."""
        rhs, basis = (None if part is None else part[pairs] for part in (self.rhs, self.basis))
        return Constraints(self.rows, self.signs[pairs], rhs, basis)

    def slack(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Slacks (r, n), and the norms (r,) of u that they are relative to."""
        u = y if self.basis is None else apply(self.basis, y)
        slack = (u @ self.rows.T).mul_(self.signs)
        return (slack if self.rhs is None else slack.sub_(self.rhs)), u.norm(dim=1)

    def normals(self, pairs: Tensor, index: Tensor) -> Tensor:
        """Normals (s, ..., d), in the coordinates y, of rows `index` (s, ...) of s pairs."""
        pairs = pairs.view(-1, *[1] * (index.ndim - 1))
        normals = self.rows[index] * self.signs[pairs, index].unsqueeze(-1)
        return normals if self.basis is None else apply(self.basis[pairs].mT, normals)

    def bounds(self, pairs: Tensor, index: Tensor) -> Tensor:
        """Right-hand sides (s,) of row `index` (s,) of s pairs."""
        return self.signs.new_zeros(len(pairs)) if self.rhs is None else self.rhs[pairs, index]


def project_cones(rows: Tensor, signs: Tensor, z: Tensor, start: Tensor | None = None) -> Projection:
    """Project z onto the cones {u : diag(signs) rows u >= 0}.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
        Unit rows, float64.
    signs : Tensor of shape (r, n)
        +1 and -1, float64.
    z : Tensor of shape (r, d)
        Finite, float64, of any size.
    start : Tensor of shape (r, a), long, optional
        Rows guessed to be active, -1 for none.

    Returns
    -------
    Projection
        With a = min(d, n).
    """
    _, exponent = torch.frexp(z.abs().amax(1, keepdim=True))
    scaled = torch.ldexp(z, -exponent)
    constraints = Constraints(rows, signs)
    found, status = solve(constraints, scaled, start)
    size = scaled.norm(dim=1)
    found.point[found.point.norm(dim=1) <= NEGLIGIBLE * size] = 0
    doubtful = (status != SOLVED) | ((scaled + found.polar - found.point).norm(dim=1) > _ACCURATE * size)
    for pair in doubtful.nonzero()[:, 0].tolist():
        _finish(constraints, scaled, found, pair)
    point, multiplier, polar = (torch.ldexp(part, exponent) for part in (found.point, found.multiplier, found.polar))
    return Projection(point, found.index, multiplier, polar)


def tangent(projection: Projection, normals: Tensor) -> Tensor:
    """Orthogonal projectors (r, d, d) onto the null spaces of the active rows with positive multiplier.

    They are elements of the generalised Jacobian of the projection; `normals` (r, a, d) are the active rows.
    """
    r, a, d = normals.shape
    basis = normals.new_zeros(r, d, a)
    for j in range(a):
        _, rest = split(basis, normals[:, j])
        size = rest.norm(dim=1)
        keep = (projection.multiplier[:, j] > 0) & (size > DEPENDENT)
        basis[:, :, j] = torch.where(keep, 1 / size, 0.0)[:, None] * torch.where(keep[:, None], rest, 0.0)
    projector = -(basis @ basis.mT)
    projector.diagonal(dim1=1, dim2=2).add_(1.0)
    return projector


def solve(
    constraints: Constraints, z: Tensor, start: Tensor | None = None, tolerance: float = TOLERANCE
) -> tuple[Projection, Tensor]:
    """Minimise 1/2 ||y - z||^2 over the polyhedra of r pairs.

    Parameters
    ----------
    constraints : Constraints
    z : Tensor of shape (r, d)
        Finite, with entries about 1.
    start : Tensor of shape (r, a), long, optional
        Rows guessed to be active, -1 for none.
    tolerance : float
        Violation allowed, relative to ||u||.

    Returns
    -------
    projection : Projection
        With a = min(d, n); `multiplier` and `polar` refer to the normals in the coordinates y.
    status : Tensor of shape (r,), long
        0 solved, 1 unfinished (dual feasible, violations left), 2 no feasible point.
    """
    sets = ActiveSets(z, min(z.shape[1], constraints.rows.shape[0]), constraints.rhs is not None)
    if sets.index.numel():
        if start is not None and len(z):
            sets.restore(constraints, torch.arange(len(z), device=z.device), start)
        _iterate(constraints, sets, torch.arange(len(z), device=z.device), tolerance)
        for _ in range(_RESTORES):
            stale = (sets.stale & (sets.status != INFEASIBLE)).nonzero()[:, 0]
            if not len(stale):
                break
            sets.restore(constraints, stale, sets.index[stale])
            _iterate(constraints, sets, stale, tolerance)
    multiplier, polar = sets.multipliers(constraints)
    return Projection(sets.point, sets.index, multiplier, polar), sets.status


def _iterate(constraints: Constraints, sets: ActiveSets, pairs: Tensor, tolerance: float) -> None:
    """Goldfarb-Idnani steps for `pairs` until each is feasible, or known not to end."""
    floor = NEGLIGIBLE * sets.z.norm(dim=1) if constraints.rhs is None else sets.z.new_full((len(sets.z),), -1.0)
    sets.status[pairs] = UNFINISHED
    part = constraints if len(pairs) == len(sets.z) else constraints.select(pairs)
    for _ in range(_ROUNDS * (sets.index.shape[1] + 1)):
        slack, size = part.slack(sets.point[pairs])
        least, row = slack.min(dim=1)
        unsolved = (least < -tolerance * size) & (size > floor[pairs])
        sets.status[pairs[~unsolved]] = SOLVED
        unsolved &= (sets.index[pairs] != row[:, None]).all(1)
        going = unsolved.nonzero()[:, 0]
        if len(going) < len(pairs):
            pairs, row, part = pairs[going], row[going], part.select(going)
        if not len(pairs):
            return
        ended = _include(part, sets, pairs, row)
        if len(ended):
            sets.status[pairs[ended]] = UNFINISHED if constraints.rhs is None else INFEASIBLE
            going = torch.ones_like(pairs, dtype=torch.bool)
            going[ended] = False
            going = going.nonzero()[:, 0]
            pairs, part = pairs[going], part.select(going)


def _include(part: Constraints, sets: ActiveSets, pairs: Tensor, row: Tensor) -> Tensor:
    """Steps that make a violated row of each pair active; returns which (positions) cannot."""
    local = torch.arange(len(pairs), device=pairs.device)
    normal, bound = part.normals(local, row), part.bounds(local, row)
    size = normal.norm(dim=1)
    weight = torch.zeros_like(bound)  # the multiplier of the new row
    stuck = []
    while len(local):
        who, normal_now = pairs[local], normal[local]
        occupied = sets.index[who] >= 0
        width = int((occupied.any(0).int() * torch.arange(1, occupied.shape[1] + 1, device=who.device)).max())
        coefficient, rest = split(sets.basis[:, :, :width][who], normal_now)
        direction = apply(sets.inverse[:, :width, :width][who], coefficient)
        square = (rest * rest).sum(1)
        dependent = (square <= (DEPENDENT * size[local]) ** 2) | occupied.all(1)
        gap = (bound[local] - (normal_now * sets.point[who]).sum(1)).clamp_min(0)
        full = torch.where(dependent, torch.inf, gap / square)
        multiplier = sets.multiplier[who, :width]
        if width:
            largest = direction.abs().amax(1, keepdim=True)
            blocking = occupied[:, :width] & (direction > NEGATIVE * largest)
            partial, slot = torch.where(blocking, multiplier / direction, torch.inf).min(dim=1)
        else:
            partial, slot = torch.full_like(full, torch.inf), torch.zeros_like(who)
        step = torch.minimum(partial, full)
        ends, adds = step.isinf(), full <= partial
        stuck.append(local[ends])
        length = torch.where(ends, 0.0, step)[:, None]
        sets.multiplier[who, :width] = (multiplier - length * direction).clamp_min(0)
        sets.point[who] += torch.where(dependent[:, None], 0.0, length * rest)
        weight[local] += length[:, 0]
        adding, dropping = (adds & ~ends).nonzero()[:, 0], (~adds).nonzero()[:, 0]
        if len(adding):
            who_adds, free = who[adding], occupied[adding].int().argmin(1)
            parts = (direction[adding], rest[adding])
            sets.add(who_adds, free, row[local[adding]], bound[local[adding]], parts)
            sets.multiplier[who_adds, free] = weight[local[adding]]
            sets.settle(who_adds, min(width + 1, occupied.shape[1]))
        if len(dropping):
            sets.drop(who[dropping], slot[dropping])
        local = local[dropping]
    return torch.cat(stuck)


def _finish(constraints: Constraints, z: Tensor, found: Projection, pair: int) -> None:
    """Solve one pair by `scipy.optimize.nnls`, keep the better multipliers, and make the point feasible."""
    here = torch.tensor([pair], device=z.device)
    part, target = constraints.select(here), z[here]
    normals = part.rows * part.signs[0][:, None]
    try:
        weights = torch.as_tensor(nnls(normals.T.cpu().numpy(), -target[0].cpu().numpy())[0]).to(z)
    except RuntimeError:  # too many iterations; the multipliers found so far stay a bound
        weights = z.new_zeros(len(normals))
    largest = weights.topk(found.index.shape[1])
    index = largest.indices.masked_fill(largest.values <= 0, -1)[None]
    sets = ActiveSets(target, index.shape[1], False)
    sets.restore(part, torch.zeros_like(here), index)
    choices = [(found.index[pair], found.multiplier[pair]), (index[0], largest.values)]
    choices.append((sets.index[0], sets.multipliers(part)[0][0]))
    polars = torch.stack([(normals[rows.clamp_min(0)] * weight[:, None]).sum(0) for rows, weight in choices])
    best = int((target + polars).norm(dim=1).argmin())
    found.index[pair], found.multiplier[pair] = choices[best]
    found.polar[pair] = polars[best]
    found.point[pair] = _feasible(normals, target[0] + polars[best], float(target.norm()))


def _feasible(normals: Tensor, point: Tensor, size: float) -> Tensor:
    """A point of the cone near `point`: orthogonal to every row found violated on the way."""
    basis = point.new_zeros(1, len(point), 0)
    while float(point.norm()) > NEGLIGIBLE * size:
        least, row = (normals @ point).min(dim=0)
        if float(least) >= -TOLERANCE * float(point.norm()):
            return point
        rest = split(basis, normals[row][None])[1]
        if basis.shape[2] == len(point) or float(rest.norm()) <= DEPENDENT:
            break
        basis = torch.cat([basis, (rest / rest.norm())[:, :, None]], dim=2)
        point = split(basis, point[None])[1][0]
    return torch.zeros_like(point)
