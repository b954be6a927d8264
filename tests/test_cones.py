"""The cones of ReLU networks: projection, membership, interior points, repair, decomposition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from cvxnn.cones import FEASIBILITY, Cones, decompose, decomposition, projection
from cvxnn.errors import InvalidInputError

KINDS = ("gaussian", "integers", "duplicates", "nearly equal", "opposite", "low rank", "one direction", "zero rows")


def make(kind, seed, r=12):
    """Cones of r gates of random size, and their gate indices."""
    rng = np.random.default_rng(seed)
    d, n = int(rng.integers(1, 7)), int(rng.integers(1, 41))
    X = rng.standard_normal((n, d))
    if kind == "integers":
        X = rng.integers(-1, 2, (n, d)).astype(float)
    elif kind == "duplicates":
        X = np.vstack([X, X[: n // 2], 3.7 * X[: n // 3]])
    elif kind == "nearly equal":
        X = np.vstack([X, X + 10.0 ** rng.integers(-13, -6) * rng.standard_normal(X.shape)])
    elif kind == "opposite":
        X = np.vstack([X, -X[: max(1, n // 4)]])
    elif kind == "low rank":
        X = rng.standard_normal((n, 2)) @ rng.standard_normal((2, d))
    elif kind == "one direction":
        X = rng.standard_normal((n, 1)) * rng.standard_normal(d) + 1e-6 * X
    elif kind == "zero rows":
        X[::2] = 0.0
    gates = rng.standard_normal((d, r))
    patterns = rng.random((len(X), r)) < 0.5 if kind in ("integers", "opposite") else X @ gates >= 0
    return Cones(torch.tensor(X), torch.tensor(patterns), torch.tensor(gates)), torch.arange(r)


def points(cones, seed, r=12):
    """Random z, among them gates, points deep in the polar cone, and points on faces."""
    rng = np.random.default_rng(seed)
    gate, z = torch.arange(r), torch.tensor(rng.standard_normal((r, cones.n_features)))
    z[0], z[1] = cones.gates[:, 0], -cones.gates[:, 1]
    if len(cones.rows):
        z[2:4] = -(cones.signs(gate[2:4])[:, :, None] * cones.rows).sum(1)
    z[4:6] = cones.project(gate[4:6], z[4:6]).point
    return z


def matrix(cones, k):
    return (cones.signs(torch.tensor([k]))[0][:, None] * cones.rows).numpy()


def assert_optimal(cones, gate, z, found):
    """The conditions of Karush, Kuhn and Tucker, with multipliers taken from `found` and nothing else."""
    size, norm = z.norm(dim=1), found.point.norm(dim=1)
    assert (found.multiplier >= 0).all()
    assert (found.multiplier[found.index < 0] == 0).all()
    assert ((norm == 0) | (norm > 1e-13 * size)).all()
    assert (cones.violation(gate, found.point) <= 1e-11).all()
    polar = (cones.normals(gate, found.index) * found.multiplier[:, :, None]).sum(1)
    torch.testing.assert_close(polar, found.polar, rtol=0, atol=1e-12 * float(size.max()))
    assert ((z + found.polar - found.point).norm(dim=1) <= 1e-10 * size).all()
    slack = (cones.normals(gate, found.index) @ found.point[:, :, None])[:, :, 0]
    assert (slack.abs() <= 1e-11 * norm[:, None]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_projection_is_optimal_with_its_multipliers(kind, seed):
    cones, gate = make(kind, seed)
    z = points(cones, seed + 100)
    found = cones.project(gate, z)
    assert_optimal(cones, gate, z, found)
    for k in range(len(gate)):
        assert len(set(found.index[k][found.index[k] >= 0].tolist())) == int((found.index[k] >= 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_projection_equals_scipy_nnls(kind):
    for seed in range(8):
        cones, gate = make(kind, seed)
        z = torch.tensor(np.random.default_rng(seed).standard_normal((len(gate), cones.n_features)))
        found = cones.project(gate, z)
        for k in range(len(gate)):
            K = matrix(cones, k)
            expected = z[k].numpy() + (K.T @ nnls(K.T, -z[k].numpy())[0] if len(K) else 0.0)
            if len(K) and (K @ expected).min() < -1e-9:
                continue  # nnls itself is wrong on some degenerate problems; the conditions above need no reference
            np.testing.assert_allclose(found.point[k], expected, rtol=0, atol=2e-12 * float(z[k].norm()))


def test_projection_equals_interior_point():
    cp = pytest.importorskip("cvxpy")
    for seed, kind in enumerate(("gaussian", "duplicates", "opposite", "zero rows")):
        cones, gate = make(kind, seed + 40, r=3)
        z = torch.tensor(np.random.default_rng(seed).standard_normal((3, cones.n_features)))
        found = cones.project(gate, z)
        for k in range(3):
            u = cp.Variable(cones.n_features)
            cp.Problem(cp.Minimize(cp.sum_squares(u - z[k].numpy())), [matrix(cones, k) @ u >= 0]).solve(cp.CLARABEL)
            np.testing.assert_allclose(found.point[k], u.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_moreau_idempotence_and_homogeneity(kind):
    for seed in range(6):
        cones, gate = make(kind, seed)
        z = points(cones, seed)
        p = cones.project(gate, z).point
        assert (((z - p) * p).sum(1).abs() <= 1e-12 * z.norm(dim=1) ** 2).all()
        polar = cones.project(gate, z - p).point  # z - p is in the polar cone, which projects to zero
        assert (polar.norm(dim=1) <= 1e-11 * z.norm(dim=1)).all()
        torch.testing.assert_close(cones.project(gate, p).point, p, rtol=0, atol=1e-11 * float(z.abs().max()))
        for scale in (1e-250, 3e-7, 5e4, 1e250):
            again = cones.project(gate, scale * z).point / scale
            torch.testing.assert_close(again, p, rtol=0, atol=1e-11 * float(z.abs().max()))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_cones_do_not_depend_on_the_size_of_rows(scale):
    cones, gate = make("gaussian", 3)
    scales = torch.logspace(-3, 3, len(cones.rows), dtype=torch.float64)[:, None] * scale
    other = Cones(cones.rows * scales, cones.patterns.T, cones.gates)
    z = points(cones, 3)
    torch.testing.assert_close(other.rows, cones.rows, rtol=1e-14, atol=0)
    torch.testing.assert_close(other.project(gate, z).point, cones.project(gate, z).point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [0.0, 1e-6, 0.1, 10.0])
def test_warm_start_gives_the_same_answer(kind, change):
    for seed in range(5):
        cones, gate = make(kind, seed)
        z = points(cones, seed)
        moved = z + change * points(cones, seed + 1)
        warm, cold = cones.project(gate, moved, cones.project(gate, z)), cones.project(gate, moved)
        assert_optimal(cones, gate, moved, warm)
        torch.testing.assert_close(warm.point, cold.point, rtol=0, atol=1e-11 * float(moved.abs().max()))


def test_any_guess_of_active_rows_is_only_a_guess():
    cones, gate = make("duplicates", 5)
    z = points(cones, 5)
    generator = torch.Generator().manual_seed(0)
    for width in (1, 3, 9):
        index = torch.randint(-1, len(cones.rows), (len(z), width), generator=generator)
        start = projection.Projection(z, index, torch.zeros(len(z), width, dtype=z.dtype), z)
        assert_optimal(cones, gate, z, cones.project(gate, z, start))


def test_blocks_of_pairs_do_not_change_the_answer(monkeypatch):
    cones, gate = make("gaussian", 2)
    z = points(cones, 2)
    whole = cones.project(gate, z)
    monkeypatch.setattr("cvxnn.cones.cones._BLOCK_ENTRIES", 1)
    monkeypatch.setattr("cvxnn.cones.cones._TABLE_ENTRIES", 0)
    parts = cones.project(gate, z, whole)
    torch.testing.assert_close(parts.point, whole.point, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        cones.violation(gate, -z), torch.cat([cones.violation(k[None], -z[k][None]) for k in gate])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unfinished_iterations_are_finished_one_by_one(kind, monkeypatch):
    monkeypatch.setattr(projection, "_ROUNDS", 0)
    for seed in range(3):
        cones, gate = make(kind, seed)
        z = torch.tensor(np.random.default_rng(seed).standard_normal((len(gate), cones.n_features)))
        assert_optimal(cones, gate, z, cones.project(gate, z))


def test_multipliers_bound_the_maximum_whatever_happened(monkeypatch):
    def fail(*_):
        raise RuntimeError

    cones, gate = make("gaussian", 11)
    z = points(cones, 11)
    true = cones.project(gate, z).point.norm(dim=1)
    monkeypatch.setattr(projection, "_ROUNDS", 0)
    monkeypatch.setattr(projection, "nnls", fail)
    found = cones.project(gate, z)
    assert (found.multiplier >= 0).all()
    assert ((z + found.polar).norm(dim=1) >= true * (1 - 1e-14)).all()
    assert (cones.violation(gate, found.point) <= 1e-11).all()
    assert ((found.point * z).sum(1) <= found.point.norm(dim=1) * true * (1 + 1e-12)).all()


def test_polar_comes_from_the_multipliers_even_where_the_point_is_wrong():
    cones, gate = make("gaussian", 11)
    z = points(cones, 11)
    true = cones.project(gate, z).point.norm(dim=1)
    constraints = projection.Constraints(cones.rows, cones.signs(gate))
    sets = projection.ActiveSets(z, min(z.shape[1], len(cones.rows)), False)
    sets.restore(constraints, gate, cones.project(gate, z).index)
    for size in (1e-9, 0.3):
        sets.point = sets.point - size * z  # shorter than it should be: point - z would give a bound below the maximum
        multiplier, polar = sets.multipliers(constraints)
        assert (multiplier >= 0).all()
        expected = (cones.normals(gate, sets.index) * multiplier[:, :, None]).sum(1)
        torch.testing.assert_close(polar, expected, rtol=0, atol=1e-13)
        assert ((z + polar).norm(dim=1) >= true * (1 - 1e-13)).all()
    sets.point = z - polar  # on the far side of z, where the refined multipliers would be negative
    multiplier, polar = sets.multipliers(constraints)
    assert (multiplier >= 0).all()
    assert ((z + polar).norm(dim=1) >= true * (1 - 1e-13)).all()


@pytest.mark.parametrize("seed", range(10))
def test_tangent_is_the_derivative(seed):
    cones, gate = make("gaussian", seed)
    z = torch.tensor(np.random.default_rng(seed).standard_normal((len(gate), cones.n_features)))
    found = cones.project(gate, z)
    tangent = cones.tangent(found, gate)
    torch.testing.assert_close(tangent @ tangent, tangent, rtol=0, atol=1e-12)
    torch.testing.assert_close(tangent, tangent.mT, rtol=0, atol=1e-12)
    weakest = found.multiplier.masked_fill(found.index < 0, 1.0).amin(1)
    slack = cones.slack(gate, found.point)
    for k in range(len(gate)):
        slack[k, found.index[k][found.index[k] >= 0]] = 1.0
    smooth = (weakest > 1e-4) & (slack.amin(1) > 1e-4) | (found.point == 0).all(1) & (weakest > 1e-4)
    assert smooth.sum() >= 2
    step = 1e-7
    for j in range(cones.n_features):
        shift = torch.zeros_like(z)
        shift[:, j] = step
        slope = (cones.project(gate, z + shift).point - cones.project(gate, z - shift).point) / (2 * step)
        torch.testing.assert_close(slope[smooth], tangent[smooth][:, :, j], rtol=0, atol=1e-6)


def test_tangent_of_a_cone_that_is_a_line():
    X = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    cones, gate = Cones(X, torch.ones(2, 1, dtype=torch.bool)), torch.tensor([0])
    for height in (0.0, 3.0):
        found = cones.project(gate, torch.tensor([[-1.0, height]], dtype=torch.float64))
        expected = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
        torch.testing.assert_close(cones.tangent(found, gate), expected)


def test_tangent_of_projections_onto_zero_vanishes():
    X = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    cones, gate = Cones(X, torch.ones(4, 1, dtype=torch.bool)), torch.tensor([0])
    found = cones.project(gate, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert (found.point == 0).all()
    assert cones.tangent(found, gate).abs().max() < 1e-15


@given(seed=st.integers(0, 10_000), exponent=st.integers(-300, 300), kind=st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_violation_is_scale_invariant_and_never_hides_an_infeasible_point(seed, exponent, kind):
    cones, gate = make(kind, seed)
    rng = np.random.default_rng(seed)
    z = torch.tensor(rng.standard_normal((len(gate), cones.n_features)))
    near = cones.project(gate, z).point + 10.0 ** rng.integers(-14, 0) * z
    violation = cones.violation(gate, near)
    torch.testing.assert_close(cones.violation(gate, near * 10.0**exponent), violation, rtol=1e-6, atol=1e-15)
    for k in range(len(gate)):
        K, u = matrix(cones, k).astype(np.longdouble), near[k].numpy().astype(np.longdouble)
        norm = np.sqrt((u * u).sum())
        true = max(0.0, float(-(K @ u).min() / norm)) if len(K) and norm > 0 else 0.0
        assert abs(float(violation[k]) - true) <= 1e-15
        assert bool(cones.contains(gate[k : k + 1], near[k : k + 1])) == (float(violation[k]) <= FEASIBILITY)
        if true > FEASIBILITY * (1 + 1e-4):
            assert not cones.contains(gate[k : k + 1], near[k : k + 1])


def test_not_a_number_is_in_no_cone():
    cones, gate = make("gaussian", 1, r=3)
    u = torch.ones(3, cones.n_features, dtype=torch.float64)
    u[0, 0], u[1, 0] = float("nan"), float("inf")
    assert not cones.contains(gate, u)[:2].any()
    assert cones.contains(gate, 0 * torch.ones_like(u)).all()
    with pytest.raises(InvalidInputError, match="z has NaN"):
        cones.project(gate, u)


@pytest.mark.parametrize("kind", ["gaussian", "duplicates", "low rank", "one direction", "zero rows"])
def test_interior_points_have_the_largest_margin(kind):
    rng = np.random.default_rng(0)
    for seed in range(8):
        cones, gate = make(kind, seed)
        point, margin = cones.interior(gate)
        torch.testing.assert_close(point.norm(dim=1), torch.ones(len(gate), dtype=torch.float64))
        guess = cones.gates / cones.gates.norm(dim=0)
        open_cells = cones.slack(gate, guess.T).amin(1) > 1e-9
        assert (margin[open_cells] > 0).all()
        torch.testing.assert_close(cones.slack(gate, point).amin(1), margin)
        for size in (1e-3, 0.1, 1.0):
            others = point + size * torch.tensor(rng.standard_normal(point.shape))
            others /= others.norm(dim=1, keepdim=True)
            assert (cones.slack(gate, others).amin(1) <= margin * (1 + 1e-7) + 1e-13).all()
        asked = torch.tensor([3, 3, 0])
        torch.testing.assert_close(cones.interior(asked)[0], point[asked])


def test_margins_without_interior_are_not_positive():
    X = torch.tensor([[1.0, 2.0], [-3.0, -6.0], [1.0, 0.0]], dtype=torch.float64)
    cones = Cones(X, torch.tensor([[True, True], [True, False], [True, True]]))
    point, margin = cones.interior(torch.tensor([0, 1]))
    assert margin[0] <= 0 < margin[1]
    assert point.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_repaired_points_are_feasible(kind):
    for seed in range(8):
        cones, gate = make(kind, seed)
        z = points(cones, seed)
        for size in (1e-200, 1e-9, 1.0, 1e200):
            inside = cones.project(gate, z).point
            repaired = cones.repair(gate, size * (inside + 1e-6 * z))
            margin = cones.interior(gate)[1]
            assert (cones.violation(gate, repaired)[margin > 0] <= 1e-15).all()
            assert (cones.slack(gate, repaired)[margin > 0] >= 0).all()
            assert (cones.violation(gate, repaired) <= 1e-11).all()
        deep = cones.interior(gate)[0][margin > 0]
        torch.testing.assert_close(cones.repair(gate[margin > 0], deep), deep, rtol=0, atol=0)


def test_repair_takes_the_smallest_step_along_the_interior_point():
    X = torch.eye(2, dtype=torch.float64)
    cones = Cones(X, torch.ones(2, 1, dtype=torch.bool))
    repaired = cones.repair(torch.tensor([0]), torch.tensor([[1.0, -0.5]], dtype=torch.float64))
    torch.testing.assert_close(repaired, torch.tensor([[1.5, 0.0]], dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(16))
def test_exact_decomposition_is_optimal(seed):
    cp = pytest.importorskip("cvxpy")
    cones, gate = make(("gaussian", "duplicates", "zero rows", "gaussian")[seed % 4], seed, r=6)
    z = torch.tensor(np.random.default_rng(seed).standard_normal((6, cones.n_features)))
    u, w = decompose(cones, gate, z)
    value = u.norm(dim=1) + w.norm(dim=1)
    for k in range(6):
        K, x = matrix(cones, k), cp.Variable(cones.n_features)
        problem = cp.Problem(
            cp.Minimize(cp.norm(x) + cp.norm(x - z[k].numpy())), [K @ x >= 0, K @ x >= K @ z[k].numpy()]
        )
        problem.solve(cp.CLARABEL, tol_gap_rel=1e-10, tol_gap_abs=1e-10, tol_feas=1e-10)
        assert float(value[k]) == pytest.approx(problem.value, rel=1e-8)


@pytest.mark.parametrize("method", ["exact", "approximate"])
@pytest.mark.parametrize("kind", KINDS)
def test_decompositions_are_feasible_and_add_up(kind, method):
    for seed in range(6):
        cones, gate = make(kind, seed)
        a, b = (cones.project(gate, points(cones, seed + i)).point for i in (0, 1))
        z = a - b
        for scale in (1e-200, 1.0, 1e200):
            u, w = decompose(cones, gate, scale * z, method)
            u, w = u / scale, w / scale
            assert ((u - w - z).abs() <= 1e-14 * (u.abs() + w.abs() + z.abs())).all()
            assert cones.contains(gate, u).all()
            assert cones.contains(gate, w).all()
            value, known = u.norm(dim=1) + w.norm(dim=1), a.norm(dim=1) + b.norm(dim=1)
            assert (value <= known * (1.0 if method == "exact" else 2**0.5) * (1 + 1e-9)).all()


def test_exact_decomposition_ends_with_a_certificate(monkeypatch):
    gaps, bound = [], decomposition._lower_bound

    def record(constraints, u, z, index, multiplier):
        lower = bound(constraints, u, z, index, multiplier)
        gaps.append(float((1 - lower / (u.norm(dim=1) + (u - z).norm(dim=1))).max()))
        return lower

    monkeypatch.setattr(decomposition, "_lower_bound", record)
    for seed in range(8):
        cones, gate = make("gaussian", seed)
        gaps.clear()
        decompose(cones, gate, torch.tensor(np.random.default_rng(seed).standard_normal((12, cones.n_features))))
        assert not gaps or (gaps[-1] <= 1e-8 and len(gaps) <= 30)


def test_decomposition_predicts_what_the_gate_predicts():
    cones, gate = make("gaussian", 4)
    z = points(cones, 4)
    u, w = decompose(cones, gate, z)
    gated = torch.where(cones.patterns, z @ cones.rows.T, 0.0)
    network = (u @ cones.rows.T).clamp_min(0) - (w @ cones.rows.T).clamp_min(0)
    torch.testing.assert_close(network, gated, rtol=0, atol=1e-11 * float(u.abs().max()))


@pytest.mark.parametrize("change", [1.0, -1.0])
def test_decomposition_inside_the_cone_is_the_point_itself(change):
    cones, gate = make("gaussian", 6)
    z = change * cones.interior(gate)[0]
    u, w = decompose(cones, gate, z)
    torch.testing.assert_close(u, z.clamp_min(0) * 0 + (z if change > 0 else 0 * z))
    torch.testing.assert_close(w, 0 * z if change > 0 else -z)


def test_decomposition_without_one_names_the_gate():
    X = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    patterns = torch.tensor([[True, True], [False, True], [True, True]])
    cones, z = Cones(X, patterns), torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    decompose(cones, torch.tensor([0]), z[:1])
    with pytest.raises(InvalidInputError, match="gate 1 "):
        decompose(cones, torch.tensor([0, 1]), z)
    with pytest.raises(InvalidInputError, match="method"):
        decompose(cones, torch.tensor([0]), z[:1], method="best")


def test_hard_decompositions_fall_back_on_interior_points(monkeypatch):
    cones, gate = make("gaussian", 8)
    z = points(cones, 8)
    monkeypatch.setattr(projection, "_ROUNDS", 0)
    u, w = decompose(cones, gate, z, "approximate")
    assert cones.contains(gate, u).all()
    assert cones.contains(gate, w).all()
    assert ((u - w - z).abs() <= 1e-14 * (u.abs() + w.abs() + z.abs())).all()


def test_without_rows_the_cone_is_the_space():
    cones = Cones(torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.bool))
    gate, z = torch.tensor([0, 1]), torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    found = cones.project(gate, z)
    torch.testing.assert_close(found.point, z)
    assert (cones.tangent(found, gate) == torch.eye(2, dtype=torch.float64)).all()
    assert cones.contains(gate, z).all()
    assert (cones.interior(gate)[1] > 0).all()
    torch.testing.assert_close(cones.repair(gate, z), z)
    assert (decompose(cones, gate, z)[0] == z).all()


def test_single_rows_and_empty_batches():
    cones = Cones(torch.tensor([[2.0]]), torch.tensor([[True, False]]))
    z = torch.tensor([[3.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(cones.project(torch.tensor([0, 1]), z).point, torch.tensor([[3.0], [0.0]]).double())
    nothing = torch.empty(0, dtype=torch.long)
    assert cones.project(nothing, z[:0]).point.shape == (0, 1)
    assert cones.violation(nothing, z[:0]).shape == (0,)
    assert cones.repair(nothing, z[:0]).shape == (0, 1)
    assert decompose(cones, nothing, z[:0])[0].shape == (0, 1)


@pytest.mark.parametrize(
    ("X", "patterns", "gates", "name"),
    [
        (torch.ones(3), torch.ones(3, 1, dtype=torch.bool), None, "X"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 1, dtype=torch.bool), None, "X"),
        (torch.ones(3, 2), torch.ones(3, 1), None, "patterns"),
        (torch.ones(3, 2), torch.ones(2, 1, dtype=torch.bool), None, "patterns"),
        (torch.ones(3, 2), torch.ones(3, 1, dtype=torch.bool), torch.ones(2, 2), "gates"),
    ],
)
def test_bad_input_is_named(X, patterns, gates, name):
    with pytest.raises(InvalidInputError, match=name):
        Cones(X, patterns, gates)
