"""Activation patterns 1{X g >= 0} of gates, and which gates differ in them."""

import numpy as np
from numpy.typing import NDArray

from cvxnn.errors import InvalidInputError
from cvxnn.validation import all_finite

_BLOCK_COLUMNS = 4096
_BLOCK_ENTRIES = 1 << 22


def check_matrix(name: str, array: object, *, finite: bool = True) -> NDArray[np.float64]:
    """Return ``array`` as a two-dimensional float64 matrix, or say what is wrong with it.

    Raises
    ------
    InvalidInputError
        Not two-dimensional, empty, not numeric, or (with ``finite``) with NaN or infinite entries.
    """
    try:
        matrix = np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name} must be a matrix of real numbers: {error}.") from error
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InvalidInputError(f"{name} has shape {matrix.shape}; a matrix with rows and columns is wanted.")
    if finite and not all_finite(matrix):
        raise InvalidInputError(f"{name} has NaN or infinite entries; finite numbers are wanted.")
    return matrix


def activation_patterns(X: NDArray[np.floating], gates: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Patterns ``X @ gates >= 0``, computed in float64 and in blocks.

    Parameters
    ----------
    X : array (n, d)
        Samples (or patches) in rows.
    gates : array (d, P)
        Gate vectors in columns.

    Returns
    -------
    patterns : bool array (n, P)
        The diagonals of D_k = diag(1{X g_k >= 0}) in columns. A zero row of ``X`` is active for every gate.

    Raises
    ------
    InvalidInputError
        ``X`` or ``gates`` is not a matrix, ``gates`` has entries that are not finite, or their sizes differ.
    """
    X = np.asarray(X)
    gates = check_matrix("gates", gates)
    if X.ndim != 2 or X.shape[1] != gates.shape[0]:
        raise InvalidInputError(
            f"X has shape {X.shape} and gates has shape {gates.shape}; (n, d) and (d, P) are wanted."
        )
    n, n_gates = X.shape[0], gates.shape[1]
    patterns = np.empty((n, n_gates), dtype=np.bool_)
    rows = max(1, _BLOCK_ENTRIES // min(n_gates, _BLOCK_COLUMNS))
    for i in range(0, n, rows):
        block = np.asarray(X[i : i + rows], dtype=np.float64)
        for k in range(0, n_gates, _BLOCK_COLUMNS):
            columns = slice(k, k + _BLOCK_COLUMNS)
            np.greater_equal(block @ gates[:, columns], 0.0, out=patterns[i : i + rows, columns])
    return patterns


def pack_columns(patterns: NDArray[np.bool_]) -> list[bytes]:
    """Each column of a bool array (n, P) as bytes: equal bytes exactly for equal columns."""
    packed = np.ascontiguousarray(np.packbits(patterns, axis=0).T)
    return packed.view(f"V{packed.shape[1]}").ravel().tolist()


def deduplicate_gates(patterns: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the gates to keep: the first of each distinct pattern, in order, without empty patterns.

    Merging equal patterns and dropping patterns without an active sample never changes the optimal value.
    Zero rows of ``X`` are active for every gate: leave them out of ``patterns`` where empty patterns matter.

    Parameters
    ----------
    patterns : bool array (n, P)
        Activation patterns in columns.

    Returns
    -------
    kept : int array (at most P,)
        Increasing column indices; empty where no gate has an active sample.

    Raises
    ------
    InvalidInputError
        ``patterns`` is not a two-dimensional bool array.
    """
    patterns = np.asarray(patterns)
    if patterns.ndim != 2 or patterns.dtype != np.bool_:
        raise InvalidInputError(
            f"patterns has shape {patterns.shape} and type {patterns.dtype}; a bool array (n, P) is wanted."
        )
    if 0 in patterns.shape:
        return np.empty(0, dtype=np.int64)
    first: dict[bytes, int] = {}
    for k in range(0, patterns.shape[1], _BLOCK_COLUMNS):
        for j, key in enumerate(pack_columns(patterns[:, k : k + _BLOCK_COLUMNS]), start=k):
            first.setdefault(key, j)
    first.pop(bytes((patterns.shape[0] + 7) // 8), None)
    return np.fromiter(first.values(), dtype=np.int64, count=len(first))
