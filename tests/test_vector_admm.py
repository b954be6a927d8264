"""ADMM for one output: the optimum of the other solvers, whatever the data, and what its better points are worth."""

import tracemalloc

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.solvers import nystrom_system, sides, vector_costs
from cvxnn.solvers.api import choose_solver
from cvxnn.solvers.base import make_options
from cvxnn.solvers.gated_rows import GatedRows, centred, norms
from cvxnn.solvers.kernel_system import KernelSystem
from cvxnn.solvers.memory import needed_bytes
from cvxnn.solvers.nystrom_system import NystromSystem
from cvxnn.solvers.radial import best_sizes, corrected_dual
from cvxnn.solvers.vector_admm import VectorAdmm
from cvxnn.solvers.vector_costs import choose_system
from tests.helpers import explicit_matrix, make_problem

TOL = 1e-7


def data(n=80, d=6, seed=5):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    Y = np.maximum(X @ rng.standard_normal((d, 3)), 0) @ rng.standard_normal((3, 1))
    return X, Y + 0.1 * rng.standard_normal((n, 1))


def problem_of(X, Y, rel=0.05, **options):
    """Beta relative to beta_max."""
    problem = cvxnn.mlp_problem(X, Y, **({"n_gates": 40, "random_state": 0} | options))
    return problem.with_beta(rel * problem.beta_max)


def check_against_admm(problem, tol=TOL, **options):
    result = cvxnn.solve(problem, "vector_admm", tol=tol, max_iter=2_000, **options)
    reference = cvxnn.solve(problem, "admm", tol=tol, max_iter=20_000)
    assert result.status == reference.status == "certified"
    assert result.certificate.lower_bound <= reference.objective * (1 + 1e-12)
    assert reference.certificate.lower_bound <= result.objective * (1 + 1e-12)
    # From scratch the certificate is the same.
    again = cvxnn.certify(problem, Z=result.Z, intercept=result.intercept, dual=result.dual)
    assert again.primal == result.objective
    assert again.relative_gap <= tol
    return result


WEIGHTS = np.where(np.arange(80) < 10, 0.0, np.random.default_rng(1).random(80))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_bias": True},
        {"hidden_bias": True, "output_bias": True},
        {"reduction": "sum", "sample_weight": WEIGHTS},
        {"output_bias": True, "sample_weight": WEIGHTS},
        {"activation": "linear", "output_bias": True},
        {"norms": ("l2", "l1")},
    ],
    ids=str,
)
@pytest.mark.parametrize("rel", [0.9, 0.1, 1e-2, 1e-4])
def test_agrees_with_admm(options, rel):
    X, Y = data()
    check_against_admm(problem_of(X, Y + 3, rel, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_bias": True, "sample_weight": WEIGHTS},
        {"hidden_bias": True, "output_bias": True},
        {"activation": "linear"},
    ],
    ids=str,
)
@pytest.mark.parametrize("rel", [0.9, 0.1, 1e-3])
def test_conjugate_gradients_agree_with_admm(options, rel):
    X, Y = data()
    check_against_admm(problem_of(X, Y + 3, rel, **options), solver_options={"side": "iterative"})


def test_conjugate_gradients_take_no_more_steps_on_few_samples():
    """With all samples in the approximation it is the kernel itself."""
    X, Y = data(60)
    problem = problem_of(X, Y, 1e-4)
    steps = [
        cvxnn.solve(problem, "vector_admm", tol=1e-6, solver_options={"side": side}) for side in vector_costs.SYSTEMS
    ]
    assert all(result.status == "certified" for result in steps)
    assert steps[1].n_iter <= 2 * steps[0].n_iter


def test_conjugate_gradients_without_samples_that_count():
    X, Y = data()
    for inputs, targets in ((np.zeros_like(X), Y), (X, np.zeros_like(Y))):
        problem = cvxnn.mlp_problem(inputs, targets, n_gates=5, beta=0.1)
        result = cvxnn.solve(problem, "vector_admm", solver_options={"side": "iterative"})
        assert result.status == "certified"


def test_the_kernel_is_factored_once_gradients_have_cost_as_much(monkeypatch):
    X, Y = data(300, 4)
    problem = problem_of(X, Y, 1e-4, n_gates=200)
    monkeypatch.setattr(vector_costs, "_ITERATIVE_FROM", 1)
    monkeypatch.setattr(vector_costs, "_READING", 1e9)
    solver = VectorAdmm(problem, make_options(VectorAdmm, None), 1e-12, None)
    solver.start(None)
    assert isinstance(solver.system, NystromSystem)
    for _ in range(60):
        solver.step()
    assert isinstance(solver.system, KernelSystem)
    matrix = kernel_of(solver.rows) / solver.rho + np.eye(300)
    goal = solver.y - solver.rows.apply(solver.B)
    solver.system.change(goal)
    np.testing.assert_allclose(matrix @ solver.system.r, goal, atol=1e-6)


def test_sides_are_chosen_by_cost():
    small = problem_of(*data())
    assert choose_system(small) == "samples"
    X = np.random.default_rng(0).standard_normal((6_000, 20))
    wide = cvxnn.mlp_problem(X, X[:, :1], n_gates=400, beta=0.1)
    assert choose_system(wide) == "iterative"
    assert choose_solver(wide) == "vector_admm"
    narrow = cvxnn.mlp_problem(X[:, :2], X[:, :1], n_gates=3, beta=0.1)
    assert choose_solver(narrow) == "admm"
    assert vector_costs.vector_bytes(wide, "iterative") < 0.2 * vector_costs.vector_bytes(wide)
    with pytest.raises(InvalidInputError, match="side"):
        cvxnn.solve(small, "vector_admm", solver_options={"side": "features"})


@pytest.mark.parametrize(("side", "d"), [("samples", 200), ("iterative", 400)])
def test_the_memory_asked_for_is_the_memory_taken(side, d):
    X, Y = data(60, d)
    problem = cvxnn.mlp_problem(X, Y, n_gates=400, beta=1e-2, random_state=0)
    problem.operator.double()
    tracemalloc.start()
    cvxnn.solve(problem, "vector_admm", tol=1e-12, max_iter=40, solver_options={"side": side})
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Those of torch, of a certificate, are not traced: two copies of the blocks.
    taken += 2 * 8 * problem.n_gates * d
    needed = needed_bytes(problem, "vector_admm", side=side)
    assert 0.95 * taken <= needed <= 1.1 * taken


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("rel", [0.3, 1e-2, 1e-5])
def test_kernels_in_float32_cost_no_precision(rel, output_bias):
    X, Y = data(1_050, 8)
    problem = problem_of(X, Y, rel, output_bias=output_bias)
    result = check_against_admm(problem, tol=1e-9)
    assert result.certificate.relative_gap <= 1e-9


@pytest.mark.parametrize("scales", [(1e100, 1), (1e-100, 1), (1, 1e100), (1, 1e-100), (1e-60, 1e60), (1e6, 1e-6)])
def test_scales(scales):
    X, Y = data()
    plain = cvxnn.solve(problem_of(X, Y), "vector_admm", tol=TOL)
    scaled = cvxnn.solve(problem_of(X * scales[0], Y * scales[1]), "vector_admm", tol=TOL)
    assert scaled.status == "certified"
    assert scaled.objective / scales[1] / scales[1] == pytest.approx(plain.objective, rel=2 * TOL)


def awkward(name):
    X, Y = data()
    rng = np.random.default_rng(2)
    gates = rng.standard_normal((6, 5))
    if name == "equal rows":
        return np.vstack([X[:40], X[:40]]), np.vstack([Y[:40], Y[:40]]), {}
    if name == "a column and a row of zeros":
        X[:, 2] = X[5] = 0
    if name == "equal columns":
        X[:, 1] = X[:, 0]
    if name == "columns of many sizes":
        X *= np.logspace(0, -8, 6)
    if name == "equal gates":
        return X, Y, {"gates": np.hstack([gates, gates, 2 * gates])}
    if name == "one feature":
        X = X[:, :1]
    if name == "one sample":
        X, Y = X[:1], Y[:1]
    if name == "three samples":
        X, Y = X[:3], Y[:3]
    return X, Y, {}


@pytest.mark.parametrize("rel", [0.2, 1e-3])
@pytest.mark.parametrize(
    "name",
    [
        "equal rows",
        "a column and a row of zeros",
        "equal columns",
        "columns of many sizes",
        "equal gates",
        "one feature",
        "one sample",
        "three samples",
    ],
)
def test_awkward_data(name, rel):
    X, Y, options = awkward(name)
    check_against_admm(problem_of(X, Y, rel, **options))


def test_float32_problems_get_points_of_their_type():
    X, Y = data()
    result = cvxnn.solve(problem_of(X, Y, 1e-2, dtype="float32"), "vector_admm", tol=1e-5)
    assert result.status == "certified"
    assert result.Z.dtype == torch.float32


def test_needs_fewer_steps_than_admm():
    X, Y = data(200, 10)
    for rel in (0.1, 1e-2, 1e-3):
        problem = problem_of(X, Y, rel)
        assert check_against_admm(problem).n_iter < cvxnn.solve(problem, "admm", tol=TOL).n_iter


def tiny_beside_ones(scale):
    X, Y = data(40, 3)
    options = {"n_gates": 10, "hidden_bias": True, "output_bias": True, "reduction": "sum"}
    return problem_of(scale * X, Y, 1e-2, **options)


def test_tiny_columns_beside_ones_are_solved():
    result = cvxnn.solve(tiny_beside_ones(1e-6), "vector_admm", tol=3e-7, max_iter=200)
    assert result.status == "certified"


@pytest.mark.parametrize("solver", ["vector_admm", "admm"])
def test_runs_that_rounding_stops_end_and_say_why(solver):
    result = cvxnn.solve(tiny_beside_ones(1e-9), solver, tol=1e-9, max_iter=5_000)
    assert result.status == "stationary"
    assert result.n_iter < 3_000
    assert "columns of X differ by too much in size" in result.message


def test_what_is_free_is_looked_up_in_one_place(monkeypatch):
    monkeypatch.setattr(sides, "available_bytes", lambda device: 1000)
    with pytest.raises(UnsupportedError, match=r"its matrices need .* GiB, more than is free; use 'admm'"):
        cvxnn.solve(make_problem(c=1), "vector_admm")


@pytest.mark.parametrize("options", [{"memory": 0}, {"rho": 1e-4}, {"rho": 1e2}, {"relaxation": 1.0}])
def test_options(options):
    X, Y = data(40, 4)
    check_against_admm(problem_of(X, Y, 1e-2, n_gates=15), tol=1e-6, solver_options=options)


@pytest.mark.parametrize("start", ["result", "blocks", "other beta"])
def test_warm_start(start):
    X, Y = data()
    problem = problem_of(X, Y, 1e-2, output_bias=True)
    first = cvxnn.solve(problem, "vector_admm", tol=1e-10)
    init = {"result": first, "blocks": first.Z, "other beta": cvxnn.solve(problem.with_beta(1.1 * problem.beta))}
    again = cvxnn.solve(problem, "vector_admm", tol=TOL, init=init[start])
    assert again.status == "certified"
    assert again.n_iter <= first.n_iter


@pytest.mark.parametrize("n", [80, 1_050])
def test_resumes_to_the_same_result(tmp_path, n):
    X, Y = data(n)
    problem = problem_of(X, Y, 1e-2, output_bias=True)
    settings = {"solver": "vector_admm", "tol": 1e-11}
    through = cvxnn.solve(problem, max_iter=33, **settings)
    for limit in (3, 12, 33):
        resumed = cvxnn.solve(problem, max_iter=limit, checkpoint=tmp_path / "run", resume=True, **settings)
    # A limit makes a certificate, and so a look, where there was none.
    assert resumed.n_iter == through.n_iter
    assert resumed.objective == pytest.approx(through.objective, rel=1e-9)


def test_a_state_is_not_changed_by_the_next_steps():
    X, Y = data(40, 4)
    problem = problem_of(X, Y, 1e-2, output_bias=True)
    solver = VectorAdmm(problem, VectorAdmm.Options(), TOL, None)
    solver.start(None)
    for _ in range(9):
        solver.step()
    state = solver.state()
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    for _ in range(9):
        solver.step()
    for name, value in kept.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
    once = solver.iterate()
    solver.load_state(state)
    for _ in range(9):
        solver.step()
    torch.testing.assert_close(solver.iterate().Z, once.Z, rtol=1e-12, atol=1e-12)


def test_entries_of_the_trace_come_in_long_runs():
    X, Y = data(40, 4)
    seen = []
    result = cvxnn.solve(problem_of(X, Y), "vector_admm", tol=0, max_iter=200, callbacks=[seen.append])
    assert result.status in {"max_iter", "certified"}
    assert len(seen) >= 3


def test_auto_takes_it_where_the_kernel_is_the_smaller_side():
    X, Y = data(40, 4)
    assert choose_solver(problem_of(X, Y)) == "vector_admm"
    assert choose_solver(problem_of(*data(400, 2), n_gates=5)) == "admm"
    assert choose_solver(problem_of(X, np.hstack([Y, Y]))) == "admm"
    assert choose_solver(problem_of(X, Y, loss="huber")) == "admm"


@pytest.mark.parametrize(
    ("options", "word"),
    [({"c": 2}, "one output"), ({"loss": "huber", "c": 1}, "squared"), ({"norms": ("l1", "l2"), "c": 1}, "l2 norm")],
)
def test_says_what_is_missing(options, word):
    with pytest.raises(UnsupportedError, match=word):
        cvxnn.solve(make_problem(**options), "vector_admm")


def kernel_of(rows):
    n = len(rows.X)
    lower = rows.kernel(np.zeros((n, n), order="F"))
    return np.tril(lower) + np.tril(lower, -1).T


def test_maps_and_kernels_are_those_of_the_operator():
    X, _ = data(30, 4)
    for n_gates in (2, 20):
        problem = cvxnn.mlp_problem(X, X[:, 0], n_gates=n_gates, beta=1.0)
        rows = GatedRows(X, problem.patterns.double().numpy())
        A = explicit_matrix(problem.operator)
        V, r = np.random.default_rng(0).standard_normal(rows.shape), X[:, 1]
        np.testing.assert_allclose(rows.apply(V), A @ V.ravel())
        np.testing.assert_allclose(rows.adjoint(r).ravel(), A.T @ r)
        np.testing.assert_allclose(kernel_of(rows), A @ A.T)
        np.testing.assert_allclose(rows.columns(np.array([1]), V[1:2])[:, 0], A[:, 4:8] @ V[1])


@pytest.mark.parametrize("kind", [KernelSystem, NystromSystem])
@pytest.mark.parametrize("n", [60, 1_001])
@pytest.mark.parametrize("intercept", [False, True])
def test_solutions_of_the_system(n, intercept, kind):
    X, Y = data(n, 4)
    rows = GatedRows(X, (X @ X[:7].T >= 0).astype(float))
    ones = np.linspace(0.5, 1, n) if intercept else None
    system = kind(rows, ones)
    system.factor(3.0)
    assert system.single == (n > 300 or kind is NystromSystem)
    matrix = kernel_of(rows) / 3 + np.eye(n)
    for c in (Y[:, 0], Y[:, 0] + X[:, 0], X[:, 1]):
        for _ in range(3 if kind is KernelSystem else 20):
            before = system.r.copy()
            changed = system.change(c)
            np.testing.assert_allclose(
                changed, rows.adjoint(system.r - before), atol=1e-6 * norms(rows.adjoint(c)).max()
            )
            system.refresh(rows.adjoint(system.r))
        rest = centred(c - matrix @ system.r, ones)
        if intercept:
            expected = np.linalg.solve(matrix, np.column_stack([c, ones]))
            np.testing.assert_allclose(
                system.r, expected[:, 0] - expected[:, 1] * (ones @ expected[:, 0]) / (ones @ expected[:, 1]), atol=1e-8
            )
        else:
            np.testing.assert_allclose(rest, 0, atol=1e-8)


@pytest.mark.parametrize("kind", [KernelSystem, NystromSystem])
def test_a_factor_that_failed_is_made_again(kind, monkeypatch):
    X, _ = data(60, 4)
    system = kind(GatedRows(X, (X @ X[:7].T >= 0).astype(float)), None)
    system.factor(3.0)

    def fails(*_):
        raise np.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(KernelSystem, "_factored", fails)
    monkeypatch.setattr(np.linalg, "cholesky", fails)
    with pytest.raises(np.linalg.LinAlgError):
        system.factor(2.0)
    assert system.rho == 0.0


@pytest.mark.parametrize("intercept", [False, True])
def test_metrics_of_the_two_systems(intercept, monkeypatch):
    """That of the approximation is exact where all samples are in it."""
    monkeypatch.setattr(nystrom_system, "_SHARE", 1)
    X, Y = data(90, 2)
    rows = GatedRows(X, (X @ X[:5].T >= 0).astype(float))
    ones = np.linspace(0.5, 1, 90) if intercept else None
    found = {}
    for kind in (KernelSystem, NystromSystem):
        system = kind(rows, ones)
        system.factor(2.0)
        gram, prepared = system.metric(X)
        found[kind] = gram, system.step(prepared, X[0]), system.fit_norm(Y[:, 0])
        assert system.largest == pytest.approx(np.linalg.eigvalsh(kernel_of(rows))[-1], rel=0.2)
        assert system.fit_norm(np.zeros(90)) == 0
        if intercept:
            np.testing.assert_allclose(ones @ found[kind][1], 0, atol=1e-5)
    for exact, close in zip(found[KernelSystem], found[NystromSystem], strict=True):
        np.testing.assert_allclose(close, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())


def test_best_sizes_beat_the_given_ones():
    rng = np.random.default_rng(0)
    U, y = rng.standard_normal((50, 12)), rng.standard_normal(50)
    for ones in (None, np.ones(50)):

        def value(t, ones=ones):
            return 0.5 * np.sum(centred(y - U @ t, ones) ** 2) + 0.3 * t.sum()

        t = best_sizes(U, y, 0.3, ones)
        assert (t >= 0).all()
        assert value(t) < value(np.zeros(12))
        for k in np.flatnonzero(t):
            for step in (-1e-4, 1e-4):
                assert value(t) < value(np.maximum(t + step * np.eye(12)[k], 0))


def test_corrected_duals_are_feasible_to_second_order():
    """A multiplier with an error e gives a bound that is off by about e; corrected, by its square."""
    X, Y = data()
    problem = problem_of(X, Y, 0.05, reduction="sum")
    best = cvxnn.solve(problem, "vector_admm", tol=1e-12)
    rows = GatedRows(X, problem.patterns.double().numpy())
    system = KernelSystem(rows, None)
    used = norms(best.Z[:, :, 0].numpy()) > 0
    system.factor(problem.beta / (2 * norms(best.Z[:, :, 0].numpy())[used].mean()))
    optimum = -best.dual[:, 0].numpy()
    noise = np.random.default_rng(0).standard_normal(len(optimum))
    excess = {}
    for size in (1e-2, 1e-4):
        r = optimum + size * np.linalg.norm(optimum) / np.linalg.norm(noise) * noise
        corrected, G = corrected_dual(rows, system, r, rows.adjoint(r), problem.beta, used)
        np.testing.assert_allclose(G, rows.adjoint(corrected))
        before, after = (norms(rows.adjoint(v)).max() / problem.beta - 1 for v in (r, corrected))
        excess[size] = after
        assert after < 0.1 * before
    assert excess[1e-4] < 1e-3 * excess[1e-2]
