"""Columns side by side with those of the same gate, so that one batched product serves all."""

from __future__ import annotations

import torch

__all__ = ["GateGroups"]


class GateGroups:
    """Places (gate, slot) for a list of columns.

    Parameters
    ----------
    gate : torch.Tensor of shape (r,)
        Gate of each column.

    Attributes
    ----------
    gates : torch.Tensor of shape (k,)
        The gates that have columns.
    """

    def __init__(self, gate: torch.Tensor) -> None:
        self.gate = gate
        self.gates, self._place = torch.unique(gate, return_inverse=True)
        counts = torch.bincount(self._place, minlength=len(self.gates))
        order = torch.argsort(self._place, stable=True)
        starts = counts.cumsum(0) - counts
        self._slot = torch.empty_like(self._place)
        self._slot[order] = torch.arange(len(gate), device=gate.device) - starts[self._place[order]]
        self.slots = int(counts.max()) if len(gate) else 0

    def some_of(self, n_gates: int) -> bool:
        """Whether some of so many gates have no columns."""
        return len(self.gates) < n_gates

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values (r, ...) in their places (k, slots, ...), zeros elsewhere."""
        full = values.new_zeros(len(self.gates), self.slots, *values.shape[1:])
        full[self._place, self._slot] = values
        return full

    def gather(self, full: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`spread`."""
        return full[self._place, self._slot]
