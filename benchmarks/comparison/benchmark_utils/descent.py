"""Gradient methods of torch on the factors Z_k = U_k V_k^T, as in a training loop of one's own."""

from __future__ import annotations

from typing import Any

import torch

from benchmark_utils.sampling import Reached

__all__ = ["Factors"]


class Factors:
    """1/2 ||sum_k D_k X U_k V_k^T - Y||^2 + beta/2 (||U||^2 + ||V||^2), m columns per gate, gradients from torch."""

    sampling_strategy = "callback"
    stopping_criterion = Reached()

    def set_objective(self, X: Any, Y: Any, gates: Any, beta: float, **_: Any) -> None:
        """Data as tensors."""
        self.X, self.Y = torch.from_numpy(X), torch.from_numpy(Y)
        self.gates, self.beta = torch.from_numpy(gates), beta

    def warm_up(self) -> None:
        """One step: torch imports its optimisers and its autograd at the first one, which takes seconds."""
        self.run_once(stop_val=1)

    def prepare(self) -> list[torch.Tensor]:
        """Patterns and a random start."""
        generator = torch.Generator().manual_seed(0)
        n_gates, m = self.gates.shape[1], min(self.X.shape[1], self.Y.shape[1])
        self.mask = (self.X @ self.gates >= 0).to(self.X.dtype)
        shapes = (self.X.shape[1], n_gates, m), (n_gates, m, self.Y.shape[1])
        start = [0.1 * torch.randn(shape, generator=generator, dtype=self.X.dtype) for shape in shapes]
        self.U, self.V = (part.requires_grad_() for part in start)
        return [self.U, self.V]

    def loss(self) -> torch.Tensor:
        """The objective at the factors."""
        n_gates, m = self.U.shape[1:]
        hidden = (self.X @ self.U.flatten(1)).view(-1, n_gates, m) * self.mask.unsqueeze(2)
        residual = hidden.flatten(1) @ self.V.flatten(0, 1) - self.Y
        penalty = self.U.square().sum() + self.V.square().sum()
        return residual.square().sum() / 2 + self.beta / 2 * penalty

    def get_result(self) -> dict[str, Any]:
        """Blocks Z."""
        return {"Z": torch.einsum("dkm,kmc->kdc", self.U.detach(), self.V.detach())}
