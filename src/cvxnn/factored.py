"""The loss as a function of Burer-Monteiro factors: value, gradients, Hessian-vector products (equation (14))."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvxnn.columns import Columns
from cvxnn.operators import Operator
from cvxnn.problem import Problem

__all__ = ["FactoredLoss", "Slopes"]


@dataclass
class Slopes:
    """F at a point, and its gradients: G_k v_j (r, p), G_k^T u_j (r, q) and that of the intercept (c,)."""

    value: float
    left: torch.Tensor
    right: torch.Tensor
    intercept: torch.Tensor


class FactoredLoss:
    """F(sum_j A_k(u_j v_j^T) + 1 b^T) in the columns u_j, v_j and the intercept b; the penalty is not in it.

    Samples are taken in batches of rows, and blocks are never formed.

    Parameters
    ----------
    problem : Problem
    double : bool
        Compute in float64 in place of the type of the problem.
    rows : torch.Tensor of indices, optional
        Use these samples only, with weights scaled up to the weight of all: an unbiased estimate.
    """

    def __init__(self, problem: Problem, double: bool = False, rows: torch.Tensor | None = None) -> None:
        self.problem = problem
        op = problem.operator.double() if double else problem.operator
        self.Y = problem.Y.to(op.dtype)
        self.weights = problem.weights.to(op.dtype)
        if rows is not None:
            op = op.subset(rows)
            self.Y = self.Y[rows]
            chosen = self.weights[rows]
            total = chosen.sum()
            self.weights = chosen * (self.weights.sum() / total) if float(total) > 0 else chosen
        self.op: Operator = op
        # Of samples that are shared out to processes, sums run over those of this one, and are added up at the end.
        self._mine = (op.own(self.Y), op.own(self.weights))

    def slopes(self, columns: Columns, b: torch.Tensor) -> Slopes:
        """Value and gradients."""
        op, loss = self.op, self.problem.loss
        weights = op.split_right(columns.v)
        left, right = torch.zeros_like(columns.u), torch.zeros_like(weights)
        offset = torch.zeros_like(b)
        value = 0.0
        local = op.local
        for rows in local.column_batches(len(columns)):
            hidden = local.hidden(columns.gate, columns.u, rows)
            outputs = torch.addmm(op.once(b), hidden, weights)
            op.add_outputs(outputs)
            Y, w = (part[rows] for part in self._mine)
            value += float(loss.value(outputs, Y, w))
            gradient = loss.gradient(outputs, Y, w)
            left += local.hidden_adjoint(columns.gate, gradient @ weights.T, rows)
            right.addmm_(hidden.T, gradient)
            if self.problem.output_bias:
                offset += gradient.sum(0)
        value = op.summed(value, left, right, offset)
        return Slopes(value, left, op.merge_right(right), offset)

    def energies(self, gate: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """sum_i w_i h_i^2 for every hidden output of the columns u (r, p), (r w,)."""
        local, weights = self.op.local, self._mine[1]
        parts = [
            (weights[rows].unsqueeze(1) * local.hidden(gate, u, rows).square()).sum(0)
            for rows in local.column_batches(len(u))
        ]
        total = torch.stack(parts).sum(0)
        self.op.summed(0.0, total)
        return total

    def hessian_product(
        self, columns: Columns, b: torch.Tensor, du: torch.Tensor, dv: torch.Tensor, db: torch.Tensor | None = None
    ) -> Slopes:
        """Derivative of the gradients along (du, dv, db); `value` is the curvature, the product with it."""
        db = torch.zeros_like(b) if db is None else db
        op, loss, gate = self.op, self.problem.loss, columns.gate
        weights, change_right = op.split_right(columns.v), op.split_right(dv)
        left, right = torch.zeros_like(columns.u), torch.zeros_like(weights)
        offset = torch.zeros_like(b)
        local = op.local
        for rows in local.column_batches(2 * len(columns)):
            hidden, moved = local.hidden(gate, columns.u, rows), local.hidden(gate, du, rows)
            outputs = torch.addmm(op.once(b), hidden, weights)
            change = moved @ weights + hidden @ change_right + op.once(db)
            op.add_outputs(outputs, change)
            Y, w = (part[rows] for part in self._mine)
            gradient = loss.gradient(outputs, Y, w)
            second = loss.hessian_product(outputs, Y, w, change)
            left += local.hidden_adjoint(gate, second @ weights.T + gradient @ change_right.T, rows)
            right += hidden.T @ second + moved.T @ gradient
            offset += second.sum(0)
        op.summed(0.0, left, right, offset)
        right = op.merge_right(right)
        (curvature,) = op.over_gates(float((left * du).sum() + (right * dv).sum()))
        curvature += float((offset * db).sum())
        return Slopes(curvature, left, right, offset)
