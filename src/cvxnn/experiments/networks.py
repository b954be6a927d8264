"""Are networks trained by SGD and Adam globally optimal? The spiral, many seeds, and a certificate for each network."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn.datasets import spiral
from cvxnn.experiments.networks_audit import Audit, Limits, audit_network
from cvxnn.experiments.networks_training import OPTIMIZERS, Batch, initial_weights, train_batch
from cvxnn.experiments.sweep import run_sweep
from cvxnn.problem import Problem
from cvxnn.problems import mlp_problem
from cvxnn.solvers import solve

__all__ = [
    "NETWORKS_COLUMNS",
    "NETWORKS_SCALES",
    "NetworksCell",
    "NetworksGrid",
    "audit_cell",
    "run_networks",
]

#: Steps at which the training is looked at, per factor of ten.
_LOOKS = 6


@dataclass(frozen=True)
class NetworksCell:
    """Networks of one width, beta and optimiser, trained together: everything that determines their rows."""

    width: int
    beta: float
    optimizer: str
    learning_rate: float
    steps: int
    seeds: tuple[int, ...]
    n_samples: int
    tol: float
    optimum_seconds: float
    certify_seconds: float
    improve_seconds: float
    continue_seconds: float

    @property
    def label(self) -> str:
        """Short name."""
        return f"m{self.width}-beta{self.beta:g}-{self.optimizer}"

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """X (n, 2) and one-hot Y (n, 3), always the same."""
        X, y = spiral(self.n_samples)
        return torch.from_numpy(X), torch.from_numpy(np.eye(int(y.max()) + 1)[y])

    def problem(self) -> Problem:
        """The training problem over all two-layer ReLU networks."""
        return mlp_problem(*self.data(), activation="relu", gates="enumerate", beta=self.beta, reduction="mean")

    def train(self) -> Batch:
        """The trained networks, one per seed."""
        X, Y = self.data()
        start = initial_weights(self.width, X.shape[1], Y.shape[1], self.seeds)
        return train_batch(
            start,
            X,
            Y,
            beta=self.beta,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            steps=self.steps,
            traced=looks(self.steps),
        )


def looks(steps: int) -> tuple[int, ...]:
    """0, about six numbers per factor of ten, and the last step."""
    count = int(_LOOKS * np.log10(max(steps, 2))) + 1
    return tuple(sorted({0, steps, *np.geomspace(1, max(steps, 1), count).astype(int).tolist()}))


@dataclass(frozen=True)
class NetworksGrid:
    """The grid of the study.

    Attributes
    ----------
    widths : tuple of int
        Hidden units m.
    betas : tuple of float
    seeds : tuple of int
        Each draws the first weights, the same for both optimisers.
    optimizers : tuple of {"sgd", "adam"}
    learning_rates : tuple of float
        One per optimiser, constant.
    steps : int
        Full-batch steps.
    n_samples : int
    tol : float
        Relative gap asked of the optimum, of the certificates and of ``improve``.
    optimum_seconds, certify_seconds, improve_seconds, continue_seconds : float
        Limits for the optimum, and per network for the certificates, the improvement and the continuation by L-BFGS.
    """

    widths: tuple[int, ...] = (5, 10, 100)
    betas: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    seeds: tuple[int, ...] = tuple(range(20))
    optimizers: tuple[str, ...] = OPTIMIZERS
    learning_rates: tuple[float, ...] = (1.0, 1e-3)
    steps: int = 20_000
    n_samples: int = 150
    tol: float = 1e-6
    optimum_seconds: float = 60.0
    certify_seconds: float = 10.0
    improve_seconds: float = 20.0
    continue_seconds: float = 5.0

    def cells(self) -> list[NetworksCell]:
        """One per width, beta and optimiser, the widest first."""
        names = [entry.name for entry in dataclasses.fields(NetworksCell)]
        common = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return [
            NetworksCell(width=width, beta=beta, optimizer=optimizer, learning_rate=rate, **common)
            for width in sorted(self.widths, reverse=True)
            for beta in self.betas
            for optimizer, rate in zip(self.optimizers, self.learning_rates, strict=True)
        ]


#: Grids by the name of ``--scale``.
NETWORKS_SCALES: dict[str, NetworksGrid] = {
    "quick": NetworksGrid(widths=(5, 100), betas=(1e-3, 1e-2, 1e-1), seeds=(0, 1, 2), steps=5_000, improve_seconds=5.0),
    "paper": NetworksGrid(),
}


@dataclass(frozen=True)
class _Identity:
    """The first columns of a row."""

    width: int
    beta: float
    beta_max: float
    optimizer: str
    learning_rate: float
    steps: int
    seed: int
    optimum_lower: float
    optimum_upper: float
    excess: float
    continued_excess: float
    train_seconds: float


NETWORKS_COLUMNS: tuple[str, ...] = tuple(
    entry.name for kind in (_Identity, Audit) for entry in dataclasses.fields(kind)
)


def run_networks(
    grid: NetworksGrid,
    folder: Path,
    *,
    resume: bool = False,
    jobs: int = -1,
    backend: str | None = None,
    done: Callable[[NetworksCell, bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Outcomes of all cells, in the order of the grid; parameters as for :func:`cvxnn.experiments.run_sweep`.

    Returns
    -------
    list of dict
        See :func:`audit_cell`.
    """
    return run_sweep(audit_cell, grid.cells(), folder, resume=resume, jobs=jobs, backend=backend, done=done)


def audit_cell(cell: NetworksCell) -> dict[str, Any]:
    """Train the networks of a cell, and audit each.

    Returns
    -------
    dict
        "cell" (its width, beta and optimizer); "rows", with the keys ``NETWORKS_COLUMNS``; "trace", the excess of the
        networks after some steps; "example", the weights of the worst network and of what it was improved to.
    """
    X, Y = cell.data()
    problem = cell.problem()
    result = solve(problem, tol=cell.tol, time_limit=cell.optimum_seconds)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    proof = result.certificate
    begin = time.perf_counter()
    batch = cell.train()
    seconds = (time.perf_counter() - begin) / len(batch)
    limits = Limits(cell.tol, cell.certify_seconds, cell.improve_seconds, cell.continue_seconds)
    audits = [audit_network(batch[i], X, Y, cell.beta, proof.lower_bound, limits) for i in range(len(batch))]
    # The best network seen anywhere in the cell is an upper bound of the optimum too.
    upper = min(proof.primal, *(min(audit.improved_objective, audit.continued_objective) for audit, _ in audits))
    rows = []
    for seed, (audit, _) in zip(cell.seeds, audits, strict=True):
        identity = _Identity(
            width=cell.width,
            beta=cell.beta,
            beta_max=problem.beta_max,
            optimizer=cell.optimizer,
            learning_rate=cell.learning_rate,
            steps=cell.steps,
            seed=seed,
            optimum_lower=proof.lower_bound,
            optimum_upper=upper,
            excess=_excess(audit.balanced_objective, upper),
            continued_excess=_excess(audit.continued_objective, upper),
            train_seconds=seconds,
        )
        rows.append(dataclasses.asdict(identity) | dataclasses.asdict(audit))
    worst = max(range(len(rows)), key=lambda i: rows[i]["excess"])
    return {
        "cell": {"width": cell.width, "beta": cell.beta, "optimizer": cell.optimizer},
        "rows": rows,
        "trace": [[step, [_excess(value, upper) for value in values]] for step, values in batch.trace],
        "example": {
            "seed": cell.seeds[worst],
            "trained": [part.tolist() for part in batch[worst]],
            "improved": [part.tolist() for part in audits[worst][1]],
        },
    }


def _excess(objective: float, optimum: float) -> float:
    return max(0.0, objective - optimum) / optimum
