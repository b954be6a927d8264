"""Stationary points of the ReLU problem (19), column by column: (72), the faces of the cones, and local minimality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cvxnn.columns import Columns
from cvxnn.cones import Cones
from cvxnn.dual_norms import blocks_of
from cvxnn.problem import Problem

__all__ = ["ConeResiduals", "Faces", "cone_residuals", "counted_zeros", "neighbours", "zero_columns"]

#: Slacks of unit rows and unit columns up to which a row is active.
ACTIVE = 1e-8
#: Columns with a residual above this, relative to their own size, are too rough to judge.
RESOLVED = 1e-3
#: Columns of at most this size, relative to the largest, are zeros.
_VANISHED = 1e-14
#: Directions of the active rows with a singular value below this depend on the others.
_DEPENDENT = 1e-9
_ENTRIES = 1 << 22


@dataclass(frozen=True)
class ConeResiduals:
    """(69) and (72) at columns of a ReLU problem, each with its multipliers.

    With z_j = -G_k v_j / beta, (72) is u_j = Proj_k(z_j), and its multipliers are beta times those of the projection.

    Attributes
    ----------
    columns : Columns
    left : Tensor of shape (r, d)
        u_j - Proj_k(z_j).
    right : Tensor of shape (r, c)
        v_j + G_k^T u_j / beta.
    index : Tensor of shape (r, a), long
        Rows (of ``cones.rows``) with a multiplier, -1 in the padding.
    multiplier : Tensor of shape (r, a)
        mu_j / beta, with respect to rows of norm 1.
    """

    columns: Columns
    left: Tensor
    right: Tensor
    index: Tensor
    multiplier: Tensor

    @property
    def sizes(self) -> Tensor:
        """||(u_j, v_j)||, (r,)."""
        return column_sizes(self.columns)

    @property
    def own(self) -> Tensor:
        """Residuals relative to the size of the column itself, (r,)."""
        norms = torch.hypot(torch.linalg.vector_norm(self.left, dim=1), torch.linalg.vector_norm(self.right, dim=1))
        return torch.where(norms > 0, norms / self.sizes, 0.0)

    def __getitem__(self, chosen: Tensor) -> ConeResiduals:
        parts = (self.left, self.right, self.index, self.multiplier)
        return ConeResiduals(self.columns[chosen], *(part[chosen] for part in parts))


def column_sizes(columns: Columns) -> Tensor:
    """||(u_j, v_j)||, (r,)."""
    return torch.hypot(torch.linalg.vector_norm(columns.u, dim=1), torch.linalg.vector_norm(columns.v, dim=1))


def cone_residuals(problem: Problem, columns: Columns, nu: Tensor) -> ConeResiduals:
    """The residuals of (69) and (72) of each column, divided by beta.

    Parameters
    ----------
    problem : Problem
        With cones.
    columns : Columns
        In float64; zeros are fine.
    nu : Tensor of shape (n, c)
        The gradient of the loss at the predictions, finite.
    """
    assert problem.cones is not None
    left, right = problem.operator.double().adjoint_columns(columns, nu)
    found = problem.cones.project(columns.gate, -left / problem.beta)
    return ConeResiduals(
        columns, columns.u - found.point, columns.v + right / problem.beta, found.index, found.multiplier
    )


def zero_columns(columns: Columns, tol: float) -> Tensor:
    """Which columns are zero beside the largest one, (r,) bool."""
    sizes = column_sizes(columns)
    return sizes <= tol * sizes.max()


def counted_zeros(problem: Problem, columns: Columns, zero: Tensor, padding: bool) -> Tensor:
    """Which of the zero columns are columns that can move, (r,) bool.

    Where all neurons are allowed the point is a network, and a gate of zeros alone holds none of its neurons. What is
    small but not zero up to rounding always counts.
    """
    sizes = column_sizes(columns)
    there = sizes > _VANISHED * sizes.max()
    if padding:
        return zero & there
    if problem.scope != "relu_network" or bool(zero.all()):
        return zero
    used = torch.zeros(problem.n_gates, dtype=torch.bool, device=zero.device)
    used[columns.gate[there]] = True
    return zero & used[columns.gate]


def neighbours(cones: Cones, columns: Columns) -> Columns:
    """The columns again, in every other gate whose cone has them: neurons on faces belong to several cells."""
    slack = cones.slack(columns.gate, columns.u / torch.linalg.vector_norm(columns.u, dim=1, keepdim=True))
    inactive = slack > ACTIVE
    border = (~inactive).any(1).nonzero()[:, 0]
    if len(border) == 0:
        return columns[border]
    wanted = (columns.u[border] @ cones.rows.T > 0).to(torch.float32)
    counts = inactive[border].to(torch.float32)
    weights = (counts * (1 - 2 * wanted)).T
    offset = (counts * wanted).sum(1)
    pairs, start = [], 0
    for part in cones.patterns.split(max(1, _ENTRIES // max(1, len(cones.rows)))):
        # The number of inactive rows on which pattern and column disagree, exact in float32.
        different = part.to(torch.float32) @ weights + offset
        different[columns.gate[border] - start == torch.arange(len(part), device=border.device)[:, None]] = 1
        gate, which = (different == 0).nonzero(as_tuple=True)
        pairs.append((gate + start, border[which]))
        start += len(part)
    gate, which = (torch.cat(side) for side in zip(*pairs, strict=True))
    return Columns(gate, columns.u[which], columns.v[which])


@dataclass(frozen=True)
class Faces:
    """Where columns lie in their cones, and what that says about small changes of them.

    With A the active rows of column j that have a clearly positive multiplier and S = {u : A u = 0}, let
    h_j(u, v) = u^T G_k v + beta/2 (||u||^2 + ||v||^2). Convexity of the loss gives objective(x) - objective(x_0)
    >= sum_j h_j(x) - h_j(x_0) with h_j(x_0) = 0 at a stationary point. For u = s + w, s in S and w orthogonal to it,

        h_j(u, v) >= (beta - ||P_S G_k||_2) (||s||^2 + ||v||^2)/2 + ||w|| (c_j - ||G_k|| ||v - v_j||)

    with c_j = min mu_j times the least singular value of A. So where ||P_S G_k||_2 <= beta for all columns, none
    lowers the objective with ||v - v_j|| <= c_j / ||G_k||, whatever u is in the cone.

    Attributes
    ----------
    residuals : ConeResiduals
        Of columns that are not zero.
    tol : float
    ratio : Tensor of shape (r,)
        ||P_S G_k||_2 / beta.
    radius : Tensor of shape (r,)
        c_j / (||G_k||_2 ||v_j||), infinite where no row has a multiplier.
    normals : Tensor of shape (r, a, d)
        The rows A, zeros in place of others.
    basis : Tensor of shape (r, d, d)
        Orthonormal columns, those of S first.
    dimension : Tensor of shape (r,), long
        Of S.
    """

    residuals: ConeResiduals
    cones: Cones
    tol: float
    ratio: Tensor
    radius: Tensor
    normals: Tensor
    basis: Tensor
    dimension: Tensor

    @classmethod
    def of(cls, problem: Problem, residuals: ConeResiduals, nu: Tensor, tol: float) -> Faces:
        """The faces of columns that are not zero.

        A multiplier is clear where it is above `tol` and ten times the residual, relative to the column.
        """
        cones, columns = problem.cones, residuals.columns
        assert cones is not None
        size = residuals.sizes
        clear = residuals.multiplier > (torch.clamp_min(10 * residuals.own, tol) * size)[:, None]
        clear &= residuals.index >= 0
        normals = cones.normals(columns.gate, torch.where(clear, residuals.index, -1))
        _, values, right = torch.linalg.svd(normals, full_matrices=True)
        rank = (values > _DEPENDENT).sum(1)
        d = columns.u.shape[1]
        basis = right.mT.flip(2)
        inside = torch.arange(d, device=rank.device) < (d - rank)[:, None]
        gates, place = columns.gate.unique(return_inverse=True)
        G = blocks_of(problem.operator.double(), nu, gates)[place]
        ratio = torch.linalg.matrix_norm((basis.mT @ G) * inside[:, :, None], ord=2) / problem.beta
        least = torch.where(values > _DEPENDENT, values, math.inf).amin(1) if values.shape[1] else rank + math.inf
        least = least * torch.where(clear, residuals.multiplier, math.inf).amin(1) if clear.shape[1] else least
        norms = torch.linalg.matrix_norm(G, ord=2) * torch.linalg.vector_norm(columns.v, dim=1)
        radius = torch.where(rank > 0, problem.beta * least / norms, math.inf)
        return cls(residuals, cones, tol, ratio, radius, normals, basis, d - rank)

    def __len__(self) -> int:
        return len(self.ratio)

    @property
    def passes(self) -> Tensor:
        """Which columns no small change of them can make better, (r,) bool."""
        own = self.residuals.own
        return (own <= RESOLVED) & (self.ratio <= 1 + 10 * self.tol + 2 * own)

    @cached_property
    def active(self) -> Tensor:
        """Which rows are active, (r, n') bool."""
        columns = self.residuals.columns
        unit = columns.u / torch.linalg.vector_norm(columns.u, dim=1, keepdim=True)
        return self.cones.slack(columns.gate, unit) <= ACTIVE

    @cached_property
    def weak(self) -> Tensor:
        """Number of active rows outside the span of the rows with clear multipliers, (r,)."""
        span = (
            self.basis
            * (torch.arange(self.basis.shape[2], device=self.basis.device) < self.dimension[:, None])[:, None, :]
        )
        counts = torch.zeros_like(self.dimension)
        for part in self.cones.blocks(len(self)):
            # Squared norms of the parts in S of all rows.
            inside = torch.einsum("nd,rde->rne", self.cones.rows, span[part]).square().sum(2)
            counts[part] = (self.active[part] & (inside > _DEPENDENT)).sum(1)
        return counts

    def tight(self) -> Faces:
        """The same with all active rows in A: the smallest faces, along which both directions are feasible."""
        bases, dimensions = torch.zeros_like(self.basis), torch.zeros_like(self.dimension)
        for j in range(len(self)):
            rows = self.cones.rows[self.active[j]]
            _, values, right = torch.linalg.svd(rows, full_matrices=True)
            bases[j], dimensions[j] = right.T.flip(1), len(right) - int((values > _DEPENDENT).sum())
        return Faces(self.residuals, self.cones, self.tol, self.ratio, self.radius, self.normals, bases, dimensions)

    def admits(self, du: Tensor) -> bool:
        """Whether a small step along du (r, d) violates no active row."""
        gate = self.residuals.columns.gate
        scale = float(torch.linalg.vector_norm(du, dim=1).max())
        return bool((self.cones.slack(gate, du)[self.active] >= -ACTIVE * scale).all())
