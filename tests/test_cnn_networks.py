"""Networks of CNN problems: same predictions as their points, as torch modules, on disk and as ONNX files."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.files import read_tensors, write_tensors
from cvxnn.networks import TwoLayerCNN, build_network, padded_factors
from cvxnn.operators import PatchGeometry

RNG = np.random.default_rng(0)
IMAGES, NEW = RNG.standard_normal((7, 2, 6, 5)), RNG.standard_normal((9, 2, 6, 5))
Y = RNG.standard_normal((7, 3))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
ACTIVATIONS = ("linear", "gated_relu", "relu")
OPTIONS = {"filter_size": (3, 2), "pooling": (2, 2), "hidden_bias": True, "output_bias": True, "n_gates": 5}


def cnn_problem(activation="gated_relu", dtype="float64", images=IMAGES, **options):
    return cvxnn.cnn_problem(images, Y, activation=activation, dtype=dtype, **(OPTIONS | options))


def random_point(problem):
    """A point without any solver: for ReLU the filters are gates, which lie in their own cones."""
    rng = torch.Generator().manual_seed(0)
    n_gates, h, q = problem.operator.block_shape
    intercept = torch.randn(problem.Y.shape[1], generator=rng, dtype=torch.float64)
    U = torch.randn(n_gates, h, 2, generator=rng, dtype=torch.float64)
    if problem.activation == "relu":
        U = problem.gates.T.unsqueeze(2).expand(-1, -1, 2)
    return U, torch.randn(n_gates, q, 2, generator=rng, dtype=torch.float64), intercept


def network_and_outputs(problem, dtype=None):
    """A network, and A(Z) of its point on the training data."""
    U, V, b = random_point(problem)
    outputs = problem.operator.double().network_outputs(Columns.from_factors(U, V)) + b
    return build_network(problem, None, b, factors=(U, V), dtype=dtype), outputs


def network_of(**options):
    return network_and_outputs(cnn_problem(**options))[0]


def error(found, wanted):
    """Largest difference, relative to the largest output."""
    found, wanted = torch.as_tensor(found).detach().double(), torch.as_tensor(wanted).detach().double()
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


MATRIX = np.random.default_rng(1).standard_normal((3, 16))
GEOMETRIES = {
    "grid": {},
    "global": {"pooling": (1, 1)},
    "matrix": {"pooling": MATRIX},
    "no_bias": {"hidden_bias": False},
    "stride": {"stride": 2, "padding": 1},
    "sides": {"stride": (2, 1), "padding": (0, 2)},
    "wide_padding": {"filter_size": 1, "padding": 2, "pooling": (3, 3)},
    "quantile": {"gate_sampling": "kmeans", "gate_quantile": 0.5},
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_predict_as_their_point(activation, name, dtype):
    problem = cnn_problem(activation, dtype, **GEOMETRIES[name])
    network, outputs = network_and_outputs(problem)
    assert isinstance(network, TwoLayerCNN)
    assert network.hidden.dtype == getattr(torch, dtype)
    with torch.no_grad():
        for images in (IMAGES, IMAGES.astype(np.float32)) if dtype == "float32" else (IMAGES,):
            assert error(network(torch.from_numpy(images)), outputs) <= TOLERANCE[network.hidden.dtype]
        exact, _ = network_and_outputs(problem, torch.float64)
        assert error(exact(torch.from_numpy(IMAGES)), outputs) <= TOLERANCE[network.hidden.dtype]


def test_blocks_and_zero_blocks():
    problem = cnn_problem()
    U, V, b = random_point(problem)
    images = torch.from_numpy(NEW)
    of_blocks, of_factors = build_network(problem, U @ V.mT, b), build_network(problem, None, b, factors=(U, V))
    assert error(of_blocks(images), of_factors(images)) <= 1e-12
    back = padded_factors(of_blocks, ("l2", "l2"))
    assert torch.allclose(back[0] @ back[1].mT, U @ V.mT, atol=1e-12)
    empty = build_network(problem, torch.zeros(problem.operator.block_shape), b)
    assert empty.hidden.shape[1] == 0
    assert torch.equal(empty(images), b.expand(9, 3))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_network_equals_torch_convolution(padding):
    """Against conv2d, adaptive pooling and a linear layer, put together by hand."""
    network = network_of(filter_size=3, padding=padding)
    x = torch.tensor(NEW)

    def convolve(columns):
        return torch.nn.functional.conv2d(x, columns[:-1].T.reshape(-1, 2, 3, 3), columns[-1], padding=padding)

    maps = convolve(network.hidden) * (convolve(network.gates) >= 0)[:, network.gate_index]
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(2)
    expected = torch.einsum("nja,jca->nc", pooled, network.output.view(-1, 3, 4)) + network.bias
    assert error(network(x), expected) <= 1e-12


def test_conversions_never_round_the_gates():
    problem = cnn_problem()
    network = network_of()
    gates = network.gates.clone()
    for converted in (network.to(torch.float32), copy.deepcopy(network).half(), network.double()):
        assert torch.equal(converted.gates, gates)
    assert torch.equal(gates, problem.gates)
    assert network.hidden.dtype == network.pooling.dtype == torch.float64


@pytest.mark.parametrize("pixel", [1 + 1e-9, 1 - 1e-9, 1.0])
def test_gates_see_images_in_the_type_of_training(pixel):
    """A gate that is active where the pixel is at least 1: in float32 both neighbours are 1."""
    double = {"dtype": torch.float64}
    weights = (torch.ones(2, 1, **double), torch.ones(1, 1, **double), torch.zeros(1, **double))
    gates, image = torch.tensor([[1.0], [-1.0]], **double), torch.full((1, 1, 1, 1), pixel, **double)
    rest = (torch.tensor([0]), PatchGeometry((1, 1), (1, 1), (0, 0), True), torch.ones(1, 1, **double), (1, 1))
    exact, rounded = (TwoLayerCNN(*weights, gates, *rest, kind) for kind in (torch.float64, torch.float32))
    assert (exact(image).item() > 0) == (exact.float()(image).item() > 0) == (pixel >= 1)
    assert rounded(image).item() > 0


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 6, 5), (3, 2, 7, 5), (2, 6, 5)])
def test_other_images_are_refused(shape):
    network = network_of()
    with pytest.raises(InvalidInputError, match=r"^images "):
        network(torch.zeros(shape))


def test_a_map_of_another_shape_is_refused():
    """Also where it has as many patches."""
    network = network_of(filter_size=3)
    assert network.grid == (4, 3)
    with pytest.raises(
        InvalidInputError, match=r"images of 5 x 6 give 3 x 4 patches; 4 x 3, as in training, are wanted"
    ):
        network(torch.zeros(1, 2, 5, 6))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_images_are_taken_in_batches(monkeypatch, activation):
    network, images, sizes = network_of(activation=activation), torch.from_numpy(NEW), []
    whole, outputs = network(images), network._outputs
    monkeypatch.setattr("cvxnn.networks.cnn._BATCH_BYTES", 30_000)
    monkeypatch.setattr(network, "_outputs", lambda part: (sizes.append(len(part)), outputs(part))[1])
    assert error(network(images), whole) <= 1e-12
    assert sum(sizes) == 9
    assert len(sizes) > 1
    assert network(torch.zeros(0, 2, 6, 5)).shape == (0, 3)


def test_batches_are_smaller_where_there_are_many_gates(monkeypatch):
    """Also gates without neurons have maps."""
    problem, sizes = cnn_problem(n_gates=400), []
    Z = torch.zeros(problem.operator.block_shape, dtype=torch.float64)
    Z[0, 0, 0] = 1
    network = build_network(problem, Z, torch.zeros(3))
    outputs = network._outputs
    monkeypatch.setattr("cvxnn.networks.cnn._BATCH_BYTES", 8 * 16 * 400 * 4)
    monkeypatch.setattr(network, "_outputs", lambda part: (sizes.append(len(part)), outputs(part))[1])
    network(torch.from_numpy(NEW))
    assert max(sizes) <= 2


def test_gradients_and_copies():
    network, x = network_of(), torch.from_numpy(NEW[:3]).requires_grad_()
    values = tuple(network.parameters())
    assert len(values) == 3

    def outputs(x, *values):
        return torch.func.functional_call(network, dict(zip(("hidden", "output", "bias"), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *values))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))


def test_changes_do_not_reach_the_problem():
    problem = cnn_problem()
    network = network_and_outputs(problem)[0]
    gates, pooling = problem.gates.clone(), problem.operator.pooling.clone()
    network.gates.neg_()
    network.pooling.neg_()
    assert torch.equal(problem.gates, gates)
    assert torch.equal(problem.operator.pooling, pooling)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stored_networks_are_the_same(tmp_path, activation, dtype):
    network = network_of(activation=activation, dtype=dtype, stride=(2, 1))
    path = cvxnn.save(network, tmp_path / "a")
    loaded = cvxnn.load(path)
    assert type(loaded) is TwoLayerCNN
    assert torch.equal(loaded(torch.from_numpy(NEW)), network(torch.from_numpy(NEW)))
    assert (loaded.grid, loaded.geometry, loaded.sample_dtype) == (
        network.grid,
        network.geometry,
        getattr(torch, dtype),
    )
    assert cvxnn.save(loaded, tmp_path / "b").read_bytes() == path.read_bytes()


CHANGES = [
    ({"grid": [3, 5]}, "its pooling has 16 columns; 3 x 5 are wanted"),
    ({"grid": [16]}, "its grid is"),
    ({"grid": None}, "its field grid is"),
    ({"geometry": None}, "its field geometry is"),
    ({"geometry": {}}, "its field filter_size is"),
    ({"sample_dtype": "int8"}, "its field sample_dtype is 'int8'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_damaged_headers_are_refused(tmp_path, change, message):
    path = cvxnn.save(network_of(), tmp_path / "a")
    header, arrays = read_tensors(path, "model")
    header["network"].update(change)
    write_tensors(path, "model", header, arrays)
    with pytest.raises(StorageError, match=f"holds no model that can be restored: .*{message}"):
        cvxnn.load(path)


@pytest.mark.parametrize("name", ["hidden", "output", "bias", "gates", "gate_index", "pooling"])
def test_missing_or_wrong_tensors_are_refused(tmp_path, name):
    header, arrays = read_tensors(cvxnn.save(network_of(), tmp_path / "a"), "model")
    name = f"network.{name}"
    for changed in (
        {},
        {name: arrays[name].astype(np.int8)},
        {name: arrays[name].ravel()[:2]},
        {name: arrays[name][:0]},
    ):
        write_tensors(tmp_path / "a", "model", header, {k: v for k, v in arrays.items() if k != name} | changed)
        with pytest.raises(StorageError, match="holds no model that can be restored"):
            cvxnn.load(tmp_path / "a")


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("activation", "name"), list(itertools.product(ACTIVATIONS, GEOMETRIES)))
def test_onnx_predictions(tmp_path, activation, name, dtype):
    network = network_of(activation=activation, dtype=dtype, **GEOMETRIES[name])
    path = cvxnn.export_onnx(network, tmp_path / "a.onnx")
    for n in (9, 1, 0):
        x = NEW[:n].astype(dtype)
        found = run_onnx(path, x)
        assert found.dtype == dtype
        assert found.shape == (n, 3)
        if n:
            assert error(found, network(torch.from_numpy(x))) <= TOLERANCE[network.hidden.dtype]


@pytest.mark.parametrize(("trained", "converted"), [("float64", "float32"), ("float32", "float64")])
def test_onnx_of_converted_networks(tmp_path, trained, converted):
    network = network_of(dtype=trained).to(getattr(torch, converted))
    x = NEW.astype(converted)
    found = run_onnx(cvxnn.export_onnx(network, tmp_path / "a.onnx"), x)
    assert error(found, network(torch.from_numpy(x))) <= TOLERANCE[torch.float32]


def test_onnx_gates_are_compared_in_float64(tmp_path):
    weights = (torch.ones(2, 1), torch.ones(1, 1), torch.zeros(1))
    gates = torch.tensor([[1.0], [-1.0 - 1e-12]], dtype=torch.float64)
    rest = (torch.tensor([0]), PatchGeometry((1, 1), (1, 1), (0, 0), True), torch.ones(1, 2), (1, 2))
    network = TwoLayerCNN(*weights, gates, *rest)
    x = np.array([[1.0, 2.0], [1.0, 1.0]], dtype=np.float32).reshape(2, 1, 1, 2)
    for found in (run_onnx(cvxnn.export_onnx(network, tmp_path / "a.onnx"), x), network(torch.from_numpy(x)).detach()):
        assert np.asarray(found).ravel().tolist() == [3.0, 0.0]


@pytest.mark.parametrize(("stride", "shape"), [(1, ["n", 2, 6, 5]), ((2, 1), ["n", 2, "height", 5])])
def test_onnx_sizes(tmp_path, stride, shape):
    """What the map of patches tells; the rest is free."""
    network = network_of(stride=stride)
    path = cvxnn.export_onnx(network, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == shape


def test_onnx_without_neurons(tmp_path):
    problem = cnn_problem()
    network = build_network(problem, torch.zeros(problem.operator.block_shape), torch.arange(3.0))
    path = cvxnn.export_onnx(network, tmp_path / "a.onnx")
    assert run_onnx(path, NEW).tolist() == [[0.0, 1.0, 2.0]] * 9
    assert "MatMul" not in {node.op_type for node in onnx.load(path).graph.node}


def test_onnx_of_estimators(tmp_path):
    pixels = (RNG.random((40, 7, 7)) * 255).astype(np.uint8)
    labels = np.array(["dark", "light"])[(pixels.mean((1, 2)) > np.median(pixels.mean((1, 2)))).astype(int)]
    model = cvxnn.ConvexCNNClassifier(stride=2, n_gates=4, tol=1e-2, random_state=0).fit(pixels, labels)
    path = cvxnn.export_onnx(model, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert session.get_inputs()[0].shape == ["n", 1, 7, 7]
    assert json.loads(metadata["scale"]) == 1 / 255
    outputs = run_onnx(path, pixels[:, None] * json.loads(metadata["scale"]))
    assert np.array_equal(np.array(json.loads(metadata["classes"]))[outputs.argmax(1)], model.predict(pixels))
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a.safetensors"))
    assert cvxnn.export_onnx(loaded, tmp_path / "b.onnx").read_bytes() == path.read_bytes()
