"""Features of sequences whose rows are sums over tokens, under gates or a mask: kept where they fit in memory."""

from __future__ import annotations

from functools import cached_property

import torch

from cvxnn.operators.base import row_batches
from cvxnn.operators.passes import batches_of
from cvxnn.operators.symmetric import add_product
from cvxnn.patterns import PatchBits

__all__ = ["PooledProducts"]

#: Bytes of the features that are kept.
_CACHE_BYTES = 2**30
#: Bytes of the features of one batch of sequences.
_BATCH_BYTES = 2**26


class PooledProducts:
    """Phi_ik[(l, l'), a] = sum_t w_t x_t[a] sum_t' M D_k[t, t'] x_t'[l] x_t'[l'] for l <= l', (n, P, d (d + 1) / 2, d).

    The products G_k(t) are symmetric, so that A(Z) depends on Z[l d + a, l' c + b] + Z[l' d + a, l c + b] only. A
    pass over kept features is a product with them, and takes m times fewer operations than one over the G of m tokens;
    where they are too large for that they are formed again, a batch of sequences at a time.

    Parameters
    ----------
    tokens : torch.Tensor of shape (n, s, d)
    queries : torch.Tensor of shape (n, m, d)
        The tokens x_t times their weights w_t in the row of their sequence.
    bits : PatchBits
        M o D_k, (n, m s, P).
    keep : bool
        Whether they may stay in memory.
    """

    def __init__(self, tokens: torch.Tensor, queries: torch.Tensor, bits: PatchBits, keep: bool = True) -> None:
        self.tokens, self.queries, self.bits = tokens, queries, bits
        self.dim = d = tokens.shape[2]
        self.first, self.second = torch.triu_indices(d, d, device=tokens.device)
        self._keep = keep
        self._kept: torch.Tensor | None = None

    def _bytes(self, n_gates: int) -> int:
        """Bytes of the features of a sequence for so many gates."""
        return n_gates * len(self.first) * self.dim * self.tokens.element_size()

    @property
    def fit(self) -> bool:
        """Whether the features of a sequence are small enough to be formed."""
        return self.are_kept or self._bytes(self.bits.n_gates) <= _BATCH_BYTES

    @cached_property
    def are_kept(self) -> bool:
        """Whether all of them stay in memory."""
        return self._keep and len(self.tokens) * self._bytes(self.bits.n_gates) <= _CACHE_BYTES

    def batches(self, n_gates: int) -> list[slice]:
        """Slices of sequences whose features for so many gates are taken together."""
        s, m = self.tokens.shape[1], self.queries.shape[1]
        more = self.tokens.element_size() * ((s + m * n_gates) * len(self.first) + 2 * m * s * n_gates)
        return row_batches(len(self.tokens), self._bytes(n_gates) + more, _BATCH_BYTES)

    def __call__(self, sequences: slice, gates: slice = slice(None)) -> torch.Tensor:
        """Phi of some sequences and gates, (sequences, gates, d (d + 1) / 2, d)."""
        if not self.are_kept:
            return self._form(sequences, gates)
        if self._kept is None:
            n_gates = self.bits.n_gates
            kept = self.tokens.new_empty(len(self.tokens), n_gates, len(self.first), self.dim)
            for part in self.batches(n_gates):
                kept[part] = self._form(part, slice(None))
            self._kept = kept
        return self._kept[sequences, gates]

    def _form(self, sequences: slice, gates: slice) -> torch.Tensor:
        keys, queries = self.tokens[sequences], self.queries[sequences]
        n, s, d = keys.shape
        m = queries.shape[1]
        active = self.bits.rows(sequences)[:, :, gates].view(n, m, s, -1).to(keys.dtype)
        pairs = keys[:, :, self.first] * keys[:, :, self.second]
        products = (active.mT.reshape(n, -1, s) @ pairs).view(n, m, -1)
        return (products.mT @ queries).view(n, -1, len(self.first), d)

    # -- blocks (P, d d, d c) -----------------------------------------------------------------------------------

    def _packed(self, Z: torch.Tensor, n_outputs: int) -> torch.Tensor:
        """What A sees of blocks, a row per output, (rows, P d (d + 1) / 2 d)."""
        d = self.dim
        blocks = Z.reshape(-1, d, d, d, n_outputs).transpose(2, 3)
        mirrored = blocks[:, self.second, self.first] * (self.first != self.second).view(-1, 1, 1).to(Z.dtype)
        weights = (blocks[:, self.first, self.second] + mirrored).reshape(-1, n_outputs).T
        return _padded(weights)

    def _blocks(self, sums: torch.Tensor, n_outputs: int) -> torch.Tensor:
        """The adjoint of :meth:`_packed`, for rows of outputs alone."""
        d = self.dim
        place = torch.empty(d, d, dtype=torch.long, device=sums.device)
        place[self.first, self.second] = place[self.second, self.first] = torch.arange(
            len(self.first), device=sums.device
        )
        blocks = sums.view(n_outputs, -1, len(self.first), d)[:, :, place]
        return blocks.permute(1, 2, 4, 3, 0).reshape(-1, d * d, d * n_outputs)

    def apply(self, Z: torch.Tensor, n_outputs: int) -> torch.Tensor:
        """Predictions (n, c) of blocks Z (P, d d, d c)."""
        weights = self._packed(Z, n_outputs)
        outputs = Z.new_empty(len(self.tokens), n_outputs)
        for part in batches_of(self.batches(self.bits.n_gates), "predictions"):
            outputs[part] = (weights @ self(part).flatten(1).T)[:n_outputs].T
        return outputs

    def adjoint(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        """Blocks (gates, d d, d c) of predictions L (n, c)."""
        start, stop, _ = gates.indices(self.bits.n_gates)
        spread = _padded(L.T)
        sums = L.new_zeros(len(spread), (stop - start) * len(self.first) * self.dim)
        for part in batches_of(self.batches(stop - start), "gradient"):
            sums.addmm_(spread[:, part], self(part, slice(start, stop)).flatten(1))
        return self._blocks(sums[: L.shape[1]], L.shape[1])

    def kernel(self) -> torch.Tensor:
        """The matrix (n, n) of A A* for one output; for features that are kept."""
        n = len(self.tokens)
        K = self.tokens.new_zeros(n, n)
        root = (2 - (self.first == self.second).to(K.dtype)).sqrt().unsqueeze(1)
        for gates in row_batches(self.bits.n_gates, n * self._bytes(1), _BATCH_BYTES):
            add_product(K, (self(slice(0, n), gates) * root).flatten(1).T)
        return K


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """The rows and zeros, up to a multiple of four: products with few rows are the faster for it."""
    full = rows.new_zeros(-(-len(rows) // 4) * 4, rows.shape[1])
    full[: len(rows)] = rows
    return full
