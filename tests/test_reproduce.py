"""``cvxnn reproduce spiral``: rows, files, resuming, the rules for the claims, and wrong use."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import cvxnn
from cvxnn.cli import app, main
from cvxnn.datasets import spiral
from cvxnn.errors import InvalidInputError
from cvxnn.experiments import claims, sweep
from cvxnn.experiments.figures import draw_figures
from cvxnn.experiments.report import summary_of, write_report
from cvxnn.experiments.spiral import COLUMNS, FEW_GATES, POLISHED, SCALES, SpiralGrid, solve_cell
from cvxnn.experiments.stationary import nearby_stationary_point

TINY = SpiralGrid(sizes=(3, 6), betas=(1e-2, 1e-1), ranks=(1, 2), seeds=(0,), n_gates=20, epochs=60, polish_seconds=0.5)


@pytest.fixture(scope="module", autouse=True)
def tiny_scale():
    """A third scale that takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "tiny", TINY)
        yield


def reproduce(*arguments):
    """Run the command in this process; exit status, standard output, standard error."""
    found = CliRunner().invoke(
        app, ["reproduce", "spiral", "--scale", "tiny", "--jobs", "1", *map(str, arguments)], standalone_mode=False
    )
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.return_value, found.stdout, found.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished study, and what was printed."""
    out = tmp_path_factory.mktemp("study") / "deep" / "spiral"
    status, stdout, stderr = reproduce("--out", out)
    assert status == 0
    return out, stdout, stderr


@pytest.fixture(scope="module")
def runs(finished):
    return pd.read_csv(finished[0] / "runs.csv")


def test_files_and_report(finished):
    out, stdout, stderr = finished
    pictures = {"figure2", "figure3", "figure4", "figure2_all", "figure4_all", "figure2_global", "figure4_global"}
    names = {f"{name}.png" for name in pictures | {"ratio", "times"}} | {"report.md", "runs.csv", "metrics.json"}
    assert {path.name for path in out.iterdir()} == names | {"cells"}
    assert len(list((out / "cells").glob("*.json"))) == 8
    for path in out.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.md").read_text()
    for name in names - {"report.md", "metrics.json"}:
        assert f"({name})" in page
    assert "n = 3 puts the only sample of every class at the centre" in page
    assert "**Not the paper's scale**" in page
    assert "16 of 16 runs certified" in page
    assert not [line for line in page.splitlines() if line.startswith("|") and "nan" in line]
    assert "GD always converges: NOT HELD" in stdout
    assert "8/8" in stderr


def test_every_run_has_a_row(runs):
    assert tuple(runs.columns) == COLUMNS
    cell = ["interior_point", "admm"] + 2 * ["bm_gd", POLISHED, FEW_GATES, "bm_global"]
    assert list(runs["solver"]) == 8 * cell
    keys = ["scope", "n", "beta", "seed", "m", "solver"]
    assert not runs[keys].duplicated().any()
    assert set(runs["scope"]) == {"sampled", "all"}
    assert (runs.loc[runs["solver"] == "bm_gd", "n_iter"] <= 60).all()


def test_gaps_are_those_of_the_problem(runs):
    X, y = spiral(6)
    for row in runs[(runs["n"] == 6) & (runs["scope"] == "all")].itertuples():
        problem = cvxnn.mlp_problem(X, y, gates="enumerate", beta=row.beta, reduction="sum")
        optimum = cvxnn.solve(problem, "admm", tol=1e-9).certificate
        assert row.optimum_lower <= optimum.primal * (1 + 1e-12)
        assert row.optimum_upper >= optimum.lower_bound * (1 - 1e-12)
        assert row.true_gap == pytest.approx(max(0, row.primal / optimum.primal - 1), abs=1e-7)
        assert row.n_gates == problem.n_gates
        assert row.beta_max == pytest.approx(problem.beta_max)
        assert row.duality_gap >= row.true_gap - 1e-9


def test_stationary_points_and_second_order(runs):
    polished = runs[(runs["solver"] == POLISHED) & (runs["n"] == 6)]
    assert polished["is_stationary"].all()
    assert (polished["theorem_bound"] < 1e-4).all()
    assert set(polished["verdict"]) == {"global_optimum"}
    part = runs[(runs["solver"] == FEW_GATES) & (runs["n"] == 6)]
    assert part["is_stationary"].all()
    assert (part["true_gap"] > 1e-3).all()
    assert (part["theorem_bound"] >= part["duality_gap"]).all()
    assert (part["duality_gap"] >= part["true_gap"]).all()
    assert set(part["verdict"]) == {"saddle"}
    descent = runs[(runs["solver"] == "bm_gd") & (runs["n"] == 6)]
    assert not descent["is_stationary"].any()
    assert descent["theorem_bound"].isna().all()
    assert descent["smallest_eigenvalue"].notna().all()
    assert (descent["paper_bound"] > 0).all()


def test_times_are_of_the_gap_that_descent_reached(runs):
    descent = runs[(runs["solver"] == "bm_gd") & (runs["n"] == 6)].reset_index()
    wide = runs[(runs["solver"] == "bm_global") & (runs["n"] == 6)].reset_index()
    assert (descent["target_gap"] == np.maximum(descent["true_gap"], 1e-6)).all()
    assert (descent["target_gap"] == wide["target_gap"]).all()
    assert (descent["seconds_to_target_gap"] <= descent["seconds"]).all()
    assert (wide["seconds_to_target_gap"] <= wide["seconds"]).all()
    table = claims.speed_table(runs)
    assert list(table["same_gap"]) == list(descent["seconds_to_target_gap"] / wide["seconds_to_target_gap"])
    assert set(table["n"]) == {6}  # n = 3 has the optimum Z = 0


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("cvxnn.experiments.report.draw_figures", lambda *arguments: [])


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def counted(monkeypatch, no_pictures):
    """Labels of the cells that are computed."""
    seen = []

    def counting(cell):
        seen.append(cell.label)
        return solve_cell(cell)

    monkeypatch.setattr("cvxnn.experiments.spiral.solve_cell", counting)
    return seen


def test_resume_computes_only_what_is_missing_or_damaged(finished, counted, tmp_path):
    copy_of(finished[0] / "cells", tmp_path / "cells")
    files = sorted((tmp_path / "cells").iterdir())
    files[0].unlink()
    files[1].write_text(files[1].read_text()[:-100])
    changed = json.loads(files[2].read_text())
    changed["outcome"]["dict"]["rows"] = []
    files[2].write_text(json.dumps(changed))
    status, stdout, _ = reproduce("--out", tmp_path, "--resume")
    assert status == 0
    assert sorted(counted) == sorted(path.name.rpartition("-")[0] for path in files[:3])
    assert "(5 problems resumed)" in stdout
    before, after = (pd.read_csv(folder / "runs.csv") for folder in (finished[0], tmp_path))
    times = [name for name in COLUMNS if "seconds" in name]
    same = ~before["solver"].isin([POLISHED, FEW_GATES])  # which have a limit of time
    pd.testing.assert_frame_equal(before[same].drop(columns=times), after[same].drop(columns=times))


def test_other_settings_are_not_mixed_in(finished, counted, tmp_path):
    copy_of(finished[0] / "cells", tmp_path / "cells")
    reproduce("--out", tmp_path, "--resume", "--reduction", "mean")
    assert len(counted) == 8
    reproduce("--out", tmp_path, "--resume")
    assert len(counted) == 8
    assert len(list((tmp_path / "cells").iterdir())) == 16


def test_without_resume_everything_is_computed(finished, counted, tmp_path):
    copy_of(finished[0] / "cells", tmp_path / "cells")
    reproduce("--out", tmp_path, "--quiet")
    assert len(counted) == 8


def test_json(tmp_path, finished, capsys, no_pictures):
    copy_of(finished[0] / "cells", tmp_path / "cells")
    arguments = ["reproduce", "spiral", "--scale", "tiny", "--out", str(tmp_path), "--resume", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    document = json.loads(captured.out)
    assert document["certified"] is True
    assert document["n_resumed"] == document["n_cells"] == 8
    assert document["settings"]["epochs"] == 60
    assert [claim["verdict"] for claim in document["claims"]] and len(document["claims"]) == 5
    assert document == json.loads((tmp_path / "metrics.json").read_text())
    assert "Theorem 3.4" in captured.err


def test_uncertified_cells_are_status_3(tmp_path, monkeypatch, no_pictures):
    def pessimistic(cell):
        outcome = solve_cell(cell)
        outcome["rows"][-1]["status"] = "time_limit"
        return outcome

    monkeypatch.setattr("cvxnn.experiments.spiral.solve_cell", pessimistic)
    status, *_ = reproduce("--out", tmp_path)
    assert status == 3
    assert "8 of 16 runs certified" in (tmp_path / "report.md").read_text()


def test_an_interrupted_study_keeps_its_cells(tmp_path, monkeypatch, capsys):
    def interrupted(cell):
        if cell.n_samples == 3:
            raise KeyboardInterrupt
        return solve_cell(cell)

    monkeypatch.setattr("cvxnn.experiments.spiral.solve_cell", interrupted)
    assert main(["reproduce", "spiral", "--scale", "tiny", "--jobs", "1", "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "interrupted with 4 of 8 cells done; --resume" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]
    assert len(list((tmp_path / "cells").iterdir())) == 4


def test_ctrl_c_in_a_solver_is_no_result(monkeypatch):
    def cut_short(*arguments, **options):
        result = cvxnn.solve(*arguments, **options)
        return dataclasses.replace(result, status="interrupted")

    monkeypatch.setattr("cvxnn.experiments.spiral._warm_up", lambda: None)
    monkeypatch.setattr("cvxnn.experiments.spiral.solve", cut_short)
    with pytest.raises(KeyboardInterrupt):
        solve_cell(TINY.cells()[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vortex"], ("STUDY", "'vortex'", "'spiral'")),
        (["spiral", "--scale", "huge"], ("scale", "'huge'", "'quick'", "'paper'")),
        (["spiral", "--reduction", "max"], ("reduction", "'max'", "'mean'")),
        (["spiral", "--jobs", "0"], ("jobs", "0")),
        (["spiral", "--backend", "carrier_pigeon"], ("backend", "'carrier_pigeon'", "loky")),
        (["spiral", "--data-dir", "nowhere"], ("--data-dir", "'nowhere'", "folder")),
        (["spiral", "--out", ""], ("--out is empty",)),
        (["spiral", "--frob"], ("--frob",)),
    ],
)
def test_wrong_use(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_backends_that_are_not_installed(backend, monkeypatch):
    for name in ("dask", "distributed", "ray", "ray.util", "ray.util.joblib"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(InvalidInputError, match=backend), sweep.backend_context(backend, 1):
        pass


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "spiral", "--out", str(tmp_path / "file" / "x")]) == 1
    assert "is not a folder" in capsys.readouterr().err


@dataclass(frozen=True)
class Number:
    value: int

    @property
    def label(self) -> str:
        return f"number{self.value}"


def square(cell):
    return {"square": cell.value**2, "infinite": math.inf, "pid": os.getpid(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize(("backend", "jobs"), [("loky", 2), ("multiprocessing", 2), ("threading", 2), (None, 1)])
def test_sweeps_in_every_backend(backend, jobs, tmp_path):
    cells = [Number(value) for value in range(5)]
    seen = []
    threads = torch.get_num_threads()
    found = sweep.run_sweep(
        square, cells, tmp_path, jobs=jobs, backend=backend, done=lambda cell, old: seen.append((cell, old))
    )
    assert [outcome["square"] for outcome in found] == [0, 1, 4, 9, 16]
    assert all(outcome["threads"] == 1 for outcome in found)
    assert torch.get_num_threads() == threads
    assert any(outcome["pid"] != os.getpid() for outcome in found) == (backend in ("loky", "multiprocessing"))
    assert {cell.value for cell, _ in seen} == set(range(5)) and not any(old for _, old in seen)
    again = sweep.run_sweep(lambda cell: pytest.fail("computed"), cells, tmp_path, resume=True)
    assert again == found


def make_rows(gap, *, betas=(1e-4, 1e-3, 1e-2, 1e-1), ranks=(1, 2, 5), **fields):
    """Synthetic rows of one solver; `gap` is a function of (beta, m)."""
    plain = dict.fromkeys(COLUMNS)
    common = {
        "scope": "sampled", "n": 45, "n_gates": 50, "beta_max": 3.0, "seed": 0, "solver": "bm_gd", "status": "max_iter",
        "n_iter": 10, "seconds": 1.0, "optimum_lower": 1.0, "optimum_upper": 1.0, "lower_bound": 1.0,
        "stationarity": 1.0, "is_stationary": False, "eigenvalue_threshold": 1e-8,
    }  # fmt: skip
    return [
        {**plain, **common, "beta": beta, "m": m, "true_gap": gap(beta, m), "duality_gap": 2 * gap(beta, m),
         "paper_bound": 3 * gap(beta, m), "primal": 1 + gap(beta, m), **fields}
        for beta in betas
        for m in ranks
    ]  # fmt: skip


def verdicts(rows):
    return {claim.name: claim.verdict for claim in claims.judge_claims(claims.frame_of(rows))}


@pytest.mark.parametrize(
    ("name", "gap", "verdict"),
    [
        ("Larger beta is easier", lambda beta, m: 1e-3 / beta, "held"),
        ("Larger beta is easier", lambda beta, m: 1e-3 / beta if m < 5 else beta, "held in part"),
        ("Larger beta is easier", lambda beta, m: beta, "not held"),
        ("Larger beta is easier", lambda beta, m: 0.5, "not held"),
        ("GD almost never finds the optimum", lambda beta, m: 1e-2, "held"),
        ("GD almost never finds the optimum", lambda beta, m: 1e-2 if m == 1 or beta > 1e-3 else 0.0, "held in part"),
        ("GD almost never finds the optimum", lambda beta, m: 1e-5, "not held"),
        ("m matters little", lambda beta, m: 1e-2, "held"),
        ("m matters little", lambda beta, m: 1e-2 / m, "held in part"),
        ("m matters little", lambda beta, m: 1e-2 / m**2, "not held"),
    ],
)
def test_claims_about_gaps(name, gap, verdict):
    assert verdicts(make_rows(gap))[name] == verdict


@pytest.mark.parametrize(("n_converged", "verdict"), [(12, "held"), (8, "held in part"), (3, "not held")])
def test_claim_of_convergence(n_converged, verdict):
    rows = make_rows(lambda beta, m: 1e-2)
    for row in rows[:n_converged]:
        row |= {"stationarity": 1e-8, "is_stationary": True}
    assert verdicts(rows)["GD always converges"] == verdict


@pytest.mark.parametrize(("n_saddles", "verdict"), [(12, "held"), (7, "held in part"), (2, "not held")])
def test_claim_of_saddles(n_saddles, verdict):
    rows = make_rows(lambda beta, m: 1e-2, solver=POLISHED, is_stationary=True, smallest_eigenvalue=1e-9)
    for row in rows[:n_saddles]:
        row["smallest_eigenvalue"] = -1e-3
    assert verdicts(rows)["The points found are saddles"] == verdict
    for row in rows:
        row["true_gap"] = 0.0
    assert verdicts(rows)["The points found are saddles"] == "not held"


def test_verdicts_are_of_the_sampled_gates_and_not_of_trivial_problems():
    good, bad = (lambda beta, m: 1e-3 / beta), (lambda beta, m: beta)
    assert verdicts(make_rows(bad, scope="all") + make_rows(good))["Larger beta is easier"] == "held"
    assert verdicts(make_rows(bad, n=3, beta_max=0.0) + make_rows(good))["Larger beta is easier"] == "held"
    assert set(verdicts(make_rows(bad, beta_max=0.0)).values()) == {"not tested"}


def test_violations_of_the_theorem_are_counted():
    rows = make_rows(lambda beta, m: 1e-2, is_stationary=True, theorem_bound=2e-2)
    check = claims.theorem_check(claims.frame_of(rows))
    assert (check["n_stationary"], check["n_below_true_gap"], check["n_looser_duality_gap"]) == (12, 0, 0)
    rows[0]["theorem_bound"] = 0.9e-2
    rows[1]["duality_gap"] = 2.1e-2
    rows[2]["duality_gap"] = 0.9e-2
    rows[3] |= {"theorem_bound": None, "paper_bound": 0.9e-2}
    check = claims.theorem_check(claims.frame_of(rows))
    assert (check["n_stationary"], check["n_below_true_gap"], check["n_looser_duality_gap"]) == (11, 1, 2)
    assert (check["n_not_stationary_below_true_gap"], check["n_duality_gap_below_true_gap"]) == (1, 1)


def test_speed_ratios_by_hand():
    rows = make_rows(lambda beta, m: 1e-2, betas=(1e-2,), seconds_to_target_gap=6.0, target_gap=1e-2)
    fields = {"solver": "bm_global", "status": "certified", "seconds": 0.5, "seconds_to_target_gap": 0.1}
    rows += make_rows(lambda beta, m: 0.0, betas=(1e-2,), **fields)
    rows[-1] |= {"status": "time_limit", "seconds_to_target_gap": None}
    table = claims.speed_table(claims.frame_of(rows))
    np.testing.assert_allclose(table["same_gap"], [60, 60, np.nan])
    np.testing.assert_allclose(table["certified"], [12, 12, np.nan])
    found = claims.summarise(table["same_gap"])
    assert (found["n"], found["n_missing"], found["median"], found["at_least_20"]) == (2, 1, pytest.approx(60), 1.0)


def test_the_fastest_is_a_certified_one():
    rows = []
    for solver, seconds, status in (
        ("bm_gd", 0.1, "max_iter"),
        ("admm", 0.2, "time_limit"),
        ("bm_global", 0.4, "certified"),
        ("interior_point", 0.5, "certified"),
    ):
        fields = {"solver": solver, "seconds": seconds, "status": status, "seconds_to_best_gap": 0.1}
        rows += make_rows(lambda beta, m: 0.0, ranks=(1,), **fields)
    (part,) = claims.time_table(claims.frame_of(rows), ("bm_global", "admm", "interior_point", "bm_gd"))
    assert part["fastest_in"] == {"bm_global": 4, "admm": 0, "interior_point": 0}
    assert part["median_seconds"]["admm"] == 0.2


def test_a_page_of_trivial_problems_only(tmp_path):
    grid = dataclasses.replace(TINY, sizes=(3,), ranks=(1,), betas=(1e-2,))
    rows = [row for cell in grid.cells() for row in solve_cell(cell)["rows"]]
    names = write_report(rows, grid, tmp_path)
    assert "ratio.png" not in names
    assert all(claim["verdict"] == "not tested" for claim in summary_of(rows)["claims"])
    assert "not tested" in (tmp_path / "report.md").read_text()


def test_gaps_of_zero_are_drawn_at_the_floor(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(
        "cvxnn.experiments.figures.write_figure", lambda figure, path: figures.setdefault(path.name, figure)
    )
    rows = make_rows(lambda beta, m: 0.0) + make_rows(lambda beta, m: 0.0, solver="bm_global", status="certified")
    names = draw_figures(claims.frame_of(rows), tmp_path, 1e-6)
    assert set(names) == set(figures)
    axes = figures["figure2.png"].axes
    assert len(axes) == 3
    (line,) = axes[0].lines[2:3]
    assert (line.get_ydata() == 1e-12).all()
    assert axes[0].get_ylim()[0] < 1e-12


def test_nearby_stationary_points():
    X, y = spiral(15)
    problem = cvxnn.mlp_problem(X, y, n_gates=10, beta=1e-1, reduction="sum", random_state=0)
    start = cvxnn.solve(problem, "bm_gd", rank=2, tol=0, max_iter=200, random_state=0)
    before = start.certificate.stationarity
    factors = nearby_stationary_point(problem, start.factors, seconds=5)
    after = cvxnn.certify(problem, factors=factors)
    assert before > 1e-5
    assert after.stationarity <= 1.1e-7
    assert after.relative_gap <= after.theorem_bound * (1 + 1e-9) + 1e-12
    same = nearby_stationary_point(problem, factors, seconds=5)
    torch.testing.assert_close(same, factors)


def test_grids():
    paper, quick = SCALES["paper"].cells(), SCALES["quick"].cells()
    assert (len(paper), len(quick)) == (120, 16)
    assert len({cell.label for cell in paper}) == 120
    assert {cell.epochs for cell in paper} == {20_000}
    stores = {sweep.CellStore.fingerprint(cell) for cell in paper + quick}
    assert len(stores) == 136
