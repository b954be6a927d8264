"""Any loss: both factors and the intercept are variables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvxnn.columns import Columns
from cvxnn.solvers.burer_monteiro.curvatures import Curvature, Dense, MatrixFree
from cvxnn.solvers.burer_monteiro.grams import gate_grams
from cvxnn.solvers.burer_monteiro.local import (
    CG_ACCURACY,
    CG_LIMIT,
    LocalProblem,
    absolute_blocks,
    block_slopes,
    jacobian,
    selected_features,
    violated,
)

__all__ = ["Joint"]


class Joint(LocalProblem):
    """(14) in (U, V, b); the variables are u (r, p), v (r, q) and, with an output bias, b (c,)."""

    @property
    def n_variables(self) -> int:
        _, p, q = self.op.block_shape
        return len(self.gate) * (p + q) + (self.loss.Y.shape[1] if self.problem.output_bias else 0)

    def variables(self, columns: Columns, intercept: torch.Tensor) -> list[torch.Tensor]:
        parts = [columns.u, columns.v]
        return [*parts, intercept] if self.problem.output_bias else parts

    def point(self, parts: Sequence[torch.Tensor]) -> tuple[Columns, torch.Tensor]:
        b = parts[2] if self.problem.output_bias else parts[0].new_zeros(self.loss.Y.shape[1])
        return Columns(self.gate, parts[0], parts[1]), b

    def evaluate(self, parts: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        columns, b = self.point(parts)
        slopes = self.loss.slopes(columns, b)
        penalty = self.beta / 2 * float(columns.u.square().sum() + columns.v.square().sum())
        gradients = [slopes.left.add_(columns.u, alpha=self.beta), slopes.right.add_(columns.v, alpha=self.beta)]
        return slopes.value + penalty, [*gradients, slopes.intercept][: len(parts)]

    def curvature(self, parts: Sequence[torch.Tensor], dense: bool) -> Curvature:
        """J^T F'' J, and the blocks [beta I, G_k; G_k^T, beta I] of each column, which can be indefinite."""
        columns, b = self.point(parts)
        return self._dense(columns, b) if dense else self._matrix_free(columns, b)

    def _matrix_free(self, columns: Columns, b: torch.Tensor) -> MatrixFree:
        op, loss, beta = self.op, self.loss, self.beta
        u, v = columns.u, columns.v
        outputs = op.apply_columns(columns) + b
        gradient = self.problem.loss.gradient(outputs, loss.Y, loss.weights)
        place, w, x, values = violated(loss, self.gates, gradient, beta)
        column, pair = (self.place.unsqueeze(1) == place.unsqueeze(0)).nonzero().unbind(1)
        # The eigenvalue beta - sigma of (w, -x) / sqrt(2) becomes sigma - beta.
        w, x, lift = w[pair], x[pair], (values[pair] - beta).unsqueeze(1)
        sizes = [u.numel(), v.numel(), *([len(b)] if self.problem.output_bias else [])]

        def split(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parts = flat.split(sizes)
            return (parts[0].view_as(u), parts[1].view_as(v), *parts[2:])

        def product(flat: torch.Tensor) -> torch.Tensor:
            du, dv, *db = split(flat)
            slopes = loss.hessian_product(columns, b, du, dv, *db)
            left, right = slopes.left + beta * du, slopes.right + beta * dv
            if len(pair):
                inner = lift * ((w * du[column]).sum(1) - (x * dv[column]).sum(1)).unsqueeze(1)
                left.index_add_(0, column, inner * w)
                right.index_add_(0, column, -inner * x)
            return torch.cat([left.flatten(), right.flatten(), slopes.intercept])[: len(flat)]

        smoothness = self.problem.loss.smoothness
        blocks = self.grams().columns(self.gate, smoothness * v.square().sum(1))
        energy = smoothness * self._energies(columns) + beta
        offset = smoothness * float(loss.weights.sum())

        def metric(flat: torch.Tensor) -> torch.Tensor:
            du, dv, *db = split(flat)
            return torch.cat([blocks.power(du, beta, 1).flatten(), (energy * dv).flatten(), *(offset * d for d in db)])

        def precondition(flat: torch.Tensor, damping: float) -> torch.Tensor:
            du, dv, *db = split(flat)
            more = 1 + damping
            left = blocks.power(du, more * beta, -1, more)
            return torch.cat([left.flatten(), (dv / (more * energy)).flatten(), *(d / (more * offset) for d in db)])

        return MatrixFree(product, metric, precondition, CG_LIMIT, CG_ACCURACY)

    def _energies(self, columns: Columns) -> torch.Tensor:
        """sum_i w_i h_i^2 of the hidden output that each entry of v weighs, (r, q)."""
        energies = self.loss.energies(columns.gate, columns.u)
        return self.op.merge_right(energies.unsqueeze(1).expand(-1, self.loss.Y.shape[1]))

    def _dense(self, columns: Columns, b: torch.Tensor) -> Dense:
        op, loss, beta = self.op, self.loss, self.beta
        rows = slice(0, op.n_samples)
        u, v = columns.u, columns.v
        (r, p), q = u.shape, v.shape[1]
        hidden = op.hidden(self.gate, u, rows)
        outputs = torch.addmm(b, hidden, op.split_right(v))
        gradient = self.problem.loss.gradient(outputs, loss.Y, loss.weights)
        Phi = selected_features(loss, self.gate)
        J = jacobian(op, Phi, hidden, v, self.problem.output_bias)
        second = self.problem.loss.hessian_product(outputs, loss.Y, loss.weights, J)
        H = J.flatten(1) @ second.flatten(1).T
        H = (H + H.T) / 2
        first = torch.zeros_like(self.gates).scatter_(0, self.place, torch.arange(r, device=u.device))
        G = block_slopes(op, Phi[:, first], gradient)
        blocks = beta * torch.eye(p + q, dtype=u.dtype, device=u.device).repeat(len(G), 1, 1)
        blocks[:, :p, p:], blocks[:, p:, :p] = G, G.mT
        index = torch.arange(r, device=u.device).unsqueeze(1)
        where = torch.cat([index * p + torch.arange(p), r * p + index * q + torch.arange(q)], 1)
        H[where.unsqueeze(2), where.unsqueeze(1)] += absolute_blocks(blocks)[self.place]
        smoothness = self.problem.loss.smoothness
        metric = torch.zeros_like(H)
        grams = gate_grams(loss, self.gates)[self.place] * (smoothness * v.square().sum(1)).view(r, 1, 1)
        metric[where[:, :p].unsqueeze(2), where[:, :p].unsqueeze(1)] = grams
        metric.diagonal()[r * p : r * (p + q)] += smoothness * self._energies(columns).flatten()
        metric.diagonal()[: r * (p + q)] += beta
        metric.diagonal()[r * (p + q) :] += smoothness * float(loss.weights.sum())
        return Dense(H, metric)

    def products_are_cheap(self) -> bool:
        return False

    def curvature_cost(self) -> float:
        N = self.n_variables
        return 2 * N**2 * self.op.n_samples * self.loss.Y.shape[1] + N**3 / 3
