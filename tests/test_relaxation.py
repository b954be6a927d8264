"""The gated relaxation of ReLU problems, and the ReLU networks that cone decomposition makes of gated solutions."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.cones import FEASIBILITY
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.relaxation import gated_relaxation, to_relu
from tests.helpers import make_data, make_problem, random_blocks

OPTIONS = {
    "plain": {},
    "output_bias": {"output_bias": True},
    "hidden_bias": {"hidden_bias": True},
    "sum": {"reduction": "sum", "beta": 0.3},
    "weights": {"sample_weight": np.linspace(0.2, 2.0, 24)},
    "float32": {"dtype": "float32"},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
over_methods = pytest.mark.parametrize("method", ["exact", "approximate"])


def pair(options, **data):
    """A ReLU problem and its relaxation."""
    relu = make_problem(**({"n_gates": 8, "activation": "relu"} | data | options))
    return relu, gated_relaxation(relu)


def point_networks(problem, Z, decomposition):
    """Predictions of the gated point and of the ReLU network on the training data, in float64."""
    op = problem.operator.double()
    X = (op.X[:, :-1] if problem.hidden_bias else op.X).double()
    return op.apply(Z) + decomposition.intercept, decomposition.network(torch.float64)(X)


@over_options
@over_methods
@pytest.mark.parametrize("c", [1, 3])
def test_predictions_and_feasibility(options, method, c):
    _, gated = pair(options, c=c)
    result = cvxnn.solve(gated, tol=1e-2)
    decomposition = to_relu(result, method=method)
    before, after = point_networks(gated, result.Z.double(), decomposition)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(decomposition.intercept, result.intercept)
    assert decomposition.certificate.infeasibility <= FEASIBILITY
    relu, (U, V) = decomposition.problem, decomposition.factors
    assert relu.activation == "relu"
    assert torch.equal(relu.gates, gated.gates)
    for k in range(relu.n_gates):
        X = relu.operator.double().X
        slack = torch.where(relu.patterns[:, [k]], 1.0, -1.0) * (X @ U[k])
        assert (slack >= -FEASIBILITY * X.norm(dim=1, keepdim=True) * U[k].norm(dim=0)).all()
    torch.testing.assert_close(U.norm(dim=1), V.norm(dim=1), rtol=1e-12, atol=1e-300)
    assert decomposition.certificate.loss == pytest.approx(result.certificate.loss, rel=1e-8, abs=1e-12)
    assert decomposition.gated_objective == pytest.approx(result.objective, rel=1e-12)
    assert decomposition.ratio == pytest.approx(decomposition.certificate.penalty / result.certificate.penalty)
    assert decomposition.ratio >= 1


@over_options
@pytest.mark.parametrize("seed", [0, 1])
def test_objectives_are_in_order(options, seed):
    relu, gated = pair(options, c=1, seed=seed)
    tol = 1e-4 if relu.dtype == torch.float32 else 1e-6
    relaxed, best = cvxnn.solve(gated, tol=tol), cvxnn.solve(relu, tol=tol)
    assert relaxed.status == best.status == "certified"
    exact, approximate = to_relu(relaxed), to_relu(relaxed, method="approximate")
    assert relaxed.certificate.lower_bound <= best.objective
    assert relaxed.objective <= best.objective * (1 + tol)
    assert best.objective * (1 - tol) <= exact.objective
    assert exact.objective <= approximate.objective * (1 + 1e-9)
    penalties = [d.certificate.penalty for d in (exact, approximate)]
    assert penalties[1] <= 2**0.5 * penalties[0] * (1 + 1e-9)


def test_relaxation_is_below_several_outputs_too():
    for seed in range(2):
        relu, gated = pair({"n_gates": 4, "beta": 0.1}, c=3, seed=seed)
        relaxed, best = cvxnn.solve(gated), cvxnn.solve(relu, tol=1e-2, time_limit=2)
        exact, approximate = to_relu(relaxed), to_relu(relaxed, method="approximate")
        assert relaxed.certificate.lower_bound <= best.objective
        assert best.certificate.lower_bound <= exact.objective <= approximate.objective * (1 + 1e-9)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "huber", "logistic"])
def test_relaxation_is_below_random_relu_points(loss):
    relu = make_problem(loss, activation="relu", n_gates=6)
    gated = cvxnn.solve(gated_relaxation(relu), tol=1e-2)
    rng = np.random.default_rng(0)
    gate = torch.arange(relu.n_gates)
    for _ in range(20):
        U = relu.cones.project(gate, torch.tensor(rng.standard_normal((relu.n_gates, 3)))).point[:, :, None]
        V = torch.tensor(rng.standard_normal((relu.n_gates, relu.Y.shape[1], 1)))
        point = cvxnn.certify(relu, factors=(0.1 * U, 0.1 * V))
        assert point.infeasibility <= FEASIBILITY
        assert gated.certificate.lower_bound <= point.primal


@over_methods
def test_exact_penalty_is_that_of_interior_point(method):
    cp = pytest.importorskip("cvxpy")
    problem = make_problem(c=1, seed=3)
    Z = random_blocks(problem)
    decomposition = to_relu(problem, Z, method=method)
    expected = 0.0
    for k in range(problem.n_gates):
        K = np.where(problem.patterns[:, [k]].numpy(), 1.0, -1.0) * problem.operator.X.numpy()
        u = cp.Variable(K.shape[1])
        w = u - Z[k, :, 0].numpy()
        expected += cp.Problem(cp.Minimize(cp.norm(u) + cp.norm(w)), [K @ u >= 0, K @ w >= 0]).solve(
            cp.CLARABEL, tol_gap_rel=1e-10, tol_gap_abs=1e-10, tol_feas=1e-10
        )
    found = decomposition.certificate.penalty
    if method == "exact":
        assert found == pytest.approx(expected, rel=1e-7)
    else:
        assert expected * (1 - 1e-7) <= found <= 2**0.5 * expected


def test_several_outputs_take_the_cheaper_split_in_every_gate():
    problem = make_problem(c=3, n_gates=6)
    cones = gated_cones(problem)
    Z = random_blocks(problem)
    Z[1] = Z[1, :, :1] @ torch.ones(1, 3, dtype=torch.float64)  # one singular pair, three columns
    Z[2] = 0.0
    inside = cones.interior(torch.arange(problem.n_gates))[0]
    Z[3] = inside[3][:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    decomposition = to_relu(problem, Z)
    torch.testing.assert_close(network_blocks(decomposition), Z, rtol=0, atol=1e-9)
    U, V = decomposition.factors
    penalty = (U.norm(dim=1) * V.norm(dim=1)).sum(1)
    for k in range(problem.n_gates):
        gate = torch.tensor([k])
        left, values, _ = torch.linalg.svd(Z[k], full_matrices=False)
        pairs = sum(cost(cones, gate, left[:, j] * values[j]) for j in range(3))
        outputs = sum(cost(cones, gate, Z[k, :, j]) for j in range(3))
        assert float(penalty[k]) == pytest.approx(min(pairs, outputs), rel=1e-6, abs=1e-12)
    assert int((penalty[2] > 0).sum()) == 0
    assert (U[1].norm(dim=0) > 0).sum() <= 2
    assert float(penalty[3]) == pytest.approx(float(Z[3].norm()), rel=1e-9)  # in the cone: nothing is lost
    assert decomposition.n_neurons == int((U.norm(dim=1) > 0).sum())


def gated_cones(problem):
    return cvxnn.mlp_problem(problem.operator.X, problem.Y, activation="relu", gates=problem.gates).cones


def network_blocks(decomposition):
    U, V = decomposition.factors
    return U @ V.mT


def cost(cones, gate, z):
    from cvxnn.cones import decompose

    u, w = decompose(cones, gate, z[None])
    return float(u.norm() + w.norm())


def test_factors_and_blocks_give_the_same_network():
    problem = make_problem(c=2, n_gates=6)
    result = cvxnn.solve(problem, "bm_lbfgs", tol=1e-4)
    assert result.factors is not None
    by_result = to_relu(result)
    by_factors = to_relu(problem, factors=result.factors)
    by_blocks = to_relu(problem, result.factors[0] @ result.factors[1].mT)
    torch.testing.assert_close(network_blocks(by_result), network_blocks(by_blocks), rtol=0, atol=1e-10)
    torch.testing.assert_close(network_blocks(by_factors), network_blocks(by_blocks), rtol=0, atol=1e-10)
    assert by_result.gated_objective == pytest.approx(result.objective, rel=1e-12)
    # Blocks that are stated without their factors cost their nuclear norm.
    assert by_blocks.gated_objective <= by_factors.gated_objective * (1 + 1e-12)


def test_the_certificate_knows_the_gated_bound():
    for beta in (1e-3, 1e-1):
        _, gated = pair({"beta": beta}, c=1)
        result = cvxnn.solve(gated, tol=1e-6)
        certificate = to_relu(result).certificate
        assert certificate.lower_bound >= result.certificate.lower_bound * (1 - 1e-9)
        again = cvxnn.certify(to_relu(result).problem, factors=to_relu(result).factors, dual=result.dual)
        assert certificate.primal == again.primal


def test_zero_blocks_are_the_zero_network():
    problem = make_problem(c=3, output_bias=True)
    decomposition = to_relu(problem, torch.zeros(problem.operator.block_shape))
    assert decomposition.n_neurons == 0
    assert decomposition.ratio == 1
    assert decomposition.certificate.penalty == 0
    assert decomposition.objective == pytest.approx(decomposition.gated_objective, rel=1e-14)
    assert decomposition.network()(problem.operator.X).std(0).max() < 1e-14
    assert "n_neurons=0" in repr(decomposition)


def test_scopes_and_round_trip():
    X, Y, _ = make_data(n=10, d=2, c=1)
    relu = cvxnn.mlp_problem(X, Y, activation="relu", gates="enumerate", beta=1e-2)
    gated = gated_relaxation(relu)
    assert (relu.scope, gated.scope) == ("relu_network", "all_gates")
    assert gated.cones is None
    result = cvxnn.solve(gated, tol=1e-6)
    decomposition = to_relu(result)
    assert decomposition.certificate.scope == "relu_network"
    assert result.certificate.lower_bound <= cvxnn.solve(relu, tol=1e-6).objective
    for scope in ("given_gates", "sampled_gates", "network_gates"):
        assert gated_relaxation(relu.with_scope(scope)).scope == scope


def test_decompositions_are_starting_points():
    relu, gated = pair({}, c=1)
    best = cvxnn.solve(relu, tol=1e-6)
    decomposition = to_relu(cvxnn.solve(gated, tol=1e-6))
    warm = cvxnn.solve(decomposition.problem, init=decomposition.factors, tol=1e-6)
    assert warm.objective == pytest.approx(best.objective, rel=2e-6)
    started = cvxnn.solve(relu, "bm_projected_gd", init=decomposition.factors, max_iter=1)
    assert started.objective <= decomposition.objective * (1 + 1e-12)


def test_thin_cells_cost_much_but_predict_the_same():
    X = np.array([[1.0, 1e-5], [-1.0, 1e-5], [0.3, 1.0]])
    problem = cvxnn.mlp_problem(X, np.ones(3), gates=np.array([[0.0], [1.0]]), beta=1e-2)
    Z = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    decomposition = to_relu(problem, Z)
    before, after = point_networks(problem, Z, decomposition)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    # Both parts reach the height 1e5 / 2 at which the cell is as wide as Z.
    assert decomposition.ratio == pytest.approx(1e5, rel=1e-3)


@over_methods
def test_gates_without_interior_are_named(method):
    X = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.4, 0.3]])
    gates = np.array([[1.0, 0.0], [0.5, 1.0]])  # the second is on the hyperplanes of two samples: its cone is a ray
    problem = cvxnn.mlp_problem(X, np.arange(4.0), gates=gates)
    Z = torch.zeros(2, 2, 1, dtype=torch.float64)
    Z[0], Z[1, 1] = 1.0, 2.0
    decomposition = to_relu(problem, Z, method=method)  # in the span of the ray
    torch.testing.assert_close(network_blocks(decomposition), Z, rtol=0, atol=1e-10)
    Z[1, 0] = 1.0
    with pytest.raises(InvalidInputError, match="gate 1 has no interior"):
        to_relu(problem, Z, method=method)


def test_zero_rows_and_duplicates():
    X, Y, _ = make_data(n=12, d=3, c=2)
    X = np.vstack([X, np.zeros((1, 3)), X[:3], 2 * X[:2]])
    Y = np.vstack([Y, np.ones((1, 2)), Y[:3], Y[:2]])
    problem = cvxnn.mlp_problem(X, Y, n_gates=10, beta=1e-2)
    result = cvxnn.solve(problem, tol=1e-5)
    decomposition = to_relu(result)
    before, after = point_networks(problem, result.Z, decomposition)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_wrong_input_is_refused():
    problem = make_problem(c=1)
    Z = random_blocks(problem)
    result = cvxnn.solve(problem)
    relu = make_problem(c=1, activation="relu")
    with pytest.raises(InvalidInputError, match="method is 'best'"):
        to_relu(result, method="best")
    with pytest.raises(InvalidInputError, match="point is a problem for 'relu'"):
        to_relu(relu, factors=(Z, Z))
    with pytest.raises(InvalidInputError, match="point is a problem for 'relu'"):
        to_relu(cvxnn.solve(relu))
    with pytest.raises(InvalidInputError, match="point is a problem for 'linear'"):
        to_relu(make_problem(c=1, activation="linear"), Z[:1])
    with pytest.raises(InvalidInputError, match="point is a Tensor"):
        to_relu(Z)
    with pytest.raises(InvalidInputError, match="beside a Result"):
        to_relu(result, Z)
    with pytest.raises(InvalidInputError, match="exactly one of Z and factors"):
        to_relu(problem)
    with pytest.raises(InvalidInputError, match="Z has shape"):
        to_relu(problem, Z[1:])
    with pytest.raises(InvalidInputError, match="NaN"):
        to_relu(problem, Z * float("nan"))
    with pytest.raises(InvalidInputError, match="intercept"):
        to_relu(problem, Z, intercept=[1.0])
    with pytest.raises(UnsupportedError, match="norms"):
        other = make_problem(c=1, norms=("l1", "l2"))
        to_relu(other, Z)
    for wrong in (problem, None):
        with pytest.raises(InvalidInputError, match="a ReLU problem is wanted"):
            gated_relaxation(wrong)
