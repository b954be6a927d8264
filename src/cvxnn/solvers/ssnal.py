"""A semismooth Newton augmented Lagrangian method for the convex ReLU program with one output."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.certificates import Certificate, relative_gap
from cvxnn.columns import Columns
from cvxnn.cones import LongProjections
from cvxnn.dual_norms import price_cones
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.validation import check_integer, check_positive

__all__ = ["Ssnal"]

_ARMIJO = 1e-4
_SHORTEST_STEP = 1e-10
#: What a line search may leave of a step at once.
_LEAST_SHARE, _LARGEST_SHARE = 0.1, 0.7
_LARGEST = 1e12
#: Patterns of the working set are kept as numbers up to this size.
_KEPT_ENTRIES = 1 << 24
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


@dataclass
class _Groups:
    """The vectors x of every (gate, sign), at first those of sign +1: shrunken projections onto the cones.

    `chosen` are the groups that are not zero, `unit` their directions, `shares` what the shrinkage left of the
    projections, `faces` the projectors on the spans of their faces, `penalty` and `squares` the sums of ||x|| and
    ||x||^2.
    """

    chosen: torch.Tensor
    x: torch.Tensor
    unit: torch.Tensor
    shares: torch.Tensor
    faces: torch.Tensor
    penalty: float
    squares: float


@dataclass
class _Inner:
    """The inner function at a multiplier: value, gradient, and the point that belongs to it, with the loss at T."""

    value: float
    gradient: torch.Tensor
    T: torch.Tensor
    loss: float
    groups: _Groups
    intercept: float


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
    check_every: ClassVar[int] = 1
    factored: ClassVar[bool] = True
    cones: ClassVar[bool] = True

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.cones is None:
            return "it is for ReLU problems; use 'admm'"
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
        self.part = self.op if len(self.gates) == self.op.n_gates else self.op.select(self.gates)
        self.projections = LongProjections(self.all_cones, self.gates)
        few = self.part.patterns.numel() <= _KEPT_ENTRIES
        self.bits = self.part.patterns.T.to(self.x.dtype).contiguous() if few else None

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

    def _working_gap(self, found: _Inner, before: torch.Tensor) -> float:
        """Relative duality gap on the working set, without allowance for rounding.

        x = prox(x_old -+ sigma G) gives ||Proj(-+G)|| <= beta + ||x_old - x|| / sigma for every group.
        """
        problem, loss = self.problem, self.problem.loss
        outputs = self._outputs(found.groups)[:, None]
        outputs = outputs + problem.best_intercept(outputs)
        primal = float(loss.value(outputs, problem.Y64, problem.weights) + problem.beta * found.groups.penalty)
        q = problem.beta + float((self.x - before).norm(dim=2).max()) / self.sigma
        nu = self.dual[:, None]
        if problem.output_bias:
            nu = loss.center_dual(nu, problem.Y64, problem.weights)
        nu = loss.round_to_domain(nu, problem.Y64, problem.weights)
        scale = loss.dual_scale(nu, problem.Y64, problem.weights, problem.beta / q)
        return relative_gap(primal, -float(loss.conjugate(scale * nu, problem.Y64, problem.weights)))

    def _scale(self, factor: float) -> None:
        self.sigma, self.tau, self.rho = factor * self.sigma, factor * self.tau, factor * self.rho

    def _move(self, found: _Inner) -> None:
        self.x = torch.zeros_like(self.x)
        self.x.view(-1, self.x.shape[2])[found.groups.chosen] = found.groups.x
        self.T, self.b = found.T, found.intercept

    def _minimise(self) -> _Inner:
        """Semismooth Newton on the inner function, from the last multipliers."""
        self.rounds += 1
        tolerance = max(1e-3 * self.tol, 10.0 ** -(2 + self.rounds))
        point = self._inner(self.dual)
        for steps in range(self.options.newton_iter + 1):
            self.newton_steps = steps
            size = float(self.dual.norm())
            done = float(point.gradient.norm()) * size <= tolerance * (
                point.loss + self.problem.beta * point.groups.penalty
            )
            if done or steps == self.options.newton_iter or self._late():
                break
            direction = self._newton_direction(point)
            slope = float(direction @ point.gradient)
            step, trial = self._search(point, direction, slope)
            if trial is None:
                break
            self.dual, point = self.dual + step * direction, trial
        return point

    def _search(self, point: _Inner, direction: torch.Tensor, slope: float) -> tuple[float, _Inner | None]:
        """A step that decreases the inner function enough: 1, or zeros of its slope by secants."""
        step = 1.0
        while step > _SHORTEST_STEP:
            trial = self._inner(self.dual + step * direction)
            if trial.value <= point.value + _ARMIJO * step * slope + 1e-15 * abs(point.value):
                return step, trial
            end = float(direction @ trial.gradient)
            share = slope / (slope - end) if slope < 0 < end else 0.5
            step *= min(max(share, _LEAST_SHARE), _LARGEST_SHARE)
        return step, None

    def _inner(self, dual: torch.Tensor) -> _Inner:
        problem, loss = self.problem, self.problem.loss
        moved = self.T + self.tau * dual
        T2 = loss.prox(moved[:, None], problem.Y64, problem.weights, 1 / self.tau)
        T, at_T = T2[:, 0], float(loss.value(T2, problem.Y64, problem.weights))
        change = T - self.T
        value = float(dual @ T) - at_T - float(change @ change) / (2 * self.tau)
        groups = self._groups(dual)
        value += groups.squares / (2 * self.sigma)
        total = float(dual.sum()) if problem.output_bias else 0.0
        intercept = self.b - self.rho * total
        value -= self.b * total - self.rho / 2 * total**2
        gradient = T - self._outputs(groups) - intercept
        return _Inner(value, gradient, T, at_T, groups, intercept)

    def _groups(self, dual: torch.Tensor) -> _Groups:
        """The prox of z, where it is not zero."""
        G = self._adjoint(dual)
        z = self.x - self.sigma * torch.stack([G, -G])
        threshold = self.sigma * self.problem.beta
        chosen, point, faces = self.projections(z, threshold)
        sizes = torch.linalg.vector_norm(point, dim=1, keepdim=True)
        lengths = (sizes - threshold).clamp_min_(0)
        shares, unit = lengths / sizes, point / sizes
        sums = float(lengths.sum()), float((lengths * lengths).sum())
        return _Groups(chosen, shares * point, unit, shares[:, 0], faces, *sums)

    def _adjoint(self, dual: torch.Tensor) -> torch.Tensor:
        """X^T D_k dual for the gates of the working set, (B, d)."""
        if self.bits is None:
            return self.part.adjoint(dual[:, None])[:, :, 0]
        return self.bits @ (self.X * dual[:, None])

    def _masks(self, chosen: torch.Tensor) -> torch.Tensor:
        """The diagonals of D_k of some groups, (s, n)."""
        place = chosen % len(self.gates)
        return self.part.patterns[:, place].T.to(self.X.dtype) if self.bits is None else self.bits[place]

    def _outputs(self, groups: _Groups) -> torch.Tensor:
        """sum +-D_k X x_kj."""
        signed = torch.where((groups.chosen < len(self.gates))[:, None], groups.x, -groups.x)
        return (self.X * (self._masks(groups.chosen).T @ signed)).sum(1)

    def _newton_direction(self, point: _Inner) -> torch.Tensor:
        """Solve (diag + B B^T) d = -gradient on its smaller side."""
        problem, ones = self.problem, torch.ones_like(point.T)[:, None]
        curvature = problem.loss.hessian_product(point.T[:, None], problem.Y64, problem.weights, ones)[:, 0]
        diagonal = self.tau / (1 + self.tau * curvature)
        low_rank = [math.sqrt(self.sigma) * self._directions(point.groups)]
        if problem.output_bias:
            low_rank.append(math.sqrt(self.rho) * ones)
        B = torch.cat(low_rank, dim=1)
        right = -point.gradient
        if B.shape[1] >= len(right):
            return _solve(B @ B.T + diagonal.diag(), right)
        scaled = B / diagonal[:, None]
        small = B.T @ scaled
        small.diagonal().add_(1.0)
        return right / diagonal - scaled @ _solve(small, scaled.T @ right)

    def _directions(self, groups: _Groups) -> torch.Tensor:
        """Columns of D_k X M^(1/2), with M the derivative of the prox: the face, shortened across x.

        One column for each group on a ray, d for the others: (n, at most r d).
        """
        masks = self._masks(groups.chosen)
        more = groups.faces.diagonal(dim1=1, dim2=2).sum(1) > 1.5
        wide = more.nonzero()[:, 0]
        rays = (masks * (groups.unit @ self.X.T))[~more].T
        if len(wide) == 0:
            return rays
        unit, root = groups.unit[wide], groups.shares[wide].sqrt()[:, None, None]
        roots = root * groups.faces[wide] + (1 - root) * unit.unsqueeze(2) * unit.unsqueeze(1)
        spans = (self.X @ roots) * masks[wide].unsqueeze(2)
        return torch.cat([rays, spans.transpose(0, 1).flatten(1)], dim=1)

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


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        if not bool(torch.isfinite(matrix).all()):
            raise torch.linalg.LinAlgError("the Newton matrix is not finite")
        return torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


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
