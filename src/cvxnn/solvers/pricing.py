"""Dual norms of the gates that may matter: in float32 for all of them, in float64 where that decides."""

from __future__ import annotations

from typing import Any

import torch

from cvxnn.bounds import DualBound, dual_bound
from cvxnn.dual_norms import gate_dual_norms
from cvxnn.evaluation import Evaluation
from cvxnn.operators import MLPOperator, Operator
from cvxnn.problem import Problem
from cvxnn.screening import gate_sizes, inactive_gates, safe_radius

__all__ = ["Pricing"]

#: Sizes of data whose products are normal numbers in float32.
_SMALL, _LARGE = 1e-12, 1e12
#: Share of the gates whose norms may be looked at twice; where there would be more, float64 does at once.
_FEW = 0.25


class Pricing:
    """Bounds of the optimum over all gates from dual points of some, and the gates that hold them down.

    Gates that are certainly inactive (:mod:`cvxnn.screening`) are left out from then on.

    Parameters
    ----------
    problem : Problem
        Without cones.
    kept : dict
        What does not depend on beta, for the next problem of a path.
    """

    def __init__(self, problem: Problem, kept: dict[str, Any]) -> None:
        self.problem = problem
        self._kept = kept
        if "single" not in kept:
            kept["single"] = _in_single(problem.operator)
        self.alive = torch.arange(problem.n_gates, device=problem.device)
        self._double: Operator = problem.operator.double()
        self._single: Operator | None = kept["single"]

    @property
    def _sizes(self) -> torch.Tensor:
        if "sizes" not in self._kept:
            self._kept["sizes"] = gate_sizes(self.problem)
        sizes: torch.Tensor = self._kept["sizes"]
        return sizes

    @property
    def n_screened(self) -> int:
        """Gates that are certainly inactive."""
        return self.problem.n_gates - len(self.alive)

    def __call__(self, nu: torch.Tensor, gates: torch.Tensor, seen: Evaluation | None = None) -> DualBound:
        """Bound from a dual candidate nu (n, c), over all gates that are not screened; the others have norm 0.

        Parameters
        ----------
        nu : torch.Tensor of shape (n, c), float64
        gates : torch.Tensor of shape (s,)
            Those whose norms are wanted in float64.
        seen : Evaluation, optional
            A point, with which gates are screened.
        """
        bound = dual_bound(self.problem, nu, norms=lambda scaled, error: self._norms(scaled, error, gates))
        if seen is not None:
            self._screen(bound, seen)
        return bound

    def estimate(self, nu: torch.Tensor) -> torch.Tensor:
        """About the dual norms (P,) for a dual candidate (n, c); 0 for gates that are screened.

        They bound nothing.
        """
        op, norms = self._single, nu.new_zeros(self.problem.n_gates)
        if op is None:
            op = _selected(self._double, self.alive)
        size = float(nu.abs().max()) or 1.0
        nu = (nu / size).to(op.dtype)
        parts = [self.problem.norm.dual_estimate(op.adjoint_blocks(nu, part)) for part in op.gate_batches()]
        norms[self.alive] = size * torch.cat(parts).to(norms)
        return norms

    def _norms(self, nu: torch.Tensor, error: float, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds (P,); those that can be the largest one are as tight as float64 makes them."""
        norm, op = self.problem.norm, self._single
        lower, upper = nu.new_zeros(2, self.problem.n_gates)
        again = self.alive
        if op is not None:
            single = nu.float()
            rounding = 1.01 * op.adjoint_rounding(single) + error
            bounds = [norm.dual(op.adjoint_blocks(single, part).double(), rounding) for part in op.gate_batches()]
            lower[self.alive], upper[self.alive] = (torch.cat(parts) for parts in zip(*bounds, strict=True))
            wanted = upper > float(lower.max())
            wanted[gates] = True
            again = wanted.nonzero()[:, 0]
            if len(again) > _FEW * len(self.alive) + len(gates):
                again = self.alive
        lower[again], upper[again] = gate_dual_norms(_selected(self._double, again), norm, None, nu, error)
        return lower, upper

    def _screen(self, bound: DualBound, seen: Evaluation) -> None:
        radius = safe_radius(self.problem, seen, bound.lower_bound)
        inactive = inactive_gates(self.problem.beta, bound, radius, self._sizes)[self.alive]
        if bool(inactive.all()):
            # Zero is the optimum; a problem has at least one gate.
            inactive[bound.feasible_norms[self.alive].argmax()] = False
        if not bool(inactive.any()):
            return
        remaining = self.alive[~inactive]
        if self._single is not None:
            self._single = self._single.select((~inactive).nonzero()[:, 0])
        self.alive = remaining

    def restrict(self, alive: torch.Tensor) -> None:
        """Leave out all other gates, as in the run that a checkpoint is of."""
        if self._single is not None:
            self._single = self._single.select(alive)
        self.alive = alive


def _selected(op: Operator, gates: torch.Tensor) -> Operator:
    return op if len(gates) == op.n_gates else op.select(gates)


def _in_single(op: Operator) -> Operator | None:
    """The map in float32, for perceptrons with data in memory of usual size."""
    if type(op) is not MLPOperator or op.gates is None:
        return None
    # Otherwise products of float32 may be those of TF32 or bfloat16, whose errors are not bounded here.
    if torch.get_float32_matmul_precision() != "highest":
        return None
    largest = float(op.X.abs().max())
    if not _SMALL < largest < _LARGE:
        return None
    return MLPOperator(op.X.float(), op.n_outputs, op.gates, op.patterns)
