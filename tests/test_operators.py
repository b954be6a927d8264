"""The map of the MLP, its adjoint and all its shortcuts, against explicit matrices."""

import mpmath
import numpy as np
import pytest
import torch

import cvxnn.operators.base as operators_base
from cvxnn.operators import MLPOperator
from tests.helpers import explicit_matrix

SHAPES = {"inputs-masked": (17, 2, 5), "outputs-masked": (17, 5, 2), "square": (9, 3, 3), "one-sample": (1, 4, 2)}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def make_operator(shape=(17, 5, 2), n_gates=4, dtype=torch.float64, device="cpu", seed=0):
    n, d, c = shape
    rng = np.random.default_rng(seed)
    gates = rng.standard_normal((d, n_gates)) if n_gates else None
    X = torch.from_numpy(rng.standard_normal((n, d))).to(device, dtype)
    return MLPOperator(X, c, gates)


def random_like(op, seed=1):
    rng = np.random.default_rng(seed)
    Z = torch.from_numpy(rng.standard_normal(op.block_shape)).to(op.device, op.dtype)
    L = torch.from_numpy(rng.standard_normal((op.n_samples, op.n_outputs))).to(op.device, op.dtype)
    return Z, L


@pytest.fixture(params=[None, 1, 3], ids=["one-batch", "single-rows", "three-rows"])
def batch_rows(request, monkeypatch):
    """Force batches of so many rows, through BATCH_BYTES."""

    def set_rows(op_shape, n_gates, itemsize=8):
        if request.param is None:
            return
        _, d, c = op_shape
        budget = request.param * max(1, n_gates) * min(d, c) * itemsize
        monkeypatch.setattr(operators_base, "BATCH_BYTES", budget)

    return set_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("n_gates", [0, 1, 4], ids=["linear", "one-gate", "gated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adjoint_identity_and_matrix(shape, n_gates, dtype, batch_rows):
    batch_rows(shape, n_gates, torch.finfo(dtype).bits // 8)
    op = make_operator(shape, n_gates, dtype)
    Z, L = random_like(op)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    left, right = float((op.apply(Z) * L).sum()), float((Z * op.adjoint(L)).sum())
    assert left == pytest.approx(right, rel=tolerance, abs=tolerance)
    matrix = explicit_matrix(op)
    flat = Z.double().numpy().reshape(op.n_features, -1)
    np.testing.assert_allclose(op.apply(Z).double(), matrix @ flat, atol=10 * tolerance)
    expected = (matrix.T @ L.double().numpy()).reshape(op.block_shape)
    np.testing.assert_allclose(op.adjoint(L).double(), expected, atol=10 * tolerance)


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cuda_agrees_with_the_cpu(shape, dtype):
    cpu, cuda = make_operator(shape, dtype=dtype), make_operator(shape, dtype=dtype, device="cuda")
    assert torch.equal(cpu.patterns, cuda.patterns.cpu())
    Z, L = random_like(cpu)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(cuda.apply(Z.cuda()).cpu(), cpu.apply(Z), atol=10 * tolerance)
    np.testing.assert_allclose(cuda.adjoint(L.cuda()).cpu(), cpu.adjoint(L), atol=10 * tolerance)
    np.testing.assert_allclose(cuda.kernel().cpu(), cpu.kernel(), atol=10 * tolerance)


def test_batches_really_split(monkeypatch):
    assert operators_base.row_batches(3, 10**12) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    monkeypatch.setattr(operators_base, "BATCH_BYTES", 30)
    batches = operators_base.row_batches(11, 8)
    assert len(batches) == 4
    assert [i for rows in batches for i in range(11)[rows]] == list(range(11))
    assert len(make_operator((17, 5, 2), 4)._batches) == 17


@pytest.mark.parametrize("n_gates", [0, 4], ids=["linear", "gated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_factors_atoms_kernel_gram(shape, n_gates, batch_rows):
    batch_rows(shape, n_gates)
    op = make_operator(shape, n_gates)
    P, p, q = op.block_shape
    rng = np.random.default_rng(2)
    U, V = (torch.from_numpy(rng.standard_normal((P, size, 3))) for size in (p, q))
    np.testing.assert_allclose(op.apply_factors(U, V), op.apply(U @ V.mT), atol=1e-12)

    gate = torch.from_numpy(rng.integers(0, P, 6))
    u, v = torch.from_numpy(rng.standard_normal((6, p))), torch.from_numpy(rng.standard_normal((6, q)))
    atoms = op.apply_atoms(gate, u, v)
    for j in range(6):
        Z = torch.zeros(op.block_shape, dtype=torch.float64)
        Z[gate[j]] = torch.outer(u[j], v[j])
        np.testing.assert_allclose(atoms[j], op.apply(Z), atol=1e-12)

    matrix = explicit_matrix(op)
    np.testing.assert_allclose(op.kernel(), matrix @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(op.gram(), matrix.T @ matrix, atol=1e-12)
    weights = torch.from_numpy(rng.random(op.n_samples))
    np.testing.assert_allclose(
        op.moments(weights, weights.new_zeros(len(weights), 0))[0],
        matrix.T @ (weights.numpy()[:, None] * matrix),
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("n_gates", [0, 4], ids=["linear", "gated"])
def test_predict_on_training_data_is_apply(n_gates, dtype):
    op = make_operator(n_gates=n_gates, dtype=dtype)
    Z, _ = random_like(op)
    assert torch.equal(op.predict(Z, op.X.double().numpy()), op.apply(Z))


def test_double_is_exact_and_keeps_the_patterns():
    op = make_operator(dtype=torch.float32)
    double = op.double()
    assert double.dtype == torch.float64
    assert torch.equal(double.X.float(), op.X)
    assert torch.equal(double.X, op.X.to(torch.float64))
    assert torch.equal(double.patterns, op.patterns)
    assert op.double() is double
    assert double.double() is double


def test_zero_activation_counts_as_active():
    op = MLPOperator(
        torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]], dtype=torch.float64), 1, np.array([[1.0], [-1]])
    )
    assert op.patterns[:, 0].tolist() == [True, True, True]


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8, 1e-170, 1e140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("shape", [(40, 2, 3), (40, 3, 2)], ids=["inputs-masked", "outputs-masked"])
def test_rounding_bounds_hold(shape, dtype, scale):
    if dtype == torch.float32 and not 1e-10 < scale < 1e10:
        pytest.skip("outside the range of float32")
    n, d, c = shape
    rng = np.random.default_rng(3)
    X = torch.from_numpy(rng.standard_normal((n, d)) * 10.0 ** rng.integers(-3, 3, (n, 1)) * scale).to(dtype)
    op = MLPOperator(X, c, rng.standard_normal((d, 3)))
    Z, L = random_like(op)
    L = L - L.mean(0)
    mpmath.mp.dps = 50
    matrix = mpmath.matrix(explicit_matrix(op).tolist())
    exact_adjoint = matrix.T * mpmath.matrix(L.double().tolist())
    computed = mpmath.matrix(op.adjoint(L).double().reshape(-1, c).tolist())
    for k in range(op.n_gates):
        block = (exact_adjoint - computed)[k * d : (k + 1) * d, :]
        assert mpmath.mnorm(block, "f") <= op.adjoint_rounding(L)
    exact_apply = matrix * mpmath.matrix(Z.double().reshape(-1, c).tolist())
    error = mpmath.mnorm(exact_apply - mpmath.matrix(op.apply(Z).double().tolist()), "f")
    assert 0 < error <= op.apply_rounding(Z)


def test_rounding_bound_survives_underflow_of_squares():
    op = make_operator()
    tiny = MLPOperator(op.X * 1e-200, op.n_outputs, op.gates, op.patterns)
    _, L = random_like(op)
    assert tiny.adjoint_rounding(L) == pytest.approx(1e-200 * op.adjoint_rounding(L), rel=1e-9)
    assert op.adjoint_rounding(L * 1e-200) == pytest.approx(1e-200 * op.adjoint_rounding(L), rel=1e-9)
    huge = MLPOperator(op.X * 1e200, op.n_outputs, op.gates, op.patterns)
    assert huge.adjoint_rounding(L) == pytest.approx(1e200 * op.adjoint_rounding(L), rel=1e-9)
