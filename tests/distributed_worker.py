"""One of several processes that tests start by :func:`run`.

Each task is a function of the group and the folder; what it returns is written to ``FOLDER/TASK-RANK.json``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn import distributed
from cvxnn.operators import sharded
from cvxnn.solvers import checkpoint, iterative_ridge, sides
from tests.helpers import make_data, process_context

Task = Callable[..., dict[str, Any]]

SOLVERS = {
    "admm": {"max_iter": 25, "solver_options": {"side": "features"}},
    "admm, iterative": {"max_iter": 25, "solver_options": {"side": "iterative"}},
    "fista": {"max_iter": 20},
    "bm_gd": {"max_iter": 30},
    "bm_noisy_gd": {"max_iter": 10},
    "bm_sgd": {"max_iter": 3, "solver_options": {"batch_size": 32}},
    "bm_lbfgs": {"max_iter": 2, "solver_options": {"inner_iter": 15}},
}
#: So few that conjugate gradients need several steps.
LANDMARKS = 80
SETTINGS = {
    "squared": {"loss": "squared", "output_bias": False},
    "bias": {"loss": "squared", "output_bias": True, "hidden_bias": True},
    "cross_entropy": {"loss": "cross_entropy", "output_bias": True},
    "logistic": {"loss": "logistic", "output_bias": True, "hidden_bias": True},
    "sampled": {"loss": "huber", "hidden_bias": True, "gate_sampling": "whitened", "gate_quantile": 0.7},
}

CASES = [("memory", setting) for setting in SETTINGS] + [("disk", "cross_entropy"), ("disk", "sampled")]


def data(folder: Path, kind: str) -> tuple[Any, np.ndarray]:
    """X in memory or on disk, and labels; an odd number of samples, some of which are zero."""
    X, _, labels = make_data(157, 5, 3)
    X[[3, 100]] = 0
    path = folder / f"X-{os.getpid()}.npy"
    np.save(path, X)
    return (np.load(path, mmap_mode="r") if kind == "disk" else X), labels


def problem_of(folder: Path, kind: str, setting: str) -> cvxnn.Problem:
    X, labels = data(folder, kind)
    return cvxnn.mlp_problem(X, labels, n_gates=40, beta=3e-3, random_state=1, **SETTINGS[setting])


def facts(problem: cvxnn.Problem, result: cvxnn.Result) -> dict[str, Any]:
    """What runs are compared by."""
    parts = [result.Z] if result.factors is None else [U @ V.mT for U, V in [result.factors]]
    return {
        "primal": result.objective,
        "lower": result.certificate.lower_bound,
        "ratio": result.certificate.dual_norm_ratio,
        "stationarity": result.certificate.stationarity,
        "n_iter": result.n_iter,
        "Z": parts[0].flatten().tolist(),
        "intercept": result.intercept.tolist(),
        "trace": [entry["relative_gap"] for entry in result.trace],
        "gates": problem.n_gates,
        "beta_max": problem.beta_max,
        "patterns": (problem.patterns.long().flatten(1).sum(1) * torch.arange(problem.n_samples)).sum().item(),
    }


def solvers(group: distributed.Group | None, folder: Path) -> dict[str, Any]:
    """All solvers on all settings."""
    found: dict[str, Any] = {}
    iterative_ridge._LANDMARKS = LANDMARKS
    for kind, setting in CASES:
        problem = problem_of(folder, kind, setting)
        for name, options in SOLVERS.items():
            result = cvxnn.solve(problem, name.split(",")[0], random_state=0, tol=1e-9, **options)
            found[f"{kind} {setting} {name}"] = facts(problem, result)
    images = np.random.default_rng(0).standard_normal((41, 2, 5, 5))
    problem = cvxnn.cnn_problem(
        images, np.arange(41) % 3, n_gates=6, beta=3e-3, output_bias=True, features="recomputed"
    )
    for name in ("admm", "bm_sgd"):
        result = cvxnn.solve(problem, name, random_state=0, tol=1e-9, **SOLVERS[name])
        found[f"cnn {name}"] = facts(problem, result)
    return found


def seeds(group: distributed.Group | None, folder: Path) -> dict[str, Any]:
    """Runs without a seed, limits of time and callbacks that differ."""
    np.random.seed(os.getpid() % 1000)  # noqa: NPY002
    X, labels = data(folder, "memory")
    problem = cvxnn.mlp_problem(X, labels, n_gates=10, beta=3e-3, random_state=None)
    first = cvxnn.solve(problem, "bm_sgd", max_iter=2)
    rank = 0 if group is None else group.rank
    limited = cvxnn.solve(problem, "fista", tol=0, time_limit=0.5 + 3 * rank)
    called = cvxnn.solve(problem, "fista", tol=0, callbacks=[lambda entry: entry["iteration"] >= 20 + 500 * rank])
    tokens = np.random.default_rng(0).standard_normal((12, 4, 2))
    attention = cvxnn.attention_problem(tokens, np.arange(12) % 2, n_gates=3, beta=1e-2, random_state=None)
    return {
        "gates": problem.operator.gates.tolist(),
        "attention": attention.operator.gates.tolist(),
        "first": first.objective,
        "n_iter": limited.n_iter,
        "status": limited.status,
        "called": called.n_iter,
        "interrupted": called.status,
        "seconds": 0 if group is None else group.seconds,
        "sent": 0 if group is None else group.sent,
    }


def refused(group: distributed.Group | None, folder: Path) -> dict[str, Any]:
    """What does not work on samples that are shared out, in words."""
    X, labels = data(folder, "memory")
    problem = cvxnn.mlp_problem(X, labels, n_gates=4, beta=1e-2)
    tries = {
        "relu": lambda: cvxnn.mlp_problem(X, labels, activation="relu"),
        "solver": lambda: cvxnn.solve(problem, "bm_global"),
        "side": lambda: cvxnn.solve(problem, "admm", solver_options={"side": "samples"}),
        "few": lambda: cvxnn.mlp_problem(X[:1], np.array([[1.0]])),
        "twice": lambda: distributed.start().__enter__(),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except cvxnn.errors.CvxnnError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def short(group: distributed.Group, folder: Path) -> dict[str, Any]:
    """The second process alone has too little memory for the Gram matrix."""
    problem = problem_of(folder, "disk", "squared")
    iterative_ridge._LANDMARKS = LANDMARKS
    gram, columns = (sides.factor_bytes(problem, side, 10) for side in ("features", "iterative"))
    assert columns < gram
    between = group.size * (gram + columns) / (2 * sides.SHARE)
    sides.available_bytes = lambda device: (group.rank == 0) * 2**40 + int(between)
    found = {"chosen": cvxnn.solvers.api.choose_solver(problem), "side": sides.choose_side(problem, 10)}
    sides.available_bytes = lambda device: (group.rank == 0) * 2**40 + columns
    found["fista"] = cvxnn.solvers.api.choose_solver(problem)
    # The chosen samples are sent around a few at a time.
    sharded._SENT_BYTES = 1000
    few = problem.operator.kernel_columns(torch.arange(0, problem.n_samples, 7))
    sharded._SENT_BYTES = 2**27
    at_once = problem.operator.kernel_columns(torch.arange(0, problem.n_samples, 7))
    torch.testing.assert_close(few, at_once, rtol=1e-14, atol=1e-14)
    ridge = sides.make_ridge("iterative", problem.operator, problem.weights, False)
    rows = len(ridge._low_rank), len(ridge.x)  # type: ignore[attr-defined]
    assert rows == (len(range(problem.n_samples)[group.share(problem.n_samples)]),) * 2
    return found


def slow(problem: cvxnn.Problem, **options: Any) -> cvxnn.Result:
    """A run of 30 epochs of three batches, with a checkpoint after each epoch in processes of their own."""
    settings = {"max_iter": 30, "random_state": 0, "tol": 1e-12, "solver_options": {"batch_size": 64}}
    return cvxnn.solve(problem, "bm_sgd", **settings, **options)


def faulty(group: distributed.Group | None, folder: Path, number: int, victim: int) -> dict[str, Any]:
    """One process sends itself a signal in the middle of the 17th epoch."""
    assert group is not None
    problem = problem_of(folder, "disk", "bias")
    if group.rank == victim:
        step = type(problem.operator.local).subset
        calls = [0]

        def mortal(self: Any, rows: Any) -> Any:
            calls[0] += 1
            if calls[0] == 50:
                os.kill(os.getpid(), number)
            return step(self, rows)

        type(problem.operator.local).subset = mortal  # type: ignore[method-assign]
    begin = time.perf_counter()
    try:
        slow(problem, checkpoint=folder / "run.safetensors")
    except cvxnn.errors.DistributedError as error:
        return {"error": str(error), "seconds": time.perf_counter() - begin}
    return {}


def broken(group: distributed.Group, folder: Path, kind: str) -> dict[str, Any]:
    """One process has an error of its own in its 50th gradient."""
    problem = problem_of(folder, "memory", "bias")
    if group.rank == 1:
        adjoint = type(problem.operator.plain).adjoint
        calls = [0]

        def fails(self: Any, L: Any) -> Any:
            calls[0] += 1
            if calls[0] == 50:
                raise getattr(torch.linalg, kind, RuntimeError)("a matrix is singular\nand more")
            return adjoint(self, L)

        type(problem.operator.plain).adjoint = fails  # type: ignore[method-assign]
    begin = time.perf_counter()
    try:
        cvxnn.solve(problem, "fista", tol=1e-12, max_iter=500, checkpoint=folder / "run.safetensors")
    except cvxnn.errors.DistributedError as error:
        return {"error": str(error), "seconds": time.perf_counter() - begin}
    return {}


def outside(rank: int, place: str, folder: Path, victim: int) -> None:
    """The rows of one process hold a number that is not finite; its error ends the other."""
    X, labels = data(folder, "memory")
    X[-1 if victim else 1] = np.nan
    np.save(folder / f"bad-{rank}.npy", X)
    on_disk = np.load(folder / f"bad-{rank}.npy", mmap_mode="r")
    try:
        with distributed.start(init_method=place, rank=rank, size=2, timeout=30):
            cvxnn.mlp_problem(on_disk, labels, n_gates=5)
    except cvxnn.errors.CvxnnError as error:
        (folder / f"outside-{rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))


def resumed(group: distributed.Group | None, folder: Path) -> dict[str, Any]:
    """The run goes on from its checkpoint."""
    problem = problem_of(folder, "disk", "bias")
    return facts(problem, slow(problem, checkpoint=folder / "run.safetensors", resume=True))


def whole(folder: Path) -> dict[str, Any]:
    """The same run in one process, undisturbed."""
    problem = problem_of(folder, "disk", "bias")
    return facts(problem, slow(problem))


def others(group: distributed.Group, folder: Path) -> dict[str, Any]:
    """Several tasks, one after the other."""
    return {"seeds": seeds(group, folder), "refused": refused(group, folder), "short": short(group, folder)}


def main(
    task: Task,
    rank: int,
    size: int,
    folder: Path,
    timeout: float = 30,
    shard: str = "samples",
    arguments: tuple[Any, ...] = (),
) -> None:
    """Run a task as one of `size` processes."""
    torch.set_num_threads(1)
    checkpoint.INTERVAL = 0.0
    place = f"file://{folder}/{task.__name__}.init"
    options: dict[str, Any] = {"init_method": place, "rank": rank, "size": size, "timeout": timeout}
    with distributed.start(shard=shard, **options) as group:
        found = task(group, folder, *arguments)
        (folder / f"{task.__name__}-{rank}.json").write_text(json.dumps(found))


def start(task: Task, folder: Path, size: int = 2, **options: Any) -> list[Any]:
    """Start all processes of a task."""
    context = process_context()
    processes = [context.Process(target=main, args=(task, rank, size, folder), kwargs=options) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def run(task: Task, folder: Path, size: int = 2, **options: Any) -> list[dict[str, Any]]:
    """What all processes of a task return, which must end well."""
    processes = start(task, folder, size, **options)
    for rank, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, f"process {rank} of {task.__name__} ended with {process.exitcode}"
    return [json.loads((folder / f"{task.__name__}-{rank}.json").read_text()) for rank in range(size)]
