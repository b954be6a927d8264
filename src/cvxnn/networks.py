"""Solutions as torch modules: the two-layer network that a convex solution stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem

__all__ = ["TwoLayerNetwork", "balanced_factors", "build_network"]


class TwoLayerNetwork(nn.Module):
    """x -> sum_j 1{g_k(j) . x >= 0} (x . u_j) v_j^T + b, or without gates for the linear network.

    Parameters
    ----------
    hidden : torch.Tensor of shape (d, m)
        One column u_j per neuron (with the hidden bias in its last row).
    output : torch.Tensor of shape (m, c)
    bias : torch.Tensor of shape (c,)
    gates : torch.Tensor of shape (d, P) or None
        Gate vectors, kept in float64: the gates of a sample are those of training in any type.
    gate_index : torch.Tensor of shape (m,)
        Gate of each neuron.
    hidden_bias : bool
        Whether a 1 is appended to every sample.
    sample_dtype : torch.dtype, optional
        Type of the samples in training, by default that of `hidden`. Samples are rounded to it before their
        gates are computed in float64, whatever type the module is converted to later.
    """

    gates: torch.Tensor | None
    gate_index: torch.Tensor | None

    def __init__(
        self,
        hidden: torch.Tensor,
        output: torch.Tensor,
        bias: torch.Tensor,
        gates: torch.Tensor | None = None,
        gate_index: torch.Tensor | None = None,
        hidden_bias: bool = False,
        sample_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden.contiguous())
        self.output = nn.Parameter(output.contiguous())
        self.bias = nn.Parameter(bias)
        self.hidden_bias = hidden_bias
        self.sample_dtype = hidden.dtype if sample_dtype is None else sample_dtype
        self.register_buffer("gates", None if gates is None else gates.contiguous())
        self.register_buffer("gate_index", gate_index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs (n, c) of samples x (n, d).

        Raises
        ------
        InvalidInputError
            x is not a matrix with d columns.
        """
        n_features = len(self.hidden) - self.hidden_bias
        if x.ndim != 2 or x.shape[1] != n_features:
            raise InvalidInputError(f"x has shape {tuple(x.shape)}; (n, {n_features}), a row per sample, is wanted")
        if self.hidden_bias:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        hidden = x.to(self.hidden.dtype) @ self.hidden
        if self.gates is not None:
            active = (x.to(self.sample_dtype).to(torch.float64) @ self.gates) >= 0
            hidden = hidden * active.to(hidden.dtype)[:, self.gate_index]
        return hidden @ self.output + self.bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TwoLayerNetwork:
        # Conversions of the module move the gates, but never round them.
        gates = self.gates
        super()._apply(fn, recurse)
        if gates is not None and self.gates is not None:
            self.gates = gates.to(self.gates.device)
        return self


def balanced_factors(Z: torch.Tensor, tolerance: float = 1e-14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neurons (u_j, v_j) of blocks Z, balanced (equal norms), and the gate of each.

    Parameters
    ----------
    Z : torch.Tensor of shape (P, p, q)
    tolerance : float
        Singular values below this fraction of the largest of all are left out.

    Returns
    -------
    (U, V, index) of shapes (p, m), (q, m) and (m,)
    """
    left, values, right = torch.linalg.svd(Z.double(), full_matrices=False)
    keep = values > tolerance * values.max()
    index = keep.nonzero()[:, 0]
    root = values[keep].sqrt()
    return left.mT[keep].T * root, right[keep].T * root, index


def build_network(
    problem: Problem,
    Z: torch.Tensor | None,
    intercept: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> TwoLayerNetwork:
    """The network of blocks Z of a problem, with the same predictions.

    Parameters
    ----------
    problem : Problem
    Z : torch.Tensor of shape (P, p, q)
    intercept : torch.Tensor of shape (c,)
    dtype : torch.dtype, optional
        Type of the weights; by default that of the problem.
    """
    assert Z is not None
    dtype = problem.dtype if dtype is None else dtype
    return network_from_blocks(Z, intercept, problem.operator.gates, problem.hidden_bias, dtype, problem.dtype)


def network_from_blocks(
    Z: torch.Tensor,
    intercept: torch.Tensor,
    gates: np.ndarray | None,
    hidden_bias: bool,
    dtype: torch.dtype,
    sample_dtype: torch.dtype | None = None,
) -> TwoLayerNetwork:
    """The network of blocks Z with gate vectors (d, P), or without gates."""
    U, V, index = balanced_factors(Z)
    gate_tensor = None if gates is None else torch.tensor(gates, dtype=torch.float64, device=Z.device)
    return TwoLayerNetwork(
        U.to(dtype),
        V.T.to(dtype),
        intercept.detach().clone().to(dtype),
        gate_tensor,
        index if gates is not None else None,
        hidden_bias,
        sample_dtype,
    )
