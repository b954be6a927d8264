"""Layerwise training: the estimator, both methods, both ways to compute, certificates."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError

import cvxnn
from cvxnn.errors import CertificationWarning, InvalidInputError, StorageError, UnsupportedError
from cvxnn.files import read_tensors, write_tensors
from cvxnn.layerwise import LayerwiseCNNClassifier, from_state, layerwise_estimate, to_state
from cvxnn.operators import PatchGeometry


def digits(n=400, held=200):
    data = load_digits()
    images = data.images / 16 + np.random.default_rng(0).normal(0, 0.01, data.images.shape)
    return (images[:n], data.target[:n]), (images[n : n + held], data.target[n : n + held])


TRAIN, HELD = digits()
SMALL = (TRAIN[0][:120], TRAIN[1][:120])


def model(n_stages=2, **changes):
    options = {"n_gates": 8, "epochs": 6, "step": 0.1, "batch_size": 32, "random_state": 0, "device": "cpu"}
    return LayerwiseCNNClassifier(n_stages, **(options | changes))


def same_weights(first, second):
    """Whether two fitted models have the same numbers, bit for bit."""
    left, right = first.network_.state_dict(), second.network_.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trained():
    return model(certify=True).fit(*TRAIN, validation=HELD)


def test_sgd_learns_and_keeps_every_head(trained):
    scores = trained.staged_score(*HELD)
    assert len(scores) == len(trained.stages_) == 2
    assert min(scores) > 0.6
    assert trained.score(*HELD) == scores[-1]
    assert [stage.validation_accuracy for stage in trained.stages_] == pytest.approx(scores, abs=0.02)
    assert trained.certificate_ is trained.stages_[-1].certificate
    trace = trained.stages_[0].trace
    assert [entry["epoch"] for entry in trace] == [1, 2, 3, 4, 5, 6]
    assert trace[-1]["objective"] < trace[0]["objective"]
    assert trace[-1]["validation_accuracy"] > trace[0]["validation_accuracy"]
    assert trained.n_iter_ == 12


def test_the_network_takes_the_images_that_predict_takes(trained):
    grey, wide = HELD[0][:5], HELD[0][:5, None]
    outputs = trained.network_(torch.from_numpy(grey))
    torch.testing.assert_close(outputs, trained.network_(torch.from_numpy(wide)), rtol=0, atol=0)
    np.testing.assert_array_equal(trained.classes_[outputs.argmax(1)], trained.predict(grey))
    with pytest.raises(InvalidInputError, match=r"\(5, 1, 8, 7\); \(n, 1, 8, 8\) is wanted"):
        trained.network_(torch.from_numpy(grey[:, :, :7]))
    colours = np.repeat(SMALL[0][:, None], 3, 1)
    coloured = model(1, epochs=1).fit(colours, SMALL[1]).network_
    with pytest.raises(InvalidInputError, match=r"\(5, 8, 8\); \(n, 3, 8, 8\) is wanted"):
        coloured(torch.from_numpy(grey))


def test_a_convex_stage_is_certified_and_its_width_is_kept():
    found = model(method="convex", width=5, tol=1e-2).fit(*TRAIN, validation=HELD)
    assert [stage.status for stage in found.stages_] == ["certified", "certified"]
    assert [stage.channels for stage in found.stages_] == [5, 5]
    assert found.stages_[0].n_columns > 5
    assert found.stages_[1].image_shape == (5, 8, 8)
    assert all(stage.certificate.relative_gap <= 1e-2 for stage in found.stages_)
    assert all(stage.loss == "squared" for stage in found.stages_)
    assert min(found.staged_score(*HELD)) > 0.75


@pytest.mark.parametrize("options", [{}, {"mirror": True}, {"downsample": (1,)}, {"pooling": 1, "hidden_bias": False}])
def test_heads_from_pooled_patches_and_from_maps_are_the_same(options):
    found = model(1, method="convex", tol=1e-2, beta=1e-4, precision="float64", **options).fit(*SMALL)
    stage, images = found.network_.stages[0], torch.from_numpy(HELD[0][:50, None])
    maps = found.network_.standardizer(images)
    assert stage.convolution.n_channels > stage.convolution.gates.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(stage(maps), stage.head(stage.convolution(maps)), rtol=1e-12, atol=1e-12)


def test_pooled_patches_of_a_convex_stage_are_kept_or_formed_again():
    fits = [
        model(method="convex", width=5, tol=1e-2, precision="float64", features=name).fit(*SMALL)
        for name in ("cached", "convolved")
    ]
    kept, formed = ([stage.certificate.primal for stage in fit.stages_] for fit in fits)
    assert kept == pytest.approx(formed, rel=1e-9)


def test_channels_after_a_convex_stage_have_unit_mean_square():
    found = model(1, method="convex", width=6, tol=1e-2, precision="float64").fit(*SMALL)
    network = found.network_
    maps = network.stages[0].features(network.standardizer(torch.from_numpy(SMALL[0][:, None])))
    assert maps.shape == (120, 6, 8, 8)
    assert torch.allclose(maps.square().mean((0, 2, 3)), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 3, "loss": "squared"}, {"stride": 2, "pooling": (1, 2)}])
def test_pooled_patches_and_convolution_give_the_same_epochs(options):
    fits = [
        model(1, features=kind, epochs=2, precision="float64", certify=False, **options).fit(*SMALL)
        for kind in ("cached", "convolved")
    ]
    assert [fit.stages_[0].features for fit in fits] == ["pooled", "convolved"]
    for left, right in zip(*(fit.network_.parameters() for fit in fits), strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-10)
    assert fits[0].stages_[0].trace[-1]["objective"] == pytest.approx(fits[1].stages_[0].trace[-1]["objective"])


def test_an_epoch_is_that_of_torch():
    """SGD against autograd through the network itself, one batch an epoch."""
    steps = 3
    start = model(1, epochs=1, step=1e-300, batch_size=120, precision="float64", certify=False).fit(*SMALL)
    found = model(1, epochs=steps, step=0.2, batch_size=120, precision="float64", certify=False).fit(*SMALL)
    network = start.network_
    stage = network.stages[0]
    factors = [stage.convolution.filters, stage.head.weight]
    groups = [{"params": factors, "weight_decay": 5e-4}, {"params": [stage.head.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    images, labels = torch.from_numpy(SMALL[0][:, None]), torch.from_numpy(SMALL[1])
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    for left, right in zip(network.parameters(), found.network_.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-10)


def test_the_step_decays_by_epochs():
    found = model(1, epochs=5, step=0.1, decay=0.5, decay_every=2, certify=False).fit(*SMALL)
    assert [entry["step"] for entry in found.stages_[0].trace] == [0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize("maps", ["cached", "recomputed"])
def test_lower_bounds_hold_for_the_optimum_of_the_same_stage(maps):
    """SGD and the convex solver on one problem: the bound of each is below the objective of the other."""
    options = {"loss": "squared", "maps": maps, "n_gates": 4, "beta": 2e-3, "epochs": 20, "step": 0.05}
    by_sgd = model(method="sgd", **options).fit(*SMALL)
    optimal = model(method=["sgd", "convex"], tol=1e-6, **options).fit(*SMALL)
    first = [fit.stages_[0].certificate for fit in (by_sgd, optimal)]
    assert first[0] == first[1]
    ours, best = by_sgd.certificate_, optimal.certificate_
    assert best.relative_gap <= 1e-6
    assert (by_sgd.stages_[1].rounding > 0) == (maps == "recomputed")
    assert 0 < ours.lower_bound <= best.primal <= ours.primal
    assert best.lower_bound <= ours.primal
    assert ours.scope == best.scope == "sampled_gates"


def test_the_certificate_is_of_the_trained_point(trained):
    """The primal value is the loss of the network on the training set and the penalty of its weights."""
    network, certificate = trained.network_, trained.stages_[0].certificate
    with torch.no_grad():
        outputs = network.staged(torch.from_numpy(TRAIN[0][:, None]), [0])[0].double()
    loss = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(TRAIN[1]))
    stage = network.stages[0].requires_grad_(False)
    penalty = (stage.convolution.filters.double().square().sum() + stage.head.weight.double().square().sum()) / 2
    assert certificate.loss == pytest.approx(float(loss), rel=1e-5)
    assert certificate.penalty == pytest.approx(float(penalty), rel=1e-6)


def test_without_certificates():
    found = model(1, certify=False, epochs=1).fit(*SMALL)
    assert found.certificate_ is None
    assert found.stages_[0].status == "max_iter"


@pytest.mark.parametrize("options", [{"downsample": (1,)}, {"downsample": [2], "double_gates": True}, {"rank": [1, 2]}])
def test_shapes_along_the_stages(options):
    found = model(epochs=1, certify=False, **options).fit(*SMALL)
    first, second = found.stages_
    if options.get("downsample") == (1,):
        assert (first.image_shape, second.image_shape) == ((4, 4, 4), (8, 4, 4))
    elif "downsample" in options:
        assert (first.n_gates, second.n_gates) == (8, 16)
        assert second.image_shape == (32, 4, 4)
    else:
        assert (first.channels, second.channels) == (8, 16)
    assert found.predict(SMALL[0]).shape == (120,)


def test_augmentation_depends_on_the_seed_only():
    fits = [model(augment="crop_flip", epochs=2, random_state=seed, certify=True).fit(*SMALL) for seed in (1, 1, 2)]
    assert same_weights(fits[0], fits[1])
    assert not same_weights(fits[0], fits[2])
    assert fits[0].stages_[0].features == "convolved"
    assert fits[0].certificate_.lower_bound > 0


def test_labels_of_any_kind_and_probabilities():
    names = np.array(["low", "high"])[(TRAIN[1] > 4).astype(int)]
    for options in ({"method": "sgd"}, {"method": "convex", "tol": 1e-2}):
        found = model(1, **options).fit(TRAIN[0], names)
        assert found.classes_.tolist() == ["high", "low"]
        probability = found.predict_proba(HELD[0])
        assert probability.shape == (200, 2)
        assert np.allclose(probability.sum(1), 1)
        assert probability.min() >= 0
        decision = found.decision_function(HELD[0])
        assert decision.shape == (200,)
        assert (found.classes_[(decision > 0).astype(int)] == found.predict(HELD[0])).all()


def test_bytes_are_scaled_and_channels_standardised():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3, 6, 6), dtype=np.uint8)
    labels = np.arange(60) % 3
    byte = model(1, epochs=1, certify=False).fit(pixels, labels)
    real = model(1, epochs=1, certify=False, scale=1 / 255).fit(pixels.astype(np.float64), labels)
    assert same_weights(byte, real)
    standard = byte.network_.standardizer(torch.from_numpy(pixels)).double()
    assert torch.allclose(standard.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(standard.std((0, 2, 3), unbiased=False), torch.ones(3, dtype=torch.float64), atol=1e-6)
    plain = model(1, epochs=1, certify=False, standardize=False).fit(pixels, labels)
    assert float(plain.network_.standardizer(torch.from_numpy(pixels)).max()) == 1.0


def test_parameters_are_only_stored():
    options = {"n_gates": [4, 8], "pooling": (1, 2), "downsample": [2], "callbacks": [print]}
    found = LayerwiseCNNClassifier(2, **options)
    assert found.get_params()["n_gates"] is options["n_gates"]
    assert clone(found).get_params()["pooling"] == (1, 2)
    with pytest.raises(NotFittedError):
        found.predict(SMALL[0])


def test_a_long_step_is_reported():
    with pytest.warns(CertificationWarning, match="stage 1 diverged"):
        found = model(step=1e6, epochs=4).fit(*SMALL)
    assert [stage.status for stage in found.stages_] == ["diverged"]
    assert np.isfinite(found.decision_function(SMALL[0])).all()


def test_a_convex_stage_out_of_iterations_warns():
    with pytest.warns(CertificationWarning, match="stage 1 ended as 'max_iter'"):
        model(1, method="convex", tol=1e-9, max_iter=10).fit(*SMALL)


@pytest.mark.parametrize("labels", ["numbers", "strings"])
def test_a_model_as_header_and_arrays(tmp_path, labels):
    y = SMALL[1] if labels == "numbers" else np.array([f"digit {label}" for label in SMALL[1]])
    found = model(epochs=1, method=["convex", "sgd"], tol=1e-1, width=[4, None], downsample=[2]).fit(SMALL[0], y)
    file = write_tensors(tmp_path / "model.safetensors", "model", *to_state(found))
    again = from_state(*read_tensors(file, "model"))
    assert same_weights(found, again)
    assert (again.predict(SMALL[0]) == found.predict(SMALL[0])).all()
    assert (again.predict_proba(SMALL[0]) == found.predict_proba(SMALL[0])).all()
    assert again.certificate_ == found.certificate_
    assert again.get_params() == found.get_params()
    assert [stage.to_dict() for stage in again.stages_] == [stage.to_dict() for stage in found.stages_]
    header, arrays = to_state(found)
    arrays["network.stage1.convolution.filters"] = arrays["network.stage1.convolution.filters"][:, :-1]
    with pytest.raises(ValueError, match="do not fit"):
        from_state(header, arrays)


def test_estimates_before_a_run():
    rows = layerwise_estimate((3, 32, 32), 50_000, {"n_stages": 3, "n_gates": 256, "downsample": [3]})
    assert [row["image_shape"] for row in rows] == [(3, 32, 32), (256, 32, 32), (1024, 16, 16)]
    assert rows[0]["gates_bytes"] == 50_000 * 1024 * 32
    assert rows[0]["length"] == 28
    assert rows[0]["phi_bytes"] == 50_000 * 4 * 256 * 28 * 4
    assert rows[0]["convex_flops"] / rows[0]["bm_flops"] == pytest.approx(40, rel=0.2)
    assert rows[1]["bm_flops"] > rows[0]["bm_flops"]
    with pytest.raises(InvalidInputError, match="even sizes"):
        layerwise_estimate((1, 7, 7), 10, {"n_stages": 2, "downsample": (2,)})


CARELESS = [
    ({"n_stages": 0}, "n_stages is 0"),
    ({"step": [0.1, 0.1, 0.1]}, "step has 3 entries; 2, one per stage"),
    ({"pooling": [(2, 2)]}, "pooling has 1 entries"),
    ({"downsample": (3,)}, "downsample is"),
    ({"downsample": "1"}, "downsample is"),
    ({"method": "adam"}, "method is 'adam'"),
    ({"loss": "hinge"}, "hinge"),
    ({"augment": "rotate"}, "augment is 'rotate'"),
    ({"precision": "float16"}, "precision is 'float16'"),
    ({"maps": "disk"}, "maps is 'disk'"),
    ({"features": "gpu"}, "features is 'gpu'"),
    ({"method": "convex", "augment": "flip"}, "augment is 'flip'; it is for stages trained by 'sgd'"),
    ({"features": "cached", "augment": "flip"}, "features is 'cached'"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"momentum": 1.0}, "momentum is 1.0"),
    ({"decay": 2.0}, "decay is 2.0"),
    ({"beta": 0}, "beta is 0"),
    ({"filter_size": 20}, "filter_size"),
    ({"pooling": 9}, "pooling is 9 x 9"),
    ({"gate_quantile": 0.5, "hidden_bias": False}, "hidden_bias"),
    ({"gate_sampling": "sobol"}, "gate_sampling is 'sobol'"),
    ({"gate_quantile": "some"}, "gate_quantile is 'some'"),
    ({"normalize": "some"}, "normalize is 'some'"),
    ({"scale": "some"}, "scale is 'some'"),
    ({"resume": True}, "resume=True needs"),
    ({"callbacks": [3]}, "callbacks holds"),
    ({"width": 0}, "width is 0"),
    ({"device": "abacus"}, "device is 'abacus'"),
    ({"random_state": "x"}, "random_state is 'x'"),
    ({"random_state": -1}, "random_state is -1"),
    ({"checkpoint": 3}, "checkpoint is 3"),
    ({"checkpoint": "a\0b"}, "checkpoint is"),
]


@pytest.mark.parametrize(("changes", "message"), CARELESS)
def test_careless_parameters(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        model(**({"n_stages": 2} | changes)).fit(*SMALL)


def test_careless_data():
    images, labels = SMALL
    broken = images.copy()
    broken[3, 2, 1] = np.nan
    cases = [
        ((broken, labels), {}, "NaN"),
        ((images.reshape(120, -1), labels), {}, "X has shape"),
        ((images, labels[:-1]), {}, "y has shape"),
        ((images, np.zeros(120)), {}, "only one class"),
        ((images, np.linspace(0, 1, 120)), {}, "y has no class labels"),
        ((images, np.array([1, "a"] * 60, dtype=object)), {}, "y"),
        ((images, labels), {"validation": images}, "validation is not a pair"),
        ((images, labels), {"validation": (images[:, 1:], labels)}, "validation images have shape"),
        ((images, labels), {"validation": (images, labels + 5)}, "not in y"),
        ((images * 1e300, labels), {}, "X"),
        ((np.full(images.shape, "pixel"), labels), {}, "X cannot be read as an array of numbers"),
        ((["a.png"] * 120, labels), {}, "X has shape"),
        (([images[0], images[1][:4]], [0, 1]), {}, "X cannot be read as images of one size"),
        ((images[:1], labels[:1]), {}, "only one class"),
        ((images[:0], labels[:0]), {}, "X has shape"),
        ((images + 1j, labels), {}, "X is complex"),
    ]
    for arguments, more, message in cases:
        with warnings.catch_warnings(), pytest.raises(InvalidInputError, match=message):
            warnings.simplefilter("ignore")
            model().fit(*arguments, **more)
    found = model(1, epochs=1, certify=False).fit(images, labels)
    with pytest.raises(InvalidInputError, match="as in training"):
        found.predict(images[:, 1:])


@pytest.mark.parametrize("method", ["sgd", "convex"])
def test_images_without_contrast(method):
    """Constant images: nothing can be learned from them, and nothing breaks."""
    for pixels in (np.ones((20, 8, 8)), np.zeros((20, 8, 8), np.uint8)):
        found = model(1, method=method, epochs=1, tol=1e-2).fit(pixels, np.arange(20) % 2)
        assert np.isfinite(found.decision_function(pixels)).all()
        assert found.certificate_.lower_bound > 0


def test_a_list_has_an_entry_per_stage_and_a_tuple_is_a_pair():
    found = model(epochs=1, certify=False, filter_size=[3, (1, 3)], padding=[1, (0, 1)], pooling=(2, 2)).fit(*SMALL)
    geometries = [stage.convolution.geometry for stage in found.network_.stages]
    assert geometries == [PatchGeometry((3, 3), (1, 1), (1, 1), True), PatchGeometry((1, 3), (1, 1), (0, 1), True)]
    assert [len(stage.head.pooling) for stage in found.network_.stages] == [4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{}, {"augment": "crop_flip"}, {"method": "convex", "tol": 1e-2}, {"rank": 2}])
def test_on_a_gpu(options):
    for precision in ("float32", "mixed"):
        found = model(device="cuda", precision=precision, maps="recomputed", **options).fit(*TRAIN, validation=HELD)
        assert found.certificate_.lower_bound > 0
        if "augment" not in options:
            assert found.score(*HELD) > 0.7


def test_models_on_disk(tmp_path):
    found = model(epochs=1, certify=False).fit(*SMALL)
    again = cvxnn.load(cvxnn.save(found, tmp_path / "model.safetensors"))
    assert same_weights(found, again)
    assert (again.predict(SMALL[0]) == found.predict(SMALL[0])).all()
    with pytest.raises(InvalidInputError, match="not fitted"):
        cvxnn.save(model(), tmp_path / "other.safetensors")
    header, arrays = to_state(found)
    del header["stages"]
    file = write_tensors(
        tmp_path / "cut.safetensors", "model", {"class": type(found).__name__, "state": header}, arrays
    )
    with pytest.raises(StorageError, match="'stages' is missing"):
        cvxnn.load(file)


def test_there_is_no_onnx_graph_of_layerwise_networks(tmp_path):
    images = np.random.default_rng(0).random((12, 1, 6, 6))
    model = LayerwiseCNNClassifier(n_gates=3, n_stages=1, rank=1, epochs=1, random_state=0)
    model.fit(images, np.arange(12) % 2)
    with pytest.raises(UnsupportedError, match="layerwise"):
        cvxnn.export_onnx(model, tmp_path / "model.onnx")
