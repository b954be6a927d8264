"""Time to a certified gap on the handwritten digits: `python benchmarks/speed.py [--repeats N] [--json]`.

Digits (n = 1437, d = 64), P = 100 drawn gates, squared loss (sum), beta = 1, float64, tolerance 1e-6, for c = 10
(one-hot labels) and c = 1 (labels +-1, digit >= 5). Everything is counted: drawing gates, patterns, kernel,
factorisations, certificates. Printed with the machine's rate in a matrix product, and with how much of the time is
spent in matrix products (and triangular solves) at which rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch.profiler import ProfilerActivity, profile

import cvxnn
from machine import describe, matrix_rate

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
FACTORISATIONS = ("aten::linalg_solve_triangular", "aten::linalg_cholesky_ex")


def digits(n_outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 1437 digits, pixels in [0, 1]; classes, or +-1 for digit >= 5."""
    X, y = load_digits(return_X_y=True)
    X, y = X[:1437] / 16, y[:1437]
    return X, y if n_outputs == 10 else np.where(y >= 5, 1.0, -1.0)


def train(X: np.ndarray, y: np.ndarray, beta: float, n_gates: int, tol: float) -> cvxnn.Result:
    """The whole job that is timed."""
    problem = cvxnn.mlp_problem(X, y, n_gates=n_gates, beta=beta, reduction="sum", random_state=0)
    return cvxnn.solve(problem, solver="admm", tol=tol)


def share_of_products(X: np.ndarray, y: np.ndarray, beta: float, n_gates: int, tol: float) -> dict[str, float]:
    """Fractions of the time in matrix products and in factorisations, and the rate of the products."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        train(X, y, beta, n_gates, tol)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products = [event for event in events if event.key in PRODUCTS]
    in_products = sum(event.self_cpu_time_total for event in products)
    in_factors = sum(event.self_cpu_time_total for event in events if event.key in FACTORISATIONS)
    flops = sum(event.flops for event in products)
    return {
        "products": in_products / total,
        "factorisations": in_factors / total,
        "product_rate": flops / max(in_products, 1) / 1e3,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--gates", type=int, default=100)
    parser.add_argument("--tol", type=float, default=1e-6)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    setting = (arguments.beta, arguments.gates, arguments.tol)
    rows = []
    for c, target in ((10, 1.2), (1, 0.25)):
        X, y = digits(c)
        train(X, y, *setting)
        seconds, rates = [], []
        for _ in range(arguments.repeats):
            rates.append(matrix_rate(repeats=3))
            begin = time.perf_counter()
            result = train(X, y, *setting)
            seconds.append(time.perf_counter() - begin)
        rate = statistics.median(rates)
        median = statistics.median(seconds)
        rows.append(
            {
                "c": c,
                "status": result.status,
                "relative_gap": result.certificate.relative_gap,
                "n_iter": result.n_iter,
                "seconds": median,
                "seconds_best": min(seconds),
                "matrix_rate": rate,
                "seconds_at_70": median * rate / 70,
                "target_at_70": target,
                **share_of_products(X, y, *setting),
            }
        )
    if arguments.json:
        print(json.dumps({"machine": describe(), "rows": rows}))
        return
    console = Console(width=130)
    console.print(f"{describe()}; digits, n = 1437, P = {arguments.gates}, beta = {arguments.beta:g} (sum), float64")
    names = ["c", "status", "gap", "iterations", "median s", "best s", "GFLOP/s", "s at 70 GFLOP/s", "target"]
    table = Table(*names, "in products", "at GFLOP/s", "in factorisations")
    for row in rows:
        table.add_row(
            str(row["c"]),
            row["status"],
            f"{row['relative_gap']:.1e}",
            str(row["n_iter"]),
            f"{row['seconds']:.3f}",
            f"{row['seconds_best']:.3f}",
            f"{row['matrix_rate']:.0f}",
            f"{row['seconds_at_70']:.3f}",
            f"{row['target_at_70']:.2f}",
            f"{row['products']:.0%}",
            f"{row['product_rate']:.0f}",
            f"{row['factorisations']:.0%}",
        )
    console.print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
