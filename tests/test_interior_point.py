"""The interior-point solver against ADMM and certificates, and its refusals."""

import itertools
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import CvxnnError, DependencyError, InvalidInputError, UnsupportedError
from cvxnn.losses import Huber
from cvxnn.solvers.interior_point import InteriorPoint, InteriorPointOptions, operator_matrix

LOSSES = ("squared", "huber", "logistic", "cross_entropy")
NORMS = (("l2", "l2"), ("l1", "l2"), ("l2", "l1"), ("l1", "l1"), ("l1", "linf"), ("linf", "l1"))


def make_problem(loss: str = "squared", c: int = 3, fraction: float = 0.1, **options: Any) -> cvxnn.Problem:
    """A problem of 20 samples with a duplicate and a zero row, and its beta as a part of beta_max."""
    rng = np.random.default_rng(7)
    X = rng.normal(size=(20, 3))
    X[3], X[5] = X[4], 0
    scores = np.maximum(X @ rng.normal(size=(3, c)), 0) + 0.3 * rng.normal(size=(20, c))
    Y = {"cross_entropy": np.eye(c)[scores.argmax(1)], "logistic": (scores > 0.5).astype(float)}.get(loss, scores)
    chosen = Huber(0.5) if loss == "huber" else loss
    problem = cvxnn.mlp_problem(X, Y, loss=chosen, n_gates=5, **options)
    return problem.with_beta(fraction * problem.beta_max)


CASES = [
    (loss, reduction, bias, activation, norms)
    for loss, reduction, bias, activation in itertools.product(
        LOSSES, ("mean", "sum"), (False, True), ("linear", "gated_relu")
    )
    for norms in (NORMS if activation == "gated_relu" and reduction == "mean" else NORMS[:1])
]


@pytest.mark.parametrize(("loss", "reduction", "bias", "activation", "norms"), CASES)
def test_agrees_with_admm(loss: str, reduction: str, bias: bool, activation: str, norms: tuple[str, str]) -> None:
    problem = make_problem(loss, reduction=reduction, output_bias=bias, activation=activation, norms=norms)
    exact = cvxnn.solve(problem, "interior_point", tol=1e-7)
    assert exact.status == "certified"
    admm = cvxnn.solve(problem, "admm", tol=1e-5)
    assert admm.status == "certified"
    assert admm.certificate.lower_bound <= exact.objective * (1 + 1e-9)
    assert exact.certificate.lower_bound <= admm.objective * (1 + 1e-9)
    assert admm.objective <= exact.objective * (1 + 1e-5)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("shape", [(1, 3), (4, 1)])
def test_vectors_as_blocks(norms: tuple[str, str], shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    d, c = shape
    X, Y = rng.normal(size=(15, d)), rng.normal(size=(15, c))
    problem = cvxnn.mlp_problem(X, Y, n_gates=4, norms=norms)
    problem = problem.with_beta(0.1 * problem.beta_max)
    assert cvxnn.solve(problem, "interior_point", tol=1e-8).status == "certified"


@pytest.mark.parametrize("norms", [("linf", "l2"), ("l2", "linf"), ("linf", "linf")])
def test_norms_without_closed_form_only_as_vectors(norms: tuple[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="closed form"):
        cvxnn.solve(make_problem(norms=norms), "interior_point")
    assert cvxnn.solve(make_problem(c=1, norms=norms), "interior_point", tol=1e-8).status == "certified"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [False, True])
def test_small_beta_needs_the_second_solve(loss: str, bias: bool) -> None:
    result = cvxnn.solve(make_problem(loss, fraction=1e-4, output_bias=bias), "interior_point", tol=1e-6)
    assert result.status == "certified"
    assert result.n_iter <= 2


def test_multiplier_is_a_better_dual_point_than_the_gradient() -> None:
    """Of a Huber loss, whose gradient loses digits where residuals are near its corners."""
    problem = make_problem("huber", fraction=1e-3)
    solver = InteriorPoint(problem, InteriorPointOptions(), 1e-4, None)
    solver.start(None)
    solver.step()
    point = solver.iterate()
    assert point.dual is not None
    gradient = problem.dual_candidate(problem.operator.apply(point.Z))
    torch.testing.assert_close(point.dual, gradient, rtol=0, atol=1e-2 * float(gradient.abs().max()))
    assert cvxnn.certify(problem, point.Z, dual=point.dual).relative_gap < 1e-7


def test_single_precision_problem_keeps_its_types() -> None:
    result = cvxnn.solve(make_problem("logistic", dtype="float32"), "interior_point", tol=1e-5)
    assert result.status == "certified"
    assert result.Z is not None
    assert result.Z.dtype == torch.float32


def test_sample_weights_of_zero_leave_samples_out() -> None:
    rng = np.random.default_rng(3)
    X, Y = rng.normal(size=(12, 2)), rng.normal(size=(12, 2))
    weights = np.where(np.arange(12) < 8, 2.0, 0.0)
    gates = rng.normal(size=(2, 4))
    whole = cvxnn.mlp_problem(X, Y, gates=gates, beta=0.01, output_bias=True, sample_weight=weights)
    part = cvxnn.mlp_problem(X[:8], Y[:8], gates=gates, beta=0.01, output_bias=True)
    results = [cvxnn.solve(problem, "interior_point", tol=1e-9) for problem in (whole, part)]
    assert results[0].objective == pytest.approx(results[1].objective, rel=1e-8)


def test_operator_matrix_is_the_map() -> None:
    problem = make_problem()
    Z = torch.randn(problem.operator.block_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = problem.operator.apply(Z).flatten().numpy()
    np.testing.assert_allclose(operator_matrix(problem.operator) @ Z.flatten().numpy(), expected, atol=1e-12)


def test_scs_reaches_its_own_accuracy() -> None:
    options = {"backend": "scs", "settings": {"eps_abs": 1e-6, "eps_rel": 1e-6}}
    result = cvxnn.solve(make_problem(), "interior_point", tol=1e-3, solver_options=options)
    assert result.status == "certified"


def test_settings_reach_the_backend() -> None:
    """With one iteration Clarabel cannot get anywhere; the certificate says so."""
    options = {"settings": {"max_iter": 1}}
    result = cvxnn.solve(make_problem(), "interior_point", tol=1e-6, solver_options=options)
    assert result.status == "stationary"
    assert result.certificate.relative_gap > 1e-3


def test_time_limit_is_passed_on() -> None:
    """The backend stops at once, and what it has is certified as it is."""
    result = cvxnn.solve(make_problem(), "interior_point", tol=1e-9, time_limit=1e-9)
    assert result.status == "time_limit"
    assert result.n_iter == 1
    assert result.certificate.relative_gap > 1e-9


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="nonsense"):
        cvxnn.solve(make_problem(), "interior_point", solver_options={"settings": {"nonsense": 1}})


@pytest.mark.parametrize(("options", "named"), [({"backend": "gurobi"}, "backend"), ({"settings": 3}, "settings")])
def test_wrong_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        cvxnn.solve(make_problem(), "interior_point", solver_options=options)


def test_missing_backend_names_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvxpy, "installed_solvers", list)
    with pytest.raises(DependencyError, match=r"cvxnn\[reference\]"):
        cvxnn.solve(make_problem(), "interior_point")
    with pytest.raises(DependencyError, match="pip install mosek"):
        cvxnn.solve(make_problem(), "interior_point", solver_options={"backend": "mosek"})


def test_missing_cvxpy_is_named_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"cvxnn\[reference\]"):
        cvxnn.solve(make_problem(), "interior_point")


def test_failure_of_the_backend_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: cvxpy.Problem, **settings: Any) -> None:
        raise cvxpy.SolverError("numerical trouble")

    monkeypatch.setattr(cvxpy.Problem, "solve", fail)
    with pytest.raises(CvxnnError, match="'clarabel' failed: numerical trouble"):
        cvxnn.solve(make_problem(), "interior_point")


def test_no_value_leaves_zero_with_an_honest_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvxpy.Problem, "solve", lambda self, **settings: None)
    result = cvxnn.solve(make_problem(), "interior_point")
    assert result.status == "stationary"
    assert result.Z is not None
    assert not result.Z.any()
    assert result.certificate.relative_gap > 0.01
