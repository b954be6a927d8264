"""What Frank-Wolfe needs for ReLU: the best neuron in the cone of each gate, and descent inside the cones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice

import torch

from cvxnn.columns import Columns
from cvxnn.cones import Cones, cone_dual_norms
from cvxnn.cones.alternating import alternate, direction_starts
from cvxnn.factored import FactoredLoss
from cvxnn.operators import Operator
from cvxnn.problem import Problem
from cvxnn.solvers.burer_monteiro.projected import ProjectedDescent, ProjectedOptions, local_problem

__all__ = ["ATOMS", "Atoms", "alternating_atoms", "best_atoms", "branching_atoms", "cone_atoms", "face_atoms", "slide"]

ATOMS = ("alternating", "branching", "faces")
#: Random directions that alternating projections start from, beside singular vectors and the like.
_STARTS = 4
#: Gates looked at together.
_ROUND = 512
#: Faces looked at together.
_FACES = 4096
#: A slack above this, relative to the norms of the row and of u, counts as feasible.
_FEASIBLE = -1e-12
#: A row this close to the span of others defines no face of its own.
_DEPENDENT = 1e-10
#: Singular values of the rows below this, relative to the largest, are rounding.
_RANK = 1e-12


@dataclass
class Atoms:
    """Unit atoms u v^T of some gates, along which the objective falls: gate (r,), u (r, p), v (r, q), value (r,)."""

    gate: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    value: torch.Tensor

    def best(self, most: int, beta: float) -> Atoms:
        """Those with a value above beta, at most so many, the best first."""
        chosen = torch.argsort(self.value, descending=True)[:most]
        chosen = chosen[self.value[chosen] > beta]
        return Atoms(self.gate[chosen], self.u[chosen], self.v[chosen], self.value[chosen])


def best_atoms(problem: Problem, op: Operator, nu: torch.Tensor, most: int, method: str) -> Atoms:
    """Best atoms of the blocks of A*(nu) for a norm without cones."""
    u, v, value = problem.norm.atom(op.adjoint(nu))
    gate = torch.arange(len(value), device=value.device)
    return Atoms(gate, -u, v, value).best(most, problem.beta)


def cone_atoms(problem: Problem, op: Operator, nu: torch.Tensor, most: int, method: str) -> Atoms:
    """Neurons u v^T, u in the cone of its gate, with a large -u^T G_k v; at most one for each gate.

    The spectral norm bounds what a gate can have: gates are taken in decreasing order of it, until no other can be
    among the best.

    Parameters
    ----------
    nu : torch.Tensor of shape (n, c)
        Gradient of the loss.
    most : int
    method : {"alternating", "branching", "faces"}
        See the option `atom` of ``frank_wolfe``.
    """
    cones = _cones(problem)
    search = {"alternating": alternating_atoms, "branching": branching_atoms, "faces": face_atoms}[method]
    blocks = op.adjoint(nu)
    bound = problem.norm.dual_estimate(blocks)
    order = torch.argsort(bound, descending=True)
    order = order[bound[order] > problem.beta]
    found: list[tuple[torch.Tensor, ...]] = [tuple(part[:0] for part in (order, blocks[:, :, 0], blocks[:, 0], bound))]
    for gate in order.split(_ROUND) if len(order) else ():
        seen = torch.cat([part[3] for part in found])
        if len(seen) >= most and float(seen.topk(most).values[-1]) >= float(bound[gate[0]]):
            break
        u, v, value = search(cones, gate, blocks[gate])
        found.append((gate, u, -v, value))
    return Atoms(*(torch.cat(parts) for parts in zip(*found, strict=True))).best(most, problem.beta)


def alternating_atoms(
    cones: Cones, gate: torch.Tensor, G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Local maxima of ||G_k^T u|| over the unit ball in each cone, the best of several starts: u, v, value.

    For one output both signs are tried, and the projections are exact.
    """
    return alternate(cones, gate, G, direction_starts(cones, gate, G, _STARTS))


def branching_atoms(
    cones: Cones, gate: torch.Tensor, G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maxima of ||G_k^T u|| over the unit ball in each cone to a relative 1e-6, by branching over v: u, v, value."""
    found = cone_dual_norms(cones, gate, G, method="branching", tolerance=1e-6)
    return found.u, found.v, found.lower


def face_atoms(cones: Cones, gate: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maxima of ||G_k^T u|| over the unit ball in each cone, by going through all faces: u, v, value.

    A maximiser lies inside a face, so it is the top eigenvector of G G^T restricted to the span of that face, where
    fewer than r = rank(X) rows are zero (Sahiner, Ergen, Pauly, Pilanci 2021, A.4.2: O(n^r) operations for a gate).
    Of an eigenvalue that occurs twice one vector may miss the cone; a smaller face then has one as good.

    Parameters
    ----------
    cones : Cones
    gate : torch.Tensor of shape (B,), long
    G : torch.Tensor of shape (B, d, c)
    """
    # In coordinates of the span of the rows, outside of which nothing is gained.
    _, sizes, axes = torch.linalg.svd(cones.rows, full_matrices=False)
    axes = axes[sizes > _RANK * sizes.amax(dim=0, keepdim=True)].mT if len(sizes) else axes.mT
    rows, inner = cones.rows @ axes, axes.mT @ G
    best_u = torch.zeros_like(inner[:, :, 0])
    best = torch.zeros_like(best_u[:, 0])
    squares = inner @ inner.mT
    for spans in _spans(rows):
        for b in range(len(gate)):
            u = _top(spans, squares[b])
            slack = (u @ rows.T) * cones.signs(gate[b : b + 1])
            value = torch.einsum("fd,de,fe->f", u, squares[b], u).clamp_min(0).sqrt()
            for sign in (1.0, -1.0):
                inside = (
                    (sign * slack).amin(1) >= _FEASIBLE if slack.shape[1] else torch.ones_like(value, dtype=torch.bool)
                )
                reached = torch.where(inside, value, 0.0)
                top = int(reached.argmax())
                if float(reached[top]) > float(best[b]):
                    best[b], best_u[b] = reached[top], sign * u[top]
    # Rounding may have left u just outside.
    u = cones.project(gate, best_u @ axes.mT).point
    u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-300)
    image = torch.einsum("bdc,bd->bc", G, u)
    value = image.norm(dim=1)
    return u, image / value.unsqueeze(1).clamp_min(1e-300), value


def _spans(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Orthogonal projectors (f, d, d) onto the spans of all faces, some at a time.

    Up to d - 1 independent rows are zero on a face.
    """
    n, d = rows.shape
    eye = torch.eye(d, dtype=rows.dtype, device=rows.device)
    yield eye.unsqueeze(0)
    for size in range(1, min(n, d - 1) + 1):
        subsets = combinations(range(n), size)
        while chosen := list(islice(subsets, _FACES)):
            basis, triangle = torch.linalg.qr(rows[torch.tensor(chosen, device=rows.device)].mT)
            independent = triangle.diagonal(dim1=1, dim2=2).abs().amin(1) > _DEPENDENT
            yield eye - basis[independent] @ basis[independent].mT


def _top(spans: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Unit top eigenvectors (f, d) of a matrix restricted to each span."""
    vectors = torch.linalg.eigh(spans @ square @ spans).eigenvectors[:, :, -1]
    inside = torch.einsum("fde,fe->fd", spans, vectors)
    return inside / inside.norm(dim=1, keepdim=True).clamp_min(1e-300)


def slide(problem: Problem, columns: Columns, intercept: torch.Tensor, limit: int) -> tuple[Columns, torch.Tensor]:
    """At most `limit` projected gradient steps on all columns at once, each in the cone of its gate."""
    loss = FactoredLoss(problem, double=True)
    local = local_problem(problem, loss, columns, eliminate=True)
    descent = ProjectedDescent(local, _cones(problem), local.variables(columns, intercept), ProjectedOptions())
    for _ in range(limit):
        descent.step()
        if descent.stuck:
            break
    return local.point(descent.x)


def _cones(problem: Problem) -> Cones:
    assert problem.cones is not None
    return problem.cones
