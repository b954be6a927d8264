"""The gates of a problem: given, drawn or enumerated, and the scope that they give."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cvxnn.errors import CertificationWarning, InvalidInputError
from cvxnn.patterns import Coverage, activation_patterns, deduplicate_gates, enumerate_cells, sample_gates
from cvxnn.validation import as_matrix, check_choice, check_integer, check_positive

__all__ = ["GATE_SAMPLING", "ChosenGates", "choose_gates", "draw_gates"]

GATE_SAMPLING = ("gaussian", "differences", "whitened", "kmeans")


@dataclass(frozen=True)
class ChosenGates:
    """Gates with what is known of them.

    Attributes
    ----------
    gates : array (d, P)
    patterns : bool array (n, P)
    scope : str
    coverage : Coverage or None
        For scope "relu_network": what the neurons of patterns that are not listed can add to dual norms, where float64
        does not tell that there are none.
    """

    gates: np.ndarray
    patterns: np.ndarray
    scope: str
    coverage: Coverage | None = None


def choose_gates(
    X: np.ndarray,
    gates: Any,
    n_gates: int,
    hidden_bias: bool,
    gate_sampling: str,
    gate_quantile: float | Sequence[float] | None,
    max_cells: int | None,
    random_state: Any,
    activation: str = "gated_relu",
) -> ChosenGates:
    """Gate vectors, their patterns on X, and the scope that they give."""
    coverage = None
    if isinstance(gates, str):
        found, scope, coverage = _enumerated(X, gates, max_cells, activation)
    else:
        found, scope = draw_gates(X, gates, n_gates, hidden_bias, gate_sampling, gate_quantile, random_state)
    bits = activation_patterns(X, found)
    if gates is not None and not isinstance(gates, str):
        return ChosenGates(found, bits, scope)
    # Rows of zeros are active for every gate, and tell none apart.
    informative = X.any(axis=1)
    kept = deduplicate_gates(bits[informative]) if informative.any() else np.arange(1)
    if len(kept) == 0:
        raise InvalidInputError(f"none of the {found.shape[1]} gates is active on any sample; draw more gates")
    return ChosenGates(np.ascontiguousarray(found[:, kept]), np.ascontiguousarray(bits[:, kept]), scope, coverage)


def _enumerated(
    X: np.ndarray, gates: str, max_cells: int | None, activation: str
) -> tuple[np.ndarray, str, Coverage | None]:
    """A gate for every cell; the scope is that of all cells only where this is proven."""
    check_choice(gates, "gates", ("enumerate",))
    cells = enumerate_cells(X) if max_cells is None else enumerate_cells(X, max_cells=max_cells)
    if activation == "relu" and (cells.exact or cells.coverage is not None):
        # By continuity the patterns of the boundaries of cells add nothing: these are all neurons.
        coverage = None if cells.coverage is None else cells.coverage.among(np.flatnonzero(X.any(axis=1)), len(X))
        return cells.gates, "relu_network", coverage
    if cells.exact:
        return cells.gates, "all_gates", None
    warnings.warn(
        "the samples are so close to a degenerate position, or to a subspace, that it is not proven that all patterns "
        "were enumerated; the scope is 'given_gates'",
        CertificationWarning,
        stacklevel=4,
    )
    return cells.gates, "given_gates", None


def draw_gates(
    X: np.ndarray,
    gates: Any,
    n_gates: int,
    hidden_bias: bool,
    gate_sampling: str,
    gate_quantile: float | Sequence[float] | None,
    random_state: Any,
) -> tuple[np.ndarray, str]:
    """Gate vectors and the scope that they give; equal patterns are not merged yet."""
    if gates is not None:
        found = as_matrix(gates, "gates").copy()
        if len(found) != X.shape[1]:
            extra = " (the last for the hidden bias)" if hidden_bias else ""
            raise InvalidInputError(f"gates has {len(found)} rows; {X.shape[1]}{extra}, one per feature, are wanted")
        return found, "given_gates"
    check_integer(n_gates, "n_gates")
    check_choice(gate_sampling, "gate_sampling", GATE_SAMPLING)
    if gate_quantile is not None:
        several = gate_quantile if isinstance(gate_quantile, (list, tuple, np.ndarray)) else [gate_quantile]
        if len(several) == 0 or max(check_positive(q, "gate_quantile") for q in several) >= 1:
            raise InvalidInputError(f"gate_quantile is {gate_quantile!r}; numbers between 0 and 1 are wanted")
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
