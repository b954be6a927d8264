"""Projection onto cones in up to three dimensions in closed form, from the few rows that matter in each cone.

A cone in the plane or in space has few facets. The rows that turn out to be violated are kept in a table, gate by
gate; with the rows of the table the projection is on one of few faces, and all of them are tried at once. A point
that respects all the other rows too is the projection onto the cone itself; otherwise the most violated row joins
the table. Tables settle after a few calls.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from cvxnn.cones.projection import TOLERANCE, Projection

__all__ = ["MOST_DIMENSIONS", "FaceTable"]

MOST_DIMENSIONS = 2
#: Rows that a table can hold for a gate; cones that need more are left to the general method.
_MOST_ROWS = 12
_FIRST_ROWS = 4
#: Slacks of face candidates, for vectors z of norm 1.
_FACE_TOLERANCE = 1e-13
#: Sine of the angle of two rows below which their edge is left to the general method.
_PARALLEL = 1e-6


class FaceTable:
    """The rows that matter in every cone {u : diag(signs_k) rows u >= 0}, d <= 3.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
        Unit rows, float64.
    patterns : Tensor of shape (P, n), bool
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
        point = torch.zeros_like(z)
        local = torch.full((r, d), -1, dtype=torch.long, device=z.device)
        weight = torch.zeros_like(z)
        failed = torch.zeros(r, dtype=torch.bool, device=z.device)
        left = torch.arange(r, device=z.device)
        while len(left):
            own = gate[left]
            found, rows, values, known = _project(self.normals[own], unit[left])
            point[left], local[left], weight[left] = found, rows, values
            slack, worst = (found @ self.rows.T).mul_(signs if len(left) == r else signs[left]).min(1)
            violated = known & (slack < -TOLERANCE * found.norm(dim=1))
            failed[left[~known]] = True
            left = left[violated]
            if len(left):
                left = left[self._add(gate[left], worst[violated], failed, left)]
        index = torch.where(local < 0, -1, self.index[gate].gather(1, local.clamp_min(0)))
        used = self.normals[gate[:, None], local.clamp_min(0)]
        weight = weight * size
        polar = torch.einsum("ra,rad->rd", weight, used)
        point, weight, polar = (torch.ldexp(part, exponent) for part in (point * size, weight, polar))
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
    gram = torch.bmm(normals, normals.mT)
    point, index, weight = z.clone(), torch.full((r, d), -1, dtype=torch.long, device=z.device), torch.zeros_like(z)
    known = slack.amin(1) >= -_FACE_TOLERANCE
    for level in range(1, d + 1):
        left = (~known).nonzero()[:, 0]
        if len(left) == 0:
            break
        combos = torch.tensor(list(combinations(range(normals.shape[1]), level)), device=z.device)
        if len(combos) == 0:
            break
        A, s, G = normals[left], slack[left], gram[left]
        values, independent = _multipliers(A, s, G, z[left], combos)
        good = independent & (values >= 0).all(2)
        if level < d:
            moved = s.unsqueeze(1) + torch.einsum("rea,raef->ref", values, G[:, combos.T])
            good &= moved.amin(2) >= -_FACE_TOLERANCE
        found, best = good.max(1)
        chosen, hit = left[found], combos[best[found]]
        index[chosen, :level] = hit
        weight[chosen, :level] = values[found, best[found]]
        point[chosen] = _on_face(normals[chosen[:, None], hit], z[chosen])
        known[chosen] = True
    return point, index, weight, known


def _multipliers(A: Tensor, s: Tensor, G: Tensor, z: Tensor, combos: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers (r, E, level) that put the slacks of every combination of rows to zero, and where they exist."""
    level = combos.shape[1]
    if level == 1:
        rows = G.diagonal(dim1=1, dim2=2) > 0.5
        return -s.unsqueeze(2), rows
    i, j = combos[:, 0], combos[:, 1]
    if level == 2:
        g = G[:, i, j]
        determinant = 1 - g.square()
        independent = (determinant > _PARALLEL**2) & (G[:, i, i] + G[:, j, j] > 1.5)
        determinant = torch.where(independent, determinant, 1.0)
        values = torch.stack([g * s[:, j] - s[:, i], g * s[:, i] - s[:, j]], dim=2) / determinant.unsqueeze(2)
        return values, independent
    k = combos[:, 2]
    crosses = [torch.linalg.cross(A[:, a], A[:, b]) for a, b in ((j, k), (k, i), (i, j))]
    determinant = (A[:, i] * crosses[0]).sum(2)
    independent = determinant.abs() > _PARALLEL**2
    determinant = torch.where(independent, determinant, 1.0)
    # -z in terms of three rows: its products with the reciprocal basis.
    return torch.stack([-(cross * z.unsqueeze(1)).sum(2) for cross in crosses], dim=2) / determinant[
        :, :, None
    ], independent


def _on_face(active: Tensor, z: Tensor) -> Tensor:
    """Projections of z (r, d) onto the orthogonal complement of independent rows (r, level, d)."""
    level, d = active.shape[1:]
    if level == d:
        return torch.zeros_like(z)
    if level == 1:
        row = active[:, 0]
        for _ in range(2):
            z = z - row * (row * z).sum(1, keepdim=True)
        return z
    edge = torch.linalg.cross(active[:, 0], active[:, 1])
    return edge * ((edge * z).sum(1, keepdim=True) / edge.square().sum(1, keepdim=True))
