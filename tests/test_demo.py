"""The demonstration, on few digits."""

import dataclasses
import math

import pytest

import cvxnn
from cvxnn import demo


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_demo(tmp_path, capsys):
    out = tmp_path / "deep" / "demo"
    assert demo.main(["--out", str(out), "--folds", "2", "--samples", "150"]) == 0
    printed = capsys.readouterr().out
    for name in ("ConvexMLPClassifier", "MLPClassifier", "LogisticRegression", "no choice of weights gets below"):
        assert name in printed
    names = {"gap.png", "gates.png", "confusion.png", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert all(name in printed for name in names)
    model = cvxnn.load(out / "model.safetensors")
    assert model.certificate_.relative_gap <= model.tol
    cells = next(line for line in printed.splitlines() if line.startswith("ConvexMLPClassifier")).split()
    assert float(cells[2].rstrip("%")) > 85


def test_explain_promises_nothing_without_a_bound():
    model = cvxnn.ConvexMLPClassifier(random_state=0).fit([[0.0], [1.0]], [0, 1])
    assert "above the lowest value" in demo.explain(model.certificate_)
    nothing = dataclasses.replace(model.certificate_, relative_gap=math.inf, lower_bound=0.0)
    assert "proves nothing" in demo.explain(nothing)


def test_demo_with_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 1
    assert capsys.readouterr().err.startswith("Error: cannot write to")
