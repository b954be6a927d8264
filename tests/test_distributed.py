"""Samples shared out to processes: the answers of one process, and runs whose processes end."""

import json
import signal

import numpy as np
import pytest

from cvxnn.files import read_tensors
from tests import distributed_worker as worker
from tests.helpers import process_context


@pytest.fixture(scope="module")
def run():
    """Results of all processes of a task; None for one that was killed."""
    context = process_context()

    def run_task(task, folder, size=2):
        processes = [context.Process(target=worker.main, args=(task, rank, size, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        results = []
        for rank, process in enumerate(processes):
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL), f"process {rank} of {task}"
            results.append(None if process.exitcode else json.loads((folder / f"{task}-{rank}.json").read_text()))
        return results

    return run_task


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("solvers")
    return run("solvers", folder), worker.solvers(None, folder)


def test_every_process_has_the_same_result(compared):
    (first, second), _ = compared
    assert first == second


def test_two_processes_find_what_one_does(compared):
    (shared, _), alone = compared
    assert set(shared) == set(alone)
    assert len(alone) == len(worker.CASES) * len(worker.SOLVERS) + 2
    for name, one in alone.items():
        for fact, value in one.items():
            tolerance = 1e-6 if fact in ("trace", "stationarity") else 1e-9
            np.testing.assert_allclose(
                shared[name][fact], value, rtol=tolerance, atol=tolerance, err_msg=f"{name} {fact}"
            )


@pytest.fixture(scope="module")
def others(run, tmp_path_factory):
    return run("others", tmp_path_factory.mktemp("others"))


def test_seeds_clocks_and_callbacks_are_those_of_the_first(others):
    first, second = (found["seeds"] for found in others)
    for fact in ("gates", "first", "n_iter", "status", "called", "interrupted", "sent"):
        assert first[fact] == second[fact], fact
    assert (first["status"], first["interrupted"], first["called"]) == ("time_limit", "interrupted", 20)
    assert first["seconds"] > 0


def test_what_does_not_work_is_said(others):
    first, second = (found["refused"] for found in others)
    assert first == second
    assert "UnsupportedError: activation is 'relu'" in first["relu"]
    assert "solver 'bm_global' cannot serve this problem: the samples are shared out" in first["solver"]
    assert "needs all of them in one" in first["side"]
    assert "X has 1 rows; at least one for each of the 2 processes is wanted" in first["few"]
    assert "shared out already" in first["twice"]


def test_a_process_that_ends_leaves_a_checkpoint(run, tmp_path):
    """Killed in the middle of a step; the other one ends with an error, and another number of processes goes on."""
    survivor, killed = run("dying", tmp_path)
    assert killed is None
    assert "process 0 of 2 has lost the others" in survivor["error"]
    assert "resume=True" in survivor["error"]
    assert survivor["seconds"] < 60
    assert read_tensors(tmp_path / "run.safetensors", "checkpoint")[0]["iteration"] == 16
    wanted = worker.whole(tmp_path)
    for found in run("resumed", tmp_path, size=3):
        assert found["n_iter"] == 30
        np.testing.assert_allclose(found["Z"], wanted["Z"], rtol=1e-9, atol=1e-9)
        assert found["lower"] == pytest.approx(wanted["lower"], rel=1e-9)
