"""``cvxnn reproduce attention``: training, polishing, cells, files, resuming, verdicts, and wrong use."""

import json
import math

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cvxnn
from cvxnn.certificates import relative_gap
from cvxnn.cli import app, main
from cvxnn.experiments.attention import (
    ATTENTION_COLUMNS,
    ATTENTION_SCALES,
    KINDS,
    AttentionCell,
    AttentionGrid,
    kind_of,
    thresholds,
)
from cvxnn.experiments.attention_claims import attention_frame, check_optima, judge_attention, summarise_problems
from cvxnn.experiments.attention_training import (
    Heads,
    descend,
    draw_factors,
    draw_weights,
    factors_of,
    polish,
    train_adam,
)

TINY = AttentionGrid(
    sizes=((2, 1),), fractions=(0.03,), n=6, s=3, starts=2, descent_steps=100, adam_steps=100, optimum_seconds=60.0
)
PICTURES = {"gap.png", "rank.png", "eigenvalue.png"}


def cell_of(d=2, c=2, output="mean", m=3, **changes):
    settings = {"n": 6, "s": 3, "starts": 2, "descent_steps": 50, "adam_steps": 50, "learning_rate": 1e-2}
    settings |= {"max_escapes": 5, "optimum_seconds": 60.0, "fraction": 0.03, "seed": 0}
    return AttentionCell(d=d, c=c, output=output, m=m, **(settings | changes))


def outputs_of(tokens, W1, W2, pooled):
    """sum_j X W1_j X^T X W2_j, sequence by sequence, from the definition (8)."""
    outputs = [sum(X @ A @ X.T @ X @ B for A, B in zip(W1, W2, strict=True)) for X in tokens]
    return torch.stack([part.mean(0) for part in outputs]) if pooled else torch.stack(outputs)


@pytest.mark.parametrize("output", ["mean", "tokens"])
def test_objective_is_that_of_the_network(output):
    cell = cell_of(output=output)
    problem, (tokens, targets) = cell.problem(), (torch.from_numpy(part) for part in cell.data())
    heads = Heads(problem)
    W1, W2 = (part.requires_grad_() for part in draw_weights(2, 2, 3, (0, 4)))
    U, V = factors_of(W1, W2)
    values, left, right = heads.slopes(U.detach(), V.detach())
    for k in range(2):
        loss = (outputs_of(tokens, W1[k], W2[k], output == "mean") - targets).square().sum() / (2 * len(tokens))
        value = loss + problem.beta / 2 * (W1[k].square().sum() + W2[k].square().sum())
        assert float(values[k]) == pytest.approx(float(value.detach()), rel=1e-12)
        proof = cvxnn.certify(problem, factors=(U[k : k + 1].detach(), V[k : k + 1].detach()))
        assert float(values[k]) == pytest.approx(proof.primal, rel=1e-12)
        slopes = torch.autograd.grad(value, (W1, W2))
        expected = factors_of(*slopes)
        torch.testing.assert_close(left[k], expected[0][k], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(right[k], expected[1][k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("output", ["mean", "tokens"])
def test_adam_together_as_alone(output):
    cell, steps, seeds = cell_of(output=output), 40, (0, 3)
    problem, (tokens, targets) = cell.problem(), (torch.from_numpy(part) for part in cell.data())
    U, V = train_adam(Heads(problem), draw_weights(2, 2, 3, seeds), 1e-2, steps)
    for k, seed in enumerate(seeds):
        W1, W2 = (nn.Parameter(part[0]) for part in draw_weights(2, 2, 3, (seed,)))
        rule = torch.optim.Adam([W1, W2], lr=1e-2, weight_decay=problem.beta)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule, steps)
        for _ in range(steps):
            rule.zero_grad()
            loss = (outputs_of(tokens, W1, W2, output == "mean") - targets).square().sum() / (2 * len(tokens))
            loss.backward()
            rule.step()
            schedule.step()
        alone = factors_of(W1.detach()[None], W2.detach()[None])
        torch.testing.assert_close(U[k], alone[0][0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(V[k], alone[1][0], rtol=1e-8, atol=1e-10)


def test_weights_are_those_of_linear_layers_and_leave_the_callers_random_numbers():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    W1, W2 = draw_weights(3, 2, 2, (0, 7))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(7)
    layers = [nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)]
    assert torch.equal(W1[1, 1], layers[1].weight.detach().double().T)
    assert torch.equal(W2[1, 0], layers[2].weight.detach().double().T)


def test_gradient_descent_never_rises_and_starts_do_not_mix():
    heads = Heads(cell_of().problem())
    start = draw_factors(heads.p, heads.q, 3, (0, 1, 2), (0.03, 1.0, 3.0))
    before = heads.slopes(*start)[0]
    some = descend(heads, start, 20)
    more = descend(heads, start, 60)
    values = [before, *(heads.slopes(*point)[0] for point in (some, more))]
    assert (values[1] < values[0]).all() and (values[2] < values[1]).all()
    alone = descend(heads, (start[0][1:2], start[1][1:2]), 60)
    torch.testing.assert_close(more[0][1:2], alone[0], rtol=1e-7, atol=1e-9)


def test_a_saddle_is_named_and_left():
    problem = cell_of(m=4).problem()
    heads = Heads(problem)
    zeros = torch.zeros(1, heads.p, 4, dtype=torch.float64), torch.zeros(1, heads.q, 4, dtype=torch.float64)
    stays = polish(problem, heads, zeros, 0)
    seen = stays.diagnosis
    assert stays.n_escapes == 0
    assert kind_of(seen.stationarity, seen.curvature.value, seen.curvature_threshold, True) == "saddle"
    # At zero the smallest eigenvalue is beta - ||G||, and ||G|| is beta_max there.
    assert seen.curvature.value == pytest.approx(problem.beta - problem.beta_max)
    left = polish(problem, heads, zeros, 5)
    optimum = cvxnn.solve(problem, tol=1e-8).certificate
    assert left.n_escapes >= 1
    assert relative_gap(left.diagnosis.certificate.primal, optimum.primal) <= 1e-6


def test_kinds():
    assert kind_of(1e-5, 1.0, 1e-6, True) == "not_stationary"
    assert kind_of(math.nan, 1.0, 1e-6, True) == "not_stationary"
    assert kind_of(1e-7, -1e-3, 1e-6, False) == "saddle"
    assert kind_of(1e-7, -1e-7, 1e-6, True) == "local_minimum"
    assert kind_of(1e-7, 1.0, 1e-6, False) == "undecided"


def test_numbers_of_heads():
    assert thresholds(3, 2) == (6, 15) and thresholds(2, 5) == (4, 14)
    assert TINY.heads(2, 1) == [1, 2, 3, 4, 7]
    assert TINY.heads(2, 2) == list(range(1, 10))
    cells = TINY.cells()
    assert len(cells) == 2 * 5 and cells[0].m == 7
    assert len({cell.label for cell in cells}) == len(cells)


@pytest.fixture(scope="module", autouse=True)
def tiny_scale():
    """A third scale that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTENTION_SCALES, "tiny", TINY)
        yield


def reproduce(*arguments):
    found = CliRunner().invoke(
        app, ["reproduce", "attention", "--scale", "tiny", "--jobs", "1", *map(str, arguments)], standalone_mode=False
    )
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.return_value, found.stdout, found.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "attention"
    status, stdout, _ = reproduce("--out", out)
    assert status == 0
    return out, stdout


@pytest.fixture(scope="module")
def rows(finished):
    return pd.read_csv(finished[0] / "heads.csv")


def test_files_and_report(finished):
    out, stdout = finished
    names = PICTURES | {"report.md", "heads.csv", "metrics.json"}
    assert {path.name for path in out.iterdir()} == names | {"cells"}
    for name in PICTURES:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.md").read_text()
    for name in names - {"report.md", "metrics.json"}:
        assert f"({name})" in page
    assert "**Not the full scale**" in page
    assert not [line for line in page.splitlines() if line.startswith("|") and "nan" in line]
    assert "Corollary 3.10, number of heads: HELD" in stdout and "d = 2, c = 1, tokens" in stdout


def test_every_run_has_a_row(rows):
    assert tuple(rows.columns) == ATTENTION_COLUMNS
    assert len(rows) == 2 * (5 * 2 * 2 + 4 * 2 * 2)
    assert not rows[["output", "m", "form", "start"]].duplicated().any()
    assert set(rows["kind"]) <= set(KINDS)
    assert (rows["threshold"] == 2).all() and (rows["paper_bound"] == 6).all()
    assert (rows["rank"] <= rows[["m", "threshold"]].min(axis=1)).all()
    assert (rows["gap"] <= rows["trained_gap"] + 1e-9).all()
    assert not ((rows["m"] == 1) & rows["form"].isin(["padded", "escaped"])).any()


def test_rows_are_right(rows):
    for (output, m), part in rows.groupby(["output", "m"]):
        problem = cell_of(c=1, output=output, m=m).problem()
        optimum = cvxnn.solve(problem, tol=1e-8).certificate
        assert part["beta"].iloc[0] == problem.beta
        assert (part["optimum_lower"] <= optimum.primal * (1 + 1e-12)).all()
        assert (part["optimum_upper"] >= optimum.lower_bound * (1 - 1e-12)).all()
        gaps = part["primal"] / optimum.primal - 1
        assert (abs(part["gap"] - gaps.clip(lower=0)) <= 1e-7).all()
        assert (part["duality_gap"] >= gaps - 1e-9).all()


def test_no_local_minimum_is_above_the_optimum_with_enough_heads(rows):
    wide = rows[(rows["m"] >= rows["threshold"]) & (rows["form"] != "padded")]
    assert (wide["kind"] == "local_minimum").mean() > 0.9
    assert (wide.loc[wide["kind"] == "local_minimum", "gap"] <= 1e-6).all()
    check = check_optima(rows)
    assert check["largest_width"] <= 1e-8
    assert (check["n_runs"], check["n_below_optimum"], check["n_bounds_above"]) == (72, 0, 0)
    wrong = check_optima(rows.assign(primal=rows["optimum_lower"] * 0.9))
    assert wrong["n_below_optimum"] == 72
    assert check_optima(rows.assign(primal=rows["optimum_upper"] * 2, duality_gap=0.0))["n_bounds_above"] == 72


def test_padded_minima_are_saddles_and_lead_on(rows):
    padded, escaped = (rows[rows["form"] == form].reset_index(drop=True) for form in ("padded", "escaped"))
    above = padded["gap"] > 1e-6  # the optimum for the outputs per token has one head
    assert (above == (padded["optimum_rank"] > 1)).all() and above.sum() == 8 and (padded["rank"] == 1).all()
    assert ((padded["kind"] == "saddle") == above).all()
    assert (abs(padded["gap"] - padded["trained_gap"]) <= 1e-9).all() and (padded["n_escapes"] == 0).all()
    # A head of zeros has the eigenvalue beta - ||G||.
    slopes = padded["beta"] * (1 - padded["dual_norm_ratio"])
    assert (padded["smallest_eigenvalue"] <= slopes + 1e-9).all()
    assert ((escaped["n_escapes"] >= 1) == above).all() and (escaped["gap"] <= 1e-6).all()


def test_json_and_resume(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cvxnn.experiments.attention_report.draw_attention_figures", lambda *arguments: [])
    cells = tmp_path / "cells"
    cells.mkdir()
    for path in (finished[0] / "cells").iterdir():
        (cells / path.name).write_bytes(path.read_bytes())
    next(path for path in cells.iterdir() if "-m1-" in path.name).unlink()
    arguments = ["reproduce", "attention", "--scale", "tiny", "--jobs", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["n_cells"], document["n_resumed"], document["n_runs"]) == (10, 9, 72)
    assert document["certified"] is True and len(document["problems"]) == 2
    assert document == json.loads((tmp_path / "metrics.json").read_text())
    assert len(document["claims"]) == 6 and all(claim["rule"] for claim in document["claims"])
    before, after = (pd.read_csv(folder / "heads.csv") for folder in (finished[0], tmp_path))
    pd.testing.assert_frame_equal(before.drop(columns="seconds"), after.drop(columns="seconds"), rtol=1e-6, atol=1e-7)


def make_rows(gap, kind=lambda m: "local_minimum", rank=lambda m: min(m, 3)):
    """Synthetic rows with threshold 4, d^2 + d c = 8 and an optimum of rank 3; all as functions of m."""
    zeros = dict.fromkeys(ATTENTION_COLUMNS, 0.0)
    return [
        zeros | {"d": 2, "c": 2, "output": "mean", "fraction": 0.1, "seed": 0, "m": m, "threshold": 4, "form": form}
        | {"paper_bound": 8, "optimum_rank": 3, "optimum_lower": 1.0, "optimum_upper": 1.0, "start": start}
        | {"gap": gap(m), "trained_gap": gap(m), "primal": 1 + gap(m), "kind": kind(m), "rank": rank(m)}
        | {"duality_gap": 1.0, "beta": 0.1, "n_escapes": 0}
        for m in range(1, 10)
        for form in ("factors", "network")
        for start in range(3)
    ]  # fmt: skip


def test_verdicts_follow_their_rules():
    def verdicts(*arguments, **options):
        return [part.verdict for part in judge_attention(attention_frame(make_rows(*arguments, **options)))]

    assert verdicts(lambda m: 0.1 if m < 4 else 1e-9) == [*["held"] * 4, "not tested", "held"]
    assert verdicts(lambda m: 0.1 if m < 3 else 1e-9) == [*["held"] * 4, "not tested", "held in part"]
    assert verdicts(lambda m: 1e-9) == [*["held"] * 4, "not tested", "not held"]
    # A spurious minimum with four heads: rank 3 below m too.
    assert verdicts(lambda m: 0.1 if m < 5 else 0.0) == ["held", *["not held"] * 4, "held"]
    assert verdicts(lambda m: 0.1 if m < 5 else 0.0, rank=lambda m: m)[1] == "not tested"
    assert verdicts(lambda m: 0.1) == [*["not held"] * 5, "held"]
    saddles = verdicts(lambda m: 0.1, kind=lambda m: "saddle")
    assert saddles == [*["not tested"] * 4, "held", "not tested"]
    some = verdicts(lambda m: 0.0, kind=lambda m: "not_stationary" if m in (5, 9) else "local_minimum")
    assert some == ["not tested", "held", "held in part", "held in part", "not tested", "not held"]


def test_where_spurious_minima_end():
    (found,) = summarise_problems(attention_frame(make_rows(lambda m: 0.1 if m < 3 else 1e-9)))
    assert (found["most_heads_with_spurious"], found["largest_spurious_gap"]) == (2, 0.1)
    (none,) = summarise_problems(attention_frame(make_rows(lambda m: 1e-9)))
    assert none["most_heads_with_spurious"] is None and none["n_minima"] == 54


def test_an_optimum_that_is_not_known_is_status_3(tmp_path, monkeypatch):
    monkeypatch.setattr("cvxnn.experiments.attention_report.draw_attention_figures", lambda *arguments: [])

    def vague(cell):
        return {"rows": [row | {"optimum_lower": 0.9} for row in make_rows(lambda m: 0.0)[:2]]}

    monkeypatch.setattr("cvxnn.experiments.attention.solve_heads", vague)
    status, _, stderr = reproduce("--out", tmp_path)
    assert status == 3
    assert "known to 1.1e-01 only, not to 1e-08" in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention", "--reduction", "mean"], ("--reduction", "'mean'", "'attention'")),
        (["attention", "--scale", "convex"], ("scale", "'convex'", "'quick'", "'paper'")),
        (["attention", "--seed", "1"], ("--seed", "'attention'")),
        (["attentio"], ("STUDY", "'attentio'", "'attention'")),
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
