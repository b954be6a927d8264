"""Samples shared out to processes: the same result, the time in communication, and the memory of each process.

``python benchmarks/processes.py --sizes 1 2`` starts the processes itself and prints a line for each number of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn import distributed

SOLVERS = {
    "admm": {"max_iter": 100, "solver_options": {"side": "features"}},
    "fista": {"max_iter": 20},
    "bm_lbfgs": {"max_iter": 1, "rank": 2, "solver_options": {"inner_iter": 20}},
    "bm_sgd": {"max_iter": 1, "rank": 2, "solver_options": {"batch_size": 1024}},
}


def own_memory() -> float:
    """MiB of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def process(rank: int, size: int, n: int, d: int, folder: str) -> None:
    """One process: all solvers, and what they took."""
    torch.set_num_threads(1)
    place = Path(folder)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, n)
    rows: dict[str, Any] = {}
    with distributed.start(init_method=f"file://{place}/init-{size}", rank=rank, size=size, timeout=300) as group:
        before = own_memory()
        problem = cvxnn.mlp_problem(rng.standard_normal((n, d)), y, n_gates=20, beta=1e-3, random_state=0)
        rows["memory"] = own_memory() - before
        for name, options in SOLVERS.items():
            begin, waited = time.perf_counter(), group.seconds
            sent = group.sent
            result = cvxnn.solve(problem, name, tol=1e-8, random_state=0, **options)
            seconds = time.perf_counter() - begin
            rows[name] = {
                "objective": result.objective,
                "seconds": seconds,
                "communication": (group.seconds - waited) / seconds,
                "sent": (group.sent - sent) / 2**20,
            }
    (place / f"{size}-{rank}.json").write_text(json.dumps(rows))


def main() -> None:
    """Start the processes, and print what they found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=200)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    first: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            given = (size, arguments.samples, arguments.features, folder)
            processes = [context.Process(target=process, args=(rank, *given)) for rank in range(size)]
            for one in processes:
                one.start()
            for one in processes:
                one.join()
            found = [json.loads((Path(folder) / f"{size}-{rank}.json").read_text()) for rank in range(size)]
            first = first or found[0]
            print(f"{size} processes, memory of the problem in each: {max(one['memory'] for one in found):.0f} MiB")
            for name in SOLVERS:
                row = found[0][name]
                off = abs(row["objective"] - first[name]["objective"]) / first[name]["objective"]
                print(
                    f"  {name:9s} {row['seconds']:7.2f} s, {row['communication']:5.1%} of it in communication, "
                    f"{row['sent']:8.1f} MiB sent, objective off by {off:.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
