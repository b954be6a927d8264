"""The loop around the solvers: why it ends, what it records, checkpoints, warm starts, paths, output."""

import numpy as np
import pytest
import torch

import cvxnn
import cvxnn.solvers.checkpoint as checkpoint_module
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.solvers.admm import Admm
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.solvers.driver import run
from tests.helpers import make_problem

HARD = {"beta": 1e-5, "n": 40}


class Scripted(Solver):
    """A solver whose steps do as told: scale the blocks, fail, or stop."""

    name = "scripted"
    check_every = 1

    def __init__(self, problem, actions):
        super().__init__(problem, self.Options(), 1e-9, None)
        self.actions = list(actions)

    def start(self, point):
        self.Z = torch.zeros(self.problem.operator.block_shape, dtype=torch.float64)

    def step(self):
        action = self.actions.pop(0)
        if isinstance(action, BaseException):
            raise action
        if action == "finish":
            self.finished = True
        else:
            self.Z = self.Z + action

    def iterate(self):
        return Iterate(self.Z)

    def state(self):
        return {"Z": self.Z}

    def load_state(self, state):
        self.Z = state["Z"]


def run_script(actions, **options):
    settings = {"max_iter": len(actions), "time_limit": None, "init": None, "checkpoint": None, "resume": False}
    settings |= {"callbacks": (), "verbose": 0, **options}
    return run(Scripted(make_problem(), actions), **settings)


def test_certified_and_max_iter():
    problem = make_problem()
    assert cvxnn.solve(problem).status == "certified"
    short = cvxnn.solve(make_problem(**HARD), solver="fista", max_iter=3)
    assert (short.status, short.n_iter) == ("max_iter", 3)
    assert len(short.trace) == 1
    assert cvxnn.solve(problem.with_beta(2 * problem.beta_max)).n_iter == 0


def test_time_limit():
    result = cvxnn.solve(make_problem(**HARD), solver="fista", tol=0, time_limit=1e-3)
    assert result.status == "time_limit"
    assert result.n_iter >= 1
    assert result.seconds >= 1e-3


def test_interrupt_inside_a_step():
    result = run_script([1e-3, 1e-3, KeyboardInterrupt()])
    assert (result.status, result.n_iter) == ("interrupted", 2)
    assert result.objective == result.certificate.primal == result.problem.objective(result.Z)


def test_interrupt_before_the_first_step():
    result = run_script([KeyboardInterrupt()])
    assert (result.status, result.n_iter) == ("interrupted", 0)
    assert not result.Z.any()


def test_interrupt_inside_a_callback():
    def interrupt(entry):
        raise KeyboardInterrupt

    result = cvxnn.solve(make_problem(**HARD), tol=0, max_iter=50, callbacks=[interrupt])
    assert result.status == "interrupted"
    assert result.objective == result.certificate.primal
    assert len(result.trace) == 1


def test_callbacks_see_the_trace_and_may_stop():
    seen = []
    result = cvxnn.solve(
        make_problem(**HARD), "fista", tol=0, max_iter=100, callbacks=[seen.append, lambda e: e["iteration"] >= 30]
    )
    assert result.status == "interrupted"
    assert result.n_iter == 30
    assert seen == result.trace


def test_errors_of_callbacks_are_not_hidden():
    def fail(entry):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cvxnn.solve(make_problem(**HARD), tol=0, max_iter=20, callbacks=[fail])


def test_stationary():
    result = run_script([1e-3, "finish", 1.0])
    assert (result.status, result.n_iter) == ("stationary", 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_diverged_keeps_the_best_point(bad):
    result = run_script([-1e-3, 0.0, bad, 0.0])
    assert (result.status, result.n_iter) == ("diverged", 3)
    assert torch.isfinite(result.Z).all()
    assert result.objective <= result.problem.objective(torch.zeros_like(result.Z))


def test_failing_factorisation_is_divergence():
    result = run_script([1e-3, torch.linalg.LinAlgError("not positive definite")])
    assert (result.status, result.n_iter) == ("diverged", 1)
    assert np.isfinite(result.objective)


@pytest.mark.parametrize("solver", ["admm", "fista", "frank_wolfe"])
def test_trace(solver):
    result = cvxnn.solve(make_problem(**HARD), solver=solver, tol=0, max_iter=120)
    assert [set(entry) for entry in result.trace] == [
        {"iteration", "seconds", "primal", "lower_bound", "relative_gap"}
    ] * len(result.trace)
    columns = {name: [entry[name] for entry in result.trace] for name in result.trace[0]}
    assert len(result.trace) > 1
    assert columns["iteration"] == sorted(set(columns["iteration"]))
    assert columns["seconds"] == sorted(columns["seconds"])
    assert columns["primal"] == sorted(columns["primal"], reverse=True)
    assert columns["lower_bound"] == sorted(columns["lower_bound"])
    assert columns["relative_gap"] == sorted(columns["relative_gap"], reverse=True)
    assert columns["primal"][-1] == pytest.approx(result.objective, rel=1e-14)
    assert result.certificate.relative_gap <= columns["relative_gap"][-1] * (1 + 1e-9) + 1e-12
    assert result.n_iter == columns["iteration"][-1]


#: Cut where a certificate is due: a run that ends elsewhere certifies one point more.
RESUMED = {
    "admm-squared": ("admm", {}, 50, 100),
    "admm-features": ("admm", {"solver_options": {"side": "features"}}, 50, 100),
    "admm-iterative": ("admm", {"solver_options": {"side": "iterative"}}, 50, 100),
    "admm-plain": ("admm", {"solver_options": {"memory": 0}}, 50, 100),
    "admm-cross-entropy": ("admm", {"loss": "cross_entropy", "output_bias": True}, 40, 100),
    "fista": ("fista", {}, 40, 100),
    "fista-bias": ("fista", {"loss": "logistic", "output_bias": True}, 40, 100),
    "frank-wolfe": ("frank_wolfe", {}, 2, 4),
    "frank-wolfe-factors": ("frank_wolfe", {"norms": ("linf", "l2"), "output_bias": True}, 3, 8),
}


@pytest.mark.parametrize(("solver", "options", "half", "whole"), RESUMED.values(), ids=RESUMED)
def test_resumed_runs_end_where_others_do(tmp_path, solver, options, half, whole):
    options = dict(options)
    settings = {"solver": solver, "tol": 0, "solver_options": options.pop("solver_options", None)}
    problem = make_problem(**(HARD | {"beta": 1e-3} | options))
    through = cvxnn.solve(problem, max_iter=whole, **settings)
    path = tmp_path / "run.ckpt"
    first = cvxnn.solve(problem, max_iter=half, checkpoint=path, **settings)
    assert first.n_iter == half
    second = cvxnn.solve(problem, max_iter=whole, checkpoint=path, resume=True, **settings)
    assert second.n_iter == whole
    assert torch.equal(second.Z, through.Z)
    assert torch.equal(second.intercept, through.intercept)
    assert second.objective == through.objective
    assert [e["iteration"] for e in second.trace][: len(first.trace)] == [e["iteration"] for e in first.trace]
    primal = [entry["primal"] for entry in second.trace]
    assert primal == sorted(primal, reverse=True)
    assert second.seconds > first.trace[-1]["seconds"]


def test_checkpoint_after_an_interrupt_is_that_of_the_last_whole_step(tmp_path, monkeypatch):
    problem = make_problem(**HARD)
    path = tmp_path / "run.ckpt"
    settings = {"solver": "admm", "tol": 0, "checkpoint": path}
    original = Admm.step

    def interrupted(self):
        if self.iteration == 20:
            self.W = None
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Admm, "step", interrupted)
    first = cvxnn.solve(problem, max_iter=60, **settings)
    assert (first.status, first.n_iter) == ("interrupted", 20)
    monkeypatch.undo()
    second = cvxnn.solve(problem, max_iter=60, resume=True, **settings)
    through = cvxnn.solve(problem, solver="admm", tol=0, max_iter=60)
    assert torch.equal(second.Z, through.Z)


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "INTERVAL", 0.0)
    path = tmp_path / "run.ckpt"
    exists = []
    cvxnn.solve(
        make_problem(**HARD), tol=0, max_iter=120, checkpoint=path, callbacks=[lambda e: exists.append(path.exists())]
    )
    # Also before the first certificate.
    assert exists[:2] == [True, True]
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    problem = make_problem(**HARD)
    cvxnn.solve(problem, solver="fista", tol=0, max_iter=5, checkpoint=path)
    before = path.read_bytes()
    others = [
        (problem.with_beta(2e-5), {"solver": "fista"}),
        (problem, {"solver": "admm"}),
        (problem, {"solver": "fista", "solver_options": {"restart": False}}),
        (make_problem(**HARD, seed=1), {"solver": "fista"}),
        (make_problem(**HARD, random_state=1), {"solver": "fista"}),
        (make_problem("huber", **HARD), {"solver": "fista"}),
        (make_problem(**HARD, output_bias=True), {"solver": "fista"}),
        (make_problem(**HARD, dtype="float32"), {"solver": "fista"}),
        (make_problem(**HARD, sample_weight=np.arange(40)), {"solver": "fista"}),
    ]
    for other, options in others:
        with pytest.raises(StorageError, match="is the checkpoint of another run"):
            cvxnn.solve(other, tol=0, max_iter=5, checkpoint=path, resume=True, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = tmp_path / "run.ckpt"
    settings = {"solver": "fista", "tol": 0, "max_iter": 5, "checkpoint": path}
    cvxnn.solve(make_problem(**HARD), **settings)
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    damaged = {"cut": content[: len(content) // 2], "flipped": content, "text": b"a,b\n1,2\n", "empty": b""}[damage]
    path.write_bytes(damaged)
    with pytest.raises(StorageError):
        cvxnn.solve(make_problem(**HARD), resume=True, **settings)


def test_places_that_cannot_hold_a_checkpoint_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Admm, "start", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(StorageError, match="its folder does not exist"):
        cvxnn.solve(make_problem(), checkpoint=tmp_path / "missing" / "run.ckpt")
    with pytest.raises(StorageError, match="it is a folder"):
        cvxnn.solve(make_problem(), checkpoint=tmp_path)


def test_resume_without_a_file_starts_anew(tmp_path):
    path = tmp_path / "run.ckpt"
    assert cvxnn.solve(make_problem(), checkpoint=path, resume=True).status == "certified"
    assert path.exists()


def factors_of(Z):
    P, s, Qt = torch.linalg.svd(Z, full_matrices=False)
    return P * s.sqrt().unsqueeze(1), Qt.mT * s.sqrt().unsqueeze(1)


@pytest.mark.parametrize("solver", ["admm", "fista", "frank_wolfe"])
@pytest.mark.parametrize("form", ["result", "tensor", "numpy", "list", "factors"])
def test_warm_starts(solver, form):
    problem = make_problem()
    tol = 1e-2 if solver == "frank_wolfe" else 1e-4
    solved = cvxnn.solve(problem, solver="interior_point", tol=1e-7)
    init = {
        "result": solved,
        "tensor": solved.Z,
        "numpy": solved.Z.numpy(),
        "list": solved.Z.tolist(),
        "factors": factors_of(solved.Z),
    }[form]
    again = cvxnn.solve(problem, solver=solver, init=init, tol=tol)
    assert again.status == "certified"
    assert again.n_iter == 0
    near = problem.with_beta(0.9 * problem.beta)
    warm = cvxnn.solve(near, solver=solver, init=init, tol=tol)
    assert warm.status == "certified"
    assert warm.objective <= near.objective(solved.Z) * (1 + 1e-12)


@pytest.mark.parametrize("solver", ["admm", "fista"])
def test_paths_are_warm_started(solver):
    problem = make_problem(n=40, n_gates=8)
    results = cvxnn.path(problem, n_betas=12, ratio=1e-2, solver=solver, tol=1e-4)
    betas = [result.problem.beta for result in results]
    assert betas == sorted(betas, reverse=True)
    assert betas[0] == pytest.approx(problem.beta_max)
    assert betas[-1] == pytest.approx(1e-2 * problem.beta_max)
    assert all(result.status == "certified" for result in results)
    assert not results[0].Z.any()
    objectives = [result.objective for result in results]
    assert objectives == sorted(objectives, reverse=True)
    cold = [cvxnn.solve(problem.with_beta(beta), solver=solver, tol=1e-4).n_iter for beta in betas]
    assert sum(result.n_iter for result in results) < sum(cold)


def test_paths_of_given_betas():
    problem = make_problem()
    results = cvxnn.path(problem, [0.01, 0.1, 0.05])
    assert [result.problem.beta for result in results] == [0.1, 0.05, 0.01]
    for bad, message in (
        ({"betas": []}, "betas is empty"),
        ({"betas": [0.1, -1]}, "betas is -1"),
        ({"n_betas": 0}, "n_betas is 0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": 0}, "ratio is 0"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            cvxnn.path(problem, **bad)


def test_path_without_anything_to_learn():
    X = np.random.default_rng(0).standard_normal((10, 2))
    with pytest.raises(InvalidInputError, match="beta_max is 0"):
        cvxnn.path(cvxnn.mlp_problem(X, np.zeros((10, 1))))
    with pytest.raises(InvalidInputError, match="beta_max is 0"):
        cvxnn.path(cvxnn.mlp_problem(np.tile(X[:1], (10, 1)), X, output_bias=True, gates=X[:2].T))


@pytest.mark.parametrize("tol", [1e-3, 1.0, 5.0, 0.0])
@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_progress_is_on_standard_error_only(capfd, verbose, tol):
    cvxnn.solve(make_problem(**HARD), solver="fista", verbose=verbose, max_iter=30, tol=tol)
    out, err = capfd.readouterr()
    assert out == ""
    assert bool(err) == (verbose > 0)
    if verbose == 2:
        assert all("primal" in line and "gap" in line for line in err.splitlines())


def test_solving_leaves_the_global_random_states_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    for solver in ("admm", "fista", "frank_wolfe"):
        cvxnn.solve(make_problem(), solver=solver, tol=1e-2)
    assert (torch.rand(1).item(), np.random.rand()) == expected  # noqa: NPY002


def test_runs_are_deterministic():
    for solver in ("admm", "fista", "frank_wolfe", "interior_point"):
        first, second = (cvxnn.solve(make_problem(), solver=solver, tol=1e-2) for _ in range(2))
        assert torch.equal(first.Z, second.Z)
        assert first.certificate == second.certificate
