"""Gates shared out to processes: the answers of one process, and what is in each of them."""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn import distributed
from cvxnn.errors import CvxnnError, DistributedError
from cvxnn.files import read_tensors
from cvxnn.solvers import iterative_ridge
from cvxnn.solvers.fista import Fista
from tests import distributed_worker as worker

SOLVERS = {
    "admm": {"max_iter": 25, "solver_options": {"side": "samples"}},
    "admm, iterative": {"max_iter": 25, "solver_options": {"side": "iterative"}},
    "fista": {"max_iter": 20},
    "bm_lbfgs": {"max_iter": 2, "solver_options": {"inner_iter": 15}},
    "bm_gd": {"max_iter": 30, "solver_options": {"step": None}},
    "bm_noisy_gd": {"max_iter": 12, "solver_options": {"every": 3, "threshold": 1e9}},
    "bm_sgd": {"max_iter": 2, "solver_options": {"batch_size": 32}},
}
CASES = [("memory", "squared"), ("memory", "bias"), ("disk", "cross_entropy")]


def points(problem):
    """Certificates of points that are given whole: blocks and factors."""
    rng = np.random.default_rng(0)
    _, p, q = problem.operator.block_shape
    Z, U, V = (0.1 * rng.standard_normal((problem.n_gates, *shape)) for shape in ((p, q), (p, 2), (q, 2)))
    found = [cvxnn.certify(problem, Z=Z), cvxnn.certify(problem, factors=(U, V))]
    known = [[one.primal, one.lower_bound, one.dual_norm_ratio, one.stationarity, *one.gate_ratios] for one in found]
    return {"certificates": known, "objective": problem.objective(Z)}


def answers(group, folder):
    """All solvers on all settings."""
    iterative_ridge._LANDMARKS = worker.LANDMARKS
    found = {}
    for kind, setting in CASES:
        problem = worker.problem_of(folder, kind, setting)
        if group is not None:
            op = problem.operator
            assert op.n_gates == len(range(problem.n_gates)[group.share(problem.n_gates)]) < problem.n_gates
            assert op.plain.patterns.shape == (problem.n_samples, op.n_gates)
        found[f"{kind} {setting}"] = points(problem)
        for name, options in SOLVERS.items():
            result = cvxnn.solve(problem, name.split(",")[0], random_state=0, tol=1e-9, **options)
            new = torch.from_numpy(np.random.default_rng(1).standard_normal((10, 5)))
            found[f"{kind} {setting} {name}"] = worker.facts(problem, result) | {
                "outputs": result.network()(new).tolist(),
                "ratios": list(result.certificate.gate_ratios),
            }
    problem = worker.problem_of(folder, "memory", "squared")
    norms = cvxnn.mlp_problem(*worker.data(folder, "memory"), n_gates=20, beta=3e-2, norms=("l2", "l1"), random_state=1)
    start = 0.01 * np.random.default_rng(2).standard_normal((problem.n_gates, 5, 3))
    warm = cvxnn.solve(problem, "fista", max_iter=5, init=start, tol=1e-9)
    found |= {"warm": worker.facts(problem, warm), "norms": points(norms)}
    warm = cvxnn.solve(problem, "admm", max_iter=7, init=start, tol=1e-9, solver_options={"side": "samples"})
    found["warm admm"] = worker.facts(problem, warm)
    found["prox"] = worker.facts(norms, cvxnn.solve(norms, "fista", max_iter=20, tol=1e-9))
    images = np.random.default_rng(0).standard_normal((41, 2, 5, 5))
    pictures = cvxnn.cnn_problem(images, np.arange(41) % 3, n_gates=5, beta=3e-3, output_bias=True)
    for name in ("admm", "fista", "bm_gd", "bm_lbfgs"):
        result = cvxnn.solve(pictures, name, random_state=0, tol=1e-9, **SOLVERS[name])
        network = result.network()(torch.from_numpy(images[:5]))
        found[f"cnn {name}"] = worker.facts(pictures, result) | {"outputs": network.tolist()}
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    return worker.run(answers, folder, shard="gates"), answers(None, folder)


def test_two_processes_find_what_one_does(compared):
    (first, second), alone = compared
    assert first == second
    assert set(first) == set(alone)
    for name, one in alone.items():
        for fact, value in one.items():
            tolerance = 1e-6 if fact in ("trace", "stationarity") else 1e-9
            np.testing.assert_allclose(
                first[name][fact], value, rtol=tolerance, atol=tolerance, err_msg=f"{name} {fact}"
            )


def off(group, folder, solver):
    """The second process finds other lengths and losses, as rounding on another kind of machine may leave them."""
    iterative_ridge._LANDMARKS = worker.LANDMARKS
    if group is not None and group.rank == 1:
        smooth, calls = Fista._smooth, itertools.count()
        iterative_ridge.IterativeRidge._length = lambda self, x: 0.0
        # Every loss is above the last one.
        Fista._smooth = lambda self, outputs: (1e3 * next(calls), smooth(self, outputs)[1])
    problem = worker.problem_of(folder, "memory", "squared")
    return worker.facts(problem, cvxnn.solve(problem, solver.split(",")[0], tol=1e-9, **SOLVERS[solver]))


@pytest.mark.parametrize("solver", ["admm, iterative", "fista"])
def test_decisions_are_those_of_the_first_process(solver, tmp_path):
    first, second = worker.run(off, tmp_path, shard="gates", arguments=(solver,), timeout=10)
    assert first == second
    wanted = off(None, tmp_path, solver)
    for fact in ("Z", "primal", "lower", "n_iter"):
        np.testing.assert_allclose(first[fact], wanted[fact], rtol=1e-9, atol=1e-9)


def refused(group, folder):
    """What does not work on gates that are shared out, in words."""
    X, labels = worker.data(folder, "memory")
    problem = worker.problem_of(folder, "memory", "squared")
    _, p, q = problem.operator.block_shape
    pair = [np.ones((problem.n_gates, size, 1)) for size in (p, q)]
    tries = {
        "blocks": lambda: cvxnn.certify(problem, Z=np.zeros((problem.n_gates + 3, p, q))),
        "factors": lambda: cvxnn.certify(problem, factors=[np.ones((2 * problem.n_gates + 1, s, 1)) for s in (p, q)]),
        "diagnose": lambda: cvxnn.diagnose(problem, factors=pair),
        "solver": lambda: cvxnn.solve(problem, "frank_wolfe"),
        "side": lambda: cvxnn.solve(problem, "admm", solver_options={"side": "features"}),
        "relu": lambda: cvxnn.mlp_problem(X, labels, activation="relu"),
        "linear": lambda: cvxnn.mlp_problem(X, labels, activation="linear"),
        "few": lambda: cvxnn.mlp_problem(X, labels, n_gates=1),
        "init": lambda: cvxnn.solve(problem, "bm_gd", init=cvxnn.solve(problem, "bm_gd", max_iter=1, rank=1), rank=1),
        "layerwise": lambda: cvxnn.LayerwiseCNNClassifier().fit(np.zeros((6, 5, 5)), [0, 1] * 3),
    }
    found = {"auto": cvxnn.solve(problem, tol=0.5).solver}
    for name, attempt in tries.items():
        try:
            attempt()
        except CvxnnError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_does_not_work_is_said(tmp_path):
    first, second = worker.run(refused, tmp_path, shard="gates")
    assert first == second
    assert "of 40, all gates, are wanted" in first["blocks"]
    assert "of 40, all gates, are wanted" in first["factors"]
    assert "UnsupportedError: diagnose needs all gates in one process" in first["diagnose"]
    assert "gates are shared out to several processes; one of 'admm', 'fista', 'bm_gd'" in first["solver"]
    assert "UnsupportedError: the gates are shared out" in first["side"]
    assert "UnsupportedError: activation is 'relu', whose cones need the gates" in first["relu"]
    assert "no gates to share out" in first["linear"]
    assert "gates has 1 rows; at least one for each of the 2" in first["few"]
    assert "UnsupportedError: init is given" in first["init"]
    assert "shard='samples'" in first["layerwise"]
    assert first["auto"] == "admm"
    with pytest.raises(CvxnnError, match="shard is 'rows'; one of 'samples', 'gates' is wanted"):
        distributed.start(shard="rows").__enter__()


def long_run(problem, solver, **options):
    """25 iterations, however many processes there are."""
    chosen = {"admm": {"side": "samples"}, "bm_lbfgs": {"inner_iter": 2}}.get(solver)
    return cvxnn.solve(problem, solver, tol=1e-12, random_state=0, max_iter=25, solver_options=chosen, **options)


def dying(group, folder, solver):
    """The second process ends in its 15th iteration or soon after."""
    problem = worker.problem_of(folder, "memory", "bias")

    def callback(entry):
        if group.rank == 1 and entry["iteration"] >= 15:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        long_run(problem, solver, checkpoint=folder / "run.safetensors", callbacks=[callback])
    except DistributedError as error:
        return {"error": str(error)}
    return {}


def resumed(group, folder, solver):
    """It goes on."""
    problem = worker.problem_of(folder, "memory", "bias")
    file = folder / "run.safetensors"
    return worker.facts(problem, long_run(problem, solver, checkpoint=file, resume=True))


@pytest.mark.parametrize("solver", ["admm", "fista", "bm_gd", "bm_lbfgs"])
def test_a_process_that_ends_leaves_a_checkpoint(solver, tmp_path):
    """The last one that was put together; any number of processes goes on from it."""
    processes = worker.start(dying, tmp_path, timeout=10, shard="gates", arguments=(solver,))
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert "process 0 of 2 has lost the others" in json.loads((tmp_path / "dying-0.json").read_text())["error"]
    kept = read_tensors(tmp_path / "run.safetensors", "checkpoint")[0]["iteration"]
    problem = worker.problem_of(tmp_path, "memory", "bias")
    wanted = worker.facts(problem, long_run(problem, solver))
    assert 10 <= kept < wanted["n_iter"] == 25
    before = (tmp_path / "run.safetensors").read_bytes()
    found = worker.run(resumed, tmp_path, size=3, shard="gates", arguments=(solver,))
    (tmp_path / "run.safetensors").write_bytes(before)
    for one in [*found, resumed(None, tmp_path, solver)]:
        assert one["n_iter"] == 25
        for fact in ("Z", "primal", "lower", "intercept"):
            np.testing.assert_allclose(one[fact], wanted[fact], rtol=1e-9, atol=1e-9)
