"""The kernel A A* of attention, tile by tile (math section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cvxnn.operators.base import row_batches

if TYPE_CHECKING:
    from cvxnn.operators.attention import AttentionOperator

__all__ = ["attention_kernel"]

#: Bytes of a tile over all queries of its sequences.
_TILE_BYTES = 2**27


def attention_kernel(op: AttentionOperator) -> torch.Tensor:
    """The matrix (rows, rows) of A A* for one output.

    Entries of two tokens are (x . y) sum_k <G_k(x), G_k(y)>, and <G_k(x), G_k(y)> is the sum over both of their keys
    of the squares of the inner products of these, where both gates are active: the cheaper of the two is taken.
    """
    n = op.n_samples
    K = torch.empty(n, n, dtype=op.dtype, device=op.device)
    tiles = _tiles(op)
    for i, first in enumerate(tiles):
        rows = op.inner.rows_of(first)
        for second in tiles[: i + 1]:
            columns = op.inner.rows_of(second)
            tile = _tile(op, first, second)
            K[rows, columns] = tile
            K[columns, rows] = tile.T
    return K


def _through_keys(op: AttentionOperator) -> bool:
    """Whether inner products of keys are cheaper than products of G."""
    s, d, m = op.tokens.shape[1], op.dim, op.inner.shape[1]
    if op.bits is None:
        return s * s < d * d
    return s * (s + m) < m * d * d


def _tiles(op: AttentionOperator) -> list[slice]:
    """Sequences whose pairs are looked at together."""
    s, m = op.tokens.shape[1], op.inner.shape[1]
    side = max(m, s) if _through_keys(op) else m
    size = max(1, int((_TILE_BYTES / 8) ** 0.5) // side)
    return row_batches(len(op.tokens), 1, size)


def _tile(op: AttentionOperator, first: slice, second: slice) -> torch.Tensor:
    """Rows of some sequences against those of others."""
    sums = _from_keys(op, first, second) if _through_keys(op) else _from_products(op, first, second)
    left, right = op.queries[first], op.queries[second]
    n, m = left.shape[:2]
    products = (left.flatten(0, 1) @ right.flatten(0, 1).T).view(n, m, len(right), m)
    values = products * sums
    values = op.inner.collect(values.flatten(2), first, _places(op, first))
    values = values.view(-1, len(right), m).permute(1, 2, 0)
    return op.inner.collect(values, second, _places(op, second)).T


def _places(op: AttentionOperator, sequences: slice) -> torch.Tensor | None:
    return op.inner.sequences(op.inner.rows_of(sequences))[1]


def _from_products(op: AttentionOperator, first: slice, second: slice) -> torch.Tensor:
    """sum_k <G_k, G_k>, (n, m, n', m'), or (n, 1, n', 1) where G is that of a sequence."""
    total: torch.Tensor | None = None
    d, s = op.dim, op.tokens.shape[1]
    each = 1 if op.bits is None else op.inner.shape[1]
    n, n_other = first.stop - first.start, second.stop - second.start
    size = 8 * (max(n, n_other) * (each * d * d + each * s) + (0 if op.bits is None else s * d * d * max(n, n_other)))
    for gates in row_batches(op.n_gates, size, 2 * _TILE_BYTES):
        for heads in row_batches(d, size // d, 2 * _TILE_BYTES):
            left, right = (op.key_products(part, gates, heads).flatten(1) for part in (first, second))
            total = left @ right.T if total is None else total.addmm_(left, right.T)
    assert total is not None
    return total.view(n, each, n_other, each)


def _from_keys(op: AttentionOperator, first: slice, second: slice) -> torch.Tensor:
    """The same from the squares of the inner products of keys."""
    left, right = op.tokens[first], op.tokens[second]
    n, s = left.shape[:2]
    n_other, m = len(right), op.inner.shape[1]
    squares = (left.flatten(0, 1) @ right.flatten(0, 1).T).square_().view(n, s, n_other, s)
    if op.bits is None:
        return squares.sum((1, 3)).view(n, 1, n_other, 1)
    total = squares.new_zeros(n_other, n * m, m)
    active = [op.bits.rows(part).view(-1, m, s, op.n_gates) for part in (first, second)]
    for k in range(op.n_gates):
        some, other = (bits[:, :, :, k].to(op.dtype) for bits in active)
        seen = (some @ squares.view(n, s, n_other * s)).view(n * m, n_other, s).transpose(0, 1)
        total.baddbmm_(seen, other.mT)
    return total.view(n_other, n, m, m).permute(1, 2, 0, 3)
