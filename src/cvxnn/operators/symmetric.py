"""Symmetric products, of which only one triangle is computed."""

from __future__ import annotations

import torch

__all__ = ["add_product"]

#: Order of the tiles of large matrices.
_TILE = 512


def add_product(matrix: torch.Tensor, features: torch.Tensor, alpha: float = 1.0) -> None:
    """matrix += alpha features^T features, in place; large ones in tiles, the lower triangle mirrored.

    Parameters
    ----------
    matrix : torch.Tensor of shape (F, F)
        Symmetric.
    features : torch.Tensor of shape (n, F)
    """
    size = len(matrix)
    if size <= 2 * _TILE:
        matrix.addmm_(features.T, features, alpha=alpha)
        return
    for start in range(0, size, _TILE):
        stop = min(start + _TILE, size)
        matrix[start:stop, start:].addmm_(features[:, start:stop].T, features[:, start:], alpha=alpha)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
