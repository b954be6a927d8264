"""Blocks of linear attention as tasks: sequences in place of samples, heads in place of neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from cvxnn.audit.heads import Heads
from cvxnn.audit.task import Point, Task
from cvxnn.columns import Columns
from cvxnn.networks import AttentionNetwork
from cvxnn.operators.tokens import TokenMask
from cvxnn.problem import Problem
from cvxnn.problems import attention_problem

__all__ = ["AttentionTask", "make_attention_task"]


@dataclass(frozen=True, eq=False)
class AttentionTask(Task):
    """minimise F(sum_j X U_j X^T X V_j + 1 b^T) + beta/2 (||U||^2 + ||V||^2).

    X are tokens (n, s, d), Y is (n, c) or (n, s, c). A column u of a :class:`Point` is U read column by column, v is V
    read row by row. The problem has one block and no gates: its optimum is that of all such blocks of any width.
    """

    mask: TokenMask | None = None
    output: str = "mean"

    architecture: ClassVar[str] = "attention"

    def _problem(self, activation: str, **options: Any) -> Problem:
        return attention_problem(
            self.X,
            self.Y,
            activation=activation,
            output=self.output,
            mask=self.mask,
            beta=self.beta,
            loss=self.loss,
            reduction=self.reduction,
            output_bias=self.output_bias,
            **options,
        )

    def hidden(self, columns: Columns) -> torch.Tensor:
        op = self.base.operator
        return torch.cat([op.hidden(columns.gate, columns.u, rows) for rows in op.column_batches(len(columns))])

    def weights_of(self, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float | None]:
        d = self.X.shape[2]
        return u.view(d, d).T.clone(), v.view(d, self.n_outputs), None

    def module(self, point: Point, dtype: torch.dtype) -> nn.Module:
        u, v = point.columns.u.T.to(dtype), point.columns.v.to(dtype)
        pooled = self.output == "mean"
        return AttentionNetwork(u, v, point.bias.to(dtype), None, None, pooled, self.hidden_bias, self.X.dtype)


def make_attention_task(
    heads: Heads, Y: torch.Tensor, *, beta: float, loss: Any, reduction: str, penalize_biases: bool
) -> AttentionTask:
    """The task of a block; a hidden bias is among its tokens already."""
    output_bias = heads.network.output_bias is not None
    return AttentionTask(
        activation="linear",
        X=heads.tokens,
        Y=Y,
        loss=loss,
        beta=beta,
        reduction=reduction,
        hidden_bias=heads.hidden_bias,
        output_bias=output_bias,
        penalised_bias=output_bias and penalize_biases,
        mask=heads.mask,
        output=heads.output,
    )
