"""ADMM on some of the gates: the whole problem is certified, and the optimum is that of all gates."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.bounds import dual_bound
from tests.helpers import make_problem

TOL = 1e-6


def many_gates(beta=0.1, c=1, **options):
    """60 samples in five dimensions with 150 gates; beta relative to beta_max."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((60, 5))
    Y = np.maximum(X @ rng.standard_normal((5, 4)), 0) @ rng.standard_normal((4, c))
    problem = cvxnn.mlp_problem(X, Y, n_gates=150, reduction="sum", random_state=0, **options)
    return problem.with_beta(beta * problem.beta_max)


@pytest.mark.parametrize("options", [{}, {"c": 3}, {"output_bias": True}, {"norms": ("l1", "l2")}, {"loss": "huber"}])
def test_agrees_with_admm(options):
    problem = many_gates(**options)
    part = cvxnn.solve(problem, "working_set", tol=TOL, solver_options={"gates": 10})
    whole = cvxnn.solve(problem, "admm", tol=TOL)
    assert part.status == whole.status == "certified"
    assert part.certificate.lower_bound <= whole.objective * (1 + 1e-12)
    assert whole.certificate.lower_bound <= part.objective * (1 + 1e-12)
    assert part.Z.shape == problem.operator.block_shape
    # The certificate is one of the whole problem: from scratch it is the same.
    again = cvxnn.certify(problem, Z=part.Z, intercept=part.intercept, dual=part.dual)
    assert again.primal == pytest.approx(part.objective, rel=1e-12)
    assert again.relative_gap <= TOL
    assert again.scope == problem.scope


def test_starts_small_and_stays_below_all_gates():
    problem = many_gates(beta=0.3)
    result = cvxnn.solve(problem, "working_set", tol=TOL, solver_options={"gates": 4, "new_gates": 4})
    assert result.status == "certified"
    assert result.trace[-1]["gates"] < problem.n_gates
    assert int((result.Z.abs().amax((1, 2)) > 0).sum()) <= result.trace[-1]["gates"]


def test_an_optimum_of_few_gates_is_not_taken_for_one_of_all():
    problem = many_gates(beta=0.02)
    few = problem.with_gates(torch.arange(3))
    best_of_few = cvxnn.solve(few, "admm", tol=1e-8)
    optimum = cvxnn.solve(problem, "admm", tol=1e-8)
    assert best_of_few.certificate.lower_bound > 1.01 * optimum.objective
    Z = torch.zeros(problem.operator.block_shape, dtype=torch.float64)
    Z[:3] = best_of_few.Z
    assert cvxnn.certify(problem, Z=Z).lower_bound <= optimum.objective
    stopped = cvxnn.solve(problem, "working_set", tol=TOL, max_iter=3, solver_options={"gates": 3})
    assert stopped.status == "max_iter"
    assert stopped.certificate.lower_bound <= optimum.objective * (1 + 1e-12)


def test_subproblem_has_the_blocks_of_its_gates():
    problem = many_gates(c=2)
    chosen = torch.tensor([7, 2, 31])
    part = problem.with_gates(chosen)
    nu = problem.dual_candidate(torch.zeros_like(problem.Y64))
    torch.testing.assert_close(part.operator.adjoint(nu), problem.operator.adjoint(nu)[chosen])
    assert part.beta_max <= problem.beta_max
    assert dual_bound(part, nu).lower_bound >= dual_bound(problem, nu).lower_bound


def test_warm_start_keeps_the_gates_in_use():
    problem = many_gates(beta=0.1)
    first = cvxnn.solve(problem, "admm", tol=1e-4)
    second = cvxnn.solve(problem, "working_set", init=first, tol=TOL, solver_options={"gates": 2})
    cold = cvxnn.solve(problem, "working_set", tol=TOL, solver_options={"gates": 2})
    assert second.status == cold.status == "certified"
    assert second.n_iter < cold.n_iter


def test_resumes_to_the_same_optimum(tmp_path):
    problem = many_gates(beta=0.05)
    options = {"solver_options": {"gates": 5}, "checkpoint": tmp_path / "run"}
    cvxnn.solve(problem, "working_set", tol=TOL, max_iter=12, **options)
    result = cvxnn.solve(problem, "working_set", tol=TOL, resume=True, **options)
    reference = cvxnn.solve(problem, "admm", tol=TOL)
    assert result.status == "certified"
    assert result.objective == pytest.approx(reference.objective, rel=2 * TOL)


def test_one_gate_is_refused():
    problem = make_problem(activation="linear")
    with pytest.raises(cvxnn.errors.UnsupportedError, match="one gate"):
        cvxnn.solve(problem, "working_set")
