"""``cvxnn reproduce complexity``: cells, files, exponents, verdicts, resuming, and wrong use."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cvxnn.cli import app, main
from cvxnn.errors import InvalidInputError
from cvxnn.experiments.complexity import (
    COMPLEXITY_COLUMNS,
    COMPLEXITY_SCALES,
    METHODS,
    ComplexityCell,
    ComplexityGrid,
    Sweep,
    time_cell,
)
from cvxnn.experiments.complexity_fits import fit_exponents, growth_factors, judge_complexity

TINY = ComplexityGrid(
    sweeps=(
        Sweep("n", "n", (8, 12)),
        Sweep("n-rank2", "n", (8, 12, 16), ("frank_wolfe_faces",), (("d", 2),)),
        Sweep("d", "d", (2, 3)),
        Sweep("P", "n_gates", (2, 3)),
        Sweep("m", "m", (1, 2, 3), ("projected_gradient",)),
    ),
    n=10,
    n_gates=3,
    m=1,
    seeds=(0,),
    seconds=0.003,
)
N_CELLS = 8 + 3 + 8 + 8 + 3


@pytest.fixture(scope="module", autouse=True)
def tiny_scale():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPLEXITY_SCALES, "tiny", TINY)
        yield


def reproduce(*arguments):
    found = CliRunner().invoke(
        app, ["reproduce", "complexity", "--scale", "tiny", "--jobs", "1", *map(str, arguments)], standalone_mode=False
    )
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.return_value, found.stdout, found.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "complexity"
    status, stdout, _ = reproduce("--out", out)
    assert status == 0
    return out, stdout


def test_files_and_report(finished):
    out, stdout = finished
    names = {"report.md", "timings.csv", "exponents.csv", "complexity.png", "metrics.json"}
    assert {path.name for path in out.iterdir()} == names | {"cells"}
    assert (out / "complexity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.md").read_text()
    for name in names - {"report.md", "metrics.json"}:
        assert f"({name})" in page
    assert "O(P n^r)" in page and "O(P (n^3 + n^2 (d + c + d m) + d c m))" in page
    assert not [line for line in page.splitlines() if line.startswith("|") and "nan" in line]
    assert "projected gradient is polynomial" in stdout
    frame = pd.read_csv(out / "timings.csv")
    assert tuple(frame.columns) == COMPLEXITY_COLUMNS
    assert len(frame) == N_CELLS
    assert set(frame["method"]) == set(METHODS)
    assert (frame["median_seconds"] > 0).all() and (frame["n_timed"] >= 1).all()
    assert (frame["smallest_seconds"] <= frame["median_seconds"]).all()
    assert (frame["median_seconds"] <= frame["largest_seconds"]).all()
    for parameter in ("n", "d", "n_gates", "m"):
        part = frame[frame["parameter"] == parameter]
        assert (part["value"] == part[parameter]).all()


def test_json_and_resume(finished, tmp_path, capsys):
    cells = tmp_path / "cells"
    cells.mkdir()
    for path in (finished[0] / "cells").iterdir():
        (cells / path.name).write_bytes(path.read_bytes())
    next(cells.iterdir()).unlink()
    arguments = ["reproduce", "complexity", "--scale", "tiny", "--jobs", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["n_cells"], document["n_resumed"]) == (N_CELLS, N_CELLS - 1)
    assert document == json.loads((tmp_path / "metrics.json").read_text())
    assert [claim["verdict"] for claim in document["claims"]] and len(document["claims"]) == 4
    assert {fit["parameter"] for fit in document["exponents"]} == {"n", "d", "n_gates", "m"}
    before, after = (pd.read_csv(folder / "timings.csv") for folder in (finished[0], tmp_path))
    assert (before["median_seconds"] == after["median_seconds"]).sum() >= N_CELLS - 1


@pytest.mark.parametrize("method", METHODS)
def test_cells_are_what_they_say(method):
    cell = ComplexityCell("n", "n", method, n=9, d=3, n_gates=5, m=2, n_outputs=2, seed=1, seconds=0.0)
    problem = cell.problem()
    assert problem.n_gates == 5
    assert problem.operator.data_tensors()[0].shape == (9, 3)
    assert problem.Y.shape == (9, 2)
    assert 0 < problem.beta < problem.beta_max
    row = time_cell(cell)
    assert set(row) == set(COMPLEXITY_COLUMNS)
    assert row["n_timed"] == 1


def test_more_patterns_than_there_are():
    cell = ComplexityCell("n", "n", "projected_gradient", 2, 1, 5, 1, 1, 0, 0.0)
    with pytest.raises(InvalidInputError, match="patterns"):
        cell.problem()


def rows(method, seconds, parameter="n", values=(10, 20, 40, 80), sweep=None, noise=0.0, **fields):
    """Synthetic rows: seconds is a function of the value."""
    rng = np.random.default_rng(0)
    common = {"n": 10, "d": 3, "n_gates": 5, "m": 2, "n_outputs": 2, "n_timed": 9} | fields
    out = []
    for value in values:
        for seed in range(3):
            median = seconds(value) * math.exp(noise * rng.standard_normal())
            row = {"sweep": sweep or parameter, "parameter": parameter, "value": value, "method": method, "seed": seed}
            times = dict.fromkeys(("median_seconds", "smallest_seconds", "largest_seconds"), median)
            out.append(row | common | {parameter: value} | times)
    return out


def test_exponents_of_known_powers():
    frame = pd.DataFrame(
        rows("projected_gradient", lambda n: 1e-3 * n**1.5, noise=0.05)
        + rows("frank_wolfe_faces", lambda n: 1e-6 * n**3)
    )
    first, second = fit_exponents(frame)
    assert first.low < 1.5 < first.high and first.high - first.low < 0.3
    assert second.exponent == pytest.approx(3) and second.tail == pytest.approx(3)
    assert (second.smallest, second.largest, second.n_points, second.d) == (10, 80, 12, 3)


def test_exponents_see_a_constant_cost():
    frame = pd.DataFrame(rows("frank_wolfe_faces", lambda n: 1.0 + 1e-4 * n**2))
    fit = fit_exponents(frame)[0]
    assert fit.exponent < fit.tail < 2


def exact(power, factor=8.0):
    faces = "frank_wolfe_faces"
    return [
        *rows(faces, lambda n: 1e-3 * n ** power(2), sweep="a", d=2),
        *rows(faces, lambda n: 1e-3 * n ** power(3), sweep="b", d=3),
        *rows(faces, lambda d: 1e-3 * factor**d, parameter="d", values=(2, 3, 4)),
    ]


def test_verdicts_follow_their_rules():
    cheap = rows("projected_gradient", lambda n: 1e-5 * n)
    claims = judge_complexity(pd.DataFrame(cheap + exact(lambda r: r)))
    assert [claim.verdict for claim in claims] == ["held", "held", "held", "not tested"]
    dear = rows("projected_gradient", lambda n: n**3.5)
    claims = judge_complexity(pd.DataFrame(dear + exact(lambda r: 0.1, factor=1.1)))
    assert [claim.verdict for claim in claims] == ["not held", "not held", "not held", "not tested"]
    claims = judge_complexity(pd.DataFrame(cheap + exact(lambda r: r, factor=1.1)))
    assert claims[1].verdict == "held in part"
    late = rows("projected_gradient", lambda n: 100.0 ** (n == 80))
    assert judge_complexity(pd.DataFrame(late))[0].verdict == "held in part"
    for power, verdict in ((1.0, "held"), (2.5, "not held")):
        atoms = rows("frank_wolfe_alternating", lambda n, power=power: n**power)
        assert judge_complexity(pd.DataFrame(atoms))[3].verdict == verdict


def test_growth_factors():
    frame = pd.DataFrame(rows("frank_wolfe_faces", lambda d: 3.0**d, parameter="d", values=(2, 3, 5)))
    assert growth_factors(frame, "frank_wolfe_faces") == [(2, 3, pytest.approx(3)), (3, 5, pytest.approx(3))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complexity", "--scale", "huge"], ("scale", "'huge'", "'quick'", "'paper'")),
        (["complexity", "--reduction", "mean"], ("--reduction", "'mean'", "'spiral'")),
        (["simplicity"], ("STUDY", "'simplicity'", "'complexity'")),
    ],
)
def test_wrong_use(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not list(tmp_path.iterdir())
