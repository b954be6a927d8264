"""Bounds of the cone-constrained dual norm: exact cases, brute force, soundness of unfinished and rounded work."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxnn.cones.alternating import alternate, direction_starts, support
from cvxnn.cones.branching import branch_and_bound, simplex_bounds
from cvxnn.cones.cones import Cones
from cvxnn.cones.copositive import copositive_bounds, multiplier_upper, sdp_bounds
from cvxnn.cones.dual_norm import METHODS, cone_dual_norms
from cvxnn.cones.planar import find_plane
from cvxnn.cones.projection import Projection
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.norms.nuclear import spectral_bounds

BOUNDS = ("auto", "spectral", "copositive", "branching")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n, d, c, n_gates, seed=0):
    """Cones of random gates with their indices and the matrices X^T D_k L."""
    X, gates, L = normal(n, d, seed=seed), normal(d, n_gates, seed=seed + 1), normal(n, c, seed=seed + 2)
    patterns = X @ gates >= 0
    G = torch.einsum("nd,nk,nc->kdc", X, patterns.double(), L)
    return Cones(X, patterns, gates), torch.arange(n_gates), G


def cone(rows, sign=1):
    """One cone {u : rows u >= 0}."""
    X = torch.as_tensor(rows, dtype=torch.float64)
    return Cones(X, torch.full((len(X), 1), sign > 0))


def norms(G, u):
    return torch.einsum("bdc,bd->bc", G, u).norm(dim=1)


def check_witness(cones, gate, G, bounds):
    """Witnesses are feasible, of norm 1 or 0, and attain the lower bound; bounds are in order."""
    lengths = bounds.u.norm(dim=1)
    assert bool((((lengths - 1).abs() < 1e-12) | (lengths == 0)).all())
    assert bool((cones.violation(gate, bounds.u) <= 1e-10).all())
    value = norms(G, bounds.u)
    assert bool((value >= bounds.lower).all())
    assert torch.allclose(value, bounds.lower, rtol=1e-11, atol=0)
    assert torch.allclose(torch.einsum("bdc,bd->bc", G, bounds.u), value[:, None] * bounds.v, rtol=1e-12, atol=1e-12)
    assert bool((bounds.lower <= bounds.upper).all())


def feasible_points(cones, gate, count, seed=0):
    """Random unit points of the cones, (B, count, d): projections, which are interior and on faces."""
    B, d = len(gate), cones.n_features
    points = cones.project(gate.repeat_interleave(count), normal(B * count, d, seed=seed)).point
    return (points / points.norm(dim=1, keepdim=True).clamp_min(1e-300)).reshape(B, count, d)


def circle(n):
    t = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([t.cos(), t.sin()], 1)


def sphere(n):
    k = torch.arange(n, dtype=torch.float64) + 0.5
    z, t = 1 - 2 * k / n, math.pi * (1 + 5**0.5) * k
    r = (1 - z * z).sqrt()
    return torch.stack([r * t.cos(), r * t.sin(), z], 1)


def brute_force(cones, gate, G, directions):
    """The largest ||G^T u|| over the directions that are feasible."""
    best = []
    for k, g in zip(gate, G, strict=True):
        inside = cones.slack(k.expand(len(directions)), directions).amin(1) >= 0
        best.append((directions[inside] @ g).norm(dim=1).amax() if bool(inside.any()) else g.new_zeros(()))
    return torch.stack(best)


@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize("method", ["auto", "copositive"])
def test_plane_against_all_directions(c, method):
    cones, gate, G = problem(7, 2, c, 25, seed=c)
    bounds = cone_dual_norms(cones, gate, G, method=method)
    best = brute_force(cones, gate, G, circle(40_000))
    check_witness(cones, gate, G, bounds)
    assert bool((bounds.upper >= best).all())
    assert bool((bounds.upper <= best + 2e-4 * G.flatten(1).norm(dim=1)).all())
    if method == "auto":
        assert bool((bounds.upper <= bounds.lower * (1 + 1e-11)).all())


@pytest.mark.parametrize("c", [1, 2, 3, 6])
def test_space_against_all_directions(c):
    cones, gate, G = problem(7, 3, c, 15, seed=10 + c)
    bounds = cone_dual_norms(cones, gate, G)
    best = brute_force(cones, gate, G, sphere(100_000))
    check_witness(cones, gate, G, bounds)
    assert bool((bounds.upper >= best).all())
    assert bool((bounds.upper <= best + 2e-2 * G.flatten(1).norm(dim=1)).all())
    assert bool((bounds.upper <= bounds.lower * (1 + 2e-6)).all())


def exact_dual_norm(rows, G):
    """The dual norm in d = 2 or 3 with 50 digits: the best top eigenvector over the spans of all faces."""
    d = len(rows[0])
    rows, M = [mpmath.matrix(row) for row in rows], mpmath.matrix(G) * mpmath.matrix(G).T
    best = mpmath.mpf(0)
    for size in range(min(d, len(rows) + 1)):
        for face in itertools.combinations(rows, size):
            Q = null_space(face, d)
            if Q.cols != d - size:
                continue
            _, vectors = mpmath.eigsy(Q.T * M * Q)
            u = Q * vectors[:, Q.cols - 1]
            for sign in (1, -1):
                if all((row.T * u)[0] * sign >= -(mpmath.mpf(10) ** -40) for row in rows):
                    best = max(best, (u.T * M * u)[0])
    return mpmath.sqrt(best)


def null_space(rows, d):
    """Orthonormal basis of the directions orthogonal to the rows, by Gram and Schmidt."""
    basis = []
    for k, row in enumerate([*rows, *(mpmath.eye(d)[:, i] for i in range(d))]):
        rest = row.copy()
        for _ in range(2):
            for _, b in basis:
                rest -= b * (b.T * rest)[0]
        if mpmath.norm(rest) > mpmath.mpf(10) ** -30 * mpmath.norm(row):
            basis.append((k, rest / mpmath.norm(rest)))
    found = [b for k, b in basis if k >= len(rows)]
    Q = mpmath.matrix(d, len(found))
    for j, b in enumerate(found):
        Q[:, j] = b
    return Q


@pytest.mark.parametrize("c", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_bounds_in_exact_arithmetic(d, c):
    """No bound on the wrong side of the dual norm computed with 50 digits, by as little as rounding."""
    with mpmath.workdps(50):
        for seed in range(12):
            X, gates = normal(5, d, seed=seed), normal(d, 1, seed=seed + 50)
            if seed % 3 == 0:
                X[1] = -X[0] + 10.0 ** -(seed + 3) * X[2]  # a thin cone
            patterns = X @ gates >= 0
            signs = torch.where(patterns, 1.0, -1.0).double()
            G = normal(1, d, c, seed=seed + 99)
            exact = exact_dual_norm((signs * X).tolist(), G[0].tolist())
            for method in ("auto", "copositive", "branching"):
                bounds = cone_dual_norms(Cones(X, patterns), torch.tensor([0]), G, method=method)
                assert mpmath.mpf(float(bounds.upper)) >= exact
                assert mpmath.mpf(float(bounds.lower)) <= exact * (1 + mpmath.mpf(10) ** -9)
                if method != "copositive":
                    assert mpmath.mpf(float(bounds.upper)) <= exact * (1 + mpmath.mpf(10) ** -5)


def test_plane_within_a_larger_space():
    cones, gate, G = problem(9, 2, 3, 30, seed=4)
    basis = torch.linalg.qr(normal(6, 2, seed=9)).Q
    lifted = Cones(cones.rows @ basis.T, cones.patterns.T.contiguous())
    assert find_plane(lifted.rows) is not None
    flat, high = cone_dual_norms(cones, gate, G), cone_dual_norms(lifted, gate, basis @ G)
    check_witness(lifted, gate, basis @ G, high)
    assert torch.allclose(flat.upper, high.upper, rtol=1e-11, atol=0)
    assert torch.allclose(flat.lower, high.lower, rtol=1e-11, atol=0)


def test_matrices_that_leave_the_plane_of_the_rows():
    cones, gate, _ = problem(6, 2, 1, 8, seed=5)
    lifted = Cones(torch.cat([cones.rows, torch.zeros(6, 1)], 1), cones.patterns.T.contiguous())
    G = normal(8, 3, 2, seed=6)
    bounds = cone_dual_norms(lifted, gate, G)
    check_witness(lifted, gate, G, bounds)
    assert bool((bounds.upper >= brute_force(lifted, gate, G, sphere(50_000))).all())
    assert bool((bounds.upper <= bounds.lower * (1 + 2e-6)).all())


def test_planes_hold_for_slightly_perturbed_rows():
    """Rows off a plane by 1e-14 are treated as in it: the bound covers the perturbed cone, also where that opens."""
    rows = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=torch.float64)
    rows[:, 2] = torch.tensor([1.0, 1.0, -1.0, -1.0]) * 1e-15
    cones = cone(rows)
    G = torch.tensor([[[1.0], [2.0], [0.0]]], dtype=torch.float64)
    assert find_plane(cones.rows) is not None
    assert float(cone_dual_norms(cones, torch.tensor([0]), G).upper) < 1e-11
    wide = cone([[1.0, 1e-3, 0], [-1.0, 1e-3, 0], [0.0, -1.0, 0]])
    assert float(cone_dual_norms(wide, torch.tensor([0]), G).upper) < 1e-9


@pytest.mark.parametrize("d", [3, 6])
def test_scalar_against_clarabel(d):
    cp = pytest.importorskip("cvxpy")
    cones, gate, G = problem(15, d, 1, 6, seed=d)
    bounds = cone_dual_norms(cones, gate, G)
    check_witness(cones, gate, G, bounds)
    for k in range(len(gate)):
        K = (cones.signs(gate[k : k + 1])[0][:, None] * cones.rows).numpy()
        values = []
        for z in (G[k, :, 0].numpy(), -G[k, :, 0].numpy()):
            u = cp.Variable(d)
            values.append(cp.Problem(cp.Maximize(z @ u), [cp.norm(u) <= 1, K @ u >= 0]).solve(solver="CLARABEL"))
        assert float(bounds.upper[k]) == pytest.approx(max(values), rel=1e-6)
        assert float(bounds.upper[k] / bounds.lower[k]) < 1 + 1e-11


@pytest.mark.parametrize(("n", "d", "c"), [(12, 3, 2), (12, 4, 3), (15, 5, 5)])
def test_sdp_and_interior_point_agree(n, d, c):
    pytest.importorskip("cvxpy")
    cones, gate, G = problem(n, d, c, 4, seed=n + d)
    multipliers = cone_dual_norms(cones, gate, G, method="copositive", tolerance=1e-9)
    sdp = cone_dual_norms(cones, gate, G, method="sdp")
    check_witness(cones, gate, G, sdp)
    assert torch.allclose(multipliers.upper, sdp.upper, rtol=1e-5, atol=0)
    assert bool((sdp.upper <= spectral_bounds(G)[1] * (1 + 1e-12)).all())


@pytest.mark.parametrize("c", [2, 3])
def test_branching_meets_the_lower_bound(c):
    cones, gate, G = problem(40, 6, c, 10, seed=c)
    bounds = cone_dual_norms(cones, gate, G, method="branching", tolerance=1e-9 if c == 2 else 1e-7)
    check_witness(cones, gate, G, bounds)
    assert bool((bounds.upper <= bounds.lower * (1 + (1e-9 if c == 2 else 1e-7) + 1e-11)).all())
    multipliers = cone_dual_norms(cones, gate, G, method="copositive")
    assert bool((multipliers.upper >= bounds.lower).all())


def test_multipliers_are_tighter_than_the_spectral_norm_and_close():
    cones, gate, G = problem(60, 8, 5, 5, seed=3)
    spectral = cone_dual_norms(cones, gate, G, method="spectral")
    bounds = cone_dual_norms(cones, gate, G, method="copositive")
    check_witness(cones, gate, G, bounds)
    assert bool((bounds.upper <= spectral.upper).all())
    assert float((bounds.upper / bounds.lower).amax()) < 1.001 < float((spectral.upper / spectral.lower).amax())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.sampled_from(BOUNDS))
def test_no_feasible_point_beats_a_bound(seed, n, d, c, method):
    cones, gate, G = problem(n, d, c, 4, seed=seed)
    if seed % 3 == 0:  # any patterns, not only those of gates: thin cones and {0}
        cones = Cones(cones.rows, normal(n, 4, seed=seed) > 0)
    if method == "branching" and min(c, d) > 3:
        method = "auto"
    bounds = cone_dual_norms(cones, gate, G, method=method, max_evaluations=seed % 40, starts=2)
    check_witness(cones, gate, G, bounds)
    points = feasible_points(cones, gate, 500, seed=seed + 7)
    assert bool((norms_of_points(G, points) <= bounds.upper * (1 + 1e-12)).all())


def norms_of_points(G, points):
    return torch.einsum("bdc,bsd->bsc", G, points).norm(dim=2).amax(1)


@pytest.mark.parametrize("method", ["copositive", "branching"])
def test_unfinished_work_is_sound(method):
    cones, gate, G = problem(50, 6, 3, 6, seed=8)
    best = cone_dual_norms(cones, gate, G, tolerance=1e-7)
    u, zero = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    previous = torch.full((6,), math.inf, dtype=torch.float64)
    for effort in (0, 1, 3, 5):
        if method == "copositive":
            upper = copositive_bounds(cones, gate, G, zero, max_rounds=effort)
        else:
            upper, _ = branch_and_bound(cones, gate, G, u, zero, max_evaluations=8 * effort)
        assert bool((upper >= best.lower).all())
        assert bool((upper <= previous * (1 + 1e-9)).all())
        previous = upper
    assert bool((previous < 1.5 * best.upper).all())


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e6, math.nan, math.inf])
def test_bounds_do_not_trust_the_projection(size, monkeypatch):
    """With any multipliers at all, bad ones included, nothing falls below the optimum."""
    cones, gate, G = problem(30, 4, 3, 8, seed=2)
    z = G[:, :, 0]
    exact = cone_dual_norms(cones, gate, G)
    scalar = cone_dual_norms(cones, gate, z[:, :, None])
    project = cones.project

    def careless(gate, z, start=None):
        proper = project(gate, z)
        index = torch.randint(len(cones.rows), (len(z), 3), generator=torch.Generator().manual_seed(1))
        multiplier = proper.multiplier.new_full((len(z), 3), size)
        polar = torch.einsum("ra,rad->rd", multiplier, cones.normals(gate, index))
        return Projection(proper.point, index, multiplier, polar)

    monkeypatch.setattr(cones, "project", careless)
    loose = cone_dual_norms(cones, gate, G, max_evaluations=20)
    assert bool((loose.upper >= exact.lower).all())
    assert bool((cone_dual_norms(cones, gate, z[:, :, None]).upper >= scalar.lower).all())
    assert bool((support(cones, gate, z).upper <= z.norm(dim=1) * (1 + 1e-12)).all())


def test_negative_multipliers_are_refused(monkeypatch):
    cones, gate, G = problem(30, 4, 1, 8, seed=2)
    z = G[:, :, 0]
    project = cones.project

    def negative(gate, z, start=None):
        proper = project(gate, z)
        return Projection(-proper.point, proper.index, -proper.multiplier - 1e-3, -0.999 * z)

    monkeypatch.setattr(cones, "project", negative)
    assert torch.allclose(support(cones, gate, z).upper, z.norm(dim=1))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.sampled_from([1.0, 1e-2, 1e-5, 1e-9]), st.booleans())
def test_simplex_bounds(seed, c, width, linear):
    """At least ||P^T t|| / ||V^T t|| for all t >= 0, and reached up to rounding."""
    V = normal(1, c, seed=seed).abs() + width * normal(c, c, seed=seed + 1)
    V = V.clamp_min(0) + 1e-3
    V = V / V.norm(dim=1, keepdim=True)
    G = normal(5, c, seed=seed + 2)
    P = V @ G.T if linear else V @ G.T + width * normal(c, 5, seed=seed + 3)
    bound = float(simplex_bounds(V[None], P[None], torch.zeros(1, c, dtype=torch.float64)))
    rng = np.random.default_rng(seed)
    t = np.concatenate([rng.dirichlet(np.ones(c), 5000), rng.dirichlet(0.1 * np.ones(c), 5000), np.eye(c)])
    t = t.astype(np.longdouble)
    ratio = np.linalg.norm((t @ P.numpy()).astype(float), axis=1) / np.linalg.norm(
        (t @ V.numpy()).astype(float), axis=1
    )
    assert bound >= ratio.max() * (1 - 1e-15)
    assert bound <= ratio.max() * (1 + 2e-2) + 1e-9


def test_simplex_bounds_are_exact_where_the_projection_is_linear():
    V = torch.eye(3, dtype=torch.float64)[None]
    G = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    M = G @ torch.linalg.qr(normal(3, 3, seed=1)).Q.abs()  # positive entries: the top singular vector is inside
    bound = simplex_bounds(V, (V @ M.T), torch.zeros(1, 3, dtype=torch.float64))
    assert float(bound) == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-13)


def test_negative_entries_of_the_multiplier_are_clipped():
    cones, gate, G = problem(10, 3, 2, 1, seed=1)
    K = (cones.signs(gate)[0][:, None] * cones.rows)[None]
    weight = torch.full((1, 10), -5.0, dtype=torch.float64)
    assert float(multiplier_upper(G, K, K.roll(1, 1), weight)) == pytest.approx(float(spectral_bounds(G)[1]))
    assert float(multiplier_upper(G, K, K, weight * math.nan)) == math.inf


@pytest.mark.parametrize("answer", ["negative", "nan", None])
def test_sdp_is_sound_whatever_the_solver_returns(answer, monkeypatch):
    pytest.importorskip("cvxpy")
    cones, gate, G = problem(8, 3, 2, 2, seed=6)
    wrong = {"negative": -10 * np.ones((8, 8)), "nan": np.full((8, 8), math.nan), None: None}[answer]
    monkeypatch.setattr("cvxnn.cones.copositive._solve_sdp", lambda M, K, solver: wrong)
    assert torch.allclose(sdp_bounds(cones, gate, G), spectral_bounds(G)[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [2, 3])
def test_cones_of_a_point_a_line_and_everything(method, d):
    if method == "sdp":
        pytest.importorskip("cvxpy")
    eye = torch.eye(d, dtype=torch.float64)
    G = normal(1, d, 2, seed=3)
    gate = torch.tensor([0])
    point = cone_dual_norms(cone(torch.cat([eye, -eye])), gate, G, method=method)
    assert float(point.lower) == 0.0
    assert not bool(point.u.any()) and not bool(point.v.any())
    line_cones = cone(torch.cat([eye[1:], -eye[1:], eye[1:2], torch.zeros(1, d)]))
    line = cone_dual_norms(line_cones, gate, G, method=method)
    check_witness(line_cones, gate, G, line)
    assert float(line.lower) == pytest.approx(float(G[0, 0].norm()), rel=1e-12)
    everything = cone_dual_norms(cone(torch.zeros(2, d)), gate, G, method=method)
    assert float(everything.upper) == pytest.approx(float(torch.linalg.matrix_norm(G[0], 2)), rel=1e-12)
    assert float(everything.lower) == pytest.approx(float(everything.upper), rel=1e-11)
    if method != "spectral":
        assert float(point.upper) < 1e-5 * float(G.norm())
        assert float(line.upper) <= float(line.lower) * (1 + 1e-5)


@pytest.mark.parametrize("method", BOUNDS)
def test_zero_matrices_and_errors(method):
    cones, gate, G = problem(10, 3, 2, 3, seed=1)
    G[0] = 0.0
    plain = cone_dual_norms(cones, gate, G, method=method)
    error = torch.tensor([0.5, 0.25, 1e9], dtype=torch.float64)
    wide = cone_dual_norms(cones, gate, G, error, method=method)
    assert float(plain.upper[0]) == 0.0 and float(plain.lower[0]) == 0.0
    assert torch.allclose(wide.upper, plain.upper + error, rtol=1e-12)
    assert torch.allclose(wide.lower, (plain.lower - error).clamp_min(0), rtol=1e-12)


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e150])
@pytest.mark.parametrize("d", [2, 4])
def test_scales(method, scale, d):
    cones, gate, G = problem(12, d, 2, 4, seed=d)
    plain = cone_dual_norms(cones, gate, G, method=method)
    scaled = cone_dual_norms(cones, gate, G * scale, method=method)
    assert torch.allclose(scaled.upper / scale, plain.upper, rtol=3e-6, atol=0)
    assert torch.allclose(scaled.lower / scale, plain.lower, rtol=1e-9, atol=0)
    tiny = cone_dual_norms(cones, gate, G * 1e-307, method=method)
    assert bool((tiny.upper >= norms(G, plain.u) * 1e-307).all())
    huge = cone_dual_norms(cones, gate, G / G.abs().amax() * 1.7e308, method=method)
    assert bool((huge.upper >= huge.lower).all())


def test_rows_of_all_sizes_duplicates_and_order_do_not_matter():
    cones, gate, G = problem(12, 3, 2, 6, seed=12)
    X, patterns = cones.rows, cones.patterns.T
    sizes = 10.0 ** torch.linspace(-140, 140, 12, dtype=torch.float64)[:, None]
    more = Cones(
        torch.cat([X * sizes, X[:4], torch.zeros(2, 3)]).flip(0),
        torch.cat([patterns, patterns[:4], patterns[:2]]).flip(0),
    )
    first, second = cone_dual_norms(cones, gate, G), cone_dual_norms(more, gate, G)
    assert torch.allclose(first.lower, second.lower, rtol=1e-9)
    assert bool((first.upper >= second.lower).all()) and bool((second.upper >= first.lower).all())


def test_matrices_not_finite_get_no_bounds():
    cones, gate, G = problem(10, 3, 2, 3, seed=1)
    G[0, 0, 0], G[1, 0, 0] = math.nan, math.inf
    bounds = cone_dual_norms(cones, gate, G)
    assert bounds.upper[:2].tolist() == [math.inf] * 2 and bounds.lower[:2].tolist() == [0.0] * 2
    assert float(bounds.upper[2]) == pytest.approx(float(bounds.lower[2]), rel=1e-5)


def test_low_rank_matrices_with_many_outputs_are_exact():
    cones, gate, _ = problem(40, 8, 1, 5, seed=7)
    G = normal(5, 8, 1, seed=8) @ normal(5, 1, 9, seed=9)
    bounds = cone_dual_norms(cones, gate, G)
    check_witness(cones, gate, G, bounds)
    assert bool((bounds.upper <= bounds.lower * (1 + 1e-11)).all())
    with pytest.raises(UnsupportedError, match="rank"):
        cone_dual_norms(cones, gate, normal(5, 8, 9, seed=9), method="branching")


def test_alternation_rises_and_starts_are_unit_vectors():
    cones, gate, G = problem(30, 5, 4, 6, seed=3)
    v = direction_starts(cones, gate, G, 8)
    assert torch.allclose(v.norm(dim=2), torch.ones(v.shape[:2], dtype=torch.float64))
    few = alternate(cones, gate, G, v[:, :1], max_iter=1)[2]
    more = alternate(cones, gate, G, v[:, :1])[2]
    most = alternate(cones, gate, G, v)[2]
    assert bool((few <= more * (1 + 1e-12)).all()) and bool((more <= most * (1 + 1e-9)).all())


def test_given_directions_are_used():
    cones, gate, G = problem(30, 5, 4, 6, seed=3)
    best = cone_dual_norms(cones, gate, G, method="spectral", starts=40)
    again = cone_dual_norms(cones, gate, G, method="spectral", starts=0, init=best.v[:, None])
    assert bool((again.lower >= best.lower * (1 - 1e-9)).all())


def test_a_local_minimum_that_is_not_global():
    """X = I, residual (-1/2, 2), pattern D = I: the neuron e_2 has slope 2 > beta = 1/2 (section 3 of the maths)."""
    cones = cone([[1.0, 0.0], [0.0, 1.0]])
    bounds = cone_dual_norms(cones, torch.tensor([0]), torch.tensor([[[-0.5], [2.0]]], dtype=torch.float64))
    assert float(bounds.upper) == pytest.approx(2.0, rel=1e-13)
    assert float(bounds.lower) == pytest.approx(2.0, rel=1e-13)
    assert torch.allclose(bounds.u, torch.tensor([[0.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"G": torch.zeros(2, 4, 1, dtype=torch.float64)}, "G must have shape"),
        ({"gate": torch.tensor([0])}, "gate must have shape"),
        ({"gate": torch.tensor([0, 9])}, "gate must lie"),
        ({"error": -1.0}, "error"),
        ({"error": math.nan}, "error"),
        ({"method": "exact"}, "method"),
    ],
)
def test_wrong_arguments(change, message):
    cones, gate, G = problem(5, 3, 1, 2)
    arguments = {"gate": gate, "G": G} | change
    with pytest.raises(InvalidInputError, match=message):
        cone_dual_norms(cones, **arguments)
