"""Images with their mirror images, normalised images, and average pooling between stages."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cvxnn.errors import InvalidInputError
from cvxnn.layerwise import LayerwiseCNNClassifier
from cvxnn.layerwise.reduction import Reduction, mirrored, spaced, stage_pooling
from cvxnn.layerwise.state import from_state, to_state
from cvxnn.operators import PatchGeometry, pooling_matrix

DIGITS = load_digits()
X, Y = DIGITS.images[:200], DIGITS.target[:200]
OPTIONS = {"n_gates": 6, "width": 6, "method": "convex", "tol": 1e-2, "beta": 1e-3, "precision": "float64"}


def geometry(size=3, padding=0, stride=1, bias=True):
    return PatchGeometry((size, size), (stride, stride), (padding, padding), bias)


@pytest.fixture(scope="module")
def model():
    options = OPTIONS | {"mirror": True, "standardize": "image", "map_pooling": [(3, 1), None], "maps": "recomputed"}
    return LayerwiseCNNClassifier(2, padding=0, random_state=0, **options).fit(X, Y)


def test_outputs_do_not_depend_on_the_side(model):
    flipped = X[:20, :, ::-1].copy()
    assert np.allclose(model.decision_function(flipped), model.decision_function(X[:20]), atol=1e-9)
    other = LayerwiseCNNClassifier(2, padding=0, random_state=0, **OPTIONS).fit(X, Y)
    assert not np.allclose(other.decision_function(flipped), other.decision_function(X[:20]), atol=1e-3)


def test_stages_see_what_the_network_computes(model):
    """The training accuracy of both stages, from problems on the maps of the stages, is that of the network."""
    assert model.staged_score(X, Y) == pytest.approx([stage.accuracy for stage in model.stages_])
    assert model.stages_[0].map_shape == (6, 2 * 4, 4)
    assert model.stages_[1].image_shape == (6, 2 * 4, 4)
    assert all(stage.certificate.relative_gap <= 1e-2 for stage in model.stages_)
    assert 0 < model.stages_[1].rounding < 1e-9


def test_kept_and_recomputed_maps_agree(model):
    kept = LayerwiseCNNClassifier(**(model.get_params() | {"maps": "cached"})).fit(X, Y)
    assert np.allclose(kept.decision_function(X), model.decision_function(X), atol=1e-6)


def test_normalised_images_do_not_depend_on_brightness(model):
    bright = X[:20] + 3.0
    assert np.allclose(model.decision_function(bright), model.decision_function(X[:20]), atol=1e-6)


def test_state_keeps_the_preparation(model):
    restored = from_state(*to_state(model))
    assert np.array_equal(restored.decision_function(X), model.decision_function(X))


@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (1, 1), (1, 2), (0, 2)])
def test_mirrored_pooling_by_hand(padding, stride):
    torch.manual_seed(0)
    images = torch.randn(3, 2, 8, 6, dtype=torch.float64)
    shape = geometry(3, padding, stride)
    gap = Reduction(True).gap(shape, 8)
    pooling = stage_pooling((2, 2), shape, 16 + gap, 6, True, gap)
    filters = torch.randn(19, 4, dtype=torch.float64)

    def maps(x):
        return shape(x) @ filters

    whole = torch.matmul(pooling, maps(spaced(mirrored(images), gap)))
    single = pooling_matrix((2, 2), shape.grid(8, 6))
    expected = (torch.matmul(single, maps(images)) + torch.matmul(single, maps(images.flip(3)))) / 2
    assert torch.allclose(whole, expected)
    assert torch.allclose(pooling.sum(1), torch.ones(4, dtype=torch.float64))


def test_reduction_pools_each_image_on_its_own():
    maps = torch.arange(2 * 10 * 5.0).view(1, 2, 10, 5)
    reduced = Reduction(True, 2, 2)(maps, 4)
    assert torch.equal(reduced[:, :, :2], torch.nn.functional.avg_pool2d(maps[:, :, :4], 2, 2))
    assert torch.equal(reduced[:, :, 2:], torch.nn.functional.avg_pool2d(maps[:, :, 6:], 2, 2))
    assert Reduction()(maps, 10) is maps
    assert Reduction(True, 2, 2).grid(geometry(), 12, 7) == (4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mirror": 2}, "mirror is 2"),
        ({"map_pooling": (0, 1)}, r"map_pooling is \(0, 1\)"),
        ({"map_pooling": 99}, "map_pooling has size 99"),
        ({"map_pooling": [2]}, "map_pooling has 1 entries; 2"),
        ({"standardize": "pixel"}, "standardize is 'pixel'"),
        ({"mirror": True, "augment": "flip"}, "not augmented"),
        ({"standardize": "image", "augment": "crop"}, "not augmented"),
    ],
)
def test_careless_options(options, message):
    with pytest.raises(InvalidInputError, match=message):
        LayerwiseCNNClassifier(2, **(OPTIONS | options)).fit(X, Y)
