"""ADMM on the gates that matter so far; all gates are priced between rounds (column generation)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from cvxnn.bounds import dual_bound
from cvxnn.certificates import Certificate, evaluate, relative_gap
from cvxnn.problem import Problem
from cvxnn.solvers.admm import Admm, AdmmOptions
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.solvers.gate_kernels import GateKernels, KernelsOfSet
from cvxnn.solvers.pricing import Pricing
from cvxnn.solvers.scaled_samples import ScaledSamples
from cvxnn.solvers.vector_admm import VectorAdmm, VectorAdmmOptions
from cvxnn.solvers.vector_costs import choose_system, is_worthwhile
from cvxnn.validation import check_integer

__all__ = ["WorkingSet"]

#: Relative gap of the first round on its gates; later rounds are solved to a tenth of the gap over all gates.
_FIRST_GAP = 1e-1
_SHARE = 0.1
#: The same for "vector_admm", whose dual points are priced in float32 whenever it looks at its gap.
_FIRST_VECTOR_GAP = 1e-2
_VECTOR_SHARE = 1e-2
#: Gates of the first round, where not given: this share, within these numbers.
_PART = 10
_LEAST, _MOST = 10, 100
#: Steps of a round of "vector_admm" that is to find gates only; so many times its gates may join it. Where fewer than
#: this share of them do, the next round is solved. So few wait until a round is solved.
_ROUGH_STEPS = 4
_GROWTH = 2
_SETTLED = 0.05
_FEW = 0.01
_NEVER = 2**31
#: Gates whose norms are above so much of that join too.
_NEARLY = 0.98
#: More than what float32 adds to a dual norm.
_ROUNDING = 1 + 1e-6
#: Share of the tolerance that the last round is solved to.
_LAST_SHARE = 0.5
#: Steps between two looks at the gap of a round, where it is not known from better points.
_LOOK_EVERY = 5
#: Steps after which the whole problem is certified all the same: for the trace, callbacks and stalled runs.
_CERTIFY_EVERY = 50


@dataclass(frozen=True)
class WorkingSetOptions:
    """Options of ``working_set``.

    Attributes
    ----------
    gates : int or None
        Gates of the first round; with a warm start the least number of them. None for a tenth of all, 10 to 100.
    new_gates : int or None
        Violated gates that are added at most after a pricing; None for as many as there are gates in the set, and
        twice as many as long as the set is sought.
    """

    gates: int | None = None
    new_gates: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.gates, "gates", allow_none=True)
        check_integer(self.new_gates, "new_gates", allow_none=True)


class WorkingSet(Solver):
    """Rounds of ADMM on some of the gates, the others at zero.

    Where ``vector_admm`` can serve, the first rounds are a few steps each, after which gates join whose dual norms are
    above beta, until few do. A round after them is solved to a gap of its own. Then the dual norms of all gates are
    bounded from its dual candidate (:class:`~cvxnn.solvers.pricing.Pricing`): this gives a bound of the whole problem,
    and the gates whose norm is above beta are those that can lower the objective. The worst of them join, gates that
    are certainly inactive leave, and the next round starts where the last one ended. A round with no gate to join is
    solved further. The result is one of all gates: the driver certifies it on the whole problem.
    """

    name = "working_set"
    Options = WorkingSetOptions
    default_max_iter: ClassVar[int] = 50_000
    check_every: int = 1

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.n_gates == 1:
            return "there is one gate only; use 'admm'"
        if not problem.norm.has_prox:
            return f"it needs the prox of the norm, which {problem.norm.name} does not have; use 'frank_wolfe'"
        return None

    def start(self, point: Iterate | None) -> None:
        problem = self.problem
        self.pricing = Pricing(problem, self.kept)
        self.kernels: GateKernels = self.kept.setdefault("kernels", GateKernels())
        zero = self.zero()
        if point is None or point.dual is None:
            seen = evaluate(problem, zero.Z if point is None else point.Z)
            nu = problem.dual_candidate(seen.predictions)
        else:
            nu = point.dual.double()
        used = torch.zeros(problem.n_gates, dtype=torch.bool, device=problem.device)
        if point is not None:
            used = point.blocks().abs().amax((1, 2)) > 0
        norms = self.pricing.estimate(problem.centred(nu))
        # Gates in use come first.
        norms = norms + (norms.max() + problem.beta) * used
        wanted = self.options.gates or max(_LEAST, min(_MOST, problem.n_gates // _PART))
        first = max(min(wanted, problem.n_gates), int(used.sum()))
        self.gates = norms.topk(first).indices.sort().values
        self.rough = True
        self.steps, self.certified_at, self.level = 0, 0, _FIRST_GAP
        self.gap = math.inf
        self.priced: Iterate | None = None
        self._begin_round(None if point is None else self._restricted(point), rho=None)

    def _restricted(self, point: Iterate) -> Iterate:
        return Iterate(point.blocks()[self.gates], intercept=point.intercept, dual=point.dual)

    def _begin_round(self, point: Iterate | None, rho: float | None, vector: bool | None = None) -> None:
        """ADMM on the gates of the set, from a point on them; which one, is told where a run goes on."""
        self.part = part = self.problem.with_gates(self.gates)
        self.inner: Admm | VectorAdmm
        if vector is None:
            vector = VectorAdmm.unsupported(part) is None and is_worthwhile(part)
        if vector:
            self.level = min(self.level, max(_FIRST_VECTOR_GAP, self.tol))
            self.inner = self._vector(part)
        else:
            self.inner = Admm(part, replace(AdmmOptions(), rho=rho), self.level, self.time_limit)
            self.finished = Admm.unsupported(part) is not None
        self.inner.start(point)
        self.rough = self.rough and vector and len(self.gates) < self.problem.n_gates
        if self.rough and isinstance(self.inner, VectorAdmm):
            self.inner.next_look = _NEVER

    def _vector(self, part: Problem) -> VectorAdmm:
        """The solver of a round, which has what it can share with others."""
        if "samples" not in self.kept:
            self.kept["samples"] = ScaledSamples(self.problem)
        samples: ScaledSamples = self.kept["samples"]
        kernels = KernelsOfSet(self.kernels, self.gates.numpy())
        options = VectorAdmmOptions()
        if choose_system(part) == "iterative":
            # Blocks of the first rounds tell little of those to come.
            if "fit" not in self.kept:
                inner = VectorAdmm(self.problem, options, self.tol, self.time_limit, samples=samples)
                inner.kernels = kernels
                self.kept["fit"] = inner.fitting_rho("iterative") / self.problem.beta
            options = replace(options, rho=self.kept["fit"] * self.problem.beta)
        inner = VectorAdmm(part, options, self.tol, self.time_limit, samples=samples)
        inner.kernels = kernels
        return inner

    def step(self) -> None:
        self.inner.step()
        self.steps += 1
        inner = self.inner
        if not isinstance(inner, VectorAdmm):
            looks = inner.looks
            if looks is None or looks.dear:
                if self.steps % _LOOK_EVERY == 0:
                    self._look(inner.iterate())
            elif looks.looked == inner.iteration and looks.gap <= self.level:
                self._look(inner.iterate())
        elif self.rough:
            if inner.iteration >= _ROUGH_STEPS:
                self._grow(inner)
        elif inner.looked == inner.iteration:
            if inner.gap <= self.level:
                self._look(inner.iterate())
            else:
                self._extend(inner)

    def _grow(self, inner: VectorAdmm) -> None:
        """After a few steps of a round: gates that its last dual point asks for join, without a look at its gap."""
        nu = self.problem.centred(inner.dual_of(inner.system.r))
        norms = self.pricing.estimate(nu)
        used = inner.W.any(1)
        typical = float(norms[self.gates[torch.from_numpy(used)]].median()) if used.any() else 0.0
        joining = self._violated(norms, max(self.problem.beta, typical), _GROWTH * len(self.gates))
        self.rough = len(joining) > _SETTLED * len(self.gates)
        if len(joining) > _FEW * len(self.gates):
            self._join(joining, inner.blocks_of(inner.W), nu, inner.rho)
        else:
            inner.next_look = inner.iteration + _ROUGH_STEPS

    def _extend(self, inner: VectorAdmm) -> None:
        """After a look of a round at its gap: gates join at once where they are many or make the bound as loose."""
        nu = self.problem.centred(inner.dual_of(inner.best_r))
        norms = self.pricing.estimate(nu)
        joining = self._violated(norms)
        if len(joining) == 0:
            return
        excess = float(norms[joining].max()) / max(self.problem.beta, float(norms[self.gates].max())) - 1
        if len(joining) > _FEW * len(self.gates) or excess > inner.gap:
            self._join(joining, inner.blocks_of(inner.W), nu, inner.rho)

    def _look(self, point: Iterate) -> None:
        """Price all gates, where the round is solved far enough."""
        seen = evaluate(self.part, point.blocks())
        nu = self.problem.dual_candidate(seen.predictions) if point.dual is None else point.dual.double()
        nu = self.problem.centred(nu)
        if not isinstance(self.inner, VectorAdmm):
            reached = relative_gap(seen.primal, dual_bound(self.part, nu).lower_bound)
            if reached > self.level:
                return
        bound = self.pricing(nu, self.gates, seen)
        gap = relative_gap(seen.primal, bound.lower_bound)
        if gap < self.gap:
            self.gap = gap
            self.priced = Iterate(self._embedded(point.blocks()), dual=nu)
        self._tighten(gap)
        joining = self._violated(bound.norms_upper)
        if gap <= self.tol or len(joining) == 0:
            return
        self._join(joining, point.blocks(), nu, self.inner.rho)

    def _join(self, joining: torch.Tensor, blocks: torch.Tensor, nu: torch.Tensor, rho: float) -> None:
        """The next round, with more gates, from where the last one is."""
        whole = self._embedded(blocks)
        self.gates = self._next_set(joining, blocks)
        self._begin_round(self._restricted(Iterate(whole, dual=nu)), rho=rho)

    def _tighten(self, gap: float) -> None:
        """To which gap a round is solved before all gates are priced again."""
        if not isinstance(self.inner, VectorAdmm):
            self.level = max(_LAST_SHARE * self.tol, min(_SHARE * gap, self.level))
            self.inner.tol = self.level
            return
        if self.level <= self.tol:
            # The bound over all gates was not as good as that over the set.
            self.inner.tol = _LAST_SHARE * self.tol
        self.level = max(self.inner.tol, min(_VECTOR_SHARE * gap, self.level))

    def _next_set(self, joining: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The set without what is screened, and with what joins."""
        alive = torch.zeros(self.problem.n_gates, dtype=torch.bool, device=self.gates.device)
        alive[self.pricing.alive] = True
        # What is in use in the point counts in its value, whatever becomes of it.
        kept = self.gates[alive[self.gates] | (blocks.abs().amax((1, 2)) > 0)]
        return torch.cat([kept, joining]).sort().values

    def _violated(self, norms: torch.Tensor, level: float | None = None, most: int | None = None) -> torch.Tensor:
        """The worst gates outside of the set: those that hold the bound below that of the round.

        A round that is not solved has dual norms above beta itself; what is below its largest one costs nothing yet.
        Where there are such gates, those that are about as bad join too, as they would later.
        """
        if level is None:
            level = max(self.problem.beta, float(norms[self.gates].max()) * _ROUNDING)
        outside = norms.clone()
        outside[self.gates] = 0.0
        limit = self.options.new_gates or most or len(self.gates)
        worst = outside.topk(min(limit, self.problem.n_gates))
        if not bool((worst.values > level).any()):
            return worst.indices[:0]
        return worst.indices[worst.values > _NEARLY * level]

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
        return {"gates": len(self.gates), "screened": self.pricing.n_screened}

    def limited_by_rounding(self) -> bool:
        return self.inner.limited_by_rounding()

    def message(self, certificate: Certificate) -> str:
        return self.inner.message(certificate)

    def state(self) -> dict[str, Any]:
        inner = {f"inner.{name}": value for name, value in self.inner.state().items()}
        own = {"gates": self.gates, "alive": self.pricing.alive, "level": self.level}
        own |= {"steps": self.steps, "certified_at": self.certified_at, "rough": self.rough}
        if self.priced is not None:
            own |= {"gap": self.gap, "priced.Z": self.priced.blocks(), "priced.dual": self.priced.dual}
        return {**inner, **own, "vector": isinstance(self.inner, VectorAdmm)}

    def load_state(self, state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Any]] = {"": {}, "inner": {}, "priced": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value
            else:
                parts[""][name] = value
        own = parts[""]
        self.gates, self.level, self.steps = own["gates"], own["level"], own["steps"]
        self.certified_at, self.gap = own["certified_at"], own.get("gap", math.inf)
        self.priced = Iterate(**parts["priced"]) if parts["priced"] else None
        self.rough = own.get("rough", False)
        self.pricing.restrict(own["alive"])
        self._begin_round(None, rho=parts["inner"]["rho"], vector=own["vector"])
        self.inner.load_state(parts["inner"])
