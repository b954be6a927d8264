"""The vector norms of the factors: l1, l2 and l-infinity, along the last axis."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["VECTOR_NORMS", "VectorNorm", "signs"]


def signs(z: Tensor) -> Tensor:
    """Entrywise sign with sign(0) = 1, same shape and dtype as `z`."""
    return torch.where(z < 0, -1.0, 1.0).to(z.dtype)


class VectorNorm(ABC):
    """A norm of vectors held in the last axis of a tensor of shape (..., n)."""

    name: str

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """Norm of `z` (..., n), shape (...)."""

    @abstractmethod
    def dual(self, g: Tensor) -> Tensor:
        """Dual norm max { g^T z : ||z|| <= 1 } of `g` (..., n), shape (...)."""

    @abstractmethod
    def maximiser(self, g: Tensor) -> Tensor:
        """A point of the unit ball where g^T z is the dual norm of `g` (..., n), same shape."""

    @abstractmethod
    def prox(self, z: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        """argmin_w threshold ||w|| + 1/2 ||w - z||_2^2 for `z` (..., n), and the norms (...) of the result.

        `threshold` is a number or broadcasts against (..., 1).
        """

    @abstractmethod
    def prox_square(self, z: Tensor, weight: float) -> Tensor:
        """argmin_w weight/2 ||w||^2 + 1/2 ||w - z||_2^2 for `z` (..., n), weight >= 0."""

    @abstractmethod
    def radius(self, n: int) -> float:
        """Largest Euclidean norm in the unit ball of R^n."""


class _L1(VectorNorm):
    name = "l1"

    def value(self, z: Tensor) -> Tensor:
        return z.abs().sum(-1)

    def dual(self, g: Tensor) -> Tensor:
        return g.abs().amax(-1)

    def maximiser(self, g: Tensor) -> Tensor:
        index = g.abs().argmax(-1, keepdim=True)
        return torch.zeros_like(g).scatter_(-1, index, signs(g.gather(-1, index)))

    def prox(self, z: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        magnitude = (z.abs() - threshold).clamp_min_(0)
        return torch.copysign(magnitude, z), magnitude.sum(-1)

    def prox_square(self, z: Tensor, weight: float) -> Tensor:
        """Soft threshold at weight times the norm of the result, which is the largest that fits."""
        totals = z.abs().sort(dim=-1, descending=True).values.cumsum(-1)
        counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        size = (totals / (1 + weight * counts)).amax(-1, keepdim=True)
        return self.prox(z, weight * size)[0]

    def radius(self, n: int) -> float:
        return 1.0


class _L2(VectorNorm):
    name = "l2"

    def value(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z, dim=-1)

    def dual(self, g: Tensor) -> Tensor:
        return torch.linalg.vector_norm(g, dim=-1)

    def maximiser(self, g: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        return torch.where(norm > 0, g / norm, g.shape[-1] ** -0.5)

    def prox(self, z: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        shrink = torch.where(norm <= threshold, 0.0, 1 - threshold / norm)
        return z * shrink, (shrink * norm).squeeze(-1)

    def prox_square(self, z: Tensor, weight: float) -> Tensor:
        return z / (1 + weight)

    def radius(self, n: int) -> float:
        return 1.0


class _LInf(VectorNorm):
    name = "linf"

    def value(self, z: Tensor) -> Tensor:
        return z.abs().amax(-1)

    def dual(self, g: Tensor) -> Tensor:
        return g.abs().sum(-1)

    def maximiser(self, g: Tensor) -> Tensor:
        return signs(g)

    def prox(self, z: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        """Clip at a level where the entries lose `threshold` in all (the rest: projection on an l1 ball)."""
        magnitude = z.abs()
        totals = magnitude.sort(dim=-1, descending=True).values.cumsum(-1)
        counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        level = ((totals - threshold) / counts).amax(-1, keepdim=True).clamp_min(0)
        clipped = torch.minimum(magnitude, level)
        return torch.copysign(clipped, z), clipped.amax(-1)

    def prox_square(self, z: Tensor, weight: float) -> Tensor:
        """Through the dual norm l1: z minus weight times its prox at z / weight (Moreau)."""
        if weight == 0:
            return z
        return z - weight * VECTOR_NORMS["l1"].prox_square(z / weight, 1 / weight)

    def radius(self, n: int) -> float:
        return float(n) ** 0.5


VECTOR_NORMS: dict[str, VectorNorm] = {norm.name: norm for norm in (_L1(), _L2(), _LInf())}
