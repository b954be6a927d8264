"""Checks of arguments: each refusal names the argument, what was seen and what is wanted."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from cvxnn.errors import CvxnnError, InvalidInputError
from cvxnn.samples import merge_duplicates
from cvxnn.validation import (
    as_matrix,
    check_choice,
    check_integer,
    check_positive,
    check_range,
    check_sample_weight,
    encode_targets,
    resolve_device,
    resolve_dtype,
)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True, None, [1.0], 1j])
def test_positive_refuses(value):
    with pytest.raises(InvalidInputError, match=r"^thing is .*positive number"):
        check_positive(value, "thing")


def test_positive_accepts():
    assert check_positive(np.float32(0.5), "thing") == 0.5
    assert check_positive(None, "thing", allow_none=True) is None
    assert check_positive(0, "thing", allow_zero=True) == 0.0


@pytest.mark.parametrize("value", [0, 1.0, "3", True, None])
def test_integer_refuses(value):
    with pytest.raises(InvalidInputError, match=r"count is .*integer of at least 1"):
        check_integer(value, "count")


def test_integer_and_choice():
    assert check_integer(np.int64(3), "count") == 3
    assert check_integer(0, "count", minimum=0) == 0
    assert check_choice("a", "kind", ("a", "b")) == "a"
    for bad in ("c", None, 1, ["a"]):
        with pytest.raises(InvalidInputError, match=r"kind is .*'a', 'b'"):
            check_choice(bad, "kind", ("a", "b"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "A has 1 dimension"),
        (np.ones((2, 2, 2)), "A has 3 dimension"),
        (np.ones((0, 2)), "A is empty"),
        (np.ones((2, 0)), "A is empty"),
        ([[1.0, np.nan]], "A contains NaN"),
        ([[1.0, -np.inf]], "A contains infinity"),
        ([["a", "b"]], "A cannot be read"),
        ([[1.0], [1.0, 2.0]], "A cannot be read"),
        (np.ones((2, 2)) * 1j, "A is complex"),
        (None, "A has 0 dimension|A cannot be read"),
        (torch.ones(2, 2, dtype=torch.bfloat16), "A cannot be read"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}), "A cannot be read"),
    ],
)
def test_matrix_refuses(value, message):
    with pytest.raises(InvalidInputError, match=message):
        as_matrix(value, "A")


def test_matrix_rows():
    with pytest.raises(InvalidInputError, match=r"A has 2 rows; 3, one per sample"):
        as_matrix(np.ones((2, 1)), "A", n_rows=3)


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], dtype=np.float16),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True),
        pd.DataFrame([[1, 2], [3, 4]]),
        pl.DataFrame({"a": [1, 3], "b": [2, 4]}),
        np.array([[1.0, 3.0], [2.0, 4.0]]).T,
    ],
    ids=["list", "float16", "torch", "pandas", "polars", "transposed"],
)
def test_matrix_accepts(value):
    matrix = as_matrix(value, "A")
    assert matrix.dtype == np.float64
    assert matrix.flags.c_contiguous
    assert matrix.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, 1, 3], [1, 3]),
        (np.array([3, 1, 3], dtype=np.uint8), [1, 3]),
        (["b", "a", "b"], ["a", "b"]),
        (np.array(["b", "a", "b"], dtype=object), ["a", "b"]),
        ([True, False, True], [False, True]),
        (torch.tensor([3, 1, 3]), [1, 3]),
        (pd.Series(["b", "a", "b"]), ["a", "b"]),
        (pl.Series(["b", "a", "b"]), ["a", "b"]),
    ],
)
def test_labels_become_one_column_per_class(labels, classes):
    Y, seen = encode_targets(labels, 3)
    assert seen.tolist() == classes
    assert Y.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_numbers_stay_numbers():
    Y, classes = encode_targets([0.5, 1.0, 2.0], 3)
    assert Y.tolist() == [[0.5], [1.0], [2.0]]
    assert classes is None
    Y, classes = encode_targets(np.array([[1, 2], [3, 4]]), 2)
    assert Y.tolist() == [[1, 2], [3, 4]]
    assert classes is None


@pytest.mark.parametrize(
    ("Y", "message"),
    [
        ([1, 1, 1], "Y has only one class"),
        ([1, 2], "Y has 2 entries but X has 3 rows"),
        (np.ones((2, 2)), "Y has 2 rows; 3"),
        (np.ones((3, 1, 1)), "Y has shape"),
        ([1.0, np.nan, 2.0], "Y contains NaN"),
        ([1.0, np.inf, 2.0], "Y contains infinity"),
        ([[1], [1, 2], [3]], "Y cannot be read"),
        (np.array([1, "a", 2.0], dtype=object), "Y mixes labels"),
        (np.array([1, 2, 3], dtype="datetime64[D]"), "Y has type"),
        (5, "Y has shape"),
        (torch.ones(3, dtype=torch.bfloat16), "Y cannot be read"),
    ],
)
def test_targets_refused(Y, message):
    with pytest.raises(InvalidInputError, match=message):
        encode_targets(Y, 3)


@pytest.mark.parametrize(
    "weights",
    [[1, 2], [1, -1, 1], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1], [1e308] * 3, ["a", "b", "c"], [[1], [1], [1]]],
)
def test_weights_refused(weights):
    with pytest.raises(InvalidInputError, match="sample_weight"):
        check_sample_weight(weights, 3)


def test_weights_accepted():
    assert check_sample_weight(None, 2).tolist() == [1, 1]
    assert check_sample_weight(torch.tensor([0, 3]), 2).tolist() == [0, 3]


def test_range():
    check_range(torch.tensor([[1e150]], dtype=torch.float64), "X")
    check_range(torch.zeros(2, 2), "Y", least=1e-145)
    check_range(torch.tensor([[1e-300, 1e-150]], dtype=torch.float64), "X")
    check_range(torch.tensor([[1e-30, 1e-18]]), "X")
    with pytest.raises(InvalidInputError, match="X has entries of up to 1e-160, whose squares underflow in float64"):
        check_range(torch.tensor([[1e-160]], dtype=torch.float64), "X")
    with pytest.raises(InvalidInputError, match="X has entries of up to 1e-25, whose squares underflow in float32"):
        check_range(torch.tensor([[1e-25, 0.0]]), "X")
    with pytest.raises(InvalidInputError, match=r"X has entries of up to 1e\+160, whose squares overflow in float64"):
        check_range(torch.tensor([[1e160]], dtype=torch.float64), "X")
    with pytest.raises(InvalidInputError, match="overflow in float32"):
        check_range(torch.tensor([[1e30]]), "X")
    with pytest.raises(InvalidInputError, match="Y has entries of up to 1e-150, whose squares underflow"):
        check_range(torch.tensor([[1e-150]], dtype=torch.float64), "Y", least=1e-145)


def test_device_and_dtype():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device(torch.device("cpu")).type == "cpu"
    for bad in ("nonsense", 1.5, None):
        with pytest.raises(InvalidInputError, match="device is"):
            resolve_device(bad)
    for good in ("float32", np.float32, torch.float32, np.dtype("float32")):
        assert resolve_dtype(good) == torch.float32
    for bad in ("float16", torch.float16, int, "x", object()):
        with pytest.raises(InvalidInputError, match="dtype is"):
            resolve_dtype(bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_said():
    with pytest.raises(InvalidInputError, match="device is 'cuda', but torch sees no CUDA device"):
        resolve_device("cuda")


def test_errors_are_value_errors():
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(InvalidInputError, CvxnnError)


def test_merging_is_canonical():
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 2, (40, 3)).astype(float), rng.integers(0, 2, (40, 1)).astype(float)
    X[X == 0] *= rng.choice([-1.0, 1.0], (X == 0).sum())  # zeros of both signs are equal
    weights = rng.integers(0, 3, 40).astype(float)
    merged = merge_duplicates(X, Y, weights)
    order = rng.permutation(40)
    for first, second in zip(merged, merge_duplicates(X[order], Y[order], weights[order]), strict=True):
        assert np.array_equal(first, second)
    repeats = weights.astype(int)
    again = merge_duplicates(np.repeat(X, repeats, 0), np.repeat(Y, repeats, 0), np.ones(repeats.sum()))
    for first, second in zip(merged, again, strict=True):
        assert np.array_equal(first, second)
    assert merged[2].sum() == weights.sum()
    rows = np.hstack(merged[:2])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert {tuple(r) for r in np.hstack([X, Y])[weights > 0] + 0.0} == {tuple(r) for r in rows + 0.0}
