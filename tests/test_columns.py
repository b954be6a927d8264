"""Columns of factors, the loss as a function of them, and the operator's products with them."""

import numpy as np
import pytest
import torch

import cvxnn.operators.base as operator_base
import cvxnn.operators.mlp as operator_mlp
from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from tests.helpers import LOSSES, make_problem, random_blocks

GATES = 6


def random_columns(n_gates=GATES, p=4, q=3, r=13, seed=0):
    """Columns in no order, with an empty gate (the last) and one of many columns."""
    rng = np.random.default_rng(seed)
    gate = np.r_[np.zeros(5, dtype=int), rng.integers(0, max(1, n_gates - 1), r - 5)]
    u, v = rng.standard_normal((r, p)), rng.standard_normal((r, q)) * np.exp(rng.standard_normal((r, 1)))
    order = rng.permutation(r)
    return Columns(*(torch.from_numpy(part[order]) for part in (gate, u, v)))


def of_problem(problem, r=13, seed=0):
    _, p, q = problem.operator.block_shape
    return random_columns(problem.n_gates, p, q, r, seed)


def blocks(columns, n_gates=GATES):
    """The blocks Z, from their definition."""
    Z = columns.u.new_zeros(n_gates, columns.u.shape[1], columns.v.shape[1])
    for gate, u, v in zip(columns.gate, columns.u, columns.v, strict=True):
        Z[gate] += torch.outer(u, v)
    return Z


# Columns


def test_factors_hold_the_same_blocks():
    columns = random_columns()
    U, V = columns.factors(GATES)
    assert U.shape == (GATES, 4, int(columns.counts(GATES).max()))
    torch.testing.assert_close(U @ V.mT, blocks(columns))
    back = Columns.from_factors(U, V)
    assert len(back) == GATES * U.shape[2]
    kept = back.without_zeros()
    order = torch.argsort(columns.gate, stable=True)
    for name in ("gate", "u", "v"):
        assert torch.equal(getattr(kept, name), getattr(columns, name)[order])


def test_no_columns_are_one_of_zeros_per_gate():
    columns = random_columns()[torch.zeros(0, dtype=torch.long)]
    U, V = columns.factors(GATES)
    assert (U.shape, V.shape) == ((GATES, 4, 1), (GATES, 3, 1))
    assert not U.any()
    assert not V.any()
    assert len(columns.compressed(GATES)) == 0
    assert len(columns.without_zeros()) == 0
    assert len(Columns.from_factors(U, V).without_zeros()) == 0


@pytest.mark.parametrize("norms", [("l2", "l2"), ("l1", "l2"), ("linf", "l1")])
def test_balanced_columns(norms):
    columns = random_columns()
    columns.u[2] = 0
    columns.v[5] = 0
    columns.u[7] *= 1e-170
    columns.v[7] *= 1e150
    even = columns.balanced(norms)
    torch.testing.assert_close(blocks(even), blocks(columns))
    order = {"l1": 1, "l2": 2, "linf": np.inf}
    left = torch.linalg.vector_norm(even.u / even.u.abs().amax(1, True).clamp_min(1e-300), order[norms[0]], dim=1)
    left = left * even.u.abs().amax(1)
    right = torch.linalg.vector_norm(even.v / even.v.abs().amax(1, True).clamp_min(1e-300), order[norms[1]], dim=1)
    right = right * even.v.abs().amax(1)
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)
    for row in (2, 5):
        assert not even.u[row].any()
        assert not even.v[row].any()
    assert left[7] > 0
    torch.testing.assert_close(even.sizes(norms), columns.sizes(norms), rtol=1e-13, atol=0)


def test_compressed_columns_cost_the_nuclear_norm():
    columns = Columns.joined(random_columns(r=40), random_columns(r=6, seed=1))
    small = columns.compressed(GATES)
    Z = blocks(columns)
    torch.testing.assert_close(blocks(small), Z, rtol=0, atol=1e-12)
    cost = float(small.u.square().sum() + small.v.square().sum()) / 2
    assert cost == pytest.approx(float(torch.linalg.svdvals(Z).sum()), rel=1e-10)
    assert int(small.counts(GATES).max()) <= 3
    assert int(small.counts(GATES)[-1]) == 0
    for gate in range(GATES):
        u = small.u[small.gate == gate]
        gram = u @ u.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("most", [1, 2])
def test_compressed_to_a_rank_is_the_best_approximation(most):
    columns = random_columns(r=30)
    small = columns.compressed(GATES, most=most)
    assert int(small.counts(GATES).max()) <= most
    left, values, right = np.linalg.svd(blocks(columns).numpy(), full_matrices=False)
    values[:, most:] = 0
    np.testing.assert_allclose(blocks(small), (left * values[:, None]) @ right, atol=1e-12)


def test_compressed_drops_what_is_small():
    columns = random_columns(r=30)
    values = torch.linalg.svdvals(blocks(columns))
    threshold = 0.2
    small = columns.compressed(GATES, threshold)
    assert torch.equal(small.counts(GATES), (values > threshold * values.max()).sum(1))


def test_without_zeros():
    columns = random_columns()
    columns.u[3] = 0
    columns.v[4] = 0
    kept = columns.without_zeros()
    assert len(kept) == len(columns) - 2
    assert torch.equal(blocks(kept), blocks(columns))
    sizes = columns.sizes()
    assert len(columns.without_zeros(0.5)) == int((sizes > 0.5 * sizes.max()).sum())


def test_columns_of_blocks():
    Z = random_blocks(make_problem(d=4, c=3))
    columns = Columns.from_blocks(Z)
    torch.testing.assert_close(blocks(columns, len(Z)), Z)
    torch.testing.assert_close(columns.u.norm(dim=1), columns.v.norm(dim=1))


# The operator's products with columns


SHAPES = {"wide": {"d": 4, "c": 3}, "narrow": {"d": 2, "c": 4}, "linear": {"d": 4, "c": 3, "activation": "linear"}}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def problem(request):
    return make_problem(n_gates=7, **request.param)


@pytest.fixture(params=[None, 200], ids=["whole", "batches"])
def few_bytes(request, monkeypatch):
    """Once as it is, once with batches of two or three samples and no kept patterns."""
    if request.param is not None:
        monkeypatch.setattr(operator_base, "BATCH_BYTES", request.param)
        monkeypatch.setattr(operator_mlp, "BATCH_BYTES", request.param)
    return request.param


def test_products_with_columns(problem, few_bytes):
    op, columns = problem.operator, of_problem(problem)
    assert (len(op.column_batches(len(columns))) > 10) == (few_bytes is not None)
    L = torch.from_numpy(np.random.default_rng(1).standard_normal((24, op.n_outputs)))
    torch.testing.assert_close(op.apply_columns(columns), op.apply(blocks(columns, op.n_gates)))
    G = op.adjoint(L)
    left, right = op.adjoint_columns(columns, L)
    torch.testing.assert_close(left, torch.einsum("rpq,rq->rp", G[columns.gate], columns.v))
    torch.testing.assert_close(right, torch.einsum("rpq,rp->rq", G[columns.gate], columns.u))
    U, V = columns.factors(op.n_gates)
    torch.testing.assert_close(op.apply_factors(U, V), op.apply(U @ V.mT))


def test_patterns_of_columns_are_not_taken_for_those_of_others(problem):
    op = problem.operator
    for seed in (0, 1, 0, 2):
        columns = of_problem(problem, seed=seed)
        torch.testing.assert_close(op.apply_columns(columns), op.apply(blocks(columns, op.n_gates)))


@pytest.mark.parametrize("limit", [1, 200, 2**20])
def test_blocks_of_a_few_gates_at_a_time(problem, few_bytes, limit, monkeypatch):
    monkeypatch.setattr(operator_base, "BLOCK_BYTES", limit)
    op = problem.operator
    L = torch.from_numpy(np.random.default_rng(1).standard_normal((24, op.n_outputs)))
    batches = op.gate_batches()
    expected = {1: op.n_gates, 2**20: 1}.get(limit)
    assert expected is None or len(batches) == expected
    covered = [gate for batch in batches for gate in range(op.n_gates)[batch]]
    assert covered == list(range(op.n_gates))
    parts = [op.adjoint_blocks(L, batch) for batch in batches]
    torch.testing.assert_close(torch.cat(parts), op.adjoint(L))


def test_subset_of_the_samples(problem):
    op, columns = problem.operator, of_problem(problem)
    rows = torch.tensor([5, 0, 17, 5])
    part = op.subset(rows)
    torch.testing.assert_close(part.apply_columns(columns), op.apply_columns(columns)[rows])
    L = torch.from_numpy(np.random.default_rng(1).standard_normal((4, op.n_outputs)))
    full = L.new_zeros(24, op.n_outputs).index_add_(0, rows, L)
    torch.testing.assert_close(part.adjoint(L), op.adjoint(full))


# The loss of columns


def of_loss(name, output_bias=False, **options):
    problem = make_problem(name, d=3, c=2, output_bias=output_bias, **options)
    b = torch.from_numpy(np.random.default_rng(2).standard_normal(2)) * output_bias
    return FactoredLoss(problem), of_problem(problem), b


def moved(columns, change, length):
    return Columns(columns.gate, columns.u + length * change[0], columns.v + length * change[1])


def differences(function, numbers, h=1e-6):
    """Central differences of a function of one tensor."""
    slope = torch.zeros_like(numbers)
    for i in range(numbers.numel()):
        step = torch.zeros_like(numbers).view(-1)
        step[i] = h
        step = step.view_as(numbers)
        slope.view(-1)[i] = (function(numbers + step) - function(numbers - step)) / (2 * h)
    return slope


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_derivatives(name, output_bias):
    weights = np.random.default_rng(3).random(24)
    loss, columns, b = of_loss(name, output_bias, sample_weight=weights)
    gate, u, v = columns.gate, columns.u, columns.v
    found = loss.slopes(columns, b)
    problem = loss.problem
    outputs = problem.operator.apply(blocks(columns, problem.n_gates)) + b
    assert found.value == pytest.approx(float(problem.loss.value(outputs, problem.Y, problem.weights)), rel=1e-12)
    close = {"rtol": 1e-6, "atol": 1e-7}
    left = differences(lambda x: loss.slopes(Columns(gate, x, v), b).value, u)
    right = differences(lambda x: loss.slopes(Columns(gate, u, x), b).value, v)
    torch.testing.assert_close(found.left, left, **close)
    torch.testing.assert_close(found.right, right, **close)
    if output_bias:
        torch.testing.assert_close(found.intercept, differences(lambda x: loss.slopes(columns, x).value, b), **close)
    else:
        assert not found.intercept.any()


@pytest.mark.parametrize("output_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_hessian_products_are_derivatives_of_slopes(name, output_bias, few_bytes):
    loss, columns, b = of_loss(name, output_bias)
    rng = np.random.default_rng(4)
    du, dv, db = (torch.from_numpy(rng.standard_normal(part.shape)) for part in (columns.u, columns.v, b))
    db = db if output_bias else None
    shift = 0 if db is None else db
    found = loss.hessian_product(columns, b, du, dv, db)
    h = 1e-6
    ahead, behind = (loss.slopes(moved(columns, (du, dv), t), b + t * shift) for t in (h, -h))
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.left, (ahead.left - behind.left) / (2 * h), **close)
    torch.testing.assert_close(found.right, (ahead.right - behind.right) / (2 * h), **close)
    bend = (found.left * du).sum() + (found.right * dv).sum()
    if output_bias:
        torch.testing.assert_close(found.intercept, (ahead.intercept - behind.intercept) / (2 * h), **close)
        bend += found.intercept @ db
    assert found.value == pytest.approx(float(bend), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_batches_of_rows_do_not_change_the_slopes(name, monkeypatch):
    loss, columns, b = of_loss(name, True)
    whole = loss.slopes(columns, b)
    monkeypatch.setattr(operator_base, "BATCH_BYTES", 5 * 8 * len(columns))
    assert len(loss.op.column_batches(len(columns))) == 5
    parts = loss.slopes(columns, b)
    assert parts.value == pytest.approx(whole.value, rel=1e-13)
    for part in ("left", "right", "intercept"):
        torch.testing.assert_close(getattr(parts, part), getattr(whole, part))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_mini_batches_average_to_the_whole(name, reduction):
    loss, columns, b = of_loss(name, True, reduction=reduction)
    whole = loss.slopes(columns, b)
    order = torch.from_numpy(np.random.default_rng(5).permutation(24))
    batches = [FactoredLoss(loss.problem, rows=rows).slopes(columns, b) for rows in order.split(6)]
    assert np.mean([batch.value for batch in batches]) == pytest.approx(whole.value, rel=1e-12)
    for part in ("left", "right", "intercept"):
        mean = torch.stack([getattr(batch, part) for batch in batches]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, part))
    assert not torch.allclose(batches[0].left, whole.left)


def test_mini_batches_carry_the_weight_of_all():
    weights = np.random.default_rng(3).random(24)
    weights[:4] = 0
    loss, columns, b = of_loss("squared", sample_weight=weights, reduction="sum")
    part = FactoredLoss(loss.problem, rows=torch.arange(2, 9))
    assert float(part.weights.sum()) == pytest.approx(weights.sum())
    empty = FactoredLoss(loss.problem, rows=torch.arange(4)).slopes(columns, b)
    assert empty.value == 0
    assert not empty.left.any()


def test_slopes_in_single_precision():
    single = make_problem(dtype="float32")
    columns = of_problem(single)
    b = torch.zeros(2, dtype=torch.float64)
    exact = FactoredLoss(single, double=True).slopes(columns, b)
    rough = FactoredLoss(single).slopes(columns.to(single.Y), b.float())
    assert (exact.left.dtype, rough.left.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(rough.left.double(), exact.left, rtol=1e-4, atol=1e-5)
