"""ADMM on the gates that matter so far; all gates are priced between rounds (column generation)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from cvxnn.bounds import dual_bound
from cvxnn.certificates import evaluate, relative_gap
from cvxnn.problem import Problem
from cvxnn.solvers.admm import Admm, AdmmOptions
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.validation import check_integer

__all__ = ["WorkingSet"]

#: Relative gap of the first round on its gates; later rounds are solved to a tenth of the gap over all gates.
_FIRST_GAP = 1e-1
_SHARE = 0.1
#: Steps between two looks at the gap of a round.
_LOOK_EVERY = 5
#: Steps after which the whole problem is certified all the same: for the trace, callbacks and stalled runs.
_CERTIFY_EVERY = 50


@dataclass(frozen=True)
class WorkingSetOptions:
    """Options of ``working_set``.

    Attributes
    ----------
    gates : int
        Gates of the first round.
    new_gates : int or None
        Violated gates that are added at most after a pricing; None for as many as there are gates in the set.
    """

    gates: int = 50
    new_gates: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.gates, "gates")
        check_integer(self.new_gates, "new_gates", allow_none=True)


class WorkingSet(Solver):
    """Rounds of ADMM on some of the gates, the others at zero.

    A round is solved to a gap of its own. Then the dual norms of all gates are bounded from its dual candidate: this
    is the certificate of the whole problem, and the gates whose norm is above beta are those that can lower the
    objective. The worst of them join, and the next round starts where the last one ended. A round with no such gate
    is solved further. The result is one of all gates: the driver certifies it on the whole problem.
    """

    name = "working_set"
    Options = WorkingSetOptions
    default_max_iter: ClassVar[int] = 50_000
    check_every: ClassVar[int] = 1

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.n_gates == 1:
            return "there is one gate only; use 'admm'"
        if not problem.norm.has_prox:
            return f"it needs the prox of the norm, which {problem.norm.name} does not have; use 'frank_wolfe'"
        return None

    def start(self, point: Iterate | None) -> None:
        problem = self.problem
        zero = self.zero()
        nu = problem.dual_candidate(evaluate(problem, zero.Z if point is None else point.Z).predictions)
        norms = dual_bound(problem, nu).norms_upper
        if point is not None:
            # Gates in use come first.
            norms = norms + (norms.max() + problem.beta) * (point.blocks().abs().amax((1, 2)) > 0)
        first = min(self.options.gates, problem.n_gates)
        if point is not None:
            first = max(first, int((point.blocks().abs().amax((1, 2)) > 0).sum()))
        self.gates = norms.topk(first).indices.sort().values
        self.steps, self.certified_at, self.level = 0, 0, _FIRST_GAP
        self.gap = math.inf
        self.priced: Iterate | None = None
        self._begin_round(None if point is None else self._restricted(point), rho=None)

    def _restricted(self, point: Iterate) -> Iterate:
        return Iterate(point.blocks()[self.gates], intercept=point.intercept, dual=point.dual)

    def _begin_round(self, point: Iterate | None, rho: float | None) -> None:
        """ADMM on the gates of the set, from a point on them."""
        self.part = self.problem.with_gates(self.gates)
        options = replace(AdmmOptions(), rho=rho)
        self.inner = Admm(self.part, options, self.tol, self.time_limit)
        lacking = Admm.unsupported(self.part)
        self.finished = lacking is not None
        self.inner.start(point)

    def step(self) -> None:
        self.inner.step()
        self.steps += 1
        if self.steps % _LOOK_EVERY == 0:
            self._look()

    def _look(self) -> None:
        """Price all gates, where the round is solved far enough."""
        point = self.inner.iterate()
        seen = evaluate(self.part, point.blocks())
        nu = self.problem.dual_candidate(seen.predictions) if point.dual is None else point.dual.double()
        nu = self.problem.centred(nu)
        if relative_gap(seen.primal, dual_bound(self.part, nu).lower_bound) > self.level:
            return
        bound = dual_bound(self.problem, nu)
        gap = relative_gap(seen.primal, bound.lower_bound)
        if gap < self.gap:
            self.gap = gap
            self.priced = Iterate(self._embedded(point.blocks()), dual=nu)
        self.level = max(self.tol / 4, min(_SHARE * gap, self.level))
        joining = self._violated(bound.norms_upper)
        if gap <= self.tol or len(joining) == 0:
            return
        whole = self._embedded(point.blocks())
        self.gates = torch.cat([self.gates, joining]).sort().values
        self._begin_round(self._restricted(Iterate(whole, dual=nu)), rho=self.inner.rho)

    def _violated(self, norms: torch.Tensor) -> torch.Tensor:
        """The worst gates outside of the set: those that hold the bound below that of the round.

        A round that is not solved has dual norms above beta itself; what is below its largest one costs nothing yet.
        """
        level = max(self.problem.beta, float(norms[self.gates].max()))
        outside = norms.clone()
        outside[self.gates] = 0.0
        limit = self.options.new_gates or len(self.gates)
        worst = outside.topk(min(limit, self.problem.n_gates))
        return worst.indices[worst.values > level]

    def _embedded(self, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks of all gates, zero outside of the set."""
        whole = blocks.new_zeros(self.problem.operator.block_shape)
        whole[self.gates] = blocks
        return whole

    def estimated_gap(self) -> float | None:
        """The gap over all gates that the best pricing has found; None where a certificate is due for the trace."""
        due = self.gap > self.tol and self.steps - self.certified_at >= _CERTIFY_EVERY
        return None if due else self.gap

    def iterate(self) -> Iterate:
        self.certified_at = self.steps
        if self.priced is not None and self.gap <= self.tol:
            return self.priced
        point = self.inner.iterate()
        return Iterate(self._embedded(point.blocks()), dual=point.dual)

    def facts(self) -> dict[str, Any]:
        return {"gates": len(self.gates)}

    def state(self) -> dict[str, Any]:
        inner = {f"inner.{name}": value for name, value in self.inner.state().items()}
        return {**inner, "gates": self.gates, "steps": self.steps, "level": self.level}

    def load_state(self, state: dict[str, Any]) -> None:
        prefix = "inner."
        for name, value in state.items():
            if not name.startswith(prefix):
                setattr(self, name, value)
        # The point of the best pricing is not kept: it is found again.
        self.priced, self.gap, self.certified_at = None, math.inf, self.steps
        self._begin_round(None, rho=state[prefix + "rho"])
        self.inner.load_state({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
