"""Burer-Monteiro solvers: `python benchmarks/burer_monteiro.py {digits,planted,local,escape} [--json]`.

digits:  bm_global to a certified gap on 1,437 digits (P = 100, sum), beta = 10, 1, 0.1, beside admm.
planted: regression with d = 200, c = 1,000, n = 2,000, P = 50, rank 3 planted in every gate, noise of 0.1: seconds
         to a certified 1e-3 and peak memory above the data, for bm_global, admm and fista, in processes of their own.
local:   ways to move the factors between two escapes, on digits and on the spiral, and the other bm_* solvers.
escape:  added columns against the proximal step of BM-Global, from a start of rank 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import cvxnn
from cvxnn.datasets import spiral
from machine import describe, matrix_rate


def digits(beta: float, n: int = 1437, n_gates: int = 100) -> cvxnn.Problem:
    """Pixels in [0, 1], one-hot labels."""
    X, y = load_digits(return_X_y=True)
    return cvxnn.mlp_problem(X[:n] / 16, y[:n], n_gates=n_gates, beta=beta, reduction="sum", random_state=0)


def three_arms(beta: float) -> cvxnn.Problem:
    """The spiral of 150 points with 100 drawn gates."""
    X, y = spiral(150)
    return cvxnn.mlp_problem(X, y, n_gates=100, beta=beta, reduction="sum", random_state=0)


def planted(beta: float, seed: int = 0) -> cvxnn.Problem:
    """Regression with a network of rank 3 in each of 50 gates; targets of variance about 1."""
    rng = np.random.default_rng(seed)
    n, d, c, n_gates, rank = 2000, 200, 1000, 50, 3
    X = rng.standard_normal((n, d))
    gates = rng.standard_normal((d, n_gates))
    Y = 0.1 * rng.standard_normal((n, c))
    for k in range(n_gates):
        hidden = (X @ gates[:, k] >= 0)[:, None] * (X @ rng.standard_normal((d, rank)))
        Y += hidden @ rng.standard_normal((rank, c)) / np.sqrt(d * rank * n_gates)
    return cvxnn.mlp_problem(X, Y, gates=gates, beta=beta, reduction="sum")


def run(problem: cvxnn.Problem, label: str, solver: str, tol: float, limit: float, **options: Any) -> dict[str, Any]:
    """One row."""
    result = cvxnn.solve(problem, solver, tol=tol, time_limit=limit, random_state=0, **options)
    columns = None
    if result.factors is not None:
        columns = int((torch.linalg.vector_norm(result.factors[0], dim=1) > 0).sum())
    return {
        "problem": label,
        "solver": solver,
        "options": " ".join(f"{key}={value}" for key, value in (options.get("solver_options") or {}).items()),
        "tol": tol,
        "status": result.status,
        "gap": result.certificate.relative_gap,
        "columns": columns,
        "iterations": result.n_iter,
        "seconds": result.seconds,
    }


def run_digits() -> list[dict[str, Any]]:
    """The figures of `docs/results/burer_monteiro.md`."""
    rows = []
    for beta, tol in ((10.0, 1e-5), (1.0, 1e-4), (0.1, 1e-4)):
        for solver in ("bm_global", "admm"):
            rows.append(run(digits(beta), f"digits beta={beta:g}", solver, tol, 300))
    return rows


def run_planted(betas: list[float]) -> list[dict[str, Any]]:
    """Each solver in its own process."""
    rows = []
    points = [(solver, beta) for beta in betas for solver in ("bm_global", "admm", "fista")]
    for solver, beta in track(points, console=Console(stderr=True), description="measuring"):
        command = [sys.executable, __file__, "planted", "--one", solver, str(beta)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return rows


def one_planted(solver: str, beta: float) -> dict[str, Any]:
    """Seconds and memory in this process; a small problem loads the libraries first."""
    run(digits(1.0, n=100, n_gates=5), "", solver, 1e-2, 10)
    problem = planted(beta)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = run(problem, f"planted beta={beta:g}", solver, 1e-3, 900)
    row["mebibytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return row


def run_local() -> list[dict[str, Any]]:
    """What conditioning does to each way of moving the factors."""
    rows = []
    ways: list[dict[str, Any]] = [
        {"local": "newton_cg"},
        {"local": "lbfgs"},
        {"local": "lbfgs", "whiten": False},
        {"local": "newton_cg", "eliminate": False},
        {"local": "lbfgs", "eliminate": False},
        {"local": "lbfgs", "eliminate": False, "whiten": False},
    ]
    cases = [
        ("digits n=400 P=20 beta=3", digits(3.0, 400, 20), 1e-5, 12.0, ways),
        ("spiral beta=0.01", three_arms(0.01), 1e-6, 8.0, [{"local": "newton"}, *ways]),
        ("spiral beta=0.0001", three_arms(1e-4), 1e-6, 8.0, [{"local": "newton"}, *ways]),
    ]
    for label, problem, tol, limit, options in cases:
        for chosen in options:
            rows.append(run(problem, label, "bm_global", tol, limit, solver_options=chosen))
        for solver in ("bm_lbfgs", "bm_precgd", "bm_gd"):
            rows.append(run(problem, label, solver, tol, limit))
    return rows


def run_escape() -> list[dict[str, Any]]:
    """Columns or a proximal step, from rank 1."""
    rows = []
    for label, problem, tol in (
        ("digits n=400 P=20 beta=3", digits(3.0, 400, 20), 1e-5),
        ("spiral beta=0.1", three_arms(0.1), 1e-6),
        ("spiral beta=0.01", three_arms(0.01), 1e-6),
        ("spiral beta=0.001", three_arms(0.001), 1e-6),
    ):
        for escape in ("columns", "proximal"):
            rows.append(run(problem, label, "bm_global", tol, 60, rank=1, solver_options={"escape": escape}))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table of the rows."""
    table = Table(*rows[0])
    for row in rows:
        cells = []
        for key, value in row.items():
            if isinstance(value, float) and key in {"gap", "tol"}:
                cells.append(f"{value:.1e}")
            else:
                cells.append("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    Console(width=150).print(table)


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "planted", "local", "escape"))
    parser.add_argument("--beta", type=float, nargs="+", default=[400.0, 200.0], help="of the planted problem")
    parser.add_argument("--one", nargs=2, metavar=("SOLVER", "BETA"), help="one planted run, printed as JSON")
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_planted(arguments.one[0], float(arguments.one[1]))))
        return
    kinds = {"digits": run_digits, "local": run_local, "escape": run_escape}
    rows = run_planted(arguments.beta) if arguments.what == "planted" else kinds[arguments.what]()
    if arguments.json:
        print(json.dumps(rows))
        return
    show(rows)
    Console().print(f"{describe()}, {matrix_rate():.0f} GFLOP/s in a float64 matrix product")


if __name__ == "__main__":
    main()
