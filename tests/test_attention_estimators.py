"""Self-attention as scikit-learn estimators, and on disk."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

import cvxnn
from cvxnn.errors import CertificationWarning, InvalidInputError, StorageError
from cvxnn.files import read_tensors, write_tensors

DIGITS = load_digits()
TOKENS, LABELS = DIGITS.images[:300] / 16, DIGITS.target[:300]
X, Y = TOKENS[:60, ::2, ::2], LABELS[:60]
BRIGHTNESS = X.mean((1, 2))
RNG = np.random.default_rng(0)
VALID = RNG.random((60, 4)) < 0.7
VALID[:, 0] = True
PAIRS = np.tril(np.ones((4, 4), dtype=bool))
SMALL = {"n_gates": 4, "beta": 1e-3, "tol": 1e-3, "random_state": 0}
CLASSIFIER, REGRESSOR = cvxnn.ConvexAttentionClassifier, cvxnn.ConvexAttentionRegressor

#: Estimator, parameters, targets and mask.
KINDS = {
    "gated": (CLASSIFIER, {}, Y, None),
    "float32": (CLASSIFIER, {"dtype": "float32", "hidden_bias": False}, Y, VALID),
    "linear": (CLASSIFIER, {"activation": "linear", "loss": "cross_entropy"}, Y, None),
    "logistic": (CLASSIFIER, {"activation": "linear", "loss": "logistic", "tol": 1e-2}, Y > 4, VALID),
    "labels_of_tokens": (CLASSIFIER, {"output": "tokens"}, np.where(X.mean(2) > 0.3, "dark", "light"), VALID),
    "denoising": (REGRESSOR, {"output": "tokens", "activation": "linear"}, X, VALID),
    "token_targets": (REGRESSOR, {"output": "tokens", "output_bias": False}, X.mean(2), PAIRS),
    "huber": (REGRESSOR, {"loss": "huber", "activation": "linear"}, np.c_[BRIGHTNESS, -BRIGHTNESS], None),
    "relu": (REGRESSOR, {"activation": "relu", "hidden_bias": False, "n_gates": 2}, BRIGHTNESS, None),
}


@pytest.fixture(scope="module")
def kinds():
    return {name: kind(**SMALL | options).fit(X, y, mask=mask) for name, (kind, options, y, mask) in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds(kinds, name):
    model, (_, _, y, mask) = kinds[name], KINDS[name]
    assert model.result_.status == "certified"
    assert model.result_.problem.activation == model.activation
    assert model.score(X, y, mask=mask) > 0.2
    assert model.token_shape_ == (4, 4)
    assert model.n_features_in_ == 16
    predicted = model.predict(X, mask)
    assert predicted.shape == np.shape(y)
    if isinstance(model, CLASSIFIER):
        leading, n_classes = np.shape(y), len(model.classes_)
        probabilities = model.predict_proba(X, mask)
        assert probabilities.shape == (*leading, n_classes)
        assert model.decision_function(X, mask).shape == (leading if n_classes == 2 else (*leading, n_classes))
        counted = VALID if model.output == "tokens" else slice(None)
        assert np.allclose(probabilities[counted].sum(-1), 1)
        assert np.array_equal(model.classes_[probabilities[counted].argmax(-1)], predicted[counted])
        assert model.score(X, y, mask=mask) == np.mean(predicted[counted] == np.asarray(y)[counted])


def test_the_score_of_tokens_is_over_valid_ones(kinds):
    model, y = kinds["denoising"], X.copy()
    y[~VALID] = 1e6
    assert model.score(X, y, mask=VALID) == model.score(X, X, mask=VALID)
    assert not model.predict(X, VALID)[~VALID].any()
    weights = np.arange(60.0)
    repeated = np.repeat(np.arange(60), np.arange(60))
    found = model.score(X, X, weights, VALID), model.score(X[repeated], X[repeated], mask=VALID[repeated])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_predictions_are_those_of_the_problem():
    """The problem has the appended ones among its tokens, the network appends them."""
    model = REGRESSOR(**SMALL).fit(X, BRIGHTNESS)
    tokens = model.result_.problem.operator.tokens
    assert tokens.shape[2] == 5
    assert (tokens[:, :, 4] == 1).all()
    expected = model.result_.problem.operator.apply(model.result_.Z) + model.result_.intercept
    assert np.allclose(model.predict(tokens[:, :, :4]), expected[:, 0].numpy(), rtol=1e-12)
    assert model.network_.n_features == 4


def test_digits():
    model = CLASSIFIER("linear", beta=1e-3, tol=1e-3).fit(TOKENS[:200], LABELS[:200])
    assert model.certificate_.relative_gap <= 1e-3
    assert model.certificate_.scope == "linear_network"
    assert model.score(TOKENS[200:], LABELS[200:]) > 0.8


def test_all_forms_of_tokens_are_the_same(kinds):
    model = kinds["gated"]
    rows = CLASSIFIER(token_shape=(4, 4), **SMALL).fit(X.reshape(60, -1), Y)
    for other in (rows, clone(model).fit(torch.tensor(X), torch.tensor(Y)), clone(model).fit(X.tolist(), Y.tolist())):
        assert np.array_equal(other.decision_function(X[:9]), model.decision_function(X[:9]))
        assert np.array_equal(other.decision_function(X[:9].reshape(9, -1)), model.decision_function(X[:9]))
    names = [f"pixel{i}" for i in range(16)]
    frame = clone(rows).fit(pd.DataFrame(X.reshape(60, -1), columns=names), pd.Series(Y))
    assert frame.feature_names_in_.tolist() == names
    assert np.array_equal(frame.predict(pd.DataFrame(X.reshape(60, -1), columns=names)), model.predict(X))


def test_another_number_of_tokens(kinds):
    """New sequences may be longer or shorter; padded ones are what they are without the padding."""
    model = kinds["gated"]
    assert model.predict(TOKENS[:5, :, ::2]).shape == (5,)
    padded, mask = np.full((7, 9, 4), np.nan), np.zeros((7, 9), dtype=bool)
    padded[:, 2:5], mask[:, 2:5] = X[:7, 1:], True
    assert np.allclose(model.decision_function(padded, mask), model.decision_function(X[:7, 1:]), rtol=1e-12)


def test_what_is_at_padding_does_not_count():
    noise = np.where(VALID[:, :, None], X, np.nan)
    y = np.where(VALID[:, :, None], X, np.nan)
    model = REGRESSOR("linear", output="tokens", **SMALL).fit(X, X, mask=VALID)
    other = clone(model).fit(noise, y, mask=VALID)
    assert np.array_equal(model.predict(X, VALID), other.predict(noise, VALID))
    labels = np.where(X.mean(2) > 0.3, 1, 0)
    first = CLASSIFIER("linear", output="tokens", **SMALL).fit(X, labels, mask=VALID)
    second = clone(first).fit(noise, np.where(VALID, labels, -100), mask=VALID)
    assert first.classes_.tolist() == second.classes_.tolist() == [0, 1]
    assert np.array_equal(first.predict(X, VALID), second.predict(noise, VALID))


@pytest.mark.parametrize("mask", [None, VALID, np.repeat(PAIRS[None], 60, 0) & VALID[:, None, :] & VALID[:, :, None]])
@pytest.mark.parametrize("output", ["mean", "tokens"])
def test_sample_weights(mask, output):
    """A weight of two is a second copy, a weight of zero none."""
    y = BRIGHTNESS if output == "mean" else X[:, :, :2]
    weights = np.random.default_rng(0).integers(0, 3, 60)
    weighted = REGRESSOR(output=output, **SMALL).fit(X, y, weights, mask)
    repeats = [None if part is None else np.repeat(part, weights, 0) for part in (X, y, mask)]
    repeated = clone(weighted).fit(repeats[0], repeats[1], mask=repeats[2])
    assert weighted.result_.problem.n_samples == repeated.result_.problem.n_samples
    assert np.array_equal(weighted.predict(X, mask), repeated.predict(X, mask))


def test_equal_tokens_with_other_masks_are_not_merged():
    twice, both = np.concatenate([X, X]), np.concatenate([VALID, np.ones_like(VALID)])
    model = REGRESSOR("linear", **SMALL).fit(twice, np.r_[BRIGHTNESS, BRIGHTNESS], mask=both)
    different = len(np.unique(np.c_[np.where(both[:, :, None], twice, 0).reshape(120, -1), both], axis=0))
    assert model.result_.problem.n_samples == different > 60


def test_many_sequences_are_not_merged(monkeypatch):
    monkeypatch.setattr("cvxnn.estimators.attention._MERGED", 10)
    model = REGRESSOR("linear", **SMALL).fit(np.r_[X, X], np.r_[BRIGHTNESS, BRIGHTNESS])
    assert model.result_.problem.n_samples == 120


def test_a_mask_of_pairs_is_wanted_again(kinds):
    model = kinds["token_targets"]
    with pytest.raises(InvalidInputError, match="mask is None, but the model was trained with a mask of which token"):
        model.predict(X)
    causal = np.tril(np.ones((6, 6), dtype=bool))
    longer = np.concatenate([X[:6], np.ones((6, 2, 4))], axis=1)
    # As many sequences as tokens: the mask is of the kind that it was in training.
    assert np.allclose(model.predict(longer, causal)[:, :4], model.predict(X[:6], PAIRS), rtol=1e-9)


def test_a_mask_of_padding_where_it_would_be_ambiguous(kinds):
    model = kinds["denoising"]
    assert np.array_equal(model.predict(X[:4], VALID[:4]), model.predict(X[:5], VALID[:5])[:4])


EMPTY = VALID.copy()
EMPTY[3] = False


@pytest.mark.parametrize(
    ("tokens", "options", "mask", "message"),
    [
        (X.reshape(60, -1), {}, None, r"\(n, tokens, features\) is wanted, or token_shape"),
        (X.reshape(60, -1), {"token_shape": (4, 5)}, None, "16 columns; 20, 5 for each of 4 tokens"),
        (X, {"token_shape": (2, 8)}, None, r"sequences of shape \(4, 4\); token_shape is \(2, 8\)"),
        (X.reshape(60, -1), {"token_shape": 4}, None, "token_shape is 4"),
        (X.reshape(60, -1), {"token_shape": (4, 0)}, None, r"token_shape is \(4, 0\)"),
        (X[:, None], {}, None, r"X has shape \(60, 1, 4, 4\)"),
        (X[:, :0], {}, None, r"0 feature\(s\)|X has shape \(60, 0, 4\)"),
        (X[:0], {}, None, r"0 sample\(s\)"),
        (X * np.nan, {}, None, "NaN"),
        (X * np.nan, {}, VALID, "X contains NaN in a valid token"),
        (X + np.inf, {}, None, "infinity|NaN"),
        (np.array([[["a"]]] * 60), {}, None, "could not convert string"),
        (X + 1j, {}, None, "Complex data not supported"),
        (X * 1e60, {}, None, "overflow"),
        (X, {}, VALID[:, :3], r"mask has shape \(60, 3\)"),
        (X, {}, VALID * 0.5, "mask has type float64; bool"),
        (X, {}, EMPTY, "mask leaves sequence 3 without a valid token"),
        (X, {}, np.zeros((60, 4), dtype=bool), "mask leaves sequence 0 without a valid token"),
        (X, {"output": "max"}, None, "output is 'max'"),
        (X, {"loss": "hinge"}, None, "loss is 'hinge'"),
        (X, {"activation": "softmax"}, None, "activation is 'softmax'"),
        (X, {"hidden_bias": "yes"}, None, "hidden_bias is 'yes'"),
        (X, {"beta": 0.0}, None, "beta is 0.0"),
        (X, {"gates": np.ones((2, 4, 4))}, None, r"gates has shape \(2, 4, 4\); matrices \(P, 5, 5\)"),
    ],
)
def test_careless_input(tokens, options, mask, message):
    with pytest.raises(ValueError, match=message):
        CLASSIFIER(**SMALL | options).fit(tokens, Y[: len(tokens)], mask=mask)


@pytest.mark.parametrize(
    ("kind", "output", "y", "message"),
    [
        (CLASSIFIER, "mean", np.zeros(60, int), "only one class"),
        (CLASSIFIER, "tokens", np.zeros((60, 4), int), "only one class"),
        (CLASSIFIER, "mean", BRIGHTNESS, "continuous"),
        (CLASSIFIER, "tokens", X.mean(2), "continuous"),
        (CLASSIFIER, "tokens", Y, r"y has shape \(60,\); \(60, 4\), for every token"),
        (CLASSIFIER, "tokens", X, r"y has shape \(60, 4, 4\); \(60, 4\), for every token"),
        (CLASSIFIER, "mean", Y[:9], "inconsistent"),
        (REGRESSOR, "mean", X, "dim 3|dimensions"),
        (REGRESSOR, "tokens", BRIGHTNESS, r"y has shape \(60,\); \(60, 4\) or \(60, 4, outputs\), for every token"),
        (REGRESSOR, "tokens", X[:9], r"y has shape \(9, 4, 4\)"),
        (REGRESSOR, "tokens", X * np.nan, "NaN"),
        (REGRESSOR, "tokens", np.full((60, 4), "a"), "y cannot be read as|y has"),
        (REGRESSOR, "tokens", None, "y is None"),
    ],
)
def test_careless_targets(kind, output, y, message):
    with pytest.raises(ValueError, match=message):
        kind(output=output, **SMALL).fit(X, y)


def test_careless_weights():
    with pytest.raises(InvalidInputError, match=r"sample_weight has shape \(4,\); \(60,\) is wanted"):
        REGRESSOR(**SMALL).fit(X, BRIGHTNESS, np.ones(4))
    with pytest.raises(InvalidInputError, match="only one class has samples of positive weight"):
        CLASSIFIER(**SMALL).fit(X, Y > 4, (Y > 4).astype(float))


def test_careless_predictions(kinds):
    model = kinds["gated"]
    with pytest.raises(InvalidInputError, match="X has tokens of 5 features; 4 are wanted"):
        model.predict(np.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match="X has 15 features, but ConvexAttentionClassifier is expecting 16"):
        model.predict(np.zeros((2, 15)))
    with pytest.raises(ValueError, match="NaN"):
        model.predict(np.full((2, 4, 4), np.nan))
    with pytest.raises(NotFittedError):
        CLASSIFIER().predict(X)
    with pytest.raises(InvalidInputError, match=r"y has shape \(60,\)"):
        kinds["labels_of_tokens"].score(X, Y, mask=VALID)


@pytest.mark.parametrize("tokens", [np.zeros((9, 3, 2)), np.ones((9, 3, 2))])
def test_constant_tokens(tokens):
    """There is nothing to learn but the mean."""
    y = np.arange(9.0)
    for activation in ("linear", "gated_relu"):
        model = REGRESSOR(activation, **SMALL).fit(tokens, y)
        assert np.allclose(model.predict(tokens), 4, atol=1e-2)


def test_one_sequence():
    model = REGRESSOR(output="tokens", **SMALL).fit(X[:1], X[:1])
    assert model.predict(X[:1]).shape == (1, 4, 4)
    with pytest.raises(InvalidInputError, match="only one class"):
        CLASSIFIER(**SMALL).fit(X[:1], Y[:1])


def test_warning_when_not_certified():
    with pytest.warns(CertificationWarning, match="'max_iter' at a relative duality gap of .* above tol=1e-09"):
        REGRESSOR("linear", solver="fista", max_iter=2, tol=1e-9).fit(X, BRIGHTNESS)


def test_copies_and_cross_validation(kinds):
    model = kinds["gated"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.decision_function(X), model.decision_function(X))
    assert cross_val_score(REGRESSOR("linear", **SMALL), X, BRIGHTNESS, cv=2).min() > 0.9


class Rows:
    """Rows of any length as sequences of a single token, for the checks of scikit-learn."""

    def fit(self, X, y, sample_weight=None):
        given, shape = self.get_params(), X.shape if hasattr(X, "shape") else np.array(X).shape
        try:
            self.set_params(token_shape=(1, max(1, shape[1]) if len(shape) == 2 else 1))
            return super().fit(X, y, sample_weight)
        finally:
            self.set_params(**given)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


class RowClassifier(Rows, CLASSIFIER):
    pass


class RowRegressor(Rows, REGRESSOR):
    pass


@pytest.mark.parametrize("kind", [RowClassifier, RowRegressor])
@pytest.mark.filterwarnings("default::cvxnn.errors.CertificationWarning")
def test_check_estimator(kind):
    """No expected failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results = check_estimator(kind(n_gates=3, tol=1e-2, random_state=0), on_fail=None)
    failed = [r for r in results if r["status"] not in {"passed", "skipped"}]
    assert not failed, "\n".join(f"{r['check_name']}: {r['exception']!r}" for r in failed)
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize("name", KINDS)
def test_saved_models_predict_the_same(tmp_path, kinds, name):
    model, mask = kinds[name], KINDS[name][3]
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "model.safetensors"))
    for method in ("predict", "predict_proba", "decision_function"):
        if hasattr(model, method):
            assert np.array_equal(getattr(loaded, method)(X, mask), getattr(model, method)(X, mask))
    assert loaded.certificate_ == model.certificate_
    assert torch.equal(loaded.dual_, model.result_.dual)
    assert loaded.get_params() == model.get_params()
    for attribute in ("token_shape_", "n_features_in_", "n_iter_", "_mask_kind"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    again = cvxnn.save(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["network"].pop("pooled"), "pooled"),
        (lambda header: header["fitted"].update(token_shape_=[4, 5]), "tokens have 5 features"),
        (lambda header: header["fitted"].update(token_shape_=[4, "4"]), "token_shape_"),
        (lambda header: header["fitted"].update(n_features_in_=17), "n_features_in_ is 17"),
        (lambda header: header["fitted"].pop("_mask_kind"), "_mask_kind"),
    ],
)
def test_damaged_models_are_refused(tmp_path, kinds, change, message):
    path = cvxnn.save(kinds["gated"], tmp_path / "model.safetensors")
    header, arrays = read_tensors(path, "model")
    change(header)
    write_tensors(path, "model", header, arrays)
    with pytest.raises(StorageError, match=message):
        cvxnn.load(path)


def test_onnx_of_estimators(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = CLASSIFIER(**SMALL).fit(X, Y)
    path = cvxnn.export_onnx(model, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["n", "tokens", 4]
    assert np.array_equal(model.classes_[session.run(["y"], {"x": X})[0].argmax(1)], model.predict(X))
