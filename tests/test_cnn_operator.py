"""The map of the CNN, its adjoint and all its shortcuts, against patches and pooling written out."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import functional

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.operators import CNNOperator, PatchGeometry, pooling_matrix
from cvxnn.operators import cnn as cnn_module

SHAPE = (5, 2, 6, 7)
GEOMETRIES = {
    "plain": PatchGeometry((3, 3), (1, 1), (0, 0), False),
    "padded": PatchGeometry((3, 3), (1, 1), (1, 1), True),
    "stride": PatchGeometry((2, 2), (2, 2), (0, 0), True),
    "uneven": PatchGeometry((2, 3), (1, 2), (1, 0), False),
    "pixels": PatchGeometry((1, 1), (1, 1), (0, 0), True),
    "dropped-border": PatchGeometry((3, 2), (2, 3), (0, 1), True),
    "wide-padding": PatchGeometry((3, 3), (2, 2), (2, 2), False),
    "whole-image": PatchGeometry((6, 7), (1, 1), (0, 0), True),
}
POOLINGS = ("global", "two-by-two", "one-by-two", "every-patch", "matrix")


def make_pooling(name, grid, rng):
    """The matrix P_a for a map of `grid` = (rows, columns), from its definition."""
    rows, columns = grid
    if name == "matrix":  # signs, zeros and a cell that pools nothing
        P = rng.normal(size=(3, rows * columns)) * rng.integers(0, 2, (3, rows * columns))
        P[1] = 0
        return P
    cells = {"global": (1, 1), "two-by-two": (2, 2), "one-by-two": (1, 2), "every-patch": grid}[name]
    cells = min(cells[0], rows), min(cells[1], columns)
    P = np.zeros((*cells, rows, columns))
    for i in range(cells[0]):
        for j in range(cells[1]):
            top, bottom = i * rows // cells[0], -(-(i + 1) * rows // cells[0])
            left, right = j * columns // cells[1], -(-(j + 1) * columns // cells[1])
            P[i, j, top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
    return P.reshape(cells[0] * cells[1], -1)


def explicit_patches(images, geometry):
    """Patches (n, K, h), pixel by pixel."""
    (f, g), (s, t), (p, q) = geometry.filter_size, geometry.stride, geometry.padding
    padded = np.pad(images, ((0, 0), (0, 0), (p, p), (q, q)))
    rows, columns = (padded.shape[2] - f) // s + 1, (padded.shape[3] - g) // t + 1
    found = [
        padded[:, :, i * s : i * s + f, j * t : j * t + g].reshape(len(images), -1)
        for i in range(rows)
        for j in range(columns)
    ]
    patches = np.stack(found, 1)
    ones = np.ones((*patches.shape[:2], 1))
    return np.concatenate([patches, ones], 2) if geometry.bias else patches


def make(geometry="padded", pooling="two-by-two", n_gates=4, dtype=torch.float64, storage="auto", **options):
    rng = np.random.default_rng(options.pop("seed", 0))
    images = torch.from_numpy(rng.normal(size=SHAPE)).to(dtype)
    geometry = GEOMETRIES[geometry]
    pool = torch.from_numpy(make_pooling(pooling, geometry.grid(*SHAPE[2:]), rng))
    gates = rng.normal(size=(geometry.length(SHAPE[1]), n_gates)) if n_gates else None
    return CNNOperator(images, 3, geometry, pool, gates, features=storage, **options)


def explicit_phi(op):
    """Phi (n, a, P, h) by its definition P_a D_k X_i."""
    X = explicit_patches(op.images.double().numpy(), op.geometry)
    D = np.ones((*X.shape[:2], 1)) if op.gates is None else X @ op.gates >= 0
    return np.einsum("ap,npk,nph->nakh", op.pooling.numpy(), D, X)


def explicit_apply(op, Z):
    """Output c' of sample i is sum_k <Phi_ik^T, Z_k^(c')>, column index output * a + cell."""
    blocks = Z.double().numpy().reshape(*op.block_shape[:2], op.n_outputs, op.width)
    return np.einsum("nakh,khca->nc", explicit_phi(op), blocks)


def explicit_adjoint(op, L):
    return np.einsum("nakh,nc->khca", explicit_phi(op), L.double().numpy()).reshape(op.block_shape)


def random_like(op, seed=1):
    rng = np.random.default_rng(seed)
    Z = torch.from_numpy(rng.normal(size=op.block_shape)).to(op.dtype)
    return Z, torch.from_numpy(rng.normal(size=(op.n_samples, op.n_outputs))).to(op.dtype)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_adjoint_identity_and_definition(geometry, pooling):
    for n_gates in (0, 4):
        for storage in ("cached", "recomputed"):
            op = make(geometry, pooling, n_gates, storage=storage)
            Z, L = random_like(op)
            assert float((op.apply(Z) * L).sum()) == pytest.approx(float((Z * op.adjoint(L)).sum()), rel=1e-12)
            np.testing.assert_allclose(op.apply(Z), explicit_apply(op, Z), atol=1e-11)
            np.testing.assert_allclose(op.adjoint(L), explicit_adjoint(op, L), atol=1e-11)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_few_columns_and_their_adjoint(geometry, pooling):
    """Convolution of few columns, pooled patches for many: both are Phi times u, and adjoint to it."""
    rng = np.random.default_rng(3)
    for storage in ("cached", "recomputed"):
        for r in (2, 9):
            op = make(geometry, pooling, 4, storage=storage)
            gate = torch.from_numpy(np.sort(rng.integers(0, 4, r)))
            u = torch.from_numpy(rng.normal(size=(r, op.block_shape[1])))
            M = torch.from_numpy(rng.normal(size=(op.n_samples, r * op.width)))
            Phi = explicit_phi(op)[:, :, gate.numpy()]
            hidden = op.hidden(gate, u, slice(None))
            np.testing.assert_allclose(hidden.view(-1, r, op.width), np.einsum("narh,rh->nra", Phi, u), atol=1e-11)
            back = op.hidden_adjoint(gate, M, slice(None))
            assert float((hidden * M).sum()) == pytest.approx(float((u * back).sum()), rel=1e-11)
            expected = np.einsum("narh,nra->rh", Phi, M.view(-1, r, op.width).numpy())
            np.testing.assert_allclose(back, expected, atol=1e-11)


@pytest.mark.parametrize("storage", ["cached", "recomputed"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32_is_that_of_the_rounded_images(geometry, storage):
    op = make(geometry, dtype=torch.float32, storage=storage)
    Z, L = random_like(op)
    np.testing.assert_allclose(op.apply(Z), explicit_apply(op, Z), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(op.adjoint(L), explicit_adjoint(op, L), rtol=1e-4, atol=1e-4)
    double = op.double()
    assert torch.equal(double.images.float(), op.images)
    assert torch.equal(double.patterns, op.patterns)
    np.testing.assert_allclose(double.apply(Z.double()), explicit_apply(op, Z), atol=1e-11)


@pytest.mark.parametrize("storage", ["cached", "recomputed"])
@pytest.mark.parametrize("n_gates", [0, 4])
def test_kernel_gram_factors_and_parts(n_gates, storage, monkeypatch):
    monkeypatch.setattr(cnn_module, "_PATCH_BYTES", {"cpu": 40_000, "cuda": 40_000})  # several batches
    op = make("padded", "two-by-two", n_gates, storage=storage)
    assert len(op._batches) > 1
    Phi = explicit_phi(op).reshape(op.n_samples, -1)
    np.testing.assert_allclose(op.kernel(), Phi @ Phi.T, atol=1e-11)
    np.testing.assert_allclose(op.gram(), Phi.T @ Phi, atol=1e-11)
    P, p, q = op.block_shape
    rng = np.random.default_rng(2)
    U, V = (torch.from_numpy(rng.normal(size=(P, size, 3))) for size in (p, q))
    np.testing.assert_allclose(op.apply_factors(U, V), op.apply(U @ V.mT), atol=1e-11)
    Z, L = random_like(op)
    assert torch.equal(op.unflatten(op.flatten(Z)), Z)
    rows = torch.tensor([4, 0, 2])
    np.testing.assert_allclose(op.subset(rows).apply(Z), op.apply(Z)[rows], atol=1e-12)
    np.testing.assert_allclose(op.predict(Z, op.images.numpy()), op.apply(Z), atol=1e-12)
    for gates in op.gate_batches():
        np.testing.assert_allclose(op.adjoint_blocks(L, gates), op.adjoint(L)[gates], atol=1e-12)
    if n_gates:
        chosen = torch.tensor([3, 1])
        np.testing.assert_allclose(op.select(chosen).adjoint(L), op.adjoint(L)[chosen], atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("geometry", ["plain", "padded", "stride", "uneven"])
def test_a_column_is_a_convolution_of_torch(geometry, grid):
    """Convolve, gate, adaptive average pooling, flatten: from torch's own layers."""
    shape = GEOMETRIES[geometry]
    op = make(geometry, "global")
    pooling = pooling_matrix(grid, shape.grid(*SHAPE[2:]))
    op = CNNOperator(op.images, 3, shape, pooling, op.gates)
    rng = np.random.default_rng(5)
    length = op.block_shape[1] - shape.bias
    gate = torch.arange(4)
    u = torch.from_numpy(rng.normal(size=(4, op.block_shape[1])))

    def convolved(filters):
        bias = filters[:, length] if shape.bias else None
        weight = filters[:, :length].reshape(4, SHAPE[1], *shape.filter_size)
        return functional.conv2d(op.images, weight, bias, shape.stride, shape.padding)

    maps = convolved(u) * (convolved(torch.from_numpy(op.gates.T)) >= 0)
    expected = functional.adaptive_avg_pool2d(maps, grid).flatten(1)
    np.testing.assert_allclose(op.hidden(gate, u, slice(None)), expected, atol=1e-11)


def test_relu_networks_are_those_of_torch():
    op = make("padded", "two-by-two", 4, activation="relu")
    rng = np.random.default_rng(6)
    u = torch.from_numpy(rng.normal(size=(4, op.block_shape[1])))
    v = torch.from_numpy(rng.normal(size=(4, op.block_shape[2])))
    found = op.network_outputs(Columns(torch.arange(4), u, v))
    X = torch.from_numpy(explicit_patches(op.images.numpy(), op.geometry))
    hidden = torch.matmul(op.pooling, (X @ u.T).clamp_min(0))  # (n, a, r)
    expected = torch.einsum("nar,rca->nc", hidden, v.view(4, 3, op.width))
    np.testing.assert_allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("geometry", ["padded", "uneven"])
def test_rounding_bounds_hold(geometry, pooling, dtype):
    mpmath.mp.dps = 40
    op = make(geometry, pooling, 2, dtype)
    Z, L = random_like(op)
    exact = op.double()
    X = explicit_patches(exact.images.numpy(), op.geometry)
    n, K, h = X.shape
    D = X @ op.gates >= 0
    a, c = op.width, op.n_outputs
    P_a = op.pooling.numpy()
    Phi = mpmath.matrix(n, a * 2 * h)
    for i in range(n):
        for cell in range(a):
            used = [k for k in range(K) if P_a[cell, k] != 0]
            for g in range(2):
                active = [k for k in used if D[i, k, g]]
                for j in range(h):
                    total = mpmath.fsum(mpmath.mpf(float(P_a[cell, k])) * mpmath.mpf(float(X[i, k, j])) for k in active)
                    Phi[i, (cell * 2 + g) * h + j] = total
    flat = mpmath.matrix(op.flatten(Z).double().tolist())
    error = mpmath.mnorm(Phi * flat - mpmath.matrix(op.apply(Z).double().tolist()), "f")
    assert error <= op.apply_rounding(Z)
    adjoint = Phi.T * mpmath.matrix(L.double().tolist())
    computed = mpmath.matrix(op.flatten(op.adjoint(L)).double().tolist())
    assert mpmath.mnorm(adjoint - computed, "f") <= op.adjoint_rounding(L)
    assert 0 < op.adjoint_rounding(L) < 1e-2 * float(torch.linalg.vector_norm(op.adjoint(L)))
    assert c == 3


def test_a_patch_at_the_border_of_a_gate_counts_as_active():
    images = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    op = CNNOperator(
        images, 1, GEOMETRIES["pixels"], torch.ones(1, 4).double() / 4, np.array([[1.0, -1.0], [0.0, 0.0]])
    )
    assert op.patterns.all()


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ((3, 1), "at most 2 x 2"),
        (np.ones((2, 5)), "pooling has 5 columns; 4"),
        ((0, 1), "a grid such as"),
        ("max", "a grid such as"),
        (np.full((1, 4), np.nan), "NaN"),
    ],
)
def test_wrong_poolings(pooling, message):
    with pytest.raises(InvalidInputError, match=message):
        pooling_matrix(pooling, (2, 2))


def test_a_filter_larger_than_the_image():
    with pytest.raises(InvalidInputError, match="filter_size has a height of 5"):
        PatchGeometry((5, 1), (1, 1), (1, 0), False).grid(2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", ["norms", "features"])
def test_norms_of_patches_from_the_pass_that_pools_them(dtype, first):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(31, 2, 5, 6, generator=generator, dtype=dtype)
    geometry = PatchGeometry((2, 3), (1, 2), (1, 0), True)
    pooling = torch.randn(3, math.prod(geometry.grid(5, 6)), generator=generator, dtype=torch.float64)
    gates = torch.randn(geometry.length(2), 4, generator=generator, dtype=torch.float64).numpy()
    kept, plain = (
        CNNOperator(images, 2, geometry, pooling, gates, features=features).double()
        for features in ("cached", "recomputed")
    )
    if first == "features":
        kept.features(slice(0, 31))
    assert torch.equal(kept._cell_norms, plain._cell_norms)
    assert torch.equal(kept.row_squares, plain.row_squares)
    part = kept.select(torch.tensor([2, 0]))
    assert torch.equal(part._cell_norms, plain._cell_norms)
    rows = torch.tensor([4, 30, 7])
    assert torch.allclose(kept.subset(rows)._cell_norms, plain._cell_norms[rows], rtol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_patches_of_single_positions(bias):
    images = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    geometry = PatchGeometry((1, 1), (1, 1), (0, 0), bias)
    columns = torch.nn.functional.unfold(images, 1).mT
    for given in (images, images.contiguous(memory_format=torch.channels_last), images[:, :, ::2, 1:]):
        patches = geometry(given)
        assert torch.equal(patches[:, :, :4], torch.nn.functional.unfold(given.contiguous(), 1).mT)
        assert patches.shape[2] == 4 + bias
        assert bool((patches[:, :, 4:] == 1).all())
    assert torch.equal(geometry(images)[:, :, :4], columns)
