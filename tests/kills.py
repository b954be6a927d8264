"""Runs that are killed with SIGKILL at random moments, go on, and end as if nothing had happened.

``python -m tests.kills --kills 20`` does it for each task and prints a row of a Markdown table for each as it ends; the
test suite does it with fewer kills.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn.errors import CvxnnError
from cvxnn.files import read_tensors
from cvxnn.layerwise import LayerwiseCNNClassifier
from cvxnn.solvers import checkpoint
from tests.helpers import make_data, process_context

Report = Callable[[int], None]

#: Epochs of each of two stages.
EPOCHS = 25


def bm_sgd(folder: Path, report: Report) -> list[torch.Tensor]:
    """Epochs of mini-batches; a checkpoint after each."""
    return _solved(folder, report, "bm_sgd", max_iter=60)


def admm(folder: Path, report: Report) -> list[torch.Tensor]:
    """Iterations with certificates every few; a checkpoint after each."""
    return _solved(folder, report, "admm", max_iter=600)


def _solved(folder: Path, report: Report, solver: str, max_iter: int) -> list[torch.Tensor]:
    X, _, labels = make_data(300, 8, 3)
    problem = cvxnn.mlp_problem(X, labels, n_gates=30, beta=1e-3, loss="cross_entropy", output_bias=True)
    result = cvxnn.solve(
        problem,
        solver,
        tol=0.0,
        max_iter=max_iter,
        random_state=0,
        checkpoint=folder / "run.safetensors",
        resume=True,
        callbacks=[lambda entry: report(entry["iteration"])],
    )
    assert result.n_iter == max_iter, result
    return [*(result.factors or (result.Z,)), result.intercept, torch.tensor([result.certificate.lower_bound])]


def layerwise(folder: Path, report: Report) -> list[torch.Tensor]:
    """Epochs of two stages; a checkpoint after each."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((120, 1, 10, 10)), np.arange(120) % 3
    model = LayerwiseCNNClassifier(
        n_stages=2, n_gates=8, rank=1, epochs=EPOCHS, batch_size=32, loss="squared", random_state=0, device="cpu",
        checkpoint=folder / "run", resume=True, callbacks=[lambda entry: report(100 * entry["stage"] + entry["epoch"])],
    )  # fmt: skip
    model.fit(images, labels)
    certificates = [(stage.certificate.primal, stage.certificate.lower_bound) for stage in model.stages_]
    return [torch.from_numpy(model.predict_proba(images)), torch.tensor(certificates)]


TASKS = {"bm_sgd": bm_sgd, "admm": admm, "layerwise": layerwise}
#: Seconds that every step is made longer by, so that steps can be hit.
PAUSES = {"bm_sgd": 0.02, "admm": 0.005, "layerwise": 0.02}


def kept(task: str, folder: Path) -> int:
    """How far the checkpoint of a task is: its iteration, or 100 times the stage plus the epoch."""
    if task != "layerwise":
        file = folder / "run.safetensors"
        return read_tensors(file, "checkpoint")[0]["iteration"] if file.exists() else 0
    training = folder / "run" / "training.safetensors"
    finished = len(list((folder / "run").glob("stage-*.safetensors")))
    header = read_tensors(training, "layerwise")[0] if training.exists() else {"number": 0, "epoch": 0}
    return max(100 * header["number"] + header["epoch"], 100 * finished + (EPOCHS if finished else 0))


def child(task: str, folder: Path) -> None:
    """One process: run, report in a file how far it is, and leave the result."""
    torch.set_num_threads(1)
    checkpoint.INTERVAL = 0.0

    def report(number: int) -> None:
        with (folder / "progress").open("a") as stream:
            stream.write(f"{number}\n")
        time.sleep(PAUSES[task])

    torch.save(TASKS[task](folder, report), folder / "result.pt")


def killed(task: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill a task so often, let it end, and compare with a run that was left alone.

    Returns
    -------
    dict
        kills, the most steps that a kill has cost, seconds, and whether the results are equal to the last bit.
    """
    context = process_context()
    rng = random.Random(seed)
    alone, folder = folder / "alone", folder / "killed"
    for path in (alone, folder):
        path.mkdir()
    begin = time.perf_counter()
    # The first process takes longer to start than those after it.
    first = context.Process(target=int)
    first.start()
    first.join()
    started = time.perf_counter()
    process = context.Process(target=child, args=(task, alone))
    process.start()
    while process.is_alive() and not _reports(alone):
        time.sleep(0.001)
    startup = time.perf_counter() - started
    process.join()
    steps = len(_reports(alone))
    step = (time.perf_counter() - started - startup) / steps

    hits, lost = 0, 0
    while True:
        before = _reports(folder)
        process = context.Process(target=child, args=(task, folder))
        process.start()
        if hits < kills:
            # A random moment of a random step among a share of those that are left, or while the process starts.
            ahead = rng.uniform(0, (steps - len(set(before))) / (kills - hits + 1))
            while process.is_alive() and len(_reports(folder)) < len(before) + int(ahead):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, startup if ahead < 1 else step))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        if process.exitcode != -signal.SIGKILL:
            raise CvxnnError(f"{task} ended with status {process.exitcode} after {hits} kills")
        hits += 1
        seen = _reports(folder)[len(before) :]
        lost = max(lost, max(seen, default=0) - kept(task, folder))
    wanted, found = (torch.load(path / "result.pt") for path in (alone, folder))
    equal = len(wanted) == len(found) and all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    return {"task": task, "kills": hits, "lost": lost, "equal": equal, "seconds": time.perf_counter() - begin}


def _reports(folder: Path) -> list[int]:
    file = folder / "progress"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [int(line) for line in lines if line]


def main() -> None:
    """All tasks, a row each; the status is 1 where a result differs or more than one step was lost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    failed = False
    print("| Task | Kills | Steps lost by a kill, at most | Same bits as undisturbed | Seconds |")
    print("| --- | ---: | ---: | --- | ---: |", flush=True)
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            found = killed(task, arguments.kills, arguments.seed, Path(folder))
        failed |= not found["equal"] or found["lost"] > 1 or found["kills"] < arguments.kills
        print(
            f"| {task} | {found['kills']} | {found['lost']} | {'yes' if found['equal'] else 'NO'} "
            f"| {found['seconds']:.0f} |",
            flush=True,
        )
    raise SystemExit(failed)


if __name__ == "__main__":
    # The children import this file by its name, and must not run it as a module once more.
    from tests.kills import main as run

    sys.modules["__main__"].__spec__ = None
    run()
