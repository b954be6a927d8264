"""Bounds of the norms of gated data matrices, for all gates by one matrix product."""

from __future__ import annotations

import torch

from cvxnn.operators.base import row_batches

__all__ = ["gated_frobenius_norms", "gated_norms"]

_EPS = 2.0**-53


def gated_frobenius_norms(squares: torch.Tensor, patterns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Upper bounds (P,) of the Frobenius norm of diag(sqrt w) D_k X, from squared norms of the rows of X.

    Parameters
    ----------
    squares : torch.Tensor of shape (n,), float64
        Upper bounds; the largest is about 1.
    patterns : torch.Tensor of shape (n, P), bool
    weights : torch.Tensor of shape (n,), float64
    """
    n, n_gates = patterns.shape
    weighted = weights * squares
    sums = weighted.new_empty(n_gates)
    for gates in row_batches(n_gates, 8 * n):
        torch.mv(patterns[:, gates].T.to(weighted), weighted, out=sums[gates])
    # Sums of numbers that are not negative are off by a share of themselves.
    return sums.sqrt() * (1 + 2 * (n + 8) * _EPS)


def gated_norms(
    X: torch.Tensor, patterns: torch.Tensor | None, weights: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper bounds (P,) of the spectral norm of Y_k = diag(sqrt w) D_k X, and of the norm of its longest column.

    Parameters
    ----------
    X : torch.Tensor of shape (n, d), float64
        Its largest entry is 1.
    patterns : torch.Tensor of shape (n, P), bool, or None
        None for one gate that is always open.
    weights : torch.Tensor of shape (n,), float64
    centred : bool
        Bound H Y_k in place of Y_k, H the projection along sqrt w.

    Notes
    -----
    The square of the spectral norm is at most the smallest of ||Y_k||_F^2, the largest eigenvalue of Y^T Y for Y of
    all samples, as Y_k has some of its rows, and ||Y_k x||^2 + the second eigenvalue of Y^T Y for its first eigenvector
    x: a positive semidefinite matrix has no eigenvalue above the sum of those of its two diagonal blocks. H only
    lowers these, the first by ||D_k X^T w||^2 / sum w.
    """
    n, d = X.shape
    active = torch.ones(n, 1, dtype=torch.bool, device=X.device) if patterns is None else patterns
    weighted = weights.unsqueeze(1) * X
    values, vectors = torch.linalg.eigh(weighted.T @ X)
    # Rounding of the Gram matrix, its eigenvalues and vectors, relative to its trace.
    slack = 8 * (n + d + 16) * _EPS * float((weighted * X).sum().abs() + 1e-300)
    first, second = float(values[-1]) + slack, float(values[-2]) + slack if d > 1 else slack
    parts = [weighted * X, (weights * (X @ vectors[:, -1]).square()).unsqueeze(1)]
    if centred:
        parts.append(weighted)
    products = torch.cat(parts, 1)
    sums = products.new_empty(active.shape[1], products.shape[1])
    for gates in row_batches(len(sums), 8 * n):
        torch.mm(active[:, gates].T.to(X.dtype), products, out=sums[gates])
    squares = sums[:, :d]
    along = sums[:, d]
    if centred:
        squares = (squares - sums[:, d + 1 :].square() / weights.sum()).clamp_min(0)
    longest = squares.amax(1) + slack
    spectral = torch.minimum(squares.sum(1), along + second).clamp_max(first) + slack
    grown = 1 + 8 * _EPS
    return spectral.sqrt() * grown, longest.sqrt() * grown
