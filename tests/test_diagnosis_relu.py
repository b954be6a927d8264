"""Diagnosis of ReLU points (19): every verdict on small problems, checked by small feasible changes of the point."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

import cvxnn
from cvxnn import curvature
from cvxnn.certificates import evaluate
from cvxnn.columns import Columns
from cvxnn.cone_curvature import face_curvature
from cvxnn.cone_stationarity import Faces, cone_residuals, neighbours
from cvxnn.cone_witness import best_step
from cvxnn.cones import cone_dual_norms
from cvxnn.errors import InvalidInputError


def relu(X, Y, beta=0.5, **options):
    return cvxnn.mlp_problem(
        X, Y, **({"activation": "relu", "gates": np.ones((X.shape[1], 1)), "beta": beta, "reduction": "sum"} | options)
    )


def regression(seed=0, n=25, d=3, c=1, **options):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    Y = np.sin(2 * X @ rng.standard_normal((d, c))) + 0.3 * rng.standard_normal((n, c))
    if options.get("loss") == "logistic":
        Y = (Y > 0).astype(float)
    return cvxnn.mlp_problem(X, Y, **({"activation": "relu", "n_gates": 15, "beta": 1e-2} | options))


@functools.cache
def undecided_by_faces():
    """The end of a descent with one column per gate, ||P_S G|| above beta."""
    problem = regression(1, c=2, d=2, n_gates=8)
    return problem, cvxnn.solve(problem, "bm_projected_gd", rank=1, tol=1e-9, max_iter=3000, random_state=1)


def placed(problem, columns, m=None):
    """Factors with m columns per gate out of a list of (gate, u, v)."""
    n_gates, p, q = problem.operator.block_shape
    m = max(sum(entry[0] == k for entry in columns) for k in range(n_gates)) if m is None else m
    U, V = (torch.zeros(n_gates, side, m, dtype=torch.float64) for side in (p, q))
    count = [0] * n_gates
    for gate, u, v in columns:
        U[gate, :, count[gate]], V[gate, :, count[gate]] = (
            torch.as_tensor(part, dtype=torch.float64) for part in (u, v)
        )
        count[gate] += 1
    return U, V


def counterexample(zeros=0, **options):
    """Section 3 of the maths: a local minimum of value 2.875, where the optimum is 1.75."""
    problem = relu(np.eye(2), np.array([[2.0], [-2.0]]), **options)
    gate = int(problem.patterns.all(0).nonzero()[0, 0])
    a = math.sqrt(0.15)
    return problem, placed(problem, [(gate, (a, 0.0), (a,))] * 10, 10 + zeros)


def value(problem, factors):
    """(19) at a feasible point."""
    point = evaluate(problem, factors=factors)
    assert point.infeasibility <= 1e-10
    return point.primal


def changed(problem, factors, size, rng, moved=None):
    """Columns at a random distance of up to `size` (relative to the largest), projected onto their cones."""
    U, V = factors
    columns = Columns.from_factors(U, V)
    largest = float(columns.sizes().max().sqrt()) or 1.0
    u, v = (
        part + size * largest * rng.uniform() * torch.from_numpy(rng.standard_normal(part.shape))
        for part in (columns.u, columns.v)
    )
    u = problem.cones.project(columns.gate, u).point
    moved = torch.ones(len(columns), dtype=torch.bool) if moved is None else moved
    u, v = torch.where(moved[:, None], u, columns.u), torch.where(moved[:, None], v, columns.v)
    return u.view(len(U), -1, U.shape[1]).mT, v.view(len(V), -1, V.shape[1]).mT


def assert_minimum(problem, factors, found, sizes=(1e-1, 1e-2, 1e-3), moved=None, tries=60):
    """No small feasible change lowers the objective by more than what is left of the slope allows."""
    rng = np.random.default_rng(0)
    before = found.certificate.primal
    for size in sizes:
        reached = min(value(problem, changed(problem, factors, size, rng, moved)) for _ in range(tries))
        assert reached >= before * (1 - 1e-6 * size) - 1e-12


def assert_way_down(problem, factors, found):
    """The direction of the curvature stays in the cones and leads down as its value says."""
    (U, V), (dU, dV) = factors, found.curvature.direction
    assert found.curvature.value < -found.curvature_threshold
    assert math.hypot(float(dU.norm()), float(dV.norm())) == pytest.approx(1)
    before, t = found.certificate.primal, 1e-3
    slope = (value(problem, (U + t * dU, V + t * dV)) - before) / t**2
    assert slope == pytest.approx(found.curvature.value / 2, rel=0.05)


def assert_witness(problem, factors, found):
    """Adding the witness has the effect that it names, and no other multiple of it a better one."""
    witness = found.witness
    assert bool(problem.cones.contains(torch.tensor([witness.gate]), witness.u[None]))
    assert float(witness.u.norm()) == pytest.approx(1) and float(witness.v.norm()) == pytest.approx(1)

    def added(step):
        root = math.sqrt(step)
        column = placed(problem, [(witness.gate, root * witness.u, root * witness.v)], 1)
        wide = [torch.cat(pair, 2) for pair in zip(factors, column, strict=True)]
        return value(problem, wide)

    gain = value(problem, factors) - added(witness.step)
    if problem.output_bias:
        # The intercept adapts to the new neuron here.
        assert gain >= witness.decrease > 0
        return
    assert gain == pytest.approx(witness.decrease, rel=1e-6)
    assert added(witness.step) <= min(added(0.9 * witness.step), added(1.1 * witness.step))


@pytest.mark.parametrize("gates", [None, "enumerate"])
def test_counterexample_is_a_local_minimum_that_is_not_global(gates):
    problem, factors = counterexample(**({} if gates is None else {"gates": gates}))
    found = cvxnn.diagnose(problem, factors, optimum=1.75)
    assert found.status == "local_minimum" and found.faces.proven
    assert found.verdict.startswith("local minimum, not global: ||G_k^T u|| is 4 beta")
    assert found.certificate.primal == pytest.approx(2.875)
    assert found.true_gap == pytest.approx((1.125 / 1.75,) * 2)
    assert found.stationary and found.residual_left < 1e-14 and found.balance < 1e-14
    witness = found.witness
    assert witness.ratio * problem.beta == pytest.approx(2)
    assert witness.u.tolist() == pytest.approx([0, 1], abs=1e-12) and witness.v.tolist() == [-1]
    assert witness.step == pytest.approx(1.5) and witness.decrease == pytest.approx(1.125) and witness.fits
    assert_witness(problem, factors, found)
    assert found.theorem_bound == pytest.approx(3) and found.theorem("Theorem 3.4").applies
    assert [entry.name for entry in found.theorems if entry.applies] == ["Theorem 3.4"]
    assert "does not carry over" in found.theorem("Theorem 3.5").reason
    assert found.faces.n_on_faces == 10 and found.faces.n_weak == 0 and found.faces.n_zero == 0
    assert found.faces.crossing is None if gates is None else found.faces.crossing < 1e-14
    used = (factors[0] != 0).any(1).reshape(-1)
    assert_minimum(problem, factors, found, moved=used)


def test_counterexample_is_a_local_minimum_of_the_true_network():
    """Neurons may cross into the next cell, where another pattern holds."""
    problem, factors = counterexample(gates="enumerate")
    found = cvxnn.diagnose(problem, factors)
    assert found.faces.n_crossings == 10 and found.faces.n_padding == 10 * (problem.n_gates - 1)
    columns = Columns.from_factors(*factors).without_zeros()
    rng = np.random.default_rng(0)
    X, Y = np.eye(2), np.array([[2.0], [-2.0]])
    lowest = math.inf
    for size in (0.2, 1e-2, 1e-3):
        for _ in range(300):
            u, v = (part.numpy() + size * rng.standard_normal(part.shape) for part in (columns.u, columns.v))
            outputs = np.maximum(X @ u.T, 0) @ v
            lowest = min(lowest, 0.5 * ((outputs - Y) ** 2).sum() + 0.25 * ((u**2).sum() + (v**2).sum()))
    assert lowest >= 2.875


@pytest.mark.parametrize("gates", [None, "enumerate"])
def test_an_eleventh_column_of_zeros_leads_down(gates):
    problem, factors = counterexample(zeros=1, **({} if gates is None else {"gates": gates}))
    found = cvxnn.diagnose(problem, factors)
    assert found.status == "saddle" and found.verdict.startswith("saddle, not a local minimum: a column of zeros")
    assert found.curvature.method == "free column" and found.curvature.value == pytest.approx(0.5 - 2)
    assert_way_down(problem, factors, found)
    assert_witness(problem, factors, found)
    as_padding = cvxnn.diagnose(problem, factors, padding=True)
    assert as_padding.status == "local_minimum" and as_padding.faces.n_zero == 0


def test_a_small_column_is_no_padding():
    problem, (U, V) = counterexample(zeros=1)
    U[0, 1, 10], V[0, 0, 10] = 1e-10, -1e-10
    found = cvxnn.diagnose(problem, (U, V), padding=True)
    assert found.stationary and found.status == "saddle" and found.faces.n_zero == 1
    assert_way_down(problem, (U, V), found)


def test_radius_of_a_minimum_is_one():
    """Changes of v within the radius never lower the objective, however far the u go in their cones."""
    problem, factors = counterexample()
    found = cvxnn.diagnose(problem, factors)
    U, V = factors
    rng = np.random.default_rng(0)
    for _ in range(300):
        far = torch.from_numpy(np.abs(rng.standard_normal(U.shape)) * 10.0 ** rng.uniform(-4, 1))
        near = V * (1 + found.faces.radius * torch.from_numpy(rng.uniform(-1, 1, V.shape)))
        assert value(problem, (far, near)) >= 2.875 - 1e-12
    # With all of the v turned round the optimum is in reach.
    assert found.faces.radius < 1
    assert value(
        problem,
        placed(problem, [(0, (math.sqrt(1.5), 0), (math.sqrt(1.5),)), (0, (0, math.sqrt(1.5)), (-math.sqrt(1.5),))]),
    ) == pytest.approx(1.75)


def rank_one(second, third=(0.0, 0.0)):
    """X = I_3, c = 2: one column along the pair of value 2, (1, 1, 0) / sqrt(2) with v = e_1; G has others."""
    q1, q2 = np.array([1, 1, 0]) / math.sqrt(2), np.array([1, -1, 0]) / math.sqrt(2)
    Y = 2 * np.outer(q1, [1, 0]) + second * np.outer(q2, [0, 1])
    Y[2] = third
    problem = relu(np.eye(3), Y, gates=np.ones((3, 1)))
    a = math.sqrt(1.5)
    return problem, placed(problem, [(0, a * q1, (a, 0.0))])


@pytest.mark.parametrize("dense", [0, 200], ids=["lanczos", "dense"])
@pytest.mark.parametrize("third", [(-3.0, 0.0), (0.0, 0.0)], ids=["face", "weak"])
def test_saddle_in_the_span_of_a_face(monkeypatch, dense, third):
    problem, factors = rank_one(3.0, third)
    if dense == 0:
        monkeypatch.setattr(curvature, "DENSE_SIZE", 3)
    found = cvxnn.diagnose(problem, factors)
    assert found.status == "saddle" and found.faces.n_weak == (third == (0.0, 0.0))
    assert found.faces.ratio == pytest.approx(6)
    assert "on the faces" in found.verdict
    assert_way_down(problem, factors, found)
    # In the span of the face the Hessian has the eigenvalue s_1 - s_2.
    assert found.curvature.value == pytest.approx(2 - 3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_saddle_across_a_row_without_a_multiplier(sign):
    """Only one of the two directions along the eigenvector is feasible; that one is given."""
    problem, factors = rank_one(0.0, (0.0, sign * 3.0))
    found = cvxnn.diagnose(problem, factors)
    assert found.status == "saddle" and found.faces.n_weak == 1
    assert found.curvature.direction[0][0, 2, 0] > 0
    assert_way_down(problem, factors, found)


def test_a_row_without_a_multiplier_does_not_hide_a_minimum():
    problem, factors = rank_one(0.25)
    found = cvxnn.diagnose(problem, factors)
    assert found.status == "global_optimum" and found.theorem("Theorem 2.1").applies
    wide = relu(np.eye(4)[:, :4], np.vstack([problem.Y.numpy(), [[-3.0, 0.0]]]), gates=np.ones((4, 1)))
    point = placed(wide, [(0, (*factors[0][0, :, 0], 0.0), factors[1][0, :, 0])])
    there = cvxnn.diagnose(wide, point)
    assert there.status == "local_minimum" and there.faces.proven and there.faces.n_weak == 1
    assert not there.witness.fits and "among wider networks" in there.verdict and "all columns" in there.advice
    assert_minimum(wide, point, there)
    assert_witness(wide, point, there)


def test_second_order_where_the_faces_do_not_decide():
    """A local minimum with one column, ||P_S G|| > beta: only the Hessian tells."""
    problem, result = undecided_by_faces()
    factors = result.factors
    found = cvxnn.diagnose(problem, result, padding=True)
    assert found.status == "local_minimum" and not found.faces.proven
    assert found.faces.ratio > 1.1 and "as far as second order tells" in found.verdict
    assert found.curvature.converged and found.curvature.value > -found.curvature_threshold
    used = (factors[0] != 0).any(1).reshape(-1)
    assert_minimum(problem, factors, found, sizes=(1e-2, 1e-3), moved=used)
    blind = cvxnn.diagnose(problem, result, padding=True, second_order=False)
    assert blind.status == "undecided" and "not looked at" in blind.verdict and blind.curvature is None
    assert cvxnn.diagnose(problem, result, padding=True, max_products=1).status == "local_minimum"


def test_lanczos_that_does_not_converge_is_admitted(monkeypatch):
    monkeypatch.setattr(curvature, "DENSE_SIZE", 0)
    problem, result = undecided_by_faces()
    found = cvxnn.diagnose(problem, result, padding=True, max_products=1)
    assert found.status == "undecided" and "Lanczos" in found.verdict


@pytest.mark.parametrize("dense", [0, 200], ids=["lanczos", "dense"])
@pytest.mark.parametrize("output_bias", [False, True])
def test_hessian_on_faces_against_the_explicit_one(monkeypatch, output_bias, dense):
    monkeypatch.setattr(curvature, "DENSE_SIZE", dense)
    problem = regression(2, c=2, d=4, loss="logistic", output_bias=output_bias)
    rng = np.random.default_rng(0)
    gate = torch.arange(problem.n_gates)
    deep = 8 * torch.from_numpy(rng.uniform(size=(len(gate), 1))) * problem.cones.interior(gate)[0]
    u = problem.cones.project(gate, deep + torch.from_numpy(rng.standard_normal((len(gate), 4)))).point
    columns = Columns(gate, u, torch.from_numpy(rng.standard_normal((len(gate), 2)))).without_zeros()
    columns = columns[columns.u.norm(dim=1) > 0.1]
    point = evaluate(problem, factors=columns.factors(problem.n_gates))
    nu = problem.loss.gradient(point.predictions, problem.Y64, problem.weights)
    faces = Faces.of(problem, cone_residuals(problem, columns, nu), nu, 1e-6).tight()
    assert len(set(faces.dimension.tolist())) > 1
    found = face_curvature(problem, point, faces, columns.gate, tolerance=1e-10, max_products=5000)

    X, bits = problem.operator.X, problem.patterns[:, columns.gate].double()
    bases = [basis[:, :k] for basis, k in zip(faces.basis, faces.dimension.tolist(), strict=True)]
    sizes = [basis.shape[1] for basis in bases]

    def along(x):
        du = torch.stack([B @ part for B, part in zip(bases, x[: sum(sizes)].split(sizes), strict=True)])
        dv = x[sum(sizes) : sum(sizes) + columns.v.numel()].view_as(columns.v)
        u, v, b = columns.u + du, columns.v + dv, point.intercept + x[-2:]
        outputs = (bits * (X @ u.T)) @ v + b
        loss = problem.loss.value(outputs, problem.Y64, problem.weights)
        return loss + problem.beta / 2 * (u.square().sum() + v.square().sum())

    n = sum(sizes) + columns.v.numel()
    H = torch.autograd.functional.hessian(along, torch.zeros(n + 2, dtype=torch.float64)).numpy()
    reduced = H[:n, :n] - H[:n, n:] @ np.linalg.pinv(H[n:, n:]) @ H[n:, :n] if output_bias else H[:n, :n]
    assert found.converged and found.value == pytest.approx(np.linalg.eigvalsh(reduced)[0], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"output_bias": True}, {"c": 2, "d": 2, "n_gates": 8}, {"loss": "huber", "n_gates": 8}], ids=str
)
def test_ends_of_projected_descent(options):
    """Every end is an optimum, or a minimum of the columns that it uses."""
    for seed in range(2):
        problem = regression(seed, **({"n_gates": 10} | options))
        result = cvxnn.solve(problem, "bm_projected_gd", rank=1, tol=1e-7, max_iter=2000, random_state=seed)
        found = cvxnn.diagnose(problem, result)
        if not found.stationary:
            assert found.status == "not_stationary" and found.theorem_bound is None
            continue
        assert found.certificate.stationarity == pytest.approx(found.stationarity, abs=1e-9)
        assert found.status in ("global_optimum", "local_minimum", "saddle")
        if found.status == "global_optimum":
            assert found.duality_gap < 1e-6 and found.faces is None and found.witness is None
            continue
        assert_witness(problem, result.factors, found)
        assert found.duality_gap <= found.theorem_bound
        if found.status == "saddle":
            assert_way_down(problem, result.factors, found)
            continue
        assert_minimum(problem, result.factors, found, sizes=(1e-3, 1e-4), tries=20)


@pytest.mark.parametrize("gates", [None, "enumerate"])
def test_optimum_of_the_convex_program_is_global(gates):
    problem = regression(3, d=2, gates=gates)
    best = cvxnn.solve(problem, "ssnal", tol=1e-9)
    found = cvxnn.diagnose(problem, best, optimum=best)
    assert found.status == "global_optimum" and found.verdict.startswith("global optimum (certified)")
    assert found.true_gap[1] <= 1e-8
    rough = cvxnn.diagnose(problem, best, tol=1e-5)
    assert rough.status == "global_optimum" and rough.theorem("Theorem 2.1").applies


def test_zero_is_a_saddle_below_beta_max():
    problem = regression()
    U, V = placed(problem, [], 2)
    low, high = problem.with_beta(problem.beta_max / 3), problem.with_beta(problem.beta_max * 1.001)
    found = cvxnn.diagnose(low, (U, V))
    assert found.status == "saddle" and found.curvature.value == pytest.approx(-2 * low.beta, rel=1e-6)
    assert_way_down(low, (U, V), found)
    assert_witness(low, (U, V), found)
    above = cvxnn.diagnose(high, (U, V))
    assert above.status == "global_optimum"
    as_padding = cvxnn.diagnose(low, (U, V), padding=True)
    assert as_padding.status == "local_minimum" and as_padding.faces.n_padding == 2 * low.n_gates


def test_a_neuron_that_would_cross_is_not_stationary_as_a_network():
    """Y = (2, 2), u = (a, 0) in the cell with the pattern (1, 0): stationary there, and not in (1, 1)."""
    problem = relu(np.eye(2), np.array([[2.0], [2.0]]), gates="enumerate")
    gate = next(k for k in range(problem.n_gates) if problem.patterns[:, k].tolist() == [True, False])
    a = math.sqrt(1.5)
    factors = placed(problem, [(gate, (a, 0.0), (a,))])
    found = cvxnn.diagnose(problem, factors)
    assert found.stationary and found.faces.crossing > 0.1
    assert found.status == "not_stationary" and "boundary of two cells" in found.verdict
    step = torch.tensor([[[0.0], [1e-3]]]) + factors[0][gate]
    there = evaluate(
        problem, factors=(torch.where(torch.arange(problem.n_gates)[:, None, None] == gate, step, 0.0), factors[1])
    )
    assert there.primal < found.certificate.primal
    alone = relu(np.eye(2), np.array([[2.0], [2.0]]), gates=problem.gates[:, [gate]].numpy())
    inside = cvxnn.diagnose(alone, tuple(part[[gate]] for part in factors))
    assert (
        inside.status in ("global_optimum", "local_minimum") and inside.faces is None
    ) or inside.faces.crossing is None


def test_neighbours_are_the_cells_that_have_the_neuron():
    problem = regression(4, n=9, d=2, gates="enumerate")
    rows = problem.cones.rows
    normal = torch.stack([-rows[:, 1], rows[:, 0]], 1)
    gate = torch.tensor(
        [
            int(problem.cones.contains(torch.arange(problem.n_gates), row.expand(problem.n_gates, 2)).nonzero()[0])
            for row in normal
        ]
    )
    columns = Columns(gate, normal, torch.ones(len(normal), 1).double())
    found = neighbours(problem.cones, columns)
    every = torch.arange(problem.n_gates)
    having = sum(int(problem.cones.contains(every, row.expand(len(every), 2)).sum()) for row in normal)
    assert len(found) == having - len(normal) > 5
    assert bool(problem.cones.contains(found.gate, found.u).all())
    own = {(k, *u) for k, u in zip(gate.tolist(), normal.tolist(), strict=True)}
    pairs = {(k, *u) for k, u in zip(found.gate.tolist(), found.u.tolist(), strict=True)}
    assert len(pairs) == len(found) and not own & pairs
    deep = problem.cones.interior(gate)[0]
    assert len(neighbours(problem.cones, Columns(gate, deep, columns.v))) == 0


def test_infeasible_points_are_named():
    problem, (U, V) = counterexample()
    U = U.clone()
    U[0, 1] = -1e-3
    found = cvxnn.diagnose(problem, (U, V))
    assert found.status == "infeasible" and "leave their cones by 2.6e-03" in found.verdict
    assert not found.stationary and found.stationarity == math.inf and found.theorem_bound is None
    assert found.faces is None and found.witness is None and found.curvature is None
    assert not any(entry.applies for entry in found.theorems)


def test_columns_without_an_effect_are_not_stationary():
    """u = (0, 1) with v = 0, and a column of a wrong size."""
    problem, (U, V) = counterexample(zeros=1)
    U[0, 1, 10] = 0.1
    found = cvxnn.diagnose(problem, (U, V))
    assert found.status == "not_stationary" and found.residual_left > 0.01
    assert found.witness is not None and found.theorem_bound is None
    V[0, 0, :10] *= 1.1
    assert cvxnn.diagnose(problem, (U, V)).balance > 0.01


def test_residuals_are_those_of_the_multipliers():
    """(72) and (69) from their definitions, with non-negative least squares for the multipliers."""
    problem = regression(5, c=2)
    result = cvxnn.solve(problem, "bm_projected_gd", rank=2, tol=1e-9, max_iter=5, random_state=0)
    U, V = result.factors
    found = cvxnn.diagnose(problem, result)
    X, bits = problem.operator.X.numpy(), problem.patterns.numpy()
    columns = Columns.from_factors(U, V)
    outputs = sum(np.outer(np.maximum(X @ u, 0), v) for u, v in zip(columns.u.numpy(), columns.v.numpy(), strict=True))
    nu = (outputs - problem.Y.numpy()) / len(X)
    left = right = 0.0
    for k, u, v in zip(columns.gate.tolist(), columns.u.numpy(), columns.v.numpy(), strict=True):
        G, K = X.T @ (bits[:, [k]] * nu), (2 * bits[:, [k]] - 1) * X
        z = -G @ v / problem.beta
        left += ((u - z - K.T @ nnls(K.T, -z)[0]) ** 2).sum()
        right += ((v + G.T @ u / problem.beta) ** 2).sum()
    size = math.sqrt(float(U.square().sum() + V.square().sum()))
    assert found.residual_left == pytest.approx(math.sqrt(left) / size, rel=1e-6)
    assert found.residual_right == pytest.approx(math.sqrt(right) / size, rel=1e-9)
    by_gate = [math.hypot(gate.residual_left, gate.residual_right) for gate in found.gates]
    assert math.hypot(*by_gate) == pytest.approx(math.hypot(found.residual_left, found.residual_right))


def test_gate_ratios_are_exact_in_every_gate():
    problem = regression(6)
    factors = placed(problem, [(0, problem.cones.interior(torch.tensor([0]))[0][0], (0.3,))])
    found = cvxnn.diagnose(problem, factors)
    nu = problem.loss.gradient(evaluate(problem, factors=factors).predictions, problem.Y64, problem.weights)
    gates = torch.arange(problem.n_gates)
    exact = cone_dual_norms(problem.cones, gates, problem.operator.adjoint(nu)).lower / problem.beta
    assert [gate.dual_norm_ratio for gate in found.gates] == pytest.approx(exact.tolist(), rel=1e-8)


def test_duplicate_and_opposite_rows():
    """Multipliers are not unique there; the face counts, not the row that has them."""
    X = np.array([[1.0, 0], [0, 1], [0, 2], [0, 1], [0, 0]])
    Y = np.array([[2.0], [-2], [-2], [-2], [1]])
    problem = relu(X, Y)
    a = math.sqrt(1.5)
    factors = placed(problem, [(0, (a, 0.0), (a,))])
    found = cvxnn.diagnose(problem, factors)
    assert found.status == "local_minimum" and found.faces.proven and found.faces.n_weak == 0
    assert_minimum(problem, factors, found)
    line = relu(np.array([[1.0, 0], [0, 1], [0, -1]]), np.array([[2.0], [-2], [1]]), gates=np.array([[1.0], [0.0]]))
    flat = cvxnn.diagnose(line, factors)
    assert flat.status in ("global_optimum", "local_minimum") and flat.stationary


def test_very_many_gates():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 3))
    problem = cvxnn.mlp_problem(
        X, rng.standard_normal(40), activation="relu", gates=rng.standard_normal((3, 10_001)), beta=1e-2
    )
    U, V = placed(problem, [(3, problem.cones.interior(torch.tensor([3]))[0][0], (0.1,))], 2)
    found = cvxnn.diagnose(problem, (U, V))
    assert found.certificate.gate_ratios == () and len(found.gates) < 300
    assert 3 in [gate.gate for gate in found.gates] and found.status == "not_stationary"
    zero = cvxnn.diagnose(problem, (0 * U, 0 * V))
    assert zero.status == "saddle"
    assert max(gate.dual_norm_ratio for gate in zero.gates) == pytest.approx(zero.certificate.dual_norm_ratio, rel=1e-6)
    assert all(k in [gate.gate for gate in zero.gates] for k in zero.theorem("Theorem 2.1").failing_gates)
    assert len(str(zero).splitlines()) <= 48


def test_table_and_json():
    problem, factors = counterexample(gates="enumerate")
    for point in (factors, counterexample(zeros=1)[1]):
        asked = problem if len(point[0]) == problem.n_gates else counterexample()[0]
        found = cvxnn.diagnose(asked, point, optimum=1.75)
        fields = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert fields["witness"]["v"] == [-1.0] and fields["faces"]["n_columns"] == 10
        assert fields["faces"]["proven"] == (found.status == "local_minimum")
        lines = str(found).splitlines()
        assert lines[0] == found.verdict and len(lines) <= 45
        assert any(line.startswith("witness ") and "1.125" in line for line in lines)
        assert any("(72)" in line for line in lines) and not any("(68)" in line for line in lines)
    broken = cvxnn.diagnose(counterexample()[0], tuple(1e200 * part for part in counterexample()[1]))
    assert broken.status == "not_stationary"
    json.dumps(broken.to_dict(), allow_nan=False)
    str(broken)


def test_best_step_of_other_losses():
    rng = np.random.default_rng(0)
    for loss in ("squared", "huber", "cross_entropy", "logistic"):
        Y = np.eye(2)[rng.integers(0, 2, 12)] if loss in ("cross_entropy", "logistic") else rng.standard_normal((12, 2))
        problem = cvxnn.mlp_problem(rng.standard_normal((12, 2)), Y, activation="relu", loss=loss, n_gates=3, beta=1e-3)
        predictions = torch.zeros(12, 2, dtype=torch.float64)
        direction = -problem.loss.gradient(predictions, problem.Y64, problem.weights)

        def along(t, problem=problem, direction=direction):
            return float(problem.loss.value(t * direction, problem.Y64, problem.weights)) + problem.beta * t

        step = best_step(problem, predictions, direction)
        assert step > 0 and along(step) <= min(along(0.99 * step), along(1.01 * step), along(0.0))


def test_padding_is_for_relu():
    problem = cvxnn.mlp_problem(np.eye(2), [[1.0], [2.0]], gates=np.ones((2, 1)))
    with pytest.raises(InvalidInputError, match="padding"):
        cvxnn.diagnose(problem, (torch.zeros(1, 2, 1), torch.zeros(1, 1, 1)), padding=True)
    with pytest.raises(InvalidInputError, match="padding"):
        cvxnn.diagnose(*counterexample(), padding=3)
