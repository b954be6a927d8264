"""``bm_projected_gd`` and ``frank_wolfe`` on ReLU problems: descent, cones, optima, checkpoints, wrong options."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.certificates import evaluate
from cvxnn.columns import Columns
from cvxnn.cones import Cones, cone_dual_norms
from cvxnn.datasets import spiral
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.solvers.base import Iterate, make_options
from cvxnn.solvers.burer_monteiro import BmProjectedGd
from cvxnn.solvers.cone_frank_wolfe import alternating_atoms, face_atoms
from cvxnn.solvers.frank_wolfe import FrankWolfe

SOLVERS = ("bm_projected_gd", "frank_wolfe")


def regression(seed=0, n=25, d=3, c=1, **options):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    Y = np.sin(2 * X @ rng.standard_normal((d, c))) + 0.3 * rng.standard_normal((n, c))
    return cvxnn.mlp_problem(X, Y, **({"activation": "relu", "n_gates": 15, "beta": 1e-2} | options)), X


def classes(c=2, **options):
    X, y = spiral(24)
    return cvxnn.mlp_problem(
        X, np.minimum(y, c - 1), **({"activation": "relu", "n_gates": 20, "beta": 1e-3} | options)
    ), X


def zoo():
    weights = np.linspace(0.1, 2.0, 25)
    return {
        "c1": regression(),
        "bias": regression(1, output_bias=True, reduction="sum", beta=0.2),
        "c3": regression(2, c=3, sample_weight=weights),
        "huber": regression(3, loss="huber", output_bias=True),
        "cross_entropy": classes(3, loss="cross_entropy", output_bias=True),
        "given": regression(4, gates=np.random.default_rng(4).standard_normal((3, 7))),
        "hidden bias": regression(5, hidden_bias=True, c=2),
        "all": classes(2, gates="enumerate", beta=1e-2),
    }


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", zoo())
def test_points_are_feasible_and_are_networks(name, solver):
    problem, X = zoo()[name]
    result = cvxnn.solve(problem, solver, tol=1e-9, max_iter=10 if solver == "bm_projected_gd" else 1, random_state=0)
    columns = Columns.from_factors(*result.factors).without_zeros()
    assert len(columns) > 0
    assert float(problem.cones.violation(columns.gate, columns.u).max()) <= 1e-10
    assert result.certificate.infeasibility <= 1e-10
    cone_model = problem.operator.apply_columns(columns) + result.intercept
    with torch.no_grad():
        network = result.network().double()(torch.from_numpy(X))
    assert float((network - cone_model).abs().max()) <= 1e-9 * float(1 + cone_model.abs().max())
    zero = cvxnn.certify(problem, factors=tuple(torch.zeros_like(part) for part in result.factors))
    assert result.certificate.primal < zero.primal
    assert result.certificate.lower_bound <= result.objective


OPTIONS = [
    {},
    {"eliminate": True},
    {"scaling": False},
    {"momentum": "heavy_ball"},
    {"momentum": "heavy_ball", "eliminate": True},
    {"momentum": "none", "eliminate": True},
    {"momentum": "none", "scaling": False, "step": 10.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["bias", "cross_entropy"])
def test_the_objective_never_rises(name, options):
    problem, _ = zoo()[name]
    solver = BmProjectedGd(problem, make_options(BmProjectedGd, options), 0.0, None, None, 0)
    solver.start(None)
    values = [solver.descent.value]
    for _ in range(60):
        solver.step()
        values.append(solver.descent.value)
        assert bool(problem.cones.contains(solver.columns.gate, solver.descent.x[0]).all())
    steps = np.diff(values)
    assert (steps <= 1e-14 * np.abs(values[:-1])).all()
    assert values[-1] < 0.9 * values[0]
    columns, intercept = solver.descent.local.point(solver.descent.x)
    point = cvxnn.certify(problem, factors=columns.factors(problem.n_gates), intercept=intercept)
    assert point.primal == pytest.approx(solver.descent.value, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [False, True])
def test_one_output_from_several_starts(seed, bias):
    problem, _ = regression(6, output_bias=bias)
    optimum = cvxnn.solve(problem, "ssnal", tol=1e-8).certificate
    result = cvxnn.solve(problem, "bm_projected_gd", tol=1e-5, max_iter=2_000, random_state=seed)
    assert result.status == "certified"
    assert result.objective == pytest.approx(optimum.primal, rel=1e-5)


@pytest.mark.parametrize("c", [1, 3])
def test_all_patterns_of_the_plane(c):
    rng = np.random.default_rng(c)
    X, Y = rng.standard_normal((15, 2)), rng.standard_normal((15, c))
    problem = cvxnn.mlp_problem(X, Y, activation="relu", gates="enumerate", beta=2e-2)
    found = [cvxnn.solve(problem, solver, tol=1e-5, max_iter=1_000, random_state=1) for solver in SOLVERS]
    assert [result.status for result in found] == ["certified", "certified"]
    assert {result.certificate.scope for result in found} == {"relu_network"}
    assert found[0].objective == pytest.approx(found[1].objective, rel=2e-5)


@pytest.mark.parametrize("options", [{}, {"atom": "faces"}, {"descent_iter": 0, "new_atoms": 3}])
def test_frank_wolfe_finds_the_optimum_of_the_convex_program(options):
    problem, _ = regression(7, output_bias=True)
    optimum = cvxnn.solve(problem, "ssnal", tol=1e-8).certificate
    tol = 1e-6 if options.get("descent_iter") is None else 1e-3
    result = cvxnn.solve(problem, "frank_wolfe", tol=tol, solver_options=options, max_iter=300)
    assert result.status == "certified"
    assert result.objective == pytest.approx(optimum.primal, rel=tol)
    assert result.Z is None


@pytest.mark.parametrize("activation", ["relu", "gated_relu"])
def test_plain_frank_wolfe_has_its_rate(activation):
    """After k steps at most 2 C / (k + 2) above the optimum, C = L (2 tau)^2 (Jaggi 2013)."""
    problem, X = regression(8, activation=activation, reduction="sum")
    problem = problem.with_beta(0.3 * problem.beta_max)
    optimum = cvxnn.solve(problem, "frank_wolfe", tol=1e-8).certificate
    solver = FrankWolfe(problem, make_options(FrankWolfe, {"variant": "plain"}), 0.0, None)
    solver.start(None)
    gaps = {}
    for k in range(1, 401):
        solver.step()
        assert len(solver.t) <= k
        point = solver.iterate()
        if k in (10, 100, 400):
            seen = evaluate(problem, None if point.factors else point.Z, factors=point.factors)
            torch.testing.assert_close(seen.outputs, solver.outputs)
            gaps[k] = seen.primal - optimum.lower_bound
    radius = float(problem.Y.square().sum()) / 2 / problem.beta
    curvature = np.linalg.norm(X, 2) ** 2 * (2 * radius) ** 2
    assert all(0 <= gap <= 2 * curvature / (k + 2) for k, gap in gaps.items())
    assert gaps[400] < gaps[10] / 5


def test_atoms_agree_with_each_other_and_with_the_bounds():
    rng = np.random.default_rng(9)
    X = torch.from_numpy(rng.standard_normal((12, 3)))
    patterns = X @ torch.from_numpy(rng.standard_normal((3, 6))) >= 0
    cones, gate = Cones(X, patterns), torch.arange(6)
    G = torch.from_numpy(rng.standard_normal((6, 3, 2)))
    bounds = cone_dual_norms(cones, gate, G)
    for search in (face_atoms, alternating_atoms):
        u, v, value = search(cones, gate, G)
        assert bool(cones.contains(gate, u).all())
        torch.testing.assert_close(value, torch.einsum("bd,bdc,bc->b", u, G, v))
        assert bool((value <= bounds.upper * (1 + 1e-12)).all())
        torch.testing.assert_close(value, bounds.upper, rtol=1e-5, atol=1e-8)


def test_faces_of_data_without_full_rank():
    rng = np.random.default_rng(10)
    X = torch.from_numpy(rng.standard_normal((8, 2)) @ rng.standard_normal((2, 4)))
    cones = Cones(X, (X @ torch.from_numpy(rng.standard_normal((4, 3))) >= 0))
    G = X.T @ torch.from_numpy(rng.standard_normal((8, 2)))
    G = G.expand(3, 4, 2).contiguous()
    _, _, value = face_atoms(cones, torch.arange(3), G)
    torch.testing.assert_close(value, cone_dual_norms(cones, torch.arange(3), G).lower, rtol=1e-9, atol=1e-9)


def counterexample(beta=0.5):
    """Section 3 of the maths: ten columns ((a, 0), v = a) with 10 a^2 = 1.5."""
    problem = cvxnn.mlp_problem(
        np.eye(2), np.array([[2.0], [-2.0]]), activation="relu", gates=np.ones((2, 1)), beta=beta, reduction="sum"
    )
    a = np.sqrt(1.5 / 10)
    U, V = torch.zeros(1, 2, 10, dtype=torch.float64), torch.full((1, 1, 10), a, dtype=torch.float64)
    U[:, 0] = a
    return problem, (U, V)


@pytest.mark.parametrize("eliminate", [False, True])
def test_a_local_minimum_that_is_not_global_is_kept(eliminate):
    problem, factors = counterexample()
    options = {"eliminate": eliminate}
    result = cvxnn.solve(problem, "bm_projected_gd", tol=1e-6, init=factors, solver_options=options)
    assert result.status == "stationary"
    assert result.objective == pytest.approx(2.875, rel=1e-12)
    assert result.certificate.stationarity <= 1e-8
    assert result.certificate.dual_norm_ratio == pytest.approx(4.0)
    assert "need not be global" in result.message
    for solver in ("frank_wolfe", "bm_projected_gd"):
        better = cvxnn.solve(problem, solver, tol=1e-6, random_state=0)
        assert better.status == "certified"
        assert better.objective == pytest.approx(1.75, rel=1e-6)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("bm_projected_gd", {}),
        ("bm_projected_gd", {"momentum": "none"}),
        ("bm_projected_gd", {"momentum": "heavy_ball", "eliminate": True}),
        ("frank_wolfe", {}),
        ("frank_wolfe", {"variant": "plain"}),
    ],
)
def test_checkpoints_go_on_to_the_same_result(solver, options, tmp_path):
    problem, _ = regression(11, c=2, d=2, output_bias=True)
    steps = 40 if solver == "bm_projected_gd" else 6
    common = {"tol": 1e-12, "random_state": 0, "solver_options": options}
    whole = cvxnn.solve(problem, solver, max_iter=steps, **common)
    file = tmp_path / "run"
    cvxnn.solve(problem, solver, max_iter=steps // 2, checkpoint=file, **common)
    rest = cvxnn.solve(problem, solver, max_iter=steps, checkpoint=file, resume=True, **common)
    assert rest.n_iter == whole.n_iter == steps
    assert rest.objective == pytest.approx(whole.objective, rel=1e-12)
    for one, other in zip(rest.factors, whole.factors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_runs_are_repeatable_and_differ_by_seed():
    problem, _ = regression(12)
    first, again, other = (
        cvxnn.solve(problem, "bm_projected_gd", tol=1e-12, max_iter=5, random_state=seed) for seed in (0, 0, 1)
    )
    assert first.objective == again.objective != other.objective


def test_rank_and_warm_starts():
    problem, _ = regression(13)
    result = cvxnn.solve(problem, "bm_projected_gd", rank=3, tol=1e-4, random_state=0, max_iter=500)
    assert result.factors[0].shape[2] == 3
    again = cvxnn.solve(problem, "bm_projected_gd", tol=1e-9, max_iter=3, init=result)
    assert again.objective <= result.objective * (1 + 1e-12)
    outside = tuple(
        torch.randn(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for part in result.factors
    )
    for solver in SOLVERS:
        repaired = cvxnn.solve(problem, solver, tol=1e-9, max_iter=2, init=outside)
        assert repaired.certificate.infeasibility <= 1e-10
    narrow = BmProjectedGd(problem, make_options(BmProjectedGd, {}), 0.0, None, 1, 0)
    narrow.start(Iterate(None, factors=result.factors))
    assert narrow.columns.counts(problem.n_gates).tolist() == [1] * problem.n_gates
    sizes = Columns.from_factors(*result.factors).sizes().view(problem.n_gates, -1).amax(1)
    kept = narrow.columns.sizes()
    assert bool(((kept - sizes).abs() <= 1e-9)[sizes > 0].all())


def test_cones_without_interior():
    """Opposite samples active together leave a ray, or nothing but zero."""
    X = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.3, 1.0]])
    patterns = np.array([[0.0], [1.0]])  # X g >= 0 holds for all: u_1 = 0, u_2 >= 0
    problem = cvxnn.mlp_problem(X, X[:, 1:], activation="relu", gates=patterns, beta=1e-3)
    for solver in SOLVERS:
        result = cvxnn.solve(problem, solver, tol=1e-6, random_state=0)
        assert result.status == "certified"
        assert float(result.factors[0][0, 0].abs().max()) <= 1e-10


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("bm_projected_gd", {"momentum": "much"}, "momentum"),
        ("bm_projected_gd", {"step": 0}, "step"),
        ("bm_projected_gd", {"step_growth": 0.5}, "step_growth"),
        ("bm_projected_gd", {"heavy_ball": 1.0}, "heavy_ball"),
        ("bm_projected_gd", {"eliminate": 3}, "eliminate"),
        ("bm_projected_gd", {"patience": 3}, "patience"),
        ("frank_wolfe", {"variant": "fancy"}, "variant"),
        ("frank_wolfe", {"atom": "best"}, "atom"),
    ],
)
def test_bad_options(solver, options, words):
    with pytest.raises(InvalidInputError, match=words):
        cvxnn.solve(regression()[0], solver, solver_options=options)


def test_other_activations_are_refused():
    with pytest.raises(UnsupportedError, match="bm_gd"):
        cvxnn.solve(regression(activation="gated_relu")[0], "bm_projected_gd")
