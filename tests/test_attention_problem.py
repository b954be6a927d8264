"""Attention problems: arguments, targets, masks, gates and scopes."""

import warnings

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import CertificationWarning, InvalidInputError, UnsupportedError
from tests.attention_reference import make_attention, small

TOL = 1e-6


def test_relu_networks_of_all_neurons():
    """The bound over all cells holds for any network, and is met by one."""
    problem, reference = small("relu", "mean", mask="none", shape=(1, 2, 2, 1), gates="enumerate", fraction=0.1)
    assert problem.scope == "relu_network"
    result = cvxnn.solve(problem, "bm_global", tol=TOL)
    assert result.status == "certified"
    rng = np.random.default_rng(0)
    for scale in (0.1, 0.3, 1.0):
        for _ in range(20):
            U, V = scale * rng.standard_normal((2, 2, 2)), scale * rng.standard_normal((2, 2, 1))
            outputs = sum(reference.of_heads(0, *head, relu=True) for head in zip(U, V, strict=True))
            value = ((problem.Y.numpy() - outputs) ** 2).sum() / 2 + problem.beta / 2 * ((U**2).sum() + (V**2).sum())
            assert value >= result.certificate.lower_bound


def test_enumeration_names_no_wider_scope_than_is_proven():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((1, 2, 2)), np.array([1.0])
    with pytest.warns(CertificationWarning, match="products of tokens are rounded"):
        problem = cvxnn.attention_problem(X, y, gates="enumerate")
    assert problem.scope == "given_gates"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = cvxnn.attention_problem(X, y, gates="enumerate", dtype="float32")
        coarse = cvxnn.attention_problem(np.round(X, 1), y, gates="enumerate", dtype="float32")
        scalar = cvxnn.attention_problem(X[:, :, :1], y, gates="enumerate")
    assert exact.scope == coarse.scope == scalar.scope == "all_gates"
    # 16 cells of four hyperplanes in general position, without the pattern that is nowhere active.
    assert exact.n_gates == 15
    with pytest.raises(UnsupportedError, match="activation patterns"):
        cvxnn.attention_problem(rng.standard_normal((50, 5, 2)), np.ones(50), gates="enumerate")


def test_enumeration_counts_only_the_pairs_that_matter():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1, 3, 2)).astype(np.float32)
    mask = np.zeros((1, 3, 3), dtype=bool)
    mask[0, 0, 1] = mask[0, 1, 0] = True
    problem = cvxnn.attention_problem(X, np.array([1.0]), gates="enumerate", mask=mask, dtype="float32")
    assert problem.n_gates == 3
    assert problem.patterns.sum() == 4
    assert problem.patterns[0, 0, 1].sum() == problem.patterns[0, 1, 0].sum() == 2


@pytest.mark.parametrize("output", ["mean", "tokens"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_are_those_of_sequences(output, reduction):
    weight = np.array([1.0, 2.0, 0.5, 0.0, 1.0, 3.0])
    problem, reference = make_attention(output=output, mask="padding", sample_weight=weight, reduction=reduction)
    expected = weight / weight.sum() if reduction == "mean" else weight
    if output == "tokens":
        expected = np.repeat(expected, reference.valid.sum(1))
    np.testing.assert_allclose(problem.weights, expected, rtol=1e-15)
    assert problem.n_samples == len(expected)
    plain, _ = make_attention(output=output, mask="padding", reduction=reduction)
    assert float(plain.weights[0]) == (1 / 6 if reduction == "mean" else 1.0)


def test_sequences_twice_are_sequences_of_weight_two():
    _, reference = make_attention()
    rng = np.random.default_rng(0)
    Y, gates = rng.standard_normal((6, 4, 2)), rng.standard_normal((3, 3, 3))
    twice = np.array([1, 2, 1, 1, 2, 1])
    options = {"output": "tokens", "gates": gates, "output_bias": True}
    one = cvxnn.attention_problem(reference.X, Y, sample_weight=twice, **options)
    other = cvxnn.attention_problem(np.repeat(reference.X, twice, 0), np.repeat(Y, twice, 0), **options)
    results = [cvxnn.solve(problem, tol=1e-8).objective for problem in (one, other)]
    assert results[0] == pytest.approx(results[1], rel=1e-7)


def test_targets():
    X = np.random.default_rng(0).standard_normal((4, 3, 2))
    valid = np.array([[True, True, True], [True, False, True], [True, True, False], [True, False, False]])
    labels = cvxnn.attention_problem(X, ["b", "a", "c", "a"])
    assert labels.classes.tolist() == ["a", "b", "c"]
    assert labels.Y.shape == (4, 3)
    tokens = np.array([["x", "y", "x"], ["x", "?", "y"], ["x", "y", "?"], ["x", "?", "?"]])
    per_token = cvxnn.attention_problem(X, tokens, output="tokens", mask=valid, loss="cross_entropy")
    assert per_token.classes.tolist() == ["x", "y"]
    assert per_token.Y[:, 1].tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    floats = cvxnn.attention_problem(X, np.arange(12.0).reshape(4, 3), output="tokens", mask=valid)
    assert floats.Y[:, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 9]
    several = cvxnn.attention_problem(torch.from_numpy(X), torch.zeros(4, 3, 5), output="tokens")
    assert several.Y.shape == (12, 5)
    assert "attention, gated_relu" in repr(several)


def test_fewer_valid_tokens_weigh_more_in_the_mean():
    X = np.ones((2, 2, 1))
    mask = np.array([[[True, True]] * 2, [[True, False], [False, False]]])
    problem = cvxnn.attention_problem(X, np.zeros(2), activation="linear", mask=mask)
    # All tokens 1: the mean is that of sums over valid keys, two and one.
    assert problem.operator.apply(torch.ones(1, 1, 1, dtype=torch.float64))[:, 0].tolist() == [2, 1]


@pytest.mark.parametrize("method", ["gaussian", "differences", "whitened", "kmeans"])
def test_gate_sampling(method):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 4, 2)), rng.standard_normal(20)
    problem = cvxnn.attention_problem(X, y, n_gates=8, gate_sampling=method)
    assert 1 < problem.n_gates <= 8
    assert problem.scope == "sampled_gates"
    flat = problem.patterns.flatten(0, 2).T
    assert len(torch.unique(flat, dim=0)) == problem.n_gates
    again = cvxnn.attention_problem(X, y, n_gates=8, gate_sampling=method)
    assert torch.equal(problem.gates, again.gates)


def test_many_pairs_are_sampled_and_merged(monkeypatch):
    from cvxnn.problems import token_gates

    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((30, 3, 1)), rng.standard_normal(30)
    X[0, 0] = 0
    few = cvxnn.attention_problem(X, y, n_gates=8)
    monkeypatch.setattr(token_gates, "_PAIRS", 20)
    monkeypatch.setattr(token_gates, "_TOGETHER", 7)
    many = cvxnn.attention_problem(X, y, n_gates=8)
    assert few.n_gates == many.n_gates == 2
    # With one feature gates are the signs of numbers.
    assert torch.equal(few.patterns, many.patterns) or torch.equal(few.patterns.flip(3), many.patterns)
    with pytest.raises(UnsupportedError, match="pairs of tokens"):
        cvxnn.attention_problem(X, y, gates="enumerate")


def test_given_gates_keep_order_and_number():
    _, reference = make_attention()
    gates = np.random.default_rng(1).standard_normal((2, 3, 3))
    twice = np.concatenate([gates, gates])
    problem = cvxnn.attention_problem(reference.X, np.zeros(6), gates=twice)
    np.testing.assert_array_equal(problem.gates, twice)
    assert problem.scope == "given_gates"
    expected = np.einsum("nta,kab,nsb->ntsk", reference.X, twice, reference.X) >= 0
    np.testing.assert_array_equal(problem.patterns, expected)


BAD = {
    "two dimensions": ({"tokens": np.ones((4, 3))}, r"tokens has shape \(4, 3\)"),
    "strings": ({"tokens": np.full((4, 3, 2), "a")}, "tokens cannot be read"),
    "complex": ({"tokens": np.ones((4, 3, 2), dtype=complex)}, "tokens is complex"),
    "empty": ({"tokens": np.ones((4, 0, 2))}, "tokens has shape"),
    "nan": ({"tokens": np.full((4, 3, 2), np.nan)}, "NaN in a valid token"),
    "infinity": ({"tokens": np.full((4, 3, 2), np.inf)}, "infinity in a valid token"),
    "overflow": ({"tokens": np.full((4, 3, 2), 1e80)}, "overflow"),
    "underflow": ({"tokens": np.full((4, 3, 2), 1e-80)}, "underflow"),
    "mask shape": ({"mask": np.ones((3, 4), dtype=bool)}, r"mask has shape \(3, 4\)"),
    "mask type": ({"mask": np.ones((4, 3))}, "mask has type float64"),
    "mask leaves nothing": ({"mask": np.eye(4, 3) > 0}, "mask leaves sequence 3 without a valid token"),
    "few targets": ({"Y": np.ones(3)}, "Y has 3 entries"),
    "one class": ({"Y": np.ones(4, dtype=int)}, "only one class"),
    "nan in targets": ({"Y": np.array([1, np.nan, 2, 3])}, "Y contains NaN"),
    "targets of tokens": ({"Y": np.ones((4, 2)), "output": "tokens"}, r"Y has shape \(4, 2\)"),
    "one class of tokens": ({"Y": np.ones((4, 3), dtype=int), "output": "tokens"}, "only one class"),
    "output": ({"output": "max"}, "output is 'max'"),
    "gate shape": ({"gates": np.ones((2, 3, 3))}, r"gates has shape \(2, 3, 3\)"),
    "gate values": ({"gates": np.full((2, 2, 2), np.nan)}, "gates contains NaN"),
    "gate name": ({"gates": "all"}, "gates is 'all'"),
    "gates of a linear block": ({"gates": np.ones((2, 2, 2)), "activation": "linear"}, "gates are given"),
    "weights": ({"sample_weight": np.ones(12)}, "sample_weight has shape"),
    "beta": ({"beta": 0}, "beta is 0"),
    "sampling": ({"gate_sampling": "best"}, "gate_sampling is 'best'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    options, message = BAD[case]
    arguments = {"tokens": np.arange(24.0).reshape(4, 3, 2), "Y": np.arange(4.0)} | options
    with pytest.raises(InvalidInputError, match=message):
        cvxnn.attention_problem(arguments.pop("tokens"), arguments.pop("Y"), **arguments)


def test_an_ambiguous_mask_is_refused():
    X, y, mask = np.ones((3, 3, 1)), np.arange(3.0), np.tril(np.ones((3, 3), dtype=bool))
    with pytest.raises(InvalidInputError, match="as many sequences as tokens"):
        cvxnn.attention_problem(X, y, mask=mask)
    for explicit in (mask[None], np.tile(mask, (3, 1, 1))):
        problem = cvxnn.attention_problem(X, y, activation="linear", mask=explicit)
        # The mean of 1, 2 and 3 keys.
        assert problem.operator.apply(torch.ones(1, 1, 1, dtype=torch.float64))[:, 0].tolist() == pytest.approx([2] * 3)


def test_hidden_bias_is_not_there():
    with pytest.raises(TypeError):
        cvxnn.attention_problem(np.ones((4, 3, 2)), np.ones(4), hidden_bias=True)


def test_relu_norms_are_refused():
    with pytest.raises(UnsupportedError):
        cvxnn.attention_problem(np.ones((4, 3, 2)), np.ones(4), activation="relu", norms=("l1", "l2"))


def test_other_norms_and_losses():
    for norms, loss in ((("l1", "l2"), "squared"), (("l2", "l2"), "huber"), (("l2", "l2"), "logistic")):
        options = {"norms": norms, "loss": "squared", "n_gates": 2}
        problem, reference = make_attention(**options)
        Y = (problem.Y.numpy() > 0) * 1.0
        problem = cvxnn.attention_problem(reference.X, Y, **(options | {"loss": loss}))
        problem = problem.with_beta(0.2 * problem.beta_max)
        best = cvxnn.solve(problem, "interior_point", tol=1e-7)
        result = cvxnn.solve(problem, tol=TOL)
        assert result.status == "certified"
        assert result.objective == pytest.approx(best.objective, rel=2 * TOL)


def test_float32_is_certified_in_float64():
    problem, _ = small("gated_relu", "tokens", dtype="float32", fraction=0.1)
    result = cvxnn.solve(problem, tol=1e-4)
    assert result.status == "certified"
    exact, _ = small("gated_relu", "tokens", fraction=0.1, gates=problem.gates.numpy())
    assert result.objective == pytest.approx(cvxnn.solve(exact.with_beta(problem.beta), tol=1e-8).objective, rel=2e-4)


def test_checkpoints_know_the_problem(tmp_path):
    problem, _ = small("linear")
    cvxnn.solve(problem, "fista", max_iter=3, checkpoint=tmp_path / "c")
    resumed = cvxnn.solve(problem, "fista", max_iter=6, checkpoint=tmp_path / "c", resume=True)
    assert resumed.n_iter == 6
    other, _ = small("linear", mask="causal")
    with pytest.raises(cvxnn.errors.CvxnnError):
        cvxnn.solve(other.with_beta(problem.beta), "fista", max_iter=6, checkpoint=tmp_path / "c", resume=True)


def test_diagnosis_of_heads():
    problem, _ = small("linear", fraction=0.1)
    result = cvxnn.solve(problem, "bm_lbfgs", tol=1e-9)
    seen = cvxnn.diagnose(problem, factors=result.factors)
    assert "global optimum" in str(seen)
