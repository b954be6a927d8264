"""Checkpoints of layerwise training: a run that was killed goes on to the same result."""

import errno

import pytest

from cvxnn.errors import StorageError
from tests.test_layerwise import SMALL, model, same_weights

OPTIONS = {"n_gates": 4, "epochs": 3, "momentum": 0.9, "decay_every": 2}


class Killed(Exception):
    pass


def killer(stage, epoch, error=Killed):
    def callback(entry):
        if (entry["stage"], entry.get("epoch", entry.get("iteration"))) == (stage, epoch):
            raise error

    return callback


def course(found):
    return [
        [{key: value for key, value in entry.items() if key != "seconds"} for entry in stage.trace]
        for stage in found.stages_
    ]


@pytest.mark.parametrize(
    "changes", [{}, {"augment": "crop_flip"}, {"maps": "recomputed", "rank": 2, "features": "convolved"}]
)
@pytest.mark.parametrize("place", [(1, 2), (1, 3), (2, 1)])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, changes, place):
    options = OPTIONS | changes
    whole = model(**options).fit(*SMALL, validation=SMALL)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        model(**options, checkpoint=folder, callbacks=[killer(*place)]).fit(*SMALL, validation=SMALL)
    seen = []
    found = model(**options, checkpoint=folder, resume=True, callbacks=[seen.append]).fit(*SMALL, validation=SMALL)
    assert same_weights(whole, found)
    assert course(whole) == course(found)
    assert [stage.certificate for stage in whole.stages_] == [stage.certificate for stage in found.stages_]
    assert len(seen) == 6 - (3 * (place[0] - 1) + place[1])
    assert sorted(file.name for file in folder.iterdir()) == ["stage-1.safetensors", "stage-2.safetensors"]


def test_convex_stages_are_kept(tmp_path):
    options = {"n_gates": 4, "method": ["convex", "sgd"], "tol": 1e-2, "width": [3, None], "epochs": 2}
    whole = model(**options).fit(*SMALL)
    with pytest.raises(Killed):
        model(**options, checkpoint=tmp_path, callbacks=[killer(2, 1)]).fit(*SMALL)
    found = model(**options, checkpoint=tmp_path, resume=True).fit(*SMALL)
    assert same_weights(whole, found)


def test_more_stages_go_on_from_fewer(tmp_path):
    model(1, **OPTIONS, checkpoint=tmp_path).fit(*SMALL)
    seen = []
    found = model(2, **OPTIONS, checkpoint=tmp_path, resume=True, callbacks=[seen.append]).fit(*SMALL)
    assert {entry["stage"] for entry in seen} == {2}
    assert same_weights(found, model(2, **OPTIONS).fit(*SMALL))


def test_a_run_without_a_seed_keeps_its_own(tmp_path):
    options = OPTIONS | {"random_state": None}
    with pytest.raises(Killed):
        model(**options, checkpoint=tmp_path, callbacks=[killer(2, 1)]).fit(*SMALL)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tmp_path.glob("*.safetensors"):
        (copy / file.name).write_bytes(file.read_bytes())
    fits = [model(**options, checkpoint=folder, resume=True).fit(*SMALL) for folder in (tmp_path, copy)]
    assert same_weights(*fits)


def test_ctrl_c_ends_with_what_is_trained_and_can_be_resumed(tmp_path):
    stopped = model(**OPTIONS, checkpoint=tmp_path, callbacks=[killer(2, 2, KeyboardInterrupt)]).fit(*SMALL)
    assert [stage.status for stage in stopped.stages_][1] == "interrupted"
    assert stopped.certificate_ is None
    assert len(stopped.staged_score(*SMALL)) == 2
    found = model(**OPTIONS, checkpoint=tmp_path, resume=True).fit(*SMALL)
    assert same_weights(found, model(**OPTIONS).fit(*SMALL))


def test_ctrl_c_before_anything_is_trained(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("cvxnn.layerwise.training.Sgd.run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(**OPTIONS).fit(*SMALL)


def test_a_callback_can_end_the_run():
    found = model(**OPTIONS, callbacks=[lambda entry: entry["epoch"] == 2]).fit(*SMALL)
    assert [stage.status for stage in found.stages_] == ["interrupted"]
    assert len(found.stages_[0].trace) == 2
    assert found.certificate_ is not None


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    model(1, **OPTIONS, checkpoint=tmp_path).fit(*SMALL)
    others = [
        (model(1, **(OPTIONS | {"beta": 1e-3}), checkpoint=tmp_path, resume=True), SMALL),
        (model(1, **(OPTIONS | {"random_state": 5}), checkpoint=tmp_path, resume=True), SMALL),
        (model(1, **OPTIONS, checkpoint=tmp_path, resume=True), (SMALL[0] + 1, SMALL[1])),
        (model(1, **OPTIONS, checkpoint=tmp_path, resume=True), (SMALL[0], SMALL[1][::-1])),
    ]
    for other, data in others:
        with pytest.raises(StorageError, match="another run"):
            other.fit(*data)
    again = model(1, **(OPTIONS | {"beta": 1e-3}), checkpoint=tmp_path).fit(*SMALL)
    assert again.stages_[0].certificate.beta == 1e-3


@pytest.mark.parametrize("name", ["stage-1.safetensors", "training.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoints_are_refused(tmp_path, name, damage):
    with pytest.raises(Killed):
        model(**OPTIONS, checkpoint=tmp_path, callbacks=[killer(2, 1)]).fit(*SMALL)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-9] ^= 64
    file.write_bytes(bytes(content[: len(content) // 2] if damage == "cut" else b"" if damage == "empty" else content))
    with pytest.raises(StorageError, match="damaged"):
        model(**OPTIONS, checkpoint=tmp_path, resume=True).fit(*SMALL)


def test_places_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(StorageError, match="it is a file"):
        model(**OPTIONS, checkpoint=file).fit(*SMALL)
    with pytest.raises(StorageError, match="cannot write"):
        model(**OPTIONS, checkpoint=tmp_path / "a" / "b").fit(*SMALL)


def test_a_folder_that_is_read_only_is_named_before_training(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("cvxnn.layerwise.checkpoint.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("cvxnn.layerwise.training.Sgd.run_epoch", lambda self: pytest.fail("trained"))
    with pytest.raises(StorageError, match=r"cannot write .*Permission denied"):
        model(**OPTIONS, checkpoint=tmp_path).fit(*SMALL)
