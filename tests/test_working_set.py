"""ADMM on some of the gates: the whole problem is certified, and the optimum is that of all gates."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.bounds import dual_bound
from cvxnn.certificates import evaluate
from cvxnn.operators import MLPOperator
from cvxnn.solvers import gate_kernels
from cvxnn.solvers.admm import Admm, AdmmOptions
from cvxnn.solvers.api import choose_solver
from cvxnn.solvers.gate_kernels import GateKernels, KernelsOfSet
from cvxnn.solvers.gated_rows import GatedRows
from cvxnn.solvers.memory import needed_bytes
from cvxnn.solvers.nystrom_system import NystromSystem
from cvxnn.solvers.pricing import Pricing
from cvxnn.solvers.sides import make_ridge
from cvxnn.solvers.vector_admm import VectorAdmm, VectorAdmmOptions
from cvxnn.solvers.vector_costs import choose_system
from cvxnn.solvers.working_set import WorkingSet, WorkingSetOptions
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


@pytest.mark.parametrize(("c", "stops"), [(1, (5, 12)), (2, (5, 21))])
def test_resumes_with_the_same_bits(tmp_path, c, stops):
    problem = many_gates(beta=0.05, c=c)
    common = {"tol": TOL, "solver_options": {"gates": 5}}
    whole = cvxnn.solve(problem, "working_set", checkpoint=tmp_path / "whole", **common)
    for stop in stops:
        file = tmp_path / f"run-{stop}"
        cvxnn.solve(problem, "working_set", max_iter=stop, checkpoint=file, **common)
        resumed = cvxnn.solve(problem, "working_set", checkpoint=file, resume=True, **common)
        assert resumed.n_iter == whole.n_iter
        assert torch.equal(resumed.Z, whole.Z)
        assert torch.equal(resumed.dual, whole.dual)


@pytest.mark.parametrize("side", ["samples", "features", "iterative"])
def test_a_round_that_has_just_begun_has_a_point(side):
    problem = many_gates(c=2)
    admm = Admm(problem, AdmmOptions(side=side), TOL, None)
    admm.start(None)
    assert not bool(admm.iterate().blocks().any())


@pytest.mark.parametrize("side", ["samples", "features", "iterative"])
def test_a_factor_that_failed_is_made_again(side, monkeypatch):
    problem = many_gates(c=2)
    ridge = make_ridge(side, problem.operator, problem.weights, False, problem.Y)
    ridge.factor(2.0)

    def fails(*_):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr("cvxnn.solvers.ridge.cholesky", fails)
    monkeypatch.setattr("cvxnn.solvers.iterative_ridge.cholesky", fails)
    with pytest.raises(torch.linalg.LinAlgError):
        ridge.factor(1.0)
    # Runs of a path go on with the factor of this penalty, where it serves.
    assert ridge.rho == 0.0


def test_weights_and_penalty_stay_together_where_a_factor_failed(monkeypatch):
    problem = many_gates(loss="huber")
    solver = Admm(problem, AdmmOptions(side="samples"), TOL, None)
    solver.start(None)
    solver.sigma *= 2

    def fails(*_):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr("cvxnn.solvers.ridge.cholesky", fails)
    with pytest.raises(torch.linalg.LinAlgError):
        solver._refactor(True)
    weights = solver.kept["ridge"]._root[:, 0].square()
    torch.testing.assert_close(weights, torch.full_like(weights, solver.kept["sigma"]))


def test_ends_where_rounding_stops_the_rounds(monkeypatch):
    problem = many_gates()
    solver = WorkingSet(problem, WorkingSetOptions(), TOL, None)
    solver.start(None)
    assert not solver.limited_by_rounding()
    monkeypatch.setattr(type(solver.inner), "limited_by_rounding", lambda _: True)
    monkeypatch.setattr(type(solver.inner), "message", lambda *_: "uneven")
    assert solver.limited_by_rounding()
    assert solver.message(cvxnn.certify(problem, Z=solver.iterate().Z)) == "uneven"


def test_prices_in_float64_where_products_of_float32_are_coarser(monkeypatch):
    problem = many_gates(c=2)
    assert Pricing(problem, {})._single is not None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert Pricing(problem, {})._single is None


def test_one_gate_is_refused():
    problem = make_problem(activation="linear")
    with pytest.raises(cvxnn.errors.UnsupportedError, match="one gate"):
        cvxnn.solve(problem, "working_set")


def test_prices_in_float32_bound_those_in_float64():
    problem = many_gates(c=2)
    nu = problem.dual_candidate(torch.zeros_like(problem.Y64))
    exact = dual_bound(problem, nu)
    pricing = Pricing(problem, {})
    priced = pricing(nu, torch.arange(0))
    assert pricing.n_screened == 0
    assert bool((priced.norms_upper >= exact.norms_lower).all())
    # What decides is seen in float64.
    assert priced.dual_norm == exact.dual_norm
    assert priced.lower_bound == exact.lower_bound
    assert float(priced.norms_upper[[3, 8]].max()) <= float(exact.norms_upper[[3, 8]].max()) * (1 + 1e-3)


@pytest.mark.parametrize("options", [{}, {"c": 2}, {"loss": "huber"}, {"output_bias": True}])
def test_gates_are_screened_on_the_way_and_none_that_is_in_use(options):
    problem = many_gates(beta=0.2, **options)
    result = cvxnn.solve(problem, "working_set", tol=1e-7, solver_options={"gates": 20})
    assert result.status == "certified"
    assert 0 < result.trace[-1]["screened"] < problem.n_gates
    pricing = Pricing(problem, {})
    pricing(problem.centred(result.dual), torch.arange(0), evaluate(problem, result.Z))
    optimum = cvxnn.solve(problem, "admm", tol=1e-8)
    values = optimum.Z.abs().amax((1, 2))
    used = set((values > 1e-4 * values.max()).nonzero()[:, 0].tolist())
    assert used <= set(pricing.alive.tolist())


@pytest.mark.parametrize("c", [1, 2])
def test_an_optimum_without_gates_is_reached(c):
    problem = many_gates(c=c)
    start = cvxnn.solve(problem, "admm", tol=1e-3)
    above = problem.with_beta(1.5 * problem.beta_max)
    result = cvxnn.solve(above, "working_set", init=start, tol=0, max_iter=100)
    assert result.trace[-1]["screened"] == problem.n_gates - 1
    assert result.certificate.relative_gap < 1e-12


def test_kernels_of_changing_sets_are_those_of_each():
    rng = np.random.default_rng(0)
    X, D = rng.standard_normal((30, 4)), rng.random((30, 20)) > 0.5
    kernels = GateKernels()
    for gates in ([1, 5, 7, 9, 12], [1, 5, 7, 8, 9, 12], [1, 7, 9, 12], [0, 2], np.arange(20)):
        gates = np.array(gates)
        for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-12)):
            rows = GatedRows(X.astype(dtype), D[:, gates].astype(dtype))
            lower = np.tril(kernels.kernel(rows, gates))
            expected = np.tril((X @ X.T) * (D[:, gates].astype(float) @ D[:, gates].T))
            np.testing.assert_allclose(lower, expected, atol=tolerance)


@pytest.mark.parametrize("solver", ["admm", "vector_admm", "working_set"])
@pytest.mark.parametrize("options", [{}, {"output_bias": True}])
def test_a_path_forms_kernels_once_and_certifies_every_beta(solver, options, monkeypatch):
    problem = many_gates(**options)
    formed = []
    for owner, name in ((MLPOperator, "kernel"), (GatedRows, "kernel"), (gate_kernels, "_add_square")):
        original = getattr(owner, name)

        def counted(*arguments, original=original, **more):
            formed.append(original)
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, counted)
    results = cvxnn.path(problem, n_betas=8, ratio=1e-2, tol=TOL, solver=solver)
    assert all(result.status == "certified" for result in results)
    if solver != "working_set":
        assert len(formed) == 1
    monkeypatch.undo()
    for result in results[1::3]:
        alone = cvxnn.solve(result.problem, "admm", tol=TOL)
        assert result.certificate.lower_bound <= alone.objective * (1 + 1e-12)
        assert alone.certificate.lower_bound <= result.objective * (1 + 1e-12)


@pytest.mark.parametrize("loss", ["huber", "cross_entropy"])
def test_paths_of_other_losses_go_on_with_their_penalties(loss):
    problem = make_problem(loss, n=40, n_gates=20)
    results = cvxnn.path(problem, n_betas=6, ratio=1e-2, tol=TOL, solver="admm")
    assert all(result.status == "certified" for result in results)
    last = cvxnn.solve(results[-1].problem, "admm", tol=TOL)
    assert last.objective == pytest.approx(results[-1].objective, rel=2 * TOL)


def test_auto_takes_it_for_many_gates():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((260, 30)), rng.standard_normal((260, 2))
    many = cvxnn.mlp_problem(X, Y[:, :1], n_gates=400, beta=1.0)
    assert choose_solver(many.with_beta(1e-3 * many.beta_max)) == "working_set"
    assert choose_solver(many.with_gates(torch.arange(100))) == "vector_admm"
    two = cvxnn.mlp_problem(X, Y, n_gates=400, beta=1.0)
    assert choose_solver(two.with_beta(0.1 * two.beta_max)) == "working_set"
    assert choose_solver(two.with_beta(1e-3 * two.beta_max)) == "admm"


def test_auto_takes_it_for_fewer_gates_with_many_samples_where_beta_is_large():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3000, 200))
    problem = cvxnn.mlp_problem(X, rng.standard_normal((3000, 1)), n_gates=90, beta=1.0)
    assert choose_system(problem) == "iterative"
    assert choose_solver(problem.with_beta(0.1 * problem.beta_max)) == "working_set"
    assert choose_solver(problem.with_beta(1e-3 * problem.beta_max)) == "vector_admm"
    few = problem.with_gates(torch.arange(40))
    assert choose_solver(few.with_beta(0.1 * few.beta_max)) != "working_set"


def few_in_use(**options):
    """2600 samples, so that conjugate gradients serve, 40 gates, and one hidden neuron with a gate of its own."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((2600, 120))
    y = np.maximum(X @ rng.standard_normal((120, 1)), 0) + 0.1 * rng.standard_normal((2600, 1))
    problem = cvxnn.mlp_problem(X, y, n_gates=40, reduction="sum", random_state=0, **options)
    return problem.with_beta(0.3 * problem.beta_max)


@pytest.mark.parametrize("options", [{}, {"output_bias": True}])
def test_rounds_by_conjugate_gradients_agree_with_all_gates_and_resume_with_the_same_bits(tmp_path, options):
    problem = few_in_use(**options)
    solver = WorkingSet(problem, WorkingSetOptions(), TOL, None)
    solver.start(None)
    assert isinstance(solver.inner.system, NystromSystem)
    whole = cvxnn.solve(problem, "working_set", tol=TOL, checkpoint=tmp_path / "whole")
    reference = cvxnn.solve(problem, "vector_admm", tol=TOL)
    assert whole.status == reference.status == "certified"
    assert whole.certificate.lower_bound <= reference.objective * (1 + 1e-12)
    assert reference.certificate.lower_bound <= whole.objective * (1 + 1e-12)
    for stop in (3, 7):
        assert stop < whole.n_iter
        file = tmp_path / f"run-{stop}"
        cvxnn.solve(problem, "working_set", tol=TOL, max_iter=stop, checkpoint=file)
        resumed = cvxnn.solve(problem, "working_set", tol=TOL, checkpoint=file, resume=True)
        assert resumed.n_iter == whole.n_iter
        assert torch.equal(resumed.Z, whole.Z)
        assert torch.equal(resumed.dual, whole.dual)


def test_rounds_share_samples_and_products():
    problem = few_in_use()
    problem = problem.with_beta(problem.beta / 10)
    solver = WorkingSet(problem, WorkingSetOptions(), TOL, None)
    solver.start(None)
    first = solver.inner
    while solver.inner is first:
        solver.step()
    assert solver.inner.rows.X is first.rows.X
    assert solver.inner.rows.astype(np.float32).X is first.rows.astype(np.float32).X
    alone = VectorAdmm(solver.part, VectorAdmmOptions(), TOL, None)
    np.testing.assert_array_equal(alone.rows.X, solver.inner.rows.X)
    np.testing.assert_array_equal(alone.rows.D, solver.inner.rows.D)


def test_rows_of_kernels_are_those_of_each_set():
    rng = np.random.default_rng(0)
    X, D = rng.standard_normal((30, 4)), rng.random((30, 20)) > 0.5
    kernels, chosen = GateKernels(), np.array([2, 3, 11])
    for gates in ([1, 5], [0, 1, 5, 7]):
        for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-12)):
            rows = GatedRows(X.astype(dtype), D[:, gates].astype(dtype))
            found = KernelsOfSet(kernels, np.array(gates)).kernel_rows(rows, chosen)
            np.testing.assert_allclose(found, rows.kernel_rows(chosen), atol=tolerance)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_estimates_are_dual_norms(size):
    problem = many_gates()
    nu = size * problem.dual_candidate(torch.zeros_like(problem.Y64))
    pricing = Pricing(problem, {})
    exact = problem.operator.double().adjoint(nu).norm(dim=(1, 2))
    torch.testing.assert_close(pricing.estimate(nu), exact, rtol=1e-5, atol=0)
    pricing.restrict(torch.tensor([4, 9]))
    assert pricing.estimate(nu).nonzero()[:, 0].tolist() == [4, 9]


def test_memory_is_estimated():
    X = np.random.default_rng(0).standard_normal((300, 40))
    one = cvxnn.mlp_problem(X, X[:, :1], n_gates=400, beta=0.1)
    several = cvxnn.mlp_problem(X, X[:, :2], n_gates=400, beta=0.1)
    assert 32 * 300**2 < needed_bytes(one, "working_set") < needed_bytes(one, "admm") + 32 * 300**2
    assert 16 * 300**2 < needed_bytes(several, "working_set") < needed_bytes(several, "admm")
