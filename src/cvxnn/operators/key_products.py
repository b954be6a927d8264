"""The products of keys that the features of attention are made of: G_k(t) = X^T diag(M D_k)[t, :] X."""

from __future__ import annotations

from functools import cached_property

import torch

from cvxnn.operators.base import row_batches
from cvxnn.patterns import PatchBits

__all__ = ["KeyProducts"]

#: Bytes of what is formed of one batch of sequences.
_BATCH_BYTES = 2**26
#: Bytes of the products of keys that are kept.
_CACHE_BYTES = 2**27


class KeyProducts:
    """G_k(t) (d x d) of every query t and gate k, formed for some sequences, or kept where they are small.

    Parameters
    ----------
    tokens : torch.Tensor of shape (n, s, d)
    n_queries : int
        Queries m of a sequence.
    bits : PatchBits or None
        M o D_k, (n, m s, P); without them G is one matrix per sequence.
    keep : bool
        Whether they may stay in memory.
    """

    def __init__(self, tokens: torch.Tensor, n_queries: int, bits: PatchBits | None, keep: bool = True) -> None:
        self.tokens, self.n_queries, self.bits = tokens, n_queries, bits
        self.n_gates = 1 if bits is None else bits.n_gates
        #: Matrices G per sequence and gate.
        self.each = 1 if bits is None else n_queries
        self._keep = keep
        self._kept: torch.Tensor | None = None

    def batches(self, n_gates: int, heads: int, more: int = 0, within: slice | None = None) -> list[slice]:
        """Slices of sequences of whose G so many gates and rows k are formed at once, and `more` numbers of each."""
        within = slice(0, len(self.tokens)) if within is None else within
        _, s, d = self.tokens.shape
        m = self.n_queries
        size = heads * d * (1 if self.bits is None else m * n_gates + s)
        size += 0 if self.bits is None else 2 * m * s * n_gates
        batches = row_batches(within.stop - within.start, 8 * (size + more), _BATCH_BYTES)
        return [slice(within.start + rows.start, within.start + rows.stop) for rows in batches]

    def __call__(self, sequences: slice, gates: slice, heads: slice) -> torch.Tensor:
        """G_k[heads, :] of some gates, (queries, k, heads, d); without a mask and gates one per sequence."""
        if self.are_kept:
            if self._kept is None:
                batches = self.batches(self.n_gates, self.tokens.shape[2])
                self._kept = torch.cat([self._form(part, slice(None), slice(None)) for part in batches])
            return self._kept[sequences.start * self.each : sequences.stop * self.each, gates, heads]
        return self._form(sequences, gates, heads)

    @cached_property
    def are_kept(self) -> bool:
        """Whether all G stay in memory."""
        n, _, d = self.tokens.shape
        return self._keep and n * self.each * self.n_gates * d**2 * self.tokens.element_size() <= _CACHE_BYTES

    def _form(self, sequences: slice, gates: slice, heads: slice) -> torch.Tensor:
        keys = self.tokens[sequences]
        chosen = keys[:, :, heads]
        if self.bits is None:
            return (chosen.mT @ keys).unsqueeze(1)
        n, s, d = keys.shape
        m = self.n_queries
        active = self.bits.rows(sequences)[:, :, gates].view(n, m, s, -1).to(keys.dtype)
        n_gates = active.shape[3]
        pairs = (chosen.unsqueeze(3) * keys.unsqueeze(2)).flatten(2)
        products = active.mT.reshape(n, m * n_gates, s) @ pairs
        return products.view(n * m, n_gates, -1, d)

    def times(self, left: torch.Tensor, sequences: slice) -> torch.Tensor:
        """Rows (n, r, d) times the one G = X^T X of their sequences, formed or not, whichever is cheaper."""
        s, d = self.tokens.shape[1:]
        n_rows, keys = left.shape[1], self.tokens[sequences]
        if self.are_kept and d <= 2 * s:
            return left @ self(sequences, slice(None), slice(None))[:, 0]
        return left @ (keys.mT @ keys) if s * d + n_rows * d < 2 * n_rows * s else (left @ keys.mT) @ keys
