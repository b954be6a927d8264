"""Corollary 3.10 at work: linear self-attention from many starts, at few and at many heads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate, relative_gap
from cvxnn.errors import UnsupportedError
from cvxnn.experiments.attention_training import (
    Heads,
    Polished,
    descend,
    draw_factors,
    draw_weights,
    polish,
    train_adam,
)
from cvxnn.experiments.sweep import run_sweep
from cvxnn.problem import Problem
from cvxnn.problems import attention_problem
from cvxnn.solvers import solve

__all__ = [
    "ATTENTION_COLUMNS",
    "ATTENTION_SCALES",
    "FORMS",
    "KINDS",
    "AttentionCell",
    "AttentionGrid",
    "kind_of",
    "run_attention",
    "solve_heads",
    "thresholds",
]

#: How a block is started and trained, by the name in the column `form`.
FORMS = {
    "factors": "factors (26), normal starts of four sizes, gradient descent",
    "network": "the original network, torch's default start, Adam with weight decay",
    "padded": "a local minimum with one head, and zeros in the others: a stationary point, taken as it is",
    "escaped": "the same point, left along its negative curvature",
}
#: Forms without a training; a few starts are enough.
_PADDED, _N_PADDED = ("padded", "escaped"), 5
#: What a run can end in, by the name in the column `kind`.
KINDS = {
    "local_minimum": "stationary (relative residual at most 1e-6), no eigenvalue of the Hessian below -1e-5 beta",
    "saddle": "stationary, an eigenvalue below that",
    "undecided": "stationary, but the smallest eigenvalue did not converge",
    "not_stationary": "the rest",
}
#: Sizes of normal starts, in turn.
_SIZES = (0.03, 0.3, 1.0, 2.0)
_OPTIMUM_TOL = 1e-8
#: Singular values of Z above this, relative to the largest, count for its rank.
_RANK = 1e-6


def thresholds(d: int, c: int) -> tuple[int, int]:
    """min(d^2, d c), from which no local minimum is spurious (math section 3), and the paper's d^2 + d c."""
    return min(d * d, d * c), d * d + d * c


@dataclass(frozen=True)
class AttentionCell:
    """Runs with m heads on one problem: everything that determines its rows (but the times)."""

    d: int
    c: int
    output: str
    fraction: float
    seed: int
    m: int
    n: int
    s: int
    starts: int
    descent_steps: int
    adam_steps: int
    learning_rate: float
    max_escapes: int
    optimum_seconds: float

    @property
    def label(self) -> str:
        """Short name."""
        return f"d{self.d}-c{self.c}-{self.output}-beta{self.fraction:g}-seed{self.seed}-m{self.m}"

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, s, d) and targets: (n, c) of a block with noise, or clean tokens (n, s, c) of noisy ones.

        Clean tokens are on a line of their sequence; the targets are their first c features.
        """
        rng = np.random.default_rng([self.seed, self.d, self.c])
        tokens = rng.standard_normal((self.n, self.s, self.d))
        if self.output == "tokens":
            lines = rng.standard_normal((self.n, 1, self.d))
            clean = rng.standard_normal((self.n, self.s, 1)) * lines
            return clean + 0.5 * tokens, clean[:, :, : self.c]
        heads = thresholds(self.d, self.c)[0]
        W1 = rng.standard_normal((heads, self.d, self.d)) / self.d
        W2 = rng.standard_normal((heads, self.d, self.c)) / np.sqrt(heads)
        products = np.einsum("nsa,nsb->nab", tokens, tokens) / self.s
        targets = np.einsum("na,jak,nkl,jlb->nb", tokens.mean(1), W1, products, W2)
        return tokens, targets + 0.1 * targets.std() * rng.standard_normal(targets.shape)

    def problem(self) -> Problem:
        """The convex problem (104); beta is `fraction` of beta_max."""
        tokens, targets = self.data()
        problem = attention_problem(tokens, targets, activation="linear", output=self.output, reduction="mean")
        return problem.with_beta(self.fraction * problem.beta_max)


@dataclass(frozen=True)
class AttentionGrid:
    """The grid of the study.

    Attributes
    ----------
    sizes : tuple of (int, int)
        Features d of a token and outputs c. Heads are m = 1 .. 2 min(d^2, d c), and d^2 + d c + 1.
    outputs : tuple of {"mean", "tokens"}
    fractions : tuple of float
        beta over beta_max.
    seeds : tuple of int
        Each draws its own data.
    n, s : int
        Sequences, and tokens in each.
    starts : int
        Starts per problem, number of heads and form (``FORMS``).
    descent_steps, adam_steps : int
        Steps of gradient descent, and of Adam.
    learning_rate : float
        The first one of Adam; it falls to zero along a cosine.
    max_escapes : int
        How often a run may leave a saddle.
    optimum_seconds : float
        Limit for the optimum, per solver.
    """

    sizes: tuple[tuple[int, int], ...] = ((2, 1), (2, 2), (3, 1), (3, 2))
    outputs: tuple[str, ...] = ("mean", "tokens")
    fractions: tuple[float, ...] = (0.1, 0.01)
    seeds: tuple[int, ...] = (0,)
    n: int = 20
    s: int = 5
    starts: int = 20
    descent_steps: int = 2_000
    adam_steps: int = 5_000
    learning_rate: float = 3e-2
    max_escapes: int = 5
    optimum_seconds: float = 120.0

    def heads(self, d: int, c: int) -> list[int]:
        """The numbers of heads for a size."""
        least, paper = thresholds(d, c)
        return sorted({*range(1, 2 * least + 1), paper + 1})

    def cells(self) -> list[AttentionCell]:
        """One per problem and number of heads, the largest first."""
        names = [entry.name for entry in dataclasses.fields(AttentionCell)]
        common: dict[str, Any] = {name: getattr(self, name) for name in names if hasattr(self, name)}
        cells = [
            AttentionCell(d=d, c=c, output=output, fraction=fraction, seed=seed, m=m, **common)
            for d, c in self.sizes
            for output in self.outputs
            for fraction in self.fractions
            for seed in self.seeds
            for m in self.heads(d, c)
        ]
        return sorted(cells, key=lambda cell: -cell.m * cell.d * (cell.d + cell.c))


#: Grids by the name of ``--scale``.
ATTENTION_SCALES: dict[str, AttentionGrid] = {
    "quick": AttentionGrid(
        sizes=((2, 1), (2, 2), (3, 1)), fractions=(0.03,), starts=4, descent_steps=1_000, adam_steps=2_000
    ),
    "paper": AttentionGrid(),
}


@dataclass(frozen=True)
class AttentionRow:
    """One run; docs/reproduce.md explains the columns."""

    d: int
    c: int
    output: str
    fraction: float
    beta: float
    beta_max: float
    seed: int
    m: int
    threshold: int
    paper_bound: int
    optimum_lower: float
    optimum_upper: float
    optimum_rank: int
    form: str
    start: int
    trained_gap: float
    gap: float
    primal: float
    duality_gap: float
    dual_norm_ratio: float
    stationarity: float
    balance: float
    rank: int
    smallest_eigenvalue: float
    eigenvalue_threshold: float
    kind: str
    n_escapes: int
    seconds: float


ATTENTION_COLUMNS: tuple[str, ...] = tuple(entry.name for entry in dataclasses.fields(AttentionRow))


def run_attention(
    grid: AttentionGrid,
    folder: Path,
    *,
    resume: bool = False,
    jobs: int = -1,
    backend: str | None = None,
    done: Callable[[AttentionCell, bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of all cells of a grid, in its order; parameters as for :func:`cvxnn.experiments.run_sweep`.

    Returns
    -------
    list of dict
        With the keys ``ATTENTION_COLUMNS``.
    """
    outcomes = run_sweep(solve_heads, grid.cells(), folder, resume=resume, jobs=jobs, backend=backend, done=done)
    return [row for outcome in outcomes for row in outcome["rows"]]


def solve_heads(cell: AttentionCell) -> dict[str, Any]:
    """All runs of a cell: the certified optimum, and all forms from their starts, trained and then polished."""
    problem = cell.problem()
    lower, upper, rank = _optimum(problem, cell.optimum_seconds)
    heads = Heads(problem)
    rows = []
    for form in FORMS:
        if form in _PADDED and cell.m == 1:
            continue
        begin = time.perf_counter()
        U, V = _padded(cell, problem, heads) if form in _PADDED else _trained(cell, heads, form)
        objectives = heads.slopes(U, V)[0].tolist()
        shared = (time.perf_counter() - begin) / len(U)
        max_escapes = 0 if form == "padded" else cell.max_escapes
        for start in range(len(U)):
            begin = time.perf_counter()
            found = polish(problem, heads, (U[start : start + 1], V[start : start + 1]), max_escapes)
            seconds = shared + time.perf_counter() - begin
            row = _row(cell, problem, form, found)
            rows.append(
                row
                | {
                    "optimum_lower": lower,
                    "optimum_upper": upper,
                    "optimum_rank": rank,
                    "start": start,
                    "trained_gap": relative_gap(objectives[start], upper),
                    "gap": relative_gap(row["primal"], upper),
                    "seconds": seconds,
                }
            )
    return {"rows": [dataclasses.asdict(AttentionRow(**row)) for row in rows]}


def _trained(cell: AttentionCell, heads: Heads, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of all starts after the training."""
    seeds = tuple(range(cell.starts))
    if form == "network":
        weights = draw_weights(cell.d, cell.c, cell.m, seeds)
        return train_adam(heads, weights, cell.learning_rate, cell.adam_steps)
    sizes = tuple(_SIZES[seed % len(_SIZES)] for seed in seeds)
    return descend(heads, draw_factors(heads.p, heads.q, cell.m, seeds, sizes), cell.descent_steps)


def _padded(cell: AttentionCell, problem: Problem, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Local minima with one head, and zeros in the other heads."""
    seeds = tuple(range(min(cell.starts, _N_PADDED)))
    U, V = descend(heads, draw_factors(heads.p, heads.q, 1, seeds, (0.3,) * len(seeds)), cell.descent_steps)
    minima = [polish(problem, heads, (U[k : k + 1], V[k : k + 1]), cell.max_escapes).factors for k in seeds]
    sides = (torch.cat(side) for side in zip(*minima, strict=True))
    U, V = (torch.nn.functional.pad(side, (0, cell.m - 1)) for side in sides)
    return U, V


def _optimum(problem: Problem, seconds: float) -> tuple[float, float, int]:
    """The interval of the optimum, and the rank of the best Z: by ADMM, by interior point where that is not enough."""
    lower, upper, rank = -float("inf"), float("inf"), 0
    for solver in ("admm", "interior_point"):
        try:
            result = solve(problem, solver, tol=_OPTIMUM_TOL, time_limit=seconds)
        except (UnsupportedError, ImportError):
            break
        if result.status == "interrupted":
            raise KeyboardInterrupt
        proof: Certificate = result.certificate
        lower = max(lower, proof.lower_bound)
        if proof.primal < upper and result.Z is not None:
            sizes = torch.linalg.svdvals(result.Z[0].double())
            upper, rank = proof.primal, int((sizes > _RANK * sizes[0]).sum())
        if relative_gap(upper, lower) <= _OPTIMUM_TOL:
            break
    return lower, upper, rank


def _row(cell: AttentionCell, problem: Problem, form: str, found: Polished) -> dict[str, Any]:
    """What is known of the end of a run alone."""
    seen = found.diagnosis
    assert seen.curvature is not None
    least, paper = thresholds(cell.d, cell.c)
    return {
        "d": cell.d,
        "c": cell.c,
        "output": cell.output,
        "fraction": cell.fraction,
        "beta": problem.beta,
        "beta_max": problem.beta_max,
        "seed": cell.seed,
        "m": cell.m,
        "threshold": least,
        "paper_bound": paper,
        "form": form,
        "primal": seen.certificate.primal,
        "duality_gap": seen.duality_gap,
        "dual_norm_ratio": seen.certificate.dual_norm_ratio,
        "stationarity": seen.stationarity,
        "balance": seen.balance,
        "rank": seen.gates[0].rank,
        "smallest_eigenvalue": seen.curvature.value,
        "eigenvalue_threshold": seen.curvature_threshold,
        "kind": kind_of(seen.stationarity, seen.curvature.value, seen.curvature_threshold, seen.curvature.converged),
        "n_escapes": found.n_escapes,
    }


def kind_of(stationarity: float, eigenvalue: float, threshold: float, converged: bool) -> str:
    """One of ``KINDS``; theorems have no say in it."""
    if not stationarity <= STATIONARITY_TOLERANCE:
        return "not_stationary"
    if eigenvalue < -threshold:
        return "saddle"
    return "local_minimum" if converged else "undecided"
