"""`bm_global` on ReLU problems: the certified optimum of (19), from anywhere, and always in the cones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY
from cvxnn.datasets import spiral
from cvxnn.errors import UnsupportedError
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem
from cvxnn.solvers.burer_monteiro.cone_cg import ConeProducts
from cvxnn.solvers.burer_monteiro.cone_columns import Cells, merged
from cvxnn.solvers.burer_monteiro.cone_masses import best_masses
from cvxnn.solvers.burer_monteiro.cone_model import ConeModel
from cvxnn.solvers.burer_monteiro.cone_newton import cone_newton, evaluate_columns, natural_step


def plane_problem(n: int = 40, beta: float = 0.02, **options: object) -> Problem:
    X, y = spiral(n)
    return cvxnn.mlp_problem(X, y, activation="relu", gates="enumerate", beta=beta, **options)


def space_problem(c: int = 1, n: int = 20, d: int = 3, n_gates: int = 12, seed: int = 0, **options: object) -> Problem:
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((n, d)), rng.standard_normal((n, c))
    return cvxnn.mlp_problem(X, Y, activation="relu", n_gates=n_gates, reduction="sum", **{"beta": 1.0, **options})


def interior_columns(problem: Problem, m: int, seed: int = 0) -> Columns:
    """Columns inside the cones of random gates."""
    rng = np.random.default_rng(seed)
    gate = torch.from_numpy(rng.integers(problem.n_gates, size=m))
    u = problem.cones.interior(gate)[0]
    u = problem.cones.project(gate, u + 0.1 * torch.from_numpy(rng.standard_normal(u.shape))).point
    v = torch.from_numpy(rng.standard_normal((m, problem.Y.shape[1])))
    return Columns(gate, u, 0.3 * v)


def feasible(problem: Problem, factors: tuple[torch.Tensor, torch.Tensor]) -> bool:
    columns = Columns.from_factors(*factors).without_zeros()
    return len(columns) == 0 or float(problem.cones.violation(columns.gate, columns.u).max()) <= FEASIBILITY


@pytest.mark.parametrize("beta", [0.03, 0.003])
def test_three_classes_over_all_neurons(beta: float) -> None:
    problem = plane_problem(beta=beta)
    result = cvxnn.solve(problem, "bm_global", tol=1e-7)
    assert result.status == "certified"
    assert result.certificate.scope == "relu_network"
    assert result.certificate.infeasibility <= FEASIBILITY
    assert feasible(problem, result.factors)
    U, V = result.factors
    X, used = problem.operator.X, problem.Y64
    outputs = sum((X @ U[k]).clamp_min(0) @ V[k].T for k in range(problem.n_gates))
    primal = (outputs - used).square().sum() / 2 / len(X) + beta / 2 * (U.square().sum() + V.square().sum())
    assert float(primal) == pytest.approx(result.objective, rel=1e-12)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "huber", "logistic"])
@pytest.mark.parametrize("output_bias", [False, True])
def test_losses(loss: str, output_bias: bool) -> None:
    X, y = spiral(30)
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(X))
    target = np.eye(3)[y]
    problem = cvxnn.mlp_problem(
        X,
        target,
        activation="relu",
        gates="enumerate",
        beta=0.02,
        loss=loss,
        output_bias=output_bias,
        sample_weight=weights,
    )
    result = cvxnn.solve(problem, "bm_global", tol=1e-6)
    assert result.status == "certified"


def reference(problem: Problem) -> float:
    """The optimum of the convex ReLU program with one output, by Clarabel."""
    cvxpy = pytest.importorskip("cvxpy")
    X, y = problem.operator.X.numpy(), problem.Y64[:, 0].numpy()
    outputs, penalty, constraints = 0, 0, []
    for pattern in problem.patterns.T.numpy():
        for sign in (1, -1):
            u = cvxpy.Variable(X.shape[1])
            outputs = outputs + sign * (pattern[:, None] * X) @ u
            penalty = penalty + cvxpy.norm(u)
            constraints.append(((2 * pattern - 1.0)[:, None] * X) @ u >= 0)
    objective = cvxpy.sum_squares(outputs - y) / 2 + problem.beta * penalty
    return float(cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(solver="CLARABEL"))


@pytest.mark.parametrize("seed", range(4))
def test_one_output_agrees_with_an_interior_point_method(seed: int) -> None:
    problem = space_problem(seed=seed, beta=0.5)
    ours = cvxnn.solve(problem, "bm_global", tol=1e-8)
    assert ours.status == "certified"
    assert ours.objective == pytest.approx(reference(problem), rel=1e-6)


def test_several_outputs_in_space() -> None:
    problem = space_problem(c=3, n=15, n_gates=6, beta=2.0)
    result = cvxnn.solve(problem, "bm_global", tol=1e-5)
    assert result.status == "certified"


def test_from_a_network_and_from_nothing_to_the_same_optimum() -> None:
    problem = plane_problem(beta=0.01)
    free = cvxnn.solve(problem, "bm_global", tol=1e-8)
    for seed in range(3):
        start = interior_columns(problem, 30, seed).factors(problem.n_gates)
        result = cvxnn.solve(problem, "bm_global", tol=1e-8, init=start)
        assert result.status == "certified"
        assert result.objective == pytest.approx(free.objective, rel=3e-8)


def test_a_start_outside_the_cones_goes_to_its_own_cells() -> None:
    problem = plane_problem(beta=0.01)
    rng = np.random.default_rng(0)
    U, V = torch.from_numpy(rng.standard_normal((1, 2, 5))), torch.from_numpy(rng.standard_normal((1, 3, 5)))
    pad = problem.n_gates - 1
    start = torch.cat([U, torch.zeros(pad, 2, 5)]), torch.cat([V, torch.zeros(pad, 3, 5)])
    result = cvxnn.solve(problem, "bm_global", tol=1e-12, init=start, max_iter=1)
    assert feasible(problem, result.factors)


def test_rank_starts_from_random_columns() -> None:
    problem = plane_problem(n=20)
    one, two = (cvxnn.solve(problem, "bm_global", rank=2, random_state=3, tol=1e-7) for _ in range(2))
    assert one.status == "certified"
    assert torch.equal(one.factors[0], two.factors[0])


def test_leaves_the_local_minimum_of_rank_one() -> None:
    """Section 3 of the maths: ten columns ((a, 0), a), a local minimum of value 2.875; the optimum is 1.75."""
    gates = np.array([[1.0], [1.0]])
    problem = cvxnn.mlp_problem(
        np.eye(2), np.array([2.0, -2.0]), activation="relu", gates=gates, beta=0.5, reduction="sum"
    )
    a = math.sqrt(0.15)
    U, V = torch.zeros(1, 2, 10, dtype=torch.float64), torch.full((1, 1, 10), a, dtype=torch.float64)
    U[:, 0] = a
    assert cvxnn.certify(problem, factors=(U, V)).primal == pytest.approx(2.875)
    result = cvxnn.solve(problem, "bm_global", init=(U, V), tol=1e-9)
    assert result.objective == pytest.approx(1.75, rel=1e-8)
    assert result.status == "certified"


def test_every_point_is_feasible_and_the_objective_falls() -> None:
    problem = space_problem(c=1, n=20, d=4, n_gates=12, beta=0.5)
    values: list[float] = []

    def look(entry: dict[str, float]) -> None:
        values.append(entry["primal"])

    result = cvxnn.solve(problem, "bm_global", tol=1e-9, callbacks=[look])
    assert values == sorted(values, reverse=True)
    assert feasible(problem, result.factors)


def test_resumes_to_the_same_result(tmp_path: object) -> None:
    problem = plane_problem(beta=0.003)
    whole = cvxnn.solve(problem, "bm_global", tol=1e-9)
    file = tmp_path / "run.ckpt"
    first = cvxnn.solve(problem, "bm_global", tol=1e-9, max_iter=3, checkpoint=file)
    assert first.n_iter == 3 < whole.n_iter
    rest = cvxnn.solve(problem, "bm_global", tol=1e-9, checkpoint=file, resume=True)
    assert rest.n_iter == whole.n_iter
    assert rest.objective == whole.objective
    assert torch.equal(rest.factors[0], whole.factors[0])


def test_interruption_keeps_a_feasible_point(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = plane_problem(beta=0.003)
    calls = 0
    plain = ConeModel.minimise

    def stop(self: ConeModel, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(ConeModel, "minimise", stop)
    result = cvxnn.solve(problem, "bm_global", tol=1e-9)
    assert result.status == "interrupted"
    assert result.n_iter > 0
    assert result.objective < cvxnn.certify(problem, factors=_zeros(problem)).primal
    assert feasible(problem, result.factors)


def _zeros(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    P, d, c = problem.operator.block_shape
    return torch.zeros(P, d, 1, dtype=torch.float64), torch.zeros(P, c, 1, dtype=torch.float64)


@pytest.mark.parametrize("options", [{"escape": "proximal"}, {"local": "lbfgs"}])
def test_what_there_is_not_with_cones_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="ReLU"):
        cvxnn.solve(plane_problem(n=10), "bm_global", solver_options=options)


@pytest.mark.parametrize("output_bias", [False, True])
def test_model_against_differences(output_bias: bool) -> None:
    problem = space_problem(c=2, output_bias=output_bias)
    loss, columns = FactoredLoss(problem, double=True), interior_columns(problem, 4)
    b = torch.tensor([0.1, -0.2], dtype=torch.float64) * output_bias
    point = evaluate_columns(loss, columns, b)
    model = ConeProducts(loss, problem.cones, columns, b, point.slopes)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(len(model.slope), generator=rng, dtype=torch.float64)
    du, dv, *db = model._split(x)

    def slope(t: float) -> torch.Tensor:
        moved = Columns(columns.gate, columns.u + t * du, columns.v + t * dv)
        offset = b + t * db[0] if db else b
        return ConeProducts(loss, problem.cones, moved, offset, evaluate_columns(loss, moved, offset).slopes).slope

    difference = (slope(1e-6) - slope(-1e-6)) / 2e-6
    assert torch.allclose(model.product(x), difference, rtol=1e-6, atol=1e-6)
    dense = ConeModel(loss, problem.cones, columns, b, point.slopes)
    assert torch.allclose(dense.slope, model.slope)
    free = problem.cones.project(columns.gate, columns.u)
    # Where the blocks are positive, the dense model is the Hessian.
    size = float(dense.cross.flatten(1).norm(dim=1).max())
    dense.cross = dense.cross * (0.5 * problem.beta / size)
    M = dense._damped(free, 0.0) - dense.gauss
    r, d = columns.u.shape
    expected = problem.beta * x.clone()
    expected[: r * d] += torch.einsum("rpc,rc->rp", dense.cross, dv).flatten()
    expected[r * d : r * (d + 2)] += torch.einsum("rpc,rp->rc", dense.cross, du).flatten()
    expected[r * (d + 2) :] = 0
    assert torch.allclose(M @ x, expected, atol=1e-10)


@pytest.mark.parametrize("kind", [ConeModel, ConeProducts])
def test_local_methods_reach_stationary_points(kind: type) -> None:
    problem = space_problem(c=2, n=25, d=4, n_gates=10, beta=0.3)
    loss = FactoredLoss(problem, double=True)
    point = evaluate_columns(loss, interior_columns(problem, 6), problem.Y64.new_zeros(2))
    found = cone_newton(kind, loss, problem.cones, point, 300, 1e-3, 1e-7)
    assert found.converged
    assert found.point.value < point.value
    assert natural_step(loss, problem.cones, found.point)[1] <= 1e-7
    factors = found.point.columns.factors(problem.n_gates)
    assert cvxnn.certify(problem, factors=factors).stationarity <= 1e-6


@pytest.mark.parametrize("loss_name", ["squared", "cross_entropy"])
def test_masses_are_optimal(loss_name: str) -> None:
    problem = plane_problem(beta=0.01, loss=loss_name, output_bias=True)
    loss, columns = FactoredLoss(problem, double=True), interior_columns(problem, 25)
    found, b = best_masses(loss, columns, problem.Y64.new_zeros(3))
    point = evaluate_columns(loss, found, b)
    sizes = found.sizes()
    u, v = columns.u / columns.u.norm(dim=1, keepdim=True), columns.v / columns.v.norm(dim=1, keepdim=True)
    gradient = problem.loss.gradient(loss.op.apply_columns(found) + b, loss.Y, loss.weights)
    slopes = (loss.op.adjoint_columns(Columns(columns.gate, u, v), gradient)[0] * u).sum(1) + problem.beta
    assert float(slopes.min()) > -1e-9
    assert float(gradient.sum(0).abs().max()) < 1e-10
    assert float((point.slopes.left * found.u).sum(1).add(problem.beta * sizes).abs().max()) < 1e-9


def test_merging_keeps_predictions() -> None:
    problem = plane_problem(n=20)
    loss, columns = FactoredLoss(problem, double=True), interior_columns(problem, 5)
    scale = torch.tensor([[2.0], [0.5], [1.0], [3.0], [1.0]], dtype=torch.float64)
    twice = Columns.joined(columns, Columns(columns.gate, columns.u * scale, columns.v.flip(0)))
    less = merged(problem.cones, twice, 0.0)
    assert len(less) == 5
    assert torch.allclose(loss.op.apply_columns(less), loss.op.apply_columns(twice), atol=1e-12)
    zero = problem.Y64.new_zeros(3)
    assert evaluate_columns(loss, less, zero).value < evaluate_columns(loss, twice.balanced(), zero).value


def test_cells_are_found_and_crossed() -> None:
    problem = plane_problem(n=20, beta=0.01)
    cells, cones = Cells(problem.cones), problem.cones
    every = torch.arange(problem.n_gates)
    assert torch.equal(cells.find(cones.interior(every)[0]), every)
    loss = FactoredLoss(problem, double=True)
    point = evaluate_columns(loss, interior_columns(problem, 8), problem.Y64.new_zeros(3))
    found = cone_newton(ConeModel, loss, cones, point, 100, 1e-3, 1e-9).point
    natural = natural_step(loss, cones, found)[0]
    other = cells.crossed(loss, found, natural.point, 1e-7)
    assert not torch.equal(other.columns.gate, found.columns.gate)
    assert other.value == pytest.approx(found.value, rel=1e-9)
    assert bool(cones.contains(other.columns.gate, other.columns.u).all())
    further = cone_newton(ConeModel, loss, cones, other, 100, 1e-3, 1e-9).point
    assert further.value < found.value * (1 - 1e-6)


def test_time_limit() -> None:
    X = np.random.default_rng(0).standard_normal((60, 6))
    Y = np.random.default_rng(1).standard_normal((60, 1))
    problem = cvxnn.mlp_problem(X, Y, activation="relu", n_gates=60, beta=1e-4)
    result = cvxnn.solve(problem, "bm_global", tol=1e-13, time_limit=0.2)
    assert result.status in ("time_limit", "certified")
    assert feasible(problem, result.factors)
