"""Time and peak memory to a certified 1e-4 against n, P and c: `python benchmarks/growth.py --out results/growth`.

Generated regression data (planted network, 5 gates of rank 1, noise 0.1), beta = 0.01 beta_max, squared loss, `auto`.
Every point runs in a process of its own, so that its peak memory is its own; the memory of a process that only
imports cvxnn is subtracted. Writes growth.csv and growth.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

BASE = {"n": 2000, "P": 50, "c": 5}
RANGES = {
    "n": (500, 1000, 2000, 5000, 10_000, 20_000),
    "P": (10, 30, 100, 300, 1000, 2000),
    "c": (1, 3, 10, 30, 100),
}
DIMENSION = 50


def generate(n: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """A planted gated network with noise."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, DIMENSION))
    Y = 0.1 * rng.normal(size=(n, c))
    for _ in range(5):
        active = X @ rng.normal(size=DIMENSION) >= 0
        Y += np.outer(active * (X @ rng.normal(size=DIMENSION)), rng.normal(size=c)) / np.sqrt(DIMENSION)
    return X, Y


def measure(n: int, P: int, c: int) -> dict[str, float | int | str]:
    """Solve one problem in this process."""
    import cvxnn

    X, Y = generate(n, c)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    problem = cvxnn.mlp_problem(X, Y, n_gates=P)
    result = cvxnn.solve(problem.with_beta(0.01 * problem.beta_max), tol=1e-4, time_limit=600)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "n": n,
        "P": P,
        "c": c,
        "solver": result.solver,
        "status": result.status,
        "n_iter": result.n_iter,
        "seconds": seconds,
        "mebibytes": (peak - baseline) / 1024,
    }


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory against each of n, P and c, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for column, (name, values) in enumerate(RANGES.items()):
        picked = [row for row in rows if row["varied"] == name]
        for axis, key, label in ((axes[0], "seconds", "seconds"), (axes[1], "mebibytes", "peak MiB above the start")):
            axis[column].loglog(values, [max(row[key], 1e-3) for row in picked], "o-")
            axis[column].set_xlabel(name)
            axis[column].grid(alpha=0.3, which="both")
            if column == 0:
                axis[column].set_ylabel(label)
        fixed = ", ".join(f"{key} = {value}" for key, value in BASE.items() if key != name)
        axes[0][column].set_title(f"{name} grows ({fixed}, d = {DIMENSION})", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every point, write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/growth"))
    parser.add_argument("--one", nargs=3, type=int, metavar=("N", "P", "C"), help="measure one point, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    points = [(name, {**BASE, name: value}) for name, values in RANGES.items() for value in values]
    rows = []
    for name, point in track(points, console=Console(stderr=True), description="measuring"):
        command = [sys.executable, __file__, "--one", *(str(point[key]) for key in ("n", "P", "c"))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append({"varied": name, **json.loads(output)})
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "growth.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.out / "growth.png")
    table = Table("varied", "n", "P", "c", "solver", "status", "iterations", "seconds", "MiB")
    for row in rows:
        cells = [row["varied"], row["n"], row["P"], row["c"], row["solver"], row["status"], row["n_iter"]]
        table.add_row(*map(str, cells), f"{row['seconds']:.2f}", f"{row['mebibytes']:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
