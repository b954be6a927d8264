"""The quadratic model of (19) without its matrix: conjugate gradients on the faces of a projected gradient step."""

from __future__ import annotations

import torch

from cvxnn.columns import Columns
from cvxnn.cones import Cones, Projection
from cvxnn.factored import FactoredLoss, Slopes
from cvxnn.solvers.burer_monteiro.cone_model import ModelStep
from cvxnn.solvers.burer_monteiro.curvatures import MatrixFree
from cvxnn.solvers.burer_monteiro.local import CG_ACCURACY, CG_LIMIT

__all__ = ["ConeProducts"]


class ConeProducts:
    """The Hessian of the objective at a point through products, for problems with many variables.

    Parameters are those of `ConeModel`.
    """

    def __init__(self, loss: FactoredLoss, cones: Cones, columns: Columns, b: torch.Tensor, slopes: Slopes) -> None:
        self.loss, self.cones, self.columns, self.b = loss, cones, columns, b
        self.beta, self.bias = loss.problem.beta, loss.problem.output_bias
        parts = [slopes.left + self.beta * columns.u, slopes.right + self.beta * columns.v]
        self.sizes = [columns.u.numel(), columns.v.numel(), *([len(b)] if self.bias else [])]
        self.slope = torch.cat([part.flatten() for part in (*parts, slopes.intercept)])[: sum(self.sizes)]
        self.metric = self._metric()

    def _metric(self) -> torch.Tensor:
        """Diagonal of J^T F'' J + beta I, about, with one number for all of a u_j."""
        loss, columns = self.loss, self.columns
        op, smoothness = loss.op, loss.problem.loss.smoothness
        r, w = len(columns), op.width
        energy, strength = columns.u.new_zeros(r * w), columns.u.new_zeros(r)
        for rows in op.column_batches(len(columns)):
            hidden = op.hidden(columns.gate, columns.u, rows)
            weights = loss.weights[rows].unsqueeze(1)
            energy += smoothness * (weights * hidden.square()).sum(0)
            active = (hidden != 0).view(-1, r, w) * op.row_squares[rows].unsqueeze(1)
            strength += smoothness * (weights * active.mean(2)).sum(0)
        of_u = (strength * columns.v.square().sum(1)).unsqueeze(1).expand_as(columns.u)
        of_v = op.merge_right(energy.unsqueeze(1).expand(-1, loss.Y.shape[1]))
        of_b = smoothness * loss.weights.sum().expand(len(self.b) if self.bias else 0)
        return torch.cat([of_u.flatten(), of_v.flatten(), of_b]) + self.beta

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = x.split(self.sizes)
        return (parts[0].view_as(self.columns.u), parts[1].view_as(self.columns.v), *parts[2:])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The Hessian times x."""
        du, dv, *db = self._split(x)
        slopes = self.loss.hessian_product(self.columns, self.b, du, dv, *db)
        left, right = slopes.left + self.beta * du, slopes.right + self.beta * dv
        return torch.cat([left.flatten(), right.flatten(), slopes.intercept])[: len(x)]

    def minimise(self, start: Projection, damping: float) -> ModelStep | None:
        """A feasible target: a projected gradient step on the model, then conjugate gradients on its faces."""
        columns, size = self.columns, self.sizes[0]
        metric = (1 + damping) * self.metric
        first = -self.slope / metric
        projection = self.cones.project(columns.gate, columns.u + self._split(first)[0], start)
        first[:size] = (projection.point - columns.u).flatten()
        tangent = self.cones.tangent(projection, columns.gate)

        def on_faces(x: torch.Tensor) -> torch.Tensor:
            du = torch.einsum("rab,rb->ra", tangent, self._split(x)[0])
            return torch.cat([du.flatten(), x[size:]])

        curvature = MatrixFree(
            lambda x: on_faces(self.product(x)),
            lambda x: self.metric * x,
            lambda x, _: x / metric,
            CG_LIMIT,
            CG_ACCURACY,
        )
        slope = self.slope + self.product(first) + damping * self.metric * first
        solved = curvature.step(on_faces(slope), damping)
        step = first if solved is None else first + solved[0]
        return self._target(step, projection, damping) or self._target(first, projection, damping)

    def _target(self, step: torch.Tensor, faces: Projection, damping: float) -> ModelStep | None:
        columns = self.columns
        du, dv, *db = self._split(step)
        u = self.cones.project(columns.gate, columns.u + du, faces).point
        feasible = torch.cat([(u - columns.u).flatten(), step[self.sizes[0] :]])
        bend = float(feasible @ (self.product(feasible) + damping * self.metric * feasible))
        promised = -float(self.slope @ feasible) - bend / 2
        if not promised > 0 or not float(self.slope @ feasible) < 0:
            return None
        return ModelStep(u, columns.v + dv, self.b + db[0] if self.bias else self.b, promised, False)
