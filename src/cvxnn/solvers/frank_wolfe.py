"""Fully corrective Frank-Wolfe: best atoms of the dual norm, then all their weights at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.columns import Columns
from cvxnn.norms import VECTOR_NORMS
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.solvers.lbfgs import minimise
from cvxnn.validation import check_integer

__all__ = ["FrankWolfe"]


@dataclass(frozen=True)
class FrankWolfeOptions:
    """Options of ``frank_wolfe``.

    Attributes
    ----------
    new_atoms : int
        At most so many atoms are added per iteration, from the gates where the dual norm is largest.
    correction_iter : int
        Limit of L-BFGS-B iterations in a corrective step.
    descent_iter : int
        Limit of L-BFGS iterations of the local descent on all atoms at once (nuclear norm); 0 leaves
        it out.
    """

    new_atoms: int = 32
    correction_iter: int = 200
    descent_iter: int = 100

    def __post_init__(self) -> None:
        check_integer(self.new_atoms, "new_atoms")
        check_integer(self.correction_iter, "correction_iter")
        check_integer(self.descent_iter, "descent_iter", minimum=0)


class FrankWolfe(Solver):
    """Z = sum_j t_j u_j v_j^T over atoms (gate, u, v) of the unit ball, t >= 0 (Jaggi 2013).

    Serves every norm, as it needs only the best atom. For the nuclear norm the atoms themselves are moved
    too (as in sliding Frank-Wolfe; Denoyelle, Duval, Peyre, Soubies 2019) and then replaced by the singular
    pairs of each gate, which can only lower the objective.
    """

    name = "frank_wolfe"
    Options = FrankWolfeOptions
    default_max_iter: ClassVar[int] = 2_000
    check_every: ClassVar[int] = 1

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        self.op = problem.operator.double()

    def start(self, point: Iterate | None) -> None:
        _, p, q = self.op.block_shape
        like = self.problem.Y64
        self.gate = torch.zeros(0, dtype=torch.long, device=like.device)
        self.u, self.v = like.new_zeros(0, p), like.new_zeros(0, q)
        self.t = like.new_zeros(0)
        if point is not None:
            self._set_from_blocks(point.blocks().double())
        self.responses = self._respond(self.gate, self.u, self.v)
        self.intercept = self.problem.best_intercept(self._outputs())

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
        self._add_atoms()
        self._correct()
        if self.problem.norm.name == "nuclear":
            if self.options.descent_iter:
                self._descend()
            self._set_from_blocks(self._blocks())
            self.responses = self._respond(self.gate, self.u, self.v)
        else:
            self._keep(self.t > 0)

    def _add_atoms(self) -> None:
        problem = self.problem
        gradient = problem.loss.gradient(self._outputs() + self.intercept, problem.Y64, problem.weights)
        u, v, value = problem.norm.atom(self.op.adjoint(gradient))
        chosen = torch.argsort(value, descending=True)[: self.options.new_atoms]
        chosen = chosen[value[chosen] > problem.beta]
        self.gate = torch.cat([self.gate, chosen])
        self.u, self.v = torch.cat([self.u, -u[chosen]]), torch.cat([self.v, v[chosen]])
        self.t = torch.cat([self.t, self.t.new_zeros(len(chosen))])
        self.responses = torch.cat([self.responses, self._respond(chosen, -u[chosen], v[chosen])])

    def _correct(self) -> None:
        """Minimise over the weights of all atoms, t >= 0 (and the intercept)."""
        r = len(self.t)
        if r == 0:
            return

        def objective(t: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            value, gradient = self._loss((t @ self.responses).view(self.problem.Y.shape) + b)
            slope = self.responses @ gradient.flatten() + self.problem.beta
            return value + self.problem.beta * t.sum(), [slope, gradient.sum(0)]

        t, b = self._minimise(objective, [self.t, self.intercept], self.options.correction_iter, n_positive=r)
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
        root = self.t.clamp_min(1e-6 * float(self.t.max()) if float(self.t.max()) > 0 else 1e-6).sqrt().unsqueeze(1)
        start = [root * self.u, root * self.v, self.intercept]
        u, v, self.intercept = self._minimise(objective, start, self.options.descent_iter)
        self.u, self.v, self.t = u, v, torch.ones_like(self.t)

    def _loss(self, predictions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        problem = self.problem
        value = problem.loss.value(predictions, problem.Y64, problem.weights)
        return value, problem.loss.gradient(predictions, problem.Y64, problem.weights)

    def _minimise(
        self, objective: Callable[..., Any], start: list[torch.Tensor], limit: int, n_positive: int = 0
    ) -> list[torch.Tensor]:
        """L-BFGS over a list of tensors, the last of them the intercept, the first entries >= 0."""

        def with_intercept(*parts: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
            value, slopes = objective(*parts)
            if not self.problem.output_bias:
                slopes[-1] = torch.zeros_like(slopes[-1])
            return value, slopes

        return minimise(with_intercept, start, limit, gtol=1e-9 * self.problem.beta, n_positive=n_positive).parts

    def _keep(self, kept: torch.Tensor) -> None:
        self.gate, self.u, self.v = self.gate[kept], self.u[kept], self.v[kept]
        self.t, self.responses = self.t[kept], self.responses[kept]

    def _blocks(self) -> torch.Tensor:
        return self._assemble(self.t[:, None] * self.u, self.v)

    def _assemble(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Blocks Z_k, the sums of u_j v_j^T over the atoms of gate k."""
        Z = self.problem.Y64.new_zeros(self.op.block_shape)
        return Z.index_add(0, self.gate, u.unsqueeze(2) * v.unsqueeze(1))

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Balanced factors, padded with zero columns: the atoms are the value of an inexact norm."""
        root = self.t.sqrt().unsqueeze(1)
        return Columns(self.gate, root * self.u, root * self.v).factors(self.op.n_gates)

    def iterate(self) -> Iterate:
        factors = None if self.problem.norm.exact else self._factors()
        return Iterate(self._blocks(), factors=factors)

    def state(self) -> dict[str, Any]:
        names = ("gate", "u", "v", "t", "responses", "intercept")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
