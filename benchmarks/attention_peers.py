"""Peers of the attention benchmarks: the original block trained by torch's Adam, and torch's MultiheadAttention."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

__all__ = ["MultiheadBlock", "equal_width", "n_weights", "train_block", "train_multihead"]

#: Seconds between two looks at the objective.
_LOOKS = 0.1
_BATCH = 64


def train_block(
    tokens: np.ndarray, Y: np.ndarray, n_heads: int, beta: float, learning_rate: float, seconds: float
) -> Iterator[tuple[float, float, torch.Tensor]]:
    """Adam with ``weight_decay=beta``, full batch, on the original pooled linear block, in its cheapest form.

    The mean over the tokens of X W1_j X^T X W2_j is xbar^T W1_j (X^T X) W2_j; xbar and X^T X are formed once. float64,
    the objective 1/(2n) ||outputs - Y||^2 + beta/2 sum_j (||W1_j||^2 + ||W2_j||^2).

    Yields
    ------
    (float, float, torch.Tensor)
        Seconds so far, without those of the looks, the objective, and the weights as one block Z (1, d^2, d c).
    """
    X, Y = torch.from_numpy(tokens), torch.from_numpy(Y)
    n, _, d = X.shape
    begin = time.perf_counter()
    mean, products = X.mean(1), X.mT @ X
    torch.manual_seed(0)
    W1 = nn.Parameter(((2 * torch.rand(d, n_heads * d) - 1) / d**0.5).double())
    W2 = nn.Parameter(((2 * torch.rand(n_heads * d, Y.shape[1]) - 1) / d**0.5).double())
    rule = torch.optim.Adam([W1, W2], lr=learning_rate, weight_decay=beta)

    def loss() -> torch.Tensor:
        heads = (mean @ W1).view(n, n_heads, d) @ products
        return (heads.flatten(1) @ W2 - Y).square().sum() / (2 * n)

    spent, next_look = time.perf_counter() - begin, 0.0
    while True:
        begin = time.perf_counter()
        rule.zero_grad()
        value = loss()
        value.backward()
        decay = beta / 2 * (W1.detach().square().sum() + W2.detach().square().sum())
        seen = float(value.detach() + decay)
        spent += time.perf_counter() - begin
        if spent >= min(next_look, seconds):
            yield spent, seen, _block(W1.detach(), W2.detach(), d)
            next_look = spent + _LOOKS
        if spent >= seconds:
            return
        begin = time.perf_counter()
        rule.step()
        spent += time.perf_counter() - begin


def _block(W1: torch.Tensor, W2: torch.Tensor, d: int) -> torch.Tensor:
    """Z[k d + a, l c + b] = sum_j W1_j[a, k] W2_j[l, b], for W1 (d, m d) and W2 (m d, c)."""
    first, second = W1.view(d, -1, d), W2.view(-1, d, W2.shape[1])
    return torch.einsum("ajk,jlb->kalb", first, second).reshape(1, d * d, -1)


class MultiheadBlock(nn.Module):
    """Tokens into e dimensions, ``torch.nn.MultiheadAttention``, and a linear layer; mean over tokens or not."""

    def __init__(self, d: int, c: int, width: int, n_heads: int, pooled: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(d, width)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.head = nn.Linear(width, c)
        self.pooled = pooled

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Outputs (n, c) or (n, s, c) of tokens (n, s, d)."""
        tokens = self.embed(X)
        outputs = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(outputs.mean(1) if self.pooled else outputs)


def n_weights(module: nn.Module) -> int:
    """Number of weights."""
    return sum(part.numel() for part in module.parameters())


def equal_width(d: int, c: int, wanted: int, n_heads: int) -> int:
    """The multiple of `n_heads` with the number of weights of :class:`MultiheadBlock` nearest to `wanted`."""
    widths = range(n_heads, 2048, n_heads)
    return min(widths, key=lambda e: abs(e * d + e + 4 * e * e + 4 * e + e * c + c - wanted))


def train_multihead(
    tokens: np.ndarray,
    Y: np.ndarray,
    *,
    size: int,
    seconds: tuple[float, ...],
    n_heads: int = 4,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Iterator[tuple[float, MultiheadBlock]]:
    """Adam on batches of 64 on the squared loss, float32; yields the network after each of some times.

    Parameters
    ----------
    tokens : array of shape (n, s, d)
    Y : array of shape (n, c), or (n, s, c) for outputs per token
    size : int
        About so many weights.
    seconds : tuple of float
        Rising.
    """
    torch.manual_seed(seed)
    X, targets = torch.from_numpy(tokens).float(), torch.from_numpy(Y).float()
    d, c = X.shape[2], targets.shape[-1]
    network = MultiheadBlock(d, c, equal_width(d, c, size, n_heads), n_heads, targets.ndim == 2)
    rule = torch.optim.Adam(network.parameters(), lr=learning_rate)
    begin, waiting = time.perf_counter(), list(seconds)
    paused = 0.0
    while True:
        for rows in torch.randperm(len(X)).split(_BATCH):
            spent = time.perf_counter() - begin - paused
            if spent >= waiting[0]:
                pause = time.perf_counter()
                yield spent, network
                paused += time.perf_counter() - pause
                waiting.pop(0)
                if not waiting:
                    return
            rule.zero_grad()
            (0.5 * (network(X[rows]) - targets[rows]).square().sum() / len(rows)).backward()
            rule.step()
