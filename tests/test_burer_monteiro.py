"""Solvers on factors: curvature models, every solver on every loss, memory, ranks, warm starts, checkpoints."""

import re

import numpy as np
import pytest
import torch

import cvxnn
import cvxnn.operators.base as operator_base
from cvxnn.columns import Columns
from cvxnn.datasets import spiral
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.factored import FactoredLoss
from cvxnn.files import read_tensors
from cvxnn.operators import MLPOperator
from cvxnn.solvers.api import SOLVERS
from cvxnn.solvers.base import Iterate, make_options
from cvxnn.solvers.burer_monteiro.eliminated import Eliminated
from cvxnn.solvers.burer_monteiro.grams import WhitenedGrams
from cvxnn.solvers.burer_monteiro.joint import Joint
from cvxnn.solvers.burer_monteiro.newton import newton
from tests.helpers import LOSSES, NORMS, make_data, make_problem

DESCENT = ("bm_gd", "bm_sgd", "bm_noisy_gd")
SMOOTH = ("bm_precgd", "bm_lbfgs", "bm_global")
ALL = (*DESCENT, *SMOOTH)
#: Iterations that lower the objective clearly, and take little time.
SHORT = {"bm_gd": 60, "bm_sgd": 10, "bm_noisy_gd": 100, "bm_precgd": 40, "bm_lbfgs": 1, "bm_global": 30}
#: The paper's step of 1.0 is for its data; these problems need a shorter one.
OPTIONS = {"bm_gd": {"step": 0.2}, "bm_sgd": {"batch_size": 8}, "bm_lbfgs": {"inner_iter": 40}}


def run(problem, solver, rank=2, tol=1e-6, **arguments):
    settings = {"random_state": 0, "max_iter": SHORT[solver], "solver_options": OPTIONS.get(solver)} | arguments
    return cvxnn.solve(problem, solver, rank=rank, tol=tol, **settings)


def at_zero(problem):
    return problem.objective(torch.zeros(problem.operator.block_shape, dtype=torch.float64))


def check(result, rank=None):
    """The result is a lowered, balanced point with a certificate of exactly this point."""
    problem = result.problem
    n_gates, p, q = problem.operator.block_shape
    U, V = result.factors
    assert result.Z is None
    assert U.shape == (n_gates, p, U.shape[2])
    assert V.shape == (n_gates, q, U.shape[2])
    if rank is not None:
        assert U.shape[2] == rank
    again = cvxnn.certify(problem, factors=(U, V), intercept=result.intercept, dual=result.dual)
    assert again == result.certificate
    assert result.objective == again.primal < at_zero(problem)
    order = {"l1": 1, "l2": 2, "linf": np.inf}
    left = torch.linalg.vector_norm(U, order[problem.norm.left], dim=1)
    right = torch.linalg.vector_norm(V, order[problem.norm.right], dim=1)
    accuracy = 1e-5 if U.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(left, right, rtol=accuracy, atol=accuracy * float(left.max()))


# Curvature models


CASES = {
    "eliminated": (Eliminated, "squared", 40),
    "eliminated-few-samples": (Eliminated, "squared", 8),
    "squared": (Joint, "squared", 12),
    "cross_entropy": (Joint, "cross_entropy", 12),
    "huber": (Joint, "huber", 12),
    "logistic": (Joint, "logistic", 12),
}


class Local:
    """A local problem with ten columns in five gates, as a function of one vector."""

    def __init__(self, case, beta, output_bias, seed=0):
        self.kind, loss, n = CASES[case]
        weights = np.random.default_rng(seed).random(n) + 0.1
        weights[-1] = 0
        self.problem = make_problem(loss, n=n, beta=beta, output_bias=output_bias, sample_weight=weights, seed=seed)
        self.loss = FactoredLoss(self.problem, double=True)
        n_gates, p, q = self.problem.operator.block_shape
        assert n_gates == 5
        gate = torch.tensor([0, 4, 0, 1, 2, 3, 3, 4, 4, 2])
        rng = np.random.default_rng(seed + 1)
        u, v, b = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((10, p), (10, q), (q,)))
        self.columns = Columns(gate, u, v)
        self.local = self.kind(self.problem, self.loss, self.columns, lambda: WhitenedGrams(self.loss))
        self.parts = self.local.variables(self.columns, b * output_bias)
        self.x = torch.cat([part.flatten() for part in self.parts])
        self.units = torch.eye(len(self.x), dtype=torch.float64)

    def split(self, x):
        sizes = [part.numel() for part in self.parts]
        return [piece.view_as(part) for piece, part in zip(x.split(sizes), self.parts, strict=True)]

    def evaluate(self, x):
        value, slopes = self.local.evaluate(self.split(x))
        return value, torch.cat([slope.flatten() for slope in slopes])

    def curvature(self, dense):
        self.evaluate(self.x)
        return self.local.curvature(self.parts, dense)

    def differences(self, which, h=1e-6):
        """Central differences of the value (0) or of the gradient (1)."""
        rows = []
        for unit in self.units:
            ahead, behind = (self.evaluate(self.x + sign * h * unit)[which] for sign in (1, -1))
            rows.append(torch.as_tensor((ahead - behind) / (2 * h)))
        return torch.stack(rows)

    def variables_of(self, column):
        """Indices of the variables of one column."""
        p, q = self.columns.u.shape[1], self.columns.v.shape[1]
        left = torch.arange(p) + column * p
        if self.kind is Eliminated:
            return left
        return torch.cat([left, torch.arange(q) + len(self.columns) * p + column * q])


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_local_problems(case, output_bias):
    at = Local(case, 1e-2, output_bias)
    assert len(at.x) == at.local.n_variables
    assert getattr(at.local, "samples_side", False) == (case == "eliminated-few-samples")
    value, slope = at.evaluate(at.x)
    assert relative(slope, at.differences(0)) < 1e-6
    columns, b = at.local.point(at.parts)
    U, V = columns.factors(5)
    seen = cvxnn.certify(at.problem, factors=(U, V), intercept=b)
    assert seen.primal == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", [40, 8])
def test_eliminated_variables_are_optimal(n, output_bias):
    at = Local("eliminated" if n == 40 else "eliminated-few-samples", 1e-2, output_bias)
    columns, b = at.local.point(at.parts)
    slopes = at.loss.slopes(columns, b)
    assert relative(slopes.right, -1e-2 * columns.v) < 1e-8
    assert float(slopes.intercept.abs().max()) < 1e-10


@pytest.mark.parametrize("beta", [1e-2, 100.0])
@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_curvature_models(case, output_bias, beta, monkeypatch):
    at = Local(case, beta, output_bias)
    dense, free = at.curvature(True), at.curvature(False)
    H = torch.stack([free.product(unit) for unit in at.units])
    metric = torch.stack([free.metric(unit) for unit in at.units])
    assert relative(dense.H, H) < 1e-9
    if at.kind is Joint or not output_bias:
        assert relative(dense.metric, metric) < 1e-9
    else:
        # The matrices of the gates are centred in the dense one only, which makes them smaller.
        assert float(torch.linalg.eigvalsh(metric - dense.metric)[0]) > -1e-9 * float(metric.max())
    inverse = torch.stack([free.precondition(unit, 0.3) for unit in at.units])
    torch.testing.assert_close(inverse @ (1.3 * metric), at.units, rtol=0, atol=1e-8)
    monkeypatch.setattr(operator_base, "BATCH_BYTES", 300)
    batched = Local(case, beta, output_bias).curvature(False)
    torch.testing.assert_close(torch.stack([batched.product(unit) for unit in at.units]), H, rtol=1e-9, atol=1e-10)
    monkeypatch.undo()

    true = at.differences(1)
    scale = float(true.abs().max())
    assert relative(true, true.T) < 1e-5
    values = torch.linalg.eigvalsh((H + H.T) / 2)
    assert float(values[0]) > -1e-9 * scale
    violated = max(certificate_ratios(at)) > 1
    assert violated == (beta < 1)
    if not violated:
        assert relative(H, true) < 1e-6
        return
    assert float(torch.linalg.eigvalsh((true + true.T) / 2)[0]) < -1e-3 * float(values[-1])
    rest = H - true
    for column in range(len(at.columns)):
        index = at.variables_of(column)
        block = rest[index.unsqueeze(1), index]
        assert float(torch.linalg.eigvalsh((block + block.T) / 2)[0]) > -1e-6 * scale
        rest[index.unsqueeze(1), index] = 0
    assert float(rest.abs().max()) < 1e-6 * scale


def certificate_ratios(at):
    columns, b = at.local.point(at.parts)
    return cvxnn.certify(at.problem, factors=columns.factors(5), intercept=b).gate_ratios


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_conjugate_gradients_solve_for_the_step(case, damping):
    at = Local(case, 1e-1, True)
    dense, free = at.curvature(True), at.curvature(False)
    _, slope = at.evaluate(at.x)
    metric = torch.stack([free.metric(unit) for unit in at.units])
    weighted = torch.linalg.inv((1 + damping) * metric)

    def residual(x, metric):
        rest = dense.H @ x + damping * (metric @ x) + slope
        return float((rest @ weighted @ rest) / (slope @ weighted @ slope)) ** 0.5

    step, curved = free.step(slope, damping)
    assert residual(step, metric) <= 0.1 * (1 + 1e-6)
    assert relative(curved, dense.H @ step) < 1e-7
    free.limit, free.accuracy = 2000, 1e-9
    assert residual(free.step(slope, damping)[0], metric) < 1e-8
    if damping:
        step, curved = dense.step(slope, damping)
        assert residual(step, dense.metric) < 1e-9
        assert relative(curved, dense.H @ step) < 1e-12


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "cg"])
@pytest.mark.parametrize("case", CASES)
def test_newton_ends_at_a_stationary_point(case, dense):
    at = Local(case, 1e-2, True)
    before, _ = at.evaluate(at.x)
    values = [before]
    for limit in (1, 5):
        values.append(newton(at.local, at.parts, limit, 1e-3, 1e-9, dense).value)
    assert values[2] < values[1] < values[0]
    found = newton(at.local, at.parts, 200, 1e-3, 1e-7, dense)
    assert found.value <= values[2]
    assert not found.stuck
    assert found.n_iter < 200
    value, slopes = at.local.evaluate(found.parts)
    assert value == pytest.approx(found.value, rel=1e-12)
    length = float(torch.cat([part.flatten() for part in found.parts]).norm())
    assert float(torch.cat([part.flatten() for part in slopes]).norm()) <= 1e-7 * 1e-2 * length * (1 + 1e-6)


# Every solver on every loss


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solver", ALL)
def test_solvers_run_on_every_loss(solver, loss, output_bias):
    problem = make_problem(loss, output_bias=output_bias)
    result = run(problem, solver)
    check(result, None if solver == "bm_global" else 2)
    assert (result.solver, result.problem) == (solver, problem)
    assert result.intercept.any() == output_bias
    if solver == "bm_global":
        assert result.status == "certified"


@pytest.fixture(scope="module")
def solved():
    """Problems with their optima, by ADMM."""
    kept = {}

    def of(**options):
        key = tuple(sorted(options.items()))
        if key not in kept:
            problem = make_problem(**options)
            kept[key] = problem, cvxnn.solve(problem, "admm", tol=1e-8, max_iter=50_000)
            assert kept[key][1].status == "certified"
        return kept[key]

    return of


@pytest.mark.parametrize("rank", [None, 1, 2, 5])
@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("loss", LOSSES)
def test_bm_global_finds_the_optimum_from_any_rank(solved, loss, output_bias, rank):
    problem, optimum = solved(loss=loss, output_bias=output_bias)
    result = run(problem, "bm_global", rank)
    check(result)
    assert result.status == "certified"
    assert result.certificate.relative_gap <= 1e-6
    assert result.objective == pytest.approx(optimum.objective, rel=2e-6)


METHODS = {
    "newton": ({"local": "newton"}, 1e-6),
    "newton-cg": ({"local": "newton_cg"}, 1e-6),
    "joint": ({"eliminate": False}, 1e-6),
    "joint-cg": ({"eliminate": False, "local": "newton_cg"}, 1e-6),
    "lbfgs": ({"local": "lbfgs"}, 1e-4),
    "lbfgs-plain": ({"local": "lbfgs", "whiten": False, "history": 10}, 1e-4),
    "one-column": ({"new_columns": 1}, 1e-6),
    "proximal": ({"escape": "proximal"}, 1e-3),
    "proximal-lbfgs": ({"escape": "proximal", "local": "lbfgs"}, 1e-3),
}


@pytest.mark.parametrize(("options", "tol"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_bm_global_finds_the_optimum_by_any_method(solved, loss, options, tol):
    problem, optimum = solved(loss=loss, output_bias=True)
    result = run(problem, "bm_global", None, tol, max_iter=500, solver_options=options)
    check(result)
    assert result.status == "certified"
    assert result.objective == pytest.approx(optimum.objective, rel=2 * tol)


@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("solver", DESCENT)
def test_gradient_solvers_serve_every_norm(solver, norms):
    check(run(make_problem("huber", norms=norms), solver), 2)


@pytest.mark.parametrize("norms", [("linf", "l1"), ("l1", "l2")], ids="-".join)
def test_gradient_solvers_with_other_norms_stay_above_the_bound(norms):
    """They may end at a local minimum, but never below what Frank-Wolfe proves, and not far above."""
    problem = make_problem(norms=norms)
    result = run(problem, "bm_noisy_gd", 3, 1e-2, max_iter=1000)
    best = cvxnn.solve(problem, "frank_wolfe", tol=1e-2, max_iter=500)
    assert best.status == "certified"
    assert best.certificate.lower_bound <= result.objective <= best.objective * 1.4
    assert result.certificate.lower_bound <= best.objective


@pytest.mark.parametrize("norms", [norms for norms in NORMS if norms != ("l2", "l2")], ids="-".join)
@pytest.mark.parametrize("solver", SMOOTH)
def test_smooth_solvers_refuse_other_norms(solver, norms):
    message = f"'{solver}' cannot serve this problem: {solver} needs norms=('l2', 'l2'), whose penalty is smooth, not "
    with pytest.raises(UnsupportedError, match=re.escape(message + f"('{norms[0]}', '{norms[1]}')")):
        run(make_problem(norms=norms), solver)


KINDS = {
    "linear": {"activation": "linear"},
    "float32": {"dtype": "float32", "loss": "cross_entropy", "output_bias": True},
    "weights": {"sample_weight": np.arange(24) % 3, "output_bias": True},
    "wide": {"n": 8, "d": 20},
    "one-output": {"c": 1},
    "one-feature": {"d": 1, "c": 3},
    "sum": {"reduction": "sum", "beta": 0.5},
    "hidden-bias": {"hidden_bias": True, "loss": "logistic"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ALL)
def test_kinds_of_problems(solver, kind):
    problem = make_problem(**KINDS[kind])
    options = {"solver_options": {"step": 0.005}} if (solver, kind) == ("bm_gd", "sum") else {}
    result = run(problem, solver, tol=1e-4, **options)
    check(result)
    if solver == "bm_global":
        assert result.status == "certified"
        best = cvxnn.solve(problem, "admm", tol=1e-5)
        assert result.objective == pytest.approx(best.objective, rel=1.2e-4)


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("solver", ALL)
def test_one_and_two_samples(solver, n, output_bias):
    X, Y, _ = make_data()
    problem = cvxnn.mlp_problem(X[:n], Y[:n], n_gates=4, beta=1e-2, output_bias=output_bias)
    result = run(problem, solver, tol=1e-4)
    assert result.objective <= at_zero(problem)
    assert np.isfinite(result.certificate.primal)
    if solver == "bm_global":
        assert result.status == "certified"


@pytest.mark.parametrize("solver", ALL)
def test_duplicate_rows(solver):
    X, Y, _ = make_data(n=6)
    gates = np.random.default_rng(0).standard_normal((3, 4))
    problem = cvxnn.mlp_problem(np.repeat(X, 4, 0), np.repeat(Y, 4, 0), gates=gates, beta=1e-2)
    result = run(problem, solver, tol=1e-4)
    check(result)
    single = cvxnn.mlp_problem(X, Y, gates=gates, beta=1e-2)
    again = cvxnn.certify(single, factors=result.factors, dual=None)
    assert again.primal == pytest.approx(result.objective, rel=1e-10)


@pytest.mark.parametrize("solver", ALL)
def test_zero_is_certified_without_a_step(solver):
    problem = make_problem()
    result = run(problem.with_beta(1.01 * problem.beta_max), solver)
    assert (result.status, result.n_iter) == ("certified", 0)
    assert not result.factors[0].any()


@pytest.mark.parametrize("solver", ALL)
def test_targets_of_zero(solver):
    X, Y, _ = make_data()
    result = run(cvxnn.mlp_problem(X, 0 * Y, n_gates=4), solver)
    assert (result.status, result.objective) == ("certified", 0.0)


# Memory


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("solver", ALL)
def test_all_blocks_are_never_formed(solver, loss, monkeypatch):
    problem = make_problem(loss, output_bias=True)
    expected = run(problem, solver)
    monkeypatch.setattr(operator_base, "BLOCK_BYTES", 1)

    def refuse(*_):
        raise AssertionError("the blocks of all gates are formed")

    monkeypatch.setattr(MLPOperator, "adjoint", refuse)
    monkeypatch.setattr(MLPOperator, "apply", refuse)
    result = run(problem, solver)
    check_again = cvxnn.certify(problem, factors=result.factors, intercept=result.intercept, dual=result.dual)
    assert check_again == result.certificate
    assert result.status == expected.status
    assert result.objective == pytest.approx(expected.objective, rel=1e-6)
    monkeypatch.undo()
    check(result)


# Ranks and what is said about them


def rank_two_problem(beta=1e-2):
    """A linear network whose optimum has rank 2."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 4))
    Y = X @ rng.standard_normal((4, 2)) @ rng.standard_normal((2, 3))
    return cvxnn.mlp_problem(X, Y, activation="linear", beta=beta)


def test_a_rank_that_is_too_small_is_named():
    problem = rank_two_problem()
    low = cvxnn.solve(problem, "bm_lbfgs", rank=1, tol=1e-8, random_state=0)
    assert low.status == "stationary"
    assert re.match(r"stationary at rank 1, which is too small: gate 0 has \|\|G_k\|\| = .* beta", low.message)
    assert "bm_global" in low.message
    assert low.certificate.dual_norm_ratio > 2
    enough = cvxnn.solve(problem, "bm_lbfgs", rank=2, tol=1e-7, random_state=0)
    assert (enough.status, enough.message) == ("certified", "")
    grown = cvxnn.solve(problem, "bm_global", rank=1, tol=1e-8, random_state=0)
    assert grown.status == "certified"
    assert grown.objective == pytest.approx(enough.objective, rel=2e-7)
    assert grown.objective < 0.5 * low.objective


def test_a_rank_that_is_too_small_is_named_where_beta_is_small():
    low = cvxnn.solve(rank_two_problem(1e-3), "bm_lbfgs", rank=1, tol=1e-8, random_state=0)
    assert low.certificate.dual_norm_ratio > 1000
    assert low.certificate.stationarity < 1e-5
    assert "rank 1, which is too small" in low.message


def test_saddle_points_are_named_and_left():
    """Factors with a free column in a violated gate: gradients stay zero in it, but not those of a warm start."""
    problem = rank_two_problem()
    low = cvxnn.solve(problem, "bm_lbfgs", rank=1, tol=1e-10, random_state=0)
    saddle = tuple(torch.cat([part, torch.zeros_like(part)], 2) for part in low.factors)
    solver = SOLVERS["bm_lbfgs"](problem, make_options(SOLVERS["bm_lbfgs"], None), 1e-8, None, 2, 0)
    solver.columns = Columns.from_factors(*saddle)
    assert "saddle point" in solver.message(low.certificate)
    assert "rank 1 of 2" in solver.message(low.certificate)
    for name in ("bm_lbfgs", "bm_noisy_gd"):
        left = cvxnn.solve(problem, name, rank=2, tol=1e-4, init=saddle, random_state=0, max_iter=5000)
        assert left.status == "certified"


def test_a_point_that_is_not_stationary_is_not_blamed_on_the_rank():
    problem = rank_two_problem()
    kind = SOLVERS["bm_precgd"]
    solver = kind(problem, make_options(kind, None), 1e-8, None, 2, 0)
    solver.start(None)
    certificate = cvxnn.certify(problem, factors=solver.iterate().factors)
    assert "not the rank" in solver.message(certificate)


def test_the_default_rank_leaves_no_spurious_minima():
    X, Y = (np.random.default_rng(0).standard_normal((5, size)) for size in (30, 20))
    wide = cvxnn.mlp_problem(X, Y, n_gates=2)
    for problem, expected in ((make_problem(), 2), (wide, 10)):
        check(run(problem, "bm_lbfgs", None, max_iter=1), expected)


# Warm starts


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("form", ["admm", "bm", "factors", "blocks"])
def test_warm_starts(solved, solver, form):
    problem, optimum = solved(loss="squared", output_bias=True)
    best = cvxnn.solve(problem, "bm_global", tol=1e-7)
    init = {"admm": optimum, "bm": best, "factors": best.factors, "blocks": optimum.Z}[form]
    # Blocks come without a dual point, so that less is known about them.
    again = run(problem, solver, tol=1e-3 if form == "blocks" else 1e-6, init=init)
    assert (again.status, again.n_iter) == ("certified", 0)
    near = problem.with_beta(0.98 * problem.beta)
    warm = run(near, solver, tol=1e-7, init=init)
    check(warm)
    assert warm.n_iter > 0
    assert warm.objective < near.objective(optimum.Z) * (1 + 1e-9)


@pytest.mark.parametrize("solver", ["admm", "fista", "frank_wolfe"])
def test_convex_solvers_start_from_factors(solver):
    problem = make_problem("cross_entropy", output_bias=True)
    best = cvxnn.solve(problem, "bm_global", tol=1e-7)
    again = cvxnn.solve(problem, solver, tol=1e-6, init=best)
    assert (again.status, again.n_iter) == ("certified", 0)
    torch.testing.assert_close(again.Z, best.factors[0] @ best.factors[1].mT)
    near = problem.with_beta(0.9 * problem.beta)
    warm = cvxnn.solve(near, solver, tol=1e-2, init=best)
    assert warm.status == "certified"


def test_factors_of_another_rank_are_truncated_or_filled_up():
    problem = make_problem(d=4, c=3)
    kind = SOLVERS["bm_gd"]
    rng = np.random.default_rng(0)
    U, V = (torch.from_numpy(rng.standard_normal((5, size, 3))) for size in (4, 3))
    for rank in (1, 2, 3, 5):
        solver = kind(problem, make_options(kind, None), 1e-6, None, rank, 0)
        solver.start(Iterate(None, factors=(U, V)))
        assert solver.columns.gate.tolist() == [gate for gate in range(5) for _ in range(rank)]
        left, right = solver.columns.factors(5)
        u, s, vt = torch.linalg.svd(U @ V.mT, full_matrices=False)
        s[:, rank:] = 0
        best = (u * s.unsqueeze(1)) @ vt
        assert float((left @ right.mT - best).norm()) <= (0.05 if rank == 5 else 1e-12) * float(best.norm())
        assert bool((solver.columns.sizes() > 0).all())
    result = run(problem, "bm_gd", 5, init=(U, V))
    check(result, 5)


def test_paths():
    problem = make_problem("logistic", output_bias=True)
    results = cvxnn.path(problem, n_betas=6, ratio=3e-2, solver="bm_global", tol=1e-6)
    assert all(result.status == "certified" for result in results)
    objectives = [result.objective for result in results]
    assert objectives == sorted(objectives, reverse=True)
    for result in results[1:]:
        best = cvxnn.solve(result.problem, "admm", tol=1e-6)
        assert result.objective == pytest.approx(best.objective, rel=2e-6)


@pytest.mark.parametrize("solver", ["bm_gd", "bm_precgd", "bm_lbfgs"])
def test_warm_starts_from_zero_leave_it(solver):
    problem = make_problem()
    zero = run(problem.with_beta(1.01 * problem.beta_max), solver, 1)
    result = run(problem, solver, 1, init=zero)
    assert result.objective < at_zero(problem)


FULL = np.zeros((5, 3, 2)), np.zeros((5, 2, 2))
WRONG = {
    "gates": ((FULL[0][:3], FULL[1][:3]), r"init has shape \(3, 3, 2\); \(5, 3, 2\) is wanted"),
    "inputs": ((FULL[0][:, :2], FULL[1]), r"init has shape \(5, 2, 2\); \(5, 3, 2\) is wanted"),
    "outputs": ((FULL[0], FULL[1][:, :1]), r"init has shape \(5, 3, 1\); \(5, 3, 2\) is wanted"),
    "ranks": ((FULL[0], FULL[1][:, :, :1]), r"init has factors of shapes \(5, 3, 2\) and \(5, 2, 1\); \(P, p, m\)"),
    "one gate": ((FULL[0][0], FULL[1][0]), r"init has factors of shapes \(3, 2\) and \(2, 2\)"),
    "unequal": ((FULL[0], FULL[1][:4]), r"init has shape \(0, 3, 2\)"),
    "nan": ((FULL[0], FULL[1] + np.nan), "init contains NaN"),
    "text": (("U", "V"), "init cannot be read"),
    "triple": ((*FULL, FULL[0]), r"init is a tuple of 3; a pair \(U, V\)"),
    "blocks": (np.zeros((5, 4, 2)), r"init has shape \(5, 4, 2\); \(5, 3, 2\) is wanted"),
}


@pytest.mark.parametrize(("init", "message"), WRONG.values(), ids=WRONG)
def test_wrong_starts_are_refused(init, message):
    for solver in ("bm_gd", "bm_global"):
        with pytest.raises(InvalidInputError, match=message):
            run(make_problem(), solver, init=init)


# Determinism and checkpoints


def same(first, second):
    pairs = zip((*first.factors, first.intercept), (*second.factors, second.intercept), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("solver", ALL)
def test_runs_are_determined_by_the_seed(solver):
    problem = make_problem("cross_entropy", output_bias=True)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first, second = (run(problem, solver, tol=0, max_iter=3) for _ in range(2))
    assert (torch.rand(1).item(), np.random.rand()) == expected  # noqa: NPY002
    assert same(first, second)
    assert first.certificate == second.certificate
    other = run(problem, solver, tol=0, max_iter=3, random_state=1)
    assert not same(first, other)


RESUMED = {
    "gd": ("bm_gd", {}, 30),
    "gd-estimated": ("bm_gd", {"step": None}, 30),
    "gd-exploding": ("bm_gd", {"step": 100.0}, 60),
    "gd-estimated-late": ("bm_gd", {"step": None}, 90),
    "sgd": ("bm_sgd", {"batch_size": 7, "decay_every": 3}, 4),
    "sgd-step": ("bm_sgd", {"batch_size": 7, "step": 0.05}, 4),
    "noisy": ("bm_noisy_gd", {"every": 7, "threshold": float("inf")}, 30),
    "noisy-late": ("bm_noisy_gd", {"every": 20, "attempts": 2}, 150),
    "precgd": ("bm_precgd", {}, 20),
    "lbfgs": ("bm_lbfgs", {"inner_iter": 15}, 2),
    "global": ("bm_global", {"newton_iter": 2}, 3),
    "global-cg": ("bm_global", {"local": "newton_cg", "newton_cg_iter": 2}, 3),
    "global-lbfgs": ("bm_global", {"local": "lbfgs", "lbfgs_iter": 7}, 3),
    "global-lbfgs-plain": ("bm_global", {"local": "lbfgs", "lbfgs_iter": 10, "whiten": False, "history": 3}, 4),
    "global-proximal": ("bm_global", {"escape": "proximal", "newton_iter": 2}, 3),
}


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize(("solver", "options", "half"), RESUMED.values(), ids=RESUMED)
def test_resumed_runs_end_where_others_do(tmp_path, solver, options, half, loss):
    problem = make_problem(loss, n=40, n_gates=8, beta=1e-3, output_bias=True)
    path = tmp_path / "run.ckpt"
    settings = {"tol": 0, "solver_options": OPTIONS.get(solver, {}) | options}
    whole = tmp_path / "whole.ckpt"
    through = run(problem, solver, max_iter=2 * half, checkpoint=whole, **settings)
    first = run(problem, solver, max_iter=half, checkpoint=path, **settings)
    assert first.n_iter == half
    before = saved_state(path)
    second = run(problem, solver, max_iter=2 * half, checkpoint=path, resume=True, **settings)
    assert second.n_iter == through.n_iter > half
    assert same(second, through)
    assert second.objective == through.objective <= first.objective
    assert saved_state(path) == saved_state(whole) != before


def saved_state(path):
    """All that a solver has written about itself, comparable."""
    header, arrays = read_tensors(path, "checkpoint")
    return header["state"], {name: (x.shape, x.tobytes()) for name, x in arrays.items() if name.startswith("state.")}


@pytest.mark.parametrize("norms", [("l1", "l2"), ("linf", "linf")], ids="-".join)
def test_resumed_runs_with_other_norms(tmp_path, norms):
    problem = make_problem(norms=norms)
    path = tmp_path / "run.ckpt"
    through = run(problem, "bm_noisy_gd", tol=0, max_iter=40)
    run(problem, "bm_noisy_gd", tol=0, max_iter=20, checkpoint=path)
    assert same(run(problem, "bm_noisy_gd", tol=0, max_iter=40, checkpoint=path, resume=True), through)


@pytest.mark.parametrize("change", [{"rank": 3}, {"random_state": 1}])
def test_checkpoints_of_another_rank_or_seed_are_refused(tmp_path, change):
    path = tmp_path / "run.ckpt"
    run(make_problem(), "bm_precgd", tol=0, max_iter=2, checkpoint=path)
    with pytest.raises(cvxnn.errors.StorageError, match="another run"):
        run(make_problem(), "bm_precgd", tol=0, max_iter=4, checkpoint=path, resume=True, **change)


# Gradient descent


def spiral_problem(beta=1e-3):
    X, y = spiral(30, random_state=0)
    return cvxnn.mlp_problem(X, y, loss="cross_entropy", n_gates=12, hidden_bias=True, beta=beta)


def torch_descent(problem, start, epochs):
    """Plain torch: SGD with momentum and weight decay, and the step shortened on plateaus."""
    X, masks, Y = problem.operator.X, problem.patterns.double(), problem.Y
    u, v = (part.clone().requires_grad_() for part in (start.u, start.v))
    optimizer = torch.optim.SGD([u, v], lr=1.0, momentum=0.9, weight_decay=problem.beta)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=10, min_lr=1e-7)
    objectives, lengths = [], []
    for _ in range(epochs):
        optimizer.zero_grad()
        outputs = (masks[:, start.gate] * (X @ u.T)) @ v
        loss = -(Y * torch.log_softmax(outputs, 1)).sum() / len(X)
        loss.backward()
        objective = float((loss + problem.beta / 2 * (u.square().sum() + v.square().sum())).detach())
        optimizer.step()
        plateau.step(objective)
        objectives.append(objective)
        lengths.append(optimizer.param_groups[0]["lr"])
    return u.detach(), v.detach(), objectives, lengths


def test_bm_gd_is_the_method_of_the_paper():
    problem = spiral_problem()
    kind = SOLVERS["bm_gd"]
    options = make_options(kind, {"patience": 10})
    assert (options.step, options.momentum, options.decay) == (1.0, 0.9, 0.9)
    solver = kind(problem, options, 1e-6, None, 2, 0)
    solver.start(None)
    u, v, objectives, lengths = torch_descent(problem, solver.columns.clone(), 300)
    for epoch in range(300):
        slopes = solver.loss.slopes(solver.columns, solver.intercept)
        assert slopes.value + solver.penalty(solver.columns) == pytest.approx(objectives[epoch], rel=1e-7)
        solver.step()
        assert solver.step_length() == pytest.approx(lengths[epoch], rel=1e-12)
    assert objectives[-1] < 0.9 * objectives[0]
    assert lengths[-1] < 1
    assert solver.shortened == 1
    torch.testing.assert_close(solver.columns.u, u, rtol=0, atol=1e-6)
    torch.testing.assert_close(solver.columns.v, v, rtol=0, atol=1e-6)


BAD = [
    ({"step": -1}, "step is -1"),
    ({"step": 0}, "step is 0"),
    ({"step": "long"}, "step is 'long'"),
    ({"step": float("nan")}, "step is nan"),
    ({"momentum": 1}, r"momentum is 1; a number in \[0, 1\)"),
    ({"momentum": -0.1}, "momentum is -0.1"),
    ({"momentum": "x"}, "momentum is 'x'"),
    ({"decay": 0}, "decay is 0"),
    ({"decay": 1.5}, r"decay is 1.5; a number in \(0, 1\]"),
    ({"decay": None}, "decay is None"),
    ({"patience": 0}, "patience is 0"),
    ({"patience": 1.5}, "patience is 1.5"),
    ({"min_step": -1}, "min_step is -1"),
    ({"init_scale": 0}, "init_scale is 0"),
    ({"speed": 1}, "solver_options has 'speed', which 'bm_gd' does not know; known options: step, momentum"),
]
BAD_OF_OTHERS = [
    ("bm_sgd", {"batch_size": 0}, "batch_size is 0"),
    ("bm_sgd", {"batch_size": 2.5}, "batch_size is 2.5"),
    ("bm_sgd", {"decay_every": "x"}, "decay_every is 'x'"),
    ("bm_noisy_gd", {"noise": -1}, "noise is -1"),
    ("bm_noisy_gd", {"every": 0}, "every is 0"),
    ("bm_noisy_gd", {"attempts": 0}, "attempts is 0"),
    ("bm_noisy_gd", {"threshold": 0}, "threshold is 0"),
    ("bm_noisy_gd", {"threshold": "x"}, "threshold is 'x'"),
    ("bm_precgd", {"damping": 0}, "damping is 0"),
    ("bm_precgd", {"step": None}, "step is None"),
    ("bm_precgd", {"growth": 0.5}, "growth is 0.5"),
    ("bm_lbfgs", {"history": 0}, "history is 0"),
    ("bm_lbfgs", {"inner_iter": -3}, "inner_iter is -3"),
    ("bm_global", {"escape": "noise"}, "escape is 'noise'"),
    ("bm_global", {"local": "gd"}, "local is 'gd'"),
    ("bm_global", {"eliminate": "no"}, "eliminate is 'no'"),
    ("bm_global", {"whiten": 3}, "whiten is 3"),
    ("bm_global", {"new_columns": 0}, "new_columns is 0"),
    ("bm_global", {"newton_iter": 0}, "newton_iter is 0"),
    ("bm_global", {"newton_cg_iter": 0}, "newton_cg_iter is 0"),
    ("bm_global", {"lbfgs_iter": None}, "lbfgs_iter is None"),
    ("bm_global", {"history": 1.5}, "history is 1.5"),
]


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [*(("bm_gd", *bad) for bad in BAD), *BAD_OF_OTHERS],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_options_are_refused(solver, options, message):
    with pytest.raises(InvalidInputError, match=message):
        run(make_problem(), solver, solver_options=options)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "two", True])
def test_bad_ranks_are_refused(rank):
    with pytest.raises(InvalidInputError, match=f"rank is {rank!r}"):
        run(make_problem(), "bm_gd", rank)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("solver", [*DESCENT, "bm_precgd"])
def test_a_step_that_is_far_too_long(solver, loss, dtype):
    problem = make_problem(loss, output_bias=True, dtype=dtype)
    options = {"step": 1e6} | ({"batch_size": 12} if solver == "bm_sgd" else {})
    result = run(problem, solver, max_iter=60 if solver == "bm_sgd" else 150, solver_options=options)
    assert result.status in {"max_iter", "stationary"}
    assert all(bool(torch.isfinite(part).all()) for part in (*result.factors, result.intercept))
    assert result.objective <= at_zero(problem)


def test_steps_that_are_too_long_are_halved_until_they_work():
    problem = make_problem()
    result = run(problem, "bm_gd", max_iter=500, solver_options={"step": 100.0})
    check(result, 2)
    assert result.objective < 0.6 * at_zero(problem)


# Spurious local minima


def landscape_problem():
    """Two gates and three samples; the optimum has rank 1 in both gates."""
    X = [[2.0, -0.7], [0.3, 0.2], [1.1, 0.2]]
    Y = [[-0.1, -0.8], [0.1, 0.8], [-1.5, 1.2]]
    return cvxnn.mlp_problem(X, Y, gates=[[1.1, 0.1], [-0.9, -0.2]], beta=0.02)


@pytest.fixture(scope="module")
def landscape():
    problem = landscape_problem()
    best = cvxnn.solve(problem, "admm", tol=1e-9, max_iter=50_000)
    values = torch.linalg.svdvals(best.Z)
    assert ((values > 1e-3).sum(1) == 1).all()
    return problem, best.objective


def test_full_rank_has_no_spurious_minima(landscape):
    """With m = min(d, c) columns per gate, noise leaves every stationary point but the optimum."""
    problem, optimum = landscape
    for seed in range(20):
        result = cvxnn.solve(problem, "bm_noisy_gd", rank=2, tol=1e-4, random_state=seed)
        assert result.status == "certified"
        assert result.certificate.relative_gap <= 1e-4
        assert result.objective == pytest.approx(optimum, rel=1e-4)


def test_rank_one_has_spurious_minima(landscape):
    """The optimum has rank 1, and yet descent in factors of rank 1 ends above it from some starts."""
    problem, optimum = landscape
    gaps = []
    for seed in range(6):
        result = cvxnn.solve(problem, "bm_noisy_gd", rank=1, tol=1e-4, random_state=seed, max_iter=5000)
        gaps.append(result.objective / optimum - 1)
        assert (result.status == "certified") == (gaps[-1] < 1e-3)
        if result.status == "stationary":
            assert "rank 1, which is too small" in result.message
    assert max(gaps) > 1e-3
    assert min(gaps) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"local": "newton_cg"}, {"local": "lbfgs"}, {"escape": "proximal"}),
        *({"eliminate": False}, {"eliminate": False, "local": "newton_cg"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("output_bias", [False, True])
def test_bm_global_takes_data_of_any_size(options, output_bias):
    """The squares of blocks A*(gradient), of the size of X times Y, over- and underflow."""
    X, Y, _ = make_data()
    gates = np.random.default_rng(1).standard_normal((3, 5))
    plain = cvxnn.mlp_problem(X, Y, gates=gates, output_bias=output_bias, beta=2e-2)
    wanted = cvxnn.solve(plain, "admm", tol=1e-6).objective
    sizes = [(1e100, 1e100), (1e-100, 1e-100), (1e-140, 1e-140)]
    if options.get("local") != "lbfgs":
        sizes += [(1e100, 1.0), (1e-100, 1.0), (1.0, 1e100), (1.0, 1e-100)]
    for x, y in sizes:
        problem = cvxnn.mlp_problem(x * X, y * Y, gates=gates, output_bias=output_bias, beta=2e-2 * x * y)
        result = cvxnn.solve(problem, "bm_global", tol=1e-5, solver_options=options, max_iter=200)
        assert result.status == "certified"
        assert result.objective / y / y == pytest.approx(wanted, rel=2e-5)
