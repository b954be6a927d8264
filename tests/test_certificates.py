"""Certificates: valid at any point, at any scale, and about the right problem."""

import json
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cvxnn
from cvxnn.bounds import dual_bound
from cvxnn.certificates import STATIONARITY_TOLERANCE, Certificate, relative_gap
from cvxnn.errors import InvalidInputError
from tests.helpers import LOSSES, NORMS, make_data, make_problem, random_blocks

EXACT_NORMS = [norms for norms in NORMS if "l1" in norms or norms == ("l2", "l2")]
SLACK = 1 + 1e-11


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("norms", [("l2", "l2"), ("l1", "l2"), ("l2", "linf")], ids="-".join)
def test_lower_bounds_hold_at_random_points(loss, output_bias, reduction, norms):
    beta = 2e-2 * (24 if reduction == "sum" else 1)
    problem = make_problem(loss, output_bias=output_bias, reduction=reduction, norms=norms, beta=beta)
    best = cvxnn.solve(problem, tol=1e-5, max_iter=400)
    upper = best.objective * SLACK
    rng = np.random.default_rng(0)
    for i in range(40):
        scale = 10.0 ** rng.uniform(-3, 3)
        start = best.Z.numpy() if i % 2 else 0.0
        Z = start + scale * rng.standard_normal(problem.operator.block_shape)
        dual = rng.standard_normal(problem.Y.shape) * 10.0 ** rng.uniform(-6, 6)
        intercept = scale * rng.standard_normal(2) if output_bias else None
        found = cvxnn.certify(problem, Z=Z, intercept=intercept, dual=[dual, best.dual])
        plain = cvxnn.certify(problem, Z=Z, intercept=intercept)
        assert plain.lower_bound <= found.lower_bound <= upper
        assert found.lower_bound <= found.primal
        assert found.relative_gap >= 0
        if found.theorem_bound is not None:
            assert found.primal <= best.objective * (1 + found.theorem_bound) * SLACK
        else:
            assert found.stationarity > STATIONARITY_TOLERANCE


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    loss=st.sampled_from(LOSSES),
    output_bias=st.booleans(),
    scale=st.sampled_from([1e-150, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e140]),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    fraction=st.sampled_from([0.9, 0.1, 1e-2]),
    power=st.sampled_from([-300, -160, -10, 0, 10, 160]),
)
def test_lower_bounds_hold_at_any_scale(seed, loss, output_bias, scale, offset, fraction, power):
    """The value of Z = 0 and of one good step are upper bounds of the optimum, in every scale of the data."""
    rng = np.random.default_rng(seed)
    X = offset + rng.standard_normal((6, 2))
    Y = np.eye(2)[[0, 1, *rng.integers(0, 2, 4)]]
    gates = rng.standard_normal((2, 2))
    problem = cvxnn.mlp_problem(X, Y, gates=gates, loss=loss, output_bias=output_bias)
    assume(problem.beta_max > 0)  # 0 where no sample is active
    problem = problem.with_beta(fraction * problem.beta_max)
    best = cvxnn.solve(problem, solver="frank_wolfe", tol=1e-6, max_iter=3)
    scaled = cvxnn.mlp_problem(X * scale, Y, gates=gates, loss=loss, output_bias=output_bias, beta=problem.beta * scale)
    for dual in (None, best.dual * 10.0**power, rng.standard_normal((6, 2)) * 10.0**power):
        found = cvxnn.certify(scaled, Z=best.Z / scale, dual=dual)
        assert found.lower_bound <= best.objective * (1 + 1e-9)
        assert found.primal == pytest.approx(best.objective, rel=1e-6)
    assert cvxnn.certify(scaled, Z=best.Z / scale, dual=best.dual).relative_gap == pytest.approx(
        best.certificate.relative_gap, rel=1e-2, abs=1e-6 * (1 + offset)
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "logistic"])
@pytest.mark.parametrize("margin", [1, 30, 300, 600, 700, 720, 740, 760, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e8])
def test_confident_predictions_prove_nothing_false(loss, margin, scale):
    """Gradients near the smallest numbers: their products with small data underflow to zero."""
    X, _, _ = make_data(12)
    Y = np.eye(2)[(X[:, 0] > 0).astype(int)]
    problem = cvxnn.mlp_problem(X, Y, activation="linear", loss=loss, beta=1e-3)
    best = cvxnn.solve(problem, tol=1e-6)
    Z = np.zeros((1, 3, 2))
    Z[0, 0] = np.array([-1, 1]) * margin / np.abs(X[:, 0]).min()
    scaled = cvxnn.mlp_problem(X * scale, Y, activation="linear", loss=loss, beta=1e-3 * scale)
    assert cvxnn.certify(scaled, Z=Z / scale).lower_bound <= best.objective * SLACK


@pytest.mark.parametrize("power", [-320, -300, -250, -220, -160, -100, 0, 100, 160, 300])
def test_duals_of_any_size_prove_the_same(power):
    X, Y, _ = make_data(12)
    problem = cvxnn.mlp_problem(X, Y, n_gates=5)
    best = cvxnn.solve(problem, tol=1e-6)
    tiny = cvxnn.mlp_problem(X * 1e-100, Y, gates=problem.gates, beta=1e-2 * 1e-100)
    for target, Z in ((problem, best.Z), (tiny, best.Z * 1e100)):
        lower = cvxnn.certify(target, Z=0 * Z, dual=best.dual.numpy() * 10.0**power).lower_bound
        assert lower <= best.objective * SLACK
        if power > -300:
            assert lower == pytest.approx(best.certificate.lower_bound, rel=1e-9)


@pytest.mark.parametrize("slope", [1.0, 1e8, 1e12])
@pytest.mark.parametrize("beta", [1e-2, 1e-5])
def test_duals_slightly_out_of_the_domain_prove_nothing_false(slope, beta):
    """One sample, where the optimum is an entropy: rounding errors of a dual must not lift the bound."""
    mpmath.mp.dps = 50
    x, cost = mpmath.mpf(slope), mpmath.mpf(beta)

    def entropy(t):
        return -t * mpmath.log(t) - (1 - t) * mpmath.log(1 - t)

    pairs = cvxnn.mlp_problem([[slope]], [[1.0, 0.0]], activation="linear", loss="cross_entropy", beta=beta)
    t = float(cost / (x * mpmath.sqrt(2)))
    best = entropy(cost / (x * mpmath.sqrt(2)))
    for error in (0.0, 1e-17, 1e-16, 1e-15, -1e-15, 5e-15, t):
        found = cvxnn.certify(pairs, Z=np.zeros((1, 1, 2)), dual=np.array([[-t + error, t]]))
        assert found.lower_bound <= best * (1 + 1e-13)
    assert found.lower_bound >= best * (1 - 1e-9)

    single = cvxnn.mlp_problem(
        [[slope], [slope]], [[1.0], [1.0]], activation="linear", loss="logistic", beta=beta, reduction="sum"
    )
    t = float(cost / (2 * x))
    best = 2 * entropy(cost / (2 * x))
    for error in (0.0, 1e-17, 1e-16, 1e-15, 3e-15, t):
        found = cvxnn.certify(single, Z=np.zeros((1, 1, 1)), dual=np.array([[-2 * t], [error]]))
        assert found.lower_bound <= best * (1 + 1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
def test_rounded_duals_prove_almost_as_much(loss, output_bias):
    problem = make_problem(loss, output_bias=output_bias)
    best = cvxnn.solve(problem, tol=1e-9)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(best.dual.shape))
    noise *= 1e-6 * best.dual.abs().max()
    zero = torch.zeros_like(best.Z)
    found = cvxnn.certify(problem, Z=zero, dual=best.dual.float().double() + noise)
    assert found.lower_bound == pytest.approx(best.certificate.lower_bound, rel=1e-4)
    assert found.lower_bound <= best.objective * SLACK


def test_tiny_beta_proves_nothing_false():
    for beta in (1e-12, 1e-100, 1e-300, 5e-324):
        problem = make_problem(beta=beta, n=6)
        found = cvxnn.certify(problem, Z=0 * random_blocks(problem))
        fit, *_ = np.linalg.lstsq(np.vstack([problem.operator.features(slice(None)).numpy()]), problem.Y.numpy(), 0)
        upper = problem.objective(fit.reshape(problem.operator.block_shape))
        assert 0 <= found.lower_bound <= max(upper, 1e-25)


def test_overflowing_points_are_infinitely_far():
    problem = make_problem()
    for size in (1e160, 1e300, 1e308):
        found = cvxnn.certify(problem, Z=size * np.ones(problem.operator.block_shape))
        assert found.primal == math.inf
        assert found.relative_gap == math.inf
        assert found.theorem_bound is None
        assert json.loads(json.dumps(found.to_dict()))["primal"] is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
def test_bounds_at_solutions(loss, output_bias):
    problem = make_problem(loss, output_bias=output_bias)
    tight = cvxnn.solve(problem, tol=1e-12, max_iter=4000)
    found = tight.certificate
    assert found.relative_gap < 1e-6
    assert found.dual_norm_ratio >= found.dual_norm_ratio_lower
    assert found.dual_norm_ratio == max(found.gate_ratios)
    assert len(found.gate_ratios) == problem.n_gates
    assert found.dual_norm_ratio == pytest.approx(1, abs=1e-3)
    if found.theorem_bound is not None:
        assert found.theorem_bound >= (found.primal - found.lower_bound) / found.primal - 1e-9


def test_theorem_bound_needs_a_stationary_point():
    problem = make_problem()
    zero = cvxnn.certify(problem, Z=0 * random_blocks(problem))
    assert zero.stationarity == 0.0
    assert zero.theorem_bound == pytest.approx(zero.dual_norm_ratio - 1, rel=1e-9)
    best = cvxnn.solve(problem, tol=1e-8)
    assert zero.primal <= best.objective * (1 + zero.theorem_bound)
    assert cvxnn.certify(problem, Z=best.Z * 1.01).theorem_bound is None
    assert cvxnn.certify(problem, Z=random_blocks(problem)).theorem_bound is None


def test_nothing_to_learn():
    problem = cvxnn.mlp_problem(make_data()[0], np.zeros((24, 2)), n_gates=5)
    zero = cvxnn.certify(problem, Z=0 * random_blocks(problem))
    assert (zero.primal, zero.lower_bound, zero.relative_gap) == (0.0, 0.0, 0.0)
    elsewhere = cvxnn.certify(problem, Z=random_blocks(problem))
    assert elsewhere.relative_gap == math.inf
    assert elsewhere.to_dict()["relative_gap"] is None
    assert "Nothing is proven" in elsewhere.summary()


def test_relative_gap():
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(1.0, 0.0) == math.inf
    assert relative_gap(3.0, 2.0) == 0.5
    assert relative_gap(2.0, 3.0) == 0.0
    assert relative_gap(math.inf, 1.0) == math.inf


def test_dictionary_round_trip():
    problem = make_problem()
    for Z in (random_blocks(problem), 0 * random_blocks(problem), 1e200 * random_blocks(problem)):
        found = cvxnn.certify(problem, Z=Z)
        again = Certificate.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
        if math.isfinite(found.primal):
            assert again == found
        else:
            assert (again.primal, again.relative_gap) == (math.inf, math.inf)


def test_factors_and_blocks():
    problem = make_problem()
    rng = np.random.default_rng(0)
    U, V = rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 2, 4))
    factors = cvxnn.certify(problem, factors=(U, V))
    blocks = cvxnn.certify(problem, Z=U @ V.transpose(0, 2, 1))
    assert factors.penalty == pytest.approx(0.5 * ((U**2).sum() + (V**2).sum()))
    assert factors.primal > blocks.primal
    assert factors.loss == pytest.approx(blocks.loss, rel=1e-12)
    assert factors.lower_bound == pytest.approx(blocks.lower_bound, rel=1e-9)
    P, s, Qt = np.linalg.svd(U @ V.transpose(0, 2, 1), full_matrices=False)
    root = np.sqrt(s)[:, None, :]
    balanced = cvxnn.certify(problem, factors=(P * root, Qt.transpose(0, 2, 1) * root))
    assert balanced.primal == pytest.approx(blocks.primal, rel=1e-12)
    assert balanced.stationarity == pytest.approx(blocks.stationarity, rel=1e-9)


@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_penalty_of_factors(norms):
    problem = make_problem(norms=norms)
    rng = np.random.default_rng(0)
    U, V = rng.standard_normal((5, 3, 2)), rng.standard_normal((5, 2, 2))
    orders = {"l1": 1, "l2": 2, "linf": np.inf}
    left, right = np.linalg.norm(U, orders[norms[0]], axis=1), np.linalg.norm(V, orders[norms[1]], axis=1)
    found = cvxnn.certify(problem, factors=(U, V))
    assert found.penalty == pytest.approx(0.5 * ((left**2).sum() + (right**2).sum()))
    if norms in EXACT_NORMS:
        assert found.primal >= cvxnn.certify(problem, Z=U @ V.transpose(0, 2, 1)).primal * (1 - 1e-12)


def test_summary_says_what_is_proven():
    problem = make_problem()
    best = cvxnn.solve(problem, tol=1e-3)
    text = best.certificate.summary()
    assert "sampled_gates" in text
    assert "all networks with the sampled gates" in text
    assert f"{100 * best.certificate.relative_gap:.2g}%" in text
    exact = cvxnn.certify(problem.with_beta(2 * problem.beta_max), Z=0 * best.Z)
    assert exact.at_rounding
    assert "global optimum" in exact.summary()


@pytest.mark.parametrize(
    ("options", "scope"),
    [
        ({"activation": "linear"}, "linear_network"),
        ({"gates": np.eye(2)}, "given_gates"),
        ({}, "sampled_gates"),
        ({"gates": "enumerate"}, "all_gates"),
    ],
)
def test_scopes(options, scope):
    X, Y, _ = make_data(6, 2)
    problem = cvxnn.mlp_problem(X, Y, **options)
    found = cvxnn.certify(problem, Z=np.zeros(problem.operator.block_shape))
    assert found.scope == problem.scope == scope
    assert "pattern of the data" not in found.summary()


def test_enumerated_gates_are_the_open_cells_only():
    """A gate on a boundary of the arrangement can do better: the scope must not claim all patterns."""
    X, Y = np.array([[1.0], [-1.0]]), np.array([[1.0], [-1.0]])
    cells = cvxnn.solve(cvxnn.mlp_problem(X, Y, gates="enumerate", beta=0.1), tol=1e-9)
    boundary = cvxnn.solve(cvxnn.mlp_problem(X, Y, gates=np.zeros((1, 1)), beta=0.1), tol=1e-9)
    assert boundary.objective < cells.certificate.lower_bound
    assert "open cell" in cells.certificate.summary()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solver", ["admm", "fista", "frank_wolfe", "interior_point"])
@pytest.mark.parametrize("output_bias", [False, True])
def test_certificate_of_a_result_can_be_repeated(loss, solver, output_bias):
    problem = make_problem(loss, output_bias=output_bias)
    result = cvxnn.solve(problem, solver=solver, tol=1e-3, max_iter=60)
    again = cvxnn.certify(problem, Z=result.Z, intercept=result.intercept, dual=result.dual)
    assert again == result.certificate
    assert result.objective == result.certificate.primal


def test_intercepts():
    problem, without = make_problem(output_bias=True), make_problem()
    Z = random_blocks(problem)
    best = cvxnn.certify(problem, Z=Z)
    for b in ([0.0, 0.0], [1.0, -1.0], [1e6, 0.0], [1e300, 0.0]):
        found = cvxnn.certify(problem, Z=Z, intercept=b)
        assert found.primal > best.primal
        assert found.lower_bound <= best.primal
    assert cvxnn.certify(without, Z=Z, intercept=[0.0, 0.0]).primal == cvxnn.certify(without, Z=Z).primal
    with pytest.raises(InvalidInputError, match="output_bias=False"):
        cvxnn.certify(without, Z=Z, intercept=[1.0, 0.0])
    with pytest.raises(InvalidInputError, match=r"intercept has shape \(3,\); \(2,\)"):
        cvxnn.certify(problem, Z=Z, intercept=[1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of Z and factors"),
        ({"Z": 0, "factors": (0, 0)}, "exactly one of Z and factors"),
        ({"Z": np.zeros((5, 2, 3))}, r"Z has shape \(5, 2, 3\); \(5, 3, 2\) is wanted"),
        ({"Z": np.full((5, 3, 2), np.nan)}, "Z contains NaN"),
        ({"Z": "text"}, "Z cannot be read"),
        ({"factors": (np.zeros((5, 3, 2)), np.zeros((5, 2, 3)))}, "factors have shapes"),
        ({"factors": (np.zeros(5), np.zeros(5))}, "factors have shapes"),
        ({"factors": (np.full((5, 3, 1), np.inf), np.zeros((5, 2, 1)))}, "U contains"),
        ({"Z": np.zeros((5, 3, 2)), "dual": np.zeros((2, 24))}, r"dual has shape \(2, 24\); \(24, 2\) is wanted"),
        ({"Z": np.zeros((5, 3, 2)), "dual": np.full((24, 2), np.nan)}, "dual contains NaN"),
    ],
)
def test_bad_points(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        cvxnn.certify(make_problem(), **arguments)


def test_nested_lists_are_read_in_double_precision():
    problem = make_problem()
    Z = random_blocks(problem)
    assert cvxnn.certify(problem, Z=Z.tolist()) == cvxnn.certify(problem, Z=Z.numpy()) == cvxnn.certify(problem, Z=Z)
    assert problem.objective(Z.tolist()) == problem.objective(Z)


def test_weight_zero_samples_do_not_count():
    X, Y, _ = make_data()
    weights = np.r_[np.zeros(4), np.ones(20)]
    wild = Y.copy()
    wild[:4] = 1e6
    gates = np.random.default_rng(0).standard_normal((3, 5))
    full = cvxnn.mlp_problem(X, wild, gates=gates, sample_weight=weights)
    part = cvxnn.mlp_problem(X[4:], Y[4:], gates=gates)
    Z = random_blocks(full)
    dual = np.random.default_rng(1).standard_normal((24, 2))
    first, second = cvxnn.certify(full, Z=Z, dual=dual), cvxnn.certify(part, Z=Z, dual=dual[4:])
    assert first.primal == pytest.approx(second.primal, rel=1e-12)
    assert first.lower_bound == pytest.approx(second.lower_bound, rel=1e-9)


def test_bound_of_a_zero_dual_is_the_infimum():
    problem = make_problem()
    bound = dual_bound(problem, torch.zeros_like(problem.Y))
    assert bound.lower_bound == 0.0
    assert 0 <= bound.dual_norm < 1e-300
