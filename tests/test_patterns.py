"""Gates: activation, sampling, removal of duplicates, exact enumeration."""

import math
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cvxnn.errors import CvxnnError, InvalidInputError, UnsupportedError
from cvxnn.patterns import (
    DEFAULT_MAX_CELLS,
    activation,
    activation_patterns,
    count_cells_bound,
    deduplicate_gates,
    enumerate_gates,
    enumeration,
    sample_gates,
)
from cvxnn.patterns.arrangement import _gaps, cell_points


def pattern_set(X, gates):
    return {column.tobytes() for column in activation_patterns(X, gates).T}


def assert_exact_enumeration(X, count):
    gates = enumerate_gates(X)
    assert gates.shape == (X.shape[1], count)
    assert len(pattern_set(X, gates)) == count
    np.testing.assert_allclose(np.linalg.norm(gates, axis=0), 1.0)
    rows = X[X.any(axis=1)]
    assert np.abs(rows @ gates / np.linalg.norm(rows, axis=1, keepdims=True)).min() > 1e-10
    return gates


def roots(kind, d):
    """Normals of the reflection arrangements: braid (type A, in R^d), type B, type D."""
    e = np.eye(d)
    rows = [e[i] - e[j] for i, j in combinations(range(d), 2)]
    if kind != "A":
        rows += [e[i] + e[j] for i, j in combinations(range(d), 2)]
    if kind == "B":
        rows += list(e)
    return np.array(rows)


def exact_rank3_count(rows):
    """2 (1 + sum over intersection points of (lines through it - 1)), in integers."""

    def primitive(v):
        g = math.gcd(*v)
        v = tuple(x // g for x in v)
        return v if next(x for x in v if x) > 0 else tuple(-x for x in v)

    lines = sorted({primitive(tuple(int(x) for x in row)) for row in rows if any(row)})
    pairs: dict[tuple[int, ...], int] = {}
    for a, b in combinations(lines, 2):
        cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
        pairs[primitive(cross)] = pairs.get(primitive(cross), 0) + 1
    return 2 * (1 + sum((1 + math.isqrt(1 + 8 * m)) // 2 - 1 for m in pairs.values()))


# Activation


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_activation_is_the_sign_of_exact_products(data):
    n, d, p = (data.draw(st.integers(1, 6)) for _ in range(3))
    entries = st.integers(-8, 8).map(float)
    X = data.draw(hnp.arrays(np.float64, (n, d), elements=entries))
    gates = data.draw(hnp.arrays(np.float64, (d, p), elements=entries))
    patterns = activation_patterns(X, gates)
    assert patterns.dtype == np.bool_
    for i, k in product(range(n), range(p)):
        exact = sum(Fraction(X[i, j]) * Fraction(gates[j, k]) for j in range(d))
        assert patterns[i, k] == (exact >= 0)


def test_activation_is_the_same_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    X, gates = rng.standard_normal((57, 4)), rng.standard_normal((4, 23))
    monkeypatch.setattr(activation, "_BLOCK_COLUMNS", 5)
    monkeypatch.setattr(activation, "_BLOCK_ENTRIES", 40)
    np.testing.assert_array_equal(activation_patterns(X, gates), X @ gates >= 0)


def test_activation_computes_in_float64():
    X = np.array([[1.0, 1.0]], dtype=np.float32)
    assert not activation_patterns(X, np.array([[1.0], [-1.0 - 1e-12]]))[0, 0]


def test_activation_names_mismatched_shapes():
    with pytest.raises(InvalidInputError, match=r"X has shape \(3, 2\) and gates has shape \(3, 4\)"):
        activation_patterns(np.zeros((3, 2)), np.zeros((3, 4)))


# Removal of duplicates


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_deduplicate_keeps_the_first_of_each_nonempty_pattern(patterns):
    seen, expected = set(), []
    for k, column in enumerate(patterns.T):
        if column.any() and column.tobytes() not in seen:
            seen.add(column.tobytes())
            expected.append(k)
    assert deduplicate_gates(patterns).tolist() == expected


def test_deduplicate_across_blocks(monkeypatch):
    monkeypatch.setattr(activation, "_BLOCK_COLUMNS", 4)
    patterns = np.random.default_rng(0).random((3, 50)) < 0.5
    kept = deduplicate_gates(patterns)
    assert kept.size == len({c.tobytes() for c in patterns.T if c.any()})
    assert (np.diff(kept) > 0).all()


def test_deduplicate_without_any_active_sample_is_empty():
    kept = deduplicate_gates(np.zeros((9, 4), dtype=bool))
    assert kept.shape == (0,)
    assert kept.dtype.kind == "i"


def test_deduplicate_refuses_numbers():
    with pytest.raises(InvalidInputError, match="float64"):
        deduplicate_gates(np.ones((3, 2)))


# Sampling


@pytest.mark.parametrize("method", ["gaussian", "differences", "whitened"])
@pytest.mark.parametrize("options", [{}, {"bias_column": True}, {"bias_column": True, "quantile": 0.7}])
def test_sampling_is_reproducible(method, options):
    X = np.random.default_rng(0).standard_normal((30, 4))
    X[:, -1] = 1.0
    draw = [sample_gates(X, 8, method=method, random_state=s, **options) for s in (3, 3, 4)]
    assert draw[0].shape == (4, 8)
    assert draw[0].dtype == np.float64
    assert np.isfinite(draw[0]).all()
    np.testing.assert_array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_sampling_takes_generators_and_random_states():
    X = np.eye(3)
    for make in (np.random.default_rng, np.random.RandomState):
        state = make(5)
        first, second = (sample_gates(X, 4, random_state=state) for _ in range(2))
        np.testing.assert_array_equal(first, sample_gates(X, 4, random_state=make(5)))
        assert not np.array_equal(first, second)


def test_gaussian_gates_are_standard_normal_and_ignore_the_data():
    rng = np.random.default_rng(0)
    gates = sample_gates(rng.standard_normal((5, 3)), 20_000, random_state=1)
    np.testing.assert_array_equal(gates, sample_gates(100.0 * rng.random((9, 3)), 20_000, random_state=1))
    np.testing.assert_allclose(gates @ gates.T / 20_000, np.eye(3), atol=0.04)


def test_difference_gates_bisect_pairs_of_samples():
    X = np.random.default_rng(0).standard_normal((12, 3))
    pairs = [(i, j) for i, j in product(range(12), repeat=2) if i != j]
    for gate in sample_gates(X, 20, method="differences", random_state=0).T:
        assert any(np.array_equal(gate, X[i] - X[j]) for i, j in pairs)
    ones = np.column_stack([X, np.ones(12)])
    for gate in sample_gates(ones, 20, method="differences", bias_column=True, random_state=0).T:
        i, j = next((i, j) for i, j in pairs if np.array_equal(gate[:3], X[i] - X[j]))
        assert ones[i] @ gate == pytest.approx(-(ones[j] @ gate))
        assert ones[i] @ gate > 0


def test_difference_gates_are_never_zero():
    X = np.zeros((4000, 2))
    X[17] = [1.0, 2.0]
    gates = sample_gates(X, 50, method="differences", random_state=0)
    np.testing.assert_array_equal(np.abs(gates), np.repeat([[1.0], [2.0]], 50, axis=1))


@pytest.mark.parametrize("method", ["differences", "whitened"])
def test_equal_samples_fall_back_to_gaussian_gates(method):
    gates = sample_gates(np.ones((5, 3)), 6, method=method, random_state=0)
    assert np.isfinite(gates).all()
    assert np.linalg.matrix_rank(gates) == 3


def test_whitened_gates_are_inner_products_of_whitened_samples():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 3)) + 5.0
    gates = sample_gates(X, 100, method="whitened", random_state=0)
    np.testing.assert_allclose(np.linalg.norm(gates, axis=0), 1.0)
    covariance = np.cov(X.T, bias=True)
    samples = X - X.mean(axis=0)
    recovered = (covariance + 1e-3 * np.trace(covariance) / 3 * np.eye(3)) @ gates
    cosine = (samples / np.linalg.norm(samples, axis=1, keepdims=True)) @ recovered
    cosine = cosine / np.linalg.norm(recovered, axis=0)
    np.testing.assert_allclose(cosine.max(axis=0), 1.0)
    assert len(set(cosine.argmax(axis=0))) == 100


@pytest.mark.parametrize("method", ["gaussian", "differences", "whitened"])
@pytest.mark.parametrize("q", [0.001, 0.3, 0.7, 0.999])
def test_quantile_sets_the_fraction_of_active_samples(method, q):
    X = np.random.default_rng(0).standard_normal((200, 5))
    X[:, -1] = 1.0
    gates = sample_gates(X, 40, method=method, quantile=q, bias_column=True, random_state=0)
    active = activation_patterns(X, gates).sum(axis=0)
    np.testing.assert_array_equal(active, 200 - min(max(round(q * 200), 1), 199))


def test_whitened_gates_with_a_bias_go_through_the_median():
    X = np.random.default_rng(0).standard_normal((51, 4))
    X[:, -1] = 1.0
    gates = sample_gates(X, 10, method="whitened", bias_column=True, random_state=0)
    assert set(activation_patterns(X, gates).sum(axis=0)) <= {25, 26}


def test_one_sample_is_active_under_a_quantile():
    gates = sample_gates(np.array([[3.0, 1.0]]), 5, quantile=0.5, bias_column=True, random_state=0)
    assert activation_patterns(np.array([[3.0, 1.0]]), gates).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0.5}, "column of ones"),
        ({"quantile": 1.0, "bias_column": True}, "quantile is 1.0"),
        ({"bias_column": True}, "last column of X"),
        ({"method": "uniform"}, "'gaussian', 'differences', 'whitened'"),
        ({"n_gates": 0}, "n_gates is 0"),
        ({"random_state": "seed"}, "random_state is 'seed'"),
    ],
)
def test_sampling_names_bad_arguments(options, message):
    arguments = {"n_gates": 3, **options}
    with pytest.raises(InvalidInputError, match=message):
        sample_gates(np.arange(6.0).reshape(3, 2), **arguments)


def test_sampling_refuses_nan():
    with pytest.raises(InvalidInputError, match="NaN"):
        sample_gates(np.array([[1.0, np.nan]]), 2)


# Enumeration


@pytest.mark.parametrize(
    ("n", "rank"),
    [(1, 1), (7, 1), (9, 2), (150, 2), (3, 3), (12, 3), (60, 3), (12, 4), (12, 5), (13, 7), (9, 9)],
)
def test_general_position_has_the_count_of_cover(n, rank):
    rng = np.random.default_rng(n * rank)
    X = rng.standard_normal((n, rank))
    expected = 2 if rank == 1 else 2 * sum(math.comb(n - 1, i) for i in range(rank))
    assert count_cells_bound(X) == expected
    assert_exact_enumeration(X, expected)
    low_rank = X @ rng.standard_normal((rank, rank + 3))
    assert count_cells_bound(low_rank) == expected
    assert_exact_enumeration(low_rank, expected)


def test_fewer_rows_than_columns():
    X = np.random.default_rng(0).standard_normal((5, 40))
    assert_exact_enumeration(X, 32)


@pytest.mark.parametrize(
    ("kind", "d", "count"),
    [("A", 4, 24), ("A", 5, 120), ("A", 6, 720), ("B", 3, 48), ("B", 4, 384), ("D", 4, 192)],
)
def test_reflection_arrangements_have_one_cell_for_each_group_element(kind, d, count):
    X = roots(kind, d)
    assert_exact_enumeration(X, count)
    scales = np.random.default_rng(0).choice([-3.0, 1e-6, 0.1, 1e8], size=(len(X), 1))
    assert_exact_enumeration(X * scales, count)


def test_integer_grid_of_rank_3():
    X = np.array(list(product([-1, 0, 1], repeat=3)), dtype=float)
    assert exact_rank3_count(X) == 96
    gates = assert_exact_enumeration(X, 96)
    assert activation_patterns(X, gates)[~X.any(axis=1)].all()


@pytest.mark.parametrize("step", [1.0, 0.1])
def test_planar_grid_with_a_bias_matches_exact_integers(step):
    grid = np.array([(i, j, 1) for i in range(-2, 7) for j in range(6)])
    X = np.column_stack([step * grid[:, :2] + [0.3, 7.7], np.ones(len(grid))])
    assert_exact_enumeration(X, exact_rank3_count(grid))


def test_degenerate_rows_of_rank_4_match_brute_force():
    X = np.array(list(product([-1, 0, 1], repeat=4)), dtype=float)
    rng = np.random.default_rng(0)
    X = X[rng.choice(len(X), 14, replace=False)]
    gates = enumerate_gates(X)
    sampled = pattern_set(X, rng.standard_normal((4, 100_000)))
    assert pattern_set(X, gates) == sampled
    assert gates.shape[1] == len(sampled) < count_cells_bound(X)


@pytest.mark.parametrize(("n", "d"), [(10, 2), (25, 3), (9, 4), (8, 6)])
def test_random_gates_only_have_enumerated_patterns(n, d):
    rng = np.random.default_rng(d)
    X = rng.standard_normal((n, d))
    X[-1] = X[0]
    X[-2] = -2.0 * X[1]
    enumerated = pattern_set(X, enumerate_gates(X))
    assert pattern_set(X, rng.standard_normal((d, 100_000))) <= enumerated


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 9), st.just(3)), elements=st.integers(-3, 3)))
def test_small_integer_rows_match_exact_integers(rows):
    rank = np.linalg.matrix_rank(rows)
    gates = enumerate_gates(rows.astype(float))
    assert len(pattern_set(rows, gates)) == gates.shape[1] <= count_cells_bound(rows)
    if rank == 3:
        assert gates.shape[1] == exact_rank3_count(rows)
    elif rank < 2:
        assert gates.shape[1] == 1 + rank


def test_zero_and_proportional_rows_change_nothing():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((8, 3))
    longer = np.vstack([X, np.zeros((2, 3)), 3.0 * X[:3], -0.1 * X[2:5], X[4:5] * 1e-200])
    count = enumerate_gates(X).shape[1]
    assert count_cells_bound(longer) == count_cells_bound(X) == count
    gates = enumerate_gates(longer)
    assert gates.shape[1] == count
    assert activation_patterns(longer, gates)[8:10].all()


def test_all_zero_rows_have_one_pattern():
    X = np.zeros((4, 3))
    gates = enumerate_gates(X)
    assert count_cells_bound(X) == 1
    assert gates.shape == (3, 1)
    assert gates.any()
    assert activation_patterns(X, gates).all()


def test_columns_of_very_different_scales():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((15, 3))
    expected = pattern_set(X, enumerate_gates(X))
    scaled = X * [1e-9, 1.0, 1e12]
    assert pattern_set(scaled, enumerate_gates(scaled)) == expected


def test_nearly_equal_rows_are_told_apart():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 3))
    X = np.vstack([X, X[:5] + 1e-8 * rng.standard_normal((5, 3))])
    gates = enumerate_gates(X)
    assert len(pattern_set(X, gates)) == gates.shape[1] == count_cells_bound(X)


def test_rows_too_close_to_tell_apart_raise_instead_of_losing_cells():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 3))
    X = np.vstack([X, X[:50] * (1.0 + 3e-11 * rng.standard_normal((50, 3)))])
    with pytest.raises(CvxnnError, match="degenerate position"):
        enumerate_gates(X)


def test_inconsistent_intersections_raise():
    normals = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 2e-3], [0.2, 0.4, 1.0]])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    assert cell_points(normals, np.full(4, 1e-12)).shape == (3, 7)
    with pytest.raises(CvxnnError, match="cells found"):
        cell_points(normals, np.array([1e-12, 1e-12, 1.2e-3, 1e-12]))


def test_gates_on_a_hyperplane_are_never_returned(monkeypatch):
    def careless(normals, *others):
        points = cell_points(normals, *others)
        points[:, 0] -= normals[0] * (normals[0] @ points[:, 0])
        return points

    monkeypatch.setattr(enumeration, "cell_points", careless)
    with pytest.raises(CvxnnError, match="thinner than the rounding"):
        enumerate_gates(np.random.default_rng(0).standard_normal((6, 3)))


def test_gaps_are_outside_all_tolerances():
    angles = np.array([[1.0, 1.2, 2.0, np.inf], [0.05, 3.1, 1.0, np.inf]])
    tolerances = np.array([[0.3, 0.01, 0.0, 0.0], [0.05, 0.05, 0.0, 0.0]])
    rows, middles, sizes = _gaps(angles, tolerances)
    assert rows.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(middles, [1.65, (2.7 + np.pi) / 2, 0.55, 2.025])
    assert sizes.tolist() == [2, 1, 2, 1]


def test_opposite_cells_are_paired():
    gates = enumerate_gates(np.random.default_rng(0).standard_normal((10, 3)))
    half = gates.shape[1] // 2
    np.testing.assert_array_equal(gates[:, half:], -gates[:, :half])


def test_the_pattern_without_active_samples_is_left_to_deduplication():
    X = np.abs(np.random.default_rng(0).standard_normal((6, 2)))
    gates = enumerate_gates(X)
    patterns = activation_patterns(X, gates)
    assert (~patterns.any(axis=0)).sum() == 1
    assert len(deduplicate_gates(patterns)) == gates.shape[1] - 1 == 11


def test_enumeration_is_reproducible():
    X = np.random.default_rng(0).integers(-2, 3, size=(12, 5)).astype(float)
    np.testing.assert_array_equal(enumerate_gates(X), enumerate_gates(X.copy()))


def test_too_many_cells_are_refused_with_both_numbers():
    X = np.random.default_rng(0).standard_normal((30, 3))
    bound = 2 * (1 + 29 + 29 * 28 // 2)
    with pytest.raises(UnsupportedError, match=rf"{bound} .*max_cells is {bound - 1}; sample gates.*raise max_cells"):
        enumerate_gates(X, max_cells=bound - 1)
    assert enumerate_gates(X, max_cells=bound).shape[1] == bound


def test_default_limit_refuses_huge_arrangements_at_once():
    X = np.random.default_rng(0).standard_normal((3000, 300))
    with pytest.raises(UnsupportedError, match=rf"about 10\^\d+ .*max_cells is {DEFAULT_MAX_CELLS}"):
        enumerate_gates(X)


@pytest.mark.parametrize("max_cells", [0, 2.5, True])
def test_enumeration_names_a_bad_limit(max_cells):
    with pytest.raises(InvalidInputError, match="max_cells is"):
        enumerate_gates(np.eye(2), max_cells=max_cells)


@pytest.mark.slow
def test_rank_3_at_569_rows():
    X = np.random.default_rng(0).standard_normal((569, 3))
    assert enumerate_gates(X).shape[1] == 2 * (1 + 568 + 568 * 567 // 2)
