"""Diagnosis of factors: curvature against explicit Hessians, theorems with all that they ask for, tables."""

import json
import math

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn import curvature
from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.theorems import PointFacts, theorems
from tests.helpers import LOSSES, make_data, make_problem

GLOBAL = ("Theorem 2.1", "Theorem 3.3, rank-deficient", "Theorem 3.5", "beyond: gate by gate")
THRESHOLDS = ("Theorem 3.3, m >= d_c + d_r", "beyond: m >= min(d_c, d_r)")


def random_factors(problem, m, seed=0, scale=0.5):
    n_gates, p, q = problem.operator.block_shape
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(scale * rng.standard_normal((n_gates, side, m))) for side in (p, q))


def objective(problem, U, V, b):
    """(14) from its definition, for automatic differentiation."""
    X, bits = problem.operator.data_tensors()[0].double(), problem.patterns.double()
    outputs = torch.einsum("np,nd,pdm,pcm->nc", bits, X, U, V) + b
    loss = problem.loss.value(outputs, problem.Y64, problem.weights)
    return loss + problem.beta / 2 * (U.square().sum() + V.square().sum())


def explicit_hessian(problem, U, V, b):
    """The Hessian in (U, V), b minimised out where the problem has it, and the gradient in all variables."""
    sizes = [U.numel(), V.numel(), b.numel()]

    def value(x):
        u, v, offset = x.split(sizes)
        return objective(problem, u.view(U.shape), v.view(V.shape), offset)

    x = torch.cat([U.reshape(-1), V.reshape(-1), b])
    H = torch.autograd.functional.hessian(value, x).numpy()
    gradient = torch.autograd.functional.jacobian(value, x).numpy()
    n = sum(sizes[:2])
    if problem.output_bias:
        return H[:n, :n] - H[:n, n:] @ np.linalg.pinv(H[n:, n:], rcond=1e-10) @ H[n:, :n], gradient
    return H[:n, :n], gradient[:n]


def best_intercept(problem, U, V):
    return problem.best_intercept(problem.operator.double().apply_factors(U, V))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("dense", [0, 10_000], ids=["lanczos", "dense"])
def test_curvature_against_the_explicit_hessian(monkeypatch, loss, output_bias, dense):
    monkeypatch.setattr(curvature, "DENSE_SIZE", dense)
    problem = make_problem(loss, n_gates=4, output_bias=output_bias, beta=0.1)
    for m, zero, scale in [(1, False, 0.3), (2, False, 1.0), (3, True, 0.5), (7, False, 0.3)]:
        U, V = random_factors(problem, m, scale=scale)
        if zero:
            U[1, :, 2] = V[1, :, 2] = 0
            U[2] = V[2] = 0
        b = best_intercept(problem, U, V)
        H, gradient = explicit_hessian(problem, U, V, b)
        values = np.linalg.eigvalsh(H)
        found = cvxnn.diagnose(problem, (U, V), intercept=b if output_bias else None, curvature_tol=1e-8)
        assert found.curvature.converged
        assert found.curvature.value == pytest.approx(values[0], rel=1e-5, abs=1e-9)
        assert found.curvature.residual <= 1e-3 * abs(values[0]) + 1e-8
        x = torch.cat([part.reshape(-1) for part in found.curvature.direction]).numpy()
        assert np.linalg.norm(x) == pytest.approx(1)
        assert x @ H @ x == pytest.approx(found.curvature.value, rel=1e-9, abs=1e-12)
        size = problem.beta * math.sqrt(float(U.square().sum() + V.square().sum()))
        left, right = gradient[: U.numel()], gradient[U.numel() : U.numel() + V.numel()]
        assert found.residual_left == pytest.approx(np.linalg.norm(left) / size, rel=1e-9)
        assert found.residual_right == pytest.approx(np.linalg.norm(right) / size, rel=1e-9)
        by_gate = [math.hypot(gate.residual_left, gate.residual_right) for gate in found.gates]
        assert math.hypot(*by_gate) == pytest.approx(math.hypot(found.residual_left, found.residual_right))
        assert (found.residual_intercept is not None) == output_bias
        assert found.status == "not_stationary"


def test_eigenvector_is_found_in_its_gate():
    problem = make_problem(n_gates=5, beta=1e-2)
    U, V = random_factors(problem, 2)
    H, _ = explicit_hessian(problem, U, V, torch.zeros(2, dtype=torch.float64))
    x = np.linalg.eigh(H)[1][:, 0]
    u, v = x[: U.numel()].reshape(U.shape), x[U.numel() :].reshape(V.shape)
    shares = (u**2).sum((1, 2)) + (v**2).sum((1, 2))
    found = cvxnn.diagnose(problem, (U, V)).curvature
    assert (found.gate, found.share) == (shares.argmax(), pytest.approx(shares.max(), rel=1e-4))


def test_too_few_products_are_admitted(monkeypatch):
    monkeypatch.setattr(curvature, "DENSE_SIZE", 0)
    problem = make_problem(n_gates=8, d=8, beta=1e-3)
    U, V = random_factors(problem, 3)
    enough = cvxnn.diagnose(problem, (U, V))
    few = cvxnn.diagnose(problem, (U, V), max_products=20)
    assert enough.curvature.converged and not few.curvature.converged
    assert few.curvature.value >= enough.curvature.value
    assert few.curvature.n_products < enough.curvature.n_products
    x = torch.cat([part.reshape(-1) for part in few.curvature.direction]).numpy()
    H, _ = explicit_hessian(problem, U, V, torch.zeros(2, dtype=torch.float64))
    assert x @ H @ x == pytest.approx(few.curvature.value, rel=1e-9)
    assert "Lanczos did not converge" in str(few)


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_is_a_saddle_below_beta_max(loss, output_bias):
    problem = make_problem(loss, output_bias=output_bias)
    problem = problem.with_beta(problem.beta_max / 3)
    n_gates, p, q = problem.operator.block_shape
    U, V = torch.zeros(n_gates, p, 2), torch.zeros(n_gates, q, 2)
    found = cvxnn.diagnose(problem, (U, V))
    assert found.stationary and found.status == "saddle"
    ratios = found.certificate.gate_ratios
    worst = int(np.argmax(ratios))
    assert found.curvature.value == pytest.approx(problem.beta * (1 - ratios[worst]), rel=1e-9)
    assert found.curvature.gate == worst and found.curvature.residual < 1e-12
    for gate, ratio in zip(found.gates, ratios, strict=True):
        assert gate.curvature_bound == pytest.approx(problem.beta * (1 - ratio), rel=1e-9, abs=1e-12)
    above = cvxnn.diagnose(problem.with_beta(problem.beta_max * 1.01), (U, V))
    assert above.status == "global_optimum" and above.theorem("Theorem 2.1").applies


def with_free_column(problem, seed=0):
    """A stationary point of rank 1, with a second column of zeros."""
    result = cvxnn.solve(problem, "bm_lbfgs", rank=1, tol=0, max_iter=3000, random_state=seed)
    U, V = result.factors
    return torch.cat([U, torch.zeros_like(U)], 2), torch.cat([V, torch.zeros_like(V)], 2)


def spurious_problem():
    """A linear network in which one column is far too few."""
    X, _, _ = make_data(30, 4)
    rng = np.random.default_rng(1)
    return cvxnn.mlp_problem(X, X @ rng.standard_normal((4, 3)), activation="linear", beta=1e-2)


def test_a_free_column_makes_a_saddle_of_a_local_minimum():
    problem = spurious_problem()
    U, V = with_free_column(problem)
    minimum = cvxnn.diagnose(problem, (U[:, :, :1], V[:, :, :1]))
    assert minimum.status == "local_minimum" and minimum.curvature.converged
    assert minimum.verdict.startswith("no negative curvature found: a local minimum as far as second order tells")
    assert not any(minimum.theorem(name).applies for name in (*GLOBAL, *THRESHOLDS))
    assert "all in use" in minimum.advice
    found = cvxnn.diagnose(problem, (U, V))
    assert found.status == "saddle"
    q = found.certificate.dual_norm_ratio * problem.beta
    assert found.curvature.value == pytest.approx(problem.beta - q, rel=1e-9)
    digits = f"{found.curvature.value:.1e}"
    mantissa, exponent = digits.split("e")
    assert found.verdict == f"saddle, not a local minimum: smallest eigenvalue {mantissa}e{int(exponent)} in gate 0"
    assert not any(found.theorem(name).applies for name in GLOBAL)
    assert "saddle" in found.theorem("Theorem 3.3, rank-deficient").reason
    assert "free column" in found.advice


def test_the_objective_falls_along_negative_curvature():
    problem = make_problem("cross_entropy", output_bias=True, beta=5e-3)
    U, V = with_free_column(problem, seed=1)
    U[1:], V[1:] = 0, 0
    found = cvxnn.diagnose(problem, (U, V))
    assert found.curvature.value < 0
    before = found.certificate.primal
    dU, dV = found.curvature.direction
    after = [cvxnn.certify(problem, factors=(U + t * dU, V + t * dV)).primal for t in (-1e-3, 1e-3)]
    assert min(after) < before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_optimum_of_the_convex_program_is_certified(loss, dtype):
    problem = make_problem(loss, output_bias=loss == "squared", dtype=dtype)
    best = cvxnn.solve(make_problem(loss, output_bias=loss == "squared"), "admm", tol=1e-10)
    target = make_problem(loss, output_bias=loss == "squared") if dtype == "float64" else problem
    columns = Columns.from_blocks(best.Z).compressed(problem.n_gates, tolerance=1e-9)
    factors = columns.factors(problem.n_gates)
    found = cvxnn.diagnose(target, factors, intercept=best.intercept, dual=best.dual, tol=1e-5)
    assert found.status == "global_optimum"
    assert found.verdict.startswith("global optimum (certified)")
    assert found.balance < 1e-12
    assert found.duality_gap <= 1e-5


def test_stationary_points_are_never_further_from_the_optimum_than_theorem_34_says():
    X, Y, _ = make_data(24, 3, 3)
    problem = cvxnn.mlp_problem(X, Y, n_gates=3, beta=2e-3, random_state=0)
    best = cvxnn.solve(problem, "admm", tol=1e-9)
    seen = set()
    for seed in range(5):
        result = cvxnn.solve(problem, "bm_lbfgs", rank=1, tol=1e-9, max_iter=4000, random_state=seed)
        found = cvxnn.diagnose(problem, result, optimum=best)
        low, high = found.true_gap
        assert 0 <= low <= high and high - low < 1e-6
        assert low <= found.duality_gap * (1 + 1e-9) + 1e-12
        assert found.certificate.primal == pytest.approx(result.objective, rel=1e-12)
        if found.stationary:
            seen.add(found.status)
            assert found.theorem("Theorem 3.4").applies
            assert found.duality_gap <= found.theorem_bound + 1e-9
            assert high <= found.theorem_bound + 1e-6
        else:
            assert found.theorem_bound is None
    assert "local_minimum" in seen


def test_one_gate_at_full_rank_is_not_enough():
    """The first gate alone solved to the optimum, the others zero: Theorem 3.5 holds in gate 0 only."""
    X, Y, _ = make_data(40, 2, 2, seed=3)
    problem = cvxnn.mlp_problem(X, Y, n_gates=6, beta=1e-3, random_state=0)
    alone = cvxnn.mlp_problem(X, Y, gates=problem.gates[:, :1], beta=1e-3)
    best = cvxnn.solve(alone, "admm", tol=1e-13, max_iter=5000)
    U, V = (torch.zeros(problem.n_gates, 2, 2, dtype=torch.float64) for _ in range(2))
    u, v = Columns.from_blocks(best.Z).factors(1)
    assert u.shape[2] == 2
    U[0], V[0] = u[0], v[0]
    found = cvxnn.diagnose(problem, (U, V), tol=1e-5)
    assert found.stationary and found.gates[0].rank == 2
    assert found.gates[0].dual_norm_ratio == pytest.approx(1, abs=1e-4)
    assert found.certificate.dual_norm_ratio > 2
    full = found.theorem("Theorem 3.5")
    assert not full.applies and not full.holds_everywhere
    assert full.failing_gates == tuple(range(1, problem.n_gates))
    assert found.status == "saddle" and found.curvature.gate != 0
    assert found.theorem("beyond: m >= min(d_c, d_r)").applies
    only = cvxnn.diagnose(alone, (u, v), tol=1e-5)
    assert only.status == "global_optimum" and only.theorem("Theorem 3.5").applies


def test_full_rank_in_every_gate_is_global():
    problem = spurious_problem()
    best = cvxnn.solve(problem, "bm_lbfgs", rank=3, tol=0, max_iter=3000, random_state=0)
    found = cvxnn.diagnose(problem, best)
    assert found.theorem("Theorem 3.5").applies and found.gates[0].rank == 3
    assert found.theorem("beyond: gate by gate").applies
    assert not found.theorem("Theorem 3.3, rank-deficient").applies
    assert found.status == "global_optimum" and found.certificate.relative_gap < 1e-5
    wide = tuple(torch.cat([part, torch.zeros(1, part.shape[1], 5)], 2) for part in best.factors)
    padded = cvxnn.diagnose(problem, wide)
    assert all(padded.theorem(name).applies for name in THRESHOLDS)
    assert padded.theorem("Theorem 3.3, rank-deficient").applies
    assert padded.theorem("Theorem 3.5").applies and padded.status == "global_optimum"


def counterexample(**options):
    """Section 3 of the maths: a local minimum of the ReLU network of value 2.875, where the optimum is 1.75."""
    X, Y, a = np.eye(2), np.array([[2.0], [-2.0]]), math.sqrt(0.15)
    problem = cvxnn.mlp_problem(X, Y, gates=np.ones((2, 1)), beta=0.5, reduction="sum", **options)
    U, V = torch.zeros(1, 2, 10, dtype=torch.float64), torch.full((1, 1, 10), a, dtype=torch.float64)
    U[0, 0] = a
    return problem, (U, V)


def test_counterexample_is_not_stationary_for_gates():
    problem, factors = counterexample()
    found = cvxnn.diagnose(problem, factors)
    assert found.certificate.primal == pytest.approx(2.875)
    assert found.certificate.dual_norm_ratio * 0.5 == pytest.approx(math.hypot(0.5, 2))
    assert found.residual_left > 0.1 and found.status == "not_stationary"
    assert all(found.theorem(name).applies for name in THRESHOLDS)
    assert not any(found.theorem(name).applies for name in (*GLOBAL, "Theorem 3.4"))


def test_more_gates_than_a_certificate_lists():
    """Certificates leave the ratios of more than 10,000 gates out."""
    rng = np.random.default_rng(0)
    problem = cvxnn.mlp_problem(
        rng.standard_normal((6, 2)), rng.standard_normal(6), gates=rng.standard_normal((2, 10_001))
    )
    n_gates, p, q = problem.operator.block_shape
    found = cvxnn.diagnose(problem, (torch.zeros(n_gates, p, 1), torch.zeros(n_gates, q, 1)), second_order=False)
    assert found.certificate.gate_ratios == () and len(found.gates) == n_gates
    worst = max(gate.dual_norm_ratio for gate in found.gates)
    assert worst == pytest.approx(found.certificate.dual_norm_ratio, rel=1e-9)


@pytest.mark.parametrize("norms", [("l1", "l2"), ("l2", "l1"), ("linf", "l2")], ids="-".join)
def test_theorems_of_l2_norms_are_not_applied_to_others(norms):
    problem = make_problem(norms=norms, beta=1e-2)
    found = cvxnn.diagnose(problem, random_factors(problem, 5))
    assert found.curvature is None and found.residual_left is None and found.unavailable
    assert not any(found.theorem(name).applies for name in (*GLOBAL, *THRESHOLDS))
    assert found.gates[0].curvature_bound is None
    zero = cvxnn.diagnose(problem, [0 * part for part in random_factors(problem, 5)])
    assert zero.status == "undecided" and zero.theorem("Theorem 3.4").applies
    assert not any(zero.theorem(name).applies for name in (*GLOBAL, *THRESHOLDS))
    best = cvxnn.solve(problem, "frank_wolfe", tol=1e-3, max_iter=500)
    assert zero.theorem_bound >= zero.certificate.primal / best.objective - 1
    assert len(str(zero).splitlines()) <= 40


def test_balance_is_that_of_the_factors_given():
    problem = make_problem()
    U, V = random_factors(problem, 2)
    found = cvxnn.diagnose(problem, (2 * U, V / 2), second_order=False)
    difference = 4 * U.mT @ U - V.mT @ V / 4
    sizes = torch.maximum(4 * U.square().sum((1, 2)), V.square().sum((1, 2)) / 4)
    norms = torch.linalg.matrix_norm(difference)
    assert [gate.balance for gate in found.gates] == pytest.approx((norms / sizes).tolist())
    assert found.balance == pytest.approx(float(norms.max() / sizes.max()))
    assert found.curvature is None and found.unavailable


def test_optimum_as_a_number_a_result_and_a_certificate():
    problem = make_problem()
    best = cvxnn.solve(problem, tol=1e-3)
    factors = random_factors(problem, 2)
    number = cvxnn.diagnose(problem, factors, optimum=best.objective, second_order=False)
    primal = number.certificate.primal
    assert number.true_gap == pytest.approx((primal / best.objective - 1,) * 2)
    for known in (best, best.certificate):
        low, high = cvxnn.diagnose(problem, factors, optimum=known, second_order=False).true_gap
        assert low == number.true_gap[0] and high == pytest.approx(primal / best.certificate.lower_bound - 1)
    for wrong in ("best", float("nan"), -1.0, 2 * primal, cvxnn.solve(problem.with_beta(1.0)), [1.0, 2.0]):
        with pytest.raises(InvalidInputError, match="optimum"):
            cvxnn.diagnose(problem, factors, optimum=wrong)


def test_wrong_input():
    problem = make_problem()
    U, V = random_factors(problem, 2)
    with pytest.raises(InvalidInputError, match="'admm' has no factors"):
        cvxnn.diagnose(problem, factors=cvxnn.solve(problem, "admm"))
    for factors in (None, U, (U, V[:, :1]), (U[:, :, :0], V[:, :, :0]), (U * math.nan, V)):
        with pytest.raises(InvalidInputError, match=r"factors|U|columns"):
            cvxnn.diagnose(problem, factors)
    with pytest.raises(InvalidInputError, match="problem is a str"):
        cvxnn.diagnose("problem", (U, V))
    for name, value in {"tol": 0, "curvature_tol": -1.0, "max_products": 0, "second_order": 2}.items():
        with pytest.raises(InvalidInputError, match=name):
            cvxnn.diagnose(problem, (U, V), **{name: value})


@pytest.mark.parametrize(
    "options",
    [{"c": 1}, {"activation": "linear", "n_gates": 1}, {"hidden_bias": True, "dtype": "float32"}, {"d": 1}],
    ids=str,
)
def test_small_problems_of_every_shape(options):
    problem = make_problem(**options)
    for m in (1, 2, 6):
        U, V = random_factors(problem, m)
        found = cvxnn.diagnose(problem, (U, V))
        H, _ = explicit_hessian(problem, U, V, torch.zeros(problem.Y.shape[1], dtype=torch.float64))
        assert found.curvature.value == pytest.approx(np.linalg.eigvalsh(H)[0], rel=1e-5, abs=1e-9)


def test_one_sample():
    problem = cvxnn.mlp_problem([[1.0, 2.0]], [[3.0]], gates=np.ones((2, 1)), beta=0.1)
    U, V = random_factors(problem, 3)
    found = cvxnn.diagnose(problem, (U, V))
    H, _ = explicit_hessian(problem, U, V, torch.zeros(1, dtype=torch.float64))
    assert found.curvature.value == pytest.approx(np.linalg.eigvalsh(H)[0], rel=1e-5, abs=1e-9)
    size, direction = 3 - 0.1 / math.sqrt(5), torch.tensor([1.0, 2.0], dtype=torch.float64) / math.sqrt(5)
    root = math.sqrt(size / math.sqrt(5))
    best = (root * direction.view(1, 2, 1), torch.full((1, 1, 1), root, dtype=torch.float64))
    optimal = cvxnn.diagnose(problem, best)
    assert optimal.status == "global_optimum" and optimal.theorem("Theorem 3.5").applies


def test_json_and_table():
    problem = make_problem(n=60, n_gates=40, beta=1e-2)
    U, V = random_factors(problem, 2)
    V[3] = 0
    found = cvxnn.diagnose(problem, (U, V))
    fields = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert fields["status"] == found.status and fields["thresholds"] == {"min(d_c, d_r)": 2, "d_c + d_r": 5}
    assert len(fields["gates"]) == problem.n_gates and fields["gates"][3]["rank_right"] == 0
    assert fields["curvature"]["value"] == found.curvature.value
    assert {entry["name"] for entry in fields["theorems"]} >= {*GLOBAL, *THRESHOLDS, "Theorem 3.4"}
    lines = str(found).splitlines()
    assert lines[0] == found.verdict and len(lines) <= 40
    start = next(i for i, line in enumerate(lines) if line.startswith("gate  "))
    assert len({len(line) for line in lines[start : start + 9]}) == 1
    first = next(i for i, line in enumerate(lines) if line.startswith("theorem "))
    column = lines[first].index("applies")
    assert all(
        line[column - 1] == " " and line[column : column + 2] in ("no", "ye") for line in lines[first + 1 : first + 8]
    )
    assert lines[-1].startswith(f"the worst 8 of {problem.n_gates} gates")


def test_infinite_objectives_are_survived():
    problem = make_problem()
    U, V = random_factors(problem, 2, scale=1e90)
    found = cvxnn.diagnose(problem, (U, V))
    assert found.status == "not_stationary" and found.theorem_bound is None
    json.dumps(found.to_dict(), allow_nan=False)
    str(found)


def test_ranks_that_contradict_the_gradient_are_not_believed():
    facts = {"activation": "linear", "norm": "nuclear", "m": 2, "d_c": 3, "d_r": 2, "ranks_left": [2]}
    facts |= {
        "ranks_right": [2],
        "ranks": [2],
        "stationary": True,
        "not_minimum": "",
        "theorem_bound": 0.5,
        "tol": 1e-6,
    }
    for ratio, believed in [(1 + 1e-7, True), (1.5, False)]:
        entries = {entry.name: entry for entry in theorems(PointFacts(ratios=[ratio], **facts))}
        assert entries["Theorem 3.5"].applies == entries["beyond: gate by gate"].applies == believed
    assert "contradicts" in entries["Theorem 3.5"].reason and entries["Theorem 3.5"].holds_everywhere
