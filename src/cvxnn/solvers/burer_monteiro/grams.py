"""The Gram matrices X^T D_k W D_k X of the gates: what whitens the columns of each."""

from __future__ import annotations

import torch

from cvxnn.factored import FactoredLoss
from cvxnn.operators.gate_groups import GateGroups

__all__ = ["MAX_ENTRIES", "GramColumns", "WhitenedGrams", "gate_grams"]

#: Only the diagonals of the matrices are used where all of them would have more entries than this (1 GiB).
MAX_ENTRIES = 2**27
#: Hidden outputs of all unit vectors that are formed for all samples at once.
_TOGETHER = 2**26


def gate_grams(loss: FactoredLoss, gates: torch.Tensor) -> torch.Tensor:
    """X^T D_k W D_k X of each gate, (k, p, p), W the weights of the samples; the mean over the hidden outputs."""
    op = loss.op
    p = op.block_shape[1]
    units = torch.eye(p, dtype=op.dtype, device=gates.device)
    grams = []
    root = loss.weights.sqrt().unsqueeze(1)
    whole = op.n_samples * p * op.width <= _TOGETHER
    for gate in gates:
        every, gram = gate.repeat(p), units.new_zeros(p, p)
        for rows in [slice(0, op.n_samples)] if whole else op.column_batches(p):
            features = op.hidden(every, units, rows) * root[rows]
            features = features.view(-1, p, op.width).mT.reshape(-1, p)
            gram += features.T @ features / op.width
        grams.append(gram)
    return torch.stack(grams) if grams else units.new_zeros(0, p, p)


class WhitenedGrams:
    """Powers of the blocks s_j X^T D_k W D_k X + t I of the columns j of gate k, from an eigendecomposition.

    Only the diagonals of the blocks are kept where there would be more than `MAX_ENTRIES` numbers.
    """

    def __init__(self, loss: FactoredLoss) -> None:
        n_gates, p, _ = loss.op.block_shape
        gates = torch.arange(n_gates, device=loss.Y.device)
        self.vectors: torch.Tensor | None = None
        if n_gates * p * p <= MAX_ENTRIES:
            values, self.vectors = torch.linalg.eigh(gate_grams(loss, gates))
        else:
            values = torch.stack([loss.op.unit_energies(gate, loss.weights) for gate in gates])
        self.values = values.clamp_min(0)

    def columns(self, gate: torch.Tensor, scale: torch.Tensor) -> GramColumns:
        """The products for columns of some gates, with the scales s_j."""
        return GramColumns(self, gate, scale)


class GramColumns:
    """The blocks of a list of columns, those of one gate side by side, so that one batched product serves all."""

    def __init__(self, grams: WhitenedGrams, gate: torch.Tensor, scale: torch.Tensor) -> None:
        self.groups = groups = GateGroups(gate)
        whole = grams.vectors is None or not groups.some_of(len(grams.values))
        self.vectors = grams.vectors if whole or grams.vectors is None else grams.vectors[groups.gates]
        self.values = scale.unsqueeze(1) * grams.values[gate]

    def _rotate(self, u: torch.Tensor, back: bool = False) -> torch.Tensor:
        """u_j^T Q_k, or with Q_k^T."""
        if self.vectors is None:
            return u
        vectors = self.vectors.mT if back else self.vectors
        return self.groups.gather(torch.bmm(self.groups.spread(u), vectors))

    def power(self, u: torch.Tensor, shift: float, exponent: float, times: float = 1.0) -> torch.Tensor:
        """(times s_j gram + shift I)^exponent u_j."""
        return self._rotate(self._rotate(u) * (times * self.values + shift) ** exponent, back=True)
