"""The paper's study of the spiral (section 4.1, C.1): gradient descent on (14) beside the certified optimum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate, certify, relative_gap
from cvxnn.datasets import spiral
from cvxnn.diagnosis import diagnose
from cvxnn.errors import CvxnnError, UnsupportedError
from cvxnn.experiments.stationary import nearby_stationary_point
from cvxnn.experiments.sweep import run_sweep
from cvxnn.problem import Problem
from cvxnn.problems import mlp_problem
from cvxnn.solvers import Result, solve
from cvxnn.validation import check_choice

__all__ = ["COLUMNS", "FEW_GATES", "POLISHED", "SCALES", "SpiralCell", "SpiralGrid", "run_spiral", "solve_cell"]

#: Name, in the column `solver`, of the stationary point near the end of gradient descent.
POLISHED = "bm_gd+polish"
#: Name of a stationary point that leaves most gates at zero, and so is seldom an optimum.
FEW_GATES = "few_gates"
#: A gap counts as reached at this multiple of it.
_REACHED = 1.01
_OPTIMUM_TOL = 1e-8
#: Hessian-vector products spent on the smallest eigenvalue of a point.
_MAX_PRODUCTS = 600


@dataclass(frozen=True)
class SpiralCell:
    """One problem of the study, and how it is solved: everything that determines its rows (but the times)."""

    scope: str
    n_samples: int
    beta: float
    seed: int
    ranks: tuple[int, ...]
    reduction: str
    n_gates: int
    epochs: int
    tol: float
    optimum_seconds: float
    polish_seconds: float
    global_seconds: float

    @property
    def label(self) -> str:
        """Short name."""
        return f"n{self.n_samples}-{self.scope}-beta{self.beta:g}-seed{self.seed}"

    def problem(self, gates: Any = None) -> Problem:
        """The training problem, or that with some gates (d, P); the seed draws them, the data are always the same."""
        X, y = spiral(self.n_samples)
        if gates is None and self.scope == "all":
            gates = "enumerate"
        return mlp_problem(
            X,
            y,
            gates=gates,
            n_gates=self.n_gates,
            beta=self.beta,
            reduction=self.reduction,
            random_state=self.seed,
        )


@dataclass(frozen=True)
class SpiralGrid:
    """The grid of the study.

    Attributes
    ----------
    sizes : tuple of int
        Numbers of samples n.
    betas, ranks, seeds : tuple
        `ranks` are the m of the paper.
    scopes : tuple of {"sampled", "all"}
        Gates drawn (`n_gates` times), or one for every cell of the arrangement.
    reduction : {"sum", "mean"}
    epochs : int
        Iterations of gradient descent.
    tol : float
        Relative gap asked of "bm_global" and "admm".
    optimum_seconds, polish_seconds, global_seconds : float
        Limits for the optimum, for the way to a stationary point, and for "bm_global".
    """

    sizes: tuple[int, ...] = (3, 15, 45, 75, 150)
    betas: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    ranks: tuple[int, ...] = (1, 2, 5)
    seeds: tuple[int, ...] = (0, 1, 2)
    scopes: tuple[str, ...] = ("sampled", "all")
    reduction: str = "sum"
    n_gates: int = 100
    epochs: int = 20_000
    tol: float = 1e-6
    optimum_seconds: float = 60.0
    polish_seconds: float = 6.0
    global_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_choice(self.reduction, "reduction", ("sum", "mean"))

    def cells(self) -> list[SpiralCell]:
        """One per problem, the largest first."""
        names = [f.name for f in dataclasses.fields(SpiralCell)]
        common = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return [
            SpiralCell(scope=scope, n_samples=n, beta=beta, seed=seed, **common)
            for n in sorted(self.sizes, reverse=True)
            for scope in self.scopes[::-1]
            for beta in self.betas
            for seed in self.seeds
        ]


#: Grids by the name of ``--scale``.
SCALES: dict[str, SpiralGrid] = {
    "quick": SpiralGrid(
        sizes=(15, 45),
        seeds=(0,),
        epochs=2_000,
        optimum_seconds=10.0,
        polish_seconds=1.0,
        global_seconds=10.0,
    ),
    "paper": SpiralGrid(),
}


@dataclass(frozen=True)
class SpiralRow:
    """One run; docs/reproduce.md explains the columns."""

    scope: str
    n: int
    n_gates: int
    beta: float
    beta_max: float
    seed: int
    m: int | None
    solver: str
    status: str
    n_iter: int
    seconds: float
    primal: float
    lower_bound: float
    optimum_lower: float
    optimum_upper: float
    true_gap: float
    duality_gap: float
    theorem_bound: float | None
    paper_bound: float
    stationarity: float
    is_stationary: bool
    seconds_to_best_gap: float | None = None
    target_gap: float | None = None
    seconds_to_target_gap: float | None = None
    verdict: str | None = None
    smallest_eigenvalue: float | None = None
    eigenvalue_threshold: float | None = None


COLUMNS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(SpiralRow))


def run_spiral(
    grid: SpiralGrid,
    folder: Path,
    *,
    resume: bool = False,
    jobs: int = -1,
    backend: str | None = None,
    done: Callable[[SpiralCell, bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of all runs of a grid, in its order; parameters as for :func:`cvxnn.experiments.run_sweep`.

    Returns
    -------
    list of dict
        With the keys ``COLUMNS``.
    """
    outcomes = run_sweep(solve_cell, grid.cells(), folder, resume=resume, jobs=jobs, backend=backend, done=done)
    return [row for outcome in outcomes for row in outcome["rows"]]


def solve_cell(cell: SpiralCell) -> dict[str, Any]:
    """All runs of a cell: the optimum, gradient descent and what follows it, and "bm_global", for every m."""
    _warm_up()
    runs = _CellRuns(cell, cell.problem())
    runs.optimum()
    for m in cell.ranks:
        runs.rank(m)
    return {"rows": [dataclasses.asdict(row) for row in runs.rows]}


@cache
def _warm_up() -> None:
    """Import and run everything once, so that no cell pays for it."""
    X, y = spiral(6)
    problem = mlp_problem(X, y, n_gates=5, beta=1e-2, reduction="sum", random_state=0)
    _solve_if_available(problem, "interior_point")
    solve(problem, "admm")
    for solver in ("bm_gd", "bm_lbfgs", "bm_global"):
        solve(problem, solver, rank=1, random_state=0, max_iter=5)


def _solve_if_available(problem: Problem, solver: str, **options: Any) -> Result | None:
    try:
        return _solve(problem, solver, **options)
    except (UnsupportedError, ImportError):
        return None


def _solve(problem: Problem, solver: str, **options: Any) -> Result:
    """Solve; Ctrl-C, which ends a run with its best point, ends the cell."""
    result = solve(problem, solver, **options)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return result


def _factors_of(result: Result) -> tuple[torch.Tensor, torch.Tensor]:
    if result.factors is None:
        raise CvxnnError(f"{result.solver} returned no factors")
    return result.factors


@dataclass
class _CellRuns:
    cell: SpiralCell
    problem: Problem
    rows: list[SpiralRow] = field(default_factory=list)
    lower: float = -math.inf
    upper: float = math.inf

    def optimum(self) -> None:
        """The interval of the optimum, by interior point; by ADMM too where that is not tight enough."""
        cell, problem = self.cell, self.problem
        exact = _solve_if_available(problem, "interior_point", tol=_OPTIMUM_TOL, time_limit=cell.optimum_seconds)
        fast = _solve(problem, "admm", tol=cell.tol, time_limit=cell.optimum_seconds)
        proofs = [fast.certificate] if exact is None else [exact.certificate]
        if proofs[0].relative_gap > _OPTIMUM_TOL:
            again = _solve(problem, "admm", tol=_OPTIMUM_TOL, time_limit=cell.optimum_seconds, init=fast)
            proofs.append(again.certificate)
        self.lower = max(proof.lower_bound for proof in proofs)
        self.upper = min(proof.primal for proof in proofs)
        for result in (exact, fast):
            if result is not None:
                self.add(result.solver, result, None)

    def rank(self, m: int) -> None:
        """The runs with m columns per gate."""
        cell, problem = self.cell, self.problem
        descent = _solve(problem, "bm_gd", rank=m, tol=0.0, max_iter=cell.epochs, random_state=cell.seed)
        wide = _solve(
            problem, "bm_global", rank=m, tol=cell.tol, random_state=cell.seed, time_limit=cell.global_seconds
        )
        best = self.gap(descent.objective)
        target = max(best, cell.tol)
        self.add(
            "bm_gd",
            descent,
            m,
            second_order=True,
            seconds_to_best_gap=self.seconds_to(descent.trace, best),
            target_gap=target,
            seconds_to_target_gap=self.seconds_to(descent.trace, target),
        )
        self.polish(m, descent)
        self.few_gates(m)
        self.add(
            "bm_global",
            wide,
            m,
            seconds_to_best_gap=self.seconds_to(wide.trace, self.gap(wide.objective)),
            target_gap=target,
            seconds_to_target_gap=self.seconds_to(wide.trace, target),
        )

    def polish(self, m: int, descent: Result) -> None:
        """L-BFGS from the end of gradient descent, and Newton's method on the stationarity conditions."""
        problem = self.problem
        found, factors = self.descend(problem, m, descent)
        certificate = certify(problem, factors=factors)
        if certificate.stationarity > found.certificate.stationarity:
            factors, certificate = _factors_of(found), found.certificate
        status = "stationary" if certificate.stationarity <= STATIONARITY_TOLERANCE else found.status
        polished = dataclasses.replace(found, factors=factors, certificate=certificate, status=status)
        self.add(POLISHED, polished, m, second_order=True)

    def few_gates(self, m: int) -> None:
        """A stationary point of the problem with a tenth of the gates; with zeros in the others it is one of all."""
        n_gates = self.problem.n_gates
        rng = np.random.default_rng(self.cell.seed)
        chosen = np.sort(rng.choice(n_gates, max(1, n_gates // 10), replace=False))
        gates = torch.as_tensor(self.problem.gates)
        part = self.cell.problem(gates[:, torch.from_numpy(chosen)])
        found, factors = self.descend(part, m, None)
        wide = [values.new_zeros(n_gates, *values.shape[1:]) for values in factors]
        for full, values in zip(wide, factors, strict=True):
            full[torch.from_numpy(chosen)] = values
        certificate = certify(self.problem, factors=(wide[0], wide[1]))
        status = "stationary" if certificate.stationarity <= STATIONARITY_TOLERANCE else found.status
        embedded = dataclasses.replace(found, factors=(wide[0], wide[1]), certificate=certificate, status=status)
        self.add(FEW_GATES, embedded, m, second_order=True)

    def descend(
        self, problem: Problem, m: int, start: Result | None
    ) -> tuple[Result, tuple[torch.Tensor, torch.Tensor]]:
        """Where L-BFGS ends, and the factors of a stationary point near it."""
        cell = self.cell
        found = _solve(
            problem,
            "bm_lbfgs",
            rank=m,
            tol=0.0,
            init=start,
            random_state=cell.seed,
            time_limit=2 / 3 * cell.polish_seconds,
            solver_options={"history": 50, "inner_iter": 2000},
        )
        return found, nearby_stationary_point(problem, _factors_of(found), seconds=cell.polish_seconds / 3)

    def gap(self, primal: float) -> float:
        """(primal - p*) / p* with the upper end of the interval as p*, at least 0."""
        return relative_gap(primal, self.upper)

    def seconds_to(self, trace: Sequence[dict[str, Any]], gap: float) -> float | None:
        """When a run was first seen at a true gap, or None."""
        limit = _REACHED * gap + 1e-15
        return next((entry["seconds"] for entry in trace if self.gap(entry["primal"]) <= limit), None)

    def add(self, solver: str, result: Result, m: int | None, *, second_order: bool = False, **times: Any) -> None:
        """Append the row of a run."""
        proof = result.certificate
        curvature = self.second_order(result) if second_order else {}
        self.rows.append(
            SpiralRow(
                scope=self.cell.scope,
                n=self.cell.n_samples,
                n_gates=self.problem.n_gates,
                beta=self.cell.beta,
                beta_max=self.problem.beta_max,
                seed=self.cell.seed,
                m=m,
                solver=solver,
                status=result.status,
                n_iter=result.n_iter,
                seconds=result.seconds,
                primal=proof.primal,
                lower_bound=proof.lower_bound,
                optimum_lower=self.lower,
                optimum_upper=self.upper,
                true_gap=self.gap(proof.primal),
                duality_gap=proof.relative_gap,
                theorem_bound=proof.theorem_bound,
                paper_bound=paper_bound(proof),
                stationarity=proof.stationarity,
                is_stationary=proof.stationarity <= STATIONARITY_TOLERANCE,
                **times,
                **curvature,
            )
        )

    def second_order(self, result: Result) -> dict[str, Any]:
        """What the Hessian says of the point."""
        diagnosis = diagnose(self.problem, result.factors, intercept=result.intercept, max_products=_MAX_PRODUCTS)
        curvature = diagnosis.curvature
        return {
            "verdict": diagnosis.status,
            "smallest_eigenvalue": None if curvature is None else curvature.value,
            "eigenvalue_threshold": diagnosis.curvature_threshold,
        }


def paper_bound(certificate: Certificate) -> float:
    """max(0, ||G|| / beta - 1), the right side of (20), whether the point is stationary or not."""
    return max(0.0, certificate.dual_norm_ratio - 1)
