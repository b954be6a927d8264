"""Many two-layer ReLU networks trained at the same time by torch's optimisers, each as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from cvxnn.validation import check_choice

__all__ = ["OPTIMIZERS", "Batch", "initial_weights", "objectives", "train_batch"]

OPTIMIZERS = ("sgd", "adam")


@dataclass
class Batch:
    """Networks x -> W2 (W1 x)_+ of one width.

    Attributes
    ----------
    W1 : torch.Tensor of shape (s, m, d)
    W2 : torch.Tensor of shape (s, c, m)
    trace : list of (int, list of float)
        The objective of each network after some numbers of steps.
    """

    W1: torch.Tensor
    W2: torch.Tensor
    trace: list[tuple[int, list[float]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.W1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.W1[index], self.W2[index]


def initial_weights(width: int, n_features: int, n_outputs: int, seeds: tuple[int, ...]) -> Batch:
    """Networks as torch initialises ``Sequential(Linear, ReLU, Linear)`` without biases, in float64."""
    first, second = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            first.append(nn.Linear(n_features, width, bias=False).weight.detach().double())
            second.append(nn.Linear(width, n_outputs, bias=False).weight.detach().double())
    return Batch(torch.stack(first), torch.stack(second))


def objectives(batch: Batch, X: torch.Tensor, Y: torch.Tensor, beta: float) -> torch.Tensor:
    """1/(2n) ||outputs - Y||^2 + beta/2 (||W1||^2 + ||W2||^2) of each network, (s,)."""
    outputs = (X @ batch.W1.mT).clamp_min(0) @ batch.W2.mT
    loss = (outputs - Y).square().sum((1, 2)) / (2 * len(X))
    return loss + beta / 2 * (batch.W1.square().sum((1, 2)) + batch.W2.square().sum((1, 2)))


def train_batch(
    batch: Batch,
    X: torch.Tensor,
    Y: torch.Tensor,
    *,
    beta: float,
    optimizer: str,
    learning_rate: float,
    steps: int,
    traced: tuple[int, ...] = (),
) -> Batch:
    """Full-batch training of every network, on 1/(2n) ||outputs - Y||^2 with weight decay beta.

    SGD (momentum 0.9) and Adam change each weight from its own gradients alone, so that networks which are trained
    together end where they would end separately, up to rounding.

    Parameters
    ----------
    batch : Batch
        Left as it is.
    X, Y : torch.Tensor of shape (n, d) and (n, c)
    beta : float
        ``weight_decay`` of the optimiser, which for these two is a part of the gradient.
    optimizer : {"sgd", "adam"}
    learning_rate : float
        Constant.
    steps : int
    traced : tuple of int
        Numbers of steps after which the objectives are noted.
    """
    check_choice(optimizer, "optimizer", OPTIMIZERS)
    W1, W2 = (nn.Parameter(values.clone()) for values in (batch.W1, batch.W2))
    trained = Batch(W1.detach(), W2.detach())  # the same memory
    rule: torch.optim.Optimizer
    if optimizer == "sgd":
        rule = torch.optim.SGD([W1, W2], lr=learning_rate, momentum=0.9, weight_decay=beta)
    else:
        rule = torch.optim.Adam([W1, W2], lr=learning_rate, weight_decay=beta)
    noted, data = set(traced), (X.contiguous(), X.mT.contiguous(), Y.mT.contiguous())
    for step in range(steps + 1):
        if step in noted:
            trained.trace.append((step, objectives(trained, X, Y, beta).tolist()))
        if step < steps:
            W1.grad, W2.grad = _gradients(trained, *data)
            rule.step()
    return trained


def _gradients(batch: Batch, X: torch.Tensor, Xt: torch.Tensor, Yt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the losses, for W1 and W2; 0 is the derivative of the ReLU at 0, as in torch.

    In place where possible: fresh memory costs more here than the numbers that are written to it.
    """
    s, m, d = batch.W1.shape
    hidden = (batch.W1.reshape(s * m, d) @ Xt).clamp_min_(0).view(s, m, -1)
    residual = (batch.W2 @ hidden).sub_(Yt).div_(len(X))
    back = (batch.W2.mT @ residual).masked_fill_(hidden <= 0, 0.0)
    return (back.view(s * m, -1) @ X).view(s, m, d), residual @ hidden.mT
