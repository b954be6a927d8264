"""Two-layer perceptrons as torch modules, and the neurons of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError

__all__ = ["GatedModule", "TwoLayerNetwork", "balanced_factors", "padded_factors"]


class GatedModule(nn.Module):
    """A module whose gates stay in float64, whatever it is converted to."""

    gates: torch.Tensor | None

    @property
    def n_gates(self) -> int:
        """Number of gates P; 1 without gates."""
        return 1 if self.gates is None else self.gates.shape[-1]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Conversions of the module move the gates, but never round them.
        gates = self.gates
        super()._apply(fn, recurse)
        if gates is not None and self.gates is not None:
            self.gates = gates.to(self.gates.device)
        return self


class TwoLayerNetwork(GatedModule):
    """x -> sum_j 1{g_k(j) . x >= 0} (x . u_j) v_j^T + b, or without gates for the linear and the ReLU network.

    The ReLU network is x -> sum_j (x . u_j)_+ v_j^T + b.

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
    relu : bool
        Whether the activations are (x . u_j)_+; there are then no gates.
    """

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
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.relu = relu
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
        if self.relu:
            hidden = torch.relu(hidden)
        if self.gates is not None:
            active = (x.to(self.sample_dtype).to(torch.float64) @ self.gates) >= 0
            hidden = hidden * active.to(hidden.dtype)[:, self.gate_index]
        return hidden @ self.output + self.bias


def balanced_factors(
    Z: torch.Tensor, norms: tuple[str, str] = ("l2", "l2"), tolerance: float = 1e-14
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neurons (u_j, v_j) of blocks Z, balanced (||u_j||_C = ||v_j||_R), and the gate of each.

    The neurons of a block are its rows, u = e_a, where C is l1, its columns, v = e_b, where R is l1, and its
    singular pairs otherwise. Their cost sum_j ||u_j||_C ||v_j||_R is the norm of the block (Lemma 3.1 of the
    paper) for every pair with an l1 side, for (l2, l2), and for blocks with a single row or column; with an
    l-infinity side and no l1 side it can be larger.

    Parameters
    ----------
    Z : torch.Tensor of shape (P, p, q)
    norms : pair of str
        Names of C and R.
    tolerance : float
        Neurons whose cost is below this fraction of the largest are left out.

    Returns
    -------
    (U, V, index) of shapes (p, m), (q, m) and (m,)
    """
    Z = Z.double()
    if norms[0] == "l1":
        keep = (Z != 0).any(2)
        index, row = keep.nonzero().unbind(1)
        U, V = _unit_vectors(row, Z.shape[1], like=Z), Z[keep].T
    elif norms[1] == "l1":
        keep = (Z != 0).any(1)
        index, column = keep.nonzero().unbind(1)
        U, V = Z.mT[keep].T, _unit_vectors(column, Z.shape[2], like=Z)
    else:
        left, values, right = torch.linalg.svd(Z, full_matrices=False)
        keep = values > 0
        index = keep.nonzero()[:, 0]
        U, V = left.mT[keep].T, right[keep].T * values[keep]
    columns = Columns(index, U.T, V.T).balanced(norms).without_zeros(tolerance, norms)
    return columns.u.T, columns.v.T, columns.gate


def _unit_vectors(index: torch.Tensor, n: int, like: torch.Tensor) -> torch.Tensor:
    """Columns e_i (n, m) for the entries i of an index (m,)."""
    return torch.eye(n, dtype=like.dtype, device=like.device)[:, index]


def padded_factors(network: Any, norms: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons of a network gate by gate, balanced in the given norms, in float64.

    Parameters
    ----------
    network : TwoLayerNetwork, TwoLayerCNN or AttentionNetwork
    norms : pair of str
        Names of the norms C of the u_j and R of the v_j.

    Returns
    -------
    (U, V) of shapes (P, p, m) and (P, q, m)
        With m the largest number of neurons of a gate (at least 1), and zero columns behind the others. Neurons
        with u_j = 0 or v_j = 0 are left out.
    """
    U, V = network.hidden.detach().double().T, network.output.detach().double()
    index = network.gate_index
    index = torch.zeros(len(U), dtype=torch.long, device=U.device) if index is None else index
    return Columns(index, U, V).without_zeros().balanced(norms).factors(network.n_gates)
