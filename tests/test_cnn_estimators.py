"""Convex CNNs as scikit-learn estimators, and on disk."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

import cvxnn
from cvxnn.errors import CertificationWarning, InvalidInputError, StorageError
from cvxnn.files import read_tensors, write_tensors

DIGITS = load_digits()
IMAGES, LABELS = DIGITS.images[:400] / 16, DIGITS.target[:400]
SMALL = {"n_gates": 6, "beta": 1e-4, "tol": 1e-3, "random_state": 0}


PIXELS, BRIGHTNESS = IMAGES[:60], IMAGES[:60].mean((1, 2))
#: With several outputs ReLU problems take long to certify.
KINDS = {
    "gated": (cvxnn.ConvexCNNClassifier, {"padding": 1}),
    "float32": (cvxnn.ConvexCNNClassifier, {"dtype": "float32", "stride": 2}),
    "linear": (cvxnn.ConvexCNNClassifier, {"activation": "linear", "hidden_bias": False}),
    "relu": (cvxnn.ConvexCNNRegressor, {"activation": "relu", "filter_size": 2, "stride": 2, "pooling": (1, 1)}),
    "no_bias": (cvxnn.ConvexCNNRegressor, {"hidden_bias": False, "output_bias": False, "loss": "huber"}),
    "matrix": (cvxnn.ConvexCNNRegressor, {"pooling": np.eye(36)[:3].tolist(), "norms": ("l2", "l1")}),
}


@pytest.fixture(scope="module")
def kinds():
    return {
        name: kind(**SMALL | options).fit(PIXELS, BRIGHTNESS if kind is cvxnn.ConvexCNNRegressor else LABELS[:60])
        for name, (kind, options) in KINDS.items()
    }


@pytest.fixture(scope="module")
def model():
    return cvxnn.ConvexCNNClassifier(padding=1, **SMALL).fit(IMAGES[:300], LABELS[:300])


def test_digits(model):
    assert model.certificate_.relative_gap <= 1e-3
    assert model.score(IMAGES[300:], LABELS[300:]) > 0.85
    assert model.image_shape_ == (1, 8, 8)
    assert model.n_features_in_ == 64
    grey = torch.from_numpy(IMAGES[:5])
    torch.testing.assert_close(model.network_(grey), model.network_(grey[:, None]), rtol=0, atol=0)
    with pytest.raises(InvalidInputError, match=r"\(8, 8\); \(n, 1, height, width\) is wanted"):
        model.network_(grey[0])
    probabilities = model.predict_proba(IMAGES[:5])
    assert probabilities.shape == (5, 10)
    assert np.allclose(probabilities.sum(1), 1)


def test_all_forms_of_images_are_the_same(model):
    rows = cvxnn.ConvexCNNClassifier(padding=1, image_shape=(1, 8, 8), **SMALL)
    rows.fit(IMAGES[:300].reshape(300, -1), LABELS[:300])
    channels = clone(model).fit(torch.tensor(IMAGES[:300, None]), LABELS[:300])
    for other in (rows, channels):
        assert np.allclose(other.decision_function(IMAGES[:9]), model.decision_function(IMAGES[:9]))
    assert np.allclose(rows.decision_function(IMAGES[:9].reshape(9, -1)), model.decision_function(IMAGES[:9]))


def test_bytes_are_scaled():
    pixels = (IMAGES[:200] * 255).astype(np.uint8)
    model = cvxnn.ConvexCNNClassifier(**SMALL).fit(pixels, LABELS[:200])
    assert model.scale_ == 1 / 255
    by_hand = cvxnn.ConvexCNNClassifier(**SMALL).fit(pixels / 255, LABELS[:200])
    assert np.allclose(model.decision_function(pixels[:9]), by_hand.decision_function(pixels[:9] / 255), atol=1e-6)


def test_duplicates_are_merged(model):
    twice = clone(model).fit(np.concatenate([IMAGES[:300]] * 2), np.concatenate([LABELS[:300]] * 2))
    assert twice.result_.problem.n_samples == model.result_.problem.n_samples
    assert np.allclose(twice.decision_function(IMAGES[:9]), model.decision_function(IMAGES[:9]))


def test_regression():
    targets = IMAGES[:200].mean((1, 2))
    model = cvxnn.ConvexCNNRegressor(**SMALL).fit(IMAGES[:200], targets)
    assert model.score(IMAGES[200:300], IMAGES[200:300].mean((1, 2))) > 0.9
    assert model.predict(IMAGES[:3]).shape == (3,)
    both = clone(model).fit(IMAGES[:200], np.c_[targets, -targets])
    assert both.predict(IMAGES[:3]).shape == (3, 2)


@pytest.mark.parametrize("name", KINDS)
def test_all_activations(kinds, name):
    kind = kinds[name]
    assert kind.result_.problem.activation == kind.activation
    assert kind.network_.hidden.shape[1] > 0
    assert kind.score(PIXELS, BRIGHTNESS if isinstance(kind, cvxnn.ConvexCNNRegressor) else LABELS[:60]) > 0.2


def test_in_pipelines_and_cross_validation():
    scaled = make_pipeline(FunctionTransformer(lambda X: X * 1.0), cvxnn.ConvexCNNClassifier(**SMALL))
    assert cross_val_score(scaled, IMAGES[:150], LABELS[:150], cv=2).min() > 0.5


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (IMAGES.reshape(400, -1), {}, r"image_shape=\(channels, height, width\)"),
        (IMAGES.reshape(400, -1), {"image_shape": (1, 8, 9)}, "64 columns; 72"),
        (IMAGES, {"image_shape": (8, 8)}, r"image_shape is \(8, 8\)"),
        (IMAGES * np.nan, {}, "NaN"),
        ([["a", "b"]], {"image_shape": (1, 1, 2)}, "could not convert string"),
        (IMAGES, {"filter_size": 9}, "filter_size"),
        (IMAGES, {"pooling": (9, 1)}, "pooling is 9 x 1"),
        (IMAGES, {"stride": 0}, "stride is 0"),
        (IMAGES, {"padding": -1}, "padding is -1"),
        (IMAGES, {"scale": "bytes"}, "scale is 'bytes'"),
        (IMAGES, {"scale": -1.0}, "scale is -1.0"),
        (IMAGES, {"loss": "hinge"}, "loss is 'hinge'"),
        (IMAGES[:0], {}, r"Found array with 0 sample\(s\)"),
        (IMAGES[:, 0, 0], {"image_shape": (1, 1, 1)}, "Expected 2D array"),
        (IMAGES[:, None, None], {}, r"X has shape \(400, 1, 1, 8, 8\)"),
        (IMAGES + 1j, {}, "Complex data not supported"),
        ([IMAGES[0], IMAGES[1][:4]], {}, "X cannot be read as images of one size"),
        (np.full((4, 8, 8), "pixel"), {}, "could not convert string"),
        (IMAGES[:4, :2, :2], {}, "filter_size has a height of 3"),
        (IMAGES[:1], {}, "only one class"),
        (IMAGES[..., None], {}, r"\(400, 8, 8, 1\), which seems to have channels last"),
    ],
)
def test_careless_input(X, options, message):
    if options.get("image_shape") == (8, 8):
        X = X.reshape(400, -1)
    with pytest.raises(ValueError, match=message):
        cvxnn.ConvexCNNClassifier(**(SMALL | options)).fit(X, LABELS[: len(X)])


def test_images_without_contrast():
    constant = cvxnn.ConvexCNNClassifier(**SMALL).fit(np.ones((20, 8, 8)), np.arange(20) % 2)
    assert constant.certificate_.relative_gap <= 1e-3
    assert np.allclose(constant.predict_proba(np.ones((2, 8, 8))), 0.5)


def test_one_class_and_wrong_lengths():
    with pytest.raises(InvalidInputError, match="only one class"):
        cvxnn.ConvexCNNClassifier().fit(IMAGES[:5], np.zeros(5, int))
    with pytest.raises(ValueError, match="inconsistent"):
        cvxnn.ConvexCNNClassifier().fit(IMAGES[:5], LABELS[:4])


def test_new_images_of_another_shape_are_refused(model):
    with pytest.raises(InvalidInputError, match=r"X has images of shape \(1, 9, 8\); \(1, 8, 8\) is wanted"):
        model.predict(np.zeros((2, 9, 8)))
    with pytest.raises(ValueError, match="X has 63 features, but ConvexCNNClassifier is expecting 64"):
        model.predict(np.zeros((2, 63)))
    with pytest.raises(ValueError, match="NaN"):
        model.predict(np.full((2, 8, 8), np.nan))
    with pytest.raises(NotFittedError):
        cvxnn.ConvexCNNClassifier().predict(IMAGES)


def test_sparse_rows_are_refused():
    with pytest.raises(TypeError, match="Sparse data was passed"):
        cvxnn.ConvexCNNClassifier(image_shape=(1, 8, 8)).fit(sparse.csr_array(IMAGES.reshape(400, -1)), LABELS)


def test_data_frames_of_pixels():
    names = [f"pixel{i}" for i in range(64)]
    frame = pd.DataFrame(PIXELS.reshape(60, -1), columns=names)
    rows = cvxnn.ConvexCNNClassifier(image_shape=(1, 8, 8), **SMALL).fit(frame, pd.Series(LABELS[:60]))
    assert rows.feature_names_in_.tolist() == names
    same = clone(rows).fit(PIXELS, LABELS[:60])
    assert np.array_equal(rows.decision_function(frame), same.decision_function(PIXELS))
    with pytest.raises(ValueError, match="feature names should match"):
        rows.predict(frame[names[::-1]])


def test_lists_and_copies(kinds):
    fitted = kinds["gated"]
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert np.array_equal(other.decision_function(PIXELS.tolist()), fitted.decision_function(PIXELS))


def test_sample_weights():
    """A weight of two is a second copy, a weight of zero none."""
    weights = np.random.default_rng(0).integers(0, 3, 60)
    weighted = cvxnn.ConvexCNNClassifier(**SMALL).fit(PIXELS, LABELS[:60], sample_weight=weights)
    repeated = clone(weighted).fit(np.repeat(PIXELS, weights, 0), np.repeat(LABELS[:60], weights))
    assert np.array_equal(weighted.decision_function(PIXELS), repeated.decision_function(PIXELS))


def test_many_images_are_not_merged(monkeypatch):
    gates = np.random.default_rng(0).standard_normal((10, 4))
    merged = cvxnn.ConvexCNNRegressor(gates=gates, beta=1e-3, tol=1e-6).fit(PIXELS, BRIGHTNESS)
    monkeypatch.setattr("cvxnn.estimators.cnn._MERGED", 100)
    twice = clone(merged).fit(np.r_[PIXELS, PIXELS], np.r_[BRIGHTNESS, BRIGHTNESS])
    assert twice.result_.problem.n_samples == 120
    assert np.allclose(twice.predict(PIXELS), merged.predict(PIXELS), atol=1e-3)


def test_a_quantile_needs_no_care_without_hidden_bias(kinds):
    assert kinds["no_bias"].gate_quantile == 0.5
    assert kinds["no_bias"].result_.status == "certified"


def test_warning_when_not_certified():
    with pytest.warns(CertificationWarning, match="'max_iter' at a relative duality gap of .* above tol=1e-09"):
        cvxnn.ConvexCNNRegressor(solver="fista", max_iter=2, tol=1e-9, n_gates=3).fit(PIXELS, BRIGHTNESS)


@pytest.mark.parametrize("y", [np.ones((60, 2, 2)), np.full(60, np.nan), np.array(["a"] * 60), None], ids=str)
def test_targets_that_are_no_numbers(y):
    with pytest.raises(ValueError, match=r"y|NaN|string|dim"):
        cvxnn.ConvexCNNRegressor(**SMALL).fit(PIXELS, y)


class Rows:
    """Rows of any length as images of a single row that is one patch, for the checks of scikit-learn."""

    def fit(self, X, y, sample_weight=None):
        given, shape = self.get_params(), X.shape if hasattr(X, "shape") else np.array(X).shape
        n_columns = max(1, shape[1]) if len(shape) == 2 else 1
        try:
            self.set_params(image_shape=(1, 1, n_columns), filter_size=(1, n_columns))
            return super().fit(X, y, sample_weight)
        finally:
            self.set_params(**given)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


class RowClassifier(Rows, cvxnn.ConvexCNNClassifier):
    pass


class RowRegressor(Rows, cvxnn.ConvexCNNRegressor):
    pass


@pytest.mark.parametrize("kind", [RowClassifier, RowRegressor])
@pytest.mark.filterwarnings("default::cvxnn.errors.CertificationWarning")
def test_check_estimator(kind):
    """No expected failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results = check_estimator(kind(pooling=1, n_gates=20, random_state=0), on_fail=None)
    failed = [r for r in results if r["status"] not in {"passed", "skipped"}]
    assert not failed, "\n".join(f"{r['check_name']}: {r['exception']!r}" for r in failed)
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize("name", KINDS)
def test_saved_models_predict_the_same(tmp_path, kinds, name):
    kind = kinds[name]
    loaded = cvxnn.load(cvxnn.save(kind, tmp_path / "model.safetensors"))
    for method in ("predict", "predict_proba", "decision_function"):
        if hasattr(kind, method):
            assert np.array_equal(getattr(loaded, method)(IMAGES), getattr(kind, method)(IMAGES))
    assert loaded.certificate_ == kind.certificate_
    assert torch.equal(loaded.dual_, kind.result_.dual)
    assert loaded.get_params() == kind.get_params()
    for attribute in ("image_shape_", "scale_", "n_features_in_", "n_iter_"):
        assert getattr(loaded, attribute) == getattr(kind, attribute)
    again = cvxnn.save(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, arrays: arrays.pop("network.pooling"), "pooling"),
        (lambda header, arrays: header["network"].pop("geometry"), "geometry"),
        (lambda header, arrays: header["network"]["geometry"].update(stride=[0, 1]), "stride"),
        (lambda header, arrays: header["network"]["geometry"].update(filter_size=[4, 4]), "filters"),
        (lambda header, arrays: header["fitted"].update(image_shape_=[1, 9, 9]), "images have shape"),
        (lambda header, arrays: header["fitted"].update(image_shape_=[1, "8", 8]), "image_shape_"),
        (lambda header, arrays: header["fitted"].pop("scale_"), "scale_"),
    ],
)
def test_damaged_models_are_refused(tmp_path, model, change, message):
    path = cvxnn.save(model, tmp_path / "model.safetensors")
    header, arrays = read_tensors(path, "model")
    change(header, arrays)
    write_tensors(path, "model", header, arrays)
    with pytest.raises(StorageError, match=message):
        cvxnn.load(path)
