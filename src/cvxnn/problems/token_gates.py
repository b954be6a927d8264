"""The gates of attention: matrices, given, drawn or enumerated on the pairs of tokens of all sequences."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from cvxnn.errors import CertificationWarning, InvalidInputError, UnsupportedError
from cvxnn.gates import choose_gates, draw_gates
from cvxnn.operators.pairs import pair_bits, pair_rows
from cvxnn.operators.queries import Queries
from cvxnn.patterns import PatchBits
from cvxnn.problems.patch_gates import PatchGates, distinct_gates
from cvxnn.validation import as_numbers

__all__ = ["choose_token_gates"]

#: Up to so many pairs, and numbers in their rows, are looked at together; of more, so many are drawn.
_PAIRS = 2**17
_NUMBERS = 2**24
#: Sequences whose patterns are compared at a time.
_TOGETHER = 256
#: Splits a float64 number in two halves of 26 bits (Dekker).
_SPLITTER = 2.0**27 + 1


def choose_token_gates(
    tokens: torch.Tensor,
    queries: Queries,
    allowed: PatchBits,
    gates: Any,
    n_gates: int,
    gate_sampling: str,
    max_cells: int | None,
    random_state: Any,
    activation: str,
) -> PatchGates:
    """Matrices H_k (P, d, d), their patterns M o D_k on all pairs, and the scope that they give.

    Parameters
    ----------
    tokens : torch.Tensor of shape (n, s, d)
    queries : Queries
    allowed : PatchBits
        M, the pairs that count, (n, s s, 1).

    Notes
    -----
    A gate is a vector over the rows of pairs of tokens (``pair_rows``). Where there are more than 131,072 pairs,
    or 16,777,216 numbers in their rows, some pairs are drawn at random for what sampling takes from the data.
    """
    n, s, d = tokens.shape
    used = queries.used()
    counts = allowed.rows(slice(None)).view(n, s, s)
    pairs = (counts if used is None else counts & used.unsqueeze(2)).nonzero()
    data = tokens.double()
    if gates is not None and not isinstance(gates, str):
        given = _given(gates, d)
        return PatchGates(given, pair_bits(tokens, queries, given, allowed), "given_gates")
    few = len(pairs) <= _PAIRS and len(pairs) * d * d <= _NUMBERS
    if not few and isinstance(gates, str):
        raise UnsupportedError(
            f"gates is {gates!r} and there are {len(pairs)} pairs of tokens; all patterns are enumerated for at most "
            f"{_PAIRS} pairs, and {_NUMBERS} numbers in their rows"
        )
    if not few:
        return _drawn(tokens, queries, allowed, pairs, n_gates, gate_sampling, random_state)
    sequence, query, key = pairs.T
    rows = pair_rows(data[sequence, query], data[sequence, key])
    chosen = choose_gates(
        rows.cpu().numpy(), gates, n_gates, False, gate_sampling, None, max_cells, random_state, activation
    )
    bits = torch.zeros(n, s, s, chosen.patterns.shape[1], dtype=torch.bool, device=tokens.device)
    bits[sequence, query, key] = torch.from_numpy(chosen.patterns).to(tokens.device)
    scope = chosen.scope
    if scope == "all_gates" and d > 1 and not _exact(data[sequence, query], data[sequence, key]):
        scope = "given_gates"
        warnings.warn(
            "products of tokens are rounded, so that it is not proven that all patterns were enumerated; the scope is "
            "'given_gates' (dtype='float32' has exact products)",
            CertificationWarning,
            stacklevel=3,
        )
    return PatchGates(_matrices(chosen.gates, d), PatchBits(bits.flatten(1, 2), bits.shape[3]), scope, chosen.coverage)


def _given(gates: Any, d: int) -> np.ndarray:
    array = as_numbers(gates, "gates")
    if array.ndim != 3 or len(array) == 0 or array.shape[1:] != (d, d):
        raise InvalidInputError(f"gates has shape {array.shape}; matrices (P, {d}, {d}) are wanted")
    if not np.isfinite(array).all():
        raise InvalidInputError("gates contains NaN or infinity; finite numbers are wanted")
    return np.array(array)


def _matrices(vectors: np.ndarray, d: int) -> np.ndarray:
    """Vectors (d d, P) as matrices (P, d, d), entry k * d + a as H[a, k]."""
    return np.ascontiguousarray(vectors.T.reshape(-1, d, d).transpose(0, 2, 1))


def _exact(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether all products of entries are numbers of float64, so that rows of pairs are exact (Dekker 1971)."""
    a, b = keys.unsqueeze(-1), queries.unsqueeze(-2)
    product = a * b
    halves = []
    for x in (a, b):
        high = _SPLITTER * x
        high = high - (high - x)
        halves.append((high, x - high))
    (a1, a2), (b1, b2) = halves
    error = a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)
    # Products that underflow in part have lost digits that these formulas do not see.
    small = (product.abs() < 2.0**-900) & (a != 0) & (b != 0)
    return bool((error == 0).all()) and not bool(small.any())


def _drawn(
    tokens: torch.Tensor,
    queries: Queries,
    allowed: PatchBits,
    pairs: torch.Tensor,
    n_gates: int,
    gate_sampling: str,
    random_state: Any,
) -> PatchGates:
    """Gates drawn from a sample of the pairs; equal patterns on all pairs are merged."""
    n, d = len(tokens), tokens.shape[2]
    seed = random_state if isinstance(random_state, (int, np.integer)) else None
    rng = np.random.default_rng(check_random_state(seed).randint(2**31))
    wanted = min(len(pairs), _PAIRS, max(_NUMBERS // (d * d), 4))
    chosen = torch.from_numpy(np.sort(rng.choice(len(pairs), wanted, replace=False))).to(pairs.device)
    sequence, query, key = pairs[chosen].T
    rows = pair_rows(tokens[sequence, query].double(), tokens[sequence, key].double())
    found, scope = draw_gates(rows.cpu().numpy(), None, n_gates, False, gate_sampling, None, random_state)
    matrices = _matrices(found, d)
    bits = pair_bits(tokens, queries, matrices, allowed)
    nonzero = tokens.any(2)

    def informative(rows: slice) -> torch.Tensor:
        both = nonzero[rows].unsqueeze(2) & nonzero[rows].unsqueeze(1)
        return both.flatten(1) & allowed.rows(rows)[:, :, 0]

    kept = distinct_gates(bits, informative, [slice(i, min(i + _TOGETHER, n)) for i in range(0, n, _TOGETHER)])
    if len(kept) == 0:
        raise InvalidInputError(f"none of the {len(matrices)} gates is active on any pair of tokens; draw more gates")
    if len(kept) == len(matrices):
        return PatchGates(matrices, bits, scope)
    part = bits.select(torch.from_numpy(kept).to(tokens.device))
    return PatchGates(np.ascontiguousarray(matrices[kept]), part, scope)
