"""Projections onto many cones again and again, of which only those longer than some threshold are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from cvxnn.cones.cones import Cones
from cvxnn.cones.projection import TOLERANCE, Projection

__all__ = ["FaceMemory", "LongProjections"]

#: Signs of all vectors are kept up to this size.
_SIGN_ENTRIES = 1 << 22


class LongProjections:
    """Two vectors for each of B gates: which of their projections are longer than a threshold.

    In closed form where the facets of the cones are known, by :class:`FaceMemory` elsewhere.

    Parameters
    ----------
    cones : Cones
    gates : Tensor of shape (B,), long
        The same in every call.
    """

    def __init__(self, cones: Cones, gates: Tensor) -> None:
        self.faces, self.memory = None, None
        known = torch.zeros_like(gates, dtype=torch.bool)
        if cones.polygons is not None:
            faces, known = cones.polygons.faces(gates)
            self.faces = faces if bool(known.all()) else faces.select(known.nonzero()[:, 0])
        self.known, self.others = (part.nonzero()[:, 0] for part in (known, (~known).repeat(2)))
        if len(self.others) > 0:
            self.memory = FaceMemory(cones, gates.repeat(2)[self.others])

    def __call__(self, z: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Long projections of z (2, B, d).

        Returns
        -------
        chosen : Tensor of shape (s,), long
            Rows of z.view(2 B, d), in any order.
        point : Tensor of shape (s, d)
        projectors : Tensor of shape (s, d, d)
            Onto the spans of their faces.
        """
        if self.memory is None:
            return self._by_faces(z, threshold)
        chosen, point, projectors = self.memory.project_long(z.flatten(0, 1)[self.others], threshold)
        if len(self.known) == 0:
            return chosen, point, projectors
        found = self._by_faces(z[:, self.known], threshold)
        sign, place = found[0] // len(self.known), found[0] % len(self.known)
        found = (sign * z.shape[1] + self.known[place], *found[1:])
        mine = (self.others[chosen], point, projectors)
        one, two, three = (torch.cat(parts) for parts in zip(found, mine, strict=True))
        return one, two, three

    def _by_faces(self, z: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        assert self.faces is not None
        squares, face, _ = self.faces.nearest(z.permute(1, 2, 0))
        place, sign = (squares > threshold**2).nonzero(as_tuple=True)
        projectors = self.faces.projectors(place, face[place, sign])
        # Twice, as the first product has rounding errors relative to z.
        point = (projectors @ (projectors @ z[sign, place].unsqueeze(2))).squeeze(2)
        return sign * z.shape[1] + place, point, projectors


class FaceMemory:
    """The face on which each of r vectors was projected last, as matrices.

    With A the active rows of that time, P = I - A^+ A and lambda = -(A^+)^T z, P z is the projection where lambda >= 0
    and P z is in the cone; where only lambda >= 0 holds, ||P z|| = ||z + A^T lambda|| bounds the norm of the
    projection from above.

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (r,), long
        Gate of each vector, the same in every call.
    """

    def __init__(self, cones: Cones, gate: Tensor) -> None:
        self.cones = cones
        self.gate = gate
        d = cones.n_features
        self.face = torch.eye(d).to(cones.rows).repeat(len(gate), 1, 1)
        self.solution = cones.rows.new_zeros(len(gate), min(d, max(1, len(cones.rows))), d)
        self.index = torch.full(self.solution.shape[:2], -1, dtype=torch.long, device=gate.device)
        self.signs = cones.signs(gate) if len(gate) * len(cones.rows) <= _SIGN_ENTRIES else None

    def project_long(self, z: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Which projections of z (r, d) are longer than `threshold`, these (s, d), and projectors (s, d, d)."""
        guess = torch.bmm(self.face, z.unsqueeze(2)).squeeze(2)
        dual = (torch.bmm(self.solution, z.unsqueeze(2)).squeeze(2) <= 0).all(1)
        long = (z.square().sum(1) > threshold**2) & ~(dual & (guess.square().sum(1) <= threshold**2))
        chosen = long.nonzero()[:, 0]
        point = guess[chosen]
        if len(self.cones.rows) == 0 or len(chosen) == 0:
            return chosen, point, self.face[chosen]
        signs = self.cones.signs(self.gate[chosen]) if self.signs is None else self.signs[chosen]
        slack = (point @ self.cones.rows.T).mul_(signs).amin(1)
        moved = ((slack < -TOLERANCE * point.norm(dim=1)) | ~dual[chosen]).nonzero()[:, 0]
        if len(moved):
            point[moved] = self._project(chosen[moved], z[chosen[moved]])
            kept = (point.square().sum(1) > threshold**2).nonzero()[:, 0]
            chosen, point = chosen[kept], point[kept]
        return chosen, point, self.face[chosen]

    def _project(self, which: Tensor, z: Tensor) -> Tensor:
        """Project by the general method, and remember the faces."""
        gate = self.gate[which]
        start = Projection(z, self.index[which], self.solution[which, :, 0], z)
        found = self.cones.project(gate, z, start)
        index = torch.where(found.multiplier > 0, found.index, -1)
        self.index[which, : index.shape[1]] = index
        rows = self.cones.normals(gate, index)
        inverse = torch.linalg.pinv(rows)
        self.solution[which, : rows.shape[1]] = inverse.mT
        self.face[which] = torch.eye(z.shape[1]).to(z) - inverse @ rows
        return found.point
