"""Better primal and dual points for the nuclear norm, and the small systems that give them."""

import itertools

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.bounds import dual_bound
from cvxnn.certificates import evaluate
from cvxnn.columns import Columns
from cvxnn.solvers.admm import Admm, AdmmOptions
from cvxnn.solvers.looks import Looks
from cvxnn.solvers.ridge import FeatureRidge, KernelRidge
from cvxnn.solvers.sides import make_ridge
from cvxnn.solvers.singular_pairs import Frames, PairProducts
from cvxnn.solvers.spectral import SpectralPoints
from tests import distributed_worker as worker
from tests.helpers import make_problem

KINDS = {
    "plain": {},
    "intercept": {"output_bias": True},
    "weights": {"sample_weight": np.r_[0.0, np.linspace(0.2, 3.0, 39)], "output_bias": True},
    "linear": {"activation": "linear"},
    "float32": {"dtype": "float32"},
}


def some_problem(kind="plain", n=40, n_gates=6, beta=0.05, **options):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, 5))
    Y = np.maximum(X @ rng.standard_normal((5, 6)), 0) @ rng.standard_normal((6, 3))
    settings = {"activation": "gated_relu", "random_state": 0} | KINDS[kind] | options
    if settings["activation"] == "gated_relu":
        settings["n_gates"] = n_gates
    problem = cvxnn.mlp_problem(X, Y, **settings)
    return problem.with_beta(beta * problem.beta_max)


def rough(problem, side, steps):
    """ADMM without better points, after so many steps."""
    solver = Admm(problem, AdmmOptions(side=side), 1e-6, None)
    solver.start(None)
    solver.looks = None
    for _ in range(steps):
        solver.step()
    return solver


@pytest.mark.parametrize("side", ["samples", "features", "iterative"])
@pytest.mark.parametrize("kind", KINDS)
def test_better_points_are_points_and_better(kind, side, monkeypatch):
    monkeypatch.setattr(SpectralPoints, "_is_dear", lambda self, used: False)
    problem = some_problem(kind)
    optimum = cvxnn.solve(problem, "interior_point", tol=1e-9).certificate
    solver = rough(problem, side, 20)
    plain = solver.iterate()
    found = SpectralPoints(problem, solver.ridge).look(plain.Z, -plain.dual, 0.0)
    worse = evaluate(problem, plain.Z).primal, dual_bound(problem, problem.centred(plain.dual.double())).lower_bound
    # What it says of its points is what the certificate finds.
    assert evaluate(problem, found.Z).primal == pytest.approx(found.primal, rel=1e-9)
    bound = dual_bound(problem, problem.centred(-found.residual)).lower_bound
    assert bound == pytest.approx(found.lower, rel=1e-9)
    # Independent bounds of the optimum, and how far the points are off.
    assert bound <= optimum.primal * (1 + 1e-9)
    assert found.primal >= optimum.lower_bound * (1 - 1e-9)
    assert found.primal - optimum.primal <= 0.5 * (worse[0] - optimum.primal) + 1e-8 * optimum.primal
    assert optimum.primal - bound <= 0.1 * (optimum.primal - worse[1]) + 1e-8 * optimum.primal


def test_pairs_that_come_out_negative_are_dropped():
    problem = some_problem(beta=0.2)
    best = cvxnn.solve(problem, tol=1e-11)
    solver = rough(problem, "samples", 60)
    # The singular vectors of the optimum, and a spurious pair beside them in a gate.
    left, values, right = torch.linalg.svd(best.Z.double(), full_matrices=False)
    wanted = values > 1e-6 * values.max()
    gate = int(((wanted.sum(1) > 0) & (wanted.sum(1) < 3)).nonzero()[0])
    used = wanted.clone()
    used[gate, wanted[gate].sum()] = True
    values = torch.where(used & ~wanted, 1e-4 * values.max(), values)
    points = SpectralPoints(problem, solver.ridge)
    W = left @ torch.diag_embed(values * used) @ right
    frames = Frames.of(points.op, left, right, used)
    primal, Z, ranks = points._better_blocks(frames, points._hidden(frames), problem.objective(W), W)
    assert torch.equal(ranks, wanted.sum(1))
    assert primal - best.objective < 1e-3 * (problem.objective(W) - best.objective)
    assert problem.objective(Z) == pytest.approx(primal, rel=1e-12)


def columns_of(problem, generator):
    gate = torch.tensor([0, 0, 2, 3, 3, 3])
    _, p, q = problem.operator.block_shape
    u, v = (torch.from_numpy(generator.standard_normal((6, size))) for size in (p, q))
    return Columns(gate, u, v)


@pytest.mark.parametrize("intercept", [False, True])
def test_metrics_of_both_sides_are_those_of_the_matrix(intercept):
    problem, rng = some_problem(), np.random.default_rng(1)
    op, rho, n = problem.operator, 0.7, 40
    weights = torch.from_numpy(rng.uniform(0.5, 2.0, n))
    columns = columns_of(problem, rng)
    hidden = op.hidden(columns.gate, columns.u, slice(None))
    M = op.kernel() / rho + torch.diag(1 / weights)
    inverse = torch.linalg.inv(M)
    if intercept:
        ones = inverse.sum(1, keepdim=True)
        inverse = inverse - ones @ ones.T / ones.sum()
    steps = torch.from_numpy(rng.standard_normal((6, 3)))
    for side, kind in (("samples", KernelRidge), ("features", FeatureRidge)):
        ridge = make_ridge(side, op, weights, intercept)
        assert type(ridge) is kind
        ridge.factor(rho)
        gram, move = ridge.metric(columns, hidden)
        torch.testing.assert_close(gram, hidden.T @ inverse @ hidden, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(move(steps), inverse @ hidden @ steps, rtol=1e-9, atol=1e-9)
    # By conjugate gradients it is that of the preconditioner, which is exact with all columns of the kernel.
    ridge = make_ridge("iterative", op, weights, intercept)
    ridge.factor(rho)
    gram, move = ridge.metric(columns, hidden)
    if not intercept:
        torch.testing.assert_close(gram, hidden.T @ inverse @ hidden, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.T @ move(steps), gram @ steps, rtol=1e-9, atol=1e-9)


def test_pairs_are_the_matrices_they_stand_for():
    problem, rng = some_problem(), np.random.default_rng(2)
    columns = columns_of(problem, rng)
    h = problem.operator.hidden(columns.gate, columns.u, slice(None))
    pairs = PairProducts(columns)
    E = torch.stack(
        [
            scale * (torch.outer(h[:, i], columns.v[j]) + torch.outer(h[:, j], columns.v[i]))
            for i, j, scale in zip(pairs.i, pairs.j, pairs.scale, strict=True)
        ]
    )
    assert len(E) == 3 + 1 + 6
    M = torch.from_numpy(rng.standard_normal((40, 40)))
    M = M @ M.T
    torch.testing.assert_close(pairs.gram(h.T @ M @ h), torch.einsum("anc,nm,bmc->ab", E, M, E))
    L = torch.from_numpy(rng.standard_normal((40, 3)))
    torch.testing.assert_close(pairs.coordinates(h.T @ L @ columns.v.T), torch.einsum("anc,nc->a", E, L))
    weights = torch.from_numpy(rng.standard_normal(10))
    S = pairs.matrix(weights)
    torch.testing.assert_close(h @ (S @ columns.v), torch.einsum("a,anc->nc", weights, E))
    torch.testing.assert_close(S.norm(), weights.norm(), rtol=1e-13, atol=0)


def test_frames_give_their_blocks_back():
    problem = some_problem()
    rng = np.random.default_rng(3)
    Z = torch.from_numpy(rng.standard_normal(problem.operator.block_shape))
    Z[1] = 0
    left, values, right = torch.linalg.svd(Z, full_matrices=False)
    frames = Frames.of(problem.operator, left, right, values > 1e-9)
    assert frames.gates.tolist() == [0, 2, 3, 4, 5] and len(frames.columns()) == 15
    S = torch.diag(values[values > 1e-9])
    torch.testing.assert_close(frames.product(problem.operator, frames.blocks(S)), Z)
    assert frames.ranks(problem.operator).tolist() == [3, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("architecture", ["mlp", "cnn", "attention"])
def test_looks_need_fewer_steps(architecture):
    rng = np.random.default_rng(0)
    if architecture == "mlp":
        problem = some_problem(n=60)
    elif architecture == "cnn":
        images = rng.standard_normal((30, 1, 4, 4))
        labels = rng.standard_normal((30, 2))
        problem = cvxnn.cnn_problem(images, labels, filter_size=2, n_gates=4, pooling=1, random_state=0)
    else:
        problem = cvxnn.attention_problem(
            rng.standard_normal((30, 4, 3)), rng.standard_normal((30, 2)), n_gates=4, random_state=0
        )
    problem = problem.with_beta(0.05 * problem.beta_max)
    assert Looks.serve(problem) == (problem.operator.width == 1)
    result = cvxnn.solve(problem, "admm", tol=1e-8)
    assert result.status == "certified"
    reference = cvxnn.solve(problem, "interior_point", tol=1e-7)
    assert result.objective <= reference.objective * (1 + 1e-6)
    assert result.certificate.lower_bound <= reference.objective * (1 + 1e-9)


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("side", ["samples", "features", "iterative"])
def test_looks_do_not_depend_on_the_sizes_of_the_data(side, output_bias):
    rng = np.random.default_rng(0)
    X, Y, gates = (rng.standard_normal(shape) for shape in ((20, 4), (20, 3), (4, 5)))
    found = []
    sizes = [(1.0, 1.0), (1e100, 1e100), (1e-100, 1e-100), (1e100, 1.0), (1.0, 1e100), (1e-100, 1.0), (1.0, 1e-140)]
    for x, y in sizes:
        problem = cvxnn.mlp_problem(x * X, y * Y, gates=gates, output_bias=output_bias)
        problem = problem.with_beta(0.1 * problem.beta_max)
        result = cvxnn.solve(problem, "admm", tol=1e-7, max_iter=100, solver_options={"side": side})
        assert result.status == "certified"
        found.append(result.objective / y / y)
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


def test_looks_that_take_too_long_are_left_out(monkeypatch):
    problem = some_problem()
    monkeypatch.setattr(SpectralPoints, "_is_dear", lambda self, used: True)
    solver = Admm(problem, AdmmOptions(), 1e-6, None)
    solver.start(None)
    for _ in range(30):
        solver.step()
    assert solver.looks.dear and solver.looks.Z is None
    assert torch.equal(solver.iterate().Z, rough(problem, "auto", 30).iterate().Z)
    assert cvxnn.solve(problem, "admm", tol=1e-6).status == "certified"


def test_plain_points_are_certified_as_often_without_looks(monkeypatch):
    monkeypatch.setattr(SpectralPoints, "_is_dear", lambda self, used: True)
    result = cvxnn.solve(some_problem(), "admm", tol=0, max_iter=600, solver_options={"memory": 0})
    seen = [0, *(entry["iteration"] for entry in result.trace)]
    assert max(after - before - 0.15 * before for before, after in itertools.pairwise(seen)) <= 10


@pytest.mark.parametrize("solver", ["admm", "working_set"])
@pytest.mark.parametrize("steps", [7, 50, 77])
@pytest.mark.parametrize("by", ["max_iter", "callback"])
def test_runs_go_on_as_if_they_had_not_ended(solver, steps, by, tmp_path):
    """Also where they end just where a certificate is made, before which there is a look."""
    problem = some_problem(n=60, n_gates=30, beta=0.01, kind="intercept")
    settings = {"tol": 0, "max_iter": 120, "solver_options": {"gates": 5} if solver == "working_set" else {}}
    whole = cvxnn.solve(problem, solver, **settings)
    checkpoint = {"checkpoint": tmp_path / "run"}
    end = {"max_iter": steps} if by == "max_iter" else {"callbacks": [lambda entry: entry["iteration"] >= steps]}
    cvxnn.solve(problem, solver, **(settings | checkpoint | end))
    result = cvxnn.solve(problem, solver, resume=True, **(settings | checkpoint))
    assert torch.equal(result.Z, whole.Z) and torch.equal(result.dual, whole.dual)
    # The end of a run may add an entry.
    assert [entry["iteration"] for entry in whole.trace if entry["iteration"] != steps] == [
        entry["iteration"] for entry in result.trace if entry["iteration"] != steps
    ]


def test_a_run_that_goes_on_has_a_point_before_its_first_step():
    """As it is asked for where the step is interrupted."""
    problem = some_problem()
    first, second = (Admm(problem, AdmmOptions(side="samples"), 1e-6, None) for _ in range(2))
    first.start(None)
    for _ in range(12):
        first.step()
    second.start(None)
    second.load_state(first.state())
    second.iteration += 1
    assert torch.isfinite(second.iterate().blocks()).all()


def turned(group, folder):
    """The second process finds other singular vectors, as another kind of machine may."""
    if group is not None and group.rank == 1:
        svd = torch.linalg.svd

        def other(*arguments, **options):
            left, values, right = svd(*arguments, **options)
            signs = 1.0 - 2.0 * (torch.arange(values.shape[-1]) % 2)
            return left * signs.to(left), values, right * signs.to(left).unsqueeze(1)

        torch.linalg.svd = other
    found = {}
    for side in ("features", "iterative"):
        options = {"tol": 1e-8, "max_iter": 40, "solver_options": {"side": side}}
        found[side] = worker.facts(problem := some_problem("intercept"), cvxnn.solve(problem, "admm", **options))
    return found


def test_processes_agree_on_the_singular_vectors(tmp_path):
    first, second = worker.run(turned, tmp_path, shard="samples", timeout=10)
    assert first == second
    for side, wanted in turned(None, tmp_path).items():
        for fact in ("Z", "primal", "lower", "n_iter"):
            np.testing.assert_allclose(first[side][fact], wanted[fact], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"loss": "cross_entropy"}, {"norms": ("l2", "linf")}, {"norms": ("l2", "l1")}], ids=str
)
def test_other_losses_and_norms_have_none(options):
    assert not Looks.serve(make_problem(**options))
