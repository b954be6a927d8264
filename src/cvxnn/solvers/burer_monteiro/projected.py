"""Projected gradient descent on the factors of ReLU networks, whose columns stay in the cones of their gates (19)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate
from cvxnn.columns import Columns
from cvxnn.cones import Cones, Projection
from cvxnn.errors import InvalidInputError
from cvxnn.factored import FactoredLoss, Slopes
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.base import MAX_DEFAULT_RANK, BurerMonteiro
from cvxnn.solvers.burer_monteiro.eliminated import Eliminated
from cvxnn.solvers.burer_monteiro.grams import WhitenedGrams, gate_grams
from cvxnn.solvers.burer_monteiro.joint import Joint
from cvxnn.solvers.burer_monteiro.local import LocalProblem
from cvxnn.validation import check_choice, check_flag, check_positive

__all__ = ["BmProjectedGd", "ProjectedDescent", "ProjectedOptions", "local_problem"]

#: Relative residual of stationarity at which a point counts as stationary.
_STATIONARY = 1e-10
#: Iterations between two residuals.
_WATCH_EVERY = 10
#: Changes of the objective below this, relative to it, are rounding.
_ROUNDING = 4e-16
#: Iterations without a decrease after which rounding is the limit.
_PATIENCE = 100
#: Shortest step of a line search, relative to the first.
_SHORTEST = 1e-30
#: Columns of a random start lie so far from the axis of their cone, relative to its margin.
_SPREAD = 2.0
#: With two columns per gate and one output, both often end with v of one sign; with four hardly ever.
_LEAST_RANK = 4
#: Size of the columns that fill up a warm start, relative to a random start.
_FILL = 1e-3

Parts = list[torch.Tensor]


@dataclass(frozen=True)
class ProjectedOptions:
    """Options of ``bm_projected_gd``.

    Attributes
    ----------
    momentum : {"nesterov", "heavy_ball", "none"}
        Kept as long as the objective falls; dropped, and built up again, where it does not. "none" starts its line
        search at the step of Barzilai and Borwein.
    eliminate : bool
        Minimise V and the intercept out where the loss is squared, in place of moving U, V and the intercept
        together: several times fewer iterations, but more often they end at a stationary point that is not global.
    scaling : bool
        A step for each column, inverse to a bound of its own curvature, in place of one for all.
    step : float or None
        Length of the first step, relative to these bounds with `scaling`; None is 1 with it, and 1 over the largest
        bound without.
    step_growth : float
        The step may grow by this factor per iteration before backtracking halves it; at least 1.
    heavy_ball : float
        Momentum of the heavy ball, in [0, 1).
    init_scale : float
        Size of the random start.
    """

    momentum: str = "nesterov"
    eliminate: bool = False
    scaling: bool = True
    step: float | None = None
    step_growth: float = 1.1
    heavy_ball: float = 0.9
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self.momentum, "momentum", ("nesterov", "heavy_ball", "none"))
        check_flag(self.eliminate, "eliminate")
        check_flag(self.scaling, "scaling")
        check_positive(self.step, "step", allow_none=True)
        check_positive(self.init_scale, "init_scale")
        if not check_positive(self.step_growth, "step_growth") >= 1:
            raise InvalidInputError(f"step_growth is {self.step_growth!r}; a number of at least 1 is wanted")
        if not 0 <= check_positive(self.heavy_ball, "heavy_ball", allow_zero=True) < 1:
            raise InvalidInputError(f"heavy_ball is {self.heavy_ball!r}; a number in [0, 1) is wanted")


class ProjectedDescent:
    """Projected gradient steps with line search and momentum on a local problem; the objective never rises.

    From y = x + mu (x - x_last) the trial point is Proj(y - t M g(y)), with one number of M per column, and t halved
    until f(trial) <= f(y) + g(y).d + d.M^-1 d / 2t for the step d. Where then f(trial) > f(x), the momentum is
    dropped and the step repeated from y = x, from which the condition is one of sufficient decrease
    (Beck, Teboulle 2009; O'Donoghue, Candes 2015). The heavy ball takes the gradient at x.

    Parameters
    ----------
    local : Joint or Eliminated
        Its first variable is u.
    cones : Cones
    parts : list of torch.Tensor
        Variables to start from, u feasible.
    options : ProjectedOptions
    """

    def __init__(
        self, local: LocalProblem, cones: Cones, parts: Sequence[torch.Tensor], options: ProjectedOptions
    ) -> None:
        self.local, self.cones, self.options = local, cones, options
        self.norms = _operator_norms(local)
        self.x = [part.clone() for part in parts]
        self.last, self.last_slopes = self.x, [torch.zeros_like(part) for part in parts]
        self.inertia, self.length, self.still = 1.0, options.step or 1.0, 0
        self.faces: Projection | None = None
        self._evaluate()
        self.lowest = self.value

    def _evaluate(self) -> None:
        self.value, self.slopes = self.local.evaluate(self.x)
        self.metric = self._metric(self.x)

    @property
    def stuck(self) -> bool:
        """Whether rounding is the limit: no decrease in many steps."""
        return self.still >= _PATIENCE

    def step(self) -> None:
        """One step, with momentum if that keeps descent."""
        grown = (1 + math.sqrt(1 + 4 * self.inertia**2)) / 2
        mu = (self.inertia - 1) / grown
        if self.options.momentum == "heavy_ball":
            mu = min(mu, self.options.heavy_ball)
        self.length *= self.options.step_growth
        if self.options.momentum != "none" and mu > 0 and self._advance(mu):
            self.inertia = grown
        else:
            self.inertia = (1 + math.sqrt(5)) / 2
            self._advance(0.0)
        self.still = 0 if self.value < self.lowest * (1 - _ROUNDING) else self.still + 1
        if self.still == 0:
            self.lowest = self.value

    def _advance(self, mu: float) -> bool:
        """A step with momentum mu; False, and no step, if the objective would rise."""
        y, value, slopes, metric = self.x, self.value, self.slopes, self.metric
        if mu > 0:
            y = [part + mu * (part - old) for part, old in zip(self.x, self.last, strict=True)]
            if self.options.momentum == "nesterov":
                value, slopes = self.local.evaluate(y)
                metric = self._metric(y)
        exact = mu == 0 or self.options.momentum == "nesterov"
        length = self._first_length() if self.options.momentum == "none" else self.length
        least = _SHORTEST * length
        while True:
            trial = self._projected(y, slopes, metric, length)
            new, new_slopes = self.local.evaluate(trial)
            change = [part - old for part, old in zip(trial, y, strict=True)]
            model = value + _inner(slopes, change) + _inner(change, change, metric) / (2 * length)
            if not exact or new <= model + _ROUNDING * abs(value):
                break
            length /= 2
            if length < least:
                return False
        if not new <= self.value * (1 + _ROUNDING):
            return False
        if mu > 0 and exact:
            # Momentum that points uphill is of no use from here on.
            uphill = _inner(change, [part - old for part, old in zip(trial, self.x, strict=True)], metric) < 0
            self.inertia = 1.0 if uphill else self.inertia
        self.last, self.last_slopes, self.x = self.x, self.slopes, trial
        self.value, self.slopes, self.length = new, new_slopes, length
        self.metric = self._metric(trial)
        return True

    def _projected(self, y: Parts, slopes: Parts, metric: Parts, length: float) -> Parts:
        trial = [part - length * m * slope for part, m, slope in zip(y, metric, slopes, strict=True)]
        self.faces = self.cones.project(self.local.gate, trial[0], self.faces)
        return [self.faces.point, *trial[1:]]

    def _first_length(self) -> float:
        """The step of Barzilai and Borwein in the metric, or that of the last step where it is of no use."""
        step = [part - old for part, old in zip(self.x, self.last, strict=True)]
        bend = _inner(step, [new - old for new, old in zip(self.slopes, self.last_slopes, strict=True)])
        size = _inner(step, step, self.metric)
        return min(size / bend, 1e3 * self.length) if bend > 0 and size > 0 else self.length

    def _metric(self, parts: Parts) -> Parts:
        """M: inverse bounds of the curvature in each column alone; `parts` were evaluated last."""
        local = self.local
        if isinstance(local, Eliminated) and not hasattr(local, "V"):
            raise torch.linalg.LinAlgError("V cannot be eliminated in float64 at this beta")
        v = local.op.merge_right(local.V) if isinstance(local, Eliminated) else parts[1]
        sizes = [v.square().sum(1, keepdim=True), parts[0].square().sum(1, keepdim=True)]
        bounds = [local.beta + self.norms * size for size in sizes[: len(parts)]]
        if len(parts) > 2:
            total = local.problem.loss.smoothness * float(local.loss.weights.sum())
            bounds.append(parts[2].new_full((1,), max(total, local.beta)))
        if not self.options.scaling:
            largest = max(float(part.max()) for part in bounds)
            bounds = [torch.full_like(part, largest) for part in bounds]
        return [1 / part for part in bounds]

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to go on to the same result."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self._NUMBERS}
        for name in ("x", "last", "last_slopes"):
            state |= {f"{name}{i}": part for i, part in enumerate(getattr(self, name))}
        return state | ({} if self.faces is None else {"faces": self.faces.index})

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        for name in ("x", "last", "last_slopes"):
            setattr(self, name, [state[f"{name}{i}"] for i in range(len(self.x))])
        self._evaluate()
        for name in self._NUMBERS:
            setattr(self, name, state[name])
        if "faces" in state:
            index = state["faces"]
            self.faces = Projection(self.x[0], index, torch.zeros_like(index, dtype=self.x[0].dtype), self.x[0])

    _NUMBERS: ClassVar[tuple[str, ...]] = ("inertia", "length", "still", "lowest")


def _operator_norms(local: LocalProblem) -> torch.Tensor:
    """||W^(1/2) D_k X||_2^2 times the curvature of the loss, for the gate of each column, (r, 1)."""
    largest = torch.linalg.eigvalsh(gate_grams(local.loss, local.gates))[:, -1:].clamp_min(0)
    return local.problem.loss.smoothness * largest[local.place]


def _inner(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], metric: Parts | None = None) -> float:
    """Sum of the products, divided by the metric where there is one."""
    if metric is None:
        return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))
    return float(sum((a * b / m).sum() for a, b, m in zip(left, right, metric, strict=True)))


class BmProjectedGd(BurerMonteiro):
    """Projected gradient descent on (19): each column u_j in the cone {u : (2 D_k - I) X u >= 0} of its gate.

    Descent is on U, V and the intercept together, or on U with V minimised out (squared loss); see
    :class:`ProjectedDescent`. A column stays with its gate and, as v_j = 0 is a saddle point, mostly with the signs of
    its v_j; stationary points need not be global, also with many columns. Always in float64.
    """

    name = "bm_projected_gd"
    Options = ProjectedOptions
    default_max_iter: ClassVar[int] = 20_000
    check_every: int = 10
    cones: ClassVar[bool] = True
    double = True

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        return "it is for ReLU problems; use 'bm_gd'" if problem.cones is None else None

    @property
    def target_rank(self) -> int:
        """Columns per gate: by default twice min(d, c), as v and -v need different columns, and at least 4."""
        _, p, q = self.op.block_shape
        return min(max(_LEAST_RANK, 2 * min(p, q)), MAX_DEFAULT_RANK) if self.rank is None else self.rank

    def start(self, point: Iterate | None) -> None:
        super().start(point)
        self.iteration = 0
        self.first_offset = 0.0
        self.descent = self._descent(self.columns, self.intercept)

    def _descent(self, columns: Columns, intercept: torch.Tensor) -> ProjectedDescent:
        local = local_problem(self.problem, self.loss, columns, self.options.eliminate)
        return ProjectedDescent(local, self._cones, local.variables(columns, intercept), self.options)

    @property
    def _cones(self) -> Cones:
        assert self.problem.cones is not None
        return self.problem.cones

    def random_columns(self, scale: float = 1.0) -> Columns:
        """Columns around the axes of their cones, with v and -v in turn; of the size of those of other solvers."""
        drawn = super().random_columns(scale * self.options.init_scale)
        axis, margin = self._cones.interior(drawn.gate)
        free = (margin <= 0) | margin.isinf()
        draws = drawn.u / drawn.u.norm(dim=1, keepdim=True)
        near = axis + (_SPREAD * torch.where(free, 0.0, margin)).unsqueeze(1) * draws
        u = self._cones.project(drawn.gate, torch.where(free.unsqueeze(1), draws, near)).point
        v = drawn.v.clone()
        place = torch.arange(len(v), device=v.device) % self.target_rank
        second = (place % 2 == 1).nonzero()[:, 0]
        v[second] = -v[second - 1]
        size = v.norm(dim=1, keepdim=True)
        return Columns(drawn.gate, u * size / u.norm(dim=1, keepdim=True).clamp_min(1e-300), v)

    def fitted(self, columns: Columns) -> Columns:
        """The columns, projected onto their cones, and small random ones in gates that have less than `target_rank`.

        With `rank` given, at most so many per gate are kept: the largest.
        """
        columns = columns.without_zeros()
        columns = Columns(columns.gate, self._cones.project(columns.gate, columns.u).point, columns.v).balanced()
        columns = columns.without_zeros()
        order = torch.argsort(columns.sizes(), descending=True)
        columns = columns[order[torch.argsort(columns.gate[order], stable=True)]]
        counts = columns.counts(self.op.n_gates)
        if self.rank is not None:
            place = torch.arange(len(columns), device=counts.device) - (counts.cumsum(0) - counts)[columns.gate]
            columns = columns[place < self.rank]
        missing = (self.target_rank - counts).clamp_min(0)
        small = self.random_columns(_FILL)
        place = torch.arange(len(small), device=counts.device) % self.target_rank
        columns = Columns.joined(columns, small[place < missing[small.gate]])
        return columns[torch.argsort(columns.gate, stable=True)]

    def step(self) -> None:
        self.descent.step()
        self.iteration += 1
        if self.iteration % _WATCH_EVERY == 0 or self.descent.stuck:
            self.finished = self.descent.stuck or self._is_stationary()

    def _is_stationary(self) -> bool:
        columns, intercept = self._point()
        slopes = self.loss.slopes(columns, intercept)
        offset = float(slopes.intercept.abs().max())
        self.first_offset = max(self.first_offset, offset)
        at_rest = not self.problem.output_bias or offset <= _STATIONARY * self.first_offset
        return at_rest and self.residual(columns, slopes) <= _STATIONARY

    def residual(self, columns: Columns, slopes: Slopes) -> float:
        """Relative residual of u_j = Proj(-G_k v_j / beta) and v_j = -G_k^T u_j / beta."""
        beta = self.problem.beta
        size = columns.u.square().sum() + columns.v.square().sum()
        left = columns.u - self._cones.project(columns.gate, -slopes.left / beta, self.descent.faces).point
        right = slopes.right / beta + columns.v
        residual = left.square().sum() + right.square().sum()
        return math.sqrt(float(residual / size)) if float(size) > 0 else 0.0

    def _point(self) -> tuple[Columns, torch.Tensor]:
        return self.descent.local.point(self.descent.x)

    def iterate(self) -> Iterate:
        self.columns, self.intercept = self._point()
        return super().iterate()

    def state(self) -> dict[str, Any]:
        numbers = {"iteration": self.iteration, "first_offset": self.first_offset}
        return super().state() | numbers | {f"descent.{name}": part for name, part in self.descent.state().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.iteration, self.first_offset = state["iteration"], state["first_offset"]
        self.descent = self._descent(self.columns, self.intercept)
        prefix = "descent."
        self.descent.load_state(
            {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
        )

    def message(self, certificate: Certificate) -> str:
        if math.isinf(certificate.relative_gap):
            return "the lower bound is zero, so that no gap can be told"
        if certificate.stationarity > STATIONARITY_TOLERANCE:
            return (
                f"the solver cannot go on, at a relative stationarity residual of {certificate.stationarity:.1e}: this "
                "is the accuracy that rounding and its conditioning allow"
            )
        return (
            f"stationary at up to {certificate.dual_norm_ratio:.4g} beta: for ReLU such a point need not be global, "
            "whatever the rank; 'bm_global' adds the neurons that lower the objective"
        )


def local_problem(problem: Problem, loss: FactoredLoss, columns: Columns, eliminate: bool) -> LocalProblem:
    """(19) near the columns, as a function of U where V can be minimised out, otherwise of U, V and the intercept."""
    kind = Eliminated if eliminate and problem.loss.name == "squared" else Joint
    return kind(problem, loss, columns, lambda: WhitenedGrams(loss))
