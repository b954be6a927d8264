"""Multi-head self-attention without softmax: equations (8), (26), (104), (133), (134), Lemmas 3.9 and B.3."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.operators.attention_kernel import attention_kernel
from cvxnn.operators.base import Operator, row_batches
from cvxnn.operators.heads import Heads
from cvxnn.operators.key_products import KeyProducts
from cvxnn.operators.pairs import allowed_pairs, gate_vectors, pair_bits, pair_rows
from cvxnn.operators.passes import batches_of
from cvxnn.operators.pooled_products import PooledProducts
from cvxnn.operators.queries import Queries
from cvxnn.operators.token_sizes import TokenSizes
from cvxnn.operators.tokens import read_tokens
from cvxnn.patterns import PatchBits

__all__ = ["AttentionOperator"]

#: Bytes of the features of one batch of sequences.
_FEATURE_BYTES = 2**28
#: Bytes of sums over keys that are there at once.
_SUM_BYTES = 2**27
#: Bytes of blocks that are formed at once; where one block is larger, bytes of the rows of it that are.
_BLOCK_BYTES = 2**25
_SLAB_BYTES = 2**24


class AttentionOperator(Operator):
    """A token x_t sees sum_k sum_t' M_tt' D_k[t, t'] (x_t^T U_k x_t') V_k^T x_t', Z_k = sum of u_k v_k^T.

    Entry k d + a of u is U[a, k] and entry l c + b of v is V[l, b]; blocks are d^2 x (d c). A row of the predictions
    is a token, or a weighted sum over the tokens of a sequence (:class:`Queries`). M says which pairs count; the
    linear network has P = 1 and D = 1. For ReLU the map is that of gated ReLU.

    Parameters
    ----------
    tokens : torch.Tensor of shape (n, s, d)
        Zeros where there is padding.
    queries : Queries
        The rows of the predictions.
    n_outputs : int
        Number of outputs c.
    allowed : PatchBits or None
        M, (n, m s, 1); None where all valid tokens see one another. Wanted with gates.
    gates : numpy.ndarray of shape (P, d, d) or None
        Matrices H_k; None for the linear network.
    bits : PatchBits or None
        M o D_k with D_k[t, t'] = 1{x_t^T H_k x_t' >= 0}, (n, m s, P); computed in float64 where not given.
    activation : {"gated_relu", "relu"}
        Of a network with gates; without gates it is "linear".
    keep : bool
        Whether features may stay in memory, for further passes.

    Notes
    -----
    With G_k(t) = X^T diag(M D_k)[t, :] X (d x d) the features of a token are the products x_t[a] G_k(t)[k, l], and
    those of all P d^3 are not formed: A and A* are two matrix products. Where all valid tokens see one another in a
    linear network, G is one matrix per sequence, and the mean over tokens one of its inputs (math section 2). Where
    rows are sums over tokens that differ in what they see, features of sequences are kept (:class:`PooledProducts`).
    """

    architecture = "attention"

    def __init__(
        self,
        tokens: torch.Tensor,
        queries: Queries,
        n_outputs: int,
        allowed: PatchBits | None = None,
        gates: np.ndarray | None = None,
        bits: PatchBits | None = None,
        activation: str = "gated_relu",
        keep: bool = True,
    ) -> None:
        self.tokens = tokens
        self.dtype, self.device = tokens.dtype, tokens.device
        self.rows = queries
        self.n_samples, self.n_outputs = queries.n_rows, n_outputs
        self.allowed = allowed
        self.gates = gates
        self.activation = "linear" if gates is None else activation
        self.dim = d = tokens.shape[2]
        self.width = d
        self.block_shape = (1 if gates is None else len(gates), d * d, d * n_outputs)
        if gates is not None and bits is None:
            bits = pair_bits(tokens, queries, gates, allowed)
        #: M o D_k; for a linear network M.
        self.bits = allowed if gates is None else bits
        self._keep = keep

    @cached_property
    def inner(self) -> Queries:
        """How the rows are made of the queries of :attr:`queries`."""
        return Queries((len(self.tokens), 1)) if self._pooled_first else self.rows

    @cached_property
    def queries(self) -> torch.Tensor:
        """The queries (n, m, d): tokens, or their means where only these count."""
        if not self._pooled_first:
            return self.rows.of(self.tokens)
        assert self.rows.weights is not None
        return self.rows.weights.to(self.dtype).unsqueeze(1) @ self.rows.of(self.tokens)

    @property
    def _pooled_first(self) -> bool:
        return self.bits is None and self.rows.pooled

    @property
    def patterns(self) -> torch.Tensor:
        """Patterns M o D_k (n, m, s, P), bool; formed in full. Without M they are True for padding too."""
        n, m = self.rows.shape
        s = self.tokens.shape[1]
        if self.bits is None:
            return torch.ones(n, m, s, 1, dtype=torch.bool, device=self.device)
        return self.bits.rows(slice(None)).view(n, m, s, self.n_gates)

    @property
    def gate_vectors(self) -> np.ndarray | None:
        return None if self.gates is None else gate_vectors(self.gates)

    @cached_property
    def _double(self) -> AttentionOperator:
        return self._with(self.tokens.double())

    def double(self) -> AttentionOperator:
        return self if self.dtype == torch.float64 else self._double

    def _with(self, tokens: torch.Tensor) -> AttentionOperator:
        return AttentionOperator(
            tokens, self.rows, self.n_outputs, self.allowed, self.gates, self.bits, self.activation
        )

    def flatten(self, Z: torch.Tensor) -> torch.Tensor:
        n_gates, p, _ = self.block_shape
        blocks = Z.reshape(n_gates, p, self.width, self.n_outputs)
        return blocks.permute(2, 0, 1, 3).reshape(self.n_features, self.n_outputs)

    def unflatten(self, weights: torch.Tensor) -> torch.Tensor:
        n_gates, p, _ = self.block_shape
        return weights.reshape(self.width, n_gates, p, self.n_outputs).permute(1, 2, 0, 3).reshape(self.block_shape)

    def split_right(self, v: torch.Tensor) -> torch.Tensor:
        return v.reshape(-1, self.n_outputs)

    def merge_right(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.reshape(-1, self.block_shape[2])

    @cached_property
    def key_products(self) -> KeyProducts:
        """Products G of keys."""
        keep = self._keep and not (self._pooled is not None and self._pooled.are_kept)
        return KeyProducts(self.tokens, self.inner.shape[1], self.bits, keep)

    @cached_property
    def _pooled(self) -> PooledProducts | None:
        """Features of sequences, where rows are sums over tokens and these differ in what they see."""
        if self.bits is None or self.rows.weights is None:
            return None
        queries = self.rows.weights.to(self.dtype).unsqueeze(2) * self.queries
        pooled = PooledProducts(self.tokens, queries, self.bits, self._keep)
        return pooled if pooled.fit else None

    @cached_property
    def _heads(self) -> Heads:
        return Heads(self.tokens, self.queries, self.inner, self.bits, self.key_products)

    def _sequence_batches(self, n_gates: int, heads: int, within: slice | None = None) -> list[slice]:
        """Slices of sequences that are taken together, with what belongs to their queries."""
        more = self.inner.shape[1] * self.dim * self.n_outputs
        return self.key_products.batches(n_gates, heads, more, within)

    # -- the map and its adjoint --------------------------------------------------------------------------------

    def _slabs(self, gates: slice) -> Iterator[tuple[slice, slice]]:
        """Gates and rows k of them whose parts of blocks are formed at once."""
        start, stop, _ = gates.indices(self.n_gates)
        _, p, q = self.block_shape
        for batch in row_batches(stop - start, 8 * p * q, _BLOCK_BYTES):
            some = slice(start + batch.start, start + batch.stop)
            heads = self.dim if 8 * p * q <= _BLOCK_BYTES else max(1, _SLAB_BYTES // (8 * self.dim * q))
            for first in range(0, self.dim, heads):
                yield some, slice(first, min(first + heads, self.dim))

    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        n_gates, d, c = self.n_gates, self.dim, self.n_outputs
        if not bool(Z.any()):
            return Z.new_zeros(self.n_samples, c)
        if self._pooled is not None:
            return self._pooled.apply(Z, c)
        blocks = Z.reshape(n_gates, d, d, d, c)
        each = self.key_products.each
        parts = []
        large = row_batches(len(self.tokens), each * d * c * self.tokens.element_size(), _SUM_BYTES)
        for sequences in batches_of(large, "predictions"):
            sums = Z.new_zeros((sequences.stop - sequences.start) * each, d * c)
            for gates, heads in self._slabs(slice(None)):
                weights = blocks[gates, heads].transpose(2, 3).reshape(-1, d * c)
                for part in self._sequence_batches(gates.stop - gates.start, heads.stop - heads.start, sequences):
                    place = slice((part.start - sequences.start) * each, (part.stop - sequences.start) * each)
                    sums[place].addmm_(self.key_products(part, gates, heads).flatten(1), weights)
            queries = self.queries[sequences]
            if each == 1:
                values = queries @ sums.view(-1, d, c)
            else:
                values = (queries.unsqueeze(2) @ sums.view(*queries.shape, c)).squeeze(2)
            places = self.inner.sequences(self.inner.rows_of(sequences))[1]
            parts.append(self.inner.collect(values, sequences, places))
        return torch.cat(parts)

    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        return self.adjoint_blocks(L, slice(None))

    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        if self._pooled is not None:
            return self._pooled.adjoint(L, gates)
        start, stop, _ = gates.indices(self.n_gates)
        d = self.dim
        blocks = L.new_empty(stop - start, d, d, d, self.n_outputs)
        for some, heads in self._slabs(gates):
            blocks[some.start - start : some.stop - start, heads] = self._adjoint_slab(L, some, heads)
        return blocks.view(stop - start, *self.block_shape[1:])

    def _adjoint_slab(self, L: torch.Tensor, gates: slice, heads: slice) -> torch.Tensor:
        """Rows (k, a), k in heads, of some blocks of A*(L), as (gates, k, a, l, b)."""
        d, c = self.dim, self.n_outputs
        n_gates, n_heads = gates.stop - gates.start, heads.stop - heads.start
        total = L.new_zeros(n_gates * n_heads * d, d * c)
        for sequences in batches_of(self._sequence_batches(n_gates, n_heads), "gradient"):
            rows = self.inner.rows_of(sequences)
            spread = self.inner.spread(L[rows], sequences, self.inner.sequences(rows)[1])
            queries = self.queries[sequences]
            if self.bits is None:
                products = queries.mT @ spread
            else:
                products = (queries.unsqueeze(3) * spread.unsqueeze(2)).flatten(0, 1)
            total.addmm_(self.key_products(sequences, gates, heads).flatten(1).T, products.flatten(1))
        return total.view(n_gates, n_heads, d, d, c).transpose(2, 3)

    @property
    def streams_blocks(self) -> bool:
        _, p, q = self.block_shape
        return 8 * p * q > _BLOCK_BYTES and p >= q

    def adjoint_parts(self, L: torch.Tensor, gate: int) -> Iterator[torch.Tensor]:
        for some, heads in self._slabs(slice(gate, gate + 1)):
            yield self._adjoint_slab(L, some, heads).reshape(-1, self.block_shape[2])

    def gate_batches(self) -> list[slice]:
        n_gates, p, q = self.block_shape
        return row_batches(n_gates, 8 * p * q, _BLOCK_BYTES)

    # -- columns ------------------------------------------------------------------------------------------------

    def column_batches(self, n_columns: int) -> list[slice]:
        return self._heads.batches(n_columns)

    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._heads.hidden(gate, u, rows)

    def hidden_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._heads.adjoint(gate, M, rows)

    def unit_energies(self, gate: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.bits is not None:
            return super().unit_energies(gate, weights)
        return self._heads.unit_energies(weights)

    def network_outputs(self, columns: Columns) -> torch.Tensor:
        if self.activation != "relu":
            return self.apply_columns(columns)
        used = columns.without_zeros()
        weights = self.split_right(used.v)
        batches = self.column_batches(len(used))
        return torch.cat([self._heads.relu(used.u, rows, self._sizes.allowed_pairs) @ weights for rows in batches])

    # -- parts --------------------------------------------------------------------------------------------------

    def subset(self, rows: torch.Tensor) -> AttentionOperator:
        queries, sequences, query = self.rows.subset(rows)

        def part(bits: PatchBits | None) -> PatchBits | None:
            if bits is None or query is None:
                return None if bits is None else bits.subset(sequences)
            n, m = self.rows.shape
            return PatchBits(bits.data.view(n, m, self.tokens.shape[1], -1)[sequences, query], bits.n_gates)

        return AttentionOperator(
            self.tokens[sequences],
            queries,
            self.n_outputs,
            part(self.allowed),
            self.gates,
            None if self.gates is None else part(self.bits),
            self.activation,
        )

    def select(self, gates: torch.Tensor) -> AttentionOperator:
        if self.gates is None or self.bits is None:
            return self
        return AttentionOperator(
            self.tokens,
            self.rows,
            self.n_outputs,
            self.allowed,
            np.ascontiguousarray(self.gates[gates.cpu().numpy()]),
            self.bits.select(gates),
            self.activation,
        )

    # -- bounds -------------------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> TokenSizes:
        return TokenSizes(self.tokens, self.rows, self.allowed)

    def adjoint_size(self, L: torch.Tensor) -> float:
        return self._sizes.of_adjoint(L)

    def adjoint_rounding(self, L: torch.Tensor) -> float:
        return self._sizes.adjoint_rounding(L)

    def apply_rounding(self, Z: torch.Tensor) -> float:
        return self._sizes.apply_rounding(self.n_features) * float(torch.linalg.vector_norm(Z, dim=(1, 2)).sum())

    @cached_property
    def row_squares(self) -> torch.Tensor:
        return self._sizes.row_squares.to(self.dtype)

    @cached_property
    def prediction_norm(self) -> float:
        return float(self._sizes.features.max())

    @property
    def cone_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        sequence, query, key = self._sizes.pairs()
        rows = pair_rows(self.rows.of(self.tokens)[sequence, query], self.tokens[sequence, key])
        return rows, self.patterns[sequence, query, key]

    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        return self._sizes.row_sizes(nu)

    # -- kernel and features ------------------------------------------------------------------------------------

    def kernel(self) -> torch.Tensor:
        if self._pooled is not None and self._pooled.are_kept:
            return self._pooled.kernel()
        return attention_kernel(self)

    def features(self, rows: slice) -> torch.Tensor:
        """The features (rows, d P d d) of one output, index (l, gate, k, a)."""
        sequences, places = self.inner.sequences(rows)
        products = self.key_products(sequences, slice(0, self.n_gates), slice(0, self.dim)).permute(0, 3, 1, 2)
        queries = self.queries[sequences]
        n, m = queries.shape[:2]
        if self.bits is None:
            values = products.reshape(n, 1, -1, 1) * queries.unsqueeze(2)
        else:
            products = products.reshape(n, m, -1)
            if self.inner.weights is not None:
                weights = self.inner.weights[sequences].to(self.dtype).unsqueeze(2)
                return (products.mT @ (weights * queries)).flatten(1)
            values = products.unsqueeze(3) * queries.unsqueeze(2)
        return self.inner.collect(values.flatten(2), sequences, places)

    def feature_batches(self) -> list[slice]:
        m = self.inner.shape[1]
        batches = row_batches(len(self.tokens), 2 * m * self.n_features * self.tokens.element_size(), _FEATURE_BYTES)
        return [self.inner.rows_of(sequences) for sequences in batches]

    def predict(self, Z: torch.Tensor, X: np.ndarray, mask: Any = None) -> torch.Tensor:
        """Predictions of blocks Z for new tokens X (n, s, d); with a mask of pairs in training one is wanted here."""
        array, found = read_tokens(X, mask, "X")
        if array.shape[2] != self.dim:
            raise InvalidInputError(f"X has tokens of {array.shape[2]} features; {self.dim} are wanted")
        found = found.to(self.device)
        queries = Queries.of_mask(found, "mean" if self.rows.pooled else "tokens")
        tokens = torch.from_numpy(array).to(self.device, self.dtype)
        allowed = None
        if self.gates is not None or found.pairs is not None:
            allowed = allowed_pairs(found)
        new = AttentionOperator(tokens, queries, self.n_outputs, allowed, self.gates, None, self.activation, keep=False)
        return new.apply(Z)

    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        parts = (self.rows.weights, self.rows.places, None if self.allowed is None else self.allowed.data)
        return (self.tokens, *(part for part in parts if part is not None))

    def describe(self) -> dict[str, Any]:
        output = "mean" if self.rows.pooled else "tokens"
        return {"architecture": self.architecture, "activation": self.activation, "output": output}
