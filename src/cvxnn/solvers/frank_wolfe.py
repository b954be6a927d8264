"""Frank-Wolfe: best atoms of the dual norm, and all their weights at once (fully corrective) or by a fixed rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.columns import Columns
from cvxnn.norms import VECTOR_NORMS
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.solvers.cone_frank_wolfe import ATOMS, Atoms, best_atoms, cone_atoms, slide
from cvxnn.solvers.lbfgs import minimise
from cvxnn.validation import check_choice, check_integer

__all__ = ["FrankWolfe"]


@dataclass(frozen=True)
class FrankWolfeOptions:
    """Options of ``frank_wolfe``.

    Attributes
    ----------
    variant : {"corrective", "plain"}
        Several atoms per iteration, all weights minimised over and atoms moved; or one atom per iteration with the
        step 2 / (k + 2), as Frank and Wolfe have it.
    atom : {"alternating", "branching", "faces"}
        For ReLU, how the best neuron in the cone of a gate is found: the best of alternating projections from several
        starts (exact for one output); to a relative 1e-6 by branching over v (at most three outputs); or exactly, by
        going through all faces of the cone, of which there are about n^(rank - 1).
    new_atoms : int
        At most so many atoms are added per iteration, from the gates where the dual norm is largest.
    correction_iter : int
        Limit of L-BFGS-B iterations in a corrective step.
    descent_iter : int
        Limit of iterations of the local descent on all atoms at once (nuclear norm and ReLU); 0 leaves it
        out.
    """

    variant: str = "corrective"
    atom: str = "alternating"
    new_atoms: int = 32
    correction_iter: int = 200
    descent_iter: int = 100

    def __post_init__(self) -> None:
        check_choice(self.variant, "variant", ("corrective", "plain"))
        check_choice(self.atom, "atom", ATOMS)
        check_integer(self.new_atoms, "new_atoms")
        check_integer(self.correction_iter, "correction_iter")
        check_integer(self.descent_iter, "descent_iter", minimum=0)


class FrankWolfe(Solver):
    """Z = sum_j t_j u_j v_j^T over atoms (gate, u, v) of the unit ball, t >= 0 (Jaggi 2013).

    Serves every norm, as it needs only the best atom. For the nuclear norm the atoms themselves are moved
    too (as in sliding Frank-Wolfe; Denoyelle, Duval, Peyre, Soubies 2019) and then replaced by the singular
    pairs of each gate, which can only lower the objective. For ReLU (the convex program (3); Sahiner, Ergen, Pauly,
    Pilanci 2021) atoms are neurons in the cones of their gates, and stay there when they are moved.

    The plain variant is that of Jaggi on {Omega(Z) <= tau}, with beta Omega in the objective and tau = F(0) / beta,
    which no optimum exceeds (Harchaoui, Juditsky, Nemirovski 2015).
    """

    name = "frank_wolfe"
    Options = FrankWolfeOptions
    default_max_iter: ClassVar[int] = 2_000
    check_every: int = 1
    cones: ClassVar[bool] = True

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        self.op = problem.operator.double()

    def start(self, point: Iterate | None) -> None:
        _, p, q = self.op.block_shape
        like = self.problem.Y64
        self.iteration = 0
        self._take(Columns(like.new_zeros(0, dtype=torch.long), like.new_zeros(0, p), like.new_zeros(0, q)))
        if point is not None:
            self._warm_start(point)
        self._refresh()
        zero = torch.zeros_like(like)
        offset = self.problem.best_intercept(zero)
        loss = float(self.problem.loss.value(zero + offset, like, self.problem.weights))
        self.radius = loss / self.problem.beta

    def _warm_start(self, point: Iterate) -> None:
        if self.problem.cones is None:
            self._set_from_blocks(point.blocks().double())
            return
        assert point.factors is not None
        columns = Columns.from_factors(*(part.double() for part in point.factors)).without_zeros()
        feasible = self.problem.cones.project(columns.gate, columns.u).point
        self._take(Columns(columns.gate, feasible, columns.v))

    def _take(self, columns: Columns) -> None:
        """Atoms of the columns u v^T."""
        columns = columns.without_zeros()
        sizes = [part.norm(dim=1) for part in (columns.u, columns.v)]
        self.gate, self.t = columns.gate, sizes[0] * sizes[1]
        self.u, self.v = (part / size.unsqueeze(1) for part, size in zip((columns.u, columns.v), sizes, strict=True))

    def _refresh(self) -> None:
        """What depends on the atoms: their predictions (one by one only where weights are corrected), the intercept."""
        if self.options.variant == "plain":
            self.responses = self.t.new_zeros(0)
            self.outputs = self._predict(self._columns())
        else:
            self.responses = self._respond(self.gate, self.u, self.v)
            self.outputs = self._outputs()
        self.intercept = self.problem.best_intercept(self.outputs)

    def _columns(self) -> Columns:
        """The atoms with their weights, balanced."""
        root = self.t.sqrt().unsqueeze(1)
        return Columns(self.gate, root * self.u, root * self.v)

    def _predict(self, columns: Columns) -> torch.Tensor:
        return self.op.apply_columns(columns) if len(columns) else torch.zeros_like(self.problem.Y64)

    def _set_from_blocks(self, Z: torch.Tensor) -> None:
        """Atoms from the singular pairs of every gate (an upper bound of the norm unless it is nuclear)."""
        left, values, right = torch.linalg.svd(Z, full_matrices=False)
        keep = values > 1e-13 * values.max().clamp_min(1e-300)
        self.gate = keep.nonzero()[:, 0]
        self.u, self.v, self.t = left.mT[keep], right[keep], values[keep]
        if self.problem.norm.name != "nuclear":
            for name in ("u", "v"):
                side = self.problem.norm.left if name == "u" else self.problem.norm.right
                size = VECTOR_NORMS[side].value(getattr(self, name))
                setattr(self, name, getattr(self, name) / size.unsqueeze(1))
                self.t = self.t * size

    def _respond(self, gate: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Predictions of each atom, (r, n c)."""
        return self.op.apply_atoms(gate, u, v).flatten(1)

    def _outputs(self) -> torch.Tensor:
        return (self.t @ self.responses).view(self.problem.Y.shape)

    def step(self) -> None:
        self.iteration += 1
        if self.options.variant == "plain":
            self._plain_step()
            return
        self._add_atoms()
        self._correct()
        if self.problem.cones is not None:
            self._keep(self.t > 0)
            if self.options.descent_iter and len(self.t):
                self._slide()
        elif self.problem.norm.name == "nuclear":
            if self.options.descent_iter:
                self._descend()
            self._set_from_blocks(self._blocks())
            self.responses = self._respond(self.gate, self.u, self.v)
        else:
            self._keep(self.t > 0)

    def _best_atoms(self, outputs: torch.Tensor, most: int) -> Atoms:
        """At most so many atoms, of different gates, along which the objective falls; the best first."""
        problem = self.problem
        gradient = problem.loss.gradient(outputs + self.intercept, problem.Y64, problem.weights)
        find = best_atoms if problem.cones is None else cone_atoms
        return find(problem, self.op, gradient, most, self.options.atom)

    def _plain_step(self) -> None:
        found = self._best_atoms(self.outputs, 1)
        share = 2 / (self.iteration + 1)
        weights = torch.full_like(found.value, share * self.radius)
        self.gate = torch.cat([self.gate, found.gate])
        self.u, self.v = torch.cat([self.u, found.u]), torch.cat([self.v, found.v])
        self.t = torch.cat([(1 - share) * self.t, weights])
        self.outputs = (1 - share) * self.outputs
        if len(found.gate):
            self.outputs += self._predict(Columns(found.gate, weights.unsqueeze(1) * found.u, found.v))
        if share >= 1:
            self._keep(self.t > 0)
        self.intercept = self.problem.best_intercept(self.outputs, start=self.intercept)

    def _add_atoms(self) -> None:
        found = self._best_atoms(self._outputs(), self.options.new_atoms)
        self.gate = torch.cat([self.gate, found.gate])
        self.u, self.v = torch.cat([self.u, found.u]), torch.cat([self.v, found.v])
        self.t = torch.cat([self.t, torch.zeros_like(found.value)])
        self.responses = torch.cat([self.responses, self._respond(found.gate, found.u, found.v)])

    def _slide(self) -> None:
        """Move all neurons inside their cones."""
        columns, self.intercept = slide(self.problem, self._columns(), self.intercept, self.options.descent_iter)
        self._take(columns)
        self.responses = self._respond(self.gate, self.u, self.v)

    def _correct(self) -> None:
        """Minimise over the weights of all atoms, t >= 0 (and the intercept)."""
        r = len(self.t)
        if r == 0:
            return

        def objective(t: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            value, gradient = self._loss((t @ self.responses).view(self.problem.Y.shape) + b)
            slope = self.responses @ gradient.flatten() + self.problem.beta
            return value + self.problem.beta * t.sum(), [slope, gradient.sum(0)]

        t, b = self._minimise(objective, [self.t, self.intercept], self.options.correction_iter, 1.0, n_positive=r)
        self.t, self.intercept = t.clamp_min(0.0), b

    def _descend(self) -> None:
        """Minimise over balanced factors of all atoms (and the intercept), a smooth local descent."""
        if len(self.t) == 0:
            return
        gate, beta = self.gate, self.problem.beta

        def objective(u: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            value, gradient = self._loss(self.op.apply(self._assemble(u, v)) + b)
            blocks = self.op.adjoint(gradient)[gate]
            left = torch.bmm(blocks, v.unsqueeze(2)).squeeze(2) + beta * u
            right = torch.bmm(blocks.mT, u.unsqueeze(2)).squeeze(2) + beta * v
            penalty = beta / 2 * (u.square().sum() + v.square().sum())
            return value + penalty, [left, right, gradient.sum(0)]

        # Atoms of weight zero are saddle points of the factors: they start with a little weight.
        root = self.t.clamp_min(1e-6 * (float(self.t.max()) or self.radius)).sqrt().unsqueeze(1)
        start = [root * self.u, root * self.v, self.intercept]
        u, v, self.intercept = self._minimise(objective, start, self.options.descent_iter, 0.5)
        self.u, self.v, self.t = u, v, torch.ones_like(self.t)

    def _loss(self, predictions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        problem = self.problem
        value = problem.loss.value(predictions, problem.Y64, problem.weights)
        return value, problem.loss.gradient(predictions, problem.Y64, problem.weights)

    def _minimise(
        self,
        objective: Callable[..., Any],
        start: list[torch.Tensor],
        limit: int,
        power: float,
        n_positive: int = 0,
    ) -> list[torch.Tensor]:
        """L-BFGS over a list of tensors, the last of them the intercept, the first entries >= 0.

        L-BFGS-B has limits in absolute terms, and first steps of length one. All is measured in powers of two: the
        objective by its value V at the start, tensors of blocks to a power by (V / beta)^power, and the intercept by
        what raises the loss by about V.
        """
        problem = self.problem
        value = float(objective(*start)[0])
        if not value > 0:
            return start
        size = _power_of_two((value / problem.beta) ** power)
        offset = _power_of_two(math.sqrt(value / (problem.loss.smoothness * float(problem.weights.sum()))))
        value = _power_of_two(value)
        sizes = [*(size for _ in start[1:]), offset]

        def measured(*parts: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
            total, slopes = objective(*(part * size for part, size in zip(parts, sizes, strict=True)))
            if not problem.output_bias:
                slopes[-1] = torch.zeros_like(slopes[-1])
            return total / value, [slope * (size / value) for slope, size in zip(slopes, sizes, strict=True)]

        first = [part / size for part, size in zip(start, sizes, strict=True)]
        found = minimise(measured, first, limit, gtol=1e-9, n_positive=n_positive).parts
        return [part * size for part, size in zip(found, sizes, strict=True)]

    def _keep(self, kept: torch.Tensor) -> None:
        self.gate, self.u, self.v = self.gate[kept], self.u[kept], self.v[kept]
        self.t = self.t[kept]
        if self.options.variant != "plain":
            self.responses = self.responses[kept]

    def _blocks(self) -> torch.Tensor:
        return self._assemble(self.t[:, None] * self.u, self.v)

    def _assemble(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Blocks Z_k, the sums of u_j v_j^T over the atoms of gate k."""
        Z = self.problem.Y64.new_zeros(self.op.block_shape)
        return Z.index_add(0, self.gate, u.unsqueeze(2) * v.unsqueeze(1))

    def iterate(self) -> Iterate:
        # Padded with zero columns: the atoms are the value of an inexact norm, and all that ReLU points have.
        exact = self.problem.norm.exact and self.problem.cones is None
        factors = None if exact else self._columns().factors(self.op.n_gates)
        return Iterate(None if self.problem.cones is not None else self._blocks(), factors=factors)

    def state(self) -> dict[str, Any]:
        names = ("gate", "u", "v", "t", "responses", "outputs", "intercept", "iteration", "radius")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _power_of_two(size: float) -> float:
    """One near a positive size."""
    return 2.0 ** min(max(math.frexp(size)[1], -1000), 1000)
