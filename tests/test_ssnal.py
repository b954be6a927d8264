"""`ssnal` on ReLU problems with one output: the certified optimum, from anywhere, with all losses and gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY, Cones, LongProjections
from cvxnn.cones.polygons import Polygons
from cvxnn.cones.projection import project_cones
from cvxnn.errors import UnsupportedError
from cvxnn.patterns import activation_patterns, enumerate_gates
from cvxnn.problem import Problem
from cvxnn.solvers.array_loss import ArrayLoss
from cvxnn.solvers.base import Iterate
from cvxnn.solvers.face_lists import ArrayProjections
from cvxnn.solvers.ssnal import Ssnal


def make_data(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, np.maximum(X @ rng.standard_normal((d, 3)), 0) @ rng.standard_normal(3) + 0.3 * rng.standard_normal(n)


def make_problem(n: int = 24, d: int = 3, share: float = 0.05, seed: int = 0, **options: Any) -> Problem:
    """A problem with beta a share of beta_max."""
    X, y = make_data(n, d, seed)
    if options.get("loss") == "logistic":
        y = (y > np.median(y)).astype(float)
    problem = cvxnn.mlp_problem(X, y[:, None], activation="relu", **({"n_gates": 15} | options))
    return problem.with_beta(share * problem.beta_max)


def agrees(problem: Problem, **options: Any) -> cvxnn.Result:
    """The result, after a comparison with an interior-point method."""
    result = cvxnn.solve(problem, "ssnal", tol=1e-7, **options)
    assert result.status == "certified"
    assert result.certificate.relative_gap <= 1e-7
    columns = Columns.from_factors(*result.factors).without_zeros()
    assert float(problem.cones.violation(columns.gate, columns.u).max()) <= FEASIBILITY
    reference = cvxnn.solve(problem, "interior_point", tol=1e-6)
    assert result.objective <= reference.objective * (1 + 2e-7)
    assert reference.certificate.lower_bound <= result.objective
    assert result.certificate.lower_bound <= reference.objective
    assert result.objective == pytest.approx(reference.objective, rel=2e-6)
    return result


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("loss", ["squared", "huber", "logistic"])
def test_optimum(loss: str, output_bias: bool, reduction: str) -> None:
    agrees(make_problem(loss=loss, output_bias=output_bias, reduction=reduction))


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("loss", ["squared", "huber", "logistic"])
def test_weights(loss: str, output_bias: bool) -> None:
    weight = np.random.default_rng(1).uniform(0, 2, 24)
    weight[:2] = 0
    agrees(make_problem(loss=loss, output_bias=output_bias, sample_weight=weight))


@pytest.mark.parametrize(("n", "d"), [(12, 1), (15, 2), (8, 3)])
def test_all_cells(n: int, d: int) -> None:
    result = agrees(make_problem(n, d, gates="enumerate"))
    assert result.certificate.scope == "relu_network"


@pytest.mark.parametrize("d", [4, 7])
def test_higher_dimensions(d: int) -> None:
    agrees(make_problem(30, d, share=0.02))


@pytest.mark.parametrize("d", [2, 3, 4])
def test_duplicates_opposites_and_zeros(d: int) -> None:
    X, y = make_data(12, d)
    X = np.concatenate([X, X[:4], -X[4:8], 3 * X[:2], np.zeros((2, d))])
    y = np.concatenate([y, y[:4], y[4:8], y[:2], [1.0, -1.0]])
    problem = cvxnn.mlp_problem(X, y[:, None], activation="relu", n_gates=12)
    agrees(problem.with_beta(0.03 * problem.beta_max))


def test_flat_data() -> None:
    """Rows of a lower rank than their dimension: the cones hold lines."""
    X, y = make_data(20, 2)
    problem = cvxnn.mlp_problem(X @ np.ones((2, 3)) + X[:, :1], y[:, None], activation="relu", n_gates=8)
    agrees(problem.with_beta(0.05 * problem.beta_max))


def test_one_sample() -> None:
    problem = cvxnn.mlp_problem([[1.0, 2.0]], [[3.0]], activation="relu", gates=[[1.0], [1.0]], beta=0.5)
    result = cvxnn.solve(problem, "ssnal", tol=1e-8)
    assert result.status == "certified"
    # min (|x| t - 3)^2 / 2 + t / 2 with |x| = sqrt(5)
    assert result.objective == pytest.approx((0.5 / 5**0.5) ** 2 / 2 + 0.5 / 5**0.5 * (3 - 0.5 / 5**0.5), rel=1e-7)


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_zero_is_optimal(share: float) -> None:
    result = cvxnn.solve(make_problem(share=share), "ssnal", tol=1e-8)
    assert result.status == "certified"
    assert not result.factors[0].any()


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scales(scale: float) -> None:
    X, y = make_data(20, 3)
    plain = make_problem(20, 3)
    gates = plain.gates.numpy()
    beta = plain.beta
    scaled = cvxnn.mlp_problem(scale * X, y[:, None], activation="relu", gates=gates, beta=scale * beta)
    one, two = (cvxnn.solve(problem, "ssnal", tol=1e-7) for problem in (plain, scaled))
    assert two.status == "certified"
    assert two.objective == pytest.approx(one.objective, rel=1e-6)


def test_warm_start_is_used() -> None:
    problem = make_problem()
    result = cvxnn.solve(problem, "ssnal", tol=1e-8)
    again = cvxnn.solve(problem, "ssnal", tol=1e-6, init=result)
    assert again.status == "certified"
    assert again.n_iter == 0
    near = cvxnn.solve(problem.with_beta(0.9 * problem.beta), "ssnal", tol=1e-7, init=result)
    assert near.status == "certified"


@pytest.fixture
def many_gates() -> Problem:
    return make_problem(16, 3, share=0.02, gates="enumerate")


def test_working_set(many_gates: Problem) -> None:
    """Few gates at a time lead to the optimum over all, and what was priced is in the trace."""
    whole = cvxnn.solve(many_gates, "ssnal", tol=1e-7)
    result = cvxnn.solve(many_gates, "ssnal", tol=1e-7, solver_options={"working_set": 10, "new_gates": 5})
    assert result.status == "certified"
    assert result.objective == pytest.approx(whole.objective, rel=2e-7)
    assert whole.trace[-1]["priced"] == 0
    assert whole.trace[-1]["working_set"] == many_gates.n_gates
    priced = [entry["priced"] for entry in result.trace]
    assert priced == sorted(priced)
    assert priced[0] >= many_gates.n_gates
    assert all(count % many_gates.n_gates == 0 for count in priced)
    assert result.trace[-1]["working_set"] < many_gates.n_gates


def test_resumes_to_the_same_result(many_gates: Problem, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tol": 1e-7, "solver_options": {"working_set": 10, "new_gates": 5}}
    whole = cvxnn.solve(many_gates, "ssnal", **options)
    first = cvxnn.solve(many_gates, "ssnal", max_iter=2, checkpoint=tmp_path / "run", **options)
    assert first.status == "max_iter"
    rest = cvxnn.solve(many_gates, "ssnal", checkpoint=tmp_path / "run", resume=True, **options)
    assert rest.objective == whole.objective
    assert rest.n_iter == whole.n_iter
    assert [entry["priced"] for entry in rest.trace] == [entry["priced"] for entry in whole.trace]


def test_time_limit() -> None:
    result = cvxnn.solve(make_problem(share=1e-4), "ssnal", tol=1e-14, time_limit=1e-3)
    assert result.status == "time_limit"
    assert result.certificate.lower_bound <= result.objective


def test_several_outputs_are_refused() -> None:
    X, y = make_data(10, 2)
    with pytest.raises(UnsupportedError, match="one output"):
        cvxnn.solve(cvxnn.mlp_problem(X, np.stack([y, -y], axis=1), activation="relu"), "ssnal")


def cells(X: np.ndarray) -> Cones:
    gates = enumerate_gates(X)
    return Cones(torch.from_numpy(X), torch.from_numpy(activation_patterns(X, gates)), torch.from_numpy(gates))


def awkward_rows(kind: str, d: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    X = rng.standard_normal((10, d))
    if kind == "duplicates":
        return np.concatenate([X, X[:5], -X[:3], np.zeros((1, d))])
    if kind == "grid":
        X = np.round(2 * rng.standard_normal((14, d)))
        return X[np.abs(X).sum(1) > 0]
    if kind == "near duplicates":
        return np.concatenate([X, X[:4] + 1e-9 * rng.standard_normal((4, d))])
    if kind == "circle":
        t = np.linspace(0, 6, 20)
        return np.stack([np.cos(t), np.sin(t), np.ones(20)][:d], axis=1)
    return X


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "duplicates", "grid", "near duplicates", "circle"])
def test_closed_forms_are_the_projections(kind: str, d: int) -> None:
    cones = cells(awkward_rows(kind, d))
    assert cones.polygons is not None
    rng = np.random.default_rng(3)
    gate = torch.arange(cones.n_gates).repeat_interleave(8)
    z = torch.from_numpy(rng.standard_normal((len(gate), d)) * 10.0 ** rng.integers(-60, 60, (len(gate), 1)))
    found, failed = cones.polygons.project(gate, z)
    assert float(failed.double().mean()) < (0.9 if kind == "near duplicates" else 0.1)
    done, size = ~failed, z.norm(dim=1)
    wanted = project_cones(cones.rows, cones.signs(gate), z)
    assert float(((found.point - wanted.point).norm(dim=1) / size)[done].max()) < 1e-11
    assert float(cones.violation(gate, found.point)[done].max()) < 1e-11
    # What certifies is sound wherever it is.
    assert bool((found.multiplier >= 0).all())
    polar = torch.einsum("ra,rad->rd", found.multiplier, cones.normals(gate, found.index))
    assert float(((polar - found.polar).norm(dim=1) / size).max()) < 1e-12
    assert bool(((z + polar).norm(dim=1) >= wanted.point.norm(dim=1) - 1e-12 * size).all())


def test_rows_without_rank_have_no_polygons() -> None:
    assert not Polygons.suit(torch.ones(4, 3, dtype=torch.float64))
    assert not Polygons.suit(torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_long_projections(d: int) -> None:
    rng = np.random.default_rng(4)
    X = rng.standard_normal((12, d))
    gates = rng.standard_normal((d, 9))
    cones = Cones(torch.from_numpy(X), torch.from_numpy(activation_patterns(X, gates)), torch.from_numpy(gates))
    chosen_gates = torch.arange(9)
    projections = LongProjections(cones, chosen_gates)
    if projections.faces is not None:
        # As if some of the cones were left to the general method.
        cones.polygons._known[::3] = False
        projections = LongProjections(cones, chosen_gates)
        assert projections.memory is not None
    arrays = ArrayProjections(cones, chosen_gates)
    for _ in range(3):
        z = torch.from_numpy(rng.standard_normal((2, 9, d)))
        wanted = cones.project(chosen_gates.repeat(2), z.view(18, d)).point
        chosen, point, projectors = projections(z, 0.5)
        assert set(chosen.tolist()) == set((wanted.norm(dim=1) > 0.5).nonzero()[:, 0].tolist())
        assert torch.allclose(point, wanted[chosen], rtol=0, atol=1e-12)
        assert torch.allclose((projectors @ z.view(18, d)[chosen].unsqueeze(2)).squeeze(2), point, atol=1e-12)
        long = arrays.measure(z.numpy(), 0.5)
        rows, points, faces = long.find()
        assert sorted(rows.tolist()) == sorted(chosen.tolist())
        assert np.allclose(points, wanted.numpy()[rows], rtol=0, atol=1e-12)
        assert np.allclose(long.lengths, np.linalg.norm(points, axis=1), rtol=1e-12)
        assert np.allclose((faces @ z.numpy().reshape(18, d)[rows, :, None])[:, :, 0], points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["squared", "huber", "logistic"])
def test_losses_on_arrays(loss: str) -> None:
    """As the loss itself says, with samples of weight 0, whose targets count for nothing."""
    problem = make_problem(n=9, loss=loss, sample_weight=np.array([1.0, 0.0, 2.0] * 3))
    fast, w, Y = ArrayLoss(problem), problem.weights, problem.Y64
    T = 3 * np.random.default_rng(0).standard_normal(9)
    column = torch.from_numpy(T)[:, None]
    assert fast.value(T) == pytest.approx(float(problem.loss.value(column, Y, w)), rel=1e-14)
    prox = problem.loss.prox(column, Y, w, 0.3).numpy()[:, 0]
    assert np.allclose(fast.prox(T, 0.3), prox, rtol=1e-14, atol=1e-15)
    curvature = problem.loss.hessian_product(column, Y, w, torch.ones_like(Y)).numpy()[:, 0]
    assert np.allclose(fast.curvature(T), curvature, rtol=1e-14, atol=0)


def test_an_interruption_is_reported_though_the_point_is_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the last step, before its certificate."""
    problem = make_problem()
    plain, calls = Ssnal.iterate, []

    def stop(self: Ssnal) -> Iterate:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(Ssnal, "iterate", stop)
    result = cvxnn.solve(problem, "ssnal", tol=1e-5)
    assert result.certificate.relative_gap <= 1e-5
    assert result.status == "interrupted"
