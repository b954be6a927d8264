"""Fully corrective Frank-Wolfe: best atoms of the dual norm, then all their weights at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import minimize

from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
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
    """

    new_atoms: int = 32
    correction_iter: int = 200

    def __post_init__(self) -> None:
        check_integer(self.new_atoms, "new_atoms")
        check_integer(self.correction_iter, "correction_iter")


class FrankWolfe(Solver):
    """Z = sum_j t_j u_j v_j^T over atoms (gate, u, v) of the unit ball, t >= 0 (Jaggi 2013).

    Serves every norm, as it needs only the best atom. For the nuclear norm the atoms of a gate are
    replaced by its singular pairs after each correction, which can only lower the objective.
    """

    name = "frank_wolfe"
    Options = FrankWolfeOptions
    default_max_iter: ClassVar[int] = 2_000
    check_every: ClassVar[int] = 1

    def __init__(self, problem: Problem, options: Any, tol: float, time_limit: float | None) -> None:
        super().__init__(problem, options, tol, time_limit)
        self.op = problem.operator.double()

    def start(self, point: Iterate | None) -> None:
        _, p, q = self.op.block_shape
        like = self.problem.Y64
        self.gate = torch.zeros(0, dtype=torch.long, device=like.device)
        self.u, self.v = like.new_zeros(0, p), like.new_zeros(0, q)
        self.t = like.new_zeros(0)
        if point is not None:
            self._set_from_blocks(point.Z.double())
        self.responses = self._respond(self.gate, self.u, self.v)
        self.intercept = self.problem.best_intercept(self._outputs())

    def _set_from_blocks(self, Z: torch.Tensor) -> None:
        """Atoms from the singular pairs of every gate (an upper bound of the norm unless it is nuclear)."""
        left, values, right = torch.linalg.svd(Z, full_matrices=False)
        keep = values > 1e-13 * values.max().clamp_min(1e-300)
        self.gate = keep.nonzero()[:, 0]
        self.u, self.v, self.t = left.mT[keep], right[keep], values[keep]
        if self.problem.norm.name != "nuclear":
            orders = {"l1": 1, "l2": 2, "linf": float("inf")}
            for name in ("u", "v"):
                side = self.problem.norm.left if name == "u" else self.problem.norm.right
                size = torch.linalg.vector_norm(getattr(self, name), ord=orders[side], dim=1)
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
        """Minimise over the weights of all atoms (and the intercept) with L-BFGS-B."""
        problem, r = self.problem, len(self.t)
        if r == 0:
            return
        shape, device = problem.Y.shape, problem.device

        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            variables = torch.from_numpy(x).to(device)
            t, b = variables[:r], variables[r:]
            predictions = (t @ self.responses).view(shape)
            if problem.output_bias:
                predictions = predictions + b
            value = problem.loss.value(predictions, problem.Y64, problem.weights) + problem.beta * t.sum()
            gradient = problem.loss.gradient(predictions, problem.Y64, problem.weights)
            parts = [self.responses @ gradient.flatten() + problem.beta]
            if problem.output_bias:
                parts.append(gradient.sum(0))
            return float(value), torch.cat(parts).cpu().numpy()

        start = self.t.cpu().numpy()
        bounds: list[tuple[float | None, float | None]] = [(0.0, None)] * r
        if problem.output_bias:
            start = np.concatenate([start, self.intercept.cpu().numpy()])
            bounds = bounds + [(None, None)] * shape[1]
        settings = {"maxiter": self.options.correction_iter, "ftol": 1e-15, "gtol": 1e-9 * problem.beta}
        solution = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=settings)
        self.t = torch.from_numpy(np.maximum(solution.x[:r], 0.0)).to(device)
        if problem.output_bias:
            self.intercept = torch.from_numpy(solution.x[r:]).to(device)

    def _keep(self, kept: torch.Tensor) -> None:
        self.gate, self.u, self.v = self.gate[kept], self.u[kept], self.v[kept]
        self.t, self.responses = self.t[kept], self.responses[kept]

    def _blocks(self) -> torch.Tensor:
        Z = self.problem.Y64.new_zeros(self.op.block_shape)
        return Z.index_add(0, self.gate, (self.t[:, None] * self.u)[:, :, None] * self.v[:, None, :])

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Balanced factors, padded with zero columns: the atoms are the value of an inexact norm."""
        n_gates, p, q = self.op.block_shape
        order = torch.argsort(self.gate, stable=True)
        gate = self.gate[order]
        counts = torch.bincount(gate, minlength=n_gates)
        m = max(1, int(counts.max()))
        column = torch.arange(len(gate), device=gate.device) - (counts.cumsum(0) - counts)[gate]
        root = self.t[order].sqrt().unsqueeze(1)
        U, V = self.t.new_zeros(n_gates, m, p), self.t.new_zeros(n_gates, m, q)
        U[gate, column], V[gate, column] = root * self.u[order], root * self.v[order]
        return U.mT.contiguous(), V.mT.contiguous()

    def iterate(self) -> Iterate:
        factors = None if self.problem.norm.exact else self._factors()
        return Iterate(self._blocks(), factors=factors)

    def state(self) -> dict[str, Any]:
        names = ("gate", "u", "v", "t", "responses", "intercept")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
