"""Pairs of tokens: which of them count, their rows in the space of the columns, and the patterns of gates on them."""

from __future__ import annotations

import numpy as np
import torch

from cvxnn.operators.base import row_batches
from cvxnn.operators.queries import Queries
from cvxnn.operators.tokens import TokenMask
from cvxnn.patterns import PatchBits, gather_bits

__all__ = ["allowed_pairs", "gate_vectors", "pair_bits", "pair_rows"]

_BATCH_BYTES = 2**26


def gate_vectors(gates: np.ndarray) -> np.ndarray:
    """Matrices H_k (P, d, d) as vectors (d d, P), entry k * d + a being H[a, k]."""
    return np.ascontiguousarray(gates.transpose(2, 1, 0).reshape(-1, len(gates)))


def pair_rows(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Rows r(t, t') with x_t^T U x_t' = r . vec(U), entry k * d + a of vec(U) being U[a, k].

    Parameters
    ----------
    queries, keys : torch.Tensor of shape (..., d)

    Returns
    -------
    torch.Tensor of shape (..., d * d)
        key[k] * query[a] at k * d + a.
    """
    return (keys.unsqueeze(-1) * queries.unsqueeze(-2)).flatten(-2)


def allowed_pairs(mask: TokenMask) -> PatchBits:
    """Pairs of valid tokens that see one another, (n, s s, 1)."""
    return PatchBits(mask.allowed(slice(None)).flatten(1).unsqueeze(2), 1)


def pair_bits(tokens: torch.Tensor, queries: Queries, gates: np.ndarray, allowed: PatchBits | None) -> PatchBits:
    """Patterns M o 1{x_t^T H_k x_t' >= 0} of the pairs of queries and tokens, (n, m s, P), computed in float64.

    Parameters
    ----------
    tokens : torch.Tensor of shape (n, s, d)
    queries : Queries
    gates : numpy.ndarray of shape (P, d, d)
    allowed : PatchBits or None
        M, (n, m s, 1).
    """
    n, s, d = tokens.shape
    m, n_gates = queries.shape[1], len(gates)
    left = torch.from_numpy(gates).to(tokens.device).permute(1, 0, 2).reshape(d, n_gates * d)
    batch = row_batches(n, 8 * m * n_gates * (d + 2 * s), _BATCH_BYTES)[0].stop
    found = queries.of(tokens)

    def part(rows: slice) -> torch.Tensor:
        keys = tokens[rows].double()
        products = (found[rows].double() @ left).view(len(keys), m * n_gates, d) @ keys.mT
        bits = products.view(len(keys), m, n_gates, s).mT.reshape(len(keys), m * s, n_gates) >= 0
        return bits if allowed is None else bits & allowed.rows(rows)

    return gather_bits(n, None, n_gates, tokens.device, part, batch)
