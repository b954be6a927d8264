"""The map of attention, its adjoint and all its shortcuts, against its definition in NumPy."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.columns import Columns
from cvxnn.dual_norms import gate_dual_norms
from cvxnn.factored import FactoredLoss
from cvxnn.norms import get_norm
from cvxnn.operators import attention, attention_kernel, base, heads, key_products, pooled_products
from cvxnn.solvers.burer_monteiro import grams
from tests.attention_reference import MASKS, as_columns, make_attention

ACTIVATIONS = ("linear", "gated_relu", "relu")
OUTPUTS = ("mean", "tokens")
SHAPES = {"few-outputs": (6, 4, 3, 2), "long": (5, 7, 2, 3), "wide": (4, 2, 4, 1), "one": (7, 3, 1, 2)}
CASES = pytest.mark.parametrize(
    ("activation", "output", "mask"), [(a, o, m) for a in ACTIVATIONS for o in OUTPUTS for m in MASKS]
)


def random_like(op, seed=1):
    rng = np.random.default_rng(seed)
    Z = torch.from_numpy(rng.standard_normal(op.block_shape)).to(op.dtype)
    L = torch.from_numpy(rng.standard_normal((op.n_samples, op.n_outputs))).to(op.dtype)
    return Z, L


def random_columns(op, r=6, seed=2):
    rng = np.random.default_rng(seed)
    _, p, q = op.block_shape
    gate = torch.from_numpy(rng.integers(0, op.n_gates, r))
    return Columns(gate, torch.from_numpy(rng.standard_normal((r, p))), torch.from_numpy(rng.standard_normal((r, q))))


def blocks_of(op, columns):
    Z = torch.zeros(op.block_shape, dtype=torch.float64)
    for k, u, v in zip(columns.gate, columns.u, columns.v, strict=True):
        Z[k] += torch.outer(u, v)
    return Z


@pytest.fixture(params=["whole", "not-kept", "batches", "parts"])
def sizes(request, monkeypatch):
    """Everything at once and kept, or gates, rows of blocks, sequences and tiles of the kernel in small parts."""
    if request.param != "whole":
        monkeypatch.setattr(key_products, "_CACHE_BYTES", 0)
        monkeypatch.setattr(pooled_products, "_CACHE_BYTES", 0)
        monkeypatch.setattr(attention, "_SUM_BYTES", 0)
    if request.param == "batches":
        monkeypatch.setattr(pooled_products, "_BATCH_BYTES", 3_000)
    if request.param == "parts":
        monkeypatch.setattr(pooled_products, "_BATCH_BYTES", 0)
        monkeypatch.setattr(attention, "_BLOCK_BYTES", 300)
        monkeypatch.setattr(attention, "_SLAB_BYTES", 100)
        monkeypatch.setattr(attention, "_FEATURE_BYTES", 8_000)
        monkeypatch.setattr(key_products, "_BATCH_BYTES", 2_000)
        monkeypatch.setattr(heads, "_BATCH_BYTES", 2_000)
        monkeypatch.setattr(attention_kernel, "_TILE_BYTES", 8 * 15**2)


@CASES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_map_is_that_of_the_definition(activation, output, mask, shape):
    problem, reference = make_attention(activation, output, mask, shape)
    op = problem.operator
    Z, L = random_like(op)
    expected = reference.of_blocks(Z.numpy())
    assert expected.shape == tuple(problem.Y.shape) == (op.n_samples, op.n_outputs)
    np.testing.assert_allclose(op.apply(Z), expected, atol=1e-12)
    assert float((op.adjoint(L) * Z).sum()) == pytest.approx(float((L.numpy() * expected).sum()), rel=1e-11)
    rng = np.random.default_rng(3)
    d, c = shape[2:]
    for gate in range(op.n_gates):
        U, V = rng.standard_normal((d, d)), rng.standard_normal((d, c))
        u, v = as_columns(U, V)
        got = op.apply_columns(Columns(torch.tensor([gate]), u, v))
        np.testing.assert_allclose(got, reference.of_heads(gate, U, V), atol=1e-12)
        if activation == "relu":
            got = op.network_outputs(Columns(torch.tensor([gate]), u, v))
            np.testing.assert_allclose(got, reference.of_heads(gate, U, V, relu=True), atol=1e-12)


def test_index_order_of_the_contract():
    """Z[k d + a, l c + b] = U[a, k] V[l, b], and gates are active where x_t^T H x_t' >= 0, t the row."""
    problem, _ = make_attention("gated_relu", "tokens", shape=(1, 2, 2, 2), gates=[[[1.0, 2.0], [-1.0, 0.5]]])
    op = problem.operator
    d, c, (x, y) = 2, 2, op.tokens[0]
    assert problem.gates.shape == (1, d, d)
    assert problem.patterns.shape == (1, 2, 2, 1)
    assert bool(problem.patterns[0, 0, 1, 0]) == bool(x @ problem.gates[0] @ y >= 0)
    for a in range(d):
        for k in range(d):
            for j in range(d):
                for b in range(c):
                    Z = torch.zeros(op.block_shape, dtype=torch.float64)
                    Z[0, k * d + a, j * c + b] = 1
                    seen = problem.patterns[0, 0, :, 0].double()
                    expected = torch.zeros(c, dtype=torch.float64)
                    expected[b] = x[a] * (seen[0] * x[k] * x[j] + seen[1] * y[k] * y[j])
                    torch.testing.assert_close(op.apply(Z)[0], expected)


@CASES
def test_shortcuts_agree(activation, output, mask, sizes):
    problem, reference = make_attention(activation, output, mask, (7, 4, 3, 2))
    op = problem.operator
    Z, L = random_like(op)
    G = op.adjoint(L)
    np.testing.assert_allclose(op.apply(Z), reference.of_blocks(Z.numpy()), atol=1e-12)
    parts = [op.adjoint_blocks(L, gates) for gates in op.gate_batches()]
    np.testing.assert_allclose(torch.cat(parts), G, atol=1e-12)
    streamed = torch.stack([torch.cat(list(op.adjoint_parts(L, k))) for k in range(op.n_gates)])
    np.testing.assert_allclose(streamed, G, atol=1e-12)
    np.testing.assert_allclose(op.select(torch.tensor([op.n_gates - 1])).adjoint(L)[0], G[-1], atol=1e-12)

    columns = random_columns(op)
    np.testing.assert_allclose(op.apply_columns(columns), op.apply(blocks_of(op, columns)), atol=1e-12)
    left, right = op.adjoint_columns(columns, L)
    np.testing.assert_allclose(left, torch.einsum("rpq,rq->rp", G[columns.gate], columns.v), atol=1e-11)
    np.testing.assert_allclose(right, torch.einsum("rpq,rp->rq", G[columns.gate], columns.u), atol=1e-11)
    atoms = op.apply_atoms(columns.gate, columns.u, columns.v)
    np.testing.assert_allclose(atoms.sum(0), op.apply_columns(columns), atol=1e-11)
    whole = op.hidden(columns.gate, columns.u, slice(0, op.n_samples))
    for rows in (slice(1, 2), slice(1, 5), slice(3, op.n_samples)):
        np.testing.assert_allclose(op.hidden(columns.gate, columns.u, rows), whole[rows], atol=1e-12)

    features = torch.cat([op.features(rows) for rows in op.feature_batches()])
    np.testing.assert_allclose(features @ op.flatten(Z), op.apply(Z), atol=1e-11)
    assert torch.equal(op.unflatten(op.flatten(Z)), Z)
    np.testing.assert_allclose(op.kernel(), features @ features.T, atol=1e-10)
    np.testing.assert_allclose(op.gram(), features.T @ features, atol=1e-10)


@pytest.mark.parametrize("through_keys", [False, True])
@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_both_ways_to_the_kernel(output, activation, through_keys, monkeypatch):
    monkeypatch.setattr(attention_kernel, "_through_keys", lambda op: through_keys)
    for mask in MASKS:
        op = make_attention(activation, output, mask)[0].operator
        features = op.features(slice(0, op.n_samples))
        np.testing.assert_allclose(op.kernel(), features @ features.T, atol=1e-10)


@CASES
def test_subsets_of_rows(activation, output, mask):
    op = make_attention(activation, output, mask)[0].operator
    Z, _ = random_like(op)
    columns = random_columns(op)
    rows = torch.from_numpy(np.random.default_rng(4).permutation(op.n_samples)[:4])
    part = op.subset(rows)
    again = part.subset(torch.tensor([2, 0]))
    np.testing.assert_allclose(part.apply(Z), op.apply(Z)[rows], atol=1e-12)
    np.testing.assert_allclose(again.apply(Z), op.apply(Z)[rows[[2, 0]]], atol=1e-12)
    np.testing.assert_allclose(part.apply_columns(columns), op.apply_columns(columns)[rows], atol=1e-12)
    np.testing.assert_allclose(part.kernel(), op.kernel()[rows][:, rows], atol=1e-10)


@CASES
def test_predict_on_training_data_is_apply(activation, output, mask):
    problem, reference = make_attention(activation, output, mask)
    op = problem.operator
    Z, _ = random_like(op)
    given = {"none": None, "padding": reference.valid}.get(mask, reference.M)
    np.testing.assert_allclose(op.predict(Z, reference.X, given), op.apply(Z), atol=1e-12)


def test_padding_never_matters():
    for output in OUTPUTS:
        _, reference = make_attention("gated_relu", output, "padding")
        Y = np.zeros((6, 2)) if output == "mean" else np.zeros((6, 4, 2))
        filled = []
        for value in (0.0, 7.0, np.nan):
            X = np.where(reference.valid[:, :, None], reference.X, value)
            targets = Y if output == "mean" else np.where(reference.valid[:, :, None], Y, value)
            filled.append(cvxnn.attention_problem(X, targets, output=output, mask=reference.valid, n_gates=4).operator)
        Z, _ = random_like(filled[0])
        for op in filled[1:]:
            assert torch.equal(op.apply(Z), filled[0].apply(Z))
            assert torch.equal(op.patterns, filled[0].patterns)


def test_a_longer_padding_changes_nothing():
    """The same sequences with two more tokens of padding."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((5, 3, 2)), rng.standard_normal(5)
    longer = np.concatenate([X, np.full((5, 2, 2), 3.0)], axis=1)
    mask = np.arange(5) < 3
    gates = rng.standard_normal((3, 2, 2))
    short = cvxnn.attention_problem(X, y, gates=gates)
    long = cvxnn.attention_problem(longer, y, gates=gates, mask=np.tile(mask, (5, 1))[:, :, None] & mask)
    Z, L = random_like(short.operator)
    np.testing.assert_allclose(long.operator.apply(Z), short.operator.apply(Z), atol=1e-13)
    np.testing.assert_allclose(long.operator.adjoint(L), short.operator.adjoint(L), atol=1e-13)


@CASES
def test_float32_and_double(activation, output, mask):
    op = make_attention(activation, output, mask, dtype="float32")[0].operator
    double = op.double()
    assert double.dtype == torch.float64
    assert double.double() is double
    assert torch.equal(double.tokens.float(), op.tokens)
    assert torch.equal(double.patterns, op.patterns)
    Z, L = random_like(op)
    error = float(torch.linalg.vector_norm(op.apply(Z).double() - double.apply(Z.double())))
    assert 0 < error <= op.apply_rounding(Z)
    blocks = torch.linalg.vector_norm(op.adjoint(L).double() - double.adjoint(L.double()), dim=(1, 2))
    assert 0 < float(blocks.max()) <= op.adjoint_rounding(L)
    np.testing.assert_allclose(op.kernel(), double.kernel(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", ["mean", "mean, not pooled", "tokens"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_rounding_bound_holds_for_large_cancellations(activation, output, scale, monkeypatch):
    """Against long doubles: targets whose gradient nearly cancels, tokens of very different sizes."""
    if output not in OUTPUTS:
        monkeypatch.setattr(pooled_products, "_CACHE_BYTES", 0)
        monkeypatch.setattr(pooled_products, "_BATCH_BYTES", 0)
        output = "mean"
    rng = np.random.default_rng(0)
    X = rng.standard_normal((12, 4, 2)) * 10.0 ** rng.integers(-3, 3, (12, 4, 1)) * scale
    Y = np.zeros((12, 2)) if output == "mean" else np.zeros((12, 4, 2))
    op = cvxnn.attention_problem(X, Y, activation=activation, output=output, n_gates=3).operator
    _, L = random_like(op)
    L = L - L.mean(0)
    active = op.patterns.numpy().astype(np.longdouble)
    tokens, spread = X.astype(np.longdouble), L.numpy().astype(np.longdouble)
    spread = np.repeat(spread[:, None] / 4, 4, 1) if output == "mean" else spread.reshape(12, 4, 2)
    exact = np.einsum("ntsk,nsp,nta,nsl,ntb->kpalb", active, tokens, tokens, tokens, spread)
    error = np.linalg.norm((exact.reshape(op.block_shape) - op.adjoint(L).numpy()).astype(float), axis=(1, 2))
    assert 0 < error.max() <= op.adjoint_rounding(L)


def test_pooled_features_are_kept_where_they_fit(monkeypatch):
    """A budget in bytes decides; without it features are formed again, and single predictions keep nothing."""
    problem, reference = make_attention("gated_relu", "mean", "padding", (7, 4, 3, 2))
    op, (Z, L) = problem.operator, random_like(problem.operator)
    formed = []
    form = pooled_products.PooledProducts._form
    monkeypatch.setattr(pooled_products.PooledProducts, "_form", lambda *a: formed.append(1) or form(*a))
    features = 8 * 7 * op.n_gates * 6 * 3
    for budget, again in ((features, 0), (features - 1, 3)):
        monkeypatch.setattr(pooled_products, "_CACHE_BYTES", budget)
        fresh = op.select(torch.arange(op.n_gates))
        fresh.apply(Z)
        formed.clear()
        results = fresh.apply(Z), fresh.adjoint(L), fresh.apply(2 * Z)
        assert len(formed) == again
        np.testing.assert_allclose(results[0], op.apply(Z), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(results[1], op.adjoint(L), rtol=1e-13, atol=1e-13)
    kept = [part._kept for part in _pooled_of(lambda: op.predict(Z, reference.X, reference.valid), monkeypatch)]
    assert kept == [None]


def _pooled_of(call, monkeypatch):
    """The pooled features that a call makes."""
    made, init = [], pooled_products.PooledProducts.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            pooled_products.PooledProducts, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k)
        )
        call()
    return made


@CASES
def test_bounds_of_sizes(activation, output, mask):
    op = make_attention(activation, output, mask)[0].operator
    _, L = random_like(op)
    G = op.adjoint(L)
    assert float(torch.linalg.vector_norm(G, dim=(1, 2)).max()) <= op.adjoint_size(L)
    units = torch.eye(op.n_samples, dtype=torch.float64)[:, :, None].expand(-1, -1, op.n_outputs).clone()
    units[:, :, 1:] = 0
    largest = max(float(torch.linalg.vector_norm(op.adjoint(e), dim=(1, 2)).max()) for e in units)
    assert largest <= op.prediction_norm
    columns = random_columns(op, 30)
    u = columns.u / columns.u.norm(dim=1, keepdim=True)
    hidden = op.hidden(columns.gate, u, slice(0, op.n_samples)).view(op.n_samples, 30, -1)
    assert bool((hidden.square() <= op.row_squares.unsqueeze(1) * (1 + 1e-12)).all())


@CASES
def test_energies_of_unit_vectors(activation, output, mask, monkeypatch):
    monkeypatch.setattr(base, "BATCH_BYTES", 500)
    monkeypatch.setattr(grams, "_TOGETHER", 0)
    problem, _ = make_attention(activation, output, mask)
    op = problem.operator
    features = op.features(slice(0, op.n_samples)).view(op.n_samples, op.width, op.n_gates, -1)
    scaled = features * problem.weights.sqrt().view(-1, 1, 1, 1)
    expected = torch.einsum("nwkp,nwkr->kpr", scaled, scaled) / op.width
    gates = torch.arange(op.n_gates)
    np.testing.assert_allclose(grams.gate_grams(FactoredLoss(problem), gates), expected, atol=1e-12)
    for k in gates:
        np.testing.assert_allclose(op.unit_energies(k, problem.weights), expected[k].diagonal(), atol=1e-12)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_cone_rows(output, mask):
    problem, reference = make_attention("relu", output, mask)
    op = problem.operator
    rows, patterns = op.cone_rows
    used = reference.M & reference.valid[:, :, None]
    assert len(rows) == used.sum()
    U = np.random.default_rng(0).standard_normal((3, 3))
    scores = np.einsum("nta,ab,nsb->nts", reference.X, U, reference.X)
    np.testing.assert_allclose(rows @ as_columns(U, U)[0][0], scores[used], atol=1e-12)
    assert torch.equal(patterns, problem.patterns[torch.from_numpy(used)])
    # A block is the sum over the rows of the cones, each times a vector of the size of row_sizes.
    _, nu = random_like(op)
    sizes = op.row_sizes(nu)
    assert sizes.shape == (len(rows),)
    bound = torch.linalg.vector_norm(rows, dim=1) @ sizes
    assert float(torch.linalg.vector_norm(op.adjoint(nu), dim=(1, 2)).max()) <= float(bound)
    one = int(torch.linalg.vector_norm(nu, dim=1).argmax())
    single = torch.zeros_like(nu)
    single[one] = nu[one]
    counted = used[one] if output == "mean" else used[reference.valid][one]
    assert int((op.row_sizes(single) > 0).sum()) == counted.sum()


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_streamed_dual_norms_are_those_of_the_blocks(activation, monkeypatch):
    op = make_attention(activation, "mean", "padding")[0].operator
    _, L = random_like(op)
    norm = get_norm()
    assert not op.streams_blocks
    lower, upper = gate_dual_norms(op, norm, None, L, 1e-9)
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(attention, "_SLAB_BYTES", 100)
    assert op.streams_blocks
    assert len(list(op.adjoint_parts(L, 0))) == 3
    for scale in (1.0, 2.0**300, 2.0**-300):
        streamed = gate_dual_norms(op, norm, None, scale * L, scale * 1e-9)
        np.testing.assert_allclose(streamed[0], scale * lower, rtol=1e-13)
        np.testing.assert_allclose(streamed[1], scale * upper, rtol=1e-13)
        exact = scale * torch.linalg.svdvals(op.adjoint(L))[:, 0]
        assert bool((streamed[0] < exact).all() and (exact + scale * 1e-9 <= streamed[1] * (1 + 1e-15)).all())


def test_streamed_dual_norms_of_nothing_and_of_infinities():
    norm = get_norm()
    lower, upper = norm.dual_of_parts([torch.zeros(3, 2, dtype=torch.float64)], (3, 2), 0.0, 0.0)
    assert lower == 0.0
    assert 0 <= upper < 1e-100
    assert norm.dual_of_parts([torch.full((3, 2), np.inf, dtype=torch.float64)], (3, 2), 1.0, 0.0) == (0.0, np.inf)
    assert norm.dual_of_parts([torch.zeros(3, 2, dtype=torch.float64)], (3, 2), np.inf, 0.0) == (0.0, np.inf)
