"""Projection onto cones of the line and the plane in closed form, from the few rows that matter in each cone.

A cone in the plane has at most two facets. The rows that turn out to be violated are kept in a table, gate by gate;
with the rows of the table the projection is z itself, or on the line of one row, or zero, and all of these are tried
at once. A point that respects all the other rows too is the projection onto the cone itself; otherwise the most
violated row joins the table. Tables settle after a few calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvxnn.cones.projection import NEGLIGIBLE, TOLERANCE, Projection

__all__ = ["MOST_DIMENSIONS", "FaceTable"]

MOST_DIMENSIONS = 2
#: Rows that a table can hold for a gate; cones that need more are left to the general method.
_MOST_ROWS = 12
_FIRST_ROWS = 4
#: Slacks of face candidates, for vectors z of norm 1.
_FACE_TOLERANCE = 1e-13
#: Sine of the angle of two rows below which what they span is left to the general method.
_PARALLEL = 1e-6
#: Distance of z + K^T lambda from the point, relative to z, above which the general method is asked.
_ACCURATE = 1e-11


class FaceTable:
    """The rows that matter in every cone {u : diag(signs_k) rows u >= 0}, d <= 2.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
        Unit rows, float64; n >= d.
    patterns : Tensor of shape (P, n), bool

    Attributes
    ----------
    index : Tensor of shape (P, F), long
        Rows in the table of each gate, -1 in the padding.
    normals : Tensor of shape (P, F, d)
        These rows with their signs, zeros in the padding.
    count : Tensor of shape (P,), long
    """

    def __init__(self, rows: Tensor, patterns: Tensor) -> None:
        self.rows = rows
        self.patterns = patterns
        n_gates = len(patterns)
        self.index = torch.full((n_gates, _FIRST_ROWS), -1, dtype=torch.long, device=rows.device)
        self.normals = rows.new_zeros(n_gates, _FIRST_ROWS, rows.shape[1])
        self.count = torch.zeros(n_gates, dtype=torch.long, device=rows.device)

    def project(self, gate: Tensor, signs: Tensor, z: Tensor) -> tuple[Projection, Tensor]:
        """Projections of z (r, d), and which of them (r,) are to be done by the general method instead.

        `signs` (r, n) are those of the gates.
        """
        r, d = z.shape
        _, exponent = torch.frexp(z.abs().amax(1, keepdim=True))
        unit = torch.ldexp(z, -exponent)
        size = unit.norm(dim=1, keepdim=True)
        unit = unit / torch.where(size > 0, size, 1.0)
        point, weight = torch.zeros_like(z), torch.zeros_like(z)
        local = torch.full((r, d), -1, dtype=torch.long, device=z.device)
        failed = torch.zeros(r, dtype=torch.bool, device=z.device)
        left = torch.arange(r, device=z.device)
        while len(left):
            found, rows, values, known = _project(self.normals[gate[left]], unit[left])
            point[left], local[left], weight[left] = found, rows, values
            slack, worst = (found @ self.rows.T).mul_(signs if len(left) == r else signs[left]).min(1)
            violated = known & (slack < -TOLERANCE * found.norm(dim=1))
            failed[left[~known]] = True
            left = left[violated]
            if len(left):
                left = left[self._add(gate[left], worst[violated], failed, left)]
        index = torch.where(local < 0, -1, self.index[gate].gather(1, local.clamp_min(0)))
        used = self.normals[gate[:, None], local.clamp_min(0)]
        polar = torch.einsum("ra,rad->rd", weight, used)
        failed |= (unit + polar - point).norm(dim=1) > _ACCURATE
        parts = (torch.ldexp(part * size, exponent) for part in (point, weight, polar))
        point, weight, polar = parts
        return Projection(point, index, weight, polar), failed

    def _add(self, gate: Tensor, row: Tensor, failed: Tensor, pairs: Tensor) -> Tensor:
        """Put a row into the table of each gate; False for pairs for which that does not help any more."""
        useful = ~(self.index[gate] == row[:, None]).any(1) & (self.count[gate] < _MOST_ROWS)
        failed[pairs[~useful]] = True
        gate, row = gate[useful], row[useful]
        if len(gate) == 0:
            return useful
        if int(self.count[gate].max()) >= self.index.shape[1]:
            self._widen()
        # Pairs of one gate may bring different rows: one is taken, the others come again.
        slot = self.count[gate]
        self.index[gate, slot] = row
        taken = self.index[gate, slot]
        sign = self.patterns[gate, taken].to(self.rows.dtype).mul_(2).sub_(1)
        self.normals[gate, slot] = self.rows[taken] * sign[:, None]
        self.count[gate] = slot + 1
        return useful

    def _widen(self) -> None:
        more = min(2 * self.index.shape[1], _MOST_ROWS) - self.index.shape[1]
        self.index = torch.cat([self.index, self.index.new_full((len(self.index), more), -1)], dim=1)
        self.normals = torch.cat([self.normals, self.normals.new_zeros(len(self.index), more, self.rows.shape[1])], 1)


def _project(normals: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Project unit vectors z (r, d) onto {u : normals u >= 0} with normals (r, F, d), zeros in the padding.

    Returns the points (r, d), the active rows (r, d) (-1 for none), their multipliers (r, d), and whether a face was
    found (r,): one where the point is feasible and the multipliers are not negative, which is optimality.
    """
    r, d = z.shape
    slack = torch.bmm(normals, z.unsqueeze(2)).squeeze(2)
    point, index, weight = z.clone(), torch.full((r, d), -1, dtype=torch.long, device=z.device), torch.zeros_like(z)
    known = slack.amin(1) >= -_FACE_TOLERANCE
    left = (~known).nonzero()[:, 0]
    if len(left):
        found, hit = _single_rows(normals[left], slack[left])
        chosen, hit = left[found], hit[found]
        row = normals[chosen, hit]
        index[chosen, 0], weight[chosen, 0] = hit, -slack[chosen, hit]
        point[chosen] = _on_line(row, z[chosen])
        known[chosen] = True
        left = left[~found]
    if d == 2 and len(left):
        found, pair, values = _pairs_of_rows(normals[left], z[left])
        chosen = left[found]
        index[chosen], weight[chosen], point[chosen] = pair[found], values[found], 0.0
        known[chosen] = True
    return point, index, weight, known


def _single_rows(normals: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the projection is on the line of a single row (s,), and of which (s,)."""
    gram = torch.bmm(normals, normals.mT)
    moved = slack.unsqueeze(1) - slack.unsqueeze(2) * gram  # slacks of all rows where one of them is made zero
    good = (slack <= 0) & (gram.diagonal(dim1=1, dim2=2) > 0.5) & (moved.amin(2) >= -_FACE_TOLERANCE)
    found, hit = good.max(1)
    return found, hit


def _pairs_of_rows(normals: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether -z (s, 2) is a non-negative combination of two rows (s,), which (s, 2), and its coefficients (s, 2)."""
    i, j = torch.triu_indices(normals.shape[1], normals.shape[1], 1, device=z.device)
    a, b = normals[:, i], normals[:, j]
    determinant = _cross(a, b)
    usable = determinant.abs() > _PARALLEL
    outer = z.unsqueeze(1)
    values = torch.stack([-_cross(outer, b), _cross(outer, a)], 2) / torch.where(usable, determinant, 1.0).unsqueeze(2)
    found, best = (usable & (values >= 0).all(2)).max(1)
    return found, torch.stack([i, j], 1)[best], values[torch.arange(len(z), device=z.device), best]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _on_line(row: Tensor, z: Tensor) -> Tensor:
    """Unit vectors z (s, d) without their components along unit rows (s, d); zero where nothing is left."""
    for _ in range(2):
        z = z - row * (row * z).sum(1, keepdim=True)
    return torch.where(z.norm(dim=1, keepdim=True) > NEGLIGIBLE, z, 0.0)
