"""The command line: reports, files, JSON, exit statuses, and a sentence for every bad input."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_iris

import cvxnn
from cvxnn.cli import main
from cvxnn.cli.data import split_rows, target_values
from cvxnn.cli.report import output_folder
from cvxnn.datasets import load_dataset
from cvxnn.errors import StorageError


def reject(token):
    raise AssertionError(f"{token} is no JSON")


pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture
def run(capsys):
    """Run a command; its exit status, standard output and standard error."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "CertificationWarning" not in captured.err
        return status, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    """Run a command with --json; its exit status, the one object, and standard error."""

    def call(*arguments):
        status, out, err = run(*arguments, "--json")
        assert out.count("\n") == 1
        return status, json.loads(out, parse_constant=reject), err

    return call


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with everything that fit writes for iris."""
    out = tmp_path_factory.mktemp("fitted") / "deep" / "iris"
    assert main(["fit", "iris", "--out", str(out), "--quiet", "--n-gates", "20"]) == 0
    return out


@pytest.fixture
def mixed(tmp_path):
    """A CSV file with numbers, texts, and texts as classes in the last column."""
    random = np.random.default_rng(0)
    size = random.normal(size=60)
    colour = random.choice(["red", "green"], size=60)
    label = np.where(size + (colour == "red") > 0.5, "big", "small")
    path = tmp_path / "mixed.csv"
    pd.DataFrame({"size": size, "colour": colour, "label": label}).to_csv(path, index=False)
    return path


def test_help_and_version(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in ("fit", "predict", "certify", "datasets"))
    assert run("--version")[:2] == (0, f"cvxnn {cvxnn.__version__}\n")
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "'cvxnn --help'" in err
    assert "--gate-sampling" in run("fit", "--help")[1]


def test_an_option_per_parameter(run):
    shown = run("fit", "--help")[1]
    for name in cvxnn.ConvexMLPClassifier().get_params():
        if name not in ("verbose", "solver_options"):
            assert f"--{name.replace('_', '-')}"[:18] in shown, name


def test_datasets_list(run, run_json):
    status, out, _ = run("datasets", "list")
    assert status == 0
    assert "breast_cancer" in out
    status, document, _ = run_json("datasets", "list")
    assert status == 0
    assert {"name", "task", "description"} == set(document["datasets"][0])


def test_fit_prints_a_report(run):
    status, out, err = run("fit", "iris", "--n-gates", "10")
    assert status == 0
    for word in ("iris: 120 training rows", "3 classes", "accuracy", "30 rows held out", "relative gap", "at most"):
        assert word in out
    assert "relative gap" in err  # the progress bar
    assert run("fit", "iris", "--n-gates", "10", "--quiet") == (0, "", "")


def test_fit_writes_all_files(fitted):
    names = {path.name for path in fitted.iterdir()}
    assert names == {"model.safetensors", "metrics.json", "gap.png", "gates.png", "confusion.png"}
    for picture in fitted.glob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size > 10_000
    metrics = json.loads((fitted / "metrics.json").read_text(), parse_constant=reject)
    assert set(metrics["files"]) == names
    assert metrics["certified"]
    model = cvxnn.load(fitted / "model.safetensors")
    frame = load_dataset("iris").X
    assert model.preprocessor_.transform(frame).shape == (150, 4)
    assert metrics["certificate"]["primal"] == model.certificate_.primal


def test_fit_matches_the_library(run_json):
    document = run_json("fit", "iris", "--n-gates", "10", "--test-size", "0", "--beta", "0.01")[1]
    X, y = load_iris(return_X_y=True)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    model = cvxnn.ConvexMLPClassifier(n_gates=10, beta=0.01, random_state=0).fit(X, y)
    assert document["certificate"]["primal"] == pytest.approx(model.certificate_.primal, rel=1e-6)
    assert document["scores"] == {"train": {"accuracy": model.score(X, y)}, "test": None}


def test_fit_passes_every_option_on(run_json):
    options = ["--activation", "linear", "--loss", "huber", "--solver", "fista", "--tol", "0.01", "--max-iter", "500"]
    options += ["--time-limit", "50", "--no-hidden-bias", "--no-output-bias", "--dtype", "float32", "--device", "cpu"]
    options += ["--random-state", "3", "--beta", "0.1"]
    status, document, _ = run_json("fit", "wine", *options)
    assert status == 0
    parameters = document["parameters"]
    assert parameters["activation"] == "linear"
    assert (parameters["loss"], parameters["dtype"], parameters["tol"]) == ("huber", "float32", 0.01)
    assert (parameters["hidden_bias"], parameters["output_bias"], parameters["random_state"]) == (False, False, 3)
    assert (parameters["max_iter"], parameters["time_limit"], document["solver"]) == (500, 50.0, "fista")
    sampled = run_json("fit", "iris", "--gate-sampling", "differences", "--gate-quantile", "0.5", "--beta", "0.1")[1]
    assert sampled["parameters"]["gate_quantile"] == 0.5
    exact = run_json("fit", "iris", "--solver", "admm", "--solver-option", "relaxation=1.5", "--norms", "l1,l2")[1]
    assert exact["parameters"]["solver_options"] == {"relaxation": 1.5}
    assert exact["parameters"]["norms"] == ["l1", "l2"]


def test_beta_auto(run_json, tmp_path):
    status, document, _ = run_json("fit", "iris", "--beta", "auto", "--n-gates", "3", "--out", tmp_path / "o")
    assert status == 0
    assert document["model"] == "ConvexMLPClassifierCV"
    assert document["beta"] > 0
    status, again, _ = run_json("certify", tmp_path / "o" / "model.safetensors", "iris")
    assert (status, again["beta"]) == (0, document["beta"])


def test_regression(run, run_json, tmp_path):
    out = tmp_path / "o"
    status, document, _ = run_json("fit", "diabetes", "--beta", "3", "--n-gates", "10", "--out", out)
    assert status == 0
    assert document["data"]["task"] == "regression"
    assert document["scores"]["test"]["r2"] > 0.2
    assert "residuals.png" in document["files"]
    status, table, _ = run("predict", out / "model.safetensors", "diabetes")
    assert table.splitlines()[0] == "prediction"
    assert len(table.splitlines()) == 443
    assert run_json("certify", out / "model.safetensors", "diabetes")[0] == 0


def test_a_plane_is_drawn(run, tmp_path):
    assert run("fit", "spiral", "--n-gates", "10", "--beta", "0.01", "--out", tmp_path, "-q")[0] == 0
    assert (tmp_path / "decision_regions.png").stat().st_size > 10_000


def test_mixed_columns(run, run_json, mixed, tmp_path):
    out = tmp_path / "out"
    status, document, _ = run_json("fit", mixed, "--out", out, "--beta", "0.01", "--n-gates", "10")
    assert status == 0
    assert (document["data"]["target"], document["data"]["n_features"]) == ("label", 3)
    status, table, err = run("predict", out / "model.safetensors", mixed)
    assert status == 0
    assert "accuracy" in err
    lines = table.splitlines()
    assert lines[0] == "prediction,probability_big,probability_small"
    probabilities = [float(value) for value in lines[1].split(",")[1:]]
    assert sum(probabilities) == pytest.approx(1)
    unlabelled = tmp_path / "unlabelled.csv"
    pd.read_csv(mixed).drop(columns="label").assign(colour="violet").to_csv(unlabelled, index=False)
    status, document, _ = run_json("predict", out / "model.safetensors", unlabelled)
    assert (status, document["scores"]) == (0, None)
    assert len(document["predictions"]["prediction"]) == 60


def test_a_table_of_one_column(run, tmp_path):
    (tmp_path / "semicolons.csv").write_text("a;b;y\n1;2;0\n2;3;1\n")
    status, out, err = run("fit", str(tmp_path / "semicolons.csv"))
    assert (status, out) == (1, "")
    assert err.endswith("has only one column, 'a;b;y'; a target and features, separated by commas, are wanted\n")


def test_a_folder_whose_name_is_too_long(run, tmp_path):
    status, _, err = run("fit", "iris", "--out", str(tmp_path / ("x" * 300)))
    assert status == 1
    assert err.startswith("Error: cannot write to ")
    assert err.endswith("File name too long\n")


def test_shard_is_for_several_processes(run):
    status, stdout, err = run("fit", "wine", "--shard", "gates")
    assert (status, stdout) == (2, "")
    assert err == "Error: shard is 'gates', which says what --distributed shares out; give that too\n"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_standard_output_on_a_full_disk(options):
    command = [sys.executable, "-m", "cvxnn.cli", "datasets", "list", *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    # With --json the table for people is on standard error.
    assert done.stderr.endswith("Error: cannot write to standard output: No space left on device\n")


def test_parquet(run_json, mixed, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "mixed.parquet"
    pd.read_csv(mixed).to_parquet(path)
    assert run_json("fit", path, "--n-gates", "5", "--beta", "0.01")[1]["data"]["task"] == "classification"


def test_predict_writes_files(run_json, fitted, tmp_path):
    status, document, _ = run_json("predict", fitted / "model.safetensors", "iris", "--out", tmp_path)
    assert status == 0
    assert document["files"] == ["predictions.csv", "metrics.json", "predictions.png"]
    assert {path.name for path in tmp_path.iterdir()} == set(document["files"])
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=reject) == document
    table = pd.read_csv(tmp_path / "predictions.csv")
    model = cvxnn.load(fitted / "model.safetensors")
    assert table["prediction"].tolist() == model.predict(model.preprocessor_.transform(load_dataset("iris").X)).tolist()
    assert document["scores"]["accuracy"] == np.mean(table["prediction"] == load_dataset("iris").y)


def test_certify_repeats_the_certificate_of_training(run_json, run, fitted):
    status, document, _ = run_json("certify", fitted / "model.safetensors", "iris")
    stored = json.loads((fitted / "metrics.json").read_text())["certificate"]
    assert status == 0
    assert (document["data"]["rows"], document["data"]["n_rows"]) == ("train", 120)
    assert document["certificate"]["primal"] == pytest.approx(stored["primal"], rel=1e-9)
    assert document["certificate"]["relative_gap"] == pytest.approx(stored["relative_gap"], abs=1e-9)
    assert "given_gates" in run("certify", fitted / "model.safetensors", "iris")[1]


@pytest.mark.parametrize("norms", ["l1,l2", "l2,l1", "l2,linf"])
def test_certify_with_other_norms(run_json, tmp_path, norms):
    """The stored neurons certify as tightly as the point in training."""
    options = ["--norms", norms, "--n-gates", "10", "--beta", "0.01", "--tol", "1e-3", "--out", tmp_path]
    status, trained, _ = run_json("fit", "iris", *options)
    assert status == 0
    status, document, _ = run_json("certify", tmp_path / "model.safetensors", "iris")
    assert status == 0
    assert document["certificate"]["penalty"] == pytest.approx(trained["certificate"]["penalty"], rel=1e-9)
    assert document["certificate"]["relative_gap"] == pytest.approx(trained["certificate"]["relative_gap"], abs=1e-8)


def test_certify_sees_the_neurons(run_json, tmp_path):
    """Not the smallest norm of their sum: neurons that cancel cost something."""
    options = ["--norms", "l1,l2", "--n-gates", "10", "--beta", "0.01", "--out", tmp_path]
    assert run_json("fit", "iris", *options)[0] == 0
    model = cvxnn.load(tmp_path / "model.safetensors")
    network = model.network_
    for name, axis in (("hidden", 1), ("output", 0), ("gate_index", 0)):
        twice = [getattr(network, name).detach()] * 2
        scaled = [twice[0] * 1.5, -twice[1] * 0.5] if name == "output" else twice
        joined = torch.cat(scaled, dim=axis)
        setattr(network, name, joined if name == "gate_index" else torch.nn.Parameter(joined))
    cvxnn.save(model, tmp_path / "model.safetensors")
    status, document, _ = run_json("certify", tmp_path / "model.safetensors", "iris")
    assert status == 3
    assert document["certificate"]["penalty"] == pytest.approx(2 * model.certificate_.penalty, rel=1e-9)


def test_certify_says_when_it_is_not(run_json, fitted):
    model = fitted / "model.safetensors"
    for options in (["--rows", "all"], ["--beta", "0.1"], ["--tol", "1e-9"], ["--loss", "huber"]):
        status, document, err = run_json("certify", model, "iris", *options)
        assert (status, document["certified"]) == (3, False), options
        assert "Warning: not certified to tol" in err
        assert document["certificate"]["lower_bound"] <= document["certificate"]["primal"]


def test_certify_takes_models_from_python(run_json, tmp_path):
    frame = load_dataset("iris").X
    y = load_dataset("iris").y
    model = cvxnn.ConvexMLPClassifier(n_gates=10, beta=0.01, random_state=0).fit(frame, y.to_numpy(dtype=str))
    cvxnn.save(model, tmp_path / "m.safetensors")
    status, document, _ = run_json("certify", tmp_path / "m.safetensors", "iris")
    assert (status, document["data"]["rows"]) == (0, "all")
    status, document, _ = run_json("predict", tmp_path / "m.safetensors", "iris", "--target", "target")
    assert document["scores"]["accuracy"] == model.score(frame, y)


def test_not_certified(run, run_json, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, out, err = run("fit", "iris", "--max-iter", "1", "--tol", "1e-9", "--quiet", "--out", tmp_path)
    assert (status, out) == (3, "")
    assert err.startswith("Warning: not certified to tol=1e-09: training ended as 'max_iter'")
    assert err.count("\n") == 1
    assert (tmp_path / "model.safetensors").exists()
    status, document, _ = run_json("fit", "iris", "--max-iter", "1", "--tol", "1e-9")
    assert (status, document["certified"], document["status"]) == (3, False, "max_iter")


def test_interrupted(run_json, tmp_path, monkeypatch):
    from cvxnn.solvers.admm import Admm

    step, steps = Admm.step, []

    def interrupt(self):
        steps.append(1)
        if len(steps) > 12:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Admm, "step", interrupt)
    status, document, _ = run_json("fit", "iris", "--tol", "0", "--out", tmp_path)
    assert (status, document["status"]) == (3, "interrupted")
    model = cvxnn.load(tmp_path / "model.safetensors")
    assert model.status_ == "interrupted"
    frame = load_dataset("iris")
    predicted = model.predict(model.preprocessor_.transform(frame.X))
    train, _ = split_rows(frame.y.to_numpy(), "classification", 0.2, 0)
    assert np.mean(predicted[train] == frame.y.to_numpy()[train]) == document["scores"]["train"]["accuracy"] > 0.8


def test_interrupted_before_anything(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cvxnn.cli.data.load_dataset", interrupt)
    assert run("fit", "iris")[0] == 130


BAD = {
    "nan": ("a,b,y\n1,,u\n2,5,v\n3,,u\n4,4,v\n", [], 1, "'b' has missing values (NaN) in 2 of 4 rows"),
    "infinity": ("a,b,y\n1,inf,u\n2,5,v\n3,6,u\n4,4,v\n", [], 1, "'b' has infinite values in 1 of 4 rows"),
    "nan in target": ("a,y\n1,1.5\n2,\n", [], 1, "'y' has missing values"),
    "infinity in target": ("a,y\n1,1.5\n2,inf\n", [], 1, "'y' has infinite values"),
    "ragged": ("a,y\n1,u\n2\n", [], 1, "line 3 has 1 fields; 2"),
    "one class": ("a,y\n1,u\n2,u\n3,u\n", [], 1, "'y' has only one class, 'u'; at least two are wanted"),
    "empty": ("", [], 1, "is empty"),
    "header only": ("a,y\n", [], 1, "has no rows"),
    "no features": ("y\nu\nv\n", [], 1, "has only one column"),
    "nothing varies": ("a,y\n1,u\n1,v\n1,v\n", [], 1, "no column of the table varies"),
    "one row": ("a,y\n1,0.5\n", [], 1, "no column of the table varies"),
    "too few rows": ("a,y\n1,0.5\n2,0.7\n", ["--test-size", "0.9"], 1, "too few to hold out"),
    "text for regression": ("a,y\n1,u\n2,v\n", ["--task", "regression"], 1, "numbers are wanted"),
    "fractions as classes": ("a,y\n1,0.5\n2,1.5\n", ["--task", "classification"], 2, "not whole"),
    "unknown target": ("a,y\n1,u\n2,v\n", ["--target", "z"], 2, "--target is 'z'; one of the columns 'a', 'y'"),
    "unknown task": ("a,y\n1,u\n2,v\n", ["--task", "ranking"], 2, "task is 'ranking'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(run, run_json, tmp_path, case):
    content, options, expected, message = BAD[case]
    path = tmp_path / "t.csv"
    path.write_text(content)
    out = tmp_path / "a" / "b"
    status, stdout, err = run("fit", path, *options, "--out", out)
    assert (status, stdout) == (expected, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "a").exists()
    status, document, _ = run_json("fit", path, *options)
    assert status == expected
    assert set(document) == {"error"}
    assert message in document["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "0"], "beta is 0.0; a positive number"),
        (["--beta", "-1"], "beta is -1.0"),
        (["--beta", "nan"], "beta is nan"),
        (["--beta", "some"], "--beta is 'some'; a positive number or 'auto'"),
        (["--tol", "-1"], "tol is -1.0"),
        (["--n-gates", "0"], "n_gates is 0"),
        (["--n-gates", "two"], "--n-gates"),
        (["--max-iter", "0"], "max_iter is 0"),
        (["--time-limit", "-2"], "time_limit is -2.0"),
        (["--activation", "tanh"], "activation is 'tanh'"),
        (["--activation", "tanh"], "activation is 'tanh'"),
        (["--loss", "hinge"], "loss is 'hinge'"),
        (["--solver", "adam"], "solver is 'adam'"),
        (["--rank", "3"], "rank=3"),
        (["--norms", "l2"], "norms"),
        (["--norms", "l2,l3"], "l3"),
        (["--gates", "some"], "gates is 'some'"),
        (["--gate-sampling", "some"], "gate_sampling is 'some'"),
        (["--gate-quantile", "2"], "quantile is 2.0"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--random-state", "-1"], "random_state is -1"),
        (["--solver-option", "x"], "NAME=VALUE"),
        (["--solver-option", "x=1"], "solver_options has 'x'"),
        (["--test-size", "1"], "--test-size is 1.0"),
        (["--test-size", "nan"], "--test-size is nan"),
        (["--verbose", "--quiet"], "--verbose and --quiet"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_use(run_json, options, message):
    status, document, err = run_json("fit", "iris", *options)
    assert status == 2
    assert message in document["error"]
    assert message in err


def test_unknown_names(run, tmp_path):
    status, _, err = run("fit", "mnist")
    assert status == 2
    assert "one of breast_cancer, diabetes" in err
    assert run("fit", tmp_path / "none.csv")[0] == 1
    assert run("fit", tmp_path)[0] == 1
    assert run("frobnicate")[0] == 2
    assert run("fit")[0] == 2


def test_impossible_output(run, tmp_path, fitted):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = run("fit", "iris", "--out", out)
        assert status == 1
        assert "is not a folder" in err
        assert run("predict", fitted / "model.safetensors", "iris", "--out", out)[0] == 1
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_half_written(run, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise StorageError("cannot write gates.png: No space left on device")

    monkeypatch.setattr("cvxnn.plotting.plot_gates", full)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("old")
    for name in ("old", "new"):
        status, _, err = run("fit", "iris", "--n-gates", "5", "--out", tmp_path / name)
        assert status == 1
        assert "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.read_text() for path in (tmp_path / "old").iterdir()] == ["old"]


def test_output_folder_moves_files_together(tmp_path):
    with output_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b" / "x").exists()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


@pytest.mark.parametrize("command", ["predict", "certify"])
def test_models_that_cannot_be_used(run, run_json, fitted, tmp_path, command):
    whole = (fitted / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    cases = {"damaged": whole[:-100], "empty": b"", "text": b"a,b\n1,2\n", "flipped": bytes(flipped)}
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        status, document, _ = run_json(command, path, "iris")
        assert status == 1, name
        assert name in document["error"]
    assert run(command, tmp_path / "none.safetensors", "iris")[0] == 1
    cvxnn.save(cvxnn.load(fitted / "model.safetensors").network_, tmp_path / "bare.safetensors")
    assert "bare network" in run(command, tmp_path / "bare.safetensors", "iris")[2]
    status, _, err = run(command, fitted / "model.safetensors", "wine")
    assert status == 1
    assert "'sepal length (cm)'" in err


def test_certify_refuses(run, fitted, tmp_path):
    model = fitted / "model.safetensors"
    for options, expected, message in (
        (["--activation", "relu"], 2, "--activation is 'relu', but the model is 'gated_relu'"),
        (["--beta", "0"], 2, "beta is 0.0"),
        (["--loss", "hinge"], 2, "loss is 'hinge'"),
        (["--reduction", "max"], 2, "reduction is 'max'"),
        (["--rows", "some"], 2, "rows is 'some'"),
        (["--tol", "nan"], 2, "tol is nan"),
        (["--target", "z"], 2, "--target is 'z'"),
        (["--target", "sepal length (cm)"], 1, "which is no class of the model"),
    ):
        status, _, err = run("certify", model, "iris", *options)
        assert (status, message in err) == (expected, True), err
    frame = load_dataset("iris").X
    frame.to_csv(tmp_path / "unlabelled.csv", index=False)
    status, _, err = run("certify", model, tmp_path / "unlabelled.csv")
    assert status == 1
    assert "lacks the target column 'target'" in err


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["a", "b"] * 20, "classification"),
        ([True, False] * 20, "classification"),
        ([1, 2] * 20, "classification"),
        (list(range(20)) * 2, "classification"),
        (list(range(21)) * 2, "regression"),
        ([1.0, 2.0] * 20, "regression"),
    ],
)
def test_task_is_inferred(values, task):
    assert target_values(pd.Series(values, name="y"), None)[1] == task


def test_split_is_stratified_where_it_can_be():
    y = np.repeat([0, 1], [90, 10])
    train, test = split_rows(y, "classification", 0.2, 0)
    assert np.bincount(y[test]).tolist() == [18, 2]
    assert sorted([*train, *test]) == list(range(100))
    rare = np.append(y, 2)
    assert len(split_rows(rare, "classification", 0.2, 0)[1]) == 21


def test_internal_errors_are_a_sentence(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("some\nthing")

    monkeypatch.setattr("cvxnn.cli.data.load_dataset", broken)
    status, _, err = run("fit", "iris")
    assert status == 1
    assert err.startswith("Error: RuntimeError: some ")
    monkeypatch.setenv("CVXNN_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["fit", "iris"])


def process(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cvxnn.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_process_with_json(tmp_path):
    with process("fit", "iris", "--json", "--n-gates", "5", "--out", tmp_path / "o") as running:
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0
    assert json.loads(out, parse_constant=reject)["certified"] is True
    assert "relative gap" in err


def test_process_fails_without_a_traceback(tmp_path):
    with process("fit", tmp_path / "none.csv") as running:
        out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (1, "")
    assert err.count("\n") == 1


def test_process_is_interrupted(tmp_path):
    options = ["--tol", "0", "--max-iter", "100000000", "--solver", "fista", "--verbose", "--out", tmp_path / "o"]
    with process("fit", "iris", *options) as running:
        running.stderr.readline()  # the first certificate: training goes on
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=120)
    assert running.returncode == 3
    assert "interrupted after" in out
    assert cvxnn.load(tmp_path / "o" / "model.safetensors").status_ == "interrupted"


def test_an_empty_folder_name_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "iris", "--out", ""]) == 2
    assert "--out is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_categories_and_classes_are_mentioned(tmp_path, capsys):
    rows = ["x,kind,y"] + [f"{i / 10},{'ab'[i % 2]},{['no', 'yes'][i % 2]}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "new.csv").write_text("x,kind,y\n0.1,new,no\n0.2,a,maybe\n")
    assert main(["fit", str(tmp_path / "train.csv"), "--out", str(tmp_path / "m"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "m/model.safetensors"), str(tmp_path / "new.csv")]) == 0
    said = capsys.readouterr().err
    assert "'new'" in said
    assert "no score" in said
