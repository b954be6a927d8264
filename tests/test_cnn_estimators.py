"""Convex CNNs as scikit-learn estimators, as torch modules, and on disk."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import cvxnn
from cvxnn.errors import CertificationWarning, InvalidInputError, StorageError
from cvxnn.files import read_tensors, write_tensors
from cvxnn.networks import TwoLayerCNN

DIGITS = load_digits()
IMAGES, LABELS = DIGITS.images[:400] / 16, DIGITS.target[:400]
SMALL = {"n_gates": 6, "beta": 1e-4, "tol": 1e-3, "random_state": 0}


def fast(activation):
    """Options of a short run; ReLU problems with several outputs take long to certify."""
    return {"solver": "bm_projected_gd", "rank": 1, "time_limit": 0.5} if activation == "relu" else {}


@pytest.fixture(scope="module")
def model():
    return cvxnn.ConvexCNNClassifier(padding=1, **SMALL).fit(IMAGES[:300], LABELS[:300])


def random_problem(activation, pooling, bias, dtype, **options):
    rng = np.random.default_rng(0)
    images, Y = rng.standard_normal((7, 2, 6, 5)), rng.standard_normal((7, 3))
    pool = rng.standard_normal((3, 16)) if pooling == "matrix" else pooling
    options = {"filter_size": (3, 2), "n_gates": 5, "beta": 1e-3, "output_bias": True} | options
    return images, cvxnn.cnn_problem(
        images, Y, activation=activation, pooling=pool, hidden_bias=bias, dtype=dtype, **options
    )


@pytest.mark.parametrize(
    ("activation", "pooling", "bias", "dtype"),
    list(
        itertools.product(
            ["linear", "gated_relu", "relu"], [(2, 2), (1, 1), "matrix"], [False, True], ["float32", "float64"]
        )
    ),
)
def test_networks_predict_as_their_point(activation, pooling, bias, dtype):
    images, problem = random_problem(activation, pooling, bias, dtype)
    result = cvxnn.solve(problem, max_iter=3, **fast(activation))
    network = result.network()
    assert isinstance(network, TwoLayerCNN)
    with torch.no_grad():
        outputs = network(torch.tensor(images))
    op = problem.operator.double()
    if result.Z is not None:
        expected = op.apply(result.Z.double()) + result.intercept.double()
    else:
        expected = op.apply_factors(*(part.double() for part in result.factors)) + result.intercept.double()
    assert torch.allclose(outputs.double(), expected, atol=2e-5 if dtype == "float32" else 1e-9)


@pytest.mark.parametrize(("stride", "padding"), [(2, 0), (1, 2), ((2, 1), (1, 0))])
def test_stride_and_padding_in_networks(stride, padding):
    images, problem = random_problem("gated_relu", (2, 2), True, "float64", stride=stride, padding=padding)
    result = cvxnn.solve(problem, max_iter=20)
    with torch.no_grad():
        outputs = result.network()(torch.tensor(images))
    assert torch.allclose(outputs, problem.operator.apply(result.Z) + result.intercept, atol=1e-9)


def test_a_network_equals_torch_convolution():
    """Against conv2d, adaptive pooling and a linear layer, put together by hand."""
    images, problem = random_problem("gated_relu", (2, 2), True, "float64", filter_size=3, padding=1)
    network = cvxnn.solve(problem, max_iter=20).network()
    x = torch.tensor(images)

    def convolve(columns):
        return torch.nn.functional.conv2d(x, columns[:-1].T.reshape(-1, 2, 3, 3), columns[-1], padding=1)

    with torch.no_grad():
        maps = convolve(network.hidden) * (convolve(network.gates) >= 0)[:, network.gate_index]
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(2)
        expected = torch.einsum("nja,jca->nc", pooled, network.output.view(-1, 3, 4)) + network.bias
        assert torch.allclose(network(x), expected, atol=1e-10)


def test_conversions_never_round_the_gates():
    _, problem = random_problem("gated_relu", (2, 2), True, "float64")
    network = cvxnn.solve(problem, max_iter=5).network()
    gates = network.gates.clone()
    assert torch.equal(network.to(torch.float32).gates, gates)
    assert network.hidden.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 6, 5), (3, 2, 7, 5), (2, 6, 5)])
def test_networks_refuse_other_images(shape):
    _, problem = random_problem("gated_relu", (2, 2), True, "float64")
    network = cvxnn.solve(problem, max_iter=5).network()
    with pytest.raises(InvalidInputError, match=r"images"):
        network(torch.zeros(shape))


def test_many_images_are_taken_in_batches(monkeypatch):
    images, problem = random_problem("gated_relu", (2, 2), True, "float64")
    network = cvxnn.solve(problem, max_iter=5).network()
    whole = network(torch.tensor(images))
    monkeypatch.setattr("cvxnn.networks.cnn._BATCH_BYTES", 1)
    assert torch.allclose(network(torch.tensor(images)), whole)
    assert network(torch.zeros(0, 2, 6, 5)).shape == (0, 3)


def test_digits(model):
    assert model.certificate_.relative_gap <= 1e-3
    assert model.score(IMAGES[300:], LABELS[300:]) > 0.85
    assert model.image_shape_ == (1, 8, 8)
    assert model.n_features_in_ == 64
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


def test_relu_and_linear():
    for activation in ("linear", "relu"):
        model = cvxnn.ConvexCNNClassifier(activation, filter_size=2, pooling=(1, 1), max_iter=3, **SMALL, **fast(activation))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CertificationWarning)
            model.fit(IMAGES[:40, ::2, ::2], LABELS[:40])
        assert model.predict(IMAGES[:3, ::2, ::2]).shape == (3,)


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
        ([["a", "b"]], {"image_shape": (1, 1, 2)}, "numbers"),
        (IMAGES, {"filter_size": 9}, "filter_size"),
        (IMAGES, {"pooling": (9, 1)}, "pooling is 9 x 1"),
        (IMAGES, {"stride": 0}, "stride is 0"),
        (IMAGES, {"padding": -1}, "padding is -1"),
        (IMAGES, {"scale": "bytes"}, "scale is 'bytes'"),
        (IMAGES, {"scale": -1.0}, "scale is -1.0"),
        (IMAGES, {"loss": "hinge"}, "loss is 'hinge'"),
        (IMAGES[:0], {}, "shape|0 sample|inconsistent"),
    ],
)
def test_careless_input(X, options, message):
    if options.get("image_shape") == (8, 8):
        X = X.reshape(400, -1)
    with pytest.raises(ValueError, match=message):
        cvxnn.ConvexCNNClassifier(**(SMALL | options)).fit(X, LABELS[: len(X)])


def test_one_class_and_wrong_lengths():
    with pytest.raises(InvalidInputError, match="only one class"):
        cvxnn.ConvexCNNClassifier().fit(IMAGES[:5], np.zeros(5, int))
    with pytest.raises(ValueError, match="inconsistent"):
        cvxnn.ConvexCNNClassifier().fit(IMAGES[:5], LABELS[:4])


def test_new_images_of_another_shape_are_refused(model):
    with pytest.raises(InvalidInputError, match="images of shape"):
        model.predict(np.zeros((2, 9, 8)))


@pytest.mark.parametrize("activation", ["gated_relu", "linear", "relu"])
def test_saved_models_predict_the_same(tmp_path, activation):
    model = cvxnn.ConvexCNNClassifier(activation, filter_size=2, stride=2, max_iter=3, **SMALL, **fast(activation))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CertificationWarning)
        model.fit(IMAGES[:60], LABELS[:60])
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "model.safetensors"))
    assert np.array_equal(loaded.predict_proba(IMAGES), model.predict_proba(IMAGES))
    assert loaded.certificate_ == model.certificate_
    assert loaded.get_params() == model.get_params()
    network = cvxnn.load(cvxnn.save(model.network_, tmp_path / "network.safetensors"))
    images = torch.tensor(IMAGES[:5, None])
    assert torch.equal(network(images), model.network_(images))


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
