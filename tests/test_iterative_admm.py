"""ADMM whose quadratic steps are solved by conjugate gradients."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import UnsupportedError
from cvxnn.solvers import iterative_ridge, sides
from cvxnn.solvers.api import choose_solver
from cvxnn.solvers.memory import needed_bytes
from tests.helpers import explicit_matrix, make_problem, random_blocks

ITERATIVE = {"side": "iterative"}


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("landmarks", [3, 2000])
def test_quadratic_step_solves_its_problem(monkeypatch, intercept, landmarks):
    monkeypatch.setattr(iterative_ridge, "_LANDMARKS", landmarks)
    monkeypatch.setattr(iterative_ridge, "_REDUCTION", 1e-13)
    problem = make_problem(n=12)
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.random(12))
    weights[0] = 0
    step = sides.make_ridge("iterative", problem.operator, weights, intercept)
    # The second system starts at the solution of the first, the third has other weights, and another penalty.
    for seed, factor, rho in ((0, 1.0, 0.7), (1, 1.0, 0.7), (2, 3.0, 0.2)):
        a = factor * weights.numpy()
        B, C = random_blocks(problem, seed), torch.from_numpy(rng.standard_normal((12, 2)))
        Phi = explicit_matrix(problem.operator)
        if intercept:
            Phi = np.hstack([Phi, np.ones((12, 1))])
        right = Phi.T @ (a[:, None] * C.numpy())
        right[:15] += rho * B.reshape(15, 2).numpy()
        shift = np.diag(np.r_[np.full(15, rho), np.zeros(int(intercept))])
        expected = np.linalg.solve(Phi.T @ (a[:, None] * Phi) + shift, right)
        step.set_weights(factor * weights)
        step.factor(rho)
        found = step.solve(B, C)
        np.testing.assert_allclose(found.Z.reshape(15, 2), expected[:15], atol=1e-9)
        np.testing.assert_allclose(found.residual, a[:, None] * (C.numpy() - Phi @ expected), atol=1e-9)


def test_columns_of_the_kernel(tmp_path):
    np.save(tmp_path / "X.npy", np.random.default_rng(0).standard_normal((20, 3)))
    on_disk = np.load(tmp_path / "X.npy", mmap_mode="r")
    problems = [make_problem(n=20), cvxnn.mlp_problem(np.eye(4), np.eye(4), activation="linear", beta=0.1)]
    problems += [cvxnn.mlp_problem(on_disk, np.ones((20, 1)), hidden_bias=True, n_gates=5, dtype="float32")]
    for problem in problems:
        chosen = torch.tensor([3, 0, 2])
        torch.testing.assert_close(problem.operator.kernel_columns(chosen), problem.operator.kernel()[:, chosen])


@pytest.mark.parametrize("landmarks", [4, 2000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_bias": True},
        {"loss": "cross_entropy", "output_bias": True},
        {"loss": "huber", "reduction": "sum"},
        {"activation": "linear"},
    ],
    ids=["squared", "bias", "cross-entropy", "huber", "linear"],
)
def test_the_optimum_is_that_of_the_factorisation(monkeypatch, landmarks, options):
    monkeypatch.setattr(iterative_ridge, "_LANDMARKS", landmarks)
    problem = make_problem(n=40, d=4, c=3, n_gates=15, beta=3e-3, **options)
    found = cvxnn.solve(problem, "admm", tol=1e-6, solver_options=ITERATIVE)
    reference = cvxnn.solve(problem, "admm", tol=1e-9, solver_options={"side": "samples"})
    assert found.status == reference.status == "certified"
    assert found.objective == pytest.approx(reference.objective, rel=2e-6)
    assert found.certificate.lower_bound <= reference.objective


def test_single_precision_is_certified_in_double():
    problem = make_problem(n=60, d=5, n_gates=30, beta=1e-3, dtype="float32")
    result = cvxnn.solve(problem, "admm", tol=1e-4, solver_options=ITERATIVE)
    assert result.status == "certified"
    assert result.objective == cvxnn.certify(problem, result.Z).primal


def test_auto_takes_it_where_no_factorisation_fits(monkeypatch):
    problem = make_problem(n=150, d=10, n_gates=50, beta=1e-2)
    small = sides.factor_bytes(problem, "samples", 10) // 2
    assert sides.choose_side(problem, 10) == "samples"
    monkeypatch.setattr(iterative_ridge, "_LANDMARKS", 20)
    monkeypatch.setattr(sides, "available_bytes", lambda device: small)
    assert sides.choose_side(problem, 10) == "iterative"
    assert choose_solver(problem) == "admm"
    assert needed_bytes(problem, "admm") < needed_bytes(problem, "admm", side="samples")
    result = cvxnn.solve(problem, tol=1e-4)
    assert (result.solver, result.status) == ("admm", "certified")


def test_samples_on_disk(tmp_path):
    X, labels = np.random.default_rng(0).standard_normal((200, 6)), np.arange(200) % 3
    np.save(tmp_path / "X.npy", X)
    found = [
        cvxnn.solve(cvxnn.mlp_problem(data, labels, n_gates=30, beta=1e-2), "admm", tol=1e-6, solver_options=ITERATIVE)
        for data in (X, np.load(tmp_path / "X.npy", mmap_mode="r"))
    ]
    assert [result.status for result in found] == ["certified"] * 2
    assert found[1].objective == pytest.approx(found[0].objective, rel=1e-9)


def test_it_is_refused_without_columns_of_the_kernel(monkeypatch):
    images = np.random.default_rng(0).random((12, 1, 5, 5))
    problem = cvxnn.cnn_problem(images, np.arange(12) % 2, n_gates=4, beta=0.1)
    with pytest.raises(UnsupportedError, match="side='iterative' needs columns of the kernel"):
        cvxnn.solve(problem, "admm", solver_options=ITERATIVE)
    monkeypatch.setattr(sides, "available_bytes", lambda device: 1000)
    assert choose_solver(problem) == "fista"
