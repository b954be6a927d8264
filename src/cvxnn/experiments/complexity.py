"""The paper's comparison of iterations (A.1): projected gradient on (19) beside Frank-Wolfe on the convex program."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cvxnn.errors import InvalidInputError
from cvxnn.experiments.sweep import run_sweep
from cvxnn.problem import Problem
from cvxnn.problems import mlp_problem
from cvxnn.solvers.base import Solver, make_options
from cvxnn.solvers.burer_monteiro import BmProjectedGd
from cvxnn.solvers.frank_wolfe import FrankWolfe

__all__ = [
    "COMPLEXITY_COLUMNS",
    "COMPLEXITY_SCALES",
    "METHODS",
    "ComplexityCell",
    "ComplexityGrid",
    "Sweep",
    "run_complexity",
    "time_cell",
]

#: Iterations that are timed, by the name in the column `method`.
METHODS: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "projected_gradient": (BmProjectedGd, {"eliminate": False, "scaling": False, "momentum": "none"}),
    "frank_wolfe_faces": (FrankWolfe, {"variant": "plain", "atom": "faces"}),
    "frank_wolfe_branching": (FrankWolfe, {"variant": "plain", "atom": "branching"}),
    "frank_wolfe_alternating": (FrankWolfe, {"variant": "plain", "atom": "alternating"}),
}
#: beta, relative to the largest spectral norm of X^T D_k Y.
_BETA = 0.05
_WARM_UP = 5
_MOST_STEPS = 200
_MOST_DRAWS = 200_000


@dataclass(frozen=True)
class ComplexityCell:
    """Iterations of one method on one problem: everything that determines them (but the times)."""

    sweep: str
    parameter: str
    method: str
    n: int
    d: int
    n_gates: int
    m: int
    n_outputs: int
    seed: int
    seconds: float

    @property
    def label(self) -> str:
        """Short name."""
        return f"{self.sweep}-{self.method}-n{self.n}-d{self.d}-P{self.n_gates}-m{self.m}-seed{self.seed}"

    def problem(self) -> Problem:
        """Gaussian data of full rank, a ReLU network with noise as targets, and exactly `n_gates` patterns."""
        rng = np.random.default_rng([self.seed, self.n, self.d])
        X = rng.standard_normal((self.n, self.d))
        hidden = np.maximum(X @ rng.standard_normal((self.d, 2 * self.d)), 0)
        Y = hidden @ rng.standard_normal((2 * self.d, self.n_outputs)) / np.sqrt(self.d)
        Y += 0.1 * rng.standard_normal(Y.shape)
        gates = _distinct_gates(X, self.n_gates, rng)
        active = (X @ gates >= 0).astype(float)
        largest = max(np.linalg.norm(X.T @ (bits[:, None] * Y), 2) for bits in active.T)
        return mlp_problem(X, Y, activation="relu", gates=gates, beta=_BETA * float(largest), reduction="sum")


def _distinct_gates(X: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Gate vectors with so many different patterns, drawn from a normal distribution."""
    found: dict[bytes, np.ndarray] = {}
    draws = 0
    while len(found) < wanted:
        if draws >= _MOST_DRAWS:
            n, d = X.shape
            raise InvalidInputError(
                f"n_gates is {wanted}; the {n} samples in {d} dimensions have {len(found)} patterns"
            )
        gates = rng.standard_normal((X.shape[1], 4 * wanted))
        draws += gates.shape[1]
        for gate, bits in zip(gates.T, (X @ gates >= 0).T, strict=True):
            if len(found) < wanted and bits.any():
                found.setdefault(bits.tobytes(), gate)
    return np.stack(list(found.values()), axis=1)


@dataclass(frozen=True)
class Sweep:
    """Values of one parameter ("n", "d", "n_gates" or "m") for some methods; the others are `fixed`, or the grid's."""

    name: str
    parameter: str
    values: tuple[int, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    fixed: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class ComplexityGrid:
    """The grid of the study.

    Attributes
    ----------
    sweeps : tuple of Sweep
    n, d, n_gates, m, n_outputs : int
        Samples, features (which is the rank of the data), gates P, columns per gate, and outputs c, where a sweep
        does not say otherwise.
    seeds : tuple of int
        Each draws its own problem.
    seconds : float
        Processor time for the iterations of one cell; at least one is timed, at most 200 are.
    """

    sweeps: tuple[Sweep, ...]
    n: int = 60
    d: int = 3
    n_gates: int = 10
    m: int = 2
    n_outputs: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 0.3

    def cells(self) -> list[ComplexityCell]:
        """One per problem and method."""
        names = ("n", "d", "n_gates", "m", "n_outputs", "seconds")
        common: dict[str, Any] = {name: getattr(self, name) for name in names}
        return [
            ComplexityCell(
                sweep=sweep.name,
                parameter=sweep.parameter,
                method=method,
                seed=seed,
                **(common | dict(sweep.fixed) | {sweep.parameter: value}),
            )
            for sweep in self.sweeps
            for value in sweep.values
            for method in sweep.methods
            for seed in self.seeds
        ]


_FACES = ("frank_wolfe_faces",)
_OTHERS = ("projected_gradient", "frank_wolfe_branching", "frank_wolfe_alternating")

#: Grids by the name of ``--scale``. Methods that are no match for the faces have sweeps over larger values too.
COMPLEXITY_SCALES: dict[str, ComplexityGrid] = {
    "quick": ComplexityGrid(
        sweeps=(
            Sweep("n", "n", (40, 80, 160, 320)),
            Sweep("n-rank2", "n", (200, 400, 800, 1600), _FACES, (("d", 2),)),
            Sweep("n-rank4", "n", (15, 30, 60), _FACES, (("d", 4),)),
            Sweep("n-large", "n", (500, 2000, 8000), _OTHERS),
            Sweep("d", "d", (2, 3, 4, 5), _FACES, (("n", 25),)),
            Sweep("d-large", "d", (4, 8, 16, 32), _OTHERS, (("n", 100),)),
            Sweep("P", "n_gates", (5, 10, 20, 40)),
            Sweep("P-large", "n_gates", (40, 160, 640), _OTHERS),
            Sweep("m", "m", (1, 2, 4, 8, 16)),
            Sweep("m-large", "m", (16, 64, 256), ("projected_gradient",)),
        ),
        seeds=(0, 1),
        seconds=0.25,
    ),
    "paper": ComplexityGrid(
        sweeps=(
            Sweep("n", "n", (40, 80, 160, 320, 640)),
            Sweep("n-rank2", "n", (200, 400, 800, 1600, 3200), _FACES, (("d", 2),)),
            Sweep("n-rank4", "n", (15, 30, 60, 90), _FACES, (("d", 4),)),
            Sweep("n-large", "n", (500, 2000, 8000, 32000), _OTHERS),
            Sweep("d", "d", (2, 3, 4, 5, 6), _FACES, (("n", 25),)),
            Sweep("d-large", "d", (4, 8, 16, 32, 64), _OTHERS, (("n", 100),)),
            Sweep("P", "n_gates", (5, 10, 20, 40, 80)),
            Sweep("P-large", "n_gates", (40, 160, 640, 1280), _OTHERS),
            Sweep("m", "m", (1, 2, 4, 8, 16)),
            Sweep("m-large", "m", (16, 64, 256, 1024), ("projected_gradient",)),
        ),
        seeds=(0, 1, 2, 3, 4),
        seconds=1.0,
    ),
}

COMPLEXITY_COLUMNS = (
    "sweep",
    "parameter",
    "value",
    "method",
    "n",
    "d",
    "n_gates",
    "m",
    "n_outputs",
    "seed",
    "n_timed",
    "median_seconds",
    "smallest_seconds",
    "largest_seconds",
)


def run_complexity(
    grid: ComplexityGrid,
    folder: Path,
    *,
    resume: bool = False,
    jobs: int = -1,
    backend: str | None = None,
    done: Callable[[ComplexityCell, bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of all cells of a grid, in its order; parameters as for :func:`cvxnn.experiments.run_sweep`.

    Returns
    -------
    list of dict
        With the keys ``COMPLEXITY_COLUMNS``.
    """
    return run_sweep(time_cell, grid.cells(), folder, resume=resume, jobs=jobs, backend=backend, done=done)


def time_cell(cell: ComplexityCell) -> dict[str, Any]:
    """Processor seconds of iterations, after a few that are not counted; set-up and certificates are left out."""
    _warm_up(cell.method)
    solver = _solver(cell)
    begin = time.thread_time()
    times: list[float] = []
    for step in range(_WARM_UP + _MOST_STEPS):
        before = time.thread_time()
        solver.step()
        spent = time.thread_time() - before
        late = time.thread_time() - begin > cell.seconds
        if step >= _WARM_UP or late:
            times.append(spent)
        if late:
            break
    settings = {name: value for name, value in dataclasses.asdict(cell).items() if name in COMPLEXITY_COLUMNS}
    return settings | {
        "value": getattr(cell, cell.parameter),
        "n_timed": len(times),
        "median_seconds": float(np.median(times)),
        "smallest_seconds": min(times),
        "largest_seconds": max(times),
    }


def _solver(cell: ComplexityCell) -> Solver:
    kind, options = METHODS[cell.method]
    rank = cell.m if kind.factored else None
    solver = kind(cell.problem(), make_options(kind, options), 0.0, None, rank, cell.seed)
    solver.start(None)
    return solver


@cache
def _warm_up(method: str) -> None:
    """Import and run everything once, so that no cell pays for it."""
    solver = _solver(ComplexityCell("", "n", method, 10, 2, 3, 1, 2, 0, 0.0))
    for _ in range(3):
        solver.step()
