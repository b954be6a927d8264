"""An image and its mirror image in one array do not see each other, whatever the padding."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import cvxnn
from cvxnn.layerwise import LayerwiseCNNClassifier, fitting_convex, fitting_sgd, layerwise_estimate
from cvxnn.layerwise.packing import pack_network, unpack_network
from cvxnn.layerwise.reduction import Reduction, mirrored, spaced, stage_pooling
from cvxnn.layerwise.stage import GatedConvolution, unshuffle
from cvxnn.operators import PatchGeometry, pooling_matrix

DIGITS = load_digits()
X, Y = DIGITS.images[:120], DIGITS.target[:120]
FLIPPED = X[:, :, ::-1].copy()
CONVEX = {"method": "convex", "n_gates": 5, "width": 5, "tol": 1e-2, "beta": 1e-3, "mirror": True}
SGD = {"method": "sgd", "n_gates": 5, "epochs": 2, "step": 0.05, "batch_size": 30, "mirror": True}
EXACT = {"precision": "float64", "random_state": 0}

SETTINGS = {
    "default": {},
    "wide padding": {"padding": 2, "map_pooling": [(2, 1), None]},
    "large filters": {"filter_size": 5, "padding": [2, 4]},
    "single positions": {"filter_size": [(2, 3), 1], "padding": [(1, 2), 1]},
    "strides": {"stride": [2, 1], "padding": [1, 2], "pooling": 1},
    "strides that divide no side": {"stride": [3, (2, 1)], "padding": [2, 1], "pooling": 1},
    "no padding and such strides": {"stride": [3, 1], "filter_size": [2, 1], "padding": 0, "pooling": 1},
    "downsampling": {"downsample": (1, 2), "padding": [1, 2], "pooling": 1},
    "downsampling and strides": {"downsample": (2,), "stride": [1, 3], "padding": 1, "pooling": 1},
    "three stages": {"n_stages": 3, "map_pooling": [(3, 1), (2, 2), None], "padding": [1, 2, 1], "pooling": 1},
    "without hidden biases": {"hidden_bias": False, "padding": 2},
}


def fit(method, **options):
    return LayerwiseCNNClassifier(**({"n_stages": 2} | EXACT | (CONVEX if method == "convex" else SGD) | options)).fit(
        X, Y
    )


def outputs(model, images):
    with torch.no_grad():
        return model.network_.staged(torch.from_numpy(images[:, None]))


@pytest.mark.parametrize("method", ["convex", "sgd"])
@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_of_all_stages_do_not_depend_on_the_side(name, method):
    model = fit(method, **SETTINGS[name])
    for here, there in zip(outputs(model, X), outputs(model, FLIPPED), strict=True):
        assert float((here - there).abs().max()) <= 1e-10 * float(here.abs().max())
    assert model.staged_score(X, Y) == pytest.approx([stage.accuracy for stage in model.stages_])


@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (2, 1), (4, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3), (3, 1), (5, 2)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_maps_of_both_images_are_those_of_each(padding, stride, size):
    images = torch.randn(3, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    geometry = PatchGeometry(size, stride, padding, True)
    reduction = Reduction(True, 2, 1)
    gap = reduction.gap(geometry, 7)
    assert (gap == 0) == (padding[0] == 0 and 7 % stride[0] == 0)
    both = spaced(mirrored(images), gap)
    filters = torch.randn(geometry.length(2), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid, whole = geometry.grid(7, 6), geometry.grid(*both.shape[2:])
    rows = reduction.half(geometry, *both.shape[2:], gap)
    assert rows == grid[0]
    maps = (geometry(both) @ filters).unflatten(1, whole)
    each = [(geometry(part) @ filters).unflatten(1, grid) for part in (images, images.flip(3))]
    assert torch.allclose(maps[:, :rows], each[0], rtol=0, atol=1e-12)
    assert torch.allclose(maps[:, -rows:], each[1], rtol=0, atol=1e-12)
    pooling = stage_pooling(1, geometry, *both.shape[2:], True, gap)
    pooled = torch.matmul(pooling, maps.flatten(1, 2))
    assert torch.allclose(pooled, (each[0] + each[1]).mean((1, 2)).unsqueeze(1) / 2, rtol=0, atol=1e-12)
    if min(grid) >= 2:
        reduced = reduction(maps.permute(0, 3, 1, 2), rows)
        parts = [torch.nn.functional.avg_pool2d(part.permute(0, 3, 1, 2), 2, 1) for part in each]
        assert torch.allclose(reduced, torch.cat(parts, 2), rtol=0, atol=1e-12)
        assert tuple(reduced.shape[2:]) == reduction.grid(geometry, *both.shape[2:], gap)


def beside(problem, stage, parts):
    """The problem of a stage with the two images far from each other in one row, and pooling found by hand."""
    geometry, (rows, columns) = problem.operator.geometry, parts[0].shape[2:]
    grid = geometry.grid(rows, columns)
    stride = geometry.stride[1]
    shift = -(-(columns + 2 * geometry.padding[1] + geometry.filter_size[1]) // stride) * stride
    images = torch.zeros(*parts[0].shape[:3], shift + columns, dtype=torch.float64)
    images[:, :, :, :columns] = parts[0]
    images[:, :, :, shift:] = parts[1]
    wide = geometry.grid(rows, shift + columns)
    single = pooling_matrix(stage["pooling"], grid).unflatten(1, grid)
    pooling = torch.zeros(len(single), *wide, dtype=torch.float64)
    pooling[:, :, : grid[1]] += single / 2
    pooling[:, :, shift // stride : shift // stride + grid[1]] += single / 2
    return cvxnn.cnn_problem(
        images,
        np.eye(10)[Y],
        filter_size=geometry.filter_size,
        stride=geometry.stride,
        padding=geometry.padding,
        pooling=pooling.flatten(1).numpy(),
        gates=problem.gates.numpy(),
        beta=problem.beta,
        loss=problem.loss.name,
        hidden_bias=geometry.bias,
        output_bias=problem.output_bias,
    ).with_scope(problem.scope)


def separately(stage, parts):
    """Maps of an image and of its mirror image as the next stage sees them, by a layer that knows of one image."""
    old, size = stage.features, stage.reduction
    layer = GatedConvolution(old.filters, old.gates, old.gate_index, old.geometry)
    with torch.no_grad():
        return [torch.nn.functional.avg_pool2d(layer(part), size.size, size.stride) for part in parts]


@pytest.mark.parametrize("maps", ["cached", "recomputed"])
@pytest.mark.parametrize("method", ["convex", "sgd"])
@pytest.mark.parametrize("name", ["wide padding", "strides that divide no side", "downsampling", "three stages"])
def test_certificates_are_those_of_the_problem_without_packing(name, method, maps, monkeypatch):
    seen = []

    def solve(problem, **options):
        found = cvxnn.solve(problem, **options)
        seen.append((problem, {"Z": found.Z, "intercept": found.intercept, "dual": found.dual}))
        return found

    def certify(problem, **point):
        seen.append((problem, point))
        return cvxnn.certify(problem, **point)

    monkeypatch.setattr(fitting_convex, "solve", solve)
    monkeypatch.setattr(fitting_sgd, "certify", certify)
    model = fit(method, maps=maps, **SETTINGS[name])
    standardizer = model.network_.standardizer
    whole = standardizer(torch.from_numpy(X[:, None]))
    parts = [whole[:, :, :8], whole[:, :, 8:]]
    assert len(seen) == len(model.stages_) == model.n_stages
    for (problem, point), stage, result in zip(seen, model.network_.stages, model.stages_, strict=True):
        parts = [unshuffle(part) for part in parts] if stage.convolution.downsample else parts
        options = {"pooling": SETTINGS[name].get("pooling", (2, 2))}
        plain = beside(problem, options, parts)
        same = cvxnn.certify(plain, **point)
        assert same.primal == pytest.approx(result.certificate.primal, rel=1e-9)
        assert same.lower_bound == pytest.approx(result.certificate.lower_bound, rel=1e-6)
        assert math.isfinite(same.relative_gap)
        parts = separately(stage, parts)


@pytest.mark.parametrize("name", ["wide padding", "strides", "downsampling and strides"])
def test_files_keep_the_gap(name, tmp_path):
    model = fit("convex", **SETTINGS[name])
    cvxnn.save(model, tmp_path / "model.safetensors")
    again = cvxnn.load(tmp_path / "model.safetensors")
    assert np.array_equal(again.decision_function(X), model.decision_function(X))
    assert [stage.convolution.gap for stage in again.network_.stages] == [
        stage.convolution.gap for stage in model.network_.stages
    ]


def test_networks_of_older_files_stay_what_they_were(monkeypatch):
    """They were trained without a gap, and their certificates are for that."""
    with monkeypatch.context() as context:
        context.setattr(Reduction, "gap", lambda *_: 0)
        model = fit("convex", padding=1)
    assert float(np.abs(model.decision_function(X) - model.decision_function(FLIPPED)).max()) > 1e-3
    arrays = {}
    header = pack_network(model.network_, arrays)
    for stage in header["stages"]:
        assert stage.pop("gap") == 0
    old = unpack_network(header, arrays)
    with torch.no_grad():
        staged = old.staged(torch.from_numpy(X[:, None]))
    assert all(torch.equal(*pair) for pair in zip(staged, outputs(model, X), strict=True))


@pytest.mark.parametrize("gap", [-1, 1.5, True])
def test_damaged_gaps_are_refused(gap):
    arrays = {}
    header = pack_network(fit("convex", n_stages=1).network_, arrays)
    header["stages"][0]["gap"] = gap
    with pytest.raises(ValueError, match="gap"):
        unpack_network(header, arrays)


@pytest.mark.parametrize("method", ["convex", "sgd"])
def test_runs_that_go_on_come_to_the_same(method, tmp_path):
    options = SETTINGS["downsampling and strides"]
    whole = fit(method, **options)
    fit(method, **(options | {"n_stages": 1, "downsample": (), "stride": 1}), checkpoint=tmp_path)
    again = fit(method, **options, checkpoint=tmp_path, resume=True)
    assert np.array_equal(again.decision_function(X), whole.decision_function(X))


def test_sizes_know_of_the_gap():
    options = {"n_stages": 2, "padding": [1, 2], "stride": [2, 3], "mirror": True, "width": 6, "pooling": 1}
    rows = layerwise_estimate((1, 8, 8), 100, options)
    # A side of 8 wants 1 row for the padding and 1 more for the stride; a side of 4 then 2.
    assert rows[0]["image_shape"] == (1, 2 * 8 + 2, 8)
    assert rows[1]["image_shape"] == (6, 2 * 4 + 2, 4)
    model = fit("convex", **options)
    assert [stage.image_shape for stage in model.stages_] == [(1, 18, 8), (model.stages_[0].channels, 10, 4)]
    assert model.stages_[0].map_shape == (model.stages_[0].channels, 2 * 4, 4)
