"""Screening: no gate that an optimum uses is ever screened, whatever the point it is screened from."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cvxnn
from cvxnn.bounds import dual_bound
from cvxnn.certificates import evaluate
from cvxnn.screening import gate_sizes, inactive_gates, safe_radius
from tests.helpers import LOSSES, NORMS, make_problem, random_blocks

WEIGHTS = np.where(np.arange(24) < 4, 0.0, np.linspace(0.2, 2.0, 24))


def screened_at(problem, Z, nu):
    """Which gates are screened from a point and a dual candidate, and the bound and radius."""
    point = evaluate(problem, Z)
    bound = dual_bound(problem, problem.centred(nu))
    radius = safe_radius(problem, point, bound.lower_bound)
    return inactive_gates(problem.beta, bound, radius, gate_sizes(problem)), bound, radius


def optimum_of(problem):
    solver, limit = ("admm", 2_000) if problem.norm.has_prox else ("frank_wolfe", 20)
    return cvxnn.solve(problem, solver, tol=1e-7, max_iter=limit)


def solved_problem(loss, norms, bias, seed=0, **options):
    sides = {"d": 2, "c": 2} if "linf" in norms else {"d": 3, "c": 2}
    problem = make_problem(loss, n_gates=8, norms=norms, output_bias=bias, seed=seed, **(sides | options))
    return problem.with_beta(0.3 * problem.beta_max)


def check_screening(problem, best, seed=0):
    """Points from far to near; returns how many gates were screened in all."""
    values = problem.norm.value(best.Z)[0]
    used = values > 1e-3 * values.max()
    noise = random_blocks(problem, seed)
    count = 0
    for size in (0.0, 1e-4, 0.1):
        Z = best.Z + size * float(best.Z.abs().max()) * noise
        natural = problem.dual_candidate(evaluate(problem, Z).predictions)
        for nu in (natural, best.dual):
            inactive, _, _ = screened_at(problem, Z, nu)
            assert not bool((inactive & used).any())
            count += int(inactive.sum())
    return count


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_gate_in_use_is_screened(loss, norms, bias):
    problem = solved_problem(loss, norms, bias)
    check_screening(problem, optimum_of(problem))


@given(st.integers(0, 2**16), st.sampled_from(LOSSES), st.sampled_from([("l2", "l2"), ("l1", "l2")]), st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_no_gate_in_use_is_screened_on_random_problems(seed, loss, norms, bias):
    problem = solved_problem(loss, norms, bias, seed=seed, sample_weight=WEIGHTS)
    check_screening(problem, optimum_of(problem), seed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_dual_solution_is_in_the_ball(loss, bias):
    """The ball is around the multiple of nu that the bound is of, in the metric of the weights."""
    problem = solved_problem(loss, ("l2", "l2"), bias, sample_weight=WEIGHTS)
    best = optimum_of(problem)
    w = problem.weights
    _, near, slack = screened_at(problem, best.Z, best.dual)
    scale = (near.feasible_norms.max() / near.norms_upper.max()).clamp(max=1)
    solution = scale * best.dual
    for size in (1e-3, 0.1, 1.0):
        Z = best.Z + size * random_blocks(problem, 1)
        nu = problem.dual_candidate(evaluate(problem, Z).predictions)
        _, bound, radius = screened_at(problem, Z, nu)
        multiple = float(bound.feasible_norms.max() / bound.norms_upper.max())
        offset = (multiple * nu - solution)[w > 0] / w[w > 0].sqrt().unsqueeze(1)
        assert float(offset.norm()) <= radius + slack
        # The ball is not much larger than it must be for the gap.
        assert radius <= 1.001 * np.sqrt(
            2 * problem.loss.smoothness * (evaluate(problem, Z).primal - bound.lower_bound)
        )


def test_unused_gates_are_screened_near_the_optimum():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 4))
    y = np.maximum(X @ rng.standard_normal((4, 3)), 0) @ rng.standard_normal((3, 1))
    problem = cvxnn.mlp_problem(X, y, n_gates=60, beta=1.0, random_state=0)
    problem = problem.with_beta(0.1 * problem.beta_max)
    counts = []
    for tol in (1e-2, 1e-5, 1e-10):
        result = cvxnn.solve(problem, "admm", tol=tol)
        inactive, _, _ = screened_at(problem, result.Z, result.dual)
        assert not bool((inactive & (result.Z.abs().amax((1, 2)) > 0)).any())
        counts.append(int(inactive.sum()))
    assert counts == sorted(counts)
    unused = int((cvxnn.solve(problem, "admm", tol=1e-10).Z.abs().amax((1, 2)) == 0).sum())
    assert 0 < counts[-1] <= unused
    assert counts[-1] > 0.8 * unused


def test_a_radius_that_is_too_small_screens_gates_in_use():
    """What the tests above rest on: with a tenth of the radius they would fail."""
    problem = solved_problem("squared", ("l2", "l2"), False)
    best = optimum_of(problem)
    values = problem.norm.value(best.Z)[0]
    wrong = 0
    for seed in range(20):
        Z = best.Z + 0.3 * float(best.Z.abs().max()) * random_blocks(problem, seed)
        nu = problem.dual_candidate(evaluate(problem, Z).predictions)
        _, bound, radius = screened_at(problem, Z, nu)
        inactive = inactive_gates(problem.beta, bound, radius / 50, gate_sizes(problem))
        wrong += int((inactive & (values > 1e-3 * values.max())).sum())
    assert wrong > 0


def check_sizes(problem, seed=0):
    """Sizes against their definition, at atoms of the unit balls."""
    sizes, op = gate_sizes(problem), problem.operator.double()
    rng = np.random.default_rng(seed)
    n_gates, p, q = op.block_shape
    root = problem.weights.sqrt().unsqueeze(1)
    mean = problem.weights.unsqueeze(1) / problem.weights.sum()
    blocks = [problem.norm.atom(torch.from_numpy(rng.standard_normal((n_gates, p, q)))) for _ in range(20)]
    for u, v, _ in blocks:
        for k in range(n_gates):
            Z = torch.zeros(op.block_shape, dtype=torch.float64)
            Z[k] = torch.outer(u[k], v[k])
            predictions = op.apply(Z)
            if problem.output_bias:
                predictions = predictions - (mean * predictions).sum(0)
            assert float((root * predictions).norm()) <= sizes[k]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_sizes_bound_all_atoms(norms, bias):
    check_sizes(make_problem(norms=norms, output_bias=bias, sample_weight=WEIGHTS, c=3))


@pytest.mark.parametrize("bias", [False, True])
def test_sizes_of_images(bias):
    rng = np.random.default_rng(1)
    images = rng.standard_normal((10, 1, 6, 6))
    check_sizes(cvxnn.cnn_problem(images, rng.integers(0, 2, 10), n_gates=4, output_bias=bias))


def test_sizes_of_attention():
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((8, 3, 2))
    check_sizes(cvxnn.attention_problem(tokens, rng.standard_normal((8, 2)), n_gates=3, beta=0.1))


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_sizes_at_extreme_scales(scale):
    X = np.random.default_rng(0).standard_normal((20, 3))
    plain = cvxnn.mlp_problem(X, X[:, :1], n_gates=5, beta=0.1, output_bias=True)
    scaled = cvxnn.mlp_problem(scale * X, X[:, :1], n_gates=5, beta=0.1, output_bias=True)
    torch.testing.assert_close(gate_sizes(scaled) / scale, gate_sizes(plain))


@pytest.mark.parametrize("scale", [1e-130, 1e-90, 1.0, 1e150])
def test_sizes_of_wide_data_bound_spectral_norms(scale):
    """More features than 128 and half the gates: Frobenius norms of the active rows."""
    rng = np.random.default_rng(0)
    X = scale * rng.standard_normal((40, 150))
    problem = cvxnn.mlp_problem(X, rng.standard_normal((40, 1)), n_gates=6, beta=0.1, sample_weight=np.arange(40.0))
    sizes = gate_sizes(problem).numpy() / scale
    for k in range(problem.n_gates):
        active = X / scale * problem.patterns[:, k : k + 1].numpy() * problem.weights.sqrt().unsqueeze(1).numpy()
        assert np.linalg.norm(active, 2) <= sizes[k] <= np.linalg.norm(active) * (1 + 1e-12)
        # Squares that underflow would not do.
        assert (sizes[k] >= np.linalg.norm(active)) == (scale > 1e-100)


def test_spectral_bounds_are_tight_where_patterns_are_all_ones():
    X = np.random.default_rng(0).standard_normal((50, 4))
    problem = cvxnn.mlp_problem(X, X[:, :1], activation="linear", beta=0.1, reduction="sum")
    assert float(gate_sizes(problem)) == pytest.approx(float(np.linalg.norm(X, 2)), rel=1e-9)


@pytest.mark.parametrize("sign", [-1, 1])
def test_radius_covers_the_rounding_of_a_large_intercept(sign):
    X, Z, offset = np.array([[1.0], [2.0], [3.0]]), 0.1, 1e8 / 3
    outputs = X * Z + offset
    problem = cvxnn.mlp_problem(
        X, outputs + sign * 1e-3, activation="linear", beta=1e-6, reduction="sum", output_bias=True
    )
    point = evaluate(problem, torch.full((1, 1, 1), Z, dtype=torch.float64), intercept=[offset])
    targets = problem.Y64[:, 0].tolist()
    rows = zip(X[:, 0].tolist(), targets, strict=True)
    loss = sum((Fraction(x) * Fraction(Z) + Fraction(offset) - Fraction(y)) ** 2 for x, y in rows) / 2
    lost = loss + Fraction(problem.beta) * Fraction(Z) - Fraction(point.primal)
    assert abs(lost) > 1e-13
    assert Fraction(safe_radius(problem, point, point.primal)) ** 2 / 2 >= lost


def test_nothing_is_screened_from_factors_whose_rounding_is_not_bounded():
    problem = solved_problem("squared", ("l2", "l2"), False)
    best = optimum_of(problem)
    U, S, Vh = torch.linalg.svd(best.Z, full_matrices=False)
    point = evaluate(problem, factors=(U * S.sqrt().unsqueeze(1), Vh.mT * S.sqrt().unsqueeze(1)))
    assert safe_radius(problem, point, best.certificate.lower_bound) == np.inf
