"""Active rows of many small quadratic programs, with the factors that adding and dropping a row updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cvxnn.cones.projection import Constraints

__all__ = ["DEPENDENT", "NEGATIVE", "ActiveSets", "apply", "split"]

DEPENDENT = 1e-13  # a unit row this close to the span of the active rows counts as dependent
NEGATIVE = 1e-13  # multipliers above -this, relative to the largest, are zero


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of matrices (..., k, l) and vectors (..., l)."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def split(basis: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients in an orthonormal basis (s, d, m), and the rest, orthogonal to it to rounding."""
    coefficient = apply(basis.mT, vector)
    rest = vector - apply(basis, coefficient)
    correction = apply(basis.mT, rest)
    return coefficient + correction, rest - apply(basis, correction)


class ActiveSets:
    """Active rows of r pairs in slots, in any order: K_A^T = Q R, Q orthonormal; empty slots hold zeros.

    `inverse` is R^-1. A row is dropped by the Householder reflection that turns the direction leaving the span
    into its own slot, so R need not be triangular. `stale` marks pairs whose factors saw such an update.
    """

    def __init__(self, z: Tensor, width: int, shifted: bool) -> None:
        r, d = z.shape
        self.z, self.point, self.shifted = z, z.clone(), shifted
        self.basis, self.inverse = z.new_zeros(r, d, width), z.new_zeros(r, width, width)
        self.index = torch.full((r, width), -1, dtype=torch.long, device=z.device)
        self.multiplier, self.bound = z.new_zeros(r, width), z.new_zeros(r, width)
        self.stale = torch.zeros(r, dtype=torch.bool, device=z.device)
        self.status = torch.zeros(r, dtype=torch.long, device=z.device)

    def add(self, pairs: Tensor, slot: Tensor, row: Tensor, bound: Tensor, parts: tuple[Tensor, Tensor]) -> None:
        """Put a row into an empty slot; `parts` are its coefficients in the active rows and the rest."""
        direction, rest = parts
        scale = 1 / rest.norm(dim=1, keepdim=True)
        self.basis[pairs, :, slot] = rest * scale
        self.inverse[pairs, : direction.shape[1], slot] = direction * -scale
        self.inverse[pairs, slot, slot] = scale[:, 0]
        self.index[pairs, slot] = row
        self.bound[pairs, slot] = bound

    def drop(self, pairs: Tensor, slot: Tensor) -> None:
        """Empty a slot."""
        basis, inverse = self.basis[pairs], self.inverse[pairs]
        every = torch.arange(len(pairs), device=pairs.device)
        mirror = inverse[every, slot]
        mirror = mirror / mirror.norm(dim=1, keepdim=True)
        mirror[every, slot] += torch.where(mirror[every, slot] < 0, -1.0, 1.0)
        twice = 2 * mirror / (mirror * mirror).sum(1, keepdim=True)
        basis -= apply(basis, mirror)[:, :, None] * twice[:, None, :]
        inverse -= apply(inverse, mirror)[:, :, None] * twice[:, None, :]
        basis[every, :, slot], inverse[every, :, slot], inverse[every, slot] = 0.0, 0.0, 0.0
        self.basis[pairs], self.inverse[pairs] = basis, inverse
        self.index[pairs, slot] = -1
        self.multiplier[pairs, slot], self.bound[pairs, slot] = 0.0, 0.0
        self.stale[pairs] = True

    def solution(self, pairs: Tensor) -> None:
        """Point and multipliers of min 1/2 ||y - z||^2 s.t. K_A y = b_A."""
        basis, inverse, z = self.basis[pairs], self.inverse[pairs], self.z[pairs]
        level = apply(inverse.mT, self.bound[pairs]) if self.shifted else 0.0
        step = level - apply(basis.mT, z)
        point = z + apply(basis, step)
        correction = level - apply(basis.mT, point)
        self.point[pairs] = point + apply(basis, correction)
        self.multiplier[pairs] = apply(inverse, step + correction)

    def settle(self, pairs: Tensor, width: int) -> None:
        """Remove the rounding error of the active slacks (the first `width` slots hold all of them)."""
        basis, point = self.basis[:, :, :width][pairs], self.point[pairs]
        level = apply(self.inverse[:, :width, :width][pairs].mT, self.bound[pairs, :width]) if self.shifted else 0.0
        self.point[pairs] = point + apply(basis, level - apply(basis.mT, point))

    def factor(self, constraints: Constraints, pairs: Tensor, index: Tensor) -> None:
        """Factors of the given active rows from scratch, without those that depend on others."""
        for part in (self.basis, self.inverse, self.bound, self.multiplier):
            part[pairs] = 0.0
        self.index[pairs] = -1
        index = index.sort(dim=1, descending=True).values
        for j in range(min(self.index.shape[1], int((index >= 0).sum(1).max()))):
            row = index[:, j]
            normal = constraints.normals(pairs, row.clamp_min(0))
            coefficient, rest = split(self.basis[pairs], normal)
            keep = ((row >= 0) & (rest.norm(dim=1) > DEPENDENT * normal.norm(dim=1))).nonzero()[:, 0]
            bound = constraints.bounds(pairs[keep], row[keep])
            direction = apply(self.inverse[pairs[keep]], coefficient[keep])
            self.add(pairs[keep], torch.full_like(keep, j), row[keep], bound, (direction, rest[keep]))
        self.solution(pairs)
        self.stale[pairs] = False

    def restore(self, constraints: Constraints, pairs: Tensor, index: Tensor) -> None:
        """Factors of (a subset of) the given rows, such that all multipliers are non-negative."""
        self.factor(constraints, pairs, index)
        negative = pairs
        while len(negative):
            least, slot = self.multiplier[negative].min(dim=1)
            wrong = least < -NEGATIVE * self.multiplier[negative].abs().amax(1)
            negative, slot = negative[wrong], slot[wrong]
            self.drop(negative, slot)
            self.solution(negative)
        changed = pairs[self.stale[pairs]]
        if len(changed):
            self.factor(constraints, changed, self.index[changed])
        self.multiplier[pairs] = self.multiplier[pairs].clamp_min(0)

    def multipliers(self, constraints: Constraints) -> tuple[Tensor, Tensor]:
        """Multipliers after one step of refinement, and K^T lambda formed from them."""
        pairs = torch.arange(len(self.z), device=self.z.device)
        active = (self.index >= 0).to(self.z.dtype)
        normals = constraints.normals(pairs, self.index.clamp_min(0)) * active[:, :, None]
        error = self.point - self.z - apply(normals.mT, self.multiplier)
        correction = apply(self.inverse, apply(self.basis.mT, error))
        multiplier = (self.multiplier + correction * active).clamp_min(0)
        return multiplier, apply(normals.mT, multiplier)
