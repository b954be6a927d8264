"""Bundled data sets and the spiral."""

import numpy as np
import pytest

from cvxnn.datasets import DATASETS, load_dataset, spiral
from cvxnn.errors import InvalidInputError

SHAPES = {
    "breast_cancer": (569, 30, 2),
    "diabetes": (442, 10, None),
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "spiral": (150, 2, 3),
    "wine": (178, 13, 3),
}


def test_every_data_set_has_a_test():
    assert set(SHAPES) == set(DATASETS)


@pytest.mark.parametrize("name", SHAPES)
def test_load(name):
    n, d, n_classes = SHAPES[name]
    dataset = load_dataset(name)
    assert dataset.X.shape == (n, d)
    assert len(dataset.y) == n
    assert dataset.y.name == "target"
    assert dataset.task == DATASETS[name].task
    assert np.isfinite(dataset.X.to_numpy(dtype=float)).all()
    if n_classes is not None:
        assert dataset.y.nunique() == n_classes


def test_class_names():
    assert set(load_dataset("breast_cancer").y) == {"malignant", "benign"}


@pytest.mark.parametrize("name", ["mnist", "", 3])
def test_unknown_name(name):
    with pytest.raises(InvalidInputError, match="breast_cancer, diabetes, digits, iris, spiral, wine"):
        load_dataset(name)


@pytest.mark.parametrize(("n_samples", "n_classes"), [(150, 3), (100, 3), (7, 7), (40, 2)])
def test_spiral_is_balanced_and_inside_its_square(n_samples, n_classes):
    X, y = spiral(n_samples, n_classes, noise=0.5)
    counts = np.bincount(y)
    assert X.shape == (n_samples, 2)
    assert len(counts) == n_classes
    assert counts.max() - counts.min() <= 1
    assert np.abs(X).max() <= 0.5
    np.testing.assert_allclose(np.linalg.norm(X, axis=1).max(), 0.5 if n_samples > n_classes else 0)


def test_spiral_without_noise_follows_its_formula():
    X, y = spiral(30, 3, noise=0.0)
    radius = np.linspace(0, 1, 10)
    angle = 4 * (radius + 1)
    np.testing.assert_allclose(X[y == 1], radius[:, None] / 2 * np.column_stack([np.sin(angle), np.cos(angle)]))


def test_spiral_is_reproducible():
    np.testing.assert_array_equal(spiral(30, random_state=4)[0], spiral(30, random_state=4)[0])
    assert (spiral(30, random_state=4)[0] != spiral(30, random_state=5)[0]).any()


@pytest.mark.parametrize("arguments", [{"n_samples": 2}, {"n_classes": 1}, {"noise": -1.0}, {"noise": np.nan}])
def test_spiral_refuses(arguments):
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        spiral(**{"n_samples": 30, **arguments})
