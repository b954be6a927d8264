"""The gates of a problem: given, drawn or enumerated, and the scope that they give."""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxnn.errors import InvalidInputError
from cvxnn.patterns import activation_patterns, deduplicate_gates, enumerate_gates, sample_gates
from cvxnn.validation import as_matrix, check_choice, check_integer, check_positive

__all__ = ["GATE_SAMPLING", "choose_gates", "draw_gates"]

GATE_SAMPLING = ("gaussian", "differences", "whitened")


def choose_gates(
    X: np.ndarray,
    gates: Any,
    n_gates: int,
    hidden_bias: bool,
    gate_sampling: str,
    gate_quantile: float | None,
    max_cells: int | None,
    random_state: Any,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Gate vectors, their patterns on X, and the scope that they give."""
    found, scope = draw_gates(X, gates, n_gates, hidden_bias, gate_sampling, gate_quantile, max_cells, random_state)
    bits = activation_patterns(X, found)
    if scope == "given_gates":
        return found, bits, scope
    # Rows of zeros are active for every gate, and tell none apart.
    informative = X.any(axis=1)
    kept = deduplicate_gates(bits[informative]) if informative.any() else np.arange(1)
    if len(kept) == 0:
        raise InvalidInputError(f"none of the {found.shape[1]} gates is active on any sample; draw more gates")
    return np.ascontiguousarray(found[:, kept]), np.ascontiguousarray(bits[:, kept]), scope


def draw_gates(
    X: np.ndarray,
    gates: Any,
    n_gates: int,
    hidden_bias: bool,
    gate_sampling: str,
    gate_quantile: float | None,
    max_cells: int | None,
    random_state: Any,
) -> tuple[np.ndarray, str]:
    """Gate vectors and the scope that they give; equal patterns are not merged yet."""
    if isinstance(gates, str):
        check_choice(gates, "gates", ("enumerate",))
        found = enumerate_gates(X) if max_cells is None else enumerate_gates(X, max_cells=max_cells)
        return found, "all_gates"
    if gates is not None:
        found = as_matrix(gates, "gates").copy()
        if len(found) != X.shape[1]:
            extra = " (the last for the hidden bias)" if hidden_bias else ""
            raise InvalidInputError(f"gates has {len(found)} rows; {X.shape[1]}{extra}, one per feature, are wanted")
        return found, "given_gates"
    check_integer(n_gates, "n_gates")
    check_choice(gate_sampling, "gate_sampling", GATE_SAMPLING)
    if gate_quantile is not None:
        if check_positive(gate_quantile, "gate_quantile") >= 1:
            raise InvalidInputError(f"gate_quantile is {gate_quantile!r}; a number between 0 and 1 is wanted")
        if not hidden_bias:
            raise InvalidInputError(f"gate_quantile is {gate_quantile!r}; such a threshold needs hidden_bias=True")
    found = sample_gates(
        X,
        n_gates,
        method=gate_sampling,
        quantile=gate_quantile,
        bias_column=hidden_bias,
        random_state=random_state,
    )
    return found, "sampled_gates"
