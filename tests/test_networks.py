"""Networks of solutions: same predictions as the blocks, as torch modules and as ONNX files."""

import builtins
import copy
import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import DependencyError, InvalidInputError, StorageError
from cvxnn.networks import TwoLayerNetwork, balanced_factors, build_network, padded_factors
from cvxnn.norms import VECTOR_NORMS

RNG = np.random.default_rng(1)
X = RNG.standard_normal((50, 4))
NEW = RNG.standard_normal((200, 4))
Y = RNG.standard_normal((50, 3))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
CASES = {
    "gated": {},
    "hidden_bias": {"hidden_bias": True},
    "output_bias": {"output_bias": True},
    "both_biases": {"hidden_bias": True, "output_bias": True},
    "linear": {"activation": "linear"},
    "linear_biases": {"activation": "linear", "hidden_bias": True, "output_bias": True},
    "quantile": {"hidden_bias": True, "gate_quantile": 0.7},
    "l1_norm": {"norms": ("l2", "l1")},
    "zero": {"beta": 1e3},
    "zero_biases": {"beta": 1e3, "hidden_bias": True, "output_bias": True},
}


def solution(dtype="float64", **options):
    options = {"n_gates": 12, "beta": 0.02} | options
    problem = cvxnn.mlp_problem(X, Y, random_state=0, dtype=dtype, **options)
    return cvxnn.solve(problem, tol=1e-2)


@pytest.fixture(scope="module")
def results():
    return {(name, dtype): solution(dtype, **CASES[name]) for name in CASES for dtype in ("float64", "float32")}


def expected(result, X=NEW):
    """Predictions of the blocks themselves."""
    problem = result.problem
    data = np.hstack([X, np.ones((len(X), 1))]) if problem.hidden_bias else X
    return problem.operator.predict(result.Z, data) + result.intercept


def error(found, wanted):
    """Largest difference, relative to the largest output."""
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_the_blocks(results, name, dtype):
    result = results[name, dtype]
    network = result.network()
    assert network.hidden.dtype == getattr(torch, dtype)
    if name.startswith("zero"):
        assert network.hidden.shape[1] == 0
    else:
        assert network.hidden.shape[1] > 0
    with torch.no_grad():
        assert error(network(torch.from_numpy(NEW)), expected(result)) <= TOLERANCE[network.hidden.dtype]


@pytest.mark.parametrize("name", ["both_biases", "quantile", "linear"])
def test_conversions_keep_the_gates(results, name):
    result = results[name, "float64"]
    network = result.network()
    gates = None if network.gates is None else network.gates.clone()
    x = torch.from_numpy(NEW)
    exact = network(x)
    single = result.network(dtype=torch.float32)
    assert network.float() is network
    assert torch.equal(network(x), single(x))
    assert network.hidden.dtype == torch.float32
    assert error(network(x).detach(), exact.detach()) <= TOLERANCE[torch.float32]
    if gates is not None:
        assert network.gates.dtype == torch.float64
        assert torch.equal(network.gates, gates)
    assert network.double().hidden.dtype == torch.float64


def test_gates_see_samples_in_the_type_of_training():
    sample, gate = torch.tensor([[1.0, 1e-9]], dtype=torch.float64), torch.tensor([[-1.0], [1.0]]).double()
    sample[0, 1] += 1.0
    weights = (torch.ones(2, 1).double(), torch.ones(1, 1).double(), torch.zeros(1).double(), gate, torch.tensor([0]))
    exact, rounded = TwoLayerNetwork(*weights), TwoLayerNetwork(*weights, sample_dtype=torch.float32)
    above, below = sample, torch.tensor([[1.0, 1 - 1e-9]]).double()
    below[0, 1] = 1 - 1e-9
    assert exact(above).item() > 0
    assert exact(below).item() == 0
    assert exact.float()(below).item() == 0
    assert rounded(below).item() > 0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_training_samples_have_their_gates(results, dtype):
    """Also those with quantile gates, which pass through samples."""
    result = results["quantile", dtype]
    outputs = result.problem.operator.apply(result.Z) + result.intercept
    for network in (result.network(), result.network().float(), result.network(dtype=torch.float64)):
        assert error(network(torch.from_numpy(X)).detach(), outputs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["both_biases", "linear", "zero"])
def test_state_dict_pickle_and_copies(results, name):
    network = results[name, "float64"].network()
    x = torch.from_numpy(NEW)
    fresh = build_network(results[name, "float64"].problem, results[name, "float64"].Z, torch.zeros(3).double())
    with torch.no_grad():
        fresh.hidden.zero_()
        fresh.load_state_dict(network.state_dict())
        for other in (fresh, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other(x), network(x))
            assert other.state_dict().keys() == network.state_dict().keys()
        duplicate = copy.deepcopy(network)
        duplicate.bias.add_(1.0)
        assert error(duplicate(x), network(x) + 1) <= 1e-14


def test_gradients_are_right():
    network = solution(hidden_bias=True, output_bias=True, beta=0.1).network()
    x = torch.from_numpy(NEW[:4]).requires_grad_()
    parameters = tuple(network.parameters())
    assert len(parameters) == 3

    def outputs(x, *values):
        return torch.func.functional_call(network, dict(zip(("hidden", "output", "bias"), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


def test_training_continues():
    network = solution().network()
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (network(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_changes_do_not_reach_the_problem(results):
    result = results["gated", "float64"]
    before = result.problem.gates.clone()
    network = result.network()
    network.gates.neg_()
    with torch.no_grad():
        network.bias.add_(1.0)
    assert torch.equal(result.problem.gates, before)
    assert not result.intercept.any()


@pytest.mark.parametrize("shape", [(4,), (), (3, 5), (3, 3), (2, 3, 4)])
def test_inputs_of_wrong_shape(results, shape):
    network = results["hidden_bias", "float64"].network()
    with pytest.raises(InvalidInputError, match=r"x has shape .*; \(n, 4\), a row per sample, is wanted"):
        network(torch.zeros(shape))


def test_inputs_of_other_types_and_no_rows(results):
    network = results["hidden_bias", "float64"].network()
    assert network(torch.zeros(0, 4)).shape == (0, 3)
    assert network(torch.ones(2, 4, dtype=torch.int64)).dtype == torch.float64


PAIRS = [(left, right) for left in VECTOR_NORMS for right in VECTOR_NORMS]
SIGN_PAIRS = [pair for pair in PAIRS if "linf" in pair and "l1" not in pair]


def costs(network, norms):
    """||u_j||_C and ||v_j||_R of the neurons."""
    left, right = (VECTOR_NORMS[name] for name in norms)
    with torch.no_grad():
        return left.value(network.hidden.T), right.value(network.output)


@pytest.fixture(scope="module")
def solved_by_norm():
    return {pair: solution(norms=pair, output_bias=True) for pair in PAIRS}


@pytest.mark.parametrize("norms", PAIRS, ids="-".join)
def test_network_is_the_certified_point(solved_by_norm, norms):
    """Its penalty (14) is that of the certificate, and its predictions are those of the blocks."""
    result = solved_by_norm[norms]
    assert (result.factors is not None) == (norms in SIGN_PAIRS)
    network = result.network()
    left, right = costs(network, norms)
    assert torch.allclose(left, right, rtol=1e-9)
    assert float(left.min()) > 0
    assert float((left**2 + right**2).sum()) / 2 == pytest.approx(result.certificate.penalty, rel=1e-9)
    outputs = result.problem.operator.apply(result.Z) + result.intercept
    assert error(network(torch.from_numpy(X)).detach(), outputs) <= 1e-12


@pytest.mark.parametrize("norms", SIGN_PAIRS, ids="-".join)
def test_factors_repeat_the_proof(solved_by_norm, norms):
    result = solved_by_norm[norms]
    again = cvxnn.certify(result.problem, factors=result.factors, intercept=result.intercept, dual=result.dual)
    assert again.primal == result.certificate.primal
    assert again.relative_gap == pytest.approx(result.certificate.relative_gap, abs=1e-12)


@pytest.mark.parametrize("norms", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", [(5, 1), (1, 5)])
def test_vector_blocks(norms, shape):
    """The cost of one neuron per gate is the norm of the block, whatever the pair."""
    Z = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, V, index = balanced_factors(Z, norms)
    left, right = VECTOR_NORMS[norms[0]].value(U.T), VECTOR_NORMS[norms[1]].value(V.T)
    totals = torch.zeros(4).double().index_add(0, index, left * right)
    assert torch.allclose(totals, cvxnn.norms.get_norm(norms).value(Z)[1], rtol=1e-12)
    assert torch.allclose(left, right, rtol=1e-12)


@pytest.mark.parametrize("norms", PAIRS, ids="-".join)
@pytest.mark.parametrize("activation", ["gated_relu", "linear"])
def test_padded_factors(solved_by_norm, norms, activation):
    """They are the neurons gate by gate, balanced, and zero columns."""
    result = solved_by_norm[norms] if activation == "gated_relu" else solution(norms=norms, activation=activation)
    network = result.network()
    with torch.no_grad():
        network.hidden *= 3.0
        network.output /= 3.0
    U, V = padded_factors(network, norms)
    n_gates, p, q = result.problem.operator.block_shape
    assert (U.shape[:2], V.shape[:2]) == ((n_gates, p), (n_gates, q))
    assert torch.allclose(U @ V.mT, result.Z, atol=1e-12)
    left, right = VECTOR_NORMS[norms[0]].value(U.mT), VECTOR_NORMS[norms[1]].value(V.mT)
    assert torch.allclose(left, right, rtol=1e-9)
    assert int((left > 0).sum()) == len(network.output)


@pytest.mark.parametrize("norms", PAIRS, ids="-".join)
@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_balanced_factors_of_any_size(norms, scale):
    Z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, V, index = balanced_factors(scale * Z, norms)
    for k in range(2):
        product = (U[:, index == k] * scale**-0.5) @ (V[:, index == k] * scale**-0.5).T
        assert torch.allclose(product, Z[k], atol=1e-13)


def test_padded_factors_of_no_neurons(results):
    U, V = padded_factors(results["zero", "float64"].network(), ("l2", "linf"))
    n_gates = results["zero", "float64"].problem.n_gates
    assert (U.shape[:2], V.shape[:2]) == ((n_gates, 4), (n_gates, 3))
    assert not U.any() and not V.any()


def test_balanced_factors():
    Z = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Z[2] = 0
    Z[3] = torch.outer(Z[3, :, 0], Z[3, 0])
    U, V, index = balanced_factors(Z)
    assert index.tolist() == [0, 0, 0, 1, 1, 1, 3, 4, 4, 4]
    assert torch.allclose(U.norm(dim=0), V.norm(dim=0), rtol=1e-12)
    for k in range(5):
        assert torch.allclose(U[:, index == k] @ V[:, index == k].T, Z[k], atol=1e-13)


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert [o.name for o in session.get_outputs()] == ["y"]
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_onnx_predictions(tmp_path, results, name, dtype):
    network = results[name, dtype].network()
    path = cvxnn.export_onnx(network, str(tmp_path / "model.onnx"))
    assert path == tmp_path / "model.onnx"
    for n in (200, 1, 0):
        x = NEW[:n].astype(dtype)
        found, wanted = run_onnx(path, x), network(torch.from_numpy(x)).detach()
        assert found.dtype == dtype
        assert found.shape == (n, 3)
        if n:
            assert error(found, wanted) <= TOLERANCE[network.hidden.dtype]


@pytest.mark.parametrize(("trained", "converted"), [("float64", "float32"), ("float32", "float64")])
def test_onnx_of_converted_networks(tmp_path, results, trained, converted):
    network = results["both_biases", trained].network(dtype=getattr(torch, converted))
    x = NEW.astype(converted)
    found = run_onnx(cvxnn.export_onnx(network, tmp_path / "a.onnx"), x)
    assert error(found, network(torch.from_numpy(x)).detach()) <= TOLERANCE[network.hidden.dtype]


def test_onnx_gates_are_compared_in_float64(tmp_path):
    gates = torch.tensor([[1.0], [-1.0 - 1e-12]], dtype=torch.float64)
    network = TwoLayerNetwork(torch.ones(2, 1), torch.ones(1, 1), torch.zeros(1), gates, torch.tensor([0]))
    x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [0.0, 0.0], [2.0, 1.0]], dtype=np.float32)
    found = run_onnx(cvxnn.export_onnx(network, tmp_path / "a.onnx"), x)
    assert found.ravel().tolist() == [0.0, 0.0, -2.0, 0.0, 3.0]


@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.float64])
def test_onnx_gates_on_their_boundary(tmp_path, sample_dtype):
    gates, double = torch.tensor([[1.0], [-1.0]]).double(), {"dtype": torch.float64}
    weights = (torch.ones(2, 1, **double), torch.ones(1, 1, **double), torch.zeros(1, **double))
    network = TwoLayerNetwork(*weights, gates, torch.tensor([0]), sample_dtype=sample_dtype)
    x = np.array([[1.0, 1.0], [1.0, 1 + 1e-9], [1.0, 2.0]])
    active = [True, sample_dtype == torch.float32, False]
    found = run_onnx(cvxnn.export_onnx(network, tmp_path / "a.onnx"), x)
    for outputs in (found, network(torch.from_numpy(x)).detach().numpy()):
        assert (outputs.ravel() > 0).tolist() == active


def test_onnx_without_neurons_has_no_empty_products(tmp_path, results):
    path = cvxnn.export_onnx(results["zero_biases", "float64"].network(), tmp_path / "a.onnx")
    assert "MatMul" not in {node.op_type for node in onnx.load(path).graph.node}


def test_onnx_of_estimators(tmp_path):
    names = np.array(["low", "high"])[(X[:, 0] > 0).astype(int)]
    model = cvxnn.ConvexMLPClassifier(n_gates=5, random_state=0).fit(X, names)
    path = cvxnn.export_onnx(model, tmp_path / "a.onnx")
    metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    classes = np.array(json.loads(metadata["classes"]))
    assert np.array_equal(classes[run_onnx(path, NEW).argmax(axis=1)], model.predict(NEW))
    loaded = cvxnn.load(cvxnn.save(model, tmp_path / "a.safetensors"))
    assert cvxnn.export_onnx(loaded, tmp_path / "b.onnx").read_bytes() == path.read_bytes()


def test_onnx_refusals(tmp_path, results):
    network = results["gated", "float64"].network()
    target = tmp_path / "a.onnx"
    with pytest.raises(InvalidInputError, match="model is a ConvexMLPRegressor that is not fitted; call fit"):
        cvxnn.export_onnx(cvxnn.ConvexMLPRegressor(), target)
    for other, name in ((torch.nn.Linear(2, 1), "Linear"), ("x", "str"), (None, "NoneType")):
        with pytest.raises(InvalidInputError, match=f"model is a {name}; a fitted estimator of cvxnn or"):
            cvxnn.export_onnx(other, target)
    with pytest.raises(InvalidInputError, match=r"weights of torch.float16; float32 or float64 is wanted"):
        cvxnn.export_onnx(network.half(), target)
    with pytest.raises(StorageError, match=r"cannot write .*No such file or directory"):
        cvxnn.export_onnx(results["gated", "float64"].network(), tmp_path / "missing" / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_too_large():
    network = TwoLayerNetwork(*(torch.empty(s, device="meta") for s in ((2**15, 2**15), (2**15, 1), (1,))))
    with pytest.raises(InvalidInputError, match="an ONNX file holds less than 2 GiB"):
        cvxnn.export_onnx(network, "never.onnx")


def test_onnx_missing(tmp_path, results, monkeypatch):
    original = builtins.__import__

    def without_onnx(name, *arguments, **options):
        if name == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(DependencyError, match=r"pip install 'cvxnn\[onnx\]'"):
        cvxnn.export_onnx(results["gated", "float64"].network(), tmp_path / "a.onnx")


def test_onnx_on_a_full_disk(tmp_path, results, monkeypatch):
    path = tmp_path / "a.onnx"
    network = results["gated", "float64"].network()
    content = cvxnn.export_onnx(network, path).read_bytes()

    def full(self, data):
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device"):
        cvxnn.export_onnx(results["linear", "float64"].network(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content
