"""Losses against their definitions: finite differences, numerical suprema, extended precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from cvxnn.errors import InvalidInputError
from cvxnn.losses import LOSSES, CrossEntropy, Huber, Logistic, Loss, Squared, get_loss

ALL = [Squared(), CrossEntropy(), Huber(), Huber(0.3), Logistic()]
ENTROPIES = [CrossEntropy(), Logistic()]
EPS = float(np.finfo(float).eps)

over_losses = pytest.mark.parametrize("loss", ALL, ids=repr)


def hard_targets(loss, rng, n, c):
    if isinstance(loss, CrossEntropy):
        return np.eye(c)[np.concatenate([np.arange(c), rng.integers(0, c, n - c)]) if n >= c else rng.integers(0, c, n)]
    if isinstance(loss, Logistic):
        Y = rng.integers(0, 2, (n, c)).astype(float)
        Y[0], Y[-1] = 0.0, 1.0
        return Y
    return rng.standard_normal((n, c))


def soft_targets(loss, rng, n, c):
    if isinstance(loss, CrossEntropy):
        return rng.dirichlet(np.full(c, 0.5), n)
    if isinstance(loss, Logistic):
        return rng.uniform(0, 1, (n, c))
    return rng.standard_normal((n, c))


def make(loss, seed=0, *, n=9, c=4, scale=1.5, soft=False, zeros=False, dtype=torch.float64):
    """Predictions, targets and weights; with ``zeros``, two samples of weight 0 and useless predictions."""
    rng = np.random.default_rng(seed)
    T = rng.standard_normal((n, c)) * scale
    Y = soft_targets(loss, rng, n, c) if soft else hard_targets(loss, rng, n, c)
    w = rng.uniform(0.2, 2.0, n)
    T, Y, w = (torch.tensor(a, dtype=dtype) for a in (T, Y, w))
    if zeros:
        w[[2, 5]] = 0
        T[2] = torch.nan
        T[5] = torch.inf
        Y[5] = torch.nan
    return T, Y, w


def inner(A, B):
    return float((A * B).sum())


cases = pytest.mark.parametrize(("soft", "zeros"), [(False, False), (True, False), (False, True)])


@over_losses
@cases
def test_gradient_matches_finite_differences(loss, soft, zeros):
    T, Y, w = make(loss, soft=soft, zeros=zeros)
    G = loss.gradient(T, Y, w)
    assert torch.isfinite(loss.value(T, Y, w))
    h = 1e-6
    for i in range(T.shape[0]):
        for k in range(T.shape[1]):
            E = torch.zeros_like(T)
            E[i, k] = h
            slope = float(loss.value(T + E, Y, w) - loss.value(T - E, Y, w)) / (2 * h)
            assert slope == pytest.approx(float(G[i, k]), abs=3e-8)


@over_losses
@cases
def test_hessian_product_matches_finite_differences(loss, soft, zeros):
    T, Y, w = make(loss, soft=soft, zeros=zeros)
    D = torch.from_numpy(np.random.default_rng(1).standard_normal((2, *T.shape)))
    found = loss.hessian_product(T, Y, w, D)
    assert found.shape == D.shape
    h = 1e-6
    for direction, product in zip(D, found, strict=True):
        slope = (loss.gradient(T + h * direction, Y, w) - loss.gradient(T - h * direction, Y, w)) / (2 * h)
        np.testing.assert_allclose(product, slope, atol=1e-8)


@over_losses
def test_smoothness_bounds_the_gradient(loss):
    ratios = []
    for seed in range(50):
        T, Y, w = make(loss, seed, scale=0.1)
        w = torch.ones_like(w)
        step = 1e-3 * torch.randn(T.shape, generator=torch.Generator().manual_seed(seed), dtype=T.dtype)
        step[:, 2:] = 0 if isinstance(loss, CrossEntropy) else step[:, 2:]
        ratios.append(float((loss.gradient(T + step, Y, w) - loss.gradient(T, Y, w)).norm() / step.norm()))
    assert max(ratios) <= loss.smoothness + 1e-9
    assert max(ratios) >= 0.3 * loss.smoothness


@over_losses
@cases
def test_fenchel_young(loss, soft, zeros):
    for seed in range(10):
        T, Y, w = make(loss, seed, soft=soft, zeros=zeros)
        other = make(loss, seed + 100)[0]
        L = loss.gradient(T, Y, w)
        clean = torch.where(w[:, None] > 0, T, 0.0)
        equality = float(loss.value(clean, Y, w) + loss.conjugate(L, Y, w)) - inner(clean, L)
        assert abs(equality) <= 1e-12
        assert float(loss.value(other, Y, w) + loss.conjugate(L, Y, w)) >= inner(other, L) - 1e-12
        half = float(loss.value(clean, Y, w) + loss.conjugate(0.5 * L, Y, w)) - 0.5 * inner(clean, L)
        assert half > 1e-3


@over_losses
@pytest.mark.parametrize("soft", [False, True])
def test_conjugate_is_the_supremum(loss, soft):
    T, Y, w = make(loss, seed=3, n=2, c=3, scale=0.7, soft=soft)
    L = loss.gradient(T, Y, w) * 0.6
    if isinstance(loss, CrossEntropy):
        assert float(loss.conjugate(L, Y, w)) < 0

    def negative(t):
        S = torch.tensor(t.reshape(2, 3))
        return float(loss.value(S, Y, w)) - inner(S, L), (loss.gradient(S, Y, w) - L).numpy().ravel()

    best = minimize(negative, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert -best.fun == pytest.approx(float(loss.conjugate(L, Y, w)), abs=1e-9)


def test_conjugate_outside_of_the_domain():
    Y = torch.eye(3, dtype=torch.float64)[:2]
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    outside = torch.zeros(2, 3, dtype=torch.float64)
    outside[0] = torch.tensor([-0.1, 0.11, -0.01])
    assert torch.isinf(CrossEntropy().conjugate(outside, Y, w))
    outside[0] = torch.tensor([-0.1, 0.1, 1e-6])
    assert torch.isinf(CrossEntropy().conjugate(outside, Y, w))
    assert torch.isinf(Logistic().conjugate(torch.full((2, 3), 1e-9, dtype=torch.float64), Y, w))
    assert torch.isinf(Huber(0.5).conjugate(torch.full((2, 3), 0.500001, dtype=torch.float64), Y, w))
    assert torch.isfinite(Huber(0.5).conjugate(torch.full((2, 3), 0.5, dtype=torch.float64), Y, w))
    for loss in ALL:
        assert torch.isinf(loss.conjugate(torch.tensor([[0.0] * 3, [-1e-9, 5e-10, 5e-10]]).double(), Y, w * 0))
        assert float(loss.conjugate(torch.zeros_like(Y), Y, w * 0)) == 0


def test_conjugate_of_tiny_duals_is_relatively_exact():
    Y, w = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    a, b = 1e-14, 3e-15
    L = torch.tensor([[a, -(a + b), b]], dtype=torch.float64)
    q, r = 2 * a, 2 * b
    expected = 0.5 * (q * math.log(q) + r * math.log(r) + (1 - (q + r)) * math.log1p(-(q + r)))
    assert float(CrossEntropy().conjugate(L, Y, w)) == pytest.approx(expected, rel=1e-13, abs=0)
    expected = 0.5 * (q * math.log(q) + (1 - q) * math.log1p(-q))
    ones = torch.ones(1, 1, dtype=torch.float64)
    assert float(Logistic().conjugate(-a * ones, ones, w)) == pytest.approx(expected, rel=1e-13, abs=0)


def test_small_losses_and_gradients_are_relatively_exact():
    T, w = torch.tensor([[60.0, 0.0, 10.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    Y = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    others = math.exp(-60) + math.exp(-50)
    assert float(CrossEntropy().value(T, Y, w)) == pytest.approx(others, rel=1e-12, abs=0)
    assert CrossEntropy().gradient(T, Y, w)[0].tolist() == pytest.approx(
        [-others, math.exp(-60), math.exp(-50)], rel=1e-12, abs=0
    )
    T, Y = torch.tensor([[40.0, -40.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert float(Logistic().value(T, Y, w)) == pytest.approx(2 * math.exp(-40), rel=1e-12, abs=0)
    assert Logistic().gradient(T, Y, w)[0].tolist() == pytest.approx([-math.exp(-40), math.exp(-40)], rel=1e-12, abs=0)


@over_losses
@cases
def test_terms_magnitude_bounds_the_conjugate(loss, soft, zeros):
    T, Y, w = make(loss, soft=soft, zeros=zeros)
    L = loss.gradient(T, Y, w)
    magnitude = float(loss.conjugate_terms_magnitude(L, Y, w))
    assert abs(float(loss.conjugate(L, Y, w))) <= magnitude < math.inf
    if isinstance(loss, Squared):
        keep = w > 0
        expected = (L.square()[keep] / (2 * w[keep, None])).sum() + (L[keep] * Y[keep]).abs().sum()
        assert magnitude == pytest.approx(float(expected), rel=1e-14)


def prox_residual(loss, S, problem, sigma):
    """Largest optimality residual of a row over the size of its terms, in extended precision."""
    T, Y, w = problem
    S, T, Y, w = (a.double().numpy().astype(np.longdouble) for a in (S, T, Y, w[:, None]))
    if isinstance(loss, CrossEntropy):
        P = np.exp(S - S.max(1, keepdims=True))
        G = Y.sum(1, keepdims=True) * P / P.sum(1, keepdims=True) - Y
    elif isinstance(loss, Logistic):
        G = 0.5 * (1 + np.tanh(0.5 * S)) - Y
    else:
        G = np.clip(S - Y, -loss.delta, loss.delta) if isinstance(loss, Huber) else S - Y
    sizes = w * (1 + np.abs(Y)) + sigma * np.maximum(np.abs(S), np.abs(T))
    return float((np.abs(w * G + sigma * (S - T)).max(1) / sizes.max(1)).max())


@over_losses
@given(
    seed=st.integers(0, 10**6),
    exponents=st.tuples(st.floats(-6, 4), st.floats(-8, 8), st.floats(-3, 3)),
    soft=st.booleans(),
    start=st.sampled_from([None, "near", "far", "nan"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_prox_is_optimal_at_every_scale(loss, seed, exponents, soft, start):
    scale, ratio, sigma = exponents
    T, Y, w = make(loss, seed, scale=1.0, soft=soft)
    T, sigma = (T * 10**scale).clamp(-1e4, 1e4), 10**sigma
    w = w * sigma * 10**ratio
    first = None
    if start is not None:
        shift = {"near": 1e-3, "far": 1e5, "nan": torch.nan}[start]
        first = loss.prox(T, Y, w, sigma) + shift * torch.sign(T)
    S = loss.prox(T, Y, w, sigma, start=first)
    assert prox_residual(loss, S, (T, Y, w), sigma) <= 1e-12


@over_losses
def test_prox_gives_moreau_pairs(loss):
    for sigma in (0.05, 1.0, 30.0):
        T, Y, w = make(loss, seed=4, scale=3.0, soft=True)
        S = loss.prox(T, Y, w, sigma)
        L = sigma * (T - S)
        L = L * min(1.0, loss.largest_scale(L, Y, w)) if isinstance(loss, Huber) else L
        if isinstance(loss, CrossEntropy):
            L = L - L.mean(1, keepdim=True)
        assert float(loss.value(S, Y, w) + loss.conjugate(L, Y, w)) - inner(S, L) == pytest.approx(0, abs=1e-11)


@over_losses
def test_prox_leaves_samples_of_weight_zero(loss):
    T, Y, w = make(loss, zeros=True)
    S = loss.prox(T, Y, w, 0.7)
    torch.testing.assert_close(S[w == 0], T[w == 0], rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(S[w > 0]).all()


@over_losses
def test_prox_in_single_precision(loss):
    for ratio in (1e-4, 1.0, 1e4):
        T, Y, w = make(loss, seed=2, scale=3.0, dtype=torch.float32)
        S = loss.prox(T, Y, w * ratio, 1.0)
        assert S.dtype == torch.float32
        assert prox_residual(loss, S, (T, Y, w * ratio), 1.0) <= 2e-6


@over_losses
def test_infimum_is_approached_and_not_passed(loss):
    T, Y, w = make(loss, soft=True)
    infimum = loss.infimum(Y, w)
    assert isinstance(infimum, float)
    best = Y.log() if isinstance(loss, CrossEntropy) else torch.logit(Y) if isinstance(loss, Logistic) else Y
    assert float(loss.value(best, Y, w)) == pytest.approx(infimum, abs=1e-13)
    assert float(loss.value(T, Y, w)) > infimum
    assert loss.infimum(make(loss)[1], w) == 0.0
    assert math.copysign(1, loss.infimum(make(loss)[1], w)) == 1


@over_losses
@cases
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_best_intercept_zeroes_the_column_sums(loss, soft, zeros, scale):
    T, Y, w = make(loss, seed=5, n=24, scale=scale, soft=soft, zeros=zeros)
    b = loss.best_intercept(T, Y, w)
    assert b.shape == (4,)
    G = loss.gradient(T + b, Y, w)
    assert float(G.sum(0).abs().max()) <= 1e-12 * (1 + scale)
    again = loss.best_intercept(T, Y, w, start=b + 0.3)
    assert float(loss.gradient(T + again, Y, w).sum(0).abs().max()) <= 1e-12 * (1 + scale)
    if isinstance(loss, CrossEntropy):
        assert abs(float(b.mean())) <= 1e-14 * (1 + scale)


@pytest.mark.parametrize("loss", ENTROPIES, ids=repr)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e4])
def test_best_intercept_without_a_minimiser(loss, scale):
    T, Y, w = make(loss, seed=6, n=20, scale=scale)
    if isinstance(loss, CrossEntropy):
        T, Y, w = T[Y[:, 1] == 0], Y[Y[:, 1] == 0], w[Y[:, 1] == 0]
    else:
        Y[:, 1] = 0
    b = loss.best_intercept(T, Y, w)
    assert torch.isfinite(b).all()
    assert float(loss.gradient(T + b, Y, w)[:, 1].abs().max()) <= 3 * EPS * (1 + scale)
    assert float(loss.value(T + b, Y, w)) <= float(loss.value(T, Y, w)) * (1 + 1e-12)
    assert torch.isfinite(loss.best_intercept(T, Y, 0 * w)).all()


@pytest.mark.parametrize("scale", [30.0, 300.0, 3000.0])
def test_best_intercept_of_far_predictions_is_good(scale):
    loss = CrossEntropy()
    T, Y, w = make(loss, seed=8, n=40, c=3, scale=scale)
    b = loss.best_intercept(T, Y, w)

    def objective(b):
        point = torch.tensor(b)
        return float(loss.value(T + point, Y, w)), loss.gradient(T + point, Y, w).sum(0).numpy()

    starts = [np.random.default_rng(k).standard_normal(3) * scale for k in range(10)]
    best = min(minimize(objective, start, jac=True, method="BFGS").fun for start in starts)
    assert float(loss.value(T + b, Y, w)) <= best * (1 + 1e-9)


@over_losses
@cases
@pytest.mark.parametrize("single", [False, True])
def test_center_dual(loss, soft, zeros, single):
    T, Y, w = make(loss, seed=7, n=30, soft=soft, zeros=zeros, dtype=torch.float32 if single else torch.float64)
    nu = loss.gradient(T, Y, w)
    centered = loss.center_dual(nu, Y, w)
    assert float(centered.sum(0).abs().max()) <= 8 * torch.finfo(T.dtype).eps * float(nu.abs().sum())
    assert (centered[w == 0] == 0).all()
    assert loss.largest_scale(centered, Y, w) >= (0.1 if isinstance(loss, Huber) else 0.99)
    assert torch.isfinite(loss.conjugate(0.1 * centered, Y, w))
    assert float(centered.norm()) >= 0.2 * float(nu.norm())


@over_losses
def test_center_dual_keeps_a_centered_gradient(loss):
    T, Y, w = make(loss, seed=9, n=30)
    T = T + loss.best_intercept(T, Y, w)
    nu = loss.gradient(T, Y, w)
    torch.testing.assert_close(loss.center_dual(nu, Y, w), nu, rtol=0, atol=1e-11)


def test_center_dual_gives_valid_bounds_and_survives_absent_classes():
    loss = CrossEntropy()
    T, Y, w = make(loss, seed=10, n=30)
    Y = torch.cat([Y, torch.zeros(30, 1, dtype=Y.dtype)], 1)
    T = torch.cat([T, torch.full((30, 1), -3.0, dtype=T.dtype)], 1)
    nu = loss.gradient(T, Y, w)
    centered = loss.center_dual(nu, Y, w)
    assert (centered[:, 4] == 0).all()
    assert float(centered.norm()) >= 0.5 * float(nu.norm())
    assert float(centered.sum(0).abs().max()) <= 1e-14
    assert loss.largest_scale(centered, Y, w) >= 1 - 1e-12
    b = loss.best_intercept(T * 0, Y, w)
    s = loss.dual_scale(centered, Y, w, 1e-9)
    assert -float(loss.conjugate(s * centered, Y, w)) <= float(loss.value(T * 0 + b, Y, w))


@given(seed=st.integers(0, 10**6), scale=st.floats(-3, 3), offset=st.floats(-8, 2), soft=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("loss", ENTROPIES, ids=repr)
def test_center_dual_stays_in_the_domain(loss, seed, scale, offset, soft):
    T, Y, w = make(loss, seed, n=12, c=3, scale=10**scale, soft=soft)
    T = T + loss.best_intercept(T, Y, w) + 10**offset * torch.tensor([1.0, -0.5, -0.5])
    nu = loss.center_dual(loss.gradient(T, Y, w), Y, w)
    assert float(nu.sum(0).abs().max()) <= 1e-14
    assert (nu[Y == 0] >= 0).all()
    s = loss.largest_scale(nu, Y, w)
    assert s >= 1 - 1e-12
    if s < math.inf:
        assert torch.isfinite(loss.conjugate(s * nu, Y, w))


@over_losses
@cases
def test_largest_scale_is_the_boundary(loss, soft, zeros):
    T, Y, w = make(loss, seed=11, soft=soft, zeros=zeros, scale=0.3)
    nu = loss.gradient(T, Y, w)
    s = loss.largest_scale(nu, Y, w)
    if isinstance(loss, Squared):
        assert s == math.inf
        return
    assert 1 - 1e-14 <= s < math.inf
    assert torch.isfinite(loss.conjugate(s * nu, Y, w))
    assert torch.isinf(loss.conjugate((1 + 1e-10) * s * nu, Y, w))


@over_losses
def test_largest_scale_special_cases(loss):
    T, Y, w = make(loss)
    nu = loss.gradient(T, Y, w)
    assert loss.largest_scale(0 * nu, Y, w) == math.inf
    assert loss.dual_scale(0 * nu, Y, w, 1.0) == 0.0
    w = w.clone()
    w[0] = 0
    assert loss.largest_scale(nu, Y, w) == 0.0
    assert loss.dual_scale(nu, Y, w, 1.0) == 0.0


def test_largest_scale_of_directions_out_of_the_domain():
    Y, w = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    nu = CrossEntropy().gradient(torch.zeros_like(Y), Y, w)
    assert CrossEntropy().largest_scale(nu, Y, w) == pytest.approx(1.5, rel=1e-14)
    assert CrossEntropy().largest_scale(nu + 1e-9, Y, w) == 0.0
    assert CrossEntropy().largest_scale(-nu, Y, w) == 0.0
    assert CrossEntropy().largest_scale(nu + 1e-17, Y, w) == pytest.approx(1.5, rel=1e-14)
    assert Logistic().largest_scale(Y - 0.5, Y, w) == 0.0
    assert Logistic().largest_scale(0.5 - Y, Y, w) == pytest.approx(2.0, rel=1e-14)


@over_losses
@cases
@pytest.mark.parametrize(("scale", "s_max"), [(a, b) for a in (0.1, 2.0, 20.0) for b in (1e-3, 0.8, 5.0, math.inf)])
def test_dual_scale_is_not_worse_than_a_grid(loss, soft, zeros, scale, s_max):
    T, Y, w = make(loss, seed=12, soft=soft, zeros=zeros, scale=scale)
    nu = loss.gradient(T, Y, w)
    s = loss.dual_scale(nu, Y, w, s_max)
    end = min(s_max, loss.largest_scale(nu, Y, w), 50.0)
    assert 0 <= s <= min(s_max, loss.largest_scale(nu, Y, w))
    values = [float(loss.conjugate(t * nu, Y, w)) for t in np.linspace(0, end, 400)]
    best = float(loss.conjugate(s * nu, Y, w))
    assert best <= min(values) + 1e-12 * (1 + abs(best))
    near = [float(loss.conjugate(t * nu, Y, w)) for t in s * (1 + np.array([-1e-4, 1e-4])) if t <= end]
    assert all(best <= value + 1e-13 * (1 + abs(best)) for value in near)


@over_losses
def test_dual_scale_is_quick_and_exact_inside(loss, monkeypatch):
    calls = []
    if loss in ENTROPIES:
        original = type(loss)._conjugate_derivatives
        monkeypatch.setattr(type(loss), "_conjugate_derivatives", lambda *args: calls.append(1) or original(*args))
    for seed in range(20):
        T, Y, w = make(loss, seed, soft=seed % 2 == 0, scale=10.0 ** (seed % 5 - 2))
        nu = loss.center_dual(loss.gradient(T, Y, w), Y, w)
        if loss in ENTROPIES and seed % 2:
            calls.clear()
            assert loss.dual_scale(nu, Y, w, 1e-9) == 1e-9
            assert len(calls) == 1
        calls.clear()
        s = loss.dual_scale(nu, Y, w, math.inf)
        assert len(calls) <= 30
        if 0 < s < 0.999 * loss.largest_scale(nu, Y, w) and loss in ENTROPIES:
            before = float(loss._conjugate_derivatives(s * (1 - 1e-9), nu, Y, w)[0])
            after = float(loss._conjugate_derivatives(s * (1 + 1e-9), nu, Y, w)[0])
            assert before < 0 < after


@over_losses
def test_integer_weights_equal_repetition(loss):
    T, Y, _ = make(loss, seed=13, n=8)
    w = torch.tensor([1.0, 2, 0, 3, 1, 1, 2, 1], dtype=torch.float64)
    index = torch.repeat_interleave(torch.arange(8), w.long())
    Tr, Yr, wr = T[index], Y[index], torch.ones(len(index), dtype=torch.float64)
    assert float(loss.value(T, Y, w)) == pytest.approx(float(loss.value(Tr, Yr, wr)), rel=1e-13)
    assert loss.infimum(Y, w) == pytest.approx(loss.infimum(Yr, wr), abs=1e-13)
    b = loss.best_intercept(T, Y, w)
    torch.testing.assert_close(b, loss.best_intercept(Tr, Yr, wr), rtol=0, atol=1e-10)
    nu, nur = loss.gradient(T, Y, w), loss.gradient(Tr, Yr, wr)
    torch.testing.assert_close((nu / w.clamp(min=1)[:, None])[index], nur)
    assert float(loss.conjugate(nu, Y, w)) == pytest.approx(float(loss.conjugate(nur, Yr, wr)), rel=1e-12)
    assert loss.largest_scale(nu, Y, w) == pytest.approx(loss.largest_scale(nur, Yr, wr), rel=1e-13)
    assert loss.dual_scale(nu, Y, w, 3.0) == pytest.approx(loss.dual_scale(nur, Yr, wr, 3.0), rel=1e-9)
    centered, repeated = loss.center_dual(nu, Y, w), loss.center_dual(nur, Yr, wr)
    torch.testing.assert_close((centered / w.clamp(min=1)[:, None])[index], repeated)


@over_losses
def test_single_precision_agrees_with_double(loss):
    T, Y, w = make(loss, seed=14)
    T32, Y32, w32 = T.float(), Y.float(), w.float()
    T, Y, w = T32.double(), Y32.double(), w32.double()
    nu, nu32 = loss.gradient(T, Y, w), loss.gradient(T32, Y32, w32)
    for single, double in [
        (loss.value(T32, Y32, w32), loss.value(T, Y, w)),
        (nu32, nu),
        (loss.conjugate(nu32, Y32, w32), loss.conjugate(nu, Y, w)),
        (loss.best_intercept(T32, Y32, w32), loss.best_intercept(T, Y, w)),
        (loss.center_dual(nu32, Y32, w32), loss.center_dual(nu, Y, w)),
    ]:
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)
    assert loss.dual_scale(nu32, Y32, w32, 0.9) == pytest.approx(loss.dual_scale(nu, Y, w, 0.9), rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "Y", "words"),
    [
        (Squared(), [[1.0, math.nan]], ["Y[0, 1]", "nan", "finite"]),
        (Huber(), [[1.0], [math.inf]], ["Y[1, 0]", "inf", "finite"]),
        (CrossEntropy(), [[1.0], [1.0]], ["1 column", "two classes"]),
        (CrossEntropy(), [[1.0, 0.0], [0.5, 0.4]], ["Y[1]", "0.9", "sum to 1"]),
        (CrossEntropy(), [[1.1, -0.1]], ["Y[0]", "-0.1", "non-negative"]),
        (Logistic(), [[0.0, 1.0], [2.0, 0.0]], ["Y[1, 0]", "2.0", "[0, 1]"]),
    ],
)
def test_check_targets_refuses(loss, Y, words):
    with pytest.raises(InvalidInputError) as error:
        loss.check_targets(torch.tensor(Y, dtype=torch.float64))
    assert all(word in str(error.value) for word in words)


@over_losses
def test_check_targets_accepts_and_refuses_shapes(loss):
    for soft in (False, True):
        loss.check_targets(make(loss, soft=soft)[1])
        loss.check_targets(make(loss, soft=soft, c=50)[1].float())
    with pytest.raises(InvalidInputError, match=r"shape \(4,\)"):
        loss.check_targets(torch.zeros(4))
    with pytest.raises(InvalidInputError, match=r"int64"):
        loss.check_targets(torch.zeros(4, 2, dtype=torch.int64))


def test_targets_that_sum_to_one_in_single_precision_stay_consistent():
    loss = CrossEntropy()
    T, Y, w = make(loss, soft=True, dtype=torch.float32)
    T, Y, w = T.double(), Y.double(), w.double()
    assert float((Y.sum(1) - 1).abs().max()) > 1e-9
    L = loss.gradient(T, Y, w)
    assert float(loss.value(T, Y, w) + loss.conjugate(L, Y, w)) - inner(T, L) == pytest.approx(0, abs=1e-12)
    centered = loss.center_dual(L, Y, w)
    assert float(centered.sum(0).abs().max()) <= 1e-14
    assert torch.isfinite(loss.conjugate(centered, Y, w))


def test_get_loss():
    assert list(LOSSES) == ["squared", "cross_entropy", "huber", "logistic"]
    for name, kind in LOSSES.items():
        assert isinstance(get_loss(name), kind)
        assert isinstance(get_loss(name), Loss)
        assert get_loss(name) == kind()
        assert hash(get_loss(name)) == hash(kind())
    assert get_loss(Huber(0.5)) == Huber(0.5) != Huber()
    assert repr(Huber(0.5)) == "Huber(delta=0.5)"
    for unknown in ("mse", None, Squared):
        with pytest.raises(InvalidInputError, match=r"'squared', 'cross_entropy', 'huber', 'logistic'"):
            get_loss(unknown)
    for delta in (0.0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(InvalidInputError, match="delta"):
            Huber(delta)
