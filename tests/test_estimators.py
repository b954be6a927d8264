"""The scikit-learn estimators on ordinary and on odd data."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cvxnn
from cvxnn import (
    ConvexAttentionRegressor,
    ConvexCNNRegressor,
    ConvexMLPClassifier,
    ConvexMLPClassifierCV,
    ConvexMLPRegressor,
    ConvexMLPRegressorCV,
)
from cvxnn.errors import CertificationWarning, InvalidInputError, UnsupportedError
from cvxnn.estimators import project_to_simplex
from tests.helpers import make_data

X, Y, LABELS = make_data(60, 3, 3)
BINARY = (X[:, 0] + 0.3 * X[:, 1] > 0).astype(int)
TARGET = X[:, 0] + np.abs(X[:, 1])
CLASSIFIER_LOSSES = ("squared", "cross_entropy", "huber", "logistic")


def classifier(**options):
    return ConvexMLPClassifier(**({"n_gates": 10, "random_state": 0, "beta": 1e-2} | options))


def regressor(**options):
    return ConvexMLPRegressor(**({"n_gates": 10, "random_state": 0, "beta": 1e-2} | options))


def test_pipeline_grid_search_and_cross_validation():
    iris, species = load_iris(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), classifier(tol=1e-3))
    assert cross_val_score(pipeline, iris, species, cv=3).mean() > 0.9
    search = GridSearchCV(pipeline, {"convexmlpclassifier__beta": [1e-3, 1.0]}, cv=3).fit(iris, species)
    assert search.best_params_["convexmlpclassifier__beta"] == 1e-3
    assert search.score(iris, species) > 0.95


def test_clone_keeps_all_parameters():
    for model in (classifier(loss="huber"), ConvexMLPRegressorCV(n_betas=3, betas=[0.1], gates=np.eye(4))):
        assert repr(clone(model).get_params()) == repr(model.get_params())
    assert not hasattr(clone(classifier().fit(X, LABELS)), "result_")


@pytest.mark.parametrize("loss", CLASSIFIER_LOSSES)
def test_sample_weights(loss):
    weights = np.random.default_rng(0).integers(0, 3, 60)
    options = {"loss": loss, "gates": np.random.default_rng(1).standard_normal((4, 6))}
    weighted = classifier(**options).fit(X, LABELS, sample_weight=weights)
    kept = weights > 0
    removed = classifier(**options).fit(X[kept], LABELS[kept], sample_weight=weights[kept])
    repeated = classifier(**options).fit(np.repeat(X, weights, 0), np.repeat(LABELS, weights))
    outputs = weighted.decision_function(X)
    assert np.array_equal(outputs, removed.decision_function(X))
    assert np.array_equal(outputs, repeated.decision_function(X))
    assert weighted.certificate_ == repeated.certificate_


def test_order_and_scale_of_weights_do_not_matter():
    order = np.random.default_rng(0).permutation(60)
    first = regressor().fit(X, TARGET)
    assert np.array_equal(first.predict(X), regressor().fit(X[order], TARGET[order]).predict(X))
    scaled = regressor().fit(X, TARGET, sample_weight=np.full(60, 1e-3))
    np.testing.assert_allclose(first.predict(X), scaled.predict(X), atol=1e-6)


@pytest.mark.parametrize("weights", [BINARY, -np.ones(60), np.zeros(60), np.full(60, np.nan), np.ones(3)], ids=str)
def test_bad_weights(weights):
    with pytest.raises(InvalidInputError, match="weight"):
        classifier().fit(X, BINARY, sample_weight=weights)


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame], ids=["pandas", "polars"])
def test_data_frames(frame):
    table = frame({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2]})
    names = np.array(["no", "yes"])[BINARY]
    labels = pd.Series(names) if frame is pd.DataFrame else pl.Series(names.tolist()).to_numpy()
    model = classifier().fit(table, labels)
    assert np.array_equal(model.feature_names_in_, ["a", "b", "c"])
    assert model.n_features_in_ == 3
    assert np.array_equal(model.predict(table), classifier().fit(X, names).predict(X))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(table[["b", "a", "c"]])


def test_multi_output_regression():
    model = regressor(tol=1e-6, beta=1e-3).fit(X, Y)
    assert model.predict(X).shape == (60, 3)
    assert model.score(X, Y) > 0.7
    assert regressor().fit(X, Y[:, 0]).predict(X).shape == (60,)
    assert regressor().fit(X, Y[:, :1]).predict(X).shape == (60, 1)


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["red", "blue"])[BINARY],
        BINARY.astype(bool),
        np.array(["red", "blue"], dtype=object)[BINARY],
        BINARY * 10 - 7,
        BINARY.astype(float),
    ],
    ids=["strings", "bools", "objects", "integers", "floats"],
)
def test_labels(labels):
    model = classifier().fit(X, labels)
    assert np.array_equal(model.classes_, np.unique(labels))
    assert model.predict(X).dtype == model.classes_.dtype
    assert model.score(X, labels) > 0.9
    decision = model.decision_function(X)
    assert decision.shape == (60,)
    assert np.array_equal(model.classes_[(decision > 0).astype(int)], model.predict(X))


@pytest.mark.parametrize("labels", [BINARY, LABELS], ids=["two", "three"])
@pytest.mark.parametrize("loss", CLASSIFIER_LOSSES)
def test_probabilities(loss, labels):
    model = classifier(loss=loss).fit(X, labels)
    for data in (X, 1e3 * X, 1e9 * X, 1e120 * X):
        P = model.predict_proba(data)
        assert P.shape == (60, len(np.unique(labels)))
        assert np.isfinite(P).all()
        assert (P >= 0).all()
        np.testing.assert_allclose(P.sum(1), 1, atol=1e-12)
    assert np.array_equal(model.classes_[model.predict_proba(X).argmax(1)], model.predict(X))


def test_simplex_projection_is_the_nearest_point():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((50, 4)) * 10.0 ** rng.integers(-3, 4, (50, 1))
    projected = project_to_simplex(points)
    np.testing.assert_allclose(projected.sum(1), 1)
    for corner in np.eye(4):  # the residual makes an obtuse angle with every direction into the simplex
        assert (((points - projected) * (corner - projected)).sum(1) <= 1e-9 * np.abs(points).max(1)).all()


def test_one_sample():
    model = regressor().fit(X[:1], TARGET[:1])
    assert model.predict(X[:1]) == pytest.approx(TARGET[:1])
    with pytest.raises(InvalidInputError, match="y has only one class"):
        classifier().fit(X[:1], BINARY[:1])


def test_two_samples():
    model = classifier(n_gates=100, beta=1e-3).fit(X[:2], [0, 1])
    assert model.result_.status == "certified"
    assert model.predict(X[:2]).tolist() == [0, 1]


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_constant_columns_and_duplicate_rows(loss):
    odd = np.hstack([X, np.ones((60, 1)), np.zeros((60, 1)), X[:, :1]])
    odd = np.vstack([odd, odd[:20], odd[:5]])
    labels = np.r_[BINARY, BINARY[:20], BINARY[:5]]
    model = classifier(loss=loss).fit(odd, labels)
    assert model.result_.status == "certified"
    assert model.score(odd, labels) > 0.9
    same = classifier(loss=loss).fit(np.ones((10, 2)), BINARY[:10])
    assert len(set(same.predict(np.ones((10, 2))))) == 1
    contradicting = classifier(loss=loss).fit(np.vstack([X, X]), np.r_[BINARY, 1 - BINARY])
    assert contradicting.result_.status == "certified"


@pytest.mark.parametrize("scale", [1e8, 1e150, 1e-8, 1e-150, 1e-300])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.filterwarnings("ignore::cvxnn.errors.CertificationWarning")
def test_scales_of_features(loss, scale):
    model = classifier(loss=loss, max_iter=60).fit(X * scale, LABELS)
    certificate = model.certificate_
    assert np.isfinite(certificate.primal)
    assert certificate.lower_bound <= certificate.primal
    assert np.isfinite(model.predict_proba(X * scale)).all()
    zero = model.result_.problem.objective(torch.zeros_like(model.result_.Z))
    assert certificate.primal <= zero
    if scale > 1:
        assert model.score(X * scale, LABELS) > 0.6
    one = X * np.array([1, 1, scale])
    assert np.isfinite(regressor(max_iter=60).fit(one, TARGET).predict(one)).all()


def test_numbers_that_cannot_be_squared_are_refused():
    with pytest.raises(InvalidInputError, match=r"X has entries of up to .* overflow in float64; rescale"):
        classifier().fit(X * 1e160, LABELS)
    with pytest.raises(InvalidInputError, match=r"X has entries of up to .* overflow in float32"):
        classifier(dtype="float32").fit(X * 1e25, LABELS)
    with pytest.raises(InvalidInputError, match=r"X has entries of up to .* underflow in float32; rescale"):
        classifier(dtype="float32", hidden_bias=False).fit(X * 1e-25, LABELS)
    with pytest.raises(InvalidInputError, match=r"images has entries of up to .* underflow in float64; rescale"):
        cvxnn.cnn_problem(np.full((3, 1, 2, 2), 1e-160), np.arange(3), n_gates=1, beta=1.0, filter_size=1)
    cvxnn.cnn_problem(np.full((3, 1, 2, 2), 1e-160), np.arange(3), n_gates=1, beta=1.0, filter_size=1, hidden_bias=True)
    with pytest.raises(InvalidInputError, match=r"Y has entries of up to .* underflow"):
        regressor().fit(X, TARGET * 1e-200)


def test_more_features_than_samples():
    wide = np.random.default_rng(0).standard_normal((12, 40))
    model = classifier(beta=1e-3).fit(wide, BINARY[:12])
    assert model.result_.status == "certified"
    assert model.score(wide, BINARY[:12]) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity(bad):
    spoiled = X.copy()
    spoiled[3, 1] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        classifier().fit(spoiled, BINARY)
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        regressor().fit(X, np.r_[bad, TARGET[1:]])
    model = classifier().fit(X, BINARY)
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        model.predict(spoiled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge'; one of 'squared', 'cross_entropy', 'huber', 'logistic'"),
        ({"activation": "sigmoid"}, "activation is 'sigmoid'"),
        ({"n_gates": 0}, "n_gates is 0"),
        ({"beta": -1}, "beta is -1"),
        ({"tol": -1}, "tol is -1"),
        ({"solver": "sgd"}, "solver is 'sgd'"),
        ({"gates": np.eye(3)}, r"gates has 3 rows; 4 \(the last for the hidden bias\)"),
        ({"dtype": "int"}, "dtype is 'int'"),
        ({"device": "moon"}, "device is 'moon'"),
        ({"rank": 2}, "rank=2"),
    ],
)
def test_bad_parameters_are_named_in_fit(options, message):
    with pytest.raises((InvalidInputError, UnsupportedError), match=message) as refusal:
        classifier(**options).fit(X, BINARY)
    assert "\n" not in str(refusal.value)


STRINGS = np.array(["low", "high"] * 30)


@pytest.mark.parametrize("y", [STRINGS, STRINGS.astype(object), STRINGS.tolist(), np.stack([STRINGS, STRINGS], 1)])
@pytest.mark.parametrize("kind", ["mlp", "path", "cnn", "attention"])
def test_regressors_say_that_y_is_no_numbers(kind, y):
    few = {"n_gates": 3, "random_state": 0, "device": "cpu"}
    model, data = {
        "mlp": (ConvexMLPRegressor(**few), X),
        "path": (ConvexMLPRegressorCV(**few), X),
        "cnn": (ConvexCNNRegressor(**few), np.zeros((60, 1, 4, 4))),
        "attention": (ConvexAttentionRegressor(**few), np.zeros((60, 2, 3))),
    }[kind]
    with pytest.raises(InvalidInputError, match=r"^y cannot be read as .* numbers: could not convert .*'low'"):
        model.fit(data, y)


@pytest.mark.parametrize("y", [TARGET.astype(object), TARGET.astype(str)], ids=["objects", "strings"])
def test_regressors_read_numbers_in_any_type(y):
    plain = regressor().fit(X, TARGET)
    assert np.array_equal(regressor().fit(X, y).predict(X), plain.predict(X))
    y[0] = "nan"
    with pytest.raises(ValueError, match="y contains NaN"):
        regressor().fit(X, y)


def test_losses_of_the_regressor():
    for loss in ("squared", "huber"):
        assert regressor(loss=loss).fit(X, TARGET).score(X, TARGET) > 0.5
    with pytest.raises(InvalidInputError, match="loss is 'cross_entropy'; one of 'squared', 'huber' is wanted"):
        regressor(loss="cross_entropy").fit(X, TARGET)


def test_warning_when_not_certified():
    with pytest.warns(CertificationWarning, match="'max_iter' at a relative duality gap of .* above tol=1e-09"):
        model = classifier(max_iter=2, tol=1e-9, solver="fista").fit(X, LABELS)
    assert model.n_iter_ == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier().fit(X, LABELS)


def test_copies():
    model = classifier().fit(X, LABELS)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert np.array_equal(other.predict_proba(X), model.predict_proba(X))
        assert other.certificate_ == model.certificate_
        assert other.result_.trace == model.result_.trace


def test_unfitted():
    with pytest.raises(NotFittedError):
        classifier().predict(X)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_predictions_are_those_of_the_network(dtype):
    model = regressor(dtype=dtype, tol=1e-3).fit(X, Y)
    new = np.random.default_rng(1).standard_normal((40, 3))
    with torch.no_grad():
        outputs = model.network_(torch.from_numpy(new)).double().numpy()
    assert np.array_equal(model.predict(new), outputs)
    result = model.result_
    data = np.hstack([new, np.ones((40, 1))])
    blocks = result.problem.operator.predict(result.Z.to(result.problem.dtype), data) + result.intercept
    np.testing.assert_allclose(outputs, blocks, atol=1e-10 if dtype == "float64" else 1e-4)


def test_fit_leaves_the_data_alone():
    before = X.copy(), LABELS.copy()
    classifier().fit(X, LABELS)
    assert np.array_equal(X, before[0])
    assert np.array_equal(LABELS, before[1])


def test_random_state():
    first, second, other = (classifier(random_state=s).fit(X, LABELS) for s in (0, 0, 1))
    assert np.array_equal(first.predict_proba(X), second.predict_proba(X))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))


CV = {"n_gates": 8, "n_betas": 4, "cv": 3, "random_state": 0, "tol": 1e-3}


@pytest.mark.parametrize("jobs", [None, 2])
def test_cross_validated_classifier(jobs):
    model = ConvexMLPClassifierCV(**CV, n_jobs=jobs).fit(X, LABELS)
    assert model.betas_.shape == (4,)
    assert (np.diff(model.betas_) < 0).all()
    assert model.cv_scores_.shape == (4, 3)
    assert ((model.cv_scores_ >= 0) & (model.cv_scores_ <= 1)).all()
    means = model.cv_scores_.mean(1)
    assert model.beta_ == model.betas_[np.flatnonzero(means == means.max())[0]]
    assert model.certificate_.beta == model.beta_
    assert model.certificate_.relative_gap <= 1e-3
    assert model.score(X, LABELS) > 0.7
    assert not hasattr(model, "beta")
    single = classifier(n_gates=8, beta=model.beta_, tol=1e-3).fit(X, LABELS)
    np.testing.assert_allclose(single.predict_proba(X), model.predict_proba(X), atol=1e-10)


def test_cross_validated_regressor():
    model = ConvexMLPRegressorCV(**CV).fit(X, TARGET)
    assert model.cv_scores_.shape == (4, 3)
    assert model.score(X, TARGET) > 0.8
    several = ConvexMLPRegressorCV(**CV).fit(X, Y)
    assert several.predict(X).shape == (60, 3)


def test_given_betas_and_scoring():
    model = ConvexMLPClassifierCV(**CV, betas=[1e-3, 1.0, 1e-2], scoring="neg_log_loss", loss="cross_entropy")
    model.fit(X, LABELS)
    assert model.betas_.tolist() == [1.0, 1e-2, 1e-3]
    assert (model.cv_scores_ <= 0).all()
    assert model.beta_ in {1e-2, 1e-3}
    custom = ConvexMLPClassifierCV(**CV, scoring=lambda estimator, X, y: -float(len(y)))
    assert (custom.fit(X, LABELS).cv_scores_ == -20).all()
    assert custom.beta_ == custom.betas_[0]


def test_splits_by_groups():
    splits = GroupKFold(3).split(X, LABELS, groups=np.arange(60) // 5)
    model = ConvexMLPClassifierCV(**(CV | {"cv": splits})).fit(X, LABELS)
    assert model.cv_scores_.shape == (4, 3)


def test_cross_validation_with_weights():
    weights = np.random.default_rng(0).integers(1, 3, 60)
    model = ConvexMLPClassifierCV(**CV).fit(X, LABELS, sample_weight=weights)
    assert model.result_.problem.weights.sum() == pytest.approx(1)
    assert model.score(X, LABELS) > 0.7


def test_scores_that_are_not_numbers_are_refused():
    model = ConvexMLPRegressorCV(**(CV | {"cv": 60}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InvalidInputError, match="scoring gave NaN"):
            model.fit(X, TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": []}, "betas is empty"),
        ({"betas": [0.0]}, "betas is 0.0"),
        ({"n_betas": 0}, "n_betas is 0"),
        ({"ratio": 2}, "ratio is 2"),
        ({"loss": "x"}, "loss is 'x'"),
    ],
)
def test_bad_cross_validation(options, message):
    with pytest.raises(InvalidInputError, match=message):
        ConvexMLPClassifierCV(**(CV | options)).fit(X, LABELS)


def test_public_names():
    assert set(cvxnn.__all__) >= {"ConvexMLPClassifier", "ConvexMLPRegressorCV", "certify", "mlp_problem", "solve"}
    assert all(hasattr(cvxnn, name) for name in cvxnn.__all__)
