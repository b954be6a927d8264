"""Duplicate samples merged into weights: the same training problem, smaller and in a canonical order."""

from __future__ import annotations

import numpy as np

__all__ = ["merge_duplicates"]


def merge_duplicates(X: np.ndarray, Y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge samples that are equal in X and Y, adding their weights; drop samples of weight zero.

    The objective does not change. Repeating a sample and giving it a weight lead to one and the same
    problem, and so to the same network, bit for bit.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    Y : ndarray of shape (n, c)
    weights : ndarray of shape (n,)

    Returns
    -------
    (X, Y, weights) with one row per distinct sample, in an order that does not depend on the input's.
    """
    used = weights > 0
    rows = np.ascontiguousarray(np.hstack([X, Y])[used]) + 0.0  # -0.0 becomes 0.0
    bits = rows.view(np.uint64)
    odd = np.random.default_rng(0).integers(2**63, size=(2, bits.shape[1]), dtype=np.uint64) * 2 + 1
    mixed = bits ^ (bits >> np.uint64(29))
    keys = np.stack([(mixed * factors).sum(axis=1, dtype=np.uint64) for factors in odd], axis=1)
    _, first, group = np.unique(
        keys.view([("a", np.uint64), ("b", np.uint64)]).ravel(), return_index=True, return_inverse=True
    )
    if not np.array_equal(bits[first][group], bits):  # two samples share a hash: compare them whole
        _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    totals = np.bincount(group.ravel(), weights=weights[used])
    return X[used][first], Y[used][first], totals
