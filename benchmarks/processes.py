"""Problems shared out to processes: the same result, the time in communication, and the memory of each process.

``python benchmarks/processes.py`` starts the processes itself, each of one thread, and prints a row of a Markdown
table for each task and number of processes as soon as it is there. ``--write FILE`` puts the table into a page, in
place of the one that is there. A task runs in processes of its own, so that its peak memory is its own: the most that
was resident, above what was resident before the data were read. Data are memory maps, whose pages do not count, and
what is freed is given back to the system at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn import distributed

#: Solver, its options, and what is shared out.
TASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "`admm`, Gram matrix": ("admm", {"max_iter": 60, "solver_options": {"side": "features"}}, "samples"),
    "`admm`, no matrix": ("admm", {"max_iter": 20, "solver_options": {"side": "iterative"}}, "samples"),
    "`fista`": ("fista", {"max_iter": 30}, "samples"),
    "`bm_lbfgs`": ("bm_lbfgs", {"max_iter": 1, "rank": 2, "solver_options": {"inner_iter": 30}}, "samples"),
    "`bm_sgd`": ("bm_sgd", {"max_iter": 3, "rank": 2, "solver_options": {"batch_size": 256}}, "samples"),
    "layerwise, sgd": ("layerwise", {"method": "sgd", "epochs": 2, "batch_size": 256}, "samples"),
    "layerwise, convex": ("layerwise", {"method": "convex", "max_iter": 60, "pooling": 1, "beta": 1e-2}, "samples"),
    "gates, `admm`": ("admm", {"max_iter": 10, "solver_options": {"side": "samples"}}, "gates"),
    "gates, `fista`": ("fista", {"max_iter": 10}, "gates"),
    "gates, `bm_gd`": ("bm_gd", {"max_iter": 20, "rank": 2}, "gates"),
    "gates, `bm_lbfgs`": ("bm_lbfgs", {"max_iter": 1, "rank": 2, "solver_options": {"inner_iter": 20}}, "gates"),
}

#: Before the processes start: one thread each, and no memory that is kept when it is free.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**20),
}
COLUMNS = (
    *("Task", "Processes", "Seconds", "In communication", "Sent, MiB", "Peak memory of each, MiB"),
    *("Objective off by", "Bound off by", "Outputs off by"),
)


def resident() -> float:
    """MiB of this process that are not pages of files, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


class Watch:
    """The most that was resident since the start, looked at in a thread every 20 ms."""

    def __init__(self) -> None:
        gc.collect()
        self.before = self.most = resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, resident())

    def end(self) -> float:
        """MiB above the start."""
        self._ended.set()
        self._thread.join()
        return max(self.most, resident()) - self.before


def store(folder: Path, n: int, d: int, gated: int) -> None:
    """The data of all tasks as files."""
    rng = np.random.default_rng(0)
    for name, shape in (("rows", (n, d)), ("some", (gated, d)), ("images", (n // 8, 1, 16, 16))):
        X = rng.standard_normal(shape)
        np.save(folder / f"{name}.npy", X)
        np.save(folder / f"{name}-y.npy", (X.reshape(len(X), -1)[:, :10] + rng.standard_normal((len(X), 10))).argmax(1))


def train(name: str, folder: Path, n_gates: int) -> tuple[float, list[float]]:
    """Run a task: objective and lower bound, and numbers of the solution."""
    solver, options, shard = TASKS[name]
    kind = "some" if shard == "gates" else "images" if solver == "layerwise" else "rows"
    X, y = np.load(folder / f"{kind}.npy", mmap_mode="r"), np.load(folder / f"{kind}-y.npy")
    if solver == "layerwise":
        model = cvxnn.LayerwiseCNNClassifier(
            2, n_gates=8, width=8, tol=1e-9, precision="float64", random_state=0, device="cpu", **options
        ).fit(X, y)
        certificate = model.certificate_
        assert certificate is not None
        numbers = model.decision_function(X[:100]).ravel()
    else:
        problem = cvxnn.mlp_problem(X, y, n_gates=n_gates if shard == "gates" else 20, beta=1e-3, random_state=0)
        result = cvxnn.solve(problem, solver, tol=1e-9, random_state=0, **options)
        certificate = result.certificate
        numbers = result.network()(torch.from_numpy(np.array(X[:100]))).detach().numpy().ravel()
    return certificate.primal, [certificate.primal, certificate.lower_bound, *numbers.tolist()]


def process(name: str, rank: int, size: int, n_gates: int, folder: Path) -> None:
    """One process of a task, and what it took."""
    torch.set_num_threads(1)
    shard, place = TASKS[name][2], folder / f"{size}-{list(TASKS).index(name)}"
    with distributed.start(shard=shard, init_method=f"file://{place}", rank=rank, size=size, timeout=300) as group:
        group.any(False)
        waited, sent, begin = group.seconds, group.sent, time.perf_counter()
        watch = Watch()
        primal, numbers = train(name, folder, n_gates)
        seconds = time.perf_counter() - begin
        found = {
            "primal": primal,
            "numbers": numbers,
            "seconds": seconds,
            "communication": (group.seconds - waited) / seconds,
            "sent": (group.sent - sent) / 2**20,
            "memory": watch.end(),
        }
    place.with_name(f"{place.name}-{rank}.json").write_text(json.dumps(found))


def run(name: str, size: int, n_gates: int, folder: Path) -> list[dict[str, Any]]:
    """What the processes of a task found."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(name, rank, size, n_gates, folder)) for rank in range(size)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    if any(one.exitcode for one in processes):
        raise SystemExit(f"{name}: processes ended with {[one.exitcode for one in processes]}")
    places = [folder / f"{size}-{list(TASKS).index(name)}-{rank}.json" for rank in range(size)]
    return [json.loads(place.read_text()) for place in places]


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[float]:
    """Relative differences of objective and lower bound, and that of outputs to the largest output."""
    a, b = np.array(found["numbers"]), np.array(wanted["numbers"])
    outputs = np.abs(a - b)[2:].max() / max(np.abs(b[2:]).max(), np.finfo(float).tiny)
    return [*(abs(x - y) / max(abs(y), 1e-300) for x, y in zip(a[:2], b[:2], strict=True)), float(outputs)]


def row_of(task: str, size: int, found: list[dict[str, Any]], first: dict[str, Any]) -> dict[str, Any]:
    """What a row of the table says: the longest communication, the most memory, the largest differences to `first`."""
    slowest = max(found, key=lambda one: one["communication"])
    off = [max(values) for values in zip(*(differences(one, first) for one in found), strict=True)]
    memory = max(one["memory"] for one in found)
    numbers = [slowest["seconds"], slowest["communication"], slowest["sent"], memory, *off]
    return dict(zip(COLUMNS, [task, size, *numbers], strict=True))


def line_of(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    task, size, seconds, communication, sent, memory, *off = row.values()
    apart = ["" if size == 1 else f"{value:.0e}" for value in off]
    cells = [task, str(size), f"{seconds:.1f}", f"{100 * communication:.0f}%", f"{sent:.1f}", f"{memory:.0f}", *apart]
    return f"| {' | '.join(cells)} |"


def put_into(page: Path, lines: list[str]) -> None:
    """Write a table into a page, in place of the one with the same first column, or as a page of its own."""
    old = page.read_text().split("\n") if page.exists() else []
    begin = next((i for i, line in enumerate(old) if line.startswith(f"| {COLUMNS[0]} |")), len(old))
    end = begin
    while end < len(old) and old[end].startswith("|"):
        end += 1
    page.write_text("\n".join([*old[:begin], *lines, *old[end:]] if old else [*lines, ""]))


def main() -> None:
    """Start the processes, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2], help="numbers of processes")
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--gates", type=int, default=3000, help="of the tasks that share gates out")
    parser.add_argument("--gated-samples", type=int, default=1000, help="of the tasks that share gates out")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    print("\n".join(lines), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(folder, arguments.samples, arguments.features, arguments.gated_samples)
        for task in arguments.tasks:
            first: dict[str, Any] = {}
            for size in arguments.sizes:
                found = run(task, size, arguments.gates, folder)
                first = first or found[0]
                rows.append(row_of(task, size, found, first))
                lines.append(line_of(rows[-1]))
                print(lines[-1], flush=True)
                if arguments.write is not None:
                    put_into(arguments.write, lines)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
