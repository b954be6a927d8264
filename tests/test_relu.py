"""ReLU problems: points, certificates, scopes, networks, files, estimators (solvers have tests of their own)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.bounds import dual_bound, worst_neuron
from cvxnn.cones import FEASIBILITY
from cvxnn.dual_norms import price_cones
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.solvers import SOLVERS
from tests.helpers import LOSSES, make_data, make_problem

RELU_SOLVERS = [name for name, solver in SOLVERS.items() if solver.cones]


@pytest.fixture(scope="module")
def problem():
    return make_problem(activation="relu", n_gates=8, c=1, beta=5e-2)


@pytest.fixture(scope="module")
def everything():
    """All patterns of data of rank 2."""
    X, Y, _ = make_data(20, 2, 1)
    return cvxnn.mlp_problem(X, Y, activation="relu", gates="enumerate", beta=2e-2)


def true_objective(problem, U, V, b=0.0):
    """F((X U)_+ V^T) + beta/2 (...) of the mean squared loss, by definition."""
    X = problem.operator.X
    outputs = sum((X @ U[k]).clamp_min(0) @ V[k].T for k in range(len(U))) + b
    loss = 0.5 * (outputs - problem.Y).square().sum() / len(X)
    return float(loss + problem.beta / 2 * (U.square().sum() + V.square().sum()))


def feasible_factors(problem, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_gates, p, q = problem.operator.block_shape
    gate = torch.arange(n_gates).repeat_interleave(m)
    start = torch.from_numpy(problem.operator.gates).T[gate]
    noise = 0.5 * torch.randn(len(gate), p, generator=generator, dtype=torch.float64)
    u = problem.cones.project(gate, start + noise).point
    V = torch.randn(n_gates, q, m, generator=generator, dtype=torch.float64)
    return u.view(n_gates, m, p).mT.contiguous(), V


def test_feasible_columns_make_the_cone_model_a_network(problem):
    U, V = feasible_factors(problem)
    certificate = cvxnn.certify(problem, factors=(U, V))
    assert certificate.infeasibility <= FEASIBILITY
    assert certificate.primal == pytest.approx(true_objective(problem, U, V), rel=1e-12)
    network = cvxnn.networks.build_network(problem, None, torch.zeros(1).double(), factors=(U, V))
    with torch.no_grad():
        outputs = network(problem.operator.X)
    torch.testing.assert_close(outputs, problem.operator.apply_factors(U, V), rtol=0, atol=1e-12)
    assert network.relu and network.gates is None


def test_infeasible_columns_are_called_so(problem):
    U, V = feasible_factors(problem)
    U[0, :, 0] = -U[0, :, 0]
    certificate = cvxnn.certify(problem, factors=(U, V))
    assert certificate.infeasibility > 1e-3
    assert certificate.relative_gap == math.inf and certificate.stationarity == math.inf
    assert certificate.theorem_bound is None
    assert certificate.primal == pytest.approx(true_objective(problem, U, V), rel=1e-12)
    assert "leave their cones" in certificate.summary()


def test_any_network_is_a_point_where_all_neurons_are_allowed(everything):
    U, V = feasible_factors(everything, m=1)
    U = U.flip(0)
    best = cvxnn.solve(everything, tol=1e-8)
    certificate = cvxnn.certify(everything, factors=(U, V), dual=best.dual)
    assert everything.scope == certificate.scope == "relu_network"
    assert certificate.infeasibility > 1e-3 and certificate.relative_gap < math.inf
    assert certificate.lower_bound <= best.objective <= certificate.primal


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_feasibility_does_not_depend_on_scales(problem, scale):
    U, V = feasible_factors(problem)
    U[0, :, 0] -= 0.1 * torch.from_numpy(problem.operator.gates)[:, 0] * U[0, :, 0].norm()
    seen = cvxnn.certify(problem, factors=(U, V)).infeasibility
    assert cvxnn.certify(problem, factors=(scale * U, V)).infeasibility == pytest.approx(seen, rel=1e-6, abs=1e-15)


def test_blocks_are_refused(problem):
    with pytest.raises(InvalidInputError, match="factors"):
        cvxnn.certify(problem, Z=torch.zeros(problem.operator.block_shape))
    with pytest.raises(UnsupportedError, match="factors"):
        problem.objective(torch.zeros(problem.operator.block_shape))
    with pytest.raises(InvalidInputError, match="init"):
        cvxnn.solve(problem, init=np.zeros(problem.operator.block_shape))


def test_solvers_without_cones_are_refused(problem):
    for name in SOLVERS:
        if name not in RELU_SOLVERS:
            with pytest.raises(UnsupportedError, match="cones"):
                cvxnn.solve(problem, name)
    assert {"ssnal", "interior_point", "bm_global", "bm_projected_gd", "frank_wolfe"} <= set(RELU_SOLVERS)


@pytest.mark.parametrize("solver", ["ssnal", "interior_point"])
def test_convex_solvers_need_one_output(solver):
    with pytest.raises(UnsupportedError, match="output"):
        cvxnn.solve(make_problem(activation="relu", c=2), solver)


def test_norms_other_than_l2_are_refused():
    with pytest.raises(UnsupportedError, match="norms"):
        make_problem(activation="relu", norms=("l1", "l2"))


@pytest.mark.parametrize("solver", RELU_SOLVERS)
@pytest.mark.parametrize("loss", ["squared", "huber", "logistic"])
@pytest.mark.parametrize("output_bias", [False, True])
def test_solvers_agree_for_one_output(solver, loss, output_bias):
    X, Y, labels = make_data(22, 3, 1, seed=3)
    targets = (labels[:, None] == 0).astype(float) if loss == "logistic" else Y
    problem = cvxnn.mlp_problem(
        X, targets, activation="relu", n_gates=6, beta=2e-2, loss=loss, output_bias=output_bias, random_state=1
    )
    reference = cvxnn.solve(problem, "interior_point", tol=1e-7)
    assert reference.status == "certified"
    tol = 1e-5 if solver == "bm_projected_gd" else 1e-6
    result = cvxnn.solve(problem, solver, tol=tol, random_state=0, max_iter=None if tol < 1e-5 else 4000)
    assert result.status == "certified"
    assert result.objective == pytest.approx(reference.objective, rel=2 * tol)
    assert result.certificate.infeasibility <= FEASIBILITY
    with torch.no_grad():
        outputs = result.network()(problem.operator.X)
    cone_model = problem.operator.apply_factors(*result.factors) + result.intercept
    torch.testing.assert_close(outputs, cone_model, rtol=0, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
def test_several_outputs(loss):
    problem = make_problem(loss, activation="relu", n=18, d=2, c=2, gates="enumerate", beta=2e-2)
    result = cvxnn.solve(problem, tol=1e-6, random_state=0)
    assert result.status == "certified" and result.solver == "bm_global"
    other = cvxnn.solve(problem, "frank_wolfe", tol=1e-5)
    assert other.objective == pytest.approx(result.objective, rel=2e-5)


def test_all_patterns_are_better_than_some(everything):
    X, Y = everything.operator.X.numpy(), everything.Y.numpy()
    some = cvxnn.mlp_problem(X, Y, activation="relu", n_gates=6, beta=everything.beta)
    gated = cvxnn.mlp_problem(X, Y, activation="gated_relu", gates="enumerate", beta=everything.beta)
    best = cvxnn.solve(everything, tol=1e-8)
    assert best.objective <= cvxnn.solve(some, tol=1e-8).objective * (1 + 1e-8)
    assert cvxnn.solve(gated, tol=1e-8).certificate.lower_bound <= best.objective


def test_beta_max(problem):
    above = cvxnn.solve(problem.with_beta(1.0001 * problem.beta_max), tol=1e-6)
    below = cvxnn.solve(problem.with_beta(0.99 * problem.beta_max), tol=1e-6)
    assert float(above.factors[0].abs().max()) == 0.0
    assert float(below.factors[0].abs().max()) > 0.0


def test_pricing_finds_the_worst_neuron(everything):
    nu = everything.dual_candidate(torch.zeros_like(everything.Y64))
    neuron = worst_neuron(everything, nu)
    angles = torch.linspace(0, 2 * math.pi, 200_001, dtype=torch.float64)
    directions = torch.stack([angles.cos(), angles.sin()])
    values = (nu.T @ (everything.operator.X @ directions).clamp_min(0)).norm(dim=0)
    assert float(neuron.upper) >= float(values.max())
    assert float(values.max()) * (1 - 1e-9) <= float(neuron.lower) <= float(values.max()) * (1 + 1e-5)
    reached = nu.T @ (everything.operator.X @ neuron.u.T).clamp_min(0)
    assert float(reached.norm()) == pytest.approx(float(neuron.lower), rel=1e-12)
    bound = dual_bound(everything, nu)
    assert bound.dual_norm == pytest.approx(float(neuron.upper), rel=1e-12)


def test_caps_change_nothing_but_the_work(everything, monkeypatch):
    op, cones = everything.operator, everything.cones
    nu = everything.dual_candidate(torch.zeros_like(everything.Y64))
    plain = price_cones(op, everything.norm, cones, nu)
    monkeypatch.setattr("cvxnn.cones.cones._MANY_GATES", 1)
    again = cvxnn.mlp_problem(op.X, everything.Y, activation="relu", gates="enumerate", beta=2e-2)
    capped = price_cones(again.operator, again.norm, again.cones, nu)
    assert again.cones.caps is not None
    assert float(capped.upper.max()) == pytest.approx(float(plain.upper.max()), rel=1e-10)
    assert len(capped.neurons) <= len(plain.neurons)


def test_selected_gates(problem):
    gates = torch.tensor([5, 1])
    part = problem.operator.select(gates)
    L = torch.randn(problem.n_samples, 1, dtype=torch.float64)
    torch.testing.assert_close(part.adjoint(L), problem.operator.adjoint(L)[gates])
    assert part.activation == "relu" and part.n_gates == 2


def test_unfinished_bounds_stay_sound():
    problem = make_problem(activation="relu", n=20, d=4, c=3, n_gates=12, beta=1e-3)
    nu = problem.dual_candidate(torch.zeros_like(problem.Y64))
    quick, full = dual_bound(problem, nu, seconds=0.0), dual_bound(problem, nu)
    assert quick.dual_norm >= full.dual_norm * (1 - 1e-9)
    assert quick.lower_bound <= full.lower_bound * (1 + 1e-9)


def test_save_load_and_estimators(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 2))
    y = np.maximum(X[:, 0], 0) - 0.5 * np.maximum(X[:, 1] + 0.2, 0)
    model = cvxnn.ConvexMLPRegressor(activation="relu", n_gates=30, beta=1e-4, tol=1e-5, random_state=0).fit(X, y)
    assert model.certificate_.relative_gap <= 1e-5 and model.network_.relu
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    assert loaded.network_.relu and loaded.certificate_ == model.certificate_


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    X, Y, _ = make_data(20, 2, 2)
    problem = cvxnn.mlp_problem(X, Y, activation="relu", gates="enumerate", beta=1e-2, hidden_bias=False)
    network = cvxnn.solve(problem, tol=1e-4).network()
    path = cvxnn.export_onnx(network, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(path))
    outputs = session.run(["y"], {"x": X})[0]
    with torch.no_grad():
        np.testing.assert_allclose(outputs, network(torch.from_numpy(X)).numpy(), atol=1e-10)


@pytest.mark.parametrize(
    ("X", "Y"),
    [
        (np.ones((1, 1)), np.ones(1)),
        (np.zeros((4, 2)), np.arange(4.0)),
        (np.repeat([[1.0, 2.0]], 5, axis=0), np.arange(5.0)),
        (np.array([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]]), np.array([1.0, -1.0, 0.5])),
        (1e-8 * np.arange(1, 7.0).reshape(3, 2), np.arange(3.0)),
        (1e8 * np.arange(1, 7.0).reshape(3, 2), np.arange(3.0)),
    ],
    ids=["one sample", "zeros", "duplicates", "a line", "tiny", "huge"],
)
def test_degenerate_data(X, Y):
    problem = cvxnn.mlp_problem(X, Y, activation="relu", gates="enumerate", beta=1e-1)
    for solver in ("ssnal", "bm_global"):
        result = cvxnn.solve(problem, solver, tol=1e-6, time_limit=20)
        assert result.certificate.lower_bound <= result.objective * (1 + 1e-9)
        assert result.status == "certified", solver


@pytest.mark.parametrize("seed", range(6))
def test_no_gate_is_violated_at_the_optimum(seed):
    """Where pricing finds no candidate, solvers end instead of reducing over nothing."""
    rng = np.random.default_rng(seed)
    X, Y, gates = rng.normal(size=(3, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 2))
    problem = cvxnn.mlp_problem(X, Y, activation="relu", gates=gates, beta=0.1, reduction="sum")
    for solver in ("bm_global", "frank_wolfe"):
        result = cvxnn.solve(problem, solver, tol=1e-8, max_iter=50, time_limit=5)
        assert result.certificate.lower_bound <= result.objective * (1 + 1e-9)


def test_nothing_to_add():
    problem = cvxnn.mlp_problem(
        np.eye(2), np.array([[1.0], [-1.0]]), activation="relu", gates="enumerate", reduction="sum", beta=5.0
    )
    for solver in RELU_SOLVERS:
        assert cvxnn.solve(problem, solver, tol=0.0, max_iter=3).objective == pytest.approx(1.0)


@pytest.mark.parametrize("beta", [1e-6, 1e-18, 1e-300])
@pytest.mark.parametrize("solver", ["ssnal", "frank_wolfe"])
def test_hopeless_scales_end_with_a_status(solver, beta):
    t = np.linspace(-1, 1, 9)
    X, y = np.c_[t + (1e8 if beta == 1e-6 else 0.0), np.ones(9)], np.abs(t) + 0.1
    problem = cvxnn.mlp_problem(X, y, activation="relu", gates="enumerate", beta=beta)
    result = cvxnn.solve(problem, solver, max_iter=20, time_limit=5)
    assert result.certificate.lower_bound <= result.objective * (1 + 1e-9)
    assert result.status == "certified" or result.certificate.relative_gap > 1e-4
