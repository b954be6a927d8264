"""Runs of several processes, one of which is killed, told to end, or hangs: an error, and a checkpoint."""

import json
import signal
import socket

import numpy as np
import pytest

from cvxnn import distributed
from cvxnn.files import read_tensors
from tests import distributed_worker as worker
from tests.helpers import process_context

#: Seconds that processes wait for one another here.
PATIENCE = 6


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return worker.whole(tmp_path_factory.mktemp("whole"))


def check(found, wanted):
    """The run that went on ends where one does that nothing happened to."""
    assert found["n_iter"] == 30
    for fact in ("Z", "intercept"):
        np.testing.assert_allclose(found[fact], wanted[fact], rtol=1e-9, atol=1e-9)
    for fact in ("primal", "lower", "ratio"):
        assert found[fact] == pytest.approx(wanted[fact], rel=1e-9)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_one_of_two_processes_fails(fault, victim, wanted, tmp_path):
    """The other one ends with an error, within the time that it waits, and the run goes on from its checkpoint."""
    processes = worker.start(worker.faulty, tmp_path, timeout=PATIENCE, arguments=(int(fault), victim))
    survivor = 1 - victim
    processes[survivor].join(120)
    assert processes[survivor].exitcode == 0
    if fault == signal.SIGSTOP:
        assert processes[victim].is_alive()
        processes[victim].kill()
    processes[victim].join(120)
    found = json.loads((tmp_path / f"faulty-{survivor}.json").read_text())
    assert f"process {survivor} of 2 has lost the others" in found["error"]
    assert "one of them has ended or hangs" in found["error"]
    assert "resume=True" in found["error"]
    assert found["seconds"] < 60
    if fault == signal.SIGTERM:
        assert processes[victim].exitcode == 0
        told = json.loads((tmp_path / f"faulty-{victim}.json").read_text())
        assert "interrupted after 16 iterations" in told["error"]
    else:
        assert processes[victim].exitcode == -signal.SIGKILL
    assert read_tensors(tmp_path / "run.safetensors", "checkpoint")[0]["iteration"] == 16
    with distributed.start(init_method=f"file://{tmp_path}/alone", rank=0, size=1) as group:
        check(worker.resumed(group, tmp_path), wanted)


def test_another_number_of_processes_goes_on(wanted, tmp_path):
    processes = worker.start(worker.faulty, tmp_path, timeout=PATIENCE, arguments=(int(signal.SIGKILL), 1))
    for process in processes:
        process.join(120)
    for found in worker.run(worker.resumed, tmp_path, size=3):
        check(found, wanted)


@pytest.mark.parametrize(("shard", "kind"), [("gates", "LinAlgError"), ("samples", "RuntimeError")])
def test_an_error_of_one_process_is_named_in_all(shard, kind, tmp_path):
    first, second = worker.run(worker.broken, tmp_path, shard=shard, arguments=(kind,))
    words = f"failed with {kind}: a matrix is singular; start all of them again, with resume=True"
    assert f"process 1 has {words}" in first["error"]
    assert "process 0 of 2 has lost the others" in first["error"]
    assert f"process 1 of 2 has {words}" in second["error"]
    assert max(first["seconds"], second["seconds"]) < 60
    assert (tmp_path / "run.safetensors").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_before_the_run_is_named_in_all(victim, tmp_path):
    """Also where the first process, which fails, is where the words are kept."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = process_context()
    place = f"tcp://127.0.0.1:{port}"
    processes = [context.Process(target=worker.outside, args=(rank, place, tmp_path, victim)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    found = [json.loads((tmp_path / f"outside-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[victim][0] == "InvalidInputError"
    assert found[1 - victim][0] == "DistributedError"
    assert f"process {victim} has failed with InvalidInputError: X has NaN" in found[1 - victim][1]


def test_a_process_that_hangs_is_given_up_within_a_minute():
    assert distributed.TIMEOUT < 60
