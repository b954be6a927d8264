"""Projections onto many cones again and again, where the faces rarely change from call to call."""

from __future__ import annotations

import torch
from torch import Tensor

from cvxnn.cones.cones import Cones
from cvxnn.cones.projection import TOLERANCE, Projection

__all__ = ["FaceMemory"]


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

    def project_long(self, z: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Which projections of z (r, d) are longer than `threshold`, and these (s, d)."""
        guess = torch.bmm(self.face, z.unsqueeze(2)).squeeze(2)
        dual = (torch.bmm(self.solution, z.unsqueeze(2)).squeeze(2) <= 0).all(1)
        long = (z.square().sum(1) > threshold**2) & ~(dual & (guess.square().sum(1) <= threshold**2))
        chosen = long.nonzero()[:, 0]
        point = guess[chosen]
        if len(self.cones.rows) == 0 or len(chosen) == 0:
            return chosen, point
        signs = self.cones.signs(self.gate[chosen]) if self.signs is None else self.signs[chosen]
        slack = (point @ self.cones.rows.T).mul_(signs).amin(1)
        moved = ((slack < -TOLERANCE * point.norm(dim=1)) | ~dual[chosen]).nonzero()[:, 0]
        if len(moved):
            point[moved] = self._project(chosen[moved], z[chosen[moved]])
            kept = (point.square().sum(1) > threshold**2).nonzero()[:, 0]
            chosen, point = chosen[kept], point[kept]
        return chosen, point

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


#: Signs of all vectors are kept up to this size.
_SIGN_ENTRIES = 1 << 22
