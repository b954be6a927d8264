"""``cvxnn fit --distributed`` under torchrun, and training that goes on from a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cvxnn.cli import main

ARGUMENTS = ["fit", "wine", "--n-gates", "6", "--tol", "1e-3", "--solver", "admm", "--json"]


def test_two_processes(tmp_path, capsys):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "cvxnn.cli"]
    out = tmp_path / "out"
    shared = [*ARGUMENTS, "--distributed", "--device", "cpu", "--out", str(out), "--solver-option", "side=features"]
    done = subprocess.run([*launcher, *shared], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"]["number"] == 2
    assert json.loads((out / "metrics.json").read_text())["status"] == "certified"
    assert main([*ARGUMENTS, "--solver-option", "side=features"]) == 0
    alone = json.loads(capsys.readouterr().out)
    for name in ("primal", "lower_bound"):
        assert document["certificate"][name] == pytest.approx(alone["certificate"][name], rel=1e-9)
    assert document["scores"] == alone["scores"]


def test_processes_are_wanted(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main([*ARGUMENTS, "--distributed"]) == 2
    assert "torchrun --nproc-per-node=N" in capsys.readouterr().err


def test_training_goes_on_from_a_checkpoint(tmp_path, capsys):
    file = tmp_path / "run.safetensors"
    arguments = [*ARGUMENTS, "--tol", "1e-9"]
    kept = ["--checkpoint", str(file)]
    assert main([*arguments, *kept, "--max-iter", "5"]) == 3
    assert file.exists()
    capsys.readouterr()
    assert main([*arguments, *kept, "--resume"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    assert resumed["certificate"]["primal"] == whole["certificate"]["primal"]
    assert resumed["n_iter"] == whole["n_iter"]


def test_wrong_use_of_checkpoints(capsys):
    assert main([*ARGUMENTS, "--resume"]) == 2
    assert "--resume is given without --checkpoint" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--beta", "auto", "--checkpoint", "x"]) == 2
    assert "--beta auto" in capsys.readouterr().err
    assert not Path("x").exists()
