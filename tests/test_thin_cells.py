"""Cells that float64 cannot tell from points: when all are proven to be listed, and what the others can do."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import CertificationWarning
from cvxnn.patterns import enumerate_cells
from cvxnn.patterns.arrangement import _gaps
from cvxnn.patterns.concurrency import Concurrences

GRID = np.array([(i, j, 1) for i in range(-2, 7) for j in range(6)], dtype=float)
STANDARDISED = np.column_stack([(GRID[:, :2] - GRID[:, :2].mean(0)) / GRID[:, :2].std(0), GRID[:, 2]])


def near_duplicates(rng, distance=1e-13):
    X = rng.standard_normal((8, 3))
    return np.vstack([X, X[:3] + distance * rng.standard_normal((3, 3)), -2 * X[3:5]])


def nearly_concurrent(rng, distance=1e-13):
    a, b = rng.standard_normal((2, 3))
    return np.vstack([a, b, a + b + distance * rng.standard_normal(3), rng.standard_normal((6, 3)), np.zeros(3)])


@pytest.mark.parametrize("X", [GRID, np.random.default_rng(0).standard_normal((30, 3)), GRID[:, :2]])
def test_exact_lists_are_known_to_be_exact(X):
    cells = enumerate_cells(X)
    assert cells.exact
    assert cells.coverage is None


@pytest.mark.parametrize(
    "X", [STANDARDISED, near_duplicates(np.random.default_rng(1)), nearly_concurrent(np.random.default_rng(2))]
)
def test_doubtful_lists_are_known_to_be_doubtful(X):
    cells = enumerate_cells(X)
    assert not cells.exact
    assert cells.coverage is not None
    assert 1 <= cells.coverage.growth < 1 + 1e-6
    # The allowance is small: about what rounding does.
    sizes = np.linalg.norm(X[X.any(axis=1)], axis=1)
    assert (cells.coverage.row_error <= 1e-9 * sizes).all()


def test_the_scope_is_never_wider_than_proven():
    y = np.sin(np.arange(len(STANDARDISED)))
    relu = cvxnn.mlp_problem(STANDARDISED, y, activation="relu", gates="enumerate")
    assert relu.scope == "relu_network"
    assert relu.coverage is not None
    with pytest.warns(CertificationWarning, match="not proven that all patterns"):
        gated = cvxnn.mlp_problem(STANDARDISED, y, gates="enumerate")
    assert gated.scope == "given_gates"
    exact = cvxnn.mlp_problem(GRID, y, gates="enumerate")
    assert exact.scope == "all_gates"


def test_a_relaxation_of_a_doubtful_list_is_not_one_of_all_gates():
    y = np.sin(np.arange(len(STANDARDISED)))
    relu = cvxnn.mlp_problem(STANDARDISED, y, activation="relu", gates="enumerate")
    assert cvxnn.gated_relaxation(relu).scope == "given_gates"


@pytest.mark.parametrize("make", [near_duplicates, nearly_concurrent])
@pytest.mark.parametrize("seed", range(5))
def test_no_neuron_is_above_the_bound(make, seed):
    """Neurons near to and in the thin cells, for dual points that almost cancel there."""
    rng = np.random.default_rng(seed)
    X = make(rng)
    n = len(X)
    problem = cvxnn.mlp_problem(X, rng.standard_normal(n), activation="relu", gates="enumerate")
    assert problem.coverage is not None
    for kind in range(3):
        nu = rng.standard_normal(n)
        if kind:
            # Opposite weights on rows that are nearly equal: what is left is of the size of the allowance.
            nu[:] = 0
            nu[:3], nu[8 : 8 + min(3, n - 8)] = 1, -1
        if kind == 2:
            nu *= -1
        weights = torch.from_numpy(nu)[:, None]
        upper = float(problem.dual_norms(weights, problem.operator.adjoint_rounding(weights))[1].max())
        normals = X[X.any(axis=1)]
        pairs = rng.integers(0, len(normals), (400, 2))
        u = np.cross(normals[pairs[:, 0]], normals[pairs[:, 1]])
        length = np.linalg.norm(u, axis=1, keepdims=True)
        u = u[length[:, 0] > 0] / length[length[:, 0] > 0]
        u = np.vstack([u + s * rng.standard_normal(u.shape) for s in (0, 1e-14, 1e-13, 1e-12, 1e-3, 1)])
        u = u.astype(np.longdouble)
        u /= np.sqrt((u**2).sum(1, keepdims=True))
        values = np.abs(nu.astype(np.longdouble) @ np.maximum(X.astype(np.longdouble) @ u.T, 0))
        assert float(values.max()) <= upper


def test_merged_rows_are_paid_for():
    """Without the allowance the bound of two nearly equal rows with opposite weights would be that of one cell."""
    X = np.array([[1.0, 0.0], [1.0, 2e-13], [0.0, 1.0]])
    problem = cvxnn.mlp_problem(X, np.ones(3), activation="relu", gates="enumerate")
    assert problem.coverage is not None
    nu = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64)
    bare = problem.coverage
    problem.coverage = None
    problem.__dict__.pop("cones", None)  # those of all rows
    without = float(problem.dual_norms(nu, 0.0)[1].max())
    problem.coverage = bare
    problem.__dict__.pop("cones", None)
    with_allowance = float(problem.dual_norms(nu, 0.0)[1].max())
    assert with_allowance >= 2e-13
    assert with_allowance >= without


def test_cnn_rows_are_weighed_by_the_pooling():
    rng = np.random.default_rng(0)
    images = rng.integers(-2, 3, (4, 1, 2, 3)) * 0.1 + 0.3
    problem = cvxnn.cnn_problem(
        images, rng.standard_normal(4), activation="relu", filter_size=(1, 2), pooling=(2, 1), gates="enumerate"
    )
    assert problem.scope == "relu_network"
    nu = torch.from_numpy(rng.standard_normal((4, 1)))
    sizes = problem.operator.row_sizes(nu)
    assert sizes.shape == (4 * 4,)
    assert sizes[0] == pytest.approx(abs(float(nu[0])) * 0.5)
    assert cvxnn.solve(problem, tol=1e-5).certificate.relative_gap <= 1e-5


@pytest.mark.parametrize("shift", [0.0, 0.3, 3e-7, 9e-7, -4e-7])
@pytest.mark.parametrize("mirrored", [False, True])
def test_wide_intervals_cover_gaps_beyond_the_end(shift, mirrored):
    """Angles are modulo pi: an interval before pi covers what is behind 0, wherever the circle is cut."""
    angles, spread = np.array([1e-7, 5e-7, 1.0, -1e-7]), np.array([1e-9, 1e-9, 1e-9, 1e-6])
    angles = (shift + (-angles if mirrored else angles)) % np.pi
    rows, _, sizes = _gaps(angles[None], spread[None])
    assert rows.tolist() == [0, 0]
    assert sorted(sizes.tolist()) == [1, 3]
    record = Concurrences(np.arange(5))
    record.meet(np.array([4]), np.append(angles, np.inf)[None], np.append(spread, 1.0)[None])
    assert sorted(map(tuple, np.vstack(record.sets).tolist())) in (
        [(0, 1, 4), (0, 3, 4)],
        [(0, 1, 4), (1, 3, 4)],
        [(0, 3, 4), (1, 3, 4)],
    )
