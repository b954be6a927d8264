"""The nuclear norm (l2 with l2), its dual, the spectral norm, and a rigorous bound of the latter."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from cvxnn.norms.base import EPS, MatrixNorm

__all__ = ["NuclearNorm", "spectral_bounds"]

# Below this ratio of threshold to largest singular value the Gram matrix loses too many digits of the
# singular values near the threshold (relative error eps / (2 ratio^2)), and an SVD is used.
GRAM_RATIO = {torch.float32: 3e-3, torch.float64: 1e-5}


def _gram(G: Tensor) -> Tensor:
    """Gram matrix of the smaller side, (P, r, r) with r = min(p, q)."""
    return G.mT @ G if G.shape[1] >= G.shape[2] else G @ G.mT


def spectral_bounds(G: Tensor) -> tuple[Tensor, Tensor]:
    """Rigorous lower and upper bounds of the spectral norms of float64 blocks with largest entry near 1.

    The largest eigenvalue of the computed Gram matrix M differs from the squared norm by at most
    4 (p + q) eps ||G||_F^2: forming M costs max(p, q) eps ||G||_F^2, its eigenvalues a small multiple of
    min(p, q) eps ||M||_2 (section 3 of the maths).

    Parameters
    ----------
    G : Tensor of shape (P, p, q)

    Returns
    -------
    lower, upper : Tensor of shape (P,)
    """
    return _bounds_from_gram(_gram(G), sum(G.shape[1:]))


def _bounds_from_gram(M: Tensor, sides: int) -> tuple[Tensor, Tensor]:
    """Bounds of the spectral norms of blocks with p + q = `sides` from the computed Gram matrices of a side."""
    largest = torch.linalg.eigvalsh(M)[:, -1]
    squares = M.diagonal(dim1=-2, dim2=-1).sum(-1)
    allowance = 4 * (sides + 2) * EPS * squares
    lower = (largest - allowance).clamp_min(0).sqrt() * (1 - 4 * EPS)
    upper = (largest + allowance).clamp_min(0).sqrt() * (1 + 4 * EPS)
    return lower, upper


class NuclearNorm(MatrixNorm):
    """Sum of the singular values; the dual norm is the largest singular value."""

    def _value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.linalg.svdvals(Z).sum(-1)
        return value, value

    def _dual_bounds(self, G: Tensor) -> tuple[Tensor, Tensor]:
        return spectral_bounds(G)

    def dual_of_parts(
        self, parts: Iterable[Tensor], shape: tuple[int, int], size: float, error: float
    ) -> tuple[float, float]:
        """Bounds as of :meth:`dual` for one block that comes in parts and is never in memory as a whole.

        Parameters
        ----------
        parts : iterable of Tensor, (rows, q), float64
            All rows of the block G, in any order.
        shape : pair of int
            p and q, for p >= q.
        size : float
            Not less than ||G||_F: the scale of this computation.
        error : float
            As for :meth:`dual`.

        Notes
        -----
        The Gram matrix is a sum of p products in any order, with at most p additions of parts. What is less than
        2^-450 of `size` can underflow; 2^-400 of it is more than all of that.
        """
        p, q = shape
        if not (math.isfinite(size) and math.isfinite(error)):
            return 0.0, math.inf
        exponent = math.frexp(size)[1] if size > 0 else 0
        scale = math.ldexp(1.0, min(exponent, 1023))
        M: Tensor | None = None
        for part in parts:
            scaled = part / scale
            M = scaled.mT @ scaled if M is None else M.addmm_(scaled.mT, scaled)
        if M is None or not bool(torch.isfinite(M).all()):
            return 0.0, math.inf
        lower, upper = (float(bound) for bound in _bounds_from_gram(M.unsqueeze(0), p + q))
        slack = error * (1 + 16 * EPS)
        upper = ((upper + 2.0**-400) * scale + slack) * (1 + 16 * EPS)
        lower = (max(lower - 2.0**-400, 0.0) * scale * (1 - 16 * EPS) - slack) * (1 - 16 * EPS)
        return max(lower, 0.0), upper

    def _dual_estimate(self, G: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(_gram(G))[:, -1].clamp_min(0).sqrt()

    def _atom(self, G: Tensor) -> tuple[Tensor, Tensor]:
        if G.shape[1] < G.shape[2]:
            v, u = self._atom(G.mT)
            return u, v
        v = torch.linalg.eigh(_gram(G)).eigenvectors[:, :, -1]
        u = self._left.maximiser((G @ v[:, :, None])[:, :, 0])
        return u, v

    def _prox(self, Z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Z times (1 - t / s)_+ as a function of its smaller Gram matrix; by an SVD where that is inexact."""
        t = t if isinstance(t, float) else t[:, :, 0]
        squares, Q = torch.linalg.eigh(_gram(Z))
        s = squares.clamp_min(0).sqrt()
        shrink = torch.where(s > t, 1 - t / s, 0.0)
        factor = (Q * shrink[:, None, :]) @ Q.mT
        W = Z @ factor if Z.shape[1] >= Z.shape[2] else factor @ Z
        values = (s * shrink).sum(-1)
        inexact = (s[:, -1:] * GRAM_RATIO.get(Z.dtype, 0.0) > t)[:, 0]
        if bool(inexact.any()):
            t_inexact = t if isinstance(t, float) else t[inexact]
            W[inexact], values[inexact] = _shrink_singular_values(Z[inexact], t_inexact)
        return W, values


def _shrink_singular_values(Z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """Proximal operator through a singular value decomposition; `t` is a float or has shape (P, 1)."""
    U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    s = (s - t).clamp_min(0)
    return (U * s[:, None, :]) @ Vh, s.sum(-1)
