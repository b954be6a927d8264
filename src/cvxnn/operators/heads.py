"""Columns of attention as heads: their hidden outputs and the adjoint, without blocks and without features."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cvxnn.operators.base import row_batches
from cvxnn.operators.key_products import KeyProducts
from cvxnn.operators.queries import Queries
from cvxnn.patterns import PatchBits

__all__ = ["Heads"]

#: Bytes of what is formed of one batch of sequences.
_BATCH_BYTES = 2**26


class Heads:
    """Hidden outputs sum_t' M D[t, t'] (x_t^T U_j x_t') x_t' of heads U_j, (rows, r d).

    Parameters
    ----------
    tokens, queries : torch.Tensor of shape (n, s, d) and (n, m, d)
    rows : Queries
        How the rows are made of the queries.
    bits : PatchBits or None
        M o D_k, (n, m s, P); None where all tokens see one another.
    products : KeyProducts
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        queries: torch.Tensor,
        rows: Queries,
        bits: PatchBits | None,
        products: KeyProducts,
    ) -> None:
        self.tokens, self.queries, self.rows, self.bits, self.products = tokens, queries, rows, bits, products

    def batches(self, n_columns: int) -> list[slice]:
        """Slices of rows whose scores for so many columns are formed at once."""
        _, s, d = self.tokens.shape
        m = self.rows.shape[1]
        n_gates = self.products.n_gates
        size = m * n_columns * (2 * d + 2 * s) + (0 if self.bits is None else m * s * (n_gates + 2 * n_columns))
        batches = row_batches(len(self.tokens), 8 * size, _BATCH_BYTES)
        return [self.rows.rows_of(sequences) for sequences in batches]

    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        """Hidden outputs of columns u (r, d d) under the gates of these."""
        sequences, places = self.rows.sequences(rows)
        active = None if self.bits is None else self._active(sequences, gate)
        return self._outputs(u, sequences, places, active)

    def relu(self, u: torch.Tensor, rows: slice, allowed: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Hidden outputs of columns whose scores pass a ReLU; `allowed` says which pairs of sequences count."""
        sequences, places = self.rows.sequences(rows)
        counted = allowed(sequences).unsqueeze(2).to(self.tokens.dtype)
        return self._outputs(u, sequences, places, counted, relu=True)

    def _active(self, sequences: slice, gate: torch.Tensor) -> torch.Tensor:
        """M o D of the gates of r columns, (n, m, r, s)."""
        assert self.bits is not None
        n, m, s = sequences.stop - sequences.start, self.rows.shape[1], self.tokens.shape[1]
        return self.bits.rows(sequences)[:, :, gate].view(n, m, s, len(gate)).mT.to(self.tokens.dtype)

    def _outputs(
        self,
        u: torch.Tensor,
        sequences: slice,
        places: torch.Tensor | None,
        active: torch.Tensor | None,
        relu: bool = False,
    ) -> torch.Tensor:
        """Hidden outputs (rows, r d): scores x_t^T U_j x_t', times `active` or through a ReLU, times the keys."""
        r, d = len(u), self.tokens.shape[2]
        keys, queries = self.tokens[sequences], self.queries[sequences]
        n, m = queries.shape[:2]
        left = (queries.reshape(n * m, d) @ u.reshape(r * d, d).T).view(n, m * r, d)
        if active is None:
            heads = self.products.times(left, sequences)
            return self.rows.collect(heads.view(n, m, r * d), sequences, places)
        scores = (left @ keys.mT).view(n, m, r, keys.shape[1])
        scores = (scores.clamp_min_(0) if relu else scores).mul_(active)
        if self.rows.pooled:
            scores = self.rows.collect(scores, sequences, places)
            return (scores @ keys).flatten(1)
        heads = scores.view(n, m * r, keys.shape[1]) @ keys
        return self.rows.collect(heads.view(n, m, r * d), sequences, places)

    def adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        """The adjoint of :meth:`hidden` in u, (r, d d)."""
        sequences, places = self.rows.sequences(rows)
        r, d = len(gate), self.tokens.shape[2]
        keys, queries = self.tokens[sequences], self.queries[sequences]
        n, m = queries.shape[:2]
        if self.bits is None:
            spread = self.rows.spread(M, sequences, places).reshape(n, m * r, d)
            left = self.products.times(spread, sequences)
        else:
            if self.rows.pooled:
                scores = self.rows.spread(M.reshape(n, r, d) @ keys.mT, sequences, places)
            else:
                spread = self.rows.spread(M, sequences, places)
                scores = (spread.reshape(n, m * r, d) @ keys.mT).view(n, m, r, keys.shape[1])
            left = scores.mul_(self._active(sequences, gate)).view(n, m * r, keys.shape[1]) @ keys
        return (left.reshape(n * m, r * d).T @ queries.reshape(n * m, d)).view(r, d * d)

    def unit_energies(self, weights: torch.Tensor) -> torch.Tensor:
        """:meth:`Operator.unit_energies` where all tokens see one another."""
        d = self.tokens.shape[2]
        energies = weights.new_zeros(d, d)
        for sequences in self.products.batches(1, d):
            rows = self.rows.rows_of(sequences)
            spread = self.rows.spread(weights[rows], sequences, self.rows.sequences(rows)[1])
            queries = (self.queries[sequences].square() * spread.unsqueeze(2)).sum(1)
            products = self.products(sequences, slice(None), slice(None))[:, 0]
            energies.addmm_(products.square().sum(2).T, queries)
        return energies.flatten() / d
