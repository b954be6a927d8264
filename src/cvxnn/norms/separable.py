"""Norms with an l1 side: sums of vector norms over rows or over columns."""

import torch
from torch import Tensor

from cvxnn.norms.base import MatrixNorm, _widen

__all__ = ["ColumnSumNorm", "RowSumNorm"]


class RowSumNorm(MatrixNorm):
    """Left norm l1: sum of the right norms of the rows; the dual is the largest right dual norm of a row."""

    def _value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        value = self._right.value(Z).sum(-1)
        return value, value

    def _dual_bounds(self, G: Tensor) -> tuple[Tensor, Tensor]:
        return _widen(self._dual_estimate(G), G.shape[2])

    def _dual_estimate(self, G: Tensor) -> Tensor:
        return self._right.dual(G).amax(-1)

    def _atom(self, G: Tensor) -> tuple[Tensor, Tensor]:
        row = self._right.dual(G).argmax(-1)
        blocks = torch.arange(G.shape[0], device=G.device)
        u = torch.zeros_like(G[:, :, 0])
        u[blocks, row] = 1
        return u, self._right.maximiser(G[blocks, row])

    def _prox(self, Z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        W, values = self._right.prox(Z, t)
        return W, values.sum(-1)


class ColumnSumNorm(MatrixNorm):
    """Right norm l1: sum of the left norms of the columns; the dual is the largest left dual norm of one."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(left, right)
        self._transposed = RowSumNorm(right, left)

    def _value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        return self._transposed._value(Z.mT)

    def _dual_bounds(self, G: Tensor) -> tuple[Tensor, Tensor]:
        return self._transposed._dual_bounds(G.mT)

    def _dual_estimate(self, G: Tensor) -> Tensor:
        return self._transposed._dual_estimate(G.mT)

    def _atom(self, G: Tensor) -> tuple[Tensor, Tensor]:
        v, u = self._transposed._atom(G.mT)
        return u, v

    def _prox(self, Z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        W, values = self._transposed._prox(Z.mT, t)
        return W.mT.contiguous(), values
