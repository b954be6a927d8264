"""Every solver to its certified gap on the standard problems: `python benchmarks/agreement.py [--quick] [--json]`.

Prints a table of iterations, seconds and gaps, and exits with 1 if a gap is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine

import cvxnn
from cvxnn.datasets import spiral


def standardised(X: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1 (constant ones become 0)."""
    deviation = X.std(axis=0)
    return (X - X.mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def admm_problems(quick: bool) -> Iterator[tuple[str, cvxnn.Problem]]:
    """What ADMM must certify at 1e-6."""
    for n in (45, 75) if quick else (45, 75, 150):
        X, y = spiral(n)
        for beta in (1e-4, 1e-3, 1e-2, 1e-1):
            problem = cvxnn.mlp_problem(X, y, n_gates=100, beta=beta, reduction="sum")
            yield f"spiral n={n} beta={beta:g}", problem
    X, y = load_digits(return_X_y=True)
    for beta in (1.0,) if quick else (10.0, 1.0, 0.1, 0.01):
        problem = cvxnn.mlp_problem(X[:1437] / 16, y[:1437], n_gates=100, beta=beta, reduction="sum")
        yield f"digits n=1437 beta={beta:g}", problem
    for name, load in (("breast cancer", load_breast_cancer), ("wine", load_wine)):
        X, y = load(return_X_y=True)
        for loss in ("squared", "cross_entropy"):
            yield from _fractions(f"{name} {loss}", standardised(X), y, loss)
    X, y = load_diabetes(return_X_y=True)
    yield from _fractions("diabetes squared", standardised(X), standardised(y[:, None])[:, 0], "squared")


def _fractions(name: str, X: np.ndarray, y: np.ndarray, loss: str) -> Iterator[tuple[str, cvxnn.Problem]]:
    problem = cvxnn.mlp_problem(X, y, n_gates=100, loss=loss, output_bias=True, hidden_bias=True)
    for fraction in (1e-2, 1e-3):
        yield f"{name} {fraction:g} beta_max", problem.with_beta(fraction * problem.beta_max)


def first_order_problems() -> Iterator[tuple[str, cvxnn.Problem]]:
    """What FISTA and Frank-Wolfe must certify, at 1e-4 and 1e-2, in 60 seconds."""
    X, y = spiral(75)
    for beta in (1e-1, 1e-2):
        problem = cvxnn.mlp_problem(X, y, n_gates=100, beta=beta, reduction="sum")
        yield f"spiral n=75 beta={beta:g}", problem
    X, y = load_wine(return_X_y=True)
    yield from _fractions("wine squared", standardised(X), y, "squared")
    X, y = load_digits(return_X_y=True)
    problem = cvxnn.mlp_problem(X[:300] / 16, y[:300], n_gates=20, beta=3.0, reduction="sum")
    yield "digits n=300 P=20 beta=3", problem


def main() -> int:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of the problems")
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output")
    arguments = parser.parse_args()
    runs = [(name, problem, "admm", 1e-6) for name, problem in admm_problems(arguments.quick)]
    for name, problem in first_order_problems():
        runs += [(name, problem, "fista", 1e-4), (name, problem, "frank_wolfe", 1e-2)]
    rows = []
    console = Console(stderr=True)
    for name, problem, solver, tol in track(runs, console=console, description="solving"):
        limit = 60 if solver != "admm" else 600
        result = cvxnn.solve(problem, solver=solver, tol=tol, time_limit=limit)
        rows.append(
            {
                "problem": name,
                "solver": solver,
                "tol": tol,
                "status": result.status,
                "relative_gap": result.certificate.relative_gap,
                "n_iter": result.n_iter,
                "seconds": result.seconds,
            }
        )
    if arguments.json:
        print(json.dumps(rows))
    else:
        table = Table("problem", "solver", "tol", "status", "gap", "iterations", "seconds")
        for row in rows:
            table.add_row(
                row["problem"],
                row["solver"],
                f"{row['tol']:g}",
                row["status"],
                f"{row['relative_gap']:.1e}",
                str(row["n_iter"]),
                f"{row['seconds']:.2f}",
            )
        Console(width=120).print(table)
    return 0 if all(row["status"] == "certified" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
