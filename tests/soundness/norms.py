"""Matrix norms with a closed form and their duals in NumPy, by the definitions."""

from __future__ import annotations

import numpy as np

__all__ = ["dual_norm", "matrix_norm", "vector_norm"]

_ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}
_DUALS = {"l1": np.inf, "l2": 2, "linf": 1}


def vector_norm(z: np.ndarray, name: str, axis: int = -1) -> np.ndarray:
    """Norm along an axis."""
    return np.linalg.norm(z, ord=_ORDERS[name], axis=axis)


def matrix_norm(Z: np.ndarray, norms: tuple[str, str]) -> float:
    """||Z||_D of one block (p, q) for the norms of its left and right factors."""
    left, right = norms
    if Z.shape[1] == 1:
        return float(vector_norm(Z[:, 0], left))
    if Z.shape[0] == 1:
        return float(vector_norm(Z[0], right))
    if left == "l1":
        return float(vector_norm(Z, right, axis=1).sum())
    if right == "l1":
        return float(vector_norm(Z, left, axis=0).sum())
    assert norms == ("l2", "l2")
    return float(np.linalg.svd(Z, compute_uv=False).sum())


def dual_norm(G: np.ndarray, norms: tuple[str, str]) -> float:
    """max u^T G v over ||u||_C <= 1, ||v||_R <= 1 for one block (p, q)."""
    left, right = norms
    if G.shape[1] == 1:
        return float(np.linalg.norm(G[:, 0], ord=_DUALS[left]))
    if G.shape[0] == 1:
        return float(np.linalg.norm(G[0], ord=_DUALS[right]))
    if left == "l1":
        return float(np.linalg.norm(G, ord=_DUALS[right], axis=1).max())
    if right == "l1":
        return float(np.linalg.norm(G, ord=_DUALS[left], axis=0).max())
    assert norms == ("l2", "l2")
    return float(np.linalg.svd(G, compute_uv=False)[0])
