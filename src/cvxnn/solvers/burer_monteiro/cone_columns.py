"""Columns of ReLU problems come, go, join, and cross from cell to cell."""

from __future__ import annotations

import torch

from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY, Cones
from cvxnn.dual_norms import Neurons
from cvxnn.factored import FactoredLoss
from cvxnn.solvers.burer_monteiro.cone_masses import MOST_NUMBERS, best_masses
from cvxnn.solvers.burer_monteiro.cone_newton import ConePoint, evaluate_columns

__all__ = ["Cells", "best_lengths", "feasible_columns", "fresh_columns", "merged", "spread"]

#: Columns whose directions have cosines above this are one.
_PARALLEL = 1 - 1e-12
#: How far beyond a facet the neighbouring cell is looked for, relative to the length of a column.
_BEYOND = 1e-6
#: Bits of the random numbers whose sums tell patterns apart; sums stay exact in float64.
_BITS = 52
_BLOCK = 2**22
_HALVINGS = 30


class Cells:
    """Finds the gate of a vector by its activation pattern.

    Parameters
    ----------
    cones : Cones
    """

    def __init__(self, cones: Cones) -> None:
        self.cones = cones
        n = len(cones.rows)
        device = cones.rows.device
        bits = _BITS - max(1, n).bit_length()
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(2**bits, (n,), generator=generator)
        self.numbers = numbers.to(device=device, dtype=torch.float64)
        size = max(1, _BLOCK // max(1, n))
        keys = [part.double() @ self.numbers for part in cones.patterns.split(size)]
        self.keys, self.order = torch.cat(keys).sort()

    def find(self, u: torch.Tensor) -> torch.Tensor:
        """The gate with the pattern of each row u (r, d), -1 where there is none."""
        bits = u @ self.cones.rows.T >= 0
        keys = bits.double() @ self.numbers
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        gate = self.order[place]
        same = (self.cones.patterns[gate] == bits).all(1)
        return torch.where(same, gate, -1)

    def crossed(self, loss: FactoredLoss, point: ConePoint, natural: torch.Tensor, least: float) -> ConePoint:
        """The same network with columns that are held by a facet listed in the cell beyond, where they can go on.

        A column on a facet belongs to both cells. Its minimiser over the whole space, -G_k v / beta, lies beyond
        the facet; whether it may go on there is told by the slope in that cell.

        Parameters
        ----------
        natural : torch.Tensor of shape (r, d)
            Projections of -G_k v_j / beta, u_j at stationary points.
        least : float
            Relative move in the cell beyond from which crossing is of use.
        """
        columns, beta = point.columns, loss.problem.beta
        free = -point.slopes.left / beta
        outward = free - natural
        size, length = outward.norm(dim=1), columns.u.norm(dim=1)
        held = ((size > least * length) & (length > 0)).nonzero()[:, 0]
        if len(held) == 0:
            return point
        beyond = columns.u[held] + (_BEYOND * length / size)[held, None] * outward[held]
        gate = self.find(beyond)
        other = (gate >= 0) & (gate != columns.gate[held])
        held, gate = held[other], gate[other]
        inside = self.cones.contains(gate, columns.u[held], FEASIBILITY / 10)
        held, gate = held[inside], gate[inside]
        if len(held) == 0:
            return point
        trial = evaluate_columns(loss, _in_cells(columns, held, gate), point.b)
        there = self.cones.project(gate, -trial.slopes.left[held] / beta).point
        gain = (there - columns.u[held]).norm(dim=1)
        here = (natural[held] - columns.u[held]).norm(dim=1)
        useful = gain > torch.maximum(least * length[held], 10 * here)
        if not bool(useful.any()):
            return point
        return evaluate_columns(loss, _in_cells(columns, held[useful], gate[useful]), point.b)


def _in_cells(columns: Columns, moved: torch.Tensor, gate: torch.Tensor) -> Columns:
    """The columns with other gates; never in place, as operators know lists of gates by their identity."""
    return Columns(columns.gate.index_copy(0, moved, gate), columns.u, columns.v)


def feasible_columns(cones: Cones, columns: Columns, cells: Cells | None) -> Columns:
    """Balanced columns in their cones: those outside go to the cell of their own pattern, or else are projected."""
    columns = columns.without_zeros().balanced()
    outside = (cones.violation(columns.gate, columns.u) > FEASIBILITY / 10).nonzero()[:, 0]
    if len(outside) == 0:
        return columns
    gate, u, v = columns.gate.clone(), columns.u.clone(), columns.v
    if cells is not None:
        own = cells.find(u[outside])
        gate[outside] = torch.where(own >= 0, own, gate[outside])
        outside = outside[cones.violation(gate[outside], u[outside]) > FEASIBILITY / 10]
    if len(outside):
        u[outside] = cones.project(gate[outside], u[outside]).point
    return Columns(gate, u, v).without_zeros().balanced()


def merged(cones: Cones, columns: Columns, tolerance: float) -> Columns:
    """Balanced columns without those of at most `tolerance` times the largest size, and with parallel ones joined.

    Columns with parallel u, in one cell or on a facet of two, are one with the sum of the v, and those of one
    cell with parallel v are one with the sum of the u; the objective never rises.
    """
    columns = columns.without_zeros(tolerance).balanced()
    columns = _joined_right(cones, columns)
    return _joined_left(columns)


def _joined_right(cones: Cones, columns: Columns) -> Columns:
    groups = _parallel_groups(columns.u)
    while len(groups) < len(columns):
        first = groups.first[groups.of]
        fits = cones.contains(columns.gate[first], columns.u, FEASIBILITY / 10) | (columns.gate[first] == columns.gate)
        groups.separate(~fits)
        if bool(fits.all()):
            break
    if len(groups) == len(columns):
        return columns
    # In units of the first column, v_j counts as often as u_j is longer than u_first.
    lengths = columns.u.norm(dim=1)
    v = columns.v.new_zeros(len(groups), columns.v.shape[1])
    v.index_add_(0, groups.of, columns.v * (lengths / lengths[groups.first[groups.of]])[:, None])
    return Columns(columns.gate[groups.first], columns.u[groups.first], v).without_zeros().balanced()


def _joined_left(columns: Columns) -> Columns:
    groups = _parallel_groups(columns.v, columns.gate)
    if len(groups) == len(columns):
        return columns
    lengths = columns.v.norm(dim=1)
    u = columns.u.new_zeros(len(groups), columns.u.shape[1])
    u.index_add_(0, groups.of, columns.u * (lengths / lengths[groups.first[groups.of]])[:, None])
    return Columns(columns.gate[groups.first], u, columns.v[groups.first]).without_zeros().balanced()


class _parallel_groups:
    """Rows of the same direction (and the same key), each group named by its first row."""

    def __init__(self, rows: torch.Tensor, key: torch.Tensor | None = None) -> None:
        unit = rows / rows.norm(dim=1, keepdim=True)
        # Differences resolve small angles, which cosines do not.
        same = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") < 1e-9
        if key is not None:
            same &= key[:, None] == key
        leader = same.int().argmax(1) if len(rows) else torch.zeros(0, dtype=torch.long, device=rows.device)
        self._set(leader)

    def _set(self, leader: torch.Tensor) -> None:
        self.leader = leader
        self.first, self.of = torch.unique(leader, return_inverse=True)

    def __len__(self) -> int:
        return len(self.first)

    def separate(self, alone: torch.Tensor) -> None:
        index = torch.arange(len(self.leader), device=self.leader.device)
        self._set(torch.where(alone, index, self.leader))


def spread(neurons: Neurons, most: int, cosine: float) -> torch.Tensor:
    """Indices of the best neurons whose atoms u v^T have cosines below a limit with all better ones taken."""
    order = torch.argsort(neurons.lower, descending=True)
    u, v = neurons.u[order], neurons.v[order]
    free = torch.ones(len(order), dtype=torch.bool, device=order.device)
    taken: list[int] = []
    while len(taken) < most and bool(free.any()):
        best = int(free.to(torch.uint8).argmax())
        taken.append(best)
        free &= (u @ u[best]) * (v @ v[best]) < cosine
        free[best] = False
    return order[taken]


def fresh_columns(loss: FactoredLoss, point: ConePoint, neurons: Neurons) -> ConePoint:
    """The point with neurons (u, -v) added and all masses at their best; neurons that get none are left out.

    Where the predictions of all columns are too many numbers, the new ones are added with an exact line search
    along what is best for each of them alone.
    """
    beta, columns = loss.problem.beta, point.columns
    curvature = loss.energies(neurons.gate, neurons.u).view(len(neurons), loss.op.width).sum(1)
    curvature = (loss.problem.loss.smoothness * curvature).clamp_min(1e-300)
    mass = (neurons.lower - beta).clamp_min(0) / curvature
    best, length = None, 1.0
    for _ in range(_HALVINGS):
        root = (length * mass).sqrt().unsqueeze(1)
        added = Columns.joined(columns, Columns(neurons.gate, neurons.u * root, -neurons.v * root))
        trial = evaluate_columns(loss, added, point.b)
        if trial.value < point.value and best is not None and trial.value >= best.value:
            break
        if trial.value < point.value:
            best = trial
        length /= 2
    return point if best is None else best_lengths(loss, best)


def best_lengths(loss: FactoredLoss, point: ConePoint) -> ConePoint:
    """The point with the best masses for its directions, where their predictions are not too many numbers."""
    columns = point.columns.without_zeros()
    if len(columns) * loss.Y.numel() > MOST_NUMBERS or len(columns) == 0:
        return point
    found = evaluate_columns(loss, *best_masses(loss, columns, point.b))
    return found if found.value < point.value else point
