"""Blocks of self-attention as torch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.networks.mlp import GatedModule
from cvxnn.operators import AttentionOperator
from cvxnn.operators.base import row_batches
from cvxnn.operators.pairs import allowed_pairs, pair_bits
from cvxnn.operators.queries import Queries
from cvxnn.operators.tokens import TokenMask, read_mask

__all__ = ["AttentionNetwork"]

#: Bytes of the scores of one batch of sequences.
_BATCH_BYTES = 2**27


class AttentionNetwork(GatedModule):
    """Multi-head self-attention without softmax: tokens (n, s, d) -> (n, c), or (n, s, c) for outputs per token.

    A token x_t sees sum_j sum_t' M_tt' D_j[t, t'] (x_t^T U_j x_t') V_j^T x_t' + b over the heads j, with
    D_j[t, t'] = 1{x_t^T H_k(j) x_t' >= 0}; the linear block has D = 1, and the ReLU block (x_t^T U_j x_t')_+. M is the
    mask. U_j has the place of W_query W_key^T in the usual notation, V_j that of W_value W_out.

    Parameters
    ----------
    hidden : torch.Tensor of shape (d d, m)
        A column per head: entry k d + a is U_j[a, k].
    output : torch.Tensor of shape (m, d c)
        A row per head: entry l c + b is V_j[l, b].
    bias : torch.Tensor of shape (c,)
    gates : torch.Tensor of shape (P, d, d) or None
        Matrices H_k, kept in float64.
    gate_index : torch.Tensor of shape (m,) or None
        Gate of each head.
    pooled : bool
        Whether outputs are the means over the valid tokens of a sequence.
    hidden_bias : bool
        Whether a 1 is appended to every token; d counts it.
    sample_dtype : torch.dtype, optional
        Type of the tokens in training, by default that of `hidden`. Tokens are rounded to it before their gates are
        computed in float64, whatever type the module is converted to later.
    relu : bool
        Whether the scores pass a ReLU; there are then no gates.
    """

    gate_index: torch.Tensor | None

    def __init__(
        self,
        hidden: torch.Tensor,
        output: torch.Tensor,
        bias: torch.Tensor,
        gates: torch.Tensor | None = None,
        gate_index: torch.Tensor | None = None,
        pooled: bool = True,
        hidden_bias: bool = False,
        sample_dtype: torch.dtype | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden.contiguous())
        self.output = nn.Parameter(output.contiguous())
        self.bias = nn.Parameter(bias)
        self.pooled = pooled
        self.hidden_bias = hidden_bias
        self.sample_dtype = hidden.dtype if sample_dtype is None else sample_dtype
        self.relu = relu
        self.register_buffer("gates", None if gates is None else gates.contiguous())
        self.register_buffer("gate_index", gate_index)

    @property
    def n_gates(self) -> int:
        return 1 if self.gates is None else len(self.gates)

    @property
    def dim(self) -> int:
        """Numbers d of a token, the appended 1 among them."""
        return round(len(self.hidden) ** 0.5)

    @property
    def n_features(self) -> int:
        """Numbers of a token that the module is called with."""
        return self.dim - bool(self.hidden_bias)

    @property
    def scores(self) -> torch.Tensor:
        """The matrices U_j of the scores, (m, d, d)."""
        return self.hidden.T.reshape(-1, self.dim, self.dim).mT

    @property
    def values(self) -> torch.Tensor:
        """The matrices V_j of the values, (m, d, c)."""
        return self.output.view(-1, self.dim, len(self.bias))

    def forward(self, tokens: torch.Tensor, mask: Any = None) -> torch.Tensor:
        """Outputs (n, c), or (n, s, c) with zeros at padding, of tokens (n, s, d).

        Parameters
        ----------
        tokens : torch.Tensor of shape (n, s, d)
            s need not be that of the training. What is at padding is not looked at.
        mask : bool, shape (n, s), (s, s) or (n, s, s), optional
            True where a token counts: (n, s) says which tokens are valid, the others which token (row) sees which
            (column), as in :func:`cvxnn.attention_problem`. torch's ``key_padding_mask`` is the opposite of the first.

        Raises
        ------
        InvalidInputError
            Tokens of another number of features, or a mask of another shape.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.n_features or tokens.shape[1] == 0:
            raise InvalidInputError(
                f"tokens have shape {tuple(tokens.shape)}; (n, tokens, {self.n_features}) is wanted"
            )
        n, s, _ = tokens.shape
        found = mask if isinstance(mask, TokenMask) else read_mask(mask, n, s)
        found = found.to(tokens.device)
        if not bool(found.valid.any(1).all()):
            empty = int((~found.valid.any(1)).nonzero()[0])
            raise InvalidInputError(f"mask leaves sequence {empty} without a valid token; at least one is wanted")
        if self.hidden_bias:
            tokens = torch.cat([tokens, torch.ones_like(tokens[:, :, :1])], dim=2)
        if mask is not None:
            tokens = torch.where(found.valid.unsqueeze(2), tokens, 0)
        n_gates = 0 if self.gates is None else len(self.gates)
        size = 8 * s * (s * (n_gates + 2 * len(self.output) + 1) + (n_gates + len(self.output)) * self.dim)
        batches = row_batches(n, size, _BATCH_BYTES) if n else [slice(0, 0)]
        outputs = [self._outputs(tokens[rows], found.of(rows)) for rows in batches]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _outputs(self, tokens: torch.Tensor, mask: TokenMask) -> torch.Tensor:
        n, s, _ = tokens.shape
        c = len(self.bias)
        rows = self._rows(tokens, mask) + self.bias
        if self.pooled:
            return rows
        if bool(mask.valid.all()):
            return rows.view(n, s, c)
        return rows.new_zeros(n, s, c).masked_scatter(mask.valid.unsqueeze(2), rows)

    def _rows(self, tokens: torch.Tensor, mask: TokenMask) -> torch.Tensor:
        """Outputs without the bias, a row per sequence or per valid token."""
        queries = Queries.of_mask(mask, "mean" if self.pooled else "tokens")
        m, c = len(self.output), len(self.bias)
        if m == 0 or len(tokens) == 0:
            return self.bias.new_zeros(queries.n_rows, c)
        gates, bits, index = None, None, self.gate_index
        gated = self.relu or self.gates is not None
        allowed = allowed_pairs(mask) if gated or mask.pairs is not None else None
        if self.gates is not None and index is not None:
            used, index = index.unique(return_inverse=True)
            gates = self.gates[used].cpu().numpy()
            bits = pair_bits(tokens.to(self.sample_dtype), queries, gates, allowed)
        elif self.relu:
            # The operator of a ReLU block has gates, which its network does not look at.
            gates, bits = self.bias.new_zeros(1, self.dim, self.dim).double().cpu().numpy(), allowed
        activation = "relu" if self.relu else "gated_relu"
        operator = AttentionOperator(tokens.to(self.hidden.dtype), queries, c, allowed, gates, bits, activation)
        if index is None:
            index = torch.zeros(m, dtype=torch.long, device=tokens.device)
        return operator.network_outputs(Columns(index, self.hidden.T, self.output))
