"""``cvxnn certify`` for weights that were trained elsewhere: files read without executing anything in them."""

import json
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import cvxnn
from cvxnn.audit import certify_network
from cvxnn.cli import main

BETA = 0.05


def reject(token):
    raise AssertionError(f"{token} is no JSON")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    def call(*arguments):
        status, out, err = run(*arguments, "--json")
        assert out.count("\n") == 1
        return status, json.loads(out, parse_constant=reject), err

    return call


@pytest.fixture
def table(tmp_path):
    """A file with two features and a target, its arrays, and a network for them."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((15, 2))
    y = np.tanh(X @ [1.0, -2.0]) + 0.1 * rng.standard_normal(15)
    path = tmp_path / "data.csv"
    pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": y}).to_csv(path, index=False, float_format="%.17g")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 1)).double()
    return path, X, y, net


def written(folder, net):
    """The weights of a network in every format."""
    state = net.state_dict()
    save_file(state, folder / "net.safetensors")
    torch.save(state, folder / "net.pt")
    torch.save({"epoch": 1, "model_state_dict": state}, folder / "net.pth")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    np.savez(folder / "net.npz", W1=state["0.weight"], W2=state["2.weight"], b2=state["2.bias"])
    return ["net.safetensors", "net.pt", "net.pth", "legacy.pt", "net.npz"]


def test_every_format(run_json, table, tmp_path):
    path, X, y, net = table
    expected = certify_network(net, X, y, beta=BETA, time_limit=0)
    for name in written(tmp_path, net):
        status, document, err = run_json("certify", tmp_path / name, path, "--beta", BETA, "--time-limit", 0)
        assert status == 3
        assert "not certified" in err
        assert "taken as they are" in err
        assert document["report"]["objective"] == pytest.approx(expected.objective, rel=1e-12)
        assert document["certificate"]["lower_bound"] == pytest.approx(expected.certificate.lower_bound, rel=1e-9)
        assert document["certified"] is False
        assert document["activation"] == "relu"
        assert document["data"]["n_rows"] == 15


def test_optimal_weights_are_certified(run, run_json, table, tmp_path):
    path, X, y, net = table
    best = certify_network(net, X, y, beta=BETA, time_limit=0).improve(time_limit=10)
    torch.save(best.network().state_dict(), tmp_path / "best.pt")
    status, document, _ = run_json("certify", tmp_path / "best.pt", path, "--beta", BETA)
    assert status == 0
    assert document["certified"] is True
    assert document["certificate"]["scope"] == "relu_network"
    assert document["certificate"]["relative_gap"] <= 1e-4
    status, out, _ = run("certify", tmp_path / "best.pt", path, "--beta", BETA)
    assert status == 0
    assert "relu_network" in out


def test_options(run_json, tmp_path):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"u": 5 + 3 * rng.standard_normal(12), "colour": ["red", "blue"] * 6})
    frame["kind"] = np.where(frame["u"] > 5, "big", "small")
    frame.to_csv(tmp_path / "d.csv", index=False)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    torch.save(net.state_dict(), tmp_path / "n.pt")
    model = ("certify", tmp_path / "n.pt", tmp_path / "d.csv", "--beta", BETA, "--time-limit", 0)
    status, document, _ = run_json(
        *model, "--standardise", "--penalize-biases", "--loss", "cross_entropy", "--gates", 5, "--reduction", "sum"
    )
    assert status == 3
    assert set(document["report"]["certificates"]) == {"network_gates", "sampled_gates", "relu_network"}
    z = (frame["u"] - frame["u"].mean()) / frame["u"].std(ddof=0)
    X = np.column_stack([z, frame["colour"] == "blue", frame["colour"] == "red"]).astype(float)
    outputs = net(torch.from_numpy(X)).detach()
    labels = torch.from_numpy((frame["kind"] == "small").to_numpy().astype(int))
    penalty = BETA / 2 * sum(float(p.detach().square().sum()) for p in net.parameters())
    value = float(nn.functional.cross_entropy(outputs, labels, reduction="sum")) + penalty
    assert document["report"]["objective"] == pytest.approx(value, rel=1e-9)
    status, _, err = run_json(*model, "--standardise")
    assert status == 2
    assert "hidden bias" in err
    status, _, err = run_json(*model)
    assert status == 1
    assert "real numbers are wanted" in err


def test_linear_weights(run_json, table, tmp_path):
    path, _, _, net = table
    torch.save(net.state_dict(), tmp_path / "n.pt")
    _, document, _ = run_json("certify", tmp_path / "n.pt", path, "--beta", BETA, "--activation", "linear")
    assert document["certificate"]["scope"] == "linear_network"


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_nothing_is_executed(run_json, table, tmp_path):
    path, _, _, net = table
    trap = tmp_path / "trap"
    torch.save({"0.weight": Malicious(trap)}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious(trap)))
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"0.weight": Malicious(trap)}, protocol=2))
    np.savez(tmp_path / "evil.npz", W1=np.array([Malicious(trap)], dtype=object))
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Malicious(trap)))
    torch.save(net, tmp_path / "module.pt")
    for name in ("evil.pt", "raw.pt", "raw.pth", "evil.npz", "evil.safetensors", "module.pt"):
        status, document, _ = run_json("certify", tmp_path / name, path, "--beta", BETA)
        assert status == 1, name
        assert name in document["error"]
        assert not trap.exists()
    # The trap works.
    pickle.loads((tmp_path / "raw.pt").read_bytes())
    assert trap.exists()


def test_files_that_are_refused(run_json, table, tmp_path):
    path, _, _, net = table
    for name in written(tmp_path, net):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"half{name}").write_bytes(whole[: len(whole) // 2])
        status, document, _ = run_json("certify", tmp_path / f"half{name}", path, "--beta", BETA)
        assert status == 1
        assert f"half{name}" in document["error"]
    for name, content in (("empty.pt", b""), ("text.npz", b"a,b\n"), ("text.pth", b"a,b\n1,2\n")):
        (tmp_path / name).write_bytes(content)
        assert run_json("certify", tmp_path / name, path, "--beta", BETA)[0] == 1
    assert run_json("certify", tmp_path / "none.pt", path, "--beta", BETA)[0] == 1
    (tmp_path / "folder.pt").mkdir()
    assert run_json("certify", tmp_path / "folder.pt", path, "--beta", BETA)[0] == 1
    torch.save([1, 2], tmp_path / "list.pt")
    status, document, _ = run_json("certify", tmp_path / "list.pt", path, "--beta", BETA)
    assert (status, "holds a list" in document["error"]) == (1, True)


def test_wrong_use(run, table, tmp_path):
    path, _, _, net = table
    written(tmp_path, net)
    model = tmp_path / "net.pt"
    for options, message in (
        ([], "--beta is missing"),
        (["--beta", "-1"], "beta is -1.0"),
        (["--beta", "1", "--rows", "all"], "--rows is for models"),
        (["--beta", "1", "--task", "both"], "task is 'both'"),
        (["--beta", "1", "--gates", "some"], "--gates is 'some'"),
        (["--beta", "1", "--activation", "tanh"], "activation is 'tanh'"),
        (["--beta", "1", "--loss", "hinge"], "loss is 'hinge'"),
        (["--beta", "1", "--target", "z"], "--target is 'z'"),
        (["--beta", "1", "--target", "b"], None),
    ):
        status, _, err = run("certify", model, path, *options, "--time-limit", 0)
        assert (status, message is None or message in err) == (3 if message is None else 2, True), err


def test_networks_saved_by_this_package(run, run_json, table, tmp_path):
    path, X, y, _ = table
    problem = cvxnn.mlp_problem(X, y, n_gates=20, beta=BETA)
    cvxnn.save(cvxnn.solve(problem, tol=1e-6).network(), tmp_path / "bare.safetensors")
    status, document, _ = run_json("certify", tmp_path / "bare.safetensors", path, "--beta", BETA)
    assert status == 0
    assert document["certificate"]["scope"] == "given_gates"
    assert "bare network" in run("certify", tmp_path / "bare.safetensors", path)[2]


def test_relu_models_of_fit(run_json, table, tmp_path):
    path, _, _, _ = table
    options = ("--activation", "relu", "--gates", "enumerate", "--beta", BETA, "--test-size", 0)
    status, _, err = run_json("fit", path, *options, "--no-hidden-bias", "--out", tmp_path / "o")
    assert status == 0, err
    status, document, _ = run_json("certify", tmp_path / "o" / "model.safetensors", path)
    assert status == 0
    assert document["certificate"]["scope"] == "relu_network"
    assert document["report"]["activation"] == "relu"
    status, _, err = run_json("certify", tmp_path / "o" / "model.safetensors", path, "--gates", 3)
    assert (status, "--gates is for weights" in err) == (2, True)
