"""A change of variables per gate that makes the curvature in U nearly a multiple of the identity."""

from __future__ import annotations

import torch

from cvxnn.factored import FactoredLoss
from cvxnn.solvers.burer_monteiro.local import gate_grams

__all__ = ["MAX_ENTRIES", "Whitening"]

#: No whitening where its matrices would have more entries than this (1 GiB).
MAX_ENTRIES = 2**27


class Whitening:
    """u = T_k z with T_k = L_k^-T, where L_k L_k^T = X^T D_k W D_k X + beta I (section 6 of the maths)."""

    def __init__(self, loss: FactoredLoss, beta: float) -> None:
        n_gates, p, _ = loss.op.block_shape
        gates = torch.arange(n_gates, device=loss.Y.device)
        grams = gate_grams(loss, gates)
        grams.diagonal(dim1=1, dim2=2).add_(beta)
        factor = torch.linalg.cholesky(grams)
        unit = torch.eye(p, dtype=grams.dtype, device=grams.device)
        self.T = torch.linalg.solve_triangular(factor.mT, unit.expand_as(factor), upper=True)
        self.factor = factor

    def padded(self, gate: torch.Tensor) -> _Padding:
        """The maps for a list of columns of some gates."""
        return _Padding(self, gate)


class _Padding:
    """Columns of one gate side by side, so that one batched product serves all of them."""

    def __init__(self, whitening: Whitening, gate: torch.Tensor) -> None:
        self.gates, place = torch.unique(gate, return_inverse=True)
        order = torch.argsort(place, stable=True)
        counts = torch.bincount(place, minlength=len(self.gates))
        self.place = place
        self.slot = torch.empty_like(place)
        self.slot[order] = torch.arange(len(gate), device=gate.device) - (counts.cumsum(0) - counts)[place[order]]
        self.width = int(counts.max()) if len(gate) else 0
        every = len(self.gates) == len(whitening.T)
        self.T = whitening.T if every else whitening.T[self.gates]
        self.factor = whitening.factor if every else whitening.factor[self.gates]

    def _times(self, matrices: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """u_j^T M_k for the rows u_j."""
        full = u.new_zeros(len(self.gates), self.width, u.shape[1])
        full[self.place, self.slot] = u
        return torch.bmm(full, matrices)[self.place, self.slot]

    def colour(self, z: torch.Tensor) -> torch.Tensor:
        """u = T z."""
        return self._times(self.T.mT, z)

    def whiten(self, u: torch.Tensor) -> torch.Tensor:
        """z = T^-1 u = L^T u."""
        return self._times(self.factor, u)

    def gradient(self, slope: torch.Tensor) -> torch.Tensor:
        """The gradient in z, T^T times that in u."""
        return self._times(self.T, slope)
