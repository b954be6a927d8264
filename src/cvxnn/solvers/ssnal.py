"""A semismooth Newton augmented Lagrangian method for the convex ReLU program with one output."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from cvxnn.certificates import Certificate, relative_gap
from cvxnn.columns import Columns
from cvxnn.dual_norms import price_cones
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.solvers.ssnal_inner import Centre, InnerPoint, InnerProgram
from cvxnn.validation import check_integer, check_positive

__all__ = ["Ssnal"]

_LARGEST = 1e12
#: A step ends after so many rounds or seconds, for the sake of limits and of the progress bar.
_MOST_ROUNDS = 20
#: Growth of the penalty parameters while many gates are missing in the working set.
_CAREFUL = 3.0
_STEP_SECONDS = 2.0
#: Cosine from which two neurons count as one in a pricing.
_PARALLEL = 0.9999


@dataclass(frozen=True)
class SsnalOptions:
    """Options of ``ssnal``.

    Attributes
    ----------
    sigma : float
        First penalty parameter, relative to the scale of the problem.
    growth : float
        Its factor from one round to the next.
    newton_iter : int
        Limit of Newton steps in a round.
    working_set : int
        With more gates than this, rounds are done on the gates that matter so far, and all gates are priced
        between them.
    new_gates : int
        So many violated gates are added at most after a pricing.
    """

    sigma: float = 100.0
    growth: float = 5.0
    newton_iter: int = 50
    working_set: int = 1_000
    new_gates: int = 100

    def __post_init__(self) -> None:
        check_positive(self.sigma, "sigma")
        check_positive(self.growth, "growth")
        check_integer(self.newton_iter, "newton_iter")
        check_integer(self.working_set, "working_set")
        check_integer(self.new_gates, "new_gates")


class Ssnal(Solver):
    """min F(T) + beta sum ||x_kj|| over x_kj in the cone of gate k, T = sum +-D_k X x_kj + b (math section 3).

    The proximal point method on (x, T, b): with penalty parameters sigma and tau, each round minimises a convex,
    once differentiable function of the n multipliers lambda of the constraint T = A(x) + b, in which x is the
    prox of z = x_old -+ sigma X^T D_k lambda: the projection onto the cone, shortened by sigma beta. A
    generalised Newton method does that; its matrix is diagonal plus low rank, as only the groups with
    ||Proj(z)|| > sigma beta count, and each only in the span of its face (after Li, Sun, Toh 2018 for the
    lasso). Nothing is projected where ||z|| <= sigma beta.

    With many gates the rounds are on a working set, to which the gates that violate the dual constraint most are
    added (column generation).
    """

    name = "ssnal"
    Options = SsnalOptions
    default_max_iter: ClassVar[int] = 500
    check_every: int = 1
    factored: ClassVar[bool] = True
    cones: ClassVar[bool] = True

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.cones is None:
            return "it is for ReLU problems; use 'admm'"
        if problem.operator.architecture != "mlp":
            return f"it is for the architecture 'mlp', and this is {problem.operator.architecture!r}; use 'bm_global'"
        if problem.Y.shape[1] != 1:
            return f"it needs one output, and Y has {problem.Y.shape[1]}; use 'bm_global'"
        return None

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        self.begin = time.perf_counter()
        self.op = problem.operator.double()
        assert problem.cones is not None
        self.all_cones = problem.cones
        self.X = self.op.data_tensors()[0]
        self.priced = 0

    def start(self, point: Iterate | None) -> None:
        problem, Y = self.problem, self.problem.Y64
        self.rounds = self.stalled = 0
        self.gap = math.inf
        if point is None or point.factors is None:
            columns = Columns.from_factors(Y.new_zeros(1, self.op.block_shape[1], 1), Y.new_zeros(1, 1, 1))
        else:
            columns = Columns.from_factors(*(part.double() for part in point.factors))
        columns = columns.without_zeros()
        outputs = self.op.apply_columns(columns)
        offset = problem.best_intercept(outputs)
        self.T, self.b = (outputs + offset)[:, 0], float(offset)
        self.dual = problem.dual_candidate(outputs + offset)[:, 0]
        self._set_scales()
        every = torch.arange(self.op.n_gates, device=Y.device)
        self.gates = every if len(every) <= self.options.working_set else columns.gate.unique()
        self.x = Y.new_zeros(2, len(self.gates), self.op.block_shape[1])
        place = torch.searchsorted(self.gates, columns.gate)
        self.x.index_put_(((columns.v[:, 0] < 0).long(), place), columns.u * columns.v.abs(), accumulate=True)
        self._use_gates()
        self.growing = len(self.gates) < self.op.n_gates and self._add_gates()
        if self.growing:
            self._scale(0.01)

    def _set_scales(self) -> None:
        """First penalty parameters: sigma beta is of the size of a vector x that fits the targets by itself."""
        problem = self.problem
        slope = float(self.dual.abs().sum())
        largest = self.op.prediction_norm
        weight = float(problem.weights.max())
        size = slope / (weight * max(largest, 1e-300) * problem.n_samples) if weight > 0 else 0.0
        self.sigma = self.options.sigma * (size if 0 < size < math.inf else 1.0) / problem.beta
        self.tau = 10 / weight if weight > 0 else 1.0
        self.rho = self.sigma * largest**2
        self.limit = _LARGEST * self.sigma

    def _use_gates(self) -> None:
        part = self.op if len(self.gates) == self.op.n_gates else self.op.select(self.gates)
        self.inner = InnerProgram(self.problem, part, self.gates)

    def step(self) -> None:
        """Rounds until the working set is solved well enough for a certificate, then price all gates."""
        whole = len(self.gates) == self.op.n_gates
        target = self.tol / 2 if whole else max(self.tol / 2, 0.1 * self.gap)
        begin = time.perf_counter()
        for _ in range(_MOST_ROUNDS):
            before = self.x
            found = self._minimise()
            self._move(found)
            gap = self._working_gap(found, before)
            still = float((self.x - before).norm()) <= 1e-14 * float(self.x.norm()) and self.sigma >= self.limit
            if self.newton_steps >= self.options.newton_iter:
                self._scale(1 / self.options.growth)
            elif self.sigma < self.limit:
                self._scale(_CAREFUL if self.growing else self.options.growth)
            if self.growing or gap <= target or still or time.perf_counter() - begin > _STEP_SECONDS or self._late():
                break
        self.gap = min(self.gap, gap)
        count = len(self.gates)
        grown = count < self.op.n_gates and self._add_gates()
        self.growing = len(self.gates) - count > self.options.new_gates // 4
        self.stalled = self.stalled + 1 if still and not grown else 0
        self.finished = self.stalled >= 3

    def _late(self) -> bool:
        return self.time_limit is not None and time.perf_counter() - self.begin > self.time_limit

    def _working_gap(self, found: InnerPoint, before: torch.Tensor) -> float:
        """Relative duality gap on the working set, without allowance for rounding.

        x = prox(x_old -+ sigma G) gives ||Proj(-+G)|| <= beta + ||x_old - x|| / sigma for every group.
        """
        problem, loss = self.problem, self.problem.loss
        outputs = self._on_device(found.outputs)[:, None]
        outputs = outputs + problem.best_intercept(outputs)
        primal = float(loss.value(outputs, problem.Y64, problem.weights) + problem.beta * found.penalty)
        q = problem.beta + float((self.x - before).norm(dim=2).max()) / self.sigma
        nu = self.dual[:, None]
        if problem.output_bias:
            nu = loss.center_dual(nu, problem.Y64, problem.weights)
        nu = loss.round_to_domain(nu, problem.Y64, problem.weights)
        scale = loss.dual_scale(nu, problem.Y64, problem.weights, problem.beta / q)
        return relative_gap(primal, -float(loss.conjugate(scale * nu, problem.Y64, problem.weights)))

    def _scale(self, factor: float) -> None:
        self.sigma, self.tau, self.rho = factor * self.sigma, factor * self.tau, factor * self.rho

    def _move(self, found: InnerPoint) -> None:
        self.x = torch.zeros_like(self.x)
        self.x.view(-1, self.x.shape[2])[self._on_device(found.groups.chosen)] = self._on_device(found.groups.x)
        self.T, self.b, self.dual = self._on_device(found.T), found.intercept, self._on_device(found.dual)

    def _minimise(self) -> InnerPoint:
        """Semismooth Newton on the inner function, from the last multipliers."""
        self.rounds += 1
        tolerance = max(1e-3 * self.tol, 10.0 ** -(1 + self.rounds))
        x, T, dual = (part.cpu().numpy() for part in (self.x, self.T, self.dual))
        centre = Centre(x, T, self.b, self.sigma, self.tau, self.rho)
        found, self.newton_steps = self.inner.minimise(centre, dual, tolerance, self.options.newton_iter, self._late)
        return found

    def _on_device(self, values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.X.device)

    def _add_gates(self) -> bool:
        """Price all gates; take in those that violate the dual constraint most. False if none does."""
        nu = self.dual[:, None]
        level = self.problem.beta * (1 + 0.1 * self.tol)
        neurons = price_cones(
            self.op, self.problem.norm, self.all_cones, nu, above=level, most=20 * self.options.new_gates
        ).neurons
        self.priced += self.op.n_gates
        fresh = ~torch.isin(neurons.gate, self.gates) & (neurons.lower > level)
        neurons = neurons[fresh]
        neurons = neurons[torch.argsort(neurons.lower, descending=True)]
        chosen = _spread(neurons.u * neurons.v, self.options.new_gates)
        new = neurons.gate[chosen].unique()
        if len(new) == 0:
            return False
        gates = torch.cat([self.gates, new])
        x = torch.cat([self.x, self.x.new_zeros(2, len(new), self.x.shape[2])], dim=1)
        order = torch.argsort(gates)
        self.gates, self.x = gates[order], x[:, order]
        self._use_gates()
        return True

    def iterate(self) -> Iterate:
        flat = self.x.view(-1, self.x.shape[2])
        sizes = flat.norm(dim=1)
        chosen = (sizes > 0).nonzero()[:, 0]
        root = sizes[chosen].sqrt()[:, None]
        count = len(self.gates)
        signs = 1.0 - 2.0 * (chosen >= count).to(flat.dtype)
        columns = Columns(self.gates[chosen % count], flat[chosen] / root, signs[:, None] * root)
        return Iterate(None, dual=self.dual[:, None], factors=columns.factors(self.op.n_gates))

    def facts(self) -> dict[str, int]:
        return {"priced": self.priced, "working_set": len(self.gates)}

    def message(self, certificate: Certificate) -> str:
        return (
            "the Newton steps end in rounding errors at this scale of X and beta; try 'bm_global' or 'interior_point'"
        )

    def state(self) -> dict[str, Any]:
        numbers = ("sigma", "tau", "rho", "limit", "rounds", "stalled", "gap", "growing", "priced")
        return {name: getattr(self, name) for name in ("x", "T", "b", "dual", "gates", *numbers)}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._use_gates()


def _spread(directions: torch.Tensor, most: int) -> torch.Tensor:
    """Indices of unit rows, first come first served, that are not nearly parallel to one taken before."""
    free = torch.ones(len(directions), dtype=torch.bool, device=directions.device)
    taken: list[int] = []
    while len(taken) < most and bool(free.any()):
        best = int(free.to(torch.uint8).argmax())
        taken.append(best)
        free &= directions @ directions[best] < _PARALLEL
        free[best] = False
    return torch.tensor(taken, dtype=torch.long, device=directions.device)
