"""Samples shared out to processes: the answers of one process."""

import numpy as np
import pytest

from tests import distributed_worker as worker


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solvers")
    return worker.run(worker.solvers, folder), worker.solvers(None, folder)


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
def others(tmp_path_factory):
    return worker.run(worker.others, tmp_path_factory.mktemp("others"))


def test_seeds_clocks_and_callbacks_are_those_of_the_first(others):
    first, second = (found["seeds"] for found in others)
    for fact in ("gates", "attention", "first", "n_iter", "status", "called", "interrupted", "sent"):
        assert first[fact] == second[fact], fact
    assert (first["status"], first["interrupted"], first["called"]) == ("time_limit", "interrupted", 20)
    assert first["seconds"] > 0


def test_the_process_with_the_least_memory_decides(others):
    first, second = (found["short"] for found in others)
    assert first == second == {"chosen": "admm", "side": "iterative", "fista": "fista"}


def test_what_does_not_work_is_said(others):
    first, second = (found["refused"] for found in others)
    assert first == second
    assert "UnsupportedError: activation is 'relu'" in first["relu"]
    assert "solver 'bm_global' cannot serve this problem: the samples are shared out" in first["solver"]
    assert "needs all of them in one" in first["side"]
    assert "X has 1 rows; at least one for each of the 2 processes is wanted" in first["few"]
    assert "shared out already" in first["twice"]
