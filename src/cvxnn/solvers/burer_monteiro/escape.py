"""Ways out of a point at which the certificate sees gates that are violated, ||G_k|| > beta."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem
from cvxnn.solvers.burer_monteiro.local import singular_pairs

__all__ = ["Violation", "new_columns", "proximal_step", "violations"]

#: Largest share of a singular vector, in length, that lies in the span of the columns that are there.
_IN_SPAN = 0.9


@dataclass
class Violation:
    """Unit singular pairs of -G_k above beta, their values, and the largest singular value of all gates over beta."""

    pairs: Columns
    values: torch.Tensor
    ratio: float


def loss_gradient(problem: Problem, loss: FactoredLoss, columns: Columns, b: torch.Tensor) -> torch.Tensor:
    """Gradient of the loss in the predictions, (n, c)."""
    outputs = loss.op.apply_columns(columns) + b
    return problem.loss.gradient(outputs, loss.Y, loss.weights)


def violations(
    problem: Problem,
    loss: FactoredLoss,
    columns: Columns,
    b: torch.Tensor,
    most: int,
    threshold: float,
    share: float,
) -> Violation:
    """At most `most` pairs per gate with a singular value above ``threshold`` times beta.

    Blocks G_k are formed a few gates at a time. Pairs that the columns of their gate already span are left
    out: there the local method has not converged, and a further column is no help. Columns smaller than
    half of `share` times the median do not count: they would grow too slowly.
    """
    op, beta = loss.op, problem.beta
    gradient = loss_gradient(problem, loss, columns, b)
    found: list[tuple[torch.Tensor, ...]] = []
    ratio = 0.0
    for batch in op.gate_batches():
        G = op.adjoint_blocks(gradient, batch)
        left, values, right = singular_pairs(-G, most)
        if len(values):
            ratio = max(ratio, float(values.max()) / beta)
        kept = values > threshold * beta
        place, which = kept.nonzero().unbind(1)
        if len(place):
            pair = left.mT[place, which], right.mT[place, which]
            found.append((place + (batch.start or 0), *pair, values[place, which]))
    if not found:
        empty = Columns(columns.gate[:0], columns.u[:0], columns.v[:0])
        return Violation(empty, gradient.new_zeros(0), ratio)
    gate, u, v, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(columns):
        columns = columns.balanced()
        sizes = columns.sizes()
        columns = columns[sizes > share / 2 * float(sizes.median())]
    outside = _outside(columns, gate, u, op.n_gates) | _outside(
        Columns(columns.gate, columns.v, columns.u), gate, v, op.n_gates
    )
    return Violation(Columns(gate, u, v)[outside], values[outside], ratio)


def _outside(columns: Columns, gate: torch.Tensor, u: torch.Tensor, n_gates: int) -> torch.Tensor:
    """Which unit vectors u_j are not nearly in the span of the columns of their gate."""
    if len(columns) == 0:
        return torch.ones_like(gate, dtype=torch.bool)
    U, _ = columns.factors(n_gates)
    basis, sizes, _ = torch.linalg.svd(U, full_matrices=False)
    basis = basis * (sizes > 1e-3 * sizes.amax(1, keepdim=True).clamp_min(1e-300)).unsqueeze(1)
    inside = torch.bmm(basis[gate].mT, u.unsqueeze(2)).squeeze(2).norm(dim=1)
    return inside < _IN_SPAN


def new_columns(problem: Problem, loss: FactoredLoss, found: Violation, present: Columns, share: float) -> Columns:
    """The pairs, as long as is best for each of them alone, shortened as they are added together.

    Their size is at least `share` times the median of the columns that are there: these make room for new
    ones, so that the best length can be far larger than that of a column alone, and tiny columns take many
    steps to grow.
    """
    pairs = found.pairs
    if len(pairs) == 0:
        return pairs
    curvature = loss.energies(pairs.gate, pairs.u).view(len(pairs), loss.op.width).sum(1)
    curvature = (problem.loss.smoothness * curvature).clamp_min(1e-300)
    size = (found.values - problem.beta) / curvature / math.sqrt(len(pairs))
    if len(present):
        size = size.clamp_min(share * float(present.sizes().median()))
    root = size.sqrt().unsqueeze(1)
    return Columns(pairs.gate, pairs.u * root, pairs.v * root)


def proximal_step(
    problem: Problem, loss: FactoredLoss, columns: Columns, b: torch.Tensor, length: float
) -> tuple[Columns, float]:
    """Z_k <- prox of length beta ||.||_* at Z_k - length G_k, gate by gate, as columns (BM-Global; Lee et al. 2024).

    The length is halved until the quadratic bound of the loss holds; the one used is returned.
    """
    op, n_gates = loss.op, loss.op.n_gates
    gradient = loss_gradient(problem, loss, columns, b)
    value = loss.slopes(columns, b).value
    U, V = columns.factors(n_gates)
    while True:
        parts, slope, distance = [], 0.0, 0.0
        for batch in op.gate_batches():
            Z = U[batch] @ V[batch].mT
            G = op.adjoint_blocks(gradient, batch)
            left, values, right = torch.linalg.svd(Z - length * G, full_matrices=False)
            root = (values - length * problem.beta).clamp_min(0).sqrt().unsqueeze(1)
            part = Columns.from_factors(left * root, right.mT * root)
            moved = (left * root.square()) @ right - Z
            slope += float((G * moved).sum())
            distance += float(moved.square().sum())
            parts.append(Columns(part.gate + (batch.start or 0), part.u, part.v).without_zeros())
        step = Columns.joined(*parts)
        bound = value + slope + distance / (2 * length)
        if loss.slopes(step, b).value <= bound + 1e-12 * abs(value) or length < 1e-300:
            return step, length
        length /= 2
