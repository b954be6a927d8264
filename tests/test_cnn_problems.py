"""CNN problems: every solver against interior point to a certified 1e-6, gates, careless arguments."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import InvalidInputError

GEOMETRIES = {
    "global": {"filter_size": 2, "pooling": (1, 1)},
    "two-by-two": {"filter_size": 3, "padding": 1, "pooling": (2, 2), "hidden_bias": True},
    "strided": {"filter_size": (1, 2), "stride": 2, "pooling": (2, 1), "output_bias": True},
    "matrix": {"filter_size": 2, "pooling": [[1.0, 0, -1, 0] + 5 * [0.0], [0.5] * 9]},
}


def make(loss="squared", n=14, c=2, seed=0, **options):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, 1, 4, 4))
    Y = rng.normal(size=(n, c)) + images.mean((2, 3))
    if loss in ("cross_entropy", "logistic"):
        Y = np.eye(max(c, 2))[np.arange(n) % max(c, 2)]
    return cvxnn.cnn_problem(images, Y, loss=loss, **({"n_gates": 3, "beta": 2e-2} | options))


def agree(problem, result, reference, tol=1e-6):
    """Two certified objectives of one problem, and the intervals around its optimum."""
    assert result.status == reference.status == "certified"
    for left, right in ((result, reference), (reference, result)):
        assert left.certificate.relative_gap <= tol
        assert left.certificate.lower_bound <= right.objective * (1 + 1e-12)
    assert result.objective == pytest.approx(reference.objective, rel=2 * tol)


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_admm_is_interior_point(name, activation, loss):
    problem = make(loss, activation=activation, **GEOMETRIES[name])
    reference = cvxnn.solve(problem, "interior_point", tol=1e-6)
    features = {"squared": "cached", "cross_entropy": "recomputed"}[loss]
    other = make(loss, activation=activation, features=features, **GEOMETRIES[name])
    agree(problem, cvxnn.solve(other, "admm", tol=1e-6, max_iter=20_000), reference)


@pytest.mark.parametrize("side", ["samples", "features"])
def test_both_sides_of_the_kernel(side):
    problem = make(**GEOMETRIES["two-by-two"])
    reference = cvxnn.solve(problem, "interior_point", tol=1e-6)
    agree(problem, cvxnn.solve(problem, "admm", tol=1e-6, solver_options={"side": side}), reference)


@pytest.mark.parametrize("solver", ["fista", "bm_global", "bm_lbfgs"])
@pytest.mark.parametrize("name", ["two-by-two", "matrix"])
def test_other_solvers_are_interior_point(name, solver):
    problem = make(beta=5e-2, **GEOMETRIES[name])
    reference = cvxnn.solve(problem, "interior_point", tol=1e-6)
    options = {"rank": 8} if solver == "bm_lbfgs" else {}
    result = cvxnn.solve(problem, solver, tol=1e-6, max_iter=20_000, random_state=0, **options)
    agree(problem, result, reference)


@pytest.mark.parametrize("gates", ["given", "enumerate"])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("name", ["pixels", "padded", "weights"])
def test_relu_with_one_output_is_interior_point(name, loss, gates):
    rng = np.random.default_rng(7)
    images = rng.normal(size=(6, 1, 2, 3))
    geometry = {
        "pixels": {"filter_size": (1, 2), "pooling": (1, 1)},
        "padded": {"filter_size": (2, 1), "padding": (0, 1), "stride": (1, 2), "pooling": (1, 1)},
        "weights": {"filter_size": (1, 2), "pooling": [[0.5, -1.0, 0.0, 2.0]], "output_bias": True},
    }[name]
    Y = rng.normal(size=6) if loss == "squared" else np.arange(6)[:, None] % 2 * 1.0
    chosen = "enumerate" if gates == "enumerate" else rng.normal(size=(2, 4))
    problem = cvxnn.cnn_problem(images, Y, activation="relu", gates=chosen, loss=loss, beta=2e-2, **geometry)
    assert problem.scope == ("relu_network" if gates == "enumerate" else "given_gates")
    reference = cvxnn.solve(problem, "interior_point", tol=1e-6)
    agree(problem, cvxnn.solve(problem, "bm_global", tol=1e-6, random_state=0), reference)


def test_a_larger_set_of_gates_lowers_the_relu_optimum_to_that_of_all():
    """Over all cells the bound holds for every sample of gates."""
    rng = np.random.default_rng(1)
    images, Y = rng.normal(size=(6, 1, 1, 3)), rng.normal(size=6)
    common = {"activation": "relu", "filter_size": (1, 2), "pooling": (1, 1), "beta": 1e-2}
    every = cvxnn.solve(cvxnn.cnn_problem(images, Y, gates="enumerate", **common), tol=1e-6)
    some = cvxnn.solve(cvxnn.cnn_problem(images, Y, gates=rng.normal(size=(2, 3)), **common), tol=1e-6)
    assert every.certificate.lower_bound <= some.objective
    assert every.objective <= some.objective * (1 + 1e-6)


def test_blocks_of_a_matrix_pooling_are_those_of_its_cells():
    """Pooling by rows of the identity is a perceptron on single patches, cell by cell."""
    rng = np.random.default_rng(2)
    images, Y = rng.normal(size=(10, 1, 1, 2)), rng.normal(size=(10, 2))
    cnn = cvxnn.cnn_problem(images, Y, filter_size=1, pooling=np.eye(2), gates=np.array([[1.0, -1]]), beta=1e-2)
    result = cvxnn.solve(cnn, tol=1e-8)
    outputs = cnn.operator.apply(result.Z)
    pixels = torch.from_numpy(images[:, 0, 0])
    by_hand = torch.zeros(10, 2, dtype=torch.float64)
    for k, sign in enumerate((1, -1)):
        for output in range(2):
            for cell in range(2):
                active = sign * pixels[:, cell] >= 0
                by_hand[:, output] += active * pixels[:, cell] * result.Z[k, 0, output * 2 + cell]
    assert torch.allclose(outputs, by_hand)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_size": 5}, "filter_size has a height of 5"),
        ({"filter_size": 0}, "filter_size is 0"),
        ({"stride": (1, 0)}, "stride is"),
        ({"padding": -1}, "padding is -1"),
        ({"pooling": (5, 5)}, "at most 2 x 2"),
        ({"features": "disk"}, "features is 'disk'"),
        ({"gates": np.ones((3, 2))}, "gates"),
        ({"gate_quantile": 0.5}, "hidden_bias"),
    ],
)
def test_careless_arguments(options, message):
    with pytest.raises(InvalidInputError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((14, 1, 4, 4), np.nan), "NaN"),
        (np.full((14, 1, 4, 4), np.inf), "infinit"),
        (np.zeros((14, 4, 4)), "shape"),
        (np.full((14, 1, 4, 4), "pixel"), "images"),
        (np.zeros((0, 1, 4, 4)), "images"),
        (np.zeros((13, 1, 4, 4)), "14"),
    ],
)
def test_careless_images(images, message):
    with pytest.raises(InvalidInputError, match=message):
        cvxnn.cnn_problem(images, np.arange(14.0))
