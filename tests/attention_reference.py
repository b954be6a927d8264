"""Self-attention in plain NumPy, from equations (8), (104), (133) and (134), for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn.problem import Problem

MASKS = ("none", "padding", "causal", "pairs")


@dataclass(frozen=True)
class Attention:
    """Tokens X (n, s, d), M (n, s, s), which tokens are valid, and gates H (P, d, d) or None."""

    X: np.ndarray
    M: np.ndarray
    valid: np.ndarray
    H: np.ndarray | None
    output: str

    @property
    def active(self) -> np.ndarray:
        """M o D_k, (P, n, s, s)."""
        if self.H is None:
            return self.M[None].astype(float)
        scores = np.einsum("nta,kab,nsb->knts", self.X, self.H, self.X)
        return (scores >= 0) * self.M[None].astype(float)

    def rows(self, outputs: np.ndarray) -> np.ndarray:
        """Rows of predictions of outputs per token, (n, s, c)."""
        if self.output == "tokens":
            return outputs[self.valid]
        kept = np.where(self.valid[:, :, None], outputs, 0.0)
        return kept.sum(1) / self.valid.sum(1, keepdims=True)

    def of_blocks(self, Z: np.ndarray) -> np.ndarray:
        """(104), (133): row t is sum_k sum_{p, q} (X^T diag(M D_k[t, :]) X)[p, q] x_t Z_k^(p, q)."""
        d = self.X.shape[2]
        blocks = Z.reshape(len(Z), d, d, d, -1)
        products = np.einsum("knts,nsp,nsq->kntpq", self.active, self.X, self.X)
        return self.rows(np.einsum("kntpq,nta,kpaqb->ntb", products, self.X, blocks))

    def of_heads(self, gate: int, U: np.ndarray, V: np.ndarray, relu: bool = False) -> np.ndarray:
        """(M o D_k o (X U X^T)) X V, or (M o (X U X^T)_+) X V, of one head (134), (8)."""
        scores = np.einsum("nta,ab,nsb->nts", self.X, U, self.X)
        weights = self.M * np.maximum(scores, 0) if relu else self.active[gate] * scores
        return self.rows(np.einsum("nts,nsl,lc->ntc", weights, self.X, V))


def make_mask(kind: str, n: int, s: int, rng: np.random.Generator) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """A mask to pass, M (n, s, s), and which tokens are valid (n, s)."""
    if kind == "padding":
        mask = rng.random((n, s)) < 0.7
        mask[:, 0] = True
        return mask, mask[:, :, None] & mask[:, None, :], mask
    if kind == "causal":
        mask = np.tril(np.ones((s, s), dtype=bool))
        return mask, np.broadcast_to(mask, (n, s, s)), np.ones((n, s), dtype=bool)
    if kind == "pairs":
        mask = rng.random((n, s, s)) < 0.5
        mask[:, -1] = mask[:, :, -1] = False
        mask[:, 0, 0] = True
        return mask, mask, mask.any(1) | mask.any(2)
    return None, np.ones((n, s, s), dtype=bool), np.ones((n, s), dtype=bool)


def make_attention(
    activation: str = "gated_relu",
    output: str = "mean",
    mask: str = "none",
    shape: tuple[int, int, int, int] = (6, 4, 3, 2),
    loss: str = "squared",
    seed: int = 0,
    **options: Any,
) -> tuple[Problem, Attention]:
    """A small problem, (n, s, d, c) its `shape`, and its map in NumPy."""
    n, s, d, c = shape
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, s, d)).astype(np.float32).astype(float)
    given, M, valid = make_mask(mask, n, s, rng)
    X = np.where(valid[:, :, None], X, 0.0)
    leading = (n,) if output == "mean" else (n, s)
    if loss == "cross_entropy":
        labels = rng.integers(0, c, leading)
        # All classes are there among the valid ones: the first token always is.
        labels.reshape(n, -1)[: min(n, c), 0] = np.arange(c)[:n]
        Y = labels
    else:
        Y = np.tanh(rng.standard_normal((*leading, c)))
    settings: dict[str, Any] = {"n_gates": 4, "beta": 2e-2} | options
    problem = cvxnn.attention_problem(X, Y, activation=activation, output=output, mask=given, loss=loss, **settings)
    gates = None if problem.gates is None else problem.gates.numpy()
    return problem, Attention(X, M, valid, gates, output)


def as_columns(U: np.ndarray, V: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """u (1, d d) and v (1, d c) of a head, entry k d + a and entry l c + b."""
    return torch.from_numpy(U.T.reshape(1, -1).copy()), torch.from_numpy(V.reshape(1, -1).copy())


def small(
    activation: str = "gated_relu",
    output: str = "mean",
    loss: str = "squared",
    fraction: float = 0.05,
    mask: str = "padding",
    shape: tuple[int, int, int, int] = (8, 3, 2, 2),
    **options: Any,
) -> tuple[Problem, Attention]:
    """A problem that solvers finish in a second, beta a fraction of beta_max."""
    problem, reference = make_attention(activation, output, mask, shape, loss, **({"n_gates": 3} | options))
    return problem.with_beta(fraction * problem.beta_max), reference
