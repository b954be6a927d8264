"""Second order at points of the ReLU problem (19): the Hessian on faces of the cones, and free columns."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cvxnn.certificates import Evaluation
from cvxnn.cone_stationarity import Faces
from cvxnn.cone_witness import DescentNeuron
from cvxnn.curvature import ColumnHessian, Curvature, smallest_pair
from cvxnn.problem import Problem

__all__ = ["face_curvature", "free_curvature"]


class _FaceHessian(ColumnHessian):
    """The Hessian in the columns that are not zero, each u_j confined to the span of its face.

    The variables are the coordinates of du_j in an orthonormal basis of the span, and dv_j.
    """

    def __init__(self, problem: Problem, faces: Faces, intercept: Tensor) -> None:
        width = int(faces.dimension.max())
        self.basis = faces.basis[:, :, :width]
        #: Which coordinates (r, width) are there.
        self.inside = torch.arange(width, device=self.basis.device) < faces.dimension[:, None]
        super().__init__(problem, faces.residuals.columns, intercept)

    @property
    def size(self) -> int:
        return int(self.inside.sum()) + self.columns.v.numel()

    def join(self, u: Tensor, v: Tensor) -> np.ndarray:
        coordinates = torch.einsum("rds,rd->rs", self.basis, u)[self.inside]
        return torch.cat([coordinates, v.reshape(-1)]).cpu().numpy()

    def split(self, x: np.ndarray) -> tuple[Tensor, Tensor]:
        tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).to(self.basis.device)
        inner = int(self.inside.sum())
        coordinates = self.basis.new_zeros(self.inside.shape)
        coordinates[self.inside] = tensor[:inner]
        return torch.einsum("rds,rs->rd", self.basis, coordinates), tensor[inner:].view(self.columns.v.shape)


def face_curvature(
    problem: Problem,
    point: Evaluation,
    faces: Faces,
    places: Tensor,
    *,
    tolerance: float,
    max_products: int,
) -> Curvature:
    """The smallest eigenvalue on the spans of faces.

    Parameters
    ----------
    places : Tensor of shape (r,), long
        Where in U and V (gate times m plus column) the columns of `faces` are.
    tolerance, max_products
        As for :func:`cvxnn.curvature.smallest_curvature`.
    """
    assert point.factors is not None
    hessian = _FaceHessian(problem, faces, point.intercept)
    worst = int(faces.ratio.argmax())
    du, dv = torch.zeros_like(hessian.columns.u), torch.zeros_like(hessian.columns.v)
    du[worst], dv[worst] = hessian.columns.u[worst], -hessian.columns.v[worst]
    seed = hessian.join(du, dv)
    found, converged, scale, method = smallest_pair(hessian, seed, tolerance, max_products)
    shares = hessian.shares(found.vector)
    changes = hessian.split(found.vector)
    return Curvature(
        value=found.value,
        residual=found.residual,
        converged=converged,
        gate=int(shares.argmax()),
        share=float(shares.max()),
        method=method,
        n_products=hessian.n_products,
        scale=scale,
        direction=_placed(point.factors, places, *changes),
    )


def free_curvature(problem: Problem, point: Evaluation, place: int, neuron: DescentNeuron) -> Curvature:
    """beta - ||G_k^T u|| of a zero column, whose change (u, v)/sqrt(2) stays in the cone (its negative does not)."""
    assert point.factors is not None
    root = 1 / math.sqrt(2)
    direction = _placed(
        point.factors,
        torch.tensor([place], device=neuron.u.device),
        root * neuron.u.unsqueeze(0),
        root * neuron.v.unsqueeze(0),
    )
    value = problem.beta * (1 - neuron.ratio)
    return Curvature(value, 0.0, True, neuron.gate, 1.0, "free column", 0, problem.beta * (1 + neuron.ratio), direction)


def _placed(factors: tuple[Tensor, Tensor], places: Tensor, du: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of some columns as changes of (U, V)."""
    changes = []
    for part, rows in zip(factors, (du, dv), strict=True):
        n_gates, length, m = part.shape
        full = part.new_zeros(n_gates * m, length)
        full[places] = rows
        changes.append(full.view(n_gates, m, length).mT)
    return changes[0], changes[1]
