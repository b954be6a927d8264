"""Branch and bound over simplicial cones of hidden weights: the dual norm of all ReLU neurons in low dimension.

Cones are halved breadth first, the samples of unsettled sign handed down, and dropped once their bound is not
above the best value found. A sample leaves a cone's list when its sign is constant there.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxnn.neurons.ascent import neuron_values, polish
from cvxnn.neurons.relaxation import Relaxation, halved, orthants
from cvxnn.norms.base import EPS

__all__ = ["Branching", "branch_and_bound"]

CHUNK = 2**18  # samples of unsettled sign, times dimension, that are looked at together
NEW_WITNESSES = 4
HOPELESS = 1.5  # bounds above this multiple of what is needed get no better slopes


@dataclass(frozen=True)
class Branching:
    """Result of `branch_and_bound`: bounds of the maximum, the best point (r,), cones bounded, cones left open."""

    lower: float
    upper: float
    point: Tensor
    nodes: int
    open: int


@dataclass(frozen=True)
class _Cones:
    """Vertices (B, r, r) in rows, linear part (B, r, c), samples of unsettled sign (B, A) padded with n.

    `side` (B,) is the sign of the value that is bounded where c = 1, and 1 otherwise; `bound` (B,).
    """

    vertices: Tensor
    linear: Tensor
    index: Tensor
    side: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.bound)

    def __getitem__(self, chosen: Tensor | slice) -> "_Cones":
        parts = (self.vertices, self.linear, self.index, self.side, self.bound)
        return _Cones(*(part[chosen] for part in parts))


def branch_and_bound(
    X: Tensor,
    nu: Tensor,
    point: Tensor,
    *,
    tol: float = 1e-6,
    target: float | None = None,
    max_nodes: int = 200_000,
    deadline: float = math.inf,
) -> Branching:
    """Bounds of max ||sum_i (x_i . u)_+ nu_i||_2 over unit u.

    Parameters
    ----------
    X, nu : Tensor of shape (n, r) and (n, c), float64
        Of moderate scale (no entry whose square over- or underflows).
    point : Tensor of shape (r,)
        A good unit vector: its value prunes.
    tol : float
        Relative width at which to stop.
    target : float, optional
        Stop when the upper bound is at most this, or when the value of a point is above it.
    max_nodes : int
        Stop, soundly, when at least this many cones were bounded.
    deadline : float
        Stop, soundly, at this value of time.monotonic().

    Returns
    -------
    Branching
        `lower` is the value at `point` in floating point; `upper` has its rounding allowance included.
    """
    search = _Search(X, nu, point, tol, target)
    level, depth, ready = search.explore([search.roots()], max_nodes, deadline), 0, True
    while level and ready and depth < 40 * X.shape[1] ** 2 and not search.above_target():
        depth += 1
        level = search.explore([_children(cones) for cones in level], max_nodes, deadline)
        ready = search.nodes < max_nodes and time.monotonic() < deadline
    left = max([search.pruned, search.lower] + [float(cones.bound.amax()) for cones in level])
    upper = left * (1 + 16 * X.shape[1] ** 2 * EPS) + _allowance(X, nu, depth)
    return Branching(search.lower, upper, search.point, search.nodes, sum(map(len, level)))


def _allowance(X: Tensor, nu: Tensor, depth: int) -> float:
    """Rounding of the sums, of the signs of samples, and of the vertices, whose cones leave slits at each level.

    All are multiples of eps sum_i ||x_i|| ||nu_i||; sqrt(r) is the largest sum of t.
    """
    (n, r), c = X.shape, nu.shape[1]
    total = float((torch.linalg.vector_norm(X, dim=1) * torch.linalg.vector_norm(nu, dim=1)).sum())
    return 2 * (n + 8 * r + 8 * c + (4 * math.sqrt(r) + 1) * depth + 64) * math.sqrt(r) * EPS * total


class _Search:
    """The best point found, the largest bound among the cones that were pruned, and the bounds of new cones."""

    def __init__(self, X: Tensor, nu: Tensor, point: Tensor, tol: float, target: float | None) -> None:
        self.X, self.nu = X, nu
        self.rows = torch.cat([X, X.new_zeros(1, X.shape[1])])
        self.weights = torch.cat([nu, nu.new_zeros(1, nu.shape[1])])
        self.tol, self.target = tol, target
        self.point, self.lower, self.pruned, self.nodes = point, 0.0, 0.0, 0
        self.offer(point[None])
        self.margin = _allowance(X, nu, 100)

    def above_target(self) -> bool:
        return self.target is not None and self.lower > self.target

    def threshold(self) -> float:
        """Cones with at most this bound are settled."""
        gap = self.lower * (1 + self.tol)
        return gap if self.target is None else max(gap, self.target - self.margin)

    def offer(self, points: Tensor) -> None:
        """Keep the best of unit points (k, r)."""
        value = neuron_values(self.X, self.nu, points)[0]
        best = int(value.argmax())
        if float(value[best]) > self.lower:
            self.lower, self.point = float(value[best]), points[best]

    def roots(self) -> _Cones:
        """All orthants, for both signs of the value where c = 1."""
        (n, r), c = self.X.shape, self.nu.shape[1]
        side = self.X.new_tensor([1.0, -1.0] if c == 1 else [1.0])
        vertices = orthants(r, self.X).repeat(len(side), 1, 1)
        B = len(vertices)
        index = torch.arange(n, device=self.X.device).expand(B, n)
        return _Cones(
            vertices, self.X.new_zeros(B, r, c), index, side.repeat_interleave(2**r), self.X.new_full((B,), math.inf)
        )

    def explore(self, new: list[_Cones], max_nodes: int, deadline: float) -> list[_Cones]:
        """Cones that remain after bounding; those that time does not allow keep the bounds of their parents."""
        kept: list[_Cones] = []
        for cones in _chunks(new, self.X.shape[0]):
            out_of_time = bool(kept or self.nodes) and (self.nodes >= max_nodes or time.monotonic() > deadline)
            if not out_of_time:
                cones = self._bounded(cones)
            done = cones.bound <= self.threshold()
            if bool(done.any()):
                self.pruned = max(self.pruned, float(cones.bound[done].amax()))
                cones = cones[~done]
            if len(cones):
                kept.append(cones)
        return kept

    def _bounded(self, cones: _Cones) -> _Cones:
        self.nodes += len(cones)
        cones, values = self._settle_signs(cones)
        rows, nu = self.rows[cones.index], self.weights[cones.index]
        terms = Relaxation(cones.vertices, values, rows, nu, cones.linear, cones.side, self.lower, self.margin)
        bound, p, face = terms.bound()
        needed = self.threshold()
        close = (bound > needed) & (cones.bound > needed) & (bound < HOPELESS * needed)
        if bool((close & terms.concave.any(1)).any()):
            chosen = close.nonzero()[:, 0]
            better, points, _ = terms.subset(chosen).with_best_slopes(face[chosen])
            bound[chosen] = torch.minimum(bound[chosen], better)
            p[chosen] = points
        self._offer_best(bound, p)
        return _Cones(cones.vertices, cones.linear, cones.index, cones.side, torch.minimum(bound, cones.bound))

    def _settle_signs(self, cones: _Cones) -> tuple[_Cones, Tensor]:
        """Samples of constant sign leave `index`; also the values (B, A, r) of those left at the vertices."""
        values = self.rows[cones.index] @ cones.vertices.mT
        inactive = (values <= 0).all(-1)
        active = (values >= 0).all(-1) & ~inactive
        linear = cones.linear
        if bool(active.any()):
            settled = torch.where(active, cones.index, self.X.shape[0])
            linear = linear + self.rows[settled].mT @ self.weights[settled]
        unsettled = ~(active | inactive)
        width = int(unsettled.sum(1).amax())
        place = torch.where(unsettled, unsettled.cumsum(1) - 1, width)
        index = cones.index.new_full((len(cones), width + 1), self.X.shape[0])
        index.scatter_(1, place, torch.where(unsettled, cones.index, self.X.shape[0]))
        packed = values.new_zeros(len(cones), width + 1, values.shape[2])
        packed.scatter_(1, place[:, :, None].expand_as(values), values)
        index[:, width], packed[:, width] = self.X.shape[0], 0.0
        return _Cones(cones.vertices, linear, index[:, :width], cones.side, cones.bound), packed[:, :width]

    def _offer_best(self, bound: Tensor, p: Tensor) -> None:
        """Maximisers of the bounds of the most promising cones are candidates for the best point."""
        best = bound.topk(min(NEW_WITNESSES, len(bound))).indices
        length = torch.linalg.vector_norm(p[best], dim=1)
        points = (p[best] / torch.where(length > 0, length, 1.0)[:, None])[length > 0]
        before = self.lower
        if len(points):
            self.offer(points)
        if self.lower > before * (1 + 1e-12):
            self.offer(polish(self.X, self.nu, self.point)[None])


def _children(cones: _Cones) -> _Cones:
    twice = [torch.cat([part, part]) for part in (cones.linear, cones.index, cones.side, cones.bound)]
    return _Cones(halved(cones.vertices), *twice)


def _chunks(new: list[_Cones], n: int) -> list[_Cones]:
    """The same cones in pieces of similar numbers of unsettled samples and limited size."""
    pieces: list[_Cones] = []
    for cones in sorted(new, key=lambda cones: cones.index.shape[1]):
        r, width = cones.vertices.shape[1], cones.index.shape[1] + 8
        size = max(1, CHUNK // (r * width))
        if pieces and len(pieces[-1]) + len(cones) <= size:
            pieces[-1] = _joined(pieces[-1], cones, n)
        else:
            pieces += [cones[start : start + size] for start in range(0, len(cones), size)]
    return pieces


def _joined(first: _Cones, second: _Cones, n: int) -> _Cones:
    padding = second.index.shape[1] - first.index.shape[1]
    index = torch.nn.functional.pad(first.index, (0, padding), value=n)
    parts = ("vertices", "linear", "side", "bound")
    vertices, linear, side, bound = (torch.cat([getattr(first, p), getattr(second, p)]) for p in parts)
    return _Cones(vertices, linear, torch.cat([index, second.index]), side, bound)
