"""Bugs of the Burer-Monteiro solvers and of the diagnosis, each with the case that showed it."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import InvalidInputError
from tests.helpers import make_data, make_problem


def near_a_saddle(delta=9e-4, beta=1e-3):
    """A second gate whose column is tiny, but counts as full rank numerically; the optimum is lower."""
    x = np.sqrt(delta * beta)
    problem = cvxnn.mlp_problem(
        np.array([[1, 0.0], [x, 1e-9]]),
        np.array([[1.0], [delta * beta / x]]),
        gates=np.array([[1, 1.0], [-1e12, 1]]),
        beta=beta,
        reduction="sum",
    )
    s = 2e-4 * np.sqrt(1 - beta)
    U, V = torch.zeros(2, 2, 1, dtype=torch.float64), torch.zeros(2, 1, 1, dtype=torch.float64)
    U[0, 0, 0] = V[0, 0, 0] = np.sqrt(1 - beta - s * s)
    U[1, 0, 0] = V[1, 0, 0] = s
    return problem, (U, V)


def test_numerical_ranks_do_not_make_a_saddle_a_global_optimum():
    problem, factors = near_a_saddle()
    found = cvxnn.diagnose(problem, factors)
    best = cvxnn.solve(problem, "admm", tol=1e-9)
    assert found.certificate.primal > best.objective * (1 + 1e-4)
    assert found.status != "global_optimum"
    assert not any(entry.applies and entry.conclusion == "global optimum" for entry in found.theorems)


def test_an_optimum_of_another_problem_is_refused():
    problem, other = make_problem(n_gates=5), make_problem(n_gates=5, random_state=7)
    result = cvxnn.solve(problem, "bm_global", tol=1e-6)
    with pytest.raises(InvalidInputError, match="optimum is a result of another problem"):
        cvxnn.diagnose(problem, result, optimum=cvxnn.solve(other, "bm_global", tol=1e-6))


def test_results_own_their_factors():
    problem = make_problem()
    best = cvxnn.solve(problem, "bm_global", tol=1e-8)
    U, V = (part.clone() for part in best.factors)
    again = cvxnn.solve(problem, "bm_gd", init=(U, V), rank=U.shape[2], tol=1e-3)
    assert again.n_iter == 0
    U.zero_()
    assert cvxnn.certify(problem, factors=again.factors).primal == pytest.approx(again.objective)


@pytest.mark.parametrize("solver", ["bm_gd", "bm_lbfgs", "bm_precgd"])
def test_paths_leave_zero(solver):
    problem = make_problem(c=1)
    options = {"solver": solver, "n_betas": 4, "ratio": 1e-2, "tol": 1e-3, "max_iter": 3000, "random_state": 0}
    for step in cvxnn.path(problem, **options)[1:]:
        zero = problem.objective(torch.zeros(problem.operator.block_shape))
        assert step.objective < 0.99 * zero


@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-4])
def test_lbfgs_does_not_depend_on_the_scale_of_the_targets(scale):
    X, Y, _ = make_data(40, 4, 3)
    problem = cvxnn.mlp_problem(X, scale * Y, n_gates=8, beta=2e-3 * scale, random_state=0)
    result = cvxnn.solve(problem, "bm_global", tol=1e-5, max_iter=60, solver_options={"local": "lbfgs"})
    assert result.status == "certified"


def test_checkpoints_of_lbfgs_without_pairs(tmp_path):
    X, Y, _ = make_data(40, 4, 3)
    problem = cvxnn.mlp_problem(X, 1e-5 * Y, n_gates=8, beta=1e-7, random_state=0)
    options = {"tol": 1e-9, "solver_options": {"local": "lbfgs", "lbfgs_iter": 1}}
    options["checkpoint"] = tmp_path / "run.safetensors"
    cvxnn.solve(problem, "bm_global", max_iter=1, **options)
    assert cvxnn.solve(problem, "bm_global", max_iter=3, resume=True, **options).n_iter == 3


def test_normal_equations_that_cannot_be_factored_do_not_end_the_run():
    X, Y, _ = make_data(30)
    problem = cvxnn.mlp_problem(X * 1e8 + 1e9, Y, n_gates=6, beta=1e-3, output_bias=True, hidden_bias=True)
    result = cvxnn.solve(problem, "bm_global", max_iter=30)
    assert result.status != "diverged"


def test_the_order_of_mini_batches_survives_a_checkpoint(tmp_path):
    problem = make_problem(n=60)
    options = {"random_state": None, "solver_options": {"batch_size": 16}, "checkpoint": tmp_path / "run.safetensors"}
    cvxnn.solve(problem, "bm_sgd", max_iter=1, **options)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((tmp_path / "run.safetensors").read_bytes())
    first = cvxnn.solve(problem, "bm_sgd", max_iter=4, resume=True, **options)
    second = cvxnn.solve(problem, "bm_sgd", max_iter=4, resume=True, **(options | {"checkpoint": copy}))
    assert first.objective == second.objective


def test_time_limit_of_lbfgs_is_for_the_whole_run():
    """Every step of L-BFGS gets the same deadline."""
    problem = make_problem()
    from cvxnn.solvers.api import SOLVERS

    solver = SOLVERS["bm_lbfgs"](problem, SOLVERS["bm_lbfgs"].Options(), 1e-12, 1e-9, 1, 0)
    solver.start(None)
    begin = solver.begin
    solver.step()
    assert solver.begin == begin


def test_a_system_that_rounding_makes_indefinite_is_done_without():
    rng = np.random.default_rng(0)
    X, y = 1e-8 * rng.standard_normal((20, 2)), rng.standard_normal(20)
    problem = cvxnn.mlp_problem(X, y, n_gates=5, hidden_bias=True, output_bias=True, random_state=0)
    problem = problem.with_beta(1e-3 * problem.beta_max)
    result = cvxnn.solve(problem, "bm_global", max_iter=20)
    assert result.status == "certified"
    assert result.certificate.lower_bound <= cvxnn.solve(problem, "admm", max_iter=50).objective
