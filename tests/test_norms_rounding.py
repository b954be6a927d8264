"""Bounds of matrix norms under rounding: exact arithmetic, extreme scales, special values, low precision."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from cvxnn.norms import VECTOR_NORMS, get_norm
from cvxnn.norms.nuclear import spectral_bounds

PAIRS = list(itertools.product(("l1", "l2", "linf"), repeat=2))
ids = "-".join


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def extreme_points(name, n):
    if name == "l1":
        return torch.cat([torch.eye(n), -torch.eye(n)]).double()
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def near_ties(count, seed):
    """Small matrices with repeated or nearly repeated top singular values, some badly scaled."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        p, q = rng.integers(2, 7, size=2)
        r = min(p, q)
        U = np.linalg.qr(rng.normal(size=(p, r)))[0]
        V = np.linalg.qr(rng.normal(size=(q, r)))[0]
        s = np.ones(r)
        kind = k % 4
        if kind == 1:
            s -= 1e-13 * rng.random(r)
        elif kind == 2:
            s = 10.0 ** -np.sort(12 * rng.random(r))
        G = (U * s) @ V.T
        if kind == 3:
            G = G * 10.0 ** rng.uniform(-8, 8, size=(p, 1))
        yield G * 10.0 ** rng.uniform(-3, 3)


def exact_spectral_norm(G):
    with mpmath.workdps(60):
        M = mpmath.matrix(G.tolist())
        gram = M.T * M if G.shape[0] >= G.shape[1] else M * M.T
        return mpmath.sqrt(max(mpmath.eigsy(gram, eigvals_only=True)))


def test_spectral_bounds_hold_in_exact_arithmetic():
    norm = get_norm()
    for G in near_ties(400, seed=0):
        lower, upper = norm.dual(torch.from_numpy(G)[None])
        exact = exact_spectral_norm(G)
        assert mpmath.mpf(float(lower)) <= exact <= mpmath.mpf(float(upper))
        assert float(upper) <= float(exact) * (1 + 1e-10)
        assert float(lower) >= float(exact) * (1 - 1e-10)


def test_spectral_bounds_hold_for_thousands_of_known_norms():
    """Scaled orthogonal integer matrices: H diag(s) with Hadamard H has columns of exact norm s sqrt(n)."""
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    generator = torch.Generator().manual_seed(3)
    s = 1 - 2.0**-45 * torch.randint(0, 4, (4000, 16), generator=generator).double()
    G = H * s[:, None, :]
    lower, upper = get_norm().dual(G)
    exact = 4 * s.amax(-1)
    assert (lower <= exact).all()
    assert (upper >= exact).all()
    assert (upper <= exact * (1 + 1e-12)).all()
    lower, upper = spectral_bounds(G.mT.contiguous())
    assert ((lower <= exact) & (upper >= exact)).all()


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_dual_bounds_hold_in_exact_arithmetic(pair):
    """Every closed form and every enumeration, evaluated with 60 digits, lies within the bounds."""
    norm = get_norm(pair)
    G = normal(40, 3, 4, seed=11) * torch.logspace(-9, 9, 40, dtype=torch.float64)[:, None, None]
    G[20:] *= torch.logspace(-6, 0, 4, dtype=torch.float64)
    lower, upper = norm.dual(G)
    for g, low, up in zip(G.numpy(), lower.tolist(), upper.tolist(), strict=True):
        with mpmath.workdps(60):
            exact = exact_dual(pair, mpmath.matrix(g.tolist()))
            assert mpmath.mpf(low) <= exact <= mpmath.mpf(up)
        assert up - low <= 1e-12 * up


@pytest.mark.parametrize("shape", [(2, 3000, 1), (2, 1, 3000), (2, 3000, 2), (2, 2, 3000)])
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_bounds_allow_for_any_order_of_summation(pair, shape):
    norm = get_norm(pair)
    G = 0.5 + torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    lower, upper = norm.dual(G)
    flat = VECTOR_NORMS[pair[0 if shape[1] > shape[2] else 1]]
    if flat.name != "l1":
        assert (upper - lower >= 3000 * 2.0**-53 * upper).all()
    assert (upper - lower <= 1e-10 * upper).all() or (min(shape[1:]) > 1 and not norm.exact)


def exact_dual(pair, g):
    left, right = pair
    if pair == ("l2", "l2"):
        return mpmath.sqrt(max(mpmath.eigsy(g * g.T, eigvals_only=True)))
    if right == "l2":
        return exact_dual((right, left), g.T)
    order = {"l1": mpmath.inf, "l2": 2, "linf": 1}[left]
    points = extreme_points(right, g.cols).tolist()
    return max(mpmath.norm(g * mpmath.matrix(point), order) for point in points)


@pytest.mark.parametrize("scale", [1e-200, 1e-150, 1e150, 1e200])
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_extreme_scales(pair, scale):
    norm = get_norm(pair)
    G = normal(3, 4, 3)
    for function in (norm.value, norm.dual):
        for bound, scaled in zip(function(G), function(G * scale), strict=True):
            assert torch.allclose(bound, scaled / scale, rtol=1e-12, atol=0)
    assert torch.allclose(norm.atom(G)[2], norm.atom(G * scale)[2] / scale, rtol=1e-12, atol=0)
    assert torch.allclose(norm.dual_estimate(G), norm.dual_estimate(G * scale) / scale, rtol=1e-12, atol=0)
    if norm.has_prox:
        W, values = norm.prox(G, 0.5)
        W_scaled, values_scaled = norm.prox(G * scale, 0.5 * scale)
        assert torch.allclose(W_scaled / scale, W, rtol=1e-9, atol=1e-12)
        assert torch.allclose(values_scaled / scale, values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_blocks_of_zeros_tiny_huge_and_non_finite_entries(pair):
    norm = get_norm(pair)
    G = normal(6, 4, 3)
    G[0] = 0
    G[1] = 5e-324
    G[2] = 1.7e308
    G[3, 1, 1] = math.inf
    G[4, 1, 1] = math.nan
    lower, upper = norm.dual(G)
    assert lower[0] == upper[0] == 0
    assert lower[1] <= 5e-324 <= upper[1] < 1e-300
    assert lower[2] >= 1.6e308
    assert upper[2] >= 1.7e308
    assert (lower[3:5] == 0).all()
    assert (upper[3:5] == math.inf).all()
    assert torch.equal(upper[5], norm.dual(G[5:])[1][0])
    least, value = norm.value(G)
    assert least[0] == value[0] == 0
    assert value[3:5].isnan().all()
    assert torch.allclose(value[5], norm.value(G[5:])[1][0])
    u, v, reached = norm.atom(G[:1])
    assert reached == 0
    assert u.isfinite().all()
    assert v.isfinite().all()
    if norm.has_prox:
        W, values = norm.prox(G, 1.0)
        assert (W[0] == 0).all()
        assert values[3:5].isnan().all()
        assert W[4].isnan().any()
        assert torch.allclose(W[5], norm.prox(G[5:], 1.0)[0][0])


@pytest.mark.parametrize("shape", [(0, 4, 3), (0, 14, 15), (0, 4, 1)])
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_no_blocks(pair, shape):
    norm = get_norm(pair)
    Z = normal(*shape)
    results = [*norm.value(Z), *norm.dual(Z), norm.dual_estimate(Z), *norm.atom(Z)]
    results += norm.prox(Z, 1.0) if norm.has_prox else ()
    assert all(result.shape[0] == 0 for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_dual_of_lower_precision_is_rounded_outwards(pair, dtype):
    norm = get_norm(pair)
    G = normal(30, 4, 3, dtype=dtype)
    lower, upper = norm.dual(G)
    lower_double, upper_double = norm.dual(G.double())
    assert lower.dtype == upper.dtype == dtype
    assert (lower.double() <= lower_double).all()
    assert (upper.double() >= upper_double).all()
    assert (upper.double() <= upper_double * (1 + 4 * torch.finfo(dtype).eps)).all()
