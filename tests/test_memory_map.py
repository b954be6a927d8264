"""Data that stay on disk: memory-mapped arrays, Parquet files, and what a DataLoader gives, read in passes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import cvxnn
from cvxnn.errors import InvalidInputError, StorageError, UnsupportedError
from cvxnn.operators import StreamedMLPOperator, streamed
from tests.helpers import make_data


def mapped(tmp_path, X, dtype=np.float64):
    path = tmp_path / "X.npy"
    np.save(path, X.astype(dtype))
    return np.load(path, mmap_mode="r")


@pytest.fixture
def small_batches(monkeypatch):
    """Passes of several batches, also for little data."""
    monkeypatch.setattr(streamed, "_PASS_BYTES", 20_000)
    monkeypatch.setattr(streamed, "_BLOCK_BYTES", 300)
    monkeypatch.setattr("cvxnn.operators.rows._READ_BYTES", 3_000)


SETTINGS = [
    {},
    {"hidden_bias": True, "output_bias": True},
    {"loss": "cross_entropy", "output_bias": True, "hidden_bias": True},
    {"norms": ("l1", "l2")},
    {"activation": "linear"},
    {"c": 7, "d": 3},
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_map_is_that_of_data_in_memory(tmp_path, small_batches, setting, dtype):
    setting = dict(setting)
    d, c = setting.pop("d", 6), setting.pop("c", 3)
    X, Y, labels = make_data(211, d, c)
    targets = labels if "loss" in setting else Y
    options = {"n_gates": 20, "beta": 1e-2, "dtype": dtype, **setting}
    disk = cvxnn.mlp_problem(mapped(tmp_path, X, dtype), targets, **options)
    memory = cvxnn.mlp_problem(X.astype(dtype), targets, **options)
    a, b = disk.operator, memory.operator
    assert isinstance(a, StreamedMLPOperator)
    assert torch.equal(a.patterns, b.patterns)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-11, "atol": 1e-11}
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(a.block_shape, generator=generator, dtype=torch.float64).to(a.dtype)
    L = torch.randn(211, a.n_outputs, generator=generator, dtype=torch.float64).to(a.dtype)
    w = torch.rand(211, generator=generator, dtype=torch.float64).to(a.dtype)
    torch.testing.assert_close(a.apply(Z), b.apply(Z), **tolerance)
    torch.testing.assert_close(a.adjoint(L), b.adjoint(L), **tolerance)
    assert len(a.gate_batches()) > 1 or a.n_gates == 1
    blocks = torch.cat([a.adjoint_blocks(L, gates) for gates in a.gate_batches()])
    torch.testing.assert_close(blocks, b.adjoint(L), **tolerance)
    for ours, theirs in zip(a.moments(w, L), b.moments(w, L), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(a.kernel(), b.kernel(), **tolerance)
    torch.testing.assert_close(a.row_squares, b.row_squares, **tolerance)
    rows = torch.tensor([200, 3, 77])
    torch.testing.assert_close(a.subset(rows).apply(Z), b.apply(Z)[rows], **tolerance)
    torch.testing.assert_close(a.part(slice(50, 90)).apply(Z), b.apply(Z)[50:90], **tolerance)
    if a.gates is not None:
        chosen = torch.tensor([2, 0])
        torch.testing.assert_close(a.select(chosen).adjoint(L), b.adjoint(L)[chosen], **tolerance)
    for op in (a, b):
        U, V = (
            torch.randn(op.n_gates, k, 2, generator=torch.Generator().manual_seed(k)).to(op.dtype)
            for k in op.block_shape[1:]
        )
        op.tried = op.apply_factors(U, V)
    torch.testing.assert_close(a.tried, b.tried, **tolerance)
    assert disk.beta_max == pytest.approx(memory.beta_max, rel=1e-10)
    point = Z.double() * 0.1
    ours, theirs = cvxnn.certify(disk, Z=point), cvxnn.certify(memory, Z=point)
    assert ours.primal == pytest.approx(theirs.primal, rel=1e-11)
    assert ours.lower_bound == pytest.approx(theirs.lower_bound, rel=1e-9)


@pytest.mark.parametrize("solver", ["admm", "fista", "bm_sgd", "bm_lbfgs", "bm_global"])
def test_solvers_find_the_same(tmp_path, small_batches, solver):
    X, Y, _ = make_data(200)
    options = {"n_gates": 5, "beta": 1e-2, "hidden_bias": True, "output_bias": True}
    runs = {"max_iter": 15, "random_state": 0, "tol": 1e-7}
    found = cvxnn.solve(cvxnn.mlp_problem(mapped(tmp_path, X), Y, **options), solver, **runs)
    copied = cvxnn.solve(cvxnn.mlp_problem(X, Y, **options), solver, **runs)
    assert found.objective == pytest.approx(copied.objective, rel=1e-9)
    assert found.certificate.lower_bound == pytest.approx(copied.certificate.lower_bound, rel=1e-7)


@pytest.mark.parametrize("sampling", ["gaussian", "differences", "whitened"])
def test_gates_are_those_of_data_in_memory(tmp_path, small_batches, sampling):
    X, Y, _ = make_data(25, 2)
    X[10] = 0
    options = {"n_gates": 60, "gate_sampling": sampling, "random_state": 3}
    if sampling == "whitened":
        options |= {"hidden_bias": True, "gate_quantile": 0.8}
    disk = cvxnn.mlp_problem(mapped(tmp_path, X), Y, **options)
    memory = cvxnn.mlp_problem(X, Y, **options)
    np.testing.assert_array_equal(disk.operator.gates, memory.operator.gates)
    assert disk.n_gates < 60
    assert torch.equal(disk.patterns, memory.patterns)


def test_a_checkpoint_goes_on_to_the_same_result(tmp_path, small_batches):
    X, Y, _ = make_data(200)
    problem = cvxnn.mlp_problem(mapped(tmp_path, X, np.float32), Y, n_gates=5, beta=1e-2, dtype="float32")
    file = tmp_path / "run.safetensors"
    runs = {"random_state": 0, "tol": 1e-9}
    whole = cvxnn.solve(problem, "bm_sgd", max_iter=9, **runs)
    cvxnn.solve(problem, "bm_sgd", max_iter=4, checkpoint=file, **runs)
    resumed = cvxnn.solve(problem, "bm_sgd", max_iter=9, checkpoint=file, resume=True, **runs)
    assert torch.equal(whole.factors[0], resumed.factors[0])
    memory = cvxnn.mlp_problem(X.astype(np.float32), Y, n_gates=5, beta=1e-2, dtype="float32")
    cvxnn.solve(memory, "bm_sgd", max_iter=10, checkpoint=file, resume=True, **runs)
    X[3, 1] += 1
    other = cvxnn.mlp_problem(mapped(tmp_path, X, np.float32), Y, n_gates=5, beta=1e-2, dtype="float32")
    with pytest.raises(StorageError, match="another run"):
        cvxnn.solve(other, "bm_sgd", max_iter=9, checkpoint=file, resume=True, **runs)


def test_mini_batches_read_their_rows_only(tmp_path, monkeypatch):
    """The loss and its gradients of an epoch come from sub-problems of `batch_size` samples."""
    X, Y, _ = make_data(100)
    problem = cvxnn.mlp_problem(mapped(tmp_path, X), Y, n_gates=5, beta=1e-2)
    seen = []
    read = cvxnn.MappedRows.read

    def watched(self, rows):
        if not isinstance(rows, slice):
            seen.append(len(rows))
        return read(self, rows)

    monkeypatch.setattr(cvxnn.MappedRows, "read", watched)
    cvxnn.solve(problem, "bm_sgd", max_iter=2, random_state=0, solver_options={"batch_size": 32, "step": 0.1})
    assert seen == [32, 32, 32, 4] * 2


@pytest.fixture
def table(tmp_path):
    X, _, labels = make_data(130, 4, 3)
    frame = pd.DataFrame(X, columns=list("abcd")).assign(y=np.array(["x", "y", "z"])[labels], name="n")
    paths = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    frame[:70].to_parquet(paths[0], row_group_size=33)
    frame[70:].to_parquet(paths[1], row_group_size=20)
    return paths, X, frame["y"].to_numpy()


def test_parquet(table, small_batches):
    paths, X, y = table
    rows = cvxnn.ParquetRows(paths, target="y")
    assert rows.columns == list("abcd")
    np.testing.assert_array_equal(rows.targets(), y)
    np.testing.assert_array_equal(rows.read(slice(20, 101)), X[20:101])
    index = np.array([129, 0, 66, 66, 33])
    np.testing.assert_array_equal(rows.read(index), X[index])
    options = {"n_gates": 8, "beta": 1e-2, "hidden_bias": True}
    disk, memory = cvxnn.mlp_problem(rows, rows.targets(), **options), cvxnn.mlp_problem(X, y, **options)
    assert disk.classes.tolist() == ["x", "y", "z"]
    found, wanted = (cvxnn.solve(problem, "admm", tol=1e-8) for problem in (disk, memory))
    assert found.objective == pytest.approx(wanted.objective, rel=1e-10)
    some = cvxnn.ParquetRows(paths[0], columns=["c", "a"])
    np.testing.assert_array_equal(some.read(slice(0, 5)), X[:5, [2, 0]])
    stored, _ = cvxnn.store_rows(rows, paths[0].parent / "all.npy")
    np.testing.assert_array_equal(stored, X)


def test_parquet_errors(table, tmp_path):
    paths, _, _ = table
    with pytest.raises(InvalidInputError, match="no column 'q'"):
        cvxnn.ParquetRows(paths, target="q")
    with pytest.raises(InvalidInputError, match=r"'name' of .* holds .*; numbers are wanted"):
        cvxnn.ParquetRows(paths, columns=["a", "name"])
    with pytest.raises(StorageError, match=r"cannot read .*none\.parquet"):
        cvxnn.ParquetRows(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(StorageError, match="cannot be read as Parquet"):
        cvxnn.ParquetRows(tmp_path / "text.parquet")
    rows = cvxnn.ParquetRows(paths)
    os.utime(paths[0], ns=(1, 1))
    with pytest.raises(StorageError, match="was changed after it was opened"):
        rows.read(slice(0, 3))
    pd.DataFrame({"a": [1.0, None, 2.0], "y": [1.0, 2.0, 3.0]}).to_parquet(tmp_path / "gaps.parquet")
    gaps = cvxnn.ParquetRows(tmp_path / "gaps.parquet", target="y")
    tiny = np.memmap(tmp_path / "tiny.bin", dtype=np.float64, mode="w+", shape=(4, 2))
    tiny[:] = 1e-160
    with pytest.raises(InvalidInputError, match="X has entries of up to 1e-160, whose squares underflow in float64"):
        cvxnn.mlp_problem(tiny, np.arange(4) % 2)
    with pytest.raises(InvalidInputError, match="NaN, infinity or a number too large for float64 in row 1"):
        cvxnn.mlp_problem(gaps, gaps.targets(), n_gates=3)


def test_batches_of_a_data_loader_are_stored(tmp_path):
    X, _, labels = make_data(90, 6, 3)
    data = TensorDataset(torch.from_numpy(X).view(90, 2, 3), torch.from_numpy(labels))
    loader = DataLoader(data, batch_size=32)
    found, y = cvxnn.store_rows(loader, tmp_path / "rows.npy")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, X)
    np.testing.assert_array_equal(y, labels)
    with pytest.raises(InvalidInputError, match=r"X is a DataLoader.*store_rows"):
        cvxnn.mlp_problem(loader, labels)
    with pytest.raises(InvalidInputError, match="batches is empty"):
        cvxnn.store_rows([], tmp_path / "none.npy")
    with pytest.raises(InvalidInputError, match="a batch has 3 features; 2"):
        cvxnn.store_rows([np.ones((2, 2)), np.ones((2, 3))], tmp_path / "none.npy")
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        cvxnn.store_rows([np.full((2, 2), np.nan)], tmp_path / "none.npy")
    with pytest.raises(InvalidInputError, match="some batches have targets"):
        cvxnn.store_rows([np.ones((2, 2)), (np.ones((2, 2)), np.ones(2))], tmp_path / "none.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_what_needs_the_data_in_memory(tmp_path):
    X, Y, _ = make_data(30, 2)
    disk = mapped(tmp_path, X)
    # Files of float64 numbers can be used as arrays.
    assert cvxnn.mlp_problem(disk, Y, gates="enumerate").scope == "all_gates"
    assert cvxnn.mlp_problem(disk, Y, activation="relu", n_gates=3).cones is not None
    rows = cvxnn.MappedRows(disk)
    for options in ({"activation": "relu"}, {"gates": "enumerate"}):
        with pytest.raises(UnsupportedError, match=r"must be in memory|need X in memory"):
            cvxnn.mlp_problem(rows, Y, **options)
    result = cvxnn.solve(cvxnn.mlp_problem(rows, Y, n_gates=3), max_iter=3)
    with pytest.raises(UnsupportedError, match="read from a file in passes"):
        cvxnn.to_relu(result)


PEAK = """
    import threading, time
    import numpy as np, cvxnn
    from cvxnn.operators import base, rows, streamed

    rows._READ_BYTES = streamed._PASS_BYTES = base.BATCH_BYTES = 2**22
    n, d = {n}, 250
    X = np.memmap({path!r}, dtype=np.float32, mode="r", shape=(n, d))
    y = np.asarray(X[:, 0] > 0).astype(np.int64)


    def own_memory():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


    def watch():
        while not done:
            seen.append(own_memory())
            time.sleep(0.002)


    def run(X, y):
        options = {{"n_gates": 10, "beta": 1e-2, "hidden_bias": True, "output_bias": True, "dtype": "float32"}}
        problem = cvxnn.mlp_problem(X, y, **options)
        options = {{"batch_size": 2048}}
        return cvxnn.solve(problem, "bm_sgd", rank=1, max_iter=1, random_state=0, solver_options=options)


    run(np.memmap({path!r}, dtype=np.float32, mode="r", shape=(5000, d)), y[:5000])
    before, done, seen = own_memory(), False, []
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run(X, y)
    done = True
    watcher.join()
    assert 0 < result.certificate.relative_gap < 10, result
    print(len(seen), max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell memory from mapped files")
def test_peak_memory_is_far_below_the_data(tmp_path):
    """160 MB of float32 rows (320 MB in float64); a column of float64 targets has 1.3 MB, a pass batches of 4 MiB."""
    n, path = 160_000, tmp_path / "X.dat"
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for _ in range(10):
            stream.write(rng.standard_normal((n // 10, 250), dtype=np.float32).data)
    program = textwrap.dedent(PEAK.format(n=n, path=str(path)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    samples, peak = map(float, done.stdout.split())
    assert samples > 20
    assert peak < 64
