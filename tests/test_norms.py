"""Matrix norms against their definitions and a convex solver."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.norms import VECTOR_NORMS, get_norm
from cvxnn.norms.signs import MAX_ENUMERATED

NAMES = ("l1", "l2", "linf")
PAIRS = list(itertools.product(NAMES, repeat=2))
CLOSED = [pair for pair in PAIRS if get_norm(pair).exact]
HARD = [pair for pair in PAIRS if not get_norm(pair).exact]
SHAPES = [(5, 4, 3), (5, 3, 4), (5, 6, 1), (5, 1, 6), (3, 1, 1)]
ids = "-".join


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def unit_points(name, n, count, seed):
    z = normal(count, n, seed=seed)
    return z / VECTOR_NORMS[name].value(z)[:, None]


def extreme_points(name, n):
    if name == "l1":
        return torch.cat([torch.eye(n), -torch.eye(n)]).double()
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def brute_force_dual(pair, G):
    """Exact dual norm of one small matrix from extreme points of the unit balls (or an SVD)."""
    left, right = pair
    if pair == ("l2", "l2"):
        return torch.linalg.matrix_norm(G, 2)
    if right != "l2":
        return VECTOR_NORMS[left].dual((G @ extreme_points(right, G.shape[1]).T).T).amax()
    return VECTOR_NORMS[right].dual(extreme_points(left, G.shape[0]) @ G).amax()


# Names and attributes


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_attributes(pair):
    norm = get_norm(pair)
    assert (norm.left, norm.right) == pair
    assert norm.name == ("nuclear" if pair == ("l2", "l2") else "-".join(pair))
    assert norm.exact == norm.has_prox == ("linf" not in pair or "l1" in pair)


@pytest.mark.parametrize("norms", [("l2", "l3"), ("l2",), "l2", 3, ("l2", 2), ("l2", "l2", "l2")])
def test_unknown_names_are_listed(norms):
    with pytest.raises(InvalidInputError, match=r"norms .*'l1', 'l2', 'linf'"):
        get_norm(norms)


def test_bad_arguments():
    norm = get_norm()
    with pytest.raises(InvalidInputError, match="Z must have shape"):
        norm.value(torch.ones(2, 3))
    with pytest.raises(InvalidInputError, match="G must be a floating-point tensor"):
        norm.dual(torch.ones(2, 3, 3, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match="error must not be negative"):
        norm.dual(torch.ones(2, 3, 3), error=-1.0)
    with pytest.raises(InvalidInputError, match="error must be a number or have shape"):
        norm.dual(torch.ones(2, 3, 3), error=torch.ones(3))
    with pytest.raises(InvalidInputError, match="threshold must not be negative"):
        norm.prox(torch.ones(2, 3, 3), -1.0)
    with pytest.raises(InvalidInputError, match="threshold must be a number or have shape"):
        norm.prox(torch.ones(2, 3, 3), torch.ones(2, 1))


# Dual norms and atoms


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_dual_and_atom_against_extreme_points(pair, shape):
    norm = get_norm(pair)
    G = normal(*shape)
    lower, upper = norm.dual(G)
    expected = torch.stack([brute_force_dual(pair, g) for g in G])
    assert (lower <= expected * (1 + 1e-14)).all()
    assert (upper >= expected * (1 - 1e-14)).all()
    assert torch.allclose(lower, upper, rtol=1e-12, atol=0)
    assert torch.allclose(norm.dual_estimate(G), expected, rtol=1e-12, atol=0)
    u, v, value = norm.atom(G)
    assert torch.allclose(value, expected, rtol=1e-12, atol=0)
    assert torch.allclose(torch.einsum("ka,kab,kb->k", u, G, v), value, rtol=1e-12, atol=0)
    assert (VECTOR_NORMS[pair[0]].value(u) <= 1 + 1e-14).all()
    assert (VECTOR_NORMS[pair[1]].value(v) <= 1 + 1e-14).all()


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_sampled_pairs_never_exceed_the_upper_bound(pair):
    G = normal(1, 4, 3, seed=7)
    u, v = unit_points(pair[0], 4, 3000, 1), unit_points(pair[1], 3, 3000, 2)
    reached = torch.einsum("ia,ab,ib->i", u, G[0], v).amax()
    assert reached <= get_norm(pair).dual(G)[1]
    assert reached > 0.6 * get_norm(pair).dual(G)[0]


@pytest.mark.parametrize("shape", [(3, 9, 14), (3, 14, 9), (2, 14, 13)])
@pytest.mark.parametrize("pair", HARD, ids=ids)
def test_relaxation_encloses_the_enumerated_dual_norm(pair, shape):
    G = normal(*shape)
    G[0] *= torch.logspace(-5, 0, shape[2], dtype=torch.float64)
    G[1, 2] = 0
    lower, upper = get_norm(pair).dual(G)
    signed_columns = pair[1] == "linf" and (pair[0] == "l2" or shape[2] <= shape[1])
    sign_vectors = extreme_points("linf", shape[2] if signed_columns else shape[1])
    if signed_columns:
        expected = VECTOR_NORMS[pair[0]].dual(sign_vectors @ G.mT).amax(-1)
    else:
        expected = VECTOR_NORMS[pair[1]].dual(sign_vectors @ G).amax(-1)
    assert (lower <= expected * (1 + 1e-13)).all()
    assert (upper >= expected * (1 - 1e-13)).all()
    assert (upper <= 1.2 * lower).all()
    assert (lower >= 0.97 * expected).all()
    u, v, value = get_norm(pair).atom(G)
    assert (value <= upper).all()
    assert (value >= 0.97 * expected).all()
    assert (VECTOR_NORMS[pair[0]].value(u) <= 1 + 1e-14).all()
    assert (VECTOR_NORMS[pair[1]].value(v) <= 1 + 1e-14).all()


def test_relaxation_reaches_the_semidefinite_bound():
    cp = pytest.importorskip("cvxpy")
    G = normal(2, 5, MAX_ENUMERATED + 2)
    upper = get_norm(("l2", "linf")).dual(G)[1]
    for g, bound in zip(G.numpy(), upper, strict=True):
        y = cp.Variable(g.shape[1])
        problem = cp.Problem(cp.Minimize(cp.sum(y)), [cp.diag(y) - g.T @ g >> 0])
        problem.solve(solver=cp.CLARABEL)
        assert float(bound) == pytest.approx(math.sqrt(problem.value), rel=2e-3)


@pytest.mark.parametrize("shape", [(4, 5, 4), (4, 14, 15)])
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_error_covers_every_perturbation(pair, shape):
    norm = get_norm(pair)
    G = normal(*shape)
    error = torch.tensor([0.0, 1e-3, 0.5, 20.0], dtype=torch.float64)
    lower, upper = norm.dual(G, error=error)
    u, v, _ = norm.atom(G)
    for seed in range(5):
        E = normal(*shape, seed=seed) if seed else torch.einsum("ka,kb->kab", u, v)
        for sign in (1, -1):
            step = sign * error / torch.linalg.matrix_norm(E)
            moved_lower, moved_upper = norm.dual(G + step[:, None, None] * E)
            assert (moved_upper >= lower * (1 - 1e-14)).all()
            assert (moved_lower <= upper * (1 + 1e-14)).all()
    if norm.exact:
        atoms = torch.einsum("ka,kb->kab", u, v)
        step = error / torch.linalg.matrix_norm(atoms)
        worst = norm.dual(G + step[:, None, None] * atoms)[1]
        assert torch.allclose(worst, upper, rtol=1e-12, atol=0)


# Values


@pytest.mark.parametrize("pair", CLOSED, ids=ids)
def test_value_against_a_convex_solver(pair):
    cp = pytest.importorskip("cvxpy")
    Z = normal(1, 3, 4, seed=5)
    R = cp.Variable((3, 4))
    if pair == ("l2", "l2"):
        balls = [cp.sigma_max(R) <= 1]
    elif pair[0] == "l1":
        order = {"l1": "inf", "l2": 2, "linf": 1}[pair[1]]
        balls = [cp.norm(R[a, :], order) <= 1 for a in range(3)]
    else:
        order = {"l2": 2, "linf": 1}[pair[0]]
        balls = [cp.norm(R[:, b], order) <= 1 for b in range(4)]
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(R, Z[0].numpy()))), balls)
    problem.solve(solver=cp.CLARABEL)
    lower, upper = get_norm(pair).value(Z)
    assert lower == upper
    assert float(upper) == pytest.approx(problem.value, rel=1e-6)


@pytest.mark.parametrize("pair", HARD, ids=ids)
def test_value_bounds_enclose_the_norm_by_linear_programming(pair):
    """With extreme points of the l-infinity balls as atoms the norm is a small convex program."""
    cp = pytest.importorskip("cvxpy")
    norm = get_norm(pair)
    for seed in range(3):
        Z = normal(1, 3, 4, seed=seed)
        z = Z[0].numpy()
        if pair[1] == "linf":
            H = extreme_points("linf", 4)[:8].numpy()
            W = cp.Variable((3, 8))
            order = {"l2": 2, "linf": "inf"}[pair[0]]
            problem = cp.Problem(cp.Minimize(sum(cp.norm(W[:, j], order) for j in range(8))), [z == W @ H])
        else:
            H = extreme_points("linf", 3)[:4].numpy()
            W = cp.Variable((4, 4))
            problem = cp.Problem(cp.Minimize(sum(cp.norm(W[:, j], 2) for j in range(4))), [W @ H == z.T])
        problem.solve(solver=cp.CLARABEL)
        lower, upper = norm.value(Z)
        assert float(lower) <= problem.value * (1 + 1e-6)
        assert float(upper) >= problem.value * (1 - 1e-6)
        assert float(upper) <= 2.5 * float(lower)


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_value_of_an_atom_is_one(pair):
    u, v = unit_points(pair[0], 5, 6, 1), unit_points(pair[1], 4, 6, 2)
    lower, upper = get_norm(pair).value(torch.einsum("ka,kb->kab", u, v))
    assert (lower <= 1 + 1e-12).all()
    assert (upper >= 1 - 1e-12).all()
    assert torch.allclose(upper, torch.ones_like(upper), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    shape=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 15),
    exponent=st.integers(-20, 20),
)
def test_duality_inequality(pair, shape, seed, rank, exponent):
    p, q = shape
    norm = get_norm(pair)
    Z = normal(2, p, rank, seed=seed) @ normal(2, rank, q, seed=seed + 1) * 10.0**exponent
    G = normal(2, p, q, seed=seed + 2)
    lower, upper = norm.value(Z)
    dual_lower, dual_upper = norm.dual(G)
    assert (lower <= upper).all()
    assert (dual_lower <= dual_upper).all()
    assert ((Z * G).sum((1, 2)).abs() <= upper * dual_upper * (1 + 1e-12)).all()
    u, v, value = norm.atom(Z)
    assert (value <= norm.dual(Z)[1] * (1 + 1e-12)).all()
    assert (norm.value(torch.einsum("ka,kb->kab", u, v))[0] <= 1 + 1e-9).all()


# Proximal operators


@pytest.mark.parametrize("shape", [*SHAPES, (3, 12, 12)])
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_prox_optimality(pair, shape):
    """(Z - W) / t is a subgradient: dual norm at most 1, and <Z - W, W> = t ||W||."""
    norm = get_norm(pair)
    if not norm.has_prox and min(shape[1:]) > 1:
        with pytest.raises(UnsupportedError, match=rf"{norm.name}.*frank_wolfe"):
            norm.prox(normal(*shape), 1.0)
        return
    Z = normal(*shape, seed=3)
    for t in (0.0, 0.1, 0.7, 100.0):
        W, values = norm.prox(Z, t)
        assert W.shape == Z.shape
        assert W.is_contiguous()
        assert (norm.dual(Z - W)[1] <= t * (1 + 1e-10) + 1e-13).all()
        assert torch.allclose(((Z - W) * W).sum((1, 2)), t * values, rtol=1e-10, atol=1e-12)
        assert torch.allclose(norm.value(W)[1], values, rtol=1e-10, atol=1e-12)
    assert (W == 0).all()


@pytest.mark.parametrize("pair", CLOSED, ids=ids)
def test_prox_with_a_threshold_per_block(pair):
    norm = get_norm(pair)
    Z = normal(4, 5, 3)
    t = torch.tensor([0.0, 0.3, 1.0, 50.0], dtype=torch.float64)
    W, values = norm.prox(Z, t)
    for k in range(4):
        W_k, value_k = norm.prox(Z[k : k + 1], float(t[k]))
        assert torch.allclose(W[k], W_k[0], rtol=1e-12, atol=1e-13)
        assert torch.allclose(values[k], value_k[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-4, 3e-6, 1e-9])
@pytest.mark.parametrize("shape", [(8, 20, 6), (8, 6, 20)])
def test_nuclear_prox_keeps_small_singular_values(shape, ratio):
    """Singular values within a factor ten of the threshold survive as in an SVD, whatever the largest is."""
    U = torch.linalg.qr(normal(8, 20, 6)).Q
    V = torch.linalg.qr(normal(8, 6, 6, seed=1)).Q
    s = torch.tensor([1.0, 0.5, 10 * ratio, 3 * ratio, 1.5 * ratio, 0.5 * ratio], dtype=torch.float64)
    Z, expected = (U * s) @ V.mT, (U * (s - ratio).clamp_min(0)) @ V.mT
    if shape[1] < shape[2]:
        Z, expected = Z.mT, expected.mT
    W, values = get_norm().prox(Z, ratio)
    assert (W - expected).abs().max() <= max(1e-14, 1e-5 * ratio)
    assert torch.allclose(values, (s - ratio).clamp_min(0).sum(), rtol=1e-9)


def test_nuclear_prox_in_float32_does_not_square_the_condition_number():
    U = torch.linalg.qr(normal(8, 20, 3)).Q
    V = torch.linalg.qr(normal(8, 3, 3, seed=1)).Q
    s = torch.tensor([1.0, 2e-3, 1.1e-3], dtype=torch.float64)
    W, _ = get_norm().prox(((U * s) @ V.mT).float(), 1e-3)
    assert (W - (U * (s - 1e-3)) @ V.mT).abs().max() < 1e-6


@pytest.mark.parametrize("threshold", [1e-4, 1e-2, 0.5])
@pytest.mark.parametrize("pair", CLOSED, ids=ids)
def test_float32(pair, threshold):
    norm = get_norm(pair)
    Z = normal(6, 20, 4, dtype=torch.float32)
    W, values = norm.prox(Z, threshold)
    W_double, values_double = norm.prox(Z.double(), threshold)
    assert W.dtype == values.dtype == torch.float32
    assert (W - W_double).abs().max() < 1e-4 * max(threshold, 0.05)
    assert torch.allclose(values.double(), values_double, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("name", ["l1", "l2", "linf"])
def test_prox_of_half_the_squared_norm(name, weight):
    norm = VECTOR_NORMS[name]
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((20, 4)))
    found = norm.prox_square(z, weight)

    def objective(w):
        return weight / 2 * norm.value(w).square() + (w - z).square().sum(-1) / 2

    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            other = found + scale * torch.from_numpy(rng.standard_normal(found.shape))
            assert bool((objective(found) <= objective(other) + 1e-14).all())
