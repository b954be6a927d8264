"""Every solver on every problem that it supports: certified, in agreement, and refused early elsewhere."""

from dataclasses import fields

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.losses import Huber
from cvxnn.solvers.api import SOLVERS
from cvxnn.solvers.sides import cheaper_side, make_ridge
from tests.helpers import LOSSES, NORMS, explicit_matrix, make_data, make_problem, random_blocks

TOLERANCES = {"admm": 1e-6, "interior_point": 1e-6, "fista": 1e-4, "frank_wolfe": 1e-2}
WITH_PROX = [norms for norms in NORMS if "l1" in norms or norms == ("l2", "l2")]
MAX_ITER = {"admm": 20_000, "fista": 20_000, "frank_wolfe": 500, "interior_point": 5}


def check(result, tol):
    """The result is certified, and its certificate is that of the point that it holds."""
    assert result.status == "certified", result
    assert result.certificate.relative_gap <= tol
    assert result.objective == result.certificate.primal
    problem = result.problem
    if result.factors is None:
        assert problem.objective(result.Z, result.intercept) == pytest.approx(result.objective, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_solvers_certify_and_agree(loss, activation, output_bias, reduction):
    beta = 2e-2 * (24 if reduction == "sum" else 1)
    problem = make_problem(loss, activation=activation, output_bias=output_bias, reduction=reduction, beta=beta)
    results = {}
    for solver, tol in TOLERANCES.items():
        results[solver] = cvxnn.solve(problem, solver=solver, tol=tol, max_iter=MAX_ITER[solver])
        check(results[solver], tol)
    best = min(result.objective for result in results.values())
    for result in results.values():
        assert result.certificate.lower_bound <= best * (1 + 1e-11)
        assert result.objective <= best * (1 + 1.01 * TOLERANCES[result.solver])


@pytest.mark.parametrize("norms", WITH_PROX, ids="-".join)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_norms_with_a_prox(loss, norms):
    problem = make_problem(loss, norms=norms)
    results = {s: cvxnn.solve(problem, solver=s, tol=t, max_iter=MAX_ITER[s]) for s, t in TOLERANCES.items()}
    best = min(result.objective for result in results.values())
    for solver, result in results.items():
        check(result, TOLERANCES[solver])
        assert result.certificate.lower_bound <= best * (1 + 1e-11)


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_frank_wolfe_serves_every_norm(norms, output_bias):
    problem = make_problem(norms=norms, output_bias=output_bias)
    result = cvxnn.solve(problem, solver="frank_wolfe", tol=1e-2, max_iter=500)
    check(result, 1e-2)
    if not problem.norm.exact:
        U, V = result.factors
        np.testing.assert_allclose(U @ V.mT, result.Z, atol=1e-12)
        again = cvxnn.certify(problem, factors=(U, V), intercept=result.intercept, dual=result.dual)
        assert again == result.certificate


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
def test_sides_of_admm_agree(loss, output_bias):
    weights = np.random.default_rng(0).random(24)
    weights[:3] = 0
    problem = make_problem(loss, output_bias=output_bias, sample_weight=weights)
    options = {"solver": "admm", "tol": 1e-7}
    samples, features = (cvxnn.solve(problem, **options, solver_options={"side": s}) for s in ("samples", "features"))
    check(samples, 1e-7)
    check(features, 1e-7)
    assert samples.objective == pytest.approx(features.objective, rel=2e-7)
    np.testing.assert_allclose(samples.Z, features.Z, atol=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solver", ["admm", "fista", "frank_wolfe", "interior_point"])
def test_sample_weights(loss, solver):
    repeats = np.random.default_rng(0).integers(0, 3, 24)
    X, _, labels = make_data()
    targets, gates = np.eye(2)[labels], np.random.default_rng(1).standard_normal((3, 4))
    options = {"gates": gates, "loss": loss, "beta": 3e-2, "output_bias": True}
    weighted = cvxnn.mlp_problem(X, targets, sample_weight=repeats, **options)
    repeated = cvxnn.mlp_problem(np.repeat(X, repeats, 0), np.repeat(targets, repeats, 0), **options)
    tol = TOLERANCES[solver]
    first, second = (cvxnn.solve(p, solver=solver, tol=tol, max_iter=20_000) for p in (weighted, repeated))
    check(first, tol)
    assert first.objective == pytest.approx(second.objective, rel=2 * tol)
    assert repeated.objective(first.Z, first.intercept) == pytest.approx(first.objective, rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solver", ["admm", "fista", "frank_wolfe", "interior_point"])
@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
def test_float32(loss, solver, output_bias):
    problem = make_problem(loss, dtype="float32", output_bias=output_bias)
    tol = max(1e-3, TOLERANCES[solver])
    result = cvxnn.solve(problem, solver=solver, tol=tol, max_iter=300)
    check(result, tol)
    exact = cvxnn.solve(make_problem(loss, output_bias=output_bias), tol=1e-5)
    assert result.objective == pytest.approx(exact.objective, rel=2 * tol)


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("side", ["samples", "features"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_unscaled_features_in_float32_do_not_crash(loss, side, scale):
    X, Y, labels = make_data(40, 4)
    targets = labels if loss == "cross_entropy" else Y
    problem = cvxnn.mlp_problem(X * scale, targets, loss=loss, n_gates=10, beta=1e-3, dtype="float32")
    result = cvxnn.solve(problem, solver="admm", max_iter=60, solver_options={"side": side})
    assert result.status in {"certified", "max_iter"}
    assert result.objective <= problem.objective(torch.zeros_like(result.Z))


@pytest.mark.parametrize("small", [0.0, 1e-300, 1e-12])
@pytest.mark.parametrize("side", ["samples", "features", "iterative"])
@pytest.mark.parametrize("loss", ["cross_entropy", "huber", "logistic"])
def test_samples_of_little_weight_cost_no_iterations(loss, side, small):
    X, _, labels = make_data(40, 3, 3)
    gates = np.random.default_rng(0).standard_normal((3, 10))
    options = {"loss": loss, "gates": gates, "reduction": "sum", "output_bias": True, "beta": 0.05}
    settings = {"tol": 1e-6, "solver_options": {"side": side}}
    few = cvxnn.solve(cvxnn.mlp_problem(X[:12], np.eye(3)[labels[:12]], **options), "admm", **settings)
    weights = np.where(np.arange(40) < 12, 1.0, small)
    problem = cvxnn.mlp_problem(X, np.eye(3)[labels], sample_weight=weights, **options)
    result = cvxnn.solve(problem, "admm", max_iter=3_000, **settings)
    check(result, 1e-6)
    assert result.n_iter <= 2 * few.n_iter
    assert result.objective == pytest.approx(few.objective, rel=1e-5)


def test_two_samples_are_solved():
    """Extrapolations that fail must not mislead the penalties."""
    X = np.random.default_rng(0).standard_normal((60, 3))[:2]
    problem = cvxnn.mlp_problem(X, [0, 1], beta=1e-3, hidden_bias=True, output_bias=True)
    assert cvxnn.solve(problem, solver="admm", max_iter=1000).status == "certified"


def test_other_hubers_and_one_output():
    X, Y, _ = make_data(c=2)
    for delta in (1e-2, 0.3, 10.0):
        problem = cvxnn.mlp_problem(X, Y[:, 0], loss=Huber(delta), n_gates=5, beta=1e-3)
        check(cvxnn.solve(problem, tol=1e-5), 1e-5)


def test_more_features_than_samples():
    X, Y, labels = make_data(8, 20)
    for targets, loss in ((Y, "squared"), (labels, "cross_entropy")):
        for solver in ("admm", "fista", "frank_wolfe"):
            problem = cvxnn.mlp_problem(X, targets, loss=loss, n_gates=6, beta=1e-2)
            check(cvxnn.solve(problem, solver=solver, tol=1e-2), 1e-2)


@pytest.mark.parametrize("intercept", [False, True])
def test_quadratic_step_solves_its_problem(intercept):
    problem = make_problem(n=12)
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.random(12))
    weights[0] = 0
    B, C = random_blocks(problem), torch.from_numpy(rng.standard_normal((12, 2)))
    Phi, a, rho = explicit_matrix(problem.operator), weights.numpy(), 0.7
    if intercept:
        Phi = np.hstack([Phi, np.ones((12, 1))])
    ridge = np.diag(np.r_[np.full(15, rho), np.zeros(int(intercept))])
    right = Phi.T @ (a[:, None] * C.numpy())
    right[:15] += rho * B.reshape(15, 2).numpy()
    expected = np.linalg.solve(Phi.T @ (a[:, None] * Phi) + ridge, right)
    for side in ("samples", "features"):
        step = make_ridge(side, problem.operator, weights, intercept)
        step.factor(rho)
        found = step.solve(B, C)
        np.testing.assert_allclose(found.Z.reshape(15, 2), expected[:15], atol=1e-10)
        np.testing.assert_allclose(found.residual, a[:, None] * (C.numpy() - Phi @ expected), atol=1e-10)


def test_cheaper_side_is_the_smaller_one():
    assert cheaper_side(make_problem(n=300, n_gates=3).operator, True) == "features"
    assert cheaper_side(make_problem(n=8, n_gates=50).operator, True) == "samples"


@pytest.mark.parametrize("norms", [norms for norms in NORMS if norms not in WITH_PROX], ids="-".join)
@pytest.mark.parametrize("solver", ["admm", "fista", "interior_point"])
def test_norms_without_a_prox_are_refused(solver, norms):
    problem = make_problem(norms=norms)
    with pytest.raises(UnsupportedError, match=f"'{solver}' cannot serve this problem: .*'frank_wolfe'"):
        cvxnn.solve(problem, solver=solver)
    assert cvxnn.solve(problem, tol=0.1).solver == "frank_wolfe"


@pytest.mark.parametrize("solver", sorted(TOLERANCES))
def test_convex_solvers_take_no_rank(solver):
    with pytest.raises(UnsupportedError, match="rank=3 is for Burer-Monteiro solvers"):
        cvxnn.solve(make_problem(), solver=solver, rank=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, "solver is 'newton'; one of auto, admm"),
        ({"solver": None}, "solver is None"),
        ({"solver": ["admm"]}, "solver is"),
        ({"tol": -1}, "tol is -1"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"tol": "small"}, "tol is 'small'"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"max_iter": 2.5}, "max_iter is 2.5"),
        ({"time_limit": 0}, "time_limit is 0"),
        ({"resume": True}, "resume=True needs the path"),
        ({"solver": "admm", "solver_options": {"speed": 1}}, "solver_options has 'speed'.*known options: relaxation"),
        ({"solver": "fista", "solver_options": {"rho": 1}}, "solver_options has 'rho'"),
        ({"solver_options": ["rho"]}, "solver_options is a list"),
        ({"solver": "admm", "solver_options": {"relaxation": 2}}, "relaxation is 2; a number between 0 and 2"),
        ({"solver": "vector_admm", "solver_options": {"relaxation": 3}}, "relaxation is 3; a number between 0 and 2"),
        ({"solver": "admm", "solver_options": {"relaxation": "x"}}, "relaxation is 'x'"),
        ({"solver": "admm", "solver_options": {"rho": -1}}, "rho is -1"),
        ({"solver": "admm", "solver_options": {"side": "top"}}, "side is 'top'"),
        ({"solver": "admm", "solver_options": {"memory": -1}}, "memory is -1"),
        ({"solver": "fista", "solver_options": {"step_growth": 0.5}}, "step_growth is 0.5; a number of at least 1"),
        ({"solver": "fista", "solver_options": {"step_growth": "x"}}, "step_growth is 'x'"),
        ({"solver": "frank_wolfe", "solver_options": {"new_atoms": 0}}, "new_atoms is 0"),
        ({"solver": "interior_point", "solver_options": {"backend": "x"}}, "backend is 'x'"),
        ({"init": np.zeros((1, 2, 3))}, r"init has shape \(1, 2, 3\); \(5, 3, 2\) is wanted"),
        ({"init": np.full((5, 3, 2), np.nan)}, "init contains NaN"),
        ({"init": "start"}, "init cannot be read"),
        ({"init": (1, 2, 3)}, "init"),
        ({"callbacks": print}, "callbacks"),
        ({"callbacks": ["print"]}, "callbacks"),
        ({"resume": "no"}, "resume is 'no'; True or False is wanted"),
    ],
)
def test_refused_before_the_start(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        cvxnn.solve(make_problem(), **arguments)


@pytest.mark.parametrize("solver", ["admm", "fista"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 2e-19), ("float32", 1e16), ("float64", 1e-153), ("float64", 1e140)], ids=str
)
@pytest.mark.parametrize("architecture", ["mlp", "cnn"])
def test_data_of_any_size_are_solved(architecture, dtype, scale, solver):
    rng = np.random.default_rng(0)
    Y, options = rng.standard_normal((30, 2)), {"n_gates": 4, "dtype": dtype, "beta": 1.0}
    if architecture == "mlp":
        problem = cvxnn.mlp_problem(scale * rng.standard_normal((30, 4)), Y, **options)
    else:
        problem = cvxnn.cnn_problem(scale * rng.standard_normal((30, 1, 5, 5)), Y, **options)
    check(cvxnn.solve(problem.with_beta(0.3 * problem.beta_max), solver, tol=1e-4, max_iter=1_000), 1e-4)


SWITCHES = [
    (name, option.name) for name, kind in SOLVERS.items() for option in fields(kind.Options) if option.type == "bool"
]


@pytest.mark.parametrize(("solver", "option"), SWITCHES)
def test_switches_are_true_or_false(solver, option):
    with pytest.raises(InvalidInputError, match=f"{option} is 'no'; True or False is wanted"):
        cvxnn.solve(make_problem(), solver, solver_options={option: "no"})


def test_no_problem_is_refused():
    with pytest.raises(InvalidInputError, match="problem is a ndarray; a cvxnn Problem is wanted"):
        cvxnn.solve(np.zeros(3))


def test_results_describe_themselves():
    result = cvxnn.solve(make_problem())
    assert "certified" in repr(result)
    assert result.solver == "admm"
    assert result.Z.dtype == torch.float64
    assert result.factors is None
    network = result.network()
    X = make_data()[0]
    outputs = network(torch.from_numpy(X)).detach()
    np.testing.assert_allclose(outputs, result.problem.operator.apply(result.Z) + result.intercept, atol=1e-10)


@pytest.mark.parametrize("solver", ["admm", "vector_admm", "working_set", "fista"])
@pytest.mark.parametrize("scale", [-3.0, 1e6, 1e200])
def test_warm_starts_that_are_worse_than_zero_are_dropped(solver, scale):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 4))
    problem = cvxnn.mlp_problem(X, np.maximum(X[:, :1], 0) - 0.3 * X[:, 1:2], n_gates=20, beta=1e-2, random_state=0)
    cold = cvxnn.solve(problem, solver, tol=1e-6)
    warm = cvxnn.solve(problem, solver, tol=1e-6, init=scale * cold.Z)
    assert (warm.status, warm.n_iter, warm.objective) == ("certified", cold.n_iter, cold.objective)


@pytest.mark.parametrize("solver", ["admm", "fista"])
def test_runs_that_float32_stops_say_so(solver):
    problem = make_problem(n=60, dtype="float32")
    result = cvxnn.solve(problem, solver, tol=1e-12, max_iter=20_000)
    assert result.status == "stationary"
    assert "float64" in result.message


@pytest.mark.parametrize(
    ("kind", "variant"),
    [(kind, "corrective") for kind in ("plain", "bias", "norms", "cross_entropy", "relu")]
    + [("bias", "plain"), ("norms", "plain"), ("cross_entropy", "plain")],
)
def test_frank_wolfe_does_not_depend_on_the_sizes_of_the_data(kind, variant):
    options = {
        "plain": {},
        "bias": {"output_bias": True},
        "norms": {"norms": ("linf", "l2"), "output_bias": True},
        "cross_entropy": {"loss": "cross_entropy", "output_bias": True},
        "relu": {"activation": "relu"},
    }[kind]
    X, Y, labels = make_data()
    targets = np.eye(2)[labels] if kind == "cross_entropy" else Y
    options |= {"gates": np.random.default_rng(1).standard_normal((3, 5))}
    settings = {"tol": 1e-3, "max_iter": 20, "solver_options": {"variant": variant}}
    beta = 0.1 * cvxnn.mlp_problem(X, targets, **options).beta_max
    first = cvxnn.solve(cvxnn.mlp_problem(X, targets, beta=beta, **options), "frank_wolfe", **settings)
    assert first.status == ("certified" if variant == "corrective" else "max_iter")
    sizes = [(2.0**34, 1.0), (2.0**-34, 1.0)]
    if kind != "cross_entropy":
        sizes += [(1.0, 2.0**34), (1.0, 2.0**-34), (2.0**-34, 2.0**-34), (1e10, 1e10)]
    for x, y in sizes:
        scaled = cvxnn.mlp_problem(x * X, y * targets, beta=beta * x * y, **options)
        result = cvxnn.solve(scaled, "frank_wolfe", **settings)
        assert result.status == first.status
        # Other numbers than powers of two round.
        assert result.n_iter == first.n_iter or x == 1e10
        assert result.objective == pytest.approx(y**2 * first.objective, rel=1e-3 if x == 1e10 else 1e-5)
