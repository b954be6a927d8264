"""Problems: how data, gates, targets, weights and options are taken."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.operators import MLPOperator
from cvxnn.patterns import activation_patterns
from tests.helpers import LOSSES, NORMS, make_data, make_problem, random_blocks

X, Y, LABELS = make_data()


def test_given_gates_keep_order_and_number():
    gates = np.random.default_rng(1).standard_normal((3, 4))
    gates = np.hstack([gates, gates[:, :1], -np.zeros((3, 1)), 2 * gates[:, 1:2]])
    problem = cvxnn.mlp_problem(X, Y, gates=gates)
    assert problem.n_gates == 7
    assert np.array_equal(problem.gates.numpy(), gates)
    assert np.array_equal(problem.patterns.numpy(), X @ gates >= 0)
    assert problem.scope == "given_gates"
    assert problem.operator.block_shape == (7, 3, 2)


def test_sampled_gates_are_distinct_and_active():
    few = X[:5, :2]
    problem = cvxnn.mlp_problem(few, Y[:5], n_gates=500)
    columns = {tuple(column) for column in problem.patterns.T.tolist()}
    assert len(columns) == problem.n_gates < 500
    assert problem.patterns.any(0).all()
    assert np.array_equal(problem.patterns.numpy(), activation_patterns(few, problem.gates.numpy()))
    assert problem.scope == "sampled_gates"


def test_first_of_equal_patterns_is_kept():
    draws = cvxnn.mlp_problem(X[:4], Y[:4], n_gates=60, random_state=3)
    fewer = cvxnn.mlp_problem(X[:4], Y[:4], gates=draws.gates.numpy())
    assert torch.equal(fewer.patterns, draws.patterns)


def test_random_state_decides_the_gates():
    first, same, other = (cvxnn.mlp_problem(X, Y, random_state=s).gates for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_enumerated_gates():
    plane = X[:6, :2]
    problem = cvxnn.mlp_problem(plane, Y[:6], gates="enumerate")
    assert problem.scope == "all_gates"
    inactive = (np.random.default_rng(0).standard_normal((5000, 2)) @ plane.T < 0).all(1).any()
    assert problem.n_gates == 2 * 6 - inactive  # 2 N cells in the plane, less the one without active samples
    sampled = cvxnn.mlp_problem(plane, Y[:6], n_gates=3000)
    assert {tuple(c) for c in sampled.patterns.T.tolist()} == {tuple(c) for c in problem.patterns.T.tolist()}
    with pytest.raises(UnsupportedError, match="max_cells"):
        cvxnn.mlp_problem(X, Y, gates="enumerate", max_cells=10)


def test_hidden_bias_is_a_column_of_ones():
    problem = cvxnn.mlp_problem(X, Y, hidden_bias=True)
    assert torch.equal(problem.operator.X[:, -1], torch.ones(len(X), dtype=torch.float64))
    assert problem.gates.shape[0] == 4
    explicit = cvxnn.mlp_problem(np.hstack([X, np.ones((24, 1))]), Y, gates=problem.gates.numpy())
    Z = random_blocks(problem)
    assert problem.objective(Z) == explicit.objective(Z)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
def test_reductions_are_one_problem(loss, output_bias):
    total = make_problem(loss, reduction="sum", beta=0.5, output_bias=output_bias)
    mean = make_problem(loss, reduction="mean", beta=0.5 / 24, output_bias=output_bias)
    Z = random_blocks(total)
    first, second = cvxnn.certify(total, Z=Z), cvxnn.certify(mean, Z=Z)
    assert first.primal == pytest.approx(24 * second.primal, rel=1e-12)
    assert first.lower_bound == pytest.approx(24 * second.lower_bound, rel=1e-6)
    assert first.dual_norm_ratio == pytest.approx(second.dual_norm_ratio, rel=1e-9)
    assert total.beta_max == pytest.approx(24 * mean.beta_max, rel=1e-9)
    tight = [cvxnn.solve(p, tol=1e-9) for p in (total, mean)]
    assert [r.status for r in tight] == ["certified"] * 2
    np.testing.assert_allclose(tight[0].Z, tight[1].Z, atol=2e-3)


@pytest.mark.parametrize("labels", [[0, 1, 2] * 8, list("abc") * 8], ids=["integers", "strings"])
def test_labels(labels):
    problem = cvxnn.mlp_problem(X, labels)
    assert problem.classes.tolist() == sorted(set(labels))
    assert torch.equal(problem.Y, torch.eye(3, dtype=torch.float64).repeat(8, 1))


def test_targets():
    assert cvxnn.mlp_problem(X, LABELS == 1).Y.shape == (24, 2)
    regression = cvxnn.mlp_problem(X, Y[:, 0])
    assert regression.Y.shape == (24, 1)
    assert regression.classes is None
    integers = np.arange(48).reshape(24, 2)
    assert cvxnn.mlp_problem(X, integers).Y.tolist() == integers.tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
def test_integer_weights_are_repetitions(loss, reduction, output_bias):
    repeats = np.random.default_rng(0).integers(0, 4, 24)
    targets = np.eye(2)[LABELS]
    gates = np.random.default_rng(1).standard_normal((3, 5))
    options = {"gates": gates, "loss": loss, "reduction": reduction, "output_bias": output_bias, "beta": 0.03}
    weighted = cvxnn.mlp_problem(X, targets, sample_weight=repeats, **options)
    repeated = cvxnn.mlp_problem(np.repeat(X, repeats, 0), np.repeat(targets, repeats, 0), **options)
    Z = random_blocks(weighted)
    first, second = cvxnn.certify(weighted, Z=Z), cvxnn.certify(repeated, Z=Z)
    assert first.primal == pytest.approx(second.primal, rel=1e-10)
    assert first.lower_bound == pytest.approx(second.lower_bound, rel=1e-6)
    assert weighted.beta_max == pytest.approx(repeated.beta_max, rel=1e-8)


def test_torch_and_numpy_inputs_agree():
    first = cvxnn.mlp_problem(X, Y, n_gates=5)
    second = cvxnn.mlp_problem(torch.from_numpy(X), torch.from_numpy(Y), n_gates=5)
    Z = random_blocks(first)
    assert first.objective(Z) == second.objective(Z.numpy()) == second.objective(Z)


def test_float32():
    problem = cvxnn.mlp_problem(X, Y, dtype="float32")
    assert problem.dtype == problem.operator.X.dtype == problem.Y.dtype == torch.float32
    assert problem.gates.dtype == torch.float64
    exact = problem.operator.X.double().numpy()
    assert np.array_equal(problem.patterns.numpy(), exact @ problem.gates.numpy() >= 0)
    rounded = cvxnn.mlp_problem(exact, problem.Y64, gates=problem.gates.numpy())
    Z = random_blocks(problem)
    assert cvxnn.certify(problem, Z=Z).primal == cvxnn.certify(rounded, Z=Z).primal


@pytest.mark.parametrize("norms", NORMS, ids="-".join)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
def test_beta_max_is_where_zero_becomes_optimal(loss, output_bias, norms):
    problem = make_problem(loss, output_bias=output_bias, norms=norms)
    zero = torch.zeros(problem.operator.block_shape, dtype=torch.float64)
    at = cvxnn.certify(problem.with_beta(problem.beta_max), Z=zero)
    assert 0 <= at.relative_gap < 1e-10
    below = problem.with_beta(0.9 * problem.beta_max)
    assert cvxnn.certify(below, Z=zero).relative_gap > 1e-4
    # It is not optimal there: a small step along the best atom lowers the objective.
    op = below.operator
    u, v, value = below.norm.atom(
        op.adjoint(
            below.dual_candidate(torch.zeros_like(problem.Y) + below.best_intercept(torch.zeros_like(problem.Y)))
        )
    )
    k = int(value.argmax())
    step = zero.clone()
    step[k] = -1e-4 * torch.outer(u[k], v[k])
    U, V = torch.zeros(zero.shape[0], 3, 1, dtype=torch.float64), torch.zeros(zero.shape[0], 2, 1, dtype=torch.float64)
    U[k, :, 0], V[k, :, 0] = -1e-2 * u[k], 1e-2 * v[k]
    assert cvxnn.certify(below, factors=(U, V)).primal < below.objective(zero)


def test_zero_targets_have_beta_max_zero():
    problem = cvxnn.mlp_problem(X, np.zeros((24, 1)))
    assert problem.beta_max == 0.0
    assert cvxnn.solve(problem).certificate.relative_gap == 0.0


def equal_rows(loss, n, scale=1.0, noise=0.0, **options):
    """A problem whose intercept explains all that X, with rows that are equal up to noise, can."""
    rng = np.random.default_rng(n)
    data = scale * (np.tile(rng.standard_normal(4), (n, 1)) + noise * rng.standard_normal((n, 4)))
    labels = np.eye(2)[np.arange(n) % 2]
    targets = 1e3 + rng.standard_normal((n, 2)) if loss in ("squared", "huber") else labels
    return cvxnn.mlp_problem(data, targets, n_gates=5, loss=loss, output_bias=True, random_state=0, **options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e100])
def test_beta_max_is_zero_where_only_rounding_is_left(loss, scale):
    cases = [(7, {}), (20, {"reduction": "sum"}), (33, {"hidden_bias": True}), (500, {"norms": ("linf", "l1")})]
    for n, options in cases:
        problem = equal_rows(loss, n, scale, **options)
        assert problem.beta_max == 0.0
        solved = cvxnn.solve(problem.with_beta(1e-3 * (max(scale, 1.0) if problem.hidden_bias else scale)))
        assert solved.status == "certified"
        assert not solved.Z.any()
    relu = equal_rows(loss, 9, scale, activation="relu")
    assert relu.beta_max == 0.0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_small_gradients_that_are_real_count(loss, norms):
    """That of the noise is far above what the data round by, however small it is beside them."""
    for noise, scale in [(1e-11, 1.0), (1e-11, 1e-140), (1e-11, 1e100), (1e-3, 1e-100)]:
        problem = equal_rows(loss, 20, scale, noise, norms=norms)
        blocks = problem.operator.adjoint(
            problem.dual_candidate(problem.best_intercept(torch.zeros_like(problem.Y)) + torch.zeros_like(problem.Y))
        )
        wanted = float(problem.norm.dual_estimate(blocks).max())
        assert problem.beta_max == pytest.approx(wanted, rel=0.3)
        assert problem.beta_max >= 0.01 * noise * scale


def test_with_beta_shares_everything_else():
    problem = make_problem()
    other = problem.with_beta(0.5)
    assert (problem.beta, other.beta) == (2e-2, 0.5)
    assert other.operator is problem.operator
    assert other.beta_max == problem.beta_max
    for bad in (0, -1, np.nan, "x"):
        with pytest.raises(InvalidInputError, match="beta is"):
            problem.with_beta(bad)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_bias", [False, True])
def test_objective_is_the_primal_of_the_certificate(loss, output_bias):
    problem = make_problem(loss, output_bias=output_bias)
    Z = random_blocks(problem)
    assert problem.objective(Z) == cvxnn.certify(problem, Z=Z).primal
    if output_bias:
        b = torch.tensor([0.3, -0.2], dtype=torch.float64)
        assert problem.objective(Z, b) == cvxnn.certify(problem, Z=Z, intercept=b).primal >= problem.objective(Z)


def test_data_are_copied():
    data, targets, gates, weights = X.copy(), Y.copy(), np.eye(3), np.ones(24)
    problem = cvxnn.mlp_problem(data, targets, gates=gates, sample_weight=weights)
    Z = random_blocks(problem)
    before = problem.objective(Z)
    for array in (data, targets, gates, weights):
        array[:] = 0
    assert problem.objective(Z) == before
    assert problem.gates.any()


BAD = {
    "activation": [{"activation": "tanh"}, {"activation": None}],
    "gates": [{"gates": np.ones((4, 2))}, {"gates": "all"}, {"gates": np.full((3, 1), np.nan)}, {"gates": np.ones(3)}],
    "gates are given": [{"activation": "linear", "gates": np.eye(3)}],
    "n_gates": [{"n_gates": 0}, {"n_gates": 1.5}, {"n_gates": None}],
    "beta": [{"beta": 0}, {"beta": -1.0}, {"beta": np.nan}, {"beta": "1"}, {"beta": None}, {"beta": True}],
    "loss": [{"loss": "hinge"}, {"loss": None}],
    "reduction": [{"reduction": "none"}],
    "norms": [{"norms": "l2"}, {"norms": ("l2",)}, {"norms": ("l2", "l3")}, {"norms": None}],
    "sample_weight": [{"sample_weight": np.ones(3)}, {"sample_weight": -np.ones(24)}, {"sample_weight": np.zeros(24)}],
    "gate_sampling": [{"gate_sampling": "uniform"}],
    "quantile": [{"gate_quantile": 0.5}, {"gate_quantile": 2, "hidden_bias": True}],
    "max_cells": [{"gates": "enumerate", "max_cells": 0}],
    "random_state": [{"random_state": "seed"}],
    "dtype": [{"dtype": "float16"}],
    "device": [{"device": "nowhere"}],
    "X": [{"X": np.ones(24)}, {"X": X * np.nan}, {"X": X * np.inf}, {"X": np.ones((0, 3))}, {"X": X * 1e200}],
    "Y": [{"Y": Y[:3]}, {"Y": Y * np.nan}, {"Y": [1] * 24}, {"Y": Y * 1e200}, {"Y": Y * 1e-200}, {"Y": 1.0}],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in BAD for change in BAD[name]])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_refusals_name_the_argument(name, change):
    arguments = {"X": X, "Y": Y, **change}
    with pytest.raises((InvalidInputError, UnsupportedError), match=name) as refusal:
        cvxnn.mlp_problem(arguments.pop("X"), arguments.pop("Y"), **arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("loss", "targets"), [("cross_entropy", Y), ("cross_entropy", Y[:, 0]), ("logistic", 2 * np.ones((24, 1)))]
)
def test_targets_that_a_loss_cannot_take(loss, targets):
    with pytest.raises(InvalidInputError, match="Y"):
        cvxnn.mlp_problem(X, targets, loss=loss)


def test_repr_and_properties():
    problem = make_problem()
    assert "n=24" in repr(problem)
    assert problem.n_samples == 24
    assert problem.activation == "gated_relu"
    assert isinstance(problem.operator, MLPOperator)
    linear = make_problem(activation="linear")
    assert linear.gates is None
    assert linear.n_gates == 1
    assert linear.patterns.all()
    assert linear.scope == "linear_network"
