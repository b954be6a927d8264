"""Tables: reading files, standardising and encoding columns."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxnn.errors import DependencyError, InvalidInputError, StorageError
from cvxnn.tables import MAX_CATEGORIES, TablePreprocessor, as_text, read_table


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "size": [1.0, 2.0, 6.0],
            "count": [3, 4, 5],
            "colour": ["red", "blue", "red"],
            "old": [True, False, True],
            "same": [7, 7, 7],
            "y": [0, 1, 0],
        }
    )


def test_numbers_are_standardised_and_the_rest_is_encoded(table):
    preprocessor = TablePreprocessor(target="y").fit(table)
    assert preprocessor.feature_names == ["size", "count", "colour=blue", "colour=red", "old=False", "old=True"]
    assert preprocessor.columns == ["size", "count", "colour", "old"]
    matrix = preprocessor.transform(table)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix[:, :2].mean(axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(matrix[:, :2].std(axis=0), 1)
    np.testing.assert_array_equal(matrix[:, 2:], [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])


def test_scales_are_those_of_training(table):
    preprocessor = TablePreprocessor().fit(table[["size"]])
    np.testing.assert_allclose(preprocessor.transform(pd.DataFrame({"size": [3.0]})), [[0.0]], atol=1e-15)


def test_unknown_categories_are_zeros_and_extra_columns_ignored(table):
    preprocessor = TablePreprocessor().fit(table[["colour"]])
    matrix = preprocessor.transform(pd.DataFrame({"other": [np.nan], "colour": ["green"]}))
    np.testing.assert_array_equal(matrix, [[0, 0]])


def test_categories_match_however_they_are_stored():
    preprocessor = TablePreprocessor().fit(pd.DataFrame({"level": ["1", "2", "x"]}))
    np.testing.assert_array_equal(preprocessor.transform(pd.DataFrame({"level": [2.0, 1.0]})), [[0, 1, 0], [1, 0, 0]])
    assert as_text(True) == "True"


def test_json_round_trip(table):
    preprocessor = TablePreprocessor("y", {"test_size": 0.2}).fit(table)
    restored = TablePreprocessor.from_dict(json.loads(json.dumps(preprocessor.to_dict(), allow_nan=False)))
    assert (restored.target, restored.split) == ("y", {"test_size": 0.2})
    assert restored.feature_names == preprocessor.feature_names
    np.testing.assert_array_equal(restored.transform(table), preprocessor.transform(table))


@pytest.mark.parametrize(
    "columns",
    [
        None,
        [3],
        [{"name": "a", "kind": "number", "mean": 0.0, "scale": 0.0}],
        [{"name": "a", "kind": "number", "mean": None, "scale": 1.0}],
        [{"name": "a", "kind": "category", "categories": [1]}],
        [{"name": 1, "kind": "category", "categories": []}],
        [{"name": "a", "kind": "date", "categories": []}],
    ],
)
def test_a_wrong_description_is_refused(columns):
    with pytest.raises(InvalidInputError, match="no description of a table"):
        TablePreprocessor.from_dict({"target": None, "split": None, "columns": columns})


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.0, np.nan, np.nan], r"'a' has missing values \(NaN\) in 2 of 3 rows"),
        (["x", None, "y"], r"'a' has missing values \(NaN\) in 1 of 3 rows"),
        ([1.0, np.inf, 2.0], "'a' has infinite values in 1 of 3 rows"),
        ([5, 5, 5], "no column of the table varies"),
        (["x", "x", "x"], "no column of the table varies"),
        ([0.1, 0.1, 0.1], "no column of the table varies"),
        (pd.date_range("2020-01-01", periods=3), "'a' has dates"),
        (np.array([1j, 2, 3]), "'a' has values such as"),
    ],
)
def test_unusable_columns_are_named(column, message):
    with pytest.raises(InvalidInputError, match=message):
        TablePreprocessor().fit(pd.DataFrame({"a": column}))


def test_identifiers_are_refused():
    names = [f"id{i}" for i in range(MAX_CATEGORIES + 1)]
    with pytest.raises(InvalidInputError, match=f"{MAX_CATEGORIES + 1} distinct texts"):
        TablePreprocessor().fit(pd.DataFrame({"a": names}))


def test_transform_names_what_is_missing(table):
    preprocessor = TablePreprocessor("y").fit(table)
    with pytest.raises(InvalidInputError, match="lacks 'count', 'old'"):
        preprocessor.transform(table.drop(columns=["count", "old"]))
    with pytest.raises(InvalidInputError, match=r"'size' has values such as 'big'; real numbers"):
        preprocessor.transform(table.assign(size=["big", "small", "big"]))
    with pytest.raises(InvalidInputError, match="not fitted"):
        TablePreprocessor().transform(table)
    with pytest.raises(InvalidInputError, match="shape"):
        TablePreprocessor().fit(table.iloc[:0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=20))
def test_any_finite_column_is_standardised_or_left_out(values):
    frame = pd.DataFrame({"a": values, "b": np.arange(len(values))})
    preprocessor = TablePreprocessor().fit(frame)
    matrix = preprocessor.transform(frame)
    assert np.isfinite(matrix).all()
    np.testing.assert_allclose(matrix.std(axis=0), 1, rtol=1e-2)
    if len(set(values)) == 1:
        assert preprocessor.columns == ["b"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_read_table(tmp_path, table, suffix):
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    pd.testing.assert_frame_equal(read_table(path), table, check_dtype=suffix != ".csv")


def test_csv_with_quotes_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffa, b\n"x, y",1\n\nz,2\n'.encode())
    frame = read_table(path)
    assert list(frame.columns) == ["a", "b"]
    assert frame["a"].tolist() == ["x, y", "z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a,b\n", "has no rows"),
        (b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields; 2"),
        (b"a,b\n1\n", "line 2 has 1 fields; 2"),
        (b"a,a\n1,2\n", "more than one column 'a'"),
        (b"a,b\n\xff\xfe\x00,2\n", "cannot be read as a table"),
        (b'a,b\n"1,2\n', "cannot be read as a table"),
    ],
)
def test_unreadable_csv(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=message):
        read_table(path)


def test_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(StorageError, match="is a folder"):
        read_table(tmp_path)
    damaged = tmp_path / "t.parquet"
    damaged.write_bytes(b"PAR1 no")
    with pytest.raises(StorageError, match=r"cannot (be )?read"):
        read_table(damaged)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DependencyError, match=r"cvxnn\[parquet\]"):
        read_table(damaged)
