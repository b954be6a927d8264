"""Runs that are killed, disks that are full, files that are cut short, and memory that does not suffice."""

import resource
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn import memory
from cvxnn.errors import MemoryShortageError, MemoryWarning, StorageError
from cvxnn.layerwise import LayerwiseCNNClassifier
from cvxnn.solvers import checkpoint as checkpoint_module
from cvxnn.solvers.memory import needed_bytes
from tests.helpers import make_problem
from tests.kills import TASKS, killed


@pytest.mark.parametrize("task", TASKS)
def test_killed_runs_end_where_others_do(task, tmp_path):
    found = killed(task, kills=3, seed=1, folder=tmp_path)
    assert found["kills"] == 3
    assert found["lost"] <= 1
    assert found["equal"]


@contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


RUN = {"solver": "bm_sgd", "tol": 0.0, "random_state": 0}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "INTERVAL", 0.0)
    problem = make_problem(n=300, n_gates=20)
    path = tmp_path / "run.safetensors"
    cvxnn.solve(problem, max_iter=3, checkpoint=path, **RUN)
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(StorageError, match=r"cannot write .*run\.safetensors"):
        cvxnn.solve(problem, max_iter=6, checkpoint=path, resume=True, **RUN)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    resumed = cvxnn.solve(problem, max_iter=6, checkpoint=path, resume=True, **RUN)
    whole = cvxnn.solve(problem, max_iter=6, **RUN)
    assert torch.equal(resumed.factors[0], whole.factors[0])


def test_a_full_disk_ends_layerwise_training(tmp_path):
    images, labels = np.random.default_rng(0).standard_normal((60, 1, 8, 8)), np.arange(60) % 3
    options = {"n_stages": 1, "n_gates": 8, "rank": 1, "batch_size": 32, "random_state": 0, "device": "cpu"}
    options |= {"checkpoint": tmp_path / "run", "certify": False}
    LayerwiseCNNClassifier(epochs=2, callbacks=[lambda entry: entry["epoch"] == 1], **options).fit(images, labels)
    file = tmp_path / "run" / "training.safetensors"
    before = file.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(StorageError, match=r"cannot write .*training\.safetensors"):
        LayerwiseCNNClassifier(epochs=2, resume=True, **options).fit(images, labels)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["training.safetensors"]
    resumed = LayerwiseCNNClassifier(epochs=2, resume=True, **options).fit(images, labels)
    whole = LayerwiseCNNClassifier(epochs=2, **(options | {"checkpoint": None})).fit(images, labels)
    np.testing.assert_array_equal(resumed.predict_proba(images), whole.predict_proba(images))


def test_a_checkpoint_cut_short_is_refused(tmp_path):
    problem = make_problem(n=30)
    path = tmp_path / "run.safetensors"
    cvxnn.solve(problem, max_iter=2, checkpoint=path, **RUN)
    whole = path.read_bytes()
    for length in np.unique(np.linspace(0, len(whole) - 1, 60).astype(int)):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"damaged|not a file written by cvxnn") as error:
            cvxnn.solve(problem, max_iter=4, checkpoint=path, resume=True, **RUN)
        assert str(path) in str(error.value)
    changed = bytearray(whole)
    changed[-9] ^= 1
    path.write_bytes(changed)
    with pytest.raises(StorageError, match="do not match their checksum"):
        cvxnn.solve(problem, max_iter=4, checkpoint=path, resume=True, **RUN)
    # Without resume it is overwritten.
    assert cvxnn.solve(problem, max_iter=4, checkpoint=path, **RUN).n_iter == 4


def test_memory_is_compared_before_the_work(monkeypatch):
    problem = make_problem(n=200, d=50, c=20, n_gates=100)
    needed = needed_bytes(problem, "fista")
    blocks = problem.n_gates * 50 * 20 * 8
    assert 6 * blocks < needed < 12 * blocks + 40 * problem.Y.numel() * 8
    small = needed_bytes(problem, "bm_lbfgs", 1)
    assert small < needed / 2
    assert needed_bytes(problem, "admm", side="features") > 2 * (100 * 50) ** 2 * 8
    assert needed_bytes(problem, "bm_sgd", 2) < needed_bytes(problem, "bm_sgd", 4)

    monkeypatch.setattr(memory, "total_bytes", lambda device: needed // 2)
    advice = r"needs about .* MiB, and there are .* MiB in all; rank=\d \(bm_\w+\) would need "
    with pytest.raises(MemoryShortageError, match="solver 'fista' " + advice):
        cvxnn.solve(problem, "fista", max_iter=1)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 10 * needed)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed // 2)
    with pytest.warns(MemoryWarning, match=r"solver 'fista' needs about .* are free; rank="):
        cvxnn.solve(problem, "fista", max_iter=1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * needed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cvxnn.solve(problem, "fista", max_iter=1)


def test_data_that_do_not_fit_are_refused_before_they_are_copied(monkeypatch):
    X, y = np.zeros((1000, 100)), np.arange(1000.0)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 2**20)
    with pytest.raises(MemoryShortageError, match=r"X of shape \(1000, 100\) needs about 1.6 MiB.*memmap"):
        cvxnn.mlp_problem(X, y, hidden_bias=True)


def test_memory_of_this_machine():
    cpu = torch.device("cpu")
    total, free = memory.total_bytes(cpu), memory.available_bytes(cpu)
    assert 2**27 < free <= total
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**36, hard))
        limited = memory.total_bytes(cpu)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert limited == min(total, 2**36)
    assert [memory.in_words(size) for size in (2**33, 31 * 2**30 + 1, 1.5 * 2**20, 2048)] == [
        "8.0 GiB",
        "31 GiB",
        "1.5 MiB",
        "2 KiB",
    ]
