"""What all solvers on factors share: the first point, the rank, the point to certify, the last word."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from sklearn.utils import check_random_state

from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate
from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss, Slopes
from cvxnn.norms import VECTOR_NORMS
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver

__all__ = ["MAX_DEFAULT_RANK", "BurerMonteiro"]

#: ``rank=None`` is min(p, q), at which there are no spurious local minima, or this where that is more.
MAX_DEFAULT_RANK = 10
#: Size of the columns that fill up a warm start of smaller rank, relative to a random start.
_FILL = 1e-3
#: Columns of a warm start that are smaller than this, relative to the largest, count as missing.
_DEAD = 1e-8


class BurerMonteiro(Solver):
    """A solver on the columns (u_j, v_j) of all gates, with the penalty of (14)."""

    factored = True
    double: ClassVar[bool] = False
    #: Whether the method needs the smooth penalty of l2 norms.
    l2_only: ClassVar[bool] = False

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if not cls.l2_only or problem.norm.name == "nuclear":
            return None
        pair = f"({problem.norm.left!r}, {problem.norm.right!r})"
        return f"{cls.name} needs norms=('l2', 'l2'), whose penalty is smooth, not {pair}; use 'bm_gd' or 'frank_wolfe'"

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        self.loss = FactoredLoss(problem, double=self.double)
        self.op = self.loss.op
        self.rng = check_random_state(self.random_state)
        self.norms = (problem.norm.left, problem.norm.right)
        self.columns: Columns

    @property
    def target_rank(self) -> int:
        """Columns per gate."""
        _, p, q = self.op.block_shape
        return min(p, q, MAX_DEFAULT_RANK) if self.rank is None else self.rank

    def zero(self) -> Iterate:
        n_gates, p, q = self.op.block_shape
        Y = self.loss.Y
        return Iterate(None, factors=(Y.new_zeros(n_gates, p, 1), Y.new_zeros(n_gates, q, 1)))

    def start(self, point: Iterate | None) -> None:
        self.intercept = self.loss.Y.new_zeros(self.loss.Y.shape[1])
        if point is None or point.factors is None:
            self.columns = self.random_columns()
        else:
            self.columns = self.fitted(Columns.from_factors(*point.factors).to(self.loss.Y).clone())
        if self.problem.output_bias:
            outputs = self.op.apply_columns(self.columns).double()
            self.intercept = self.problem.best_intercept(outputs).to(self.loss.Y)

    def random_columns(self, scale: float = 1.0) -> Columns:
        """Gaussian columns with balanced sides; predictions are of the size of the sample, whatever P and m."""
        n_gates, p, q = self.op.block_shape
        m = self.target_rank
        entry = scale / math.sqrt(p * m * self.op.total_gates)
        gate = torch.arange(n_gates, device=self.loss.Y.device).repeat_interleave(m)
        u, v = self.draw(n_gates * m, p), self.draw(n_gates * m, q)
        ratio = (q / p) ** 0.25
        columns = Columns(gate, u * ratio, v / ratio)
        root = math.sqrt(entry)
        return Columns(gate, columns.u * root, columns.v * root).to(self.loss.Y)

    def draw(self, n_columns: int, length: int) -> torch.Tensor:
        """Normal numbers (r, length) for as many columns of each gate, on the CPU; drawn for those of all processes."""
        each = n_columns // self.op.n_gates
        drawn = torch.from_numpy(self.rng.standard_normal((self.op.total_gates * each, length)))
        first = self.op.first_gate * each
        return drawn[first : first + n_columns]

    def fitted(self, columns: Columns) -> Columns:
        """The columns with exactly `target_rank` per gate: the best pairs, and small random ones."""
        n_gates, m = self.op.n_gates, self.target_rank
        # Columns of zeros would stay there: the gradient in them is zero.
        columns = columns.without_zeros(_DEAD)
        if len(columns) > n_gates * m or int(columns.counts(n_gates).max()) > m:
            columns = columns.compressed(n_gates, _DEAD, most=m)
        missing = m - columns.counts(n_gates)
        if int(missing.max()) > 0:
            small = self.random_columns(_FILL)
            place = torch.arange(len(small), device=small.gate.device) % m
            columns = Columns.joined(columns, small[place < missing[small.gate]])
        return columns[torch.argsort(columns.gate, stable=True)]

    def penalty(self, columns: Columns) -> float:
        """beta/2 times the sum of ||u_j||_C^2 + ||v_j||_R^2."""
        left, right = (VECTOR_NORMS[name] for name in self.norms)
        total = left.value(columns.u).square().sum() + right.value(columns.v).square().sum()
        return self.loss.problem.beta / 2 * self.op.over_gates(float(total))[0]

    def euclidean(self, *parts: torch.Tensor) -> float:
        """Euclidean length of tensors over all columns."""
        return math.sqrt(self.op.over_gates(_squares(*parts))[0])

    def residual(self, columns: Columns, slopes: Slopes) -> float:
        """Relative residual of the stationarity conditions (68), (69), for l2 norms."""
        beta = self.problem.beta
        left, right = slopes.left + beta * columns.u, slopes.right + beta * columns.v
        size, residual = self.op.over_gates(_squares(columns.u, columns.v), _squares(left, right))
        return math.sqrt(residual / size) / beta if size > 0 else 0.0

    def iterate(self) -> Iterate:
        factors = self.columns.balanced(self.norms).factors(self.op.n_gates)
        return Iterate(None, factors=factors)

    def state(self) -> dict[str, Any]:
        return {
            "gate": self.columns.gate + self.op.first_gate,
            "u": self.columns.u.clone(),
            "v": self.columns.v.clone(),
            "intercept": self.intercept.clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.columns = Columns(state["gate"] - self.op.first_gate, state["u"], state["v"])
        self.intercept = state["intercept"]

    def run_facts(self) -> list[Any]:
        seed = self.random_state if isinstance(self.random_state, int) else None
        return [self.rank, seed]

    def message(self, certificate: Certificate) -> str:
        if math.isinf(certificate.relative_gap):
            return "the lower bound is zero, so that no gap can be told"
        if not certificate.gate_ratios:
            return "stationary above the tolerance; there are too many gates to say at which"
        ratios = torch.tensor(certificate.gate_ratios)
        worst = int(ratios.argmax())
        # What violates a gate by far more than what is left of the slopes is not a matter of accuracy.
        if certificate.stationarity > max(STATIONARITY_TOLERANCE, 1e-3 * (float(ratios[worst]) - 1)):
            return (
                f"the solver cannot go on, at a relative stationarity residual of {certificate.stationarity:.1e}: "
                "this is its conditioning, not the rank; 'bm_global' whitens each gate"
            )
        if float(ratios[worst]) <= 1 + 10 * STATIONARITY_TOLERANCE:
            return "no gate is violated: the remaining gap is one of accuracy"
        m = self.target_rank
        ranks = self.op.all_gates(self.columns.compressed(self.op.n_gates, 1e-7).counts(self.op.n_gates)).cpu()
        seen = f"gate {worst} has ||G_k|| = {float(ratios[worst]):.4g} beta, so that another column there helps"
        violated = ratios > 1 + 10 * STATIONARITY_TOLERANCE
        if bool((ranks[violated] >= m).all()):
            return f"stationary at rank {m}, which is too small: {seen}; raise rank, or use 'bm_global'"
        return (
            f"stationary, but a saddle point: {seen}, and the gate has rank {int(ranks[worst])} of {m}; "
            "leave it with 'bm_noisy_gd' or 'bm_global'"
        )


def _squares(*parts: torch.Tensor) -> float:
    return float(torch.stack([part.square().sum() for part in parts]).sum())
