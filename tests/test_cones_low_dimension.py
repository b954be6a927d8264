"""Cones of data of low rank: spherical caps around them, and closed-form projection in up to two dimensions."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxnn.cones import Cones
from cvxnn.cones import faces as faces_module
from cvxnn.cones.caps import bounding_caps
from cvxnn.cones.faces import MOST_DIMENSIONS, FaceTable
from cvxnn.cones.projection import project_cones
from cvxnn.patterns import activation_patterns, enumerate_gates

# ----------------------------------------------------------------------------------------------------------- caps


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def caps_of(X, gates, patterns=None):
    """Caps of the cells of gates (d, P), their unit rows and patterns (P, n)."""
    X = np.asarray(X, dtype=float)
    patterns = (activation_patterns(X, gates) if patterns is None else patterns).T
    rows = torch.tensor(unit(X))
    return bounding_caps(rows, torch.tensor(patterns.copy()), torch.tensor(gates)), rows.numpy(), patterns


def integers(rows):
    """Float64 numbers times 2^400, as exact integers."""
    return [[int(Fraction(float(x)) * 2**400) for x in row] for row in rows]


def extreme_rays(rows, pattern):
    """Unit extreme rays of a pointed cone {u : diag(signs) rows u >= 0} in two or three dimensions.

    In integers: which candidates satisfy all rows is decided exactly.
    """
    K = integers(np.where(pattern[:, None], rows, -rows))
    if len(K[0]) == 2:
        found = [(-b, a) for a, b in K]
    else:
        found = [(b * f - c * e, c * d - a * f, a * e - b * d) for (a, b, c), (d, e, f) in itertools.combinations(K, 2)]
    rays = []
    for ray in found:
        slacks = [sum(x * y for x, y in zip(row, ray, strict=True)) for row in K]
        sign = 1 if min(slacks) >= 0 else -1 if max(slacks) <= 0 else 0
        largest = max(abs(x) for x in ray)
        if sign and largest:
            rays.append([float(Fraction(sign * x, largest)) for x in ray])
    return unit(np.array(rays)) if rays else np.zeros((0, len(K[0])))


def angles_to(rays, centre):
    """Angles between unit vectors, accurate for small ones too."""
    across = np.linalg.norm(rays - np.outer(rays @ centre, centre), axis=1)
    return np.arctan2(across, rays @ centre)


def true_angles(caps, rows, patterns):
    """Largest angle between the centre of every cone and its extreme rays."""
    reduced = rows @ caps.basis.numpy()
    pairs = zip(caps.centre.numpy(), patterns, strict=True)
    return np.array([angles_to(extreme_rays(reduced, bits), centre).max() for centre, bits in pairs])


DATA = {
    "plane": (12, 2),
    "space": (11, 3),
    "few": (4, 3),
    "two": (2, 2),
    "bias": (10, 3),
    "integers": (12, 3),
    "plane in five": (12, 2),
    "space in seven": (10, 3),
    "nearly equal": (10, 3),
    "clustered": (9, 3),
}


def data(kind, seed):
    rng = np.random.default_rng(seed)
    n, rank = DATA[kind]
    X = rng.standard_normal((n, rank))
    if kind == "bias":
        X[:, -1] = 1.0
    elif kind == "integers":
        X = rng.integers(-2, 3, (n, rank)) + 0.0
        X = X[X.any(axis=1)]
    elif kind in ("plane in five", "space in seven"):
        X = X @ rng.standard_normal((rank, 5 if rank == 2 else 7))
    elif kind == "nearly equal":
        X[5:] = X[:5] + 1e-9 * rng.standard_normal((5, rank))
    elif kind == "clustered":
        X = np.array([0.0, 0.0, 1.0]) + 1e-3 * X
    return X


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("seed", range(3))
def test_caps_hold_all_extreme_rays(kind, seed):
    X = data(kind, seed)
    caps, rows, patterns = caps_of(X, enumerate_gates(X))
    truth = true_angles(caps, rows, patterns)
    angle = caps.angle.numpy()
    assert (angle >= truth - 1e-15).all()
    known = angle < math.pi
    if kind not in ("nearly equal", "integers"):
        assert (known | (truth > math.atan(5.0))).all()
    if known.sum() > 10:
        assert np.median(angle[known] / truth[known]) < 1.3


@pytest.mark.parametrize("kind", ["plane", "space", "few", "bias", "plane in five", "clustered"])
def test_cap_bounds_hold_for_dense_samples(kind):
    X = data(kind, 7)
    gates = enumerate_gates(X)
    caps, rows, patterns = caps_of(X, gates)
    rng = np.random.default_rng(0)
    d, n_gates = X.shape[1], gates.shape[1]
    directions = gates.T.repeat(40, 0) + np.abs(gates).max() * rng.standard_normal((40 * n_gates, d)) * 10.0 ** (
        rng.uniform(-4, 1, (40 * n_gates, 1))
    )
    directions = unit(np.vstack([directions, rng.standard_normal((4000, d))]))
    names = {pattern.tobytes(): k for k, pattern in enumerate(patterns)}
    cell = np.array([names[bits.tobytes()] for bits in (rows @ directions.T >= 0).T])
    for c in (1, 3):
        weights = rng.standard_normal((len(X), c))
        G = np.stack([rows.T @ (pattern[:, None] * weights) for pattern in patterns])
        bounds = caps.dual_norm_bounds(torch.tensor(G), slice(0, n_gates)).numpy()
        values = np.linalg.norm(np.einsum("sdc,sd->sc", G[cell], directions), axis=1)
        assert (values <= bounds[cell]).all()
        parts = torch.cat([caps.dual_norm_bounds(torch.tensor(G[k : k + 1]), slice(k, k + 1)) for k in range(n_gates)])
        np.testing.assert_allclose(parts, bounds, rtol=1e-12)


def test_cap_bounds_hold_at_extreme_rays_of_adverse_blocks():
    """Blocks that point along an extreme ray, away from the centre, and across it."""
    X = data("space", 3)
    gates = enumerate_gates(X)
    caps, rows, patterns = caps_of(X, gates)
    for k, pattern in enumerate(patterns):
        for ray in extreme_rays(rows, pattern):
            across = ray - (ray @ caps.centre[k].numpy()) * caps.centre[k].numpy()
            for g in (ray, across, np.cross(ray, across), ray - 2 * caps.centre[k].numpy()):
                G = torch.tensor(g)[None, :, None]
                assert abs(g @ ray) <= float(caps.dual_norm_bounds(G, slice(k, k + 1)))


def test_the_part_of_a_block_outside_the_row_space_counts():
    X = data("plane in five", 1)
    gates = enumerate_gates(X)
    caps, _, _ = caps_of(X, gates)
    normal = np.linalg.svd(X)[2][-1]
    G = torch.tensor(np.outer(np.ones(gates.shape[1]), normal))[:, :, None]
    assert (caps.dual_norm_bounds(G, slice(None)) >= 1 - 1e-12).all()


@pytest.mark.parametrize("width", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("offset", [0.5, 0.01])
def test_thin_cells_of_the_plane(width, offset):
    """Between two hyperplanes `width` apart, the gate anywhere between them."""
    X = np.array([[0.0, 1.0], [math.sin(width), -math.cos(width)], [1.0, 0.3]])
    gate = np.array([[math.cos(offset * width)], [math.sin(offset * width)]])
    caps, rows, patterns = caps_of(X, gate, np.ones((3, 1), dtype=bool))
    truth = true_angles(caps, rows, patterns)
    assert truth[0] == pytest.approx(max(offset, 1 - offset) * width, rel=1e-3, abs=1e-15)
    assert caps.angle[0] >= truth[0]
    if width * offset > 1e-9:
        assert caps.angle[0] <= truth[0] * (1 + 1e-2)


@pytest.mark.parametrize("height", [1e-9, 1e-7, 1e-4])
@pytest.mark.parametrize("length", [1e-3, 1.0, 8.0])
def test_thin_cells_of_space(height, length):
    """A wedge |u_2| <= height u_3 with -length u_3 <= u_1 <= length u_3, turned at random."""
    K = unit(np.array([[0, 1, height], [0, -1, height], [1, 0, length], [-1, 0, length], [0, 0, 1.0]]))
    for seed in range(10):
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
        caps, rows, patterns = caps_of(K @ turn, (turn.T @ [0.0, 0.0, 1.0])[:, None], np.ones((5, 1), dtype=bool))
        corner = math.hypot(height, length)
        assert caps.angle[0] >= math.atan(corner) - 1e-15
        if height > 1e-5:  # for longer needles the choice in single precision may miss a side
            assert caps.angle[0] <= math.atan(corner) * 1.01
        assert caps.angle[0] >= true_angles(caps, rows, patterns)[0] - 1e-15


def test_needles_at_the_end_of_long_polygons():
    """Two nearly opposite half-planes that meet far away: the corner is ill-conditioned, the cap must hold it."""
    for tilt in (1e-2, 1e-6, 1e-10, 1e-14, 0.0, -1e-14, -1e-10):
        for seed in range(10):
            turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
            K = unit(np.array([[-tilt, 1, 1e-2], [-tilt, -1, 1e-2], [1, 0, 0.5], [0, 0, 1.0]]))
            caps, _, _ = caps_of(K @ turn, (turn.T @ [0.0, 0.0, 1.0])[:, None], np.ones((4, 1), dtype=bool))
            if tilt > 1e-3:
                assert math.atan(1.0) <= caps.angle[0] <= 1.0  # the corner is at u_1 = u_3
            elif tilt <= 0:
                assert caps.angle[0] == math.pi
            else:
                assert caps.angle[0] >= math.atan(1e-2 / tilt) - 1e-12


def test_gates_that_are_not_strictly_inside_say_nothing():
    X = data("space", 0)
    gates = enumerate_gates(X)
    patterns = activation_patterns(X, gates)
    P = gates.shape[1]
    normal = unit(X[0])
    gates[:, 0] -= (gates[:, 0] @ normal) * normal  # on a hyperplane
    gates[:, 1] = -gates[:, 1]  # in another cell
    gates[:, 2] = 0.0
    gates[:, 3] *= 1e-310
    gates[:, 4] *= 1e300
    gates[:, 5] = 1e-17 * gates[:, 5] + X[0] - X[0]
    caps, rows, patterns = caps_of(X, gates, patterns)
    assert caps.centre.isfinite().all()
    truth = true_angles(caps, rows, patterns)
    assert (caps.angle.numpy() >= truth - 1e-15).all()
    assert (caps.angle[[1, 2]] == math.pi).all()
    assert caps.angle[4] < math.pi
    G = torch.tensor(np.random.default_rng(0).standard_normal((P, 3, 2)))
    bounds = caps.dual_norm_bounds(G, slice(0, P))
    assert bounds.isfinite().all()
    assert bounds[2] >= torch.linalg.matrix_norm(G[2], 2)


def test_caps_are_there_for_rank_two_and_three_only():
    rng = np.random.default_rng(0)
    for rank, d in [(1, 1), (1, 3), (4, 4), (4, 6)]:
        X = rng.standard_normal((8, rank)) @ rng.standard_normal((rank, d))
        assert caps_of(X, rng.standard_normal((d, 5)))[0] is None
    nearly = np.c_[rng.standard_normal((8, 3)), 1e-12 * rng.standard_normal(8)]
    assert caps_of(nearly, rng.standard_normal((4, 5)))[0] is None


@given(seed=st.integers(0, 10_000), exponent=st.floats(-12, 0), n=st.integers(2, 9), rank=st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_caps_of_random_arrangements_near_a_common_direction(seed, exponent, n, rank):
    """Hyperplanes that nearly contain the gate, so that its cell is thin."""
    rng = np.random.default_rng(seed)
    gate = unit(rng.standard_normal(rank))
    X = rng.standard_normal((n, rank))
    X -= np.outer(X @ gate, gate) * (1 - 10.0**exponent)
    caps, rows, patterns = caps_of(X, gate[:, None])
    if caps is None:  # of no clear rank
        return
    rays = extreme_rays(rows @ caps.basis.numpy(), patterns[0])
    if len(rays) == 0 or caps.angle[0] == math.pi:
        return
    assert caps.angle[0] >= angles_to(rays, caps.centre[0].numpy()).max() - 1e-15


# ---------------------------------------------------------------------------------------------------- face tables


def planar_cones(kind, seed, d=2, n_gates=16):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(d, 40))
    X = rng.standard_normal((n, d))
    if kind == "duplicates":
        X = np.vstack([X, X, 3 * X[:2]])
    elif kind == "opposite":
        X = np.vstack([X, -X])
    elif kind == "nearly opposite":
        X = np.vstack([X, -X + 10.0 ** rng.integers(-15, -5) * rng.standard_normal(X.shape)])
    elif kind == "nearly equal":
        X = X[:1] + 10.0 ** rng.integers(-15, -5) * X
    elif kind == "scales":
        X *= 10.0 ** rng.uniform(-150, 150, (n, 1))
    elif kind == "axes":
        X = rng.integers(-1, 2, (n, d)) + 0.0
        X[:d] = np.eye(d)
    gates = rng.standard_normal((d, n_gates))
    patterns = rng.random((len(X), n_gates)) < 0.5 if seed % 2 else X @ gates >= 0
    return Cones(torch.tensor(X), torch.tensor(patterns))  # without gate vectors nothing else serves the plane


KINDS = ("gaussian", "duplicates", "opposite", "nearly opposite", "nearly equal", "scales", "axes")


def check_projection(cones, gate, z, found):
    """Feasible, with multipliers that are not negative and belong to active rows: nothing else has these.

    Multipliers of nearly opposite rows are large, and K^T lambda is as accurate as their size lets it be.
    """
    size, rounding = z.norm(dim=1), 1e-15 * found.multiplier.sum(1)
    assert (found.multiplier >= 0).all()
    assert (found.multiplier[found.index < 0] == 0).all()
    assert (cones.violation(gate, found.point) <= 1e-11).all()
    normals = cones.normals(gate, found.index)
    polar = (normals * found.multiplier[:, :, None]).sum(1)
    assert ((polar - found.polar).norm(dim=1) <= 1e-12 * size + rounding).all()
    assert ((z + found.polar - found.point).norm(dim=1) <= 2e-11 * size + rounding).all()
    along = (normals @ found.point[:, :, None])[:, :, 0].abs().amax(1)
    assert (along <= 1e-11 * found.point.norm(dim=1) + 1e-15 * size).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2])
def test_face_tables_agree_with_the_general_method(kind, d):
    for seed in range(6):
        cones = planar_cones(kind, seed, d)
        assert cones._faces is not None
        rng = np.random.default_rng(seed)
        gate = torch.tensor(rng.integers(0, cones.n_gates, 100))
        z = torch.tensor(rng.standard_normal((100, d)))
        z[:10] = cones.project(gate[:10], z[:10]).point
        z[10:20] = -(cones.signs(gate[10:20]) @ cones.rows)
        z[20:30] = -cones.normals(gate[20:30], torch.zeros(10, 1, dtype=torch.long))[:, 0]
        z[30] = 0.0
        general = project_cones(cones.rows, cones.signs(gate), z)
        for scale in (1.0, 1e-280, 1e280):
            found = cones.project(gate, z * scale)
            for name in ("point", "multiplier", "polar"):
                setattr(found, name, getattr(found, name) / scale)
            check_projection(cones, gate, z, found)
            assert ((found.point - general.point).norm(dim=1) <= 1e-10 * z.norm(dim=1)).all()


def test_numbers_at_the_ends_of_the_range():
    cones = Cones(torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool))
    z = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    expected = z.clamp_min(0)
    for scale in (5e-324, 1e-310, 1e308, 1.7e308):
        found = cones.project(torch.zeros(3, dtype=torch.long), z * scale)
        assert torch.equal(found.point, expected * scale)
        assert torch.equal(found.polar, (expected - z) * scale)


def test_projections_that_vanish_are_zero():
    cones = Cones(torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool))
    for seed in range(20):
        turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)).double())[0]
        cones = Cones(turn, torch.ones(2, 1, dtype=torch.bool))
        found = cones.project(torch.zeros(2, dtype=torch.long), -turn)
        assert (found.point == 0).all()


def fan(n=400):
    """One cone whose facets come in over and over: rows that are normal to a fan of lines close together."""
    angle = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    rows = torch.stack([angle.sin(), angle.cos()], 1)
    return rows, torch.ones(1, n, dtype=torch.bool)


@pytest.mark.parametrize("most", [2, 4, 5, 12])
def test_tables_grow_and_full_ones_are_left(most, monkeypatch):
    """Every pair brings its own most violated row to one table, more rows than it can hold."""
    monkeypatch.setattr(faces_module, "_MOST_ROWS", most)
    monkeypatch.setattr(faces_module, "_FIRST_ROWS", 2)
    rows, patterns = fan()
    table = FaceTable(rows, patterns)
    angle = torch.linspace(0, 2 * math.pi, 500, dtype=torch.float64)
    z = torch.stack([angle.cos(), angle.sin()], 1)
    gate = torch.zeros(len(z), dtype=torch.long)
    signs = torch.ones(len(z), len(rows), dtype=torch.float64)
    for part in torch.randperm(len(z), generator=torch.Generator().manual_seed(0)).split(25):
        found, failed = table.project(gate[part], signs[part], z[part])
        expected = project_cones(rows, signs[part], z[part])
        good = ~failed
        torch.testing.assert_close(found.point[good], expected.point[good], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.polar[good], expected.polar[good], rtol=0, atol=1e-11)
    assert bool(table.count[0] < most) or most == 2
    held = table.index[0][table.index[0] >= 0]
    assert len(held) == len(set(held.tolist())) == int(table.count[0]) <= most
    assert table.index.shape[1] <= max(most, 2)


def test_more_rows_than_the_first_table_holds(monkeypatch):
    """Many gates at once, with pairs of one gate that bring different rows in one round."""
    monkeypatch.setattr(faces_module, "_FIRST_ROWS", 1)
    rng = np.random.default_rng(0)
    X = torch.tensor(rng.standard_normal((300, 2)))
    cones = Cones(X, torch.tensor(rng.random((300, 5)) < 0.5))
    for seed in range(6):
        gate = torch.tensor(np.random.default_rng(seed).integers(0, 5, 200))
        z = torch.tensor(np.random.default_rng(seed).standard_normal((200, 2)))
        check_projection(cones, gate, z, cones.project(gate, z))
    assert int(cones._faces.count.max()) > 1
    assert cones._faces.index.shape[1] > 1
    for row in cones._faces.index:
        row = row[row >= 0]
        assert len(row.unique()) == len(row)


def test_failures_are_finished_by_the_general_method(monkeypatch):
    asked = []

    def record(rows, signs, z, start=None):
        asked.append(len(z))
        return project_cones(rows, signs, z, start)

    monkeypatch.setattr(faces_module, "_PARALLEL", 2.0)  # no pair of rows is ever used
    monkeypatch.setattr("cvxnn.cones.cones.project_cones", record)
    cones = planar_cones("gaussian", 4)
    gate = torch.arange(16)
    z = -(cones.signs(gate) @ cones.rows)  # in the polar cones
    found = cones.project(gate, z)
    assert sum(asked) > 0
    check_projection(cones, gate, z, found)
    assert (found.point == 0).all()


def test_tables_are_for_few_dimensions():
    assert MOST_DIMENSIONS == 2
    for n, d, there in [(5, 2, True), (5, 3, False), (1, 2, False), (1, 1, True)]:
        cones = Cones(torch.ones(n, d, dtype=torch.float64), torch.ones(n, 1, dtype=torch.bool))
        assert (cones._faces is not None) == there


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), exponent=st.integers(-280, 280))
@settings(max_examples=40, deadline=None)
def test_face_tables_on_anything(seed, kind, exponent):
    cones = planar_cones(kind, seed, n_gates=4)
    rng = np.random.default_rng(seed)
    gate = torch.tensor(rng.integers(0, 4, 30))
    z = torch.tensor(rng.standard_normal((30, 2)))
    found = cones.project(gate, z * 10.0**exponent)
    for name in ("point", "multiplier", "polar"):
        setattr(found, name, getattr(found, name) / 10.0**exponent)
    check_projection(cones, gate, z, found)
