"""Layerwise training on samples that are shared out to processes: the network and the certificates of one process."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from cvxnn.errors import DistributedError
from cvxnn.layerwise import LayerwiseCNNClassifier
from cvxnn.problems import patch_gates
from tests import distributed_worker as worker

TWO = {"n_stages": 2, "n_gates": 6, "rank": 2, "batch_size": 8, "epochs": 2, "precision": "float64", "device": "cpu"}
#: Options. Some of the batches of 3 have no sample of one of the processes; convex stages have fewer features than
#: samples, so that one process factors the same Gram matrix as two.
RUNS = {
    "sgd": TWO | {"features": "cached"},
    "convolved": TWO | {"features": "convolved", "maps": "recomputed", "loss": "squared", "map_pooling": 2},
    "augmented": TWO | {"augment": "crop_flip", "batch_size": 3, "standardize": False},
    "narrow": TWO | {"width": 5, "normalize": True, "downsample": (2,), "mirror": True, "hidden_bias": False},
    "convex": TWO | {"method": "convex", "n_gates": 2, "width": 2, "pooling": 1, "tol": 1e-3, "max_iter": 60},
    "both": TWO | {"method": ["sgd", "convex"], "n_gates": 2, "width": 2, "pooling": 1, "beta": 1e-2, "max_iter": 40},
}


def data(seed=0, n=61):
    """Images of squares in noise, some of them empty; an odd number."""
    rng = np.random.default_rng(seed)
    images, labels = rng.standard_normal((n, 2, 6, 6)), np.arange(n) % 3
    for image, label in zip(images, labels, strict=True):
        image[:, label : label + 3, :2] += 2
    images[[5, 13]] = 0
    return images, labels


def facts(model):
    """What runs are compared by."""
    new, labels = data(1, 20)
    return {
        "decisions": model.decision_function(new).tolist(),
        "staged": model.staged_score(new, labels),
        "stages": [
            [stage.certificate.primal, stage.certificate.lower_bound, stage.certificate.dual_norm_ratio]
            for stage in model.stages_
        ],
        "sizes": [[stage.n_gates, stage.n_columns, stage.channels] for stage in model.stages_],
        "accuracy": [[stage.accuracy, stage.validation_accuracy or 0] for stage in model.stages_],
        "losses": [entry.get("loss", entry.get("primal")) for stage in model.stages_ for entry in stage.trace],
        "seen": [entry.get("accuracy", 0) for stage in model.stages_ for entry in stage.trace],
    }


def layerwise(group, folder, few=None):
    """All runs; with `few`, gates of more patches than that are drawn from a part of them."""
    if few is not None:
        patch_gates._PATCHES, patch_gates._IMAGES = few, 20
    X, y = data()
    path = folder / f"images-{0 if group is None else group.rank}.npy"
    np.save(path, X)
    X = np.load(path, mmap_mode="r")
    found = {}
    for name, options in RUNS.items():
        model = LayerwiseCNNClassifier(random_state=3, **options).fit(X, y, validation=data(2, 15))
        found[name] = facts(model)
    return found


@pytest.mark.parametrize("few", [None, 500])
@pytest.mark.filterwarnings("ignore::cvxnn.errors.CertificationWarning")
def test_two_processes_find_what_one_does(few, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_gates, "_PATCHES", patch_gates._PATCHES)
    monkeypatch.setattr(patch_gates, "_IMAGES", patch_gates._IMAGES)
    first, second = worker.run(layerwise, tmp_path, arguments=(few,))
    assert first == second
    alone = layerwise(None, tmp_path, few)
    for name, one in alone.items():
        for fact, value in one.items():
            np.testing.assert_allclose(first[name][fact], value, rtol=1e-9, atol=1e-9, err_msg=f"{name} {fact}")


LONG = TWO | {"epochs": 3, "random_state": 0, "features": "cached"}


def dying(group, folder):
    """The second process ends after the second epoch of the second stage."""

    def callback(entry):
        if group.rank == 1 and (entry["stage"], entry["epoch"]) == (2, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    model = LayerwiseCNNClassifier(checkpoint=folder / "run", callbacks=[callback], **LONG)
    try:
        model.fit(*data())
    except DistributedError as error:
        return {"error": str(error)}
    return {}


def resumed(group, folder):
    """It goes on; the file is there for the first process only."""
    first = group is None or group.rank == 0
    place = folder / "run" if first else folder / "nowhere" / "run"
    seen = []
    options = LONG | {"checkpoint": place, "resume": True, "callbacks": [lambda entry: seen.append(entry["epoch"])]}
    return facts(LayerwiseCNNClassifier(**options).fit(*data())) | {"epochs": seen}


def test_a_process_that_ends_leaves_a_checkpoint(tmp_path):
    processes = worker.start(dying, tmp_path, timeout=10)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    error = json.loads((tmp_path / "dying-0.json").read_text())["error"]
    assert "process 0 of 2 has lost the others" in error
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    wanted = facts(LayerwiseCNNClassifier(**LONG).fit(*data()))
    for found in worker.run(resumed, tmp_path):
        assert found.pop("epochs") == [3]
        for fact, value in wanted.items():
            np.testing.assert_allclose(found[fact], value, rtol=1e-9, atol=1e-9, err_msg=fact)
    # One process, on its own, goes on from the same file.
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    assert resumed(None, tmp_path)["epochs"] == [3]
