"""Networks of attention problems: same predictions as their points, as torch modules, on disk and as ONNX files."""

import copy

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.files import read_tensors, write_tensors
from cvxnn.networks import AttentionNetwork, build_network, padded_factors

from .attention_reference import MASKS, make_attention, make_mask

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
ACTIVATIONS = ("linear", "gated_relu", "relu")


def random_point(problem):
    """A point without any solver: for ReLU the heads are gates, which lie in their own cones."""
    rng = torch.Generator().manual_seed(0)
    n_gates, p, q = problem.operator.block_shape
    intercept = torch.randn(problem.Y.shape[1], generator=rng, dtype=torch.float64)
    U = torch.randn(n_gates, p, 2, generator=rng, dtype=torch.float64)
    if problem.activation == "relu":
        U = torch.from_numpy(problem.operator.gate_vectors).T.unsqueeze(2).expand(-1, -1, 2)
    return U, torch.randn(n_gates, q, 2, generator=rng, dtype=torch.float64), intercept


def network_and_outputs(problem, dtype=None):
    """A network, and A(Z) of its point on the training data."""
    U, V, b = random_point(problem)
    outputs = problem.operator.double().network_outputs(Columns.from_factors(U, V)) + b
    return build_network(problem, None, b, factors=(U, V), dtype=dtype), outputs


def error(found, wanted):
    """Largest difference, relative to the largest output."""
    found, wanted = torch.as_tensor(found).detach().double(), torch.as_tensor(wanted).detach().double()
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def given_mask(kind, n=6, s=4):
    """The mask that the problem of the reference was made with, and which tokens are valid."""
    rng = np.random.default_rng(0)
    rng.standard_normal((n, s, 3))
    mask, _, valid = make_mask(kind, n, s, rng)
    return mask, valid


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("output", ["mean", "tokens"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_predict_as_their_point(activation, mask, output, dtype):
    problem, reference = make_attention(activation, output, mask, dtype=dtype)
    given, valid = given_mask(mask)
    network, outputs = network_and_outputs(problem)
    assert isinstance(network, AttentionNetwork)
    assert network.hidden.dtype == getattr(torch, dtype)
    # What is at padding is not looked at.
    tokens = torch.from_numpy(np.where(valid[:, :, None], reference.X, np.nan))
    exact, _ = network_and_outputs(problem, torch.float64)
    for module in (network, exact):
        found = module(tokens, given)
        if output == "tokens":
            assert found.shape == (6, 4, 2)
            assert not found[torch.from_numpy(~valid)].any()
            found = found[torch.from_numpy(valid)]
        assert error(found, outputs) <= TOLERANCE[module.hidden.dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_heads_are_the_columns(activation):
    """On new tokens, of another length, against the formula of the block by hand."""
    problem, _ = make_attention(activation, "tokens", output_bias=True)
    network, _ = network_and_outputs(problem)
    X = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 7, 3)))
    mask = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = network.bias.expand(3, 7, 2)
    for j, (U, V) in enumerate(zip(network.scores, network.values, strict=True)):
        scores = X @ U @ X.mT
        if activation == "gated_relu":
            scores = scores * (X @ network.gates[network.gate_index[j]] @ X.mT >= 0)
        elif activation == "relu":
            scores = scores.clamp_min(0)
        expected = expected + (mask * scores) @ X @ V
    assert error(network(X, mask), expected) <= 1e-12
    assert network.n_features == network.dim == 3


def test_the_predictions_of_a_result():
    problem, reference = make_attention("gated_relu", "mean", "padding", output_bias=True)
    result = cvxnn.solve(problem, tol=1e-8)
    network = result.network()
    found = network(torch.from_numpy(reference.X), torch.from_numpy(reference.valid))
    assert error(found, problem.operator.apply(result.Z) + result.intercept) <= 1e-12
    penalty = (network.hidden.square().sum() + network.output.square().sum()) / 2
    assert penalty.item() == pytest.approx(result.certificate.penalty, rel=1e-12)


def test_blocks_and_zero_blocks():
    problem, reference = make_attention()
    U, V, b = random_point(problem)
    tokens = torch.from_numpy(reference.X)
    of_blocks, of_factors = build_network(problem, U @ V.mT, b), build_network(problem, None, b, factors=(U, V))
    assert error(of_blocks(tokens), of_factors(tokens)) <= 1e-12
    back = padded_factors(of_blocks, ("l2", "l2"))
    assert torch.allclose(back[0] @ back[1].mT, U @ V.mT, atol=1e-12)
    empty = build_network(problem, torch.zeros(problem.operator.block_shape), b)
    assert empty.hidden.shape[1] == 0
    assert torch.equal(empty(tokens), b.expand(6, 2))
    assert of_blocks(tokens[:0]).shape == (0, 2)


def test_conversions_never_round_the_gates():
    network, _ = network_and_outputs(make_attention()[0])
    gates = network.gates.clone()
    for converted in (network.to(torch.float32), copy.deepcopy(network).half(), network.double()):
        assert converted.gates.dtype == torch.float64
        assert torch.equal(converted.gates, gates)


@pytest.mark.parametrize("output", ["mean", "tokens"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, output):
    """A network can be trained on, and its tokens can be the outputs of another."""
    problem, _ = make_attention(activation, output, "padding")
    network, _ = network_and_outputs(problem)
    tokens = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 3))).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    parameters = (network.hidden, network.output, network.bias)
    outputs = network(tokens, mask)
    slopes = torch.autograd.grad(outputs.square().sum(), (*parameters, tokens))
    assert not slopes[3][0, 2].any()
    assert torch.autograd.gradcheck(lambda tokens: network(tokens, mask), (tokens,))
    step = 1e-6
    for part, slope in zip(parameters, slopes[:3], strict=True):
        direction = torch.randn_like(part)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                part += sign * step * direction
                values.append(float(network(tokens, mask).square().sum()))
                part -= sign * step * direction
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((slope * direction).sum()), rel=1e-4)


def test_many_sequences_in_batches(monkeypatch):
    network, _ = network_and_outputs(make_attention(output="tokens")[0])
    tokens = torch.from_numpy(np.random.default_rng(3).standard_normal((30, 5, 3)))
    mask = torch.rand(30, 5, 5) < 0.8
    mask[:, 0, 0] = True
    whole = network(tokens, mask)
    monkeypatch.setattr("cvxnn.networks.attention._BATCH_BYTES", 2**13)
    assert error(network(tokens, mask), whole) <= 1e-14
    assert error(network(tokens, mask[0]), torch.cat([network(part, mask[0]) for part in tokens.split(4)])) <= 1e-14


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.ones(2, 3), None, r"tokens have shape \(2, 3\); \(n, tokens, 3\) is wanted"),
        (torch.ones(2, 3, 4), None, r"tokens have shape \(2, 3, 4\)"),
        (torch.ones(2, 0, 3), None, r"tokens have shape \(2, 0, 3\)"),
        (torch.ones(2, 5, 3), torch.ones(2, 4, dtype=torch.bool), r"mask has shape \(2, 4\)"),
        (torch.ones(2, 5, 3), torch.full((2, 5), 0.5), "mask has type float32; bool"),
        (torch.ones(2, 5, 3), torch.eye(2, 5, dtype=torch.bool) & False, "mask leaves sequence 0 without"),
    ],
)
def test_careless_calls(tokens, mask, message):
    network, _ = network_and_outputs(make_attention()[0])
    with pytest.raises(InvalidInputError, match=message):
        network(tokens.double(), mask)


@pytest.mark.parametrize("output", ["mean", "tokens"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stored_networks_are_the_same(tmp_path, activation, dtype, output):
    network, _ = network_and_outputs(make_attention(activation, output, dtype=dtype)[0])
    path = cvxnn.save(network, tmp_path / "a")
    loaded = cvxnn.load(path)
    assert type(loaded) is AttentionNetwork
    tokens = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 5, 3)))
    assert torch.equal(loaded(tokens), network(tokens))
    assert (loaded.pooled, loaded.hidden_bias, loaded.sample_dtype) == (output == "mean", False, getattr(torch, dtype))
    assert cvxnn.save(loaded, tmp_path / "b").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, arrays: header["network"].pop("pooled"), "its field pooled"),
        (lambda header, arrays: header["network"].update(hidden_bias=2), "its field hidden_bias"),
        (lambda header, arrays: arrays.pop("network.output"), "it has only"),
        (
            lambda header, arrays: arrays.update({"network.hidden": arrays["network.hidden"][:8]}),
            r"\(d d, m\) is wanted",
        ),
        (lambda header, arrays: arrays.update({"network.output": arrays["network.output"][:, :5]}), r"\(m, d c\)"),
        (lambda header, arrays: arrays.update({"network.gates": arrays["network.gates"][:, :2]}), r"\(P, 3, 3\)"),
        (
            lambda header, arrays: arrays.update({"network.gates": arrays["network.gates"][:1]}),
            "gates that it does not",
        ),
        (lambda header, arrays: arrays.update({"network.gate_index": arrays["network.gate_index"][:1]}), "gate_index"),
    ],
)
def test_damaged_networks_are_refused(tmp_path, change, message):
    path = cvxnn.save(network_and_outputs(make_attention()[0])[0], tmp_path / "a")
    header, arrays = read_tensors(path, "model")
    change(header, arrays)
    write_tensors(path, "model", header, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with pytest.raises(StorageError, match=f"holds no model that can be restored: .*{message}"):
        cvxnn.load(path)


onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("output", ["mean", "tokens"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onnx_predictions(tmp_path, activation, dtype, output):
    problem, _ = make_attention(activation, output, dtype=dtype)
    network, _ = network_and_outputs(problem)
    empty = build_network(problem, torch.zeros(problem.operator.block_shape), torch.arange(2.0))
    for module in (network, empty):
        path = cvxnn.export_onnx(module, tmp_path / "a.onnx")
        for n, s in ((5, 4), (1, 7), (0, 2)):
            x = np.random.default_rng(1).standard_normal((n, s, 3)).astype(dtype)
            found = run_onnx(path, x)
            assert found.dtype == dtype
            assert found.shape == ((n, 2) if output == "mean" else (n, s, 2))
            if n:
                assert error(found, module(torch.from_numpy(x))) <= TOLERANCE[module.hidden.dtype]
