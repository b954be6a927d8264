"""A Burer-Monteiro solver that closes the gap: local descent, and columns where the certificate asks for them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.certificates import Certificate
from cvxnn.columns import Columns
from cvxnn.errors import UnsupportedError
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.burer_monteiro.base import BurerMonteiro
from cvxnn.solvers.burer_monteiro.cone_global import ConeGlobal
from cvxnn.solvers.burer_monteiro.descent import QuasiNewton
from cvxnn.solvers.burer_monteiro.eliminated import Eliminated
from cvxnn.solvers.burer_monteiro.escape import new_columns, proximal_step, violations
from cvxnn.solvers.burer_monteiro.grams import WhitenedGrams
from cvxnn.solvers.burer_monteiro.joint import Joint
from cvxnn.solvers.burer_monteiro.local import LocalProblem
from cvxnn.solvers.burer_monteiro.newton import newton
from cvxnn.validation import check_choice, check_flag, check_integer

__all__ = ["BmGlobal"]

#: Columns smaller than this, relative to the largest, are removed.
_EMPTY = 1e-8
#: Newton's method where one step takes at most so many operations and so much memory (in numbers).
_NEWTON_OPERATIONS = 1.5e9
_NEWTON_NUMBERS = 5e7
#: Steps of Newton's method between two certificates.
_NEWTON_ROUND = 5
#: Without new columns, rounds get longer, up to so many times.
_MOST_PATIENCE = 16


@dataclass(frozen=True)
class GlobalOptions:
    """Options of ``bm_global``.

    Attributes
    ----------
    escape : {"columns", "proximal"}
        How to leave a point that the certificate refuses: add the top singular pairs of the violated gates,
        or a proximal gradient step on all Z_k (BM-Global; Lee, Liang, Tang, Toh 2024). For ReLU the first only.
    new_columns : int
        Most columns that are added to a gate at a time; for ReLU ten times as many are added to all together.
    local : {"auto", "newton", "newton_cg", "lbfgs"}
        Method between two escapes: Newton's with dense matrices, or by conjugate gradients, or L-BFGS. "auto"
        takes the first where one step is cheap, and otherwise L-BFGS until it gets slow, or the second at once
        where its products are cheap. For ReLU "auto" is Newton's method, by conjugate gradients where matrices
        would be large.
    eliminate : bool
        Minimise V and the intercept out where the loss is squared.
    whiten : bool
        Change the variables of each gate for L-BFGS.
    newton_iter, newton_cg_iter, lbfgs_iter : int
        Most iterations of each method between two escapes.
    history : int
        Number of pairs that approximate the Hessian in L-BFGS.
    """

    escape: str = "columns"
    new_columns: int = 2
    local: str = "auto"
    eliminate: bool = True
    whiten: bool = True
    newton_iter: int = 20
    newton_cg_iter: int = 5
    lbfgs_iter: int = 50
    history: int = 20

    def __post_init__(self) -> None:
        check_choice(self.escape, "escape", ("columns", "proximal"))
        check_choice(self.local, "local", ("auto", "newton", "newton_cg", "lbfgs"))
        check_flag(self.eliminate, "eliminate")
        check_flag(self.whiten, "whiten")
        for name in ("new_columns", "newton_iter", "newton_cg_iter", "lbfgs_iter", "history"):
            check_integer(getattr(self, name), name)


class BmGlobal(BurerMonteiro):
    """Local descent on the factors until it stalls, then the certificate decides.

    Two things stop a local method. *Conditioning*: V is minimised out for the squared loss, and U moved by
    Newton's method, or by L-BFGS in whitened variables. *A rank below that of the optimum*: gates with
    ||G_k|| > beta get the top singular pairs of -G_k as columns, and columns that became empty are removed.
    Always in float64. The columns of ReLU problems stay in their cones (:class:`ConeGlobal`).
    """

    name = "bm_global"
    l2_only = True
    Options = GlobalOptions
    default_max_iter: ClassVar[int] = 2_000
    check_every: int = 1
    double = True
    cones: ClassVar[bool] = True

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        #: What solves ReLU problems, whose columns are in cones.
        self.in_cones: ConeGlobal | None = None
        if problem.cones is not None and (self.options.escape != "columns" or self.options.local == "lbfgs"):
            raise UnsupportedError("escape='proximal' and local='lbfgs' are not there for ReLU problems")
        #: What is solved: blocks of about 1 have squares, whatever the sizes of X, Y and beta are.
        self.scaled = problem if problem.cones is not None else problem.in_units_of_beta()
        self.loss = FactoredLoss(self.scaled, double=self.double)

    def _start_in_cones(self, point: Iterate | None) -> None:
        deadline = None if self.time_limit is None else time.perf_counter() + self.time_limit
        self.in_cones = solver = ConeGlobal(self.problem, self.loss, self.options, self.tol, deadline)
        if point is not None and point.factors is not None:
            columns = Columns.from_factors(*point.factors).to(self.loss.Y)
        elif self.rank is not None:
            columns = solver.random_columns(self.rank, self.rng)
        else:
            columns = self._no_columns()
        solver.start(columns, self.loss.Y.new_zeros(self.loss.Y.shape[1]))

    def _no_columns(self) -> Columns:
        empty = self.loss.Y.new_zeros
        _, p, q = self.op.block_shape
        return Columns(torch.zeros(0, dtype=torch.long, device=self.loss.Y.device), empty(0, p), empty(0, q))

    def start(self, point: Iterate | None) -> None:
        if self.problem.cones is not None:
            self._start_in_cones(point)
            return
        self.begin = time.perf_counter()
        self.damping = 1e-3
        self.indefinite = False
        self.patience = 1
        self.share = 0.1
        self.violation = 1.0
        self.slow = False
        self.descents = 0
        self.added = 0
        self.value = math.inf
        self.step_length = 0.0
        self.grams: WhitenedGrams | None = None
        self.quasi: QuasiNewton | None = None
        self.intercept = self.loss.Y.new_zeros(self.loss.Y.shape[1])
        if point is not None and point.factors is not None:
            self.columns = Columns.from_factors(*point.factors).to(self.loss.Y).without_zeros()
        elif self.rank is not None:
            self.columns = self.random_columns()
        else:
            self.columns = self._no_columns()
        self.columns = self.columns.compressed(self.op.n_gates)
        if self.problem.output_bias:
            self.intercept = self.problem.best_intercept(self.op.apply_columns(self.columns))
        self.stalled = len(self.columns) == 0

    def step(self) -> None:
        """A part of a round: an escape at its beginning, then the local method."""
        if self.in_cones is not None:
            self.in_cones.step()
            self.finished = self.in_cones.finished
            return
        if self.descents == 0:
            self.value = self._objective() if len(self.columns) else math.inf
            self.added = self._escape()
            if self.added:
                # Other columns: what approximates the Hessian is of no use any more.
                self.quasi = None
        if len(self.columns) == 0:
            self.finished = True
            return
        moved = self._descend(fresh=self.added > 0 and self.descents == 0)
        if self.quasi is None:
            self.columns = self.columns.compressed(self.op.n_gates, _EMPTY)
        if self.descents == 0:
            self._end_round(moved)

    def _end_round(self, moved: bool) -> None:
        after = self._objective()
        # Without new columns, the local method gets more time each round; it has stalled where that is of no use.
        self.patience = 1 if self.added else min(2 * self.patience, _MOST_PATIENCE)
        # Longer new columns grow sooner; where they are of no use, they only disturb.
        self.share = min(0.1, 2 * self.share) if after < self.value else self.share / 4
        no_progress = not self.value - after > 1e-14 * abs(after)
        self.finished = no_progress and self.stalled and self.patience == _MOST_PATIENCE
        self.stalled = no_progress or not moved

    def _objective(self) -> float:
        return self.loss.slopes(self.columns, self.intercept).value + self.penalty(self.columns)

    def _escape(self) -> int:
        """Leave the point where the certificate asks for it; returns how many columns came."""
        if self.options.escape == "proximal" and len(self.columns):
            return self._proximal_escape() if self.stalled else 0
        most = max(self.options.new_columns, self.rank or 0)
        threshold = 1 + 0.1 * self.tol
        found = violations(self.scaled, self.loss, self.columns, self.intercept, most, threshold, self.share)
        worst = float(found.values.max()) / self.scaled.beta if len(found.values) else 1.0
        # First the gates that are violated most: the others often follow.
        if self.quasi is not None and len(found.values) == 0 and found.ratio - 1 > 0.5 * self.violation:
            # Fifty iterations of L-BFGS did little, and no column is missing: it is the conditioning.
            self.slow, self.quasi = self.options.local == "auto", None
        self.violation = found.ratio - 1
        chosen = found.values > self.scaled.beta * (1 + 0.1 * (worst - 1))
        found.pairs, found.values = found.pairs[chosen], found.values[chosen]
        fresh = new_columns(self.scaled, self.loss, found, self.columns, self.share)
        if len(fresh):
            kept = self.columns.compressed(self.op.n_gates, _EMPTY)
            self.columns = Columns.joined(kept, fresh)
        return len(fresh)

    def _proximal_escape(self) -> int:
        if self.step_length == 0:
            weights = float(self.loss.weights.max()) * self.problem.loss.smoothness
            curvature = weights * self.op.n_gates * float(self.op.prediction_norm) ** 2
            self.step_length = 1 / max(curvature, 1e-300)
        before = len(self.columns)
        self.columns, self.step_length = proximal_step(
            self.scaled, self.loss, self.columns, self.intercept, 4 * self.step_length
        )
        return max(0, len(self.columns) - before)

    def _local(self) -> LocalProblem:
        arguments = self.scaled, self.loss, self.columns, self._grams
        if self.problem.loss.name == "squared" and self.options.eliminate and not self.indefinite:
            local = Eliminated(*arguments)
            if self.op.width == 1 or self._method(local) != "newton":
                return local
        return Joint(*arguments)

    def _descend(self, fresh: bool) -> bool:
        """Move the columns by the local method; False if it could not."""
        local = self.quasi.local if self.quasi is not None else self._local()
        method = "lbfgs" if self.quasi is not None else self._method(local)
        deadline = None if self.time_limit is None else self.begin + self.time_limit
        if method == "lbfgs":
            self.quasi = self.quasi or self._quasi_newton(local)
            moved = self.quasi.run(self.options.lbfgs_iter, deadline)
            self.columns, self.intercept = local.point(self.quasi.parts())
            return moved
        damping = max(self.damping, 1e-4) if fresh else self.damping
        total = self.patience * (self.options.newton_iter if method == "newton" else self.options.newton_cg_iter)
        found = newton(
            local,
            local.variables(self.columns, self.intercept),
            limit=min(_NEWTON_ROUND, total - self.descents),
            damping=damping,
            tolerance=self._accuracy(),
            dense=method == "newton",
            at_least=3 if fresh else 0,
            deadline=deadline,
        )
        if not (self.indefinite or math.isfinite(found.value)):
            # Rounding has made the system of the eliminated factor indefinite: both factors are moved from here on.
            self.indefinite = True
            return self._descend(fresh)
        self.descents += found.n_iter
        if found.stuck or found.converged or self.descents >= total:
            self.descents = 0
        self.damping = found.damping
        self.columns, self.intercept = local.point(found.parts)
        return not found.stuck

    def _method(self, local: LocalProblem) -> str:
        if self.options.local != "auto":
            return self.options.local
        numbers = local.n_variables**2 + local.n_variables * self.loss.Y.numel()
        if local.curvature_cost() <= _NEWTON_OPERATIONS and numbers <= _NEWTON_NUMBERS:
            return "newton"
        return "newton_cg" if self.slow or local.products_are_cheap() else "lbfgs"

    def _quasi_newton(self, local: LocalProblem) -> QuasiNewton:
        parts = local.variables(self.columns, self.intercept)
        return QuasiNewton(local, parts, self._grams() if self.options.whiten else None, self.options.history)

    def _accuracy(self) -> float:
        """Residual at which a local method may end: what is violated by more than it is seen first."""
        return min(1e-2, max(0.03 * self.violation, 1e-2 * self.tol)) if self.patience == 1 else 1e-13

    def _grams(self) -> WhitenedGrams:
        """The Gram matrices of all gates, computed once."""
        if self.grams is None:
            self.grams = WhitenedGrams(self.loss)
        return self.grams

    def message(self, certificate: Certificate) -> str:
        if math.isinf(certificate.relative_gap):
            return super().message(certificate)
        if self.in_cones is not None and self.in_cones.violation == 0:
            return (
                "no neuron with a value above beta is found: the remaining gap is one of the upper bound of the dual "
                f"norms, {certificate.dual_norm_ratio:.6g} beta, or of other local maxima in the cones"
            )
        return (
            f"neither the local method nor new columns lower the objective any more, at ||G_k|| of at most "
            f"{certificate.dual_norm_ratio:.6g} beta: this is the accuracy that rounding allows"
        )

    def iterate(self) -> Iterate:
        if self.in_cones is not None:
            return self.in_cones.iterate()
        factors = self.columns.balanced().factors(self.op.n_gates)
        return Iterate(None, intercept=self.intercept if self.problem.output_bias else None, factors=factors)

    _NUMBERS: ClassVar[tuple[str, ...]] = (
        "damping",
        "patience",
        "share",
        "violation",
        "slow",
        "descents",
        "added",
        "step_length",
        "stalled",
    )

    def state(self) -> dict[str, Any]:
        if self.in_cones is not None:
            return self.in_cones.state()
        numbers = {name: getattr(self, name) for name in self._NUMBERS}
        numbers["value"] = self.value if math.isfinite(self.value) else None
        return super().state() | numbers | ({} if self.quasi is None else self.quasi.state())

    def load_state(self, state: dict[str, Any]) -> None:
        if self.in_cones is not None:
            self.in_cones.load_state(state)
            return
        super().load_state(state)
        if "lbfgs.numbers" in state:
            self.quasi = self._quasi_newton(self._local())
            self.quasi.load_state(state)
        self.value = math.inf if state["value"] is None else state["value"]
        for name in self._NUMBERS:
            setattr(self, name, state[name])
