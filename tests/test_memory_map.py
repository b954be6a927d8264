"""Data on disk: a memory-mapped array is used where it is."""

import numpy as np
import pytest

import cvxnn
from tests.helpers import make_data


@pytest.mark.parametrize("solver", ["bm_sgd", "bm_global", "fista"])
def test_memory_mapped_data_are_not_copied(tmp_path, solver):
    X, Y, _ = make_data(200)
    path = tmp_path / "X.dat"
    X.tofile(path)
    mapped = np.memmap(path, dtype=np.float64, mode="r", shape=X.shape)
    problem = cvxnn.mlp_problem(mapped, Y, n_gates=5, beta=1e-2)
    assert problem.operator.X.data_ptr() == mapped.ctypes.data
    found = cvxnn.solve(problem, solver, max_iter=5, random_state=0)
    copied = cvxnn.solve(cvxnn.mlp_problem(X, Y, n_gates=5, beta=1e-2), solver, max_iter=5, random_state=0)
    assert found.objective == copied.objective
    np.testing.assert_array_equal(mapped, X)


def test_mini_batches_read_their_rows_only(tmp_path, monkeypatch):
    """The loss and its gradients of an epoch come from sub-problems of `batch_size` samples."""
    X, Y, _ = make_data(100)
    problem = cvxnn.mlp_problem(X, Y, n_gates=5, beta=1e-2)
    seen = []
    subset = type(problem.operator).subset

    def watched(self, rows):
        seen.append(len(rows))
        return subset(self, rows)

    monkeypatch.setattr(type(problem.operator), "subset", watched)
    cvxnn.solve(problem, "bm_sgd", max_iter=2, random_state=0, solver_options={"batch_size": 32, "step": 0.1})
    assert seen == [32, 32, 32, 4] * 2
