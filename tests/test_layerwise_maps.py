"""Maps of earlier stages as images of a problem: the same numbers however they are read."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.layerwise import GatedConvolution, LayerwiseCNNClassifier, StageMaps
from cvxnn.layerwise.augment import augment_batch
from cvxnn.layerwise.maps import channel_scales
from cvxnn.layerwise.stage import unshuffle
from cvxnn.layerwise.ties import gates_off_ties
from cvxnn.operators import PatchGeometry, pooling_matrix

GEOMETRY = PatchGeometry((3, 3), (1, 1), (1, 1), True)


def layer(channels, r, seed, downsample=False, dtype=torch.float64, geometry=GEOMETRY):
    rng = np.random.default_rng(seed)
    h = geometry.length(channels)
    index = torch.from_numpy(np.sort(rng.integers(0, 4, r)))
    filters = torch.from_numpy(rng.standard_normal((r, h))).to(dtype)
    return GatedConvolution(filters, torch.from_numpy(rng.standard_normal((h, 4))), index, geometry, downsample)


def chain(storage, dtype=torch.float64, n=9):
    """Two stages, with downsampling between them and after them."""
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((n, 2, 8, 8))).to(dtype)
    first, second = layer(2, 3, 1, dtype=dtype), layer(12, 5, 2, downsample=True, dtype=dtype)
    pool = pooling_matrix((2, 2), (4, 4))
    maps = StageMaps(images, first, GEOMETRY, pool, True, storage)
    last = StageMaps(maps, second, GEOMETRY, pooling_matrix((1, 1), (2, 2)), True, storage)
    return images, first, second, last


@pytest.mark.parametrize("storage", ["cached", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_those_of_the_network(storage, dtype):
    images, first, second, maps = chain(storage, dtype)
    wanted = unshuffle(second(first(images))).detach()
    assert tuple(maps.shape) == (9, 20, 2, 2)
    assert maps.cached == (storage == "cached")
    scale = float(wanted.abs().max())
    assert torch.allclose(maps[:], wanted, rtol=0, atol=scale * 1e-12 if dtype == torch.float64 else scale * 1e-5)
    rows = torch.tensor([4, 0, 7])
    assert torch.allclose(maps[rows], maps[:][rows])
    exact = maps.double()
    assert exact.dtype == torch.float64
    assert exact[rows].dtype == torch.float64
    assert torch.allclose(exact[:], wanted.double(), rtol=0, atol=scale * 1e-5)


def test_kept_maps_are_their_own_exact_values():
    maps = chain("cached", torch.float32)[3]
    assert maps.rounding == 0
    assert torch.equal(maps.double()[:], maps[:].double())


def test_readings_stay_within_the_stated_error():
    """Against sums in extended precision with the stored patterns; the bound is not vacuous."""
    images, first, second, maps = chain("recomputed")
    exact = images.numpy().astype(np.longdouble)
    for stage, source in ((first, maps.parent), (second, maps)):
        bits = source._bits.rows(slice(None)).numpy()[:, :, stage.gate_index.numpy()]
        padded = np.pad(exact, ((0, 0), (0, 0), (1, 1), (1, 1)))
        height, width = exact.shape[2:]
        out = np.zeros((len(exact), stage.n_channels, height, width), np.longdouble)
        filters = stage.filters.detach().numpy().astype(np.longdouble)
        for i in range(height):
            for j in range(width):
                patch = padded[:, :, i : i + 3, j : j + 3].reshape(len(exact), -1)
                values = patch @ filters[:, :-1].T + filters[:, -1]
                out[:, :, i, j] = values * bits[:, i * width + j]
        shape = (len(out), stage.n_channels, height // 2, 2, width // 2, 2)
        exact = out.reshape(shape).transpose(0, 1, 3, 5, 2, 4).reshape(len(out), -1, height // 2, width // 2)
        error = np.sqrt(((source[:].numpy() - exact) ** 2).reshape(len(out), -1).sum(1)).astype(float)
        size = np.sqrt((exact**2).reshape(len(out), -1).sum(1)).astype(float)
        assert (error <= source.errors.numpy()).all()
        assert (source.errors.numpy() <= 1e-10 * size).all()
    assert 0 < maps.rounding < 1e-10


def test_problems_from_maps_and_from_their_numbers_agree():
    maps = chain("recomputed", n=30)[3]
    labels = np.arange(30) % 3
    options = {"filter_size": 3, "padding": 1, "pooling": (1, 1), "n_gates": 5, "hidden_bias": True, "beta": 1e-2}
    lazy = cvxnn.cnn_problem(maps, labels, **options)
    plain = cvxnn.cnn_problem(maps[:].numpy(), labels, gates=lazy.gates.numpy(), **options)
    assert torch.equal(lazy.patterns, plain.patterns)
    found = cvxnn.solve(lazy, tol=1e-6)
    same = cvxnn.certify(plain.with_scope(lazy.scope), Z=found.Z, intercept=found.intercept, dual=found.dual)
    assert same.primal == pytest.approx(found.objective, rel=1e-9)
    assert same.lower_bound == pytest.approx(found.certificate.lower_bound, rel=1e-6)
    nu = torch.from_numpy(np.random.default_rng(3).standard_normal((30, 3)))
    difference = (lazy.operator.adjoint(nu) - plain.operator.adjoint(nu)).flatten(1).norm(dim=1).max()
    assert float(difference) <= lazy.operator.adjoint_rounding(nu)
    assert lazy.operator.adjoint_rounding(nu) > plain.operator.adjoint_rounding(nu)


def test_the_rounding_covers_a_concentrated_pooling():
    """Pooling that sees little of an image: the error elsewhere must not be measured against the whole image."""
    images = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    images[:, :, :4] = 1e6
    images[:, :, 4:] = 1.0
    pooling = torch.zeros(1, 64, dtype=torch.float64)
    pooling[0, 60] = 1.0
    maps = StageMaps(images, layer(1, 3, 5), GEOMETRY, pooling, False, "recomputed")
    assert maps.rounding > 1e3 * 2.0**-53
    error = float(maps.errors.norm()) * float(pooling.norm()) * 3
    cell = cvxnn.cnn_problem(maps, [0, 1], filter_size=3, padding=1, pooling=pooling.numpy(), hidden_bias=True)
    assert maps.rounding * cell.operator._norm >= error


def test_float32_sources_give_gates_of_their_exact_values():
    maps = chain("recomputed", torch.float32, n=20)[3]
    problem = cvxnn.cnn_problem(maps, np.arange(20) % 2, padding=1, n_gates=6, pooling=(1, 1), dtype="float64")
    assert problem.dtype == torch.float32
    patches = problem.operator.geometry(maps.double()[:])
    assert torch.equal(problem.patterns, patches @ problem.gates >= 0)


def test_downsampling_is_invertible():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).view(2, 3, 4, 6)
    small = unshuffle(images)
    assert tuple(small.shape) == (2, 12, 2, 3)
    assert torch.equal(torch.nn.functional.pixel_shuffle(small, 2), images)


def test_a_layer_by_hand_and_its_conversions():
    stage = layer(2, 6, 3)
    images = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = GEOMETRY(images)
    wanted = (patches @ stage.filters.T) * (patches @ stage.gates >= 0)[:, :, stage.gate_index]
    assert torch.allclose(stage(images), wanted.mT.reshape(4, 6, 5, 5))
    assert stage.float().gates.dtype == torch.float64
    assert torch.allclose(stage(images.float()).double(), wanted.mT.reshape(4, 6, 5, 5), atol=1e-4)


def test_scales_of_channels():
    images = torch.randn(7, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stage = layer(2, 6, 4)
    with torch.no_grad():
        stage.filters[2] = 0
    scales = channel_scales(images, stage)
    assert scales[2] == 1
    squares = (stage(images) * scales.view(-1, 1, 1)).square().mean((0, 2, 3))
    assert torch.allclose(squares[[0, 1, 3, 4, 5]], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["flip", "crop", "crop_flip"])
def test_augmented_images(kind):
    images = torch.arange(40 * 2 * 6 * 6, dtype=torch.float32).view(40, 2, 6, 6) + 1
    fill = torch.tensor([-1.0, -2.0])

    def draw(seed):
        return augment_batch(images, kind, fill, torch.Generator().manual_seed(seed), padding=2)

    first = draw(0)
    assert first.shape == images.shape
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)) if "crop" in kind else images
    windows = padded.unfold(2, 6, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    outside = windows == 0
    windows = torch.where(outside, fill.view(-1, 1, 1), windows)
    candidates = torch.cat([windows, windows.flip(-1)] if "flip" in kind else [windows], dim=1)
    assert (candidates == first.unsqueeze(1)).flatten(2).all(2).any(1).all()


def with_background(n=60):
    """Images of which most are an empty background that is not zero after standardising."""
    rng = np.random.default_rng(0)
    images = np.zeros((n, 1, 10, 10), dtype=np.uint8)
    images[:, :, 4:8, 3:7] = rng.integers(1, 256, (n, 1, 4, 4))
    labels = np.arange(n) % 3
    images[np.arange(n), 0, 4 + labels, 5] = 255
    return images, labels


def test_thresholds_are_moved_off_the_background():
    images = (with_background()[0] / 255.0 - 0.1) / 0.3
    options = {"padding": 1, "n_gates": 12, "gate_sampling": "whitened", "hidden_bias": True, "output_bias": True}
    problem = cvxnn.cnn_problem(images, np.arange(60) % 3, gate_quantile=0.6, **options)
    patches = problem.operator.geometry(torch.from_numpy(images)).flatten(0, 1)
    moved = torch.from_numpy(
        gates_off_ties(problem.operator.gates, problem.operator.geometry, torch.from_numpy(images))
    )

    def tied(gates):
        return ((patches @ gates).abs() < 1e-6).double().mean(0)

    assert float(tied(problem.gates).max()) > 0.1
    assert float(tied(moved).max()) < 1e-3
    assert torch.equal(moved[:-1], problem.gates[:-1])
    again = cvxnn.cnn_problem(images, np.arange(60) % 3, gates=moved.numpy(), hidden_bias=True, padding=1)
    assert gates_off_ties(again.operator.gates, again.operator.geometry, torch.from_numpy(images)) is None


@pytest.mark.parametrize("maps", ["cached", "recomputed"])
def test_the_network_is_the_one_that_was_trained_despite_backgrounds(maps):
    images, labels = with_background()
    found = LayerwiseCNNClassifier(
        3, n_gates=10, epochs=3, step=0.1, gate_quantile=0.6, maps=maps, certify=False, random_state=0, device="cpu"
    ).fit(images, labels)
    assert found.staged_score(images, labels) == [stage.accuracy for stage in found.stages_]


def test_what_readings_differ_by_does_not_depend_on_who_reads_first():
    """The norm that it is relative to is noted as maps are read, and otherwise computed when it is asked for."""
    asked, read, some = (chain("recomputed", dtype, n=30)[3] for dtype in [torch.float64] * 3)
    read[:]
    some[torch.tensor([3, 17, 4])]
    assert 0 < asked.rounding < 1e-10
    assert read.rounding == pytest.approx(asked.rounding, rel=1e-12)
    assert some.rounding == pytest.approx(asked.rounding, rel=1e-12)
    single = chain("recomputed", torch.float32, n=30)[3]
    single[:]
    double = single.double()
    double[torch.arange(20)]
    assert single.rounding == double.rounding > 0


def test_readings_of_many_and_of_few_samples_agree():
    maps = chain("recomputed", n=40)[3]
    maps._together = 7
    few = torch.cat([maps[rows : rows + 1] for rows in range(40)])
    scale = 1e-13 * float(few.abs().max())
    assert torch.allclose(maps[:], few, rtol=0, atol=scale)
    assert torch.allclose(maps[5:39:3], few[5:39:3], rtol=0, atol=scale)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(maps[order], few[order], rtol=0, atol=scale)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_maps_of_convex_stages_are_formed_few_times(precision, monkeypatch):
    """Gates with thresholds moved off ties in one pass, pooled patches with what certificates rest on in another."""
    images, labels = with_background(400)
    # More than 2^17 patches, which are not all looked at together.
    images = np.concatenate([images] * 4)
    labels = np.tile(labels, 4)
    read = {torch.float32: 0, torch.float64: 0}
    whole = StageMaps._maps

    def counted(self, images, active):
        read[images.dtype] += len(images)
        return whole(self, images, active)

    monkeypatch.setattr(StageMaps, "_maps", counted)
    options = {"n_gates": 4, "gate_quantile": 0.6, "width": 3, "method": "convex", "tol": 1e-2, "random_state": 0}
    options |= {"maps": "recomputed", "features": "cached", "precision": precision, "normalize": [True, False]}
    model = LayerwiseCNNClassifier(2, **options).fit(images, labels)
    assert model.stages_[1].certificate.relative_gap <= 1e-2
    n = len(labels)
    # All of them are among the 4,096 images that patches are drawn from, for gates and again for ties.
    drawn = 2 * n
    if precision == "float64":
        assert read == {torch.float32: 0, torch.float64: drawn + 2 * n}
    else:
        assert read[torch.float64] <= drawn + 2 * n
        assert read[torch.float32] <= 2 * n
