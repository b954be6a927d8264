"""Problems shared out to processes: the same result, the time in communication, and the memory of each process.

``python benchmarks/processes.py --sizes 1 2`` starts the processes itself, each of one thread, and writes a table of
each task as Markdown. A task runs in processes of its own, so that its peak memory is its own: the most that was
resident, above what was resident before the data were read. Data are memory maps, whose pages do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
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
    "admm": ("admm", {"max_iter": 100, "solver_options": {"side": "features"}}, "samples"),
    "fista": ("fista", {"max_iter": 20}, "samples"),
    "bm_lbfgs": ("bm_lbfgs", {"max_iter": 1, "rank": 2, "solver_options": {"inner_iter": 20}}, "samples"),
    "bm_sgd": ("bm_sgd", {"max_iter": 1, "rank": 2, "solver_options": {"batch_size": 1024}}, "samples"),
    "layerwise, sgd": ("layerwise", {"method": "sgd", "epochs": 2, "batch_size": 256}, "samples"),
    "layerwise, convex": ("layerwise", {"method": "convex", "max_iter": 60, "pooling": 1, "beta": 1e-2}, "samples"),
    "gates, fista": ("fista", {"max_iter": 20}, "gates"),
    "gates, bm_gd": ("bm_gd", {"max_iter": 20, "rank": 2}, "gates"),
}


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
    places = [folder / f"{size}-{list(TASKS).index(name)}-{rank}.json" for rank in range(size)]
    return [json.loads(place.read_text()) for place in places]


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, float]:
    """The larger relative difference of objective and lower bound, and that of outputs to the largest output."""
    a, b = np.array(found["numbers"]), np.array(wanted["numbers"])
    return float(np.abs(a / b - 1)[:2].max()), float(np.abs(a - b)[2:].max() / np.abs(b[2:]).max())


def main() -> None:
    """Start the processes, and print what they found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=200)
    parser.add_argument("--gates", type=int, default=1000, help="of the tasks that share gates out")
    parser.add_argument("--gated-samples", type=int, default=5000, help="of the tasks that share gates out")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    columns = ["Task", "Processes", "Seconds", "In communication", "Sent, MiB", "Peak memory of each, MiB"]
    columns += ["Objective and bound off by", "Outputs off by"]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(folder, arguments.samples, arguments.features, arguments.gated_samples)
        for task in arguments.tasks:
            first: dict[str, Any] = {}
            for size in arguments.sizes:
                found = run(task, size, arguments.gates, folder)
                first = first or found[0]
                off = [max(values) for values in zip(*(differences(one, first) for one in found), strict=True)]
                row = max(found, key=lambda one: one["communication"])
                memory = max(one["memory"] for one in found)
                print(
                    f"| {task} | {size} | {row['seconds']:.1f} | {100 * row['communication']:.0f}% | "
                    f"{row['sent']:.1f} | {memory:.0f} | {off[0]:.0e} | {off[1]:.0e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
