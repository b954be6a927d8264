"""Bounds of the dual norm over all ReLU neurons, against enumerated cells, dense directions and each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from cvxnn.errors import InvalidInputError
from cvxnn.neurons import (
    branch_and_bound,
    distinct_neurons,
    neuron_ascent,
    neuron_dual_norm,
    neuron_upper_bound,
)
from cvxnn.neurons.relaxation import Relaxation, cap_bound, halved, orthants
from cvxnn.patterns import enumerate_gates


def draw(seed, n, d, c, *, kind="normal"):
    rng = np.random.default_rng(seed)
    X, nu = rng.standard_normal((n, d)), rng.standard_normal((n, c))
    if kind == "integer":
        X, nu = np.round(X), np.round(nu)
    elif kind == "opposite":
        X[: n // 2] = -X[n - n // 2 :]
    elif kind == "low_rank":
        X = X @ np.outer(X[0], X[-1])[:d, :d]
    return torch.tensor(X), torch.tensor(nu)


def values_at(X, nu, U):
    U = U / np.maximum(np.linalg.norm(U, axis=1, keepdims=True), 1e-300)
    return np.linalg.norm(np.maximum(U @ X.numpy().T, 0) @ nu.numpy(), axis=1)


def scalar_reference(X, nu):
    """The largest norm of the projections of +-X^T D nu on the cones of all cells (c = 1)."""
    X, nu = X.numpy(), nu.numpy()[:, 0]
    best = 0.0
    for gate in enumerate_gates(X).T:
        active = X @ gate > 0
        K = np.where(active[:, None], X, -X)
        g = X.T @ (active * nu)
        best = max([best] + [nnls(K.T, -sign * g, maxiter=10_000)[1] for sign in (1, -1)])
    return best


@pytest.mark.parametrize("kind", ["normal", "integer", "opposite", "low_rank"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (6, 1), (10, 2), (9, 3), (14, 3)])
def test_exact_against_all_cells(n, d, kind):
    X, nu = draw(n + d, n, d, 1, kind=kind)
    want = scalar_reference(X, nu)
    bound = neuron_dual_norm(X, nu, tol=1e-8)
    assert bound.exact
    assert bound.lower <= want * (1 + 1e-12) + 1e-12
    assert bound.upper >= want * (1 - 1e-12)
    assert bound.lower == pytest.approx(want, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("c", [2, 3, 5])
@pytest.mark.parametrize("d", [2, 3, 4])
def test_several_outputs_against_dense_directions(d, c):
    X, nu = draw(7 * d + c, 30, d, c)
    bound = neuron_dual_norm(X, nu)
    assert bound.exact
    assert bound.upper <= bound.lower * (1 + 2e-6)
    U = np.random.default_rng(0).standard_normal((100_000, d))
    dense = values_at(X, nu, U).max()
    assert dense <= bound.upper
    assert bound.lower >= dense * (1 - 1e-12)


def test_rank_two_against_all_angles():
    X, nu = draw(3, 40, 2, 3)
    centre, width = 0.0, math.pi
    for _ in range(6):  # a kinked maximum: zoom in
        angles = centre + np.linspace(-width, width, 20_001)
        values = values_at(X, nu, np.stack([np.cos(angles), np.sin(angles)], 1))
        dense, centre, width = values.max(), angles[values.argmax()], width / 1_000
    bound = neuron_dual_norm(X, nu, tol=1e-9)
    assert dense <= bound.upper
    assert bound.upper == pytest.approx(dense, rel=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 25),
    d=st.integers(1, 5),
    c=st.integers(1, 3),
    kind=st.sampled_from(["normal", "integer", "opposite", "low_rank"]),
    max_nodes=st.sampled_from([1, 10, 100, 1_000]),
)
def test_unfinished_bounds_are_sound(seed, n, d, c, kind, max_nodes):
    X, nu = draw(seed, n, d, c, kind=kind)
    weak = torch.nn.functional.normalize(torch.ones(d, dtype=torch.float64), dim=0)
    search = branch_and_bound(X, nu, weak, max_nodes=max_nodes)
    closed = neuron_upper_bound(X, nu)
    u, _, best = neuron_ascent(X, nu, starts=16)
    rng = np.random.default_rng(seed)
    U = np.concatenate([rng.standard_normal((500, d)), u.numpy() + 0.01 * rng.standard_normal((100, d)), X.numpy()])
    found = max(best, values_at(X, nu, U).max())
    assert search.lower <= found * (1 + 1e-9) + 1e-12  # the ascent is as good as branch and bound
    assert search.upper >= found * (1 - 1e-14)
    assert closed >= found * (1 - 1e-14)


def narrow_cones(r, n_halvings, count, seed):
    cones = orthants(r, torch.zeros(1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_halvings):
        cones = halved(cones)
        cones = cones[torch.randperm(len(cones), generator=generator)[:count]]
    return cones


def points_of(cones, count, seed):
    """Unit vectors (B, count, r) of the cones, their edges among them."""
    t = torch.distributions.Dirichlet(torch.full((cones.shape[1],), 0.5, dtype=torch.float64))
    torch.manual_seed(seed)
    weights = torch.cat([torch.eye(cones.shape[1], dtype=torch.float64), t.sample((count,))])
    return torch.nn.functional.normalize(weights @ cones, dim=2)


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(("r", "n_halvings"), [(2, 3), (2, 7), (3, 6), (3, 14), (4, 16), (4, 26)])
def test_bounds_of_single_cones(r, n_halvings, c, slopes):
    X, nu = draw(r + n_halvings, 25, r, c)
    cones = narrow_cones(r, n_halvings, 48, 0)
    B = len(cones)
    points = points_of(cones, 3_000, 1)
    S = (points @ X.mT).clamp_min(0) @ nu
    for side in (1.0, -1.0) if c == 1 else (1.0,):
        reached = (side * S[:, :, 0] if c == 1 else S.norm(dim=2)).amax(1)
        for best in (0.0, 0.9 * float(reached.median())):
            rows, weights = X.expand(B, -1, -1), nu.expand(B, -1, -1)
            linear, sides = X.new_zeros(B, r, c), X.new_full((B,), side)
            terms = Relaxation(cones, rows @ cones.mT, rows, weights, linear, sides, best, 1e-13)
            bound, _, face = terms.bound()
            if slopes:
                bound = terms.with_best_slopes(face)[0]
            assert bool((bound.clamp_min(best) >= reached * (1 - 1e-13)).all())
            if n_halvings > 12 or (r, n_halvings) == (2, 7):  # and close where the cone is narrow
                scale = S.norm(dim=2).amax()
                assert float(((bound - reached).clamp_min(0) / scale)[reached > best].median()) < 0.02


@pytest.mark.parametrize(
    ("seed", "n", "r", "n_halvings"), [(59, 3, 3, 4), (24, 25, 3, 4), (56, 3, 2, 2), (16, 8, 2, 2), (6, 3, 3, 8)]
)
def test_weights_of_either_sign_are_paid_for(seed, n, r, n_halvings):
    """The bound by one linear map is too small on these where samples of mixed weights are left out."""
    X, nu = draw(seed, n, r, 3)
    cones = narrow_cones(r, n_halvings, 24, seed)
    rows, weights = X.expand(len(cones), -1, -1), nu.expand(len(cones), -1, -1)
    reached = ((points_of(cones, 400, 1) @ X.mT).clamp_min(0) @ nu).norm(dim=2).amax(1)
    for level in (0.3, 0.6, 0.9):
        best = 0.999 * float(reached.quantile(level))
        linear, side = X.new_zeros(len(cones), r, 3), X.new_ones(len(cones))
        bound = Relaxation(cones, rows @ cones.mT, rows, weights, linear, side, best, 1e-13).bound()[0]
        assert bool((bound.clamp_min(best) >= reached * (1 - 1e-13)).all())


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_linear_functions_on_cones(r):
    cones = narrow_cones(r, 2 * r, 200, 3)
    a = torch.tensor(np.random.default_rng(r).standard_normal((len(cones), r)))
    bound = cap_bound(a, cones)[0].numpy()
    for b, vertices, want in zip(bound, cones.numpy(), a.numpy(), strict=True):
        g = np.linalg.solve(vertices, want)  # a.t = g.u; the maximum is the norm of the projection of g
        best = nnls(np.linalg.inv(vertices), -g, maxiter=10_000)[1]
        assert b >= best * (1 - 1e-12) - 1e-13
        assert b <= best * (1 + 1e-9) + 1e-9 or b <= best + math.sqrt(r) * max(want.max(), 0)
    exact = [
        nnls(np.linalg.inv(v), -np.linalg.solve(v, w), maxiter=10_000)[1]
        for v, w in zip(cones.numpy(), a.numpy(), strict=True)
    ]
    assert float(np.mean(bound <= np.array(exact) * (1 + 1e-9) + 1e-9)) > 0.95


@pytest.mark.parametrize("r", [2, 3, 4])
def test_halves_cover_the_sphere(r):
    cones = orthants(r, torch.zeros(1, dtype=torch.float64))
    for _ in range(5):
        cones = halved(cones)
    U = torch.nn.functional.normalize(torch.tensor(np.random.default_rng(0).standard_normal((500, r))), dim=1)
    t = torch.linalg.solve(cones.mT[:, None], U[None, :, :, None])[..., 0]
    assert bool((t >= -1e-12).all(-1).any(0).all())
    assert bool(((cones @ cones.mT) >= 0).all())


@pytest.mark.parametrize("c", [2, 3])
def test_cover_of_directions_is_sound_and_tighter(c):
    X, nu = draw(5, 20, 3, c)
    bound = neuron_dual_norm(X, nu)
    covered = neuron_upper_bound(X, nu, cover=True)
    assert bound.lower <= covered < neuron_upper_bound(X, nu)


def test_closed_form_against_a_conic_solver():
    """The scalar bound is the optimum of its semidefinite program."""
    cvxpy = pytest.importorskip("cvxpy")
    X, nu = draw(11, 12, 3, 1)
    best = 0.0
    for sign in (1, -1):
        w = sign * nu.numpy()[:, 0]
        # the dual of the dual: concave in the second moment U of u
        u, U = cvxpy.Variable((3, 1)), cvxpy.Variable((3, 3), symmetric=True)
        value = sum(
            w_i / 2 * (cvxpy.sqrt(cvxpy.sum(cvxpy.multiply(np.outer(x, x), U))) + x @ u)
            if w_i > 0
            else w_i * cvxpy.pos(x @ u)
            for w_i, x in zip(w, X.numpy(), strict=True)
        )
        lifted = cvxpy.bmat([[np.ones((1, 1)), u.T], [u, U]])
        problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(value)), [lifted >> 0, cvxpy.trace(U) <= 1])
        best = max(best, problem.solve(solver=cvxpy.CLARABEL))
    assert neuron_upper_bound(X, nu) == pytest.approx(best, rel=1e-4)
    assert neuron_upper_bound(X, nu) >= best * (1 - 1e-7)


@pytest.mark.parametrize("c", [1, 3])
def test_witness_attains_the_lower_bound(c):
    X, nu = draw(2, 60, 4, c)
    bound = neuron_dual_norm(X, nu)
    s = (X @ bound.u).clamp_min(0) @ nu
    assert float(bound.u.norm()) == pytest.approx(1, abs=1e-14)
    assert float(bound.v.norm()) == pytest.approx(1, abs=1e-14)
    assert float(s.norm()) >= bound.lower
    assert float(s.norm()) == pytest.approx(bound.lower, rel=1e-11)
    assert float(s @ bound.v) == pytest.approx(bound.lower, rel=1e-11)


@pytest.mark.parametrize("exponents", [(-150, 0), (150, 0), (-140, 140), (120, 120), (-170, -170), (250, 250)])
def test_scales(exponents):
    X, nu = draw(4, 20, 3, 2)
    plain = neuron_dual_norm(X, nu)
    scaled = neuron_dual_norm(X * 2.0 ** exponents[0], nu * 2.0 ** exponents[1])
    factor = 2.0 ** sum(exponents)
    assert scaled.lower == pytest.approx(plain.lower * factor, rel=1e-9)
    assert scaled.upper == pytest.approx(plain.upper * factor, rel=1e-9)
    assert scaled.exact


def test_products_beyond_the_range_of_numbers():
    X, nu = draw(4, 20, 3, 2)
    tiny = neuron_dual_norm(X * 1e-200, nu * 1e-200)
    assert tiny.lower == 0 < tiny.upper
    huge = neuron_dual_norm(X * 1e200, nu * 1e200)
    assert math.isfinite(huge.lower)
    assert huge.upper == math.inf


def test_rank_is_reduced_and_the_residual_is_counted():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((50, 2)) @ rng.standard_normal((2, 40))
    X, nu = torch.tensor(low), torch.tensor(rng.standard_normal((50, 2)))
    bound = neuron_dual_norm(X, nu)
    assert bound.exact
    noisy = X + 1e-10 * torch.tensor(rng.standard_normal(X.shape))
    near = neuron_dual_norm(noisy, nu)
    assert near.exact
    change = 1e-9 * math.sqrt(40 * 50) * float(nu.norm())
    assert near.upper >= bound.lower - change
    assert near.lower <= bound.upper + change


def test_error_widens_both_bounds():
    X, nu = draw(6, 20, 3, 1)
    plain, wide = neuron_dual_norm(X, nu), neuron_dual_norm(X, nu, error=0.25)
    assert wide.lower <= plain.lower - 0.25
    assert wide.upper >= plain.upper + 0.25 - 1e-5 * plain.upper
    assert wide.lower == pytest.approx(plain.lower - 0.25, rel=1e-9)
    E = torch.tensor(np.random.default_rng(0).standard_normal(nu.shape))
    error = 0.1
    E *= error / (float(E.norm()) * float(torch.linalg.matrix_norm(X, 2)))
    moved = neuron_dual_norm(X, nu + E)
    allowed = neuron_dual_norm(X, nu, error=error)
    assert allowed.lower <= moved.lower
    assert moved.upper <= allowed.upper + 1e-5


@pytest.mark.parametrize("c", [1, 2])
def test_target_decides_the_side_early(c):
    X, nu = draw(8, 60, 4, c)
    full = neuron_dual_norm(X, nu)
    above = neuron_dual_norm(X, nu, target=full.upper * 1.1)
    assert above.upper <= full.upper * 1.1
    assert above.upper >= full.lower
    assert above.nodes < full.nodes
    below = neuron_dual_norm(X, nu, target=full.lower * 0.9)
    assert below.lower > full.lower * 0.9
    assert below.upper >= full.lower
    assert below.nodes < full.nodes


def test_neurons_of_a_network_are_starts():
    X, nu = draw(9, 40, 6, 2)
    u, v, value = neuron_ascent(X, nu)
    again = neuron_ascent(X, nu, starts=1, init=1e-200 * u[None])
    assert again[2] == pytest.approx(value, rel=1e-12)
    assert float(((X @ u).clamp_min(0) @ nu).norm()) == pytest.approx(value, rel=1e-14)
    assert float(v.norm()) == pytest.approx(1, rel=1e-14)


def test_distinct_neurons_are_sorted_and_apart():
    X, nu = draw(10, 40, 3, 1)
    found = distinct_neurons(X, nu, 4)
    assert len(found.u) == len(found.v) == len(found.value) > 1
    assert bool((found.value.diff() <= 0).all())
    assert float(torch.pdist(found.u).amin()) > 1e-3
    assert found.value.numpy() == pytest.approx(values_at(X, nu, found.u.numpy()), rel=1e-13)


def test_maximum_on_a_concave_kink():
    """(x_1.u)_+ and a heavier negative weight on (e_2.u)_+: the best u is on the hyperplane u_2 = 0."""
    X = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    nu = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    want = scalar_reference(X, nu)
    bound = neuron_dual_norm(X, nu, tol=1e-10)
    assert bound.lower == pytest.approx(want, rel=1e-11)
    assert bound.exact


def test_high_dimension_has_only_closed_forms():
    X, nu = draw(12, 80, 30, 1)
    bound = neuron_dual_norm(X, nu)
    assert bound.nodes == 0
    assert bound.lower < bound.upper < 1.5 * bound.lower


@pytest.mark.parametrize(
    ("X", "nu"),
    [(torch.zeros(3, 2), torch.ones(3, 1)), (torch.ones(3, 2), torch.zeros(3, 2)), (torch.zeros(0, 2),) * 2],
)
def test_zero(X, nu):
    bound = neuron_dual_norm(X.double(), nu.double())
    assert bound.lower == bound.upper == 0
    assert bound.exact


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"X": torch.ones(3, 2)}, "float64"),
        ({"X": np.ones((3, 2))}, "float64"),
        ({"nu": torch.ones(4, 1).double()}, "do not fit"),
        ({"nu": torch.full((3, 1), math.nan).double()}, "finite"),
        ({"init": torch.ones(1, 3).double()}, "init"),
        ({"error": -1.0}, "error"),
        ({"tol": math.nan}, "tol"),
    ],
)
def test_refusals(arguments, word):
    given = {"X": torch.ones(3, 2).double(), "nu": torch.ones(3, 1).double(), **arguments}
    with pytest.raises(InvalidInputError, match=word):
        neuron_dual_norm(given.pop("X"), given.pop("nu"), **given)
