"""``cvxnn reproduce networks``: training, ways out, cells, files, resuming, verdicts, and wrong use."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cvxnn
from cvxnn.audit import read_network
from cvxnn.audit.task import Point, first_point, make_task
from cvxnn.cli import app, main
from cvxnn.columns import Columns
from cvxnn.datasets import spiral
from cvxnn.errors import InvalidInputError
from cvxnn.experiments.networks import NETWORKS_COLUMNS, NETWORKS_SCALES, NetworksGrid, audit_cell, looks
from cvxnn.experiments.networks_audit import VERDICTS, verdict_of
from cvxnn.experiments.networks_claims import check_bounds, check_traps, judge_networks
from cvxnn.experiments.networks_escape import Escape, find_escape, merged
from cvxnn.experiments.networks_training import initial_weights, objectives, train_batch
from cvxnn.losses import get_loss

TINY = NetworksGrid(
    widths=(2, 6),
    betas=(1e-2, 1e-1),
    seeds=(0, 3),
    steps=60,
    n_samples=15,
    optimum_seconds=10.0,
    improve_seconds=5.0,
    continue_seconds=0.2,
)
PICTURES = {"excess.png", "improve.png", "training.png", "certificate.png"}


def data(n=15):
    X, y = spiral(n)
    return torch.from_numpy(X), torch.from_numpy(np.eye(3)[y])


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.5), ("adam", 1e-2)])
def test_together_as_alone(optimizer, rate):
    X, Y = data()
    beta, seeds, steps = 3e-3, (0, 1, 5), 60
    start = initial_weights(7, 2, 3, seeds)
    batch = train_batch(
        start, X, Y, beta=beta, optimizer=optimizer, learning_rate=rate, steps=steps, traced=looks(steps)
    )
    for i, seed in enumerate(seeds):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(2, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)).double()
        assert torch.equal(network[0].weight, start.W1[i]) and torch.equal(network[2].weight, start.W2[i])
        kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adam": (torch.optim.Adam, {})}
        kind, options = kinds[optimizer]
        rule = kind(network.parameters(), lr=rate, weight_decay=beta, **options)
        for _ in range(steps):
            rule.zero_grad()
            (0.5 * (network(X) - Y).square().sum() / len(X)).backward()
            rule.step()
        torch.testing.assert_close(batch.W1[i], network[0].weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(batch.W2[i], network[2].weight.detach(), rtol=1e-9, atol=1e-12)
        report = cvxnn.certify_network(network, X, Y, beta=beta, time_limit=0)
        assert batch.trace[-1][0] == steps
        assert batch.trace[-1][1][i] == pytest.approx(report.objective, rel=1e-12)
    assert batch.trace[0][1] == objectives(start, X, Y, beta).tolist()


def test_seeds_do_not_disturb_the_callers_random_numbers():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    initial_weights(3, 2, 3, (0, 1))
    assert torch.equal(torch.rand(3), expected)


def test_unknown_optimizer():
    X, Y = data()
    with pytest.raises(InvalidInputError, match="'lion'"):
        train_batch(initial_weights(2, 2, 3, (0,)), X, Y, beta=0.1, optimizer="lion", learning_rate=1.0, steps=1)


def test_looks():
    assert looks(1) == (0, 1)
    steps = looks(20_000)
    assert steps[0] == 0 and steps[-1] == 20_000 and list(steps) == sorted(set(steps)) and 20 < len(steps) < 30


def point_of(u, v):
    u, v = (torch.tensor(part, dtype=torch.float64) for part in (u, v))
    return Point(Columns(torch.zeros(len(u), dtype=torch.long), u, v), torch.zeros(v.shape[1], dtype=torch.float64))


def task_of(X, Y, beta):
    X, Y = (torch.tensor(part, dtype=torch.float64) for part in (X, Y))
    weights = (torch.ones(1, X.shape[1], dtype=torch.float64), torch.ones(Y.shape[1], 1, dtype=torch.float64))
    network, values, _ = read_network(weights, X, Y.shape[1], "relu", None)
    return make_task(network, values, Y, beta=beta, loss=get_loss("squared"), reduction="mean", penalize_biases=False)


# Two orthogonal samples with targets 2 and -2 and beta = 1/4 (mean): only the first sample is fitted below; the
# neuron (a, 0) -> a has the optimal a^2 = 2 - 2 beta = 3/2.
X2, Y2, BETA2 = [[1.0, 0.0], [0.0, 1.0]], [[2.0], [-2.0]], 0.25
SIZE = math.sqrt(1.5)


def test_a_dead_neuron_makes_a_saddle():
    task = task_of(X2, Y2, BETA2)
    point = point_of([[SIZE, 0.0], [-1e-9, -1e-9]], [[SIZE], [0.0]])
    escape = find_escape(task, point)
    assert escape.n_distinct == 1
    # In the dead neuron's place: slope 2 / n = 1 along (0, 1), which is 4 beta.
    assert escape.curvature_ratio == pytest.approx(4.0)
    before = task.value(point_of([[SIZE, 0.0]], [[SIZE]])).objective
    # It fits the second sample as the other does the first: 1/2 (t - 2)^2 / 2 + t / 4 at t = 3/2.
    best = before - (1.0 - (0.0625 + 0.375))
    assert escape.same_width_decrease == pytest.approx((before - best) / before)
    t = 1e-3
    moved = task.value(point_of([[SIZE, 0.0], [0.0, t]], [[SIZE], [-t]])).objective
    assert moved - before == pytest.approx(t**2 * BETA2 * (1 - 4.0), rel=1e-3)
    assert verdict_of(0.5, 1e-9, escape) == "saddle"


def test_twins_on_a_plateau():
    task = task_of(X2, Y2, BETA2)
    a, b = 0.6 * SIZE, 0.8 * SIZE
    point = point_of([[a, 0.0], [b, 0.0]], [[a], [b]])
    # The second sample is on the border, x . u = 0, so active: it pulls at weights in the cell with slope 1 = 4 beta.
    bent = find_escape(task, point)
    assert bent.n_distinct == 1 and bent.curvature_ratio == pytest.approx(math.hypot(1.0, 4.0))
    # Now it is not.
    tilted = find_escape(task, point_of([[a, -1e-9], [b, -1e-9]], [[a], [b]]))
    assert tilted.n_distinct == 1
    assert tilted.curvature_ratio == pytest.approx(1.0)
    assert tilted.same_width_decrease == pytest.approx(0.5625 / task.value(point).objective)
    assert verdict_of(0.5, 1e-9, tilted) == "plateau"


def test_no_neuron_to_spare():
    task = task_of(X2, Y2, BETA2)
    escape = find_escape(task, point_of([[SIZE, 0.0]], [[SIZE]]))
    assert escape == Escape(1, None, None)
    assert verdict_of(0.5, 1e-9, escape) == "stuck"
    assert verdict_of(0.5, 1e-3, escape) == "not_stationary"
    assert verdict_of(0.5, math.nan, escape) == "not_stationary"
    assert verdict_of(1e-7, 1e-3, escape) == "optimal"


def test_twins_that_can_part_within_their_cell():
    # One cell, two outputs: the direction e2 is not used, although its slope is above beta.
    task = task_of([[1.0, 0.1], [1.0, -0.1]], [[2.0, 0.3], [2.0, -0.3]], 0.01)
    size = math.sqrt(2 - 0.01)
    point = point_of([[0.6 * size, 0.0], [0.8 * size, 0.0]], [[0.6 * size, 0.0], [0.8 * size, 0.0]])
    escape = find_escape(task, point)
    assert escape.curvature_ratio == pytest.approx(3.0)  # 0.1 * 0.3 / beta
    before = task.value(point).objective
    t = 1e-3
    parted = point_of([[0.6 * size, 0.8 * t], [0.8 * size, -0.6 * t]], [[0.6 * size, 0.8 * t], [0.8 * size, -0.6 * t]])
    assert task.value(parted).objective - before == pytest.approx(t**2 * 0.01 * (1 - 3.0), rel=1e-3)
    assert verdict_of(1.0, 1e-9, escape) == "saddle"


def test_merged_networks_are_the_same_function():
    X, Y = data()
    task = task_of(X.tolist(), Y.tolist(), 1e-2)
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((3, 2)), rng.standard_normal((3, 3))
    many = point_of(
        np.concatenate([u * factor for factor in (0.3, 2.0, 1.0)]), np.concatenate([v * f for f in (1.0, 0.1, 3.0)])
    )
    few = merged(many)
    assert len(few) == 3
    torch.testing.assert_close(task.outputs(few), task.outputs(many))
    assert task.value(few).objective <= task.value(many).objective
    apart = point_of(np.concatenate([u, u]), np.concatenate([v, -v]))
    assert len(merged(apart)) == 6
    assert len(merged(point_of(np.zeros((2, 2)), np.zeros((2, 3))))) == 0


@pytest.mark.parametrize("tiny", [1e-8, 1e-80, 1e-160, 1e-200, 1e-310])
def test_neurons_that_faded_are_no_neurons(tiny):
    task = task_of(X2, Y2, BETA2)
    escape = find_escape(task, point_of([[SIZE, 0.0], [tiny, 2 * tiny]], [[SIZE], [tiny]]))
    assert escape.n_distinct == 1
    assert escape.same_width_decrease == pytest.approx(0.5625 / task.value(point_of([[SIZE, 0.0]], [[SIZE]])).objective)
    assert escape.curvature_ratio == pytest.approx(4.0)
    nothing = find_escape(task, point_of([[tiny, tiny], [2 * tiny, 2 * tiny]], [[tiny], [2 * tiny]]))
    assert nothing.n_distinct <= 1 and nothing.curvature_ratio >= 1.0
    assert nothing.same_width_decrease > 0


@pytest.fixture(scope="module", autouse=True)
def tiny_scale():
    """A third scale that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS_SCALES, "tiny", TINY)
        yield


def reproduce(*arguments):
    found = CliRunner().invoke(
        app, ["reproduce", "networks", "--scale", "tiny", "--jobs", "1", *map(str, arguments)], standalone_mode=False
    )
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.return_value, found.stdout, found.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "networks"
    status, stdout, _ = reproduce("--out", out)
    assert status == 0
    return out, stdout


@pytest.fixture(scope="module")
def rows(finished):
    return pd.read_csv(finished[0] / "networks.csv")


def test_files_and_report(finished):
    out, stdout = finished
    names = PICTURES | {"report.md", "networks.csv", "metrics.json"}
    assert {path.name for path in out.iterdir()} == names | {"cells"}
    for name in PICTURES:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.md").read_text()
    for name in names - {"report.md", "metrics.json"}:
        assert f"({name})" in page
    assert "**Not the full scale**" in page and "here beta = 0.1" in page
    assert not [line for line in page.splitlines() if line.startswith("|") and "nan" in line]
    assert "SGD converges to saddle points: " in stdout and "m = 2, beta 0.01, adam" in stdout


def test_every_network_has_a_row(rows):
    assert tuple(rows.columns) == NETWORKS_COLUMNS
    assert len(rows) == 2 * 2 * 2 * 2
    assert not rows[["width", "beta", "optimizer", "seed"]].duplicated().any()
    assert set(rows["verdict"]) | set(rows["continued_verdict"]) <= set(VERDICTS)
    assert (rows["n_distinct"] <= rows["width"] - rows["n_dead"]).all()


def test_rows_are_those_of_the_networks(rows):
    X, Y = data()
    for row in rows[rows["beta"] == 1e-2].itertuples():
        problem = cvxnn.mlp_problem(X, Y, activation="relu", gates="enumerate", beta=row.beta)
        optimum = cvxnn.solve(problem, tol=1e-8).certificate
        assert row.optimum_lower <= optimum.primal * (1 + 1e-12)
        assert row.optimum_upper >= optimum.lower_bound * (1 - 1e-12)
        excess = row.balanced_objective / optimum.primal - 1
        assert row.excess == pytest.approx(excess, abs=1e-6)
        assert row.excess_least - 1e-6 <= excess <= row.excess_most + 1e-6
        assert row.own_gap >= excess - 1e-9
        assert row.within_1_percent == (row.excess_most <= 0.01)
        assert row.improved_objective <= optimum.primal * (1 + 2e-6)
        assert row.improved_gap <= 1e-6
        assert row.continued_objective <= row.balanced_objective
        assert row.continued_excess <= row.excess
    zero = rows[rows["beta"] == 1e-1]
    assert (zero["beta"] >= zero["beta_max"]).all()
    assert (zero["optimum_upper"] <= 0.5 * (1 + 1e-12)).all()


def test_trained_networks_are_worse_and_proven_so(rows):
    part = rows[rows["beta"] == 1e-2]
    assert (part["excess_least"] > 1e-4).all() and part["proven_suboptimal"].all()
    assert (part["witness_decrease"] > 0).any()
    assert check_bounds(rows) == {
        "n_networks": 16, "n_lower_bounds_above": 0, "n_objectives_below": 0, "n_own_gaps_below": 0,
    }  # fmt: skip
    wrong = rows.assign(lower_relu_network=1.0, best_objective=0.0, own_gap=-1.0)
    assert [*check_bounds(wrong).values()][1:] == [16, 16, 16]


def test_example_is_the_worst_network():
    cell = next(cell for cell in TINY.cells() if (cell.width, cell.beta, cell.optimizer) == (6, 1e-2, "sgd"))
    outcome = audit_cell(cell)
    X, Y = data()
    worst = max(outcome["rows"], key=lambda row: row["excess"])
    assert outcome["example"]["seed"] == worst["seed"]
    for key, column in (("trained", "objective"), ("improved", "improved_objective")):
        weights = tuple(torch.tensor(part, dtype=torch.float64) for part in outcome["example"][key])
        found = cvxnn.certify_network(weights, X, Y, beta=1e-2, time_limit=0)
        assert found.objective == pytest.approx(worst[column], rel=1e-12)
    last = outcome["trace"][-1]
    assert last[0] == TINY.steps
    assert last[1][0] >= outcome["rows"][0]["excess"]  # which is after balancing


def test_json_and_resume(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cvxnn.experiments.networks_report.draw_network_figures", lambda *arguments: [])
    cells = tmp_path / "cells"
    cells.mkdir()
    for path in (finished[0] / "cells").iterdir():
        (cells / path.name).write_bytes(path.read_bytes())
    next(path for path in cells.iterdir() if path.name.startswith("m2-")).unlink()
    arguments = ["reproduce", "networks", "--scale", "tiny", "--jobs", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["n_cells"], document["n_resumed"], document["n_runs"]) == (8, 7, 16)
    assert document["certified"] is True
    assert document == json.loads((tmp_path / "metrics.json").read_text())
    assert [claim["verdict"] for claim in document["claims"]] and len(document["claims"]) == 3
    before, after = (pd.read_csv(folder / "networks.csv") for folder in (finished[0], tmp_path))
    times = [name for name in NETWORKS_COLUMNS if "seconds" in name]
    pd.testing.assert_frame_equal(before.drop(columns=times), after.drop(columns=times), rtol=1e-6, atol=1e-7)


def test_networks_short_of_the_tolerance_are_status_3(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("cvxnn.experiments.networks_report.draw_network_figures", lambda *arguments: [])

    def pessimistic(cell):
        row = dict.fromkeys(NETWORKS_COLUMNS, 0.0)
        row |= {"width": cell.width, "beta": cell.beta, "beta_max": 1.0, "optimizer": cell.optimizer, "seed": 0}
        row |= {"optimum_lower": 1.0, "optimum_upper": 1.0, "best_objective": 1.0, "excess": 0.1, "own_gap": 1.0}
        row |= {"verdict": "stuck", "continued_verdict": "stuck", "improved_gap": 1e-3, "improved_neurons": 2}
        identity = {"width": cell.width, "beta": cell.beta, "optimizer": cell.optimizer}
        return {"cell": identity, "rows": [row], "trace": [], "example": {}}

    monkeypatch.setattr("cvxnn.experiments.networks.audit_cell", pessimistic)
    status, _, stderr = reproduce("--out", tmp_path)
    assert status == 3
    assert "8 of 8 networks are not improved to 1e-06" in stderr


def test_traps_are_counted():
    rows = {"excess": [1e-5, 1e-3, 1e-3, 2e-3], "gap_network_gates": [1e-5, 1e-5, 5e-4, 1e-3]}
    rows |= {"continued_excess": [0.0, 1e-3, 1e-4, 2e-3], "witness_ratio": [2.0, 2.0, math.nan, math.nan]}
    found = check_traps(pd.DataFrame(rows | {"same_width_decrease": [1e-9, math.nan, math.nan, 1e-9]}))
    assert found == {
        "n_networks": 3, "n_optimal_for_their_patterns": 1, "largest_gap_network_gates": 1e-3,
        "n_halved_by_continuation": 1, "n_with_witness": 1, "n_with_spare_neurons": 1,
    }  # fmt: skip


def make_frame(excess, verdict="optimal", continued="optimal", optimizer="sgd"):
    """Synthetic rows; `excess` is a function of (beta, seed)."""
    return pd.DataFrame(
        [
            {"width": 5, "beta": beta, "beta_max": 1.0, "optimizer": optimizer, "seed": seed,
             "excess": excess(beta, seed), "verdict": verdict, "continued_verdict": continued}
            for beta in (1e-3, 1e-2, 1e-1)
            for seed in range(4)
        ]
    )  # fmt: skip


def test_verdicts_follow_their_rules():
    def verdicts(frame):
        return [part.verdict for part in judge_networks(frame)]

    falling = make_frame(lambda beta, seed: 1e-4 / beta)
    assert verdicts(falling) == ["not held", "held", "held"]
    rising = make_frame(lambda beta, seed: 1e-4 * beta, "saddle", "saddle")
    assert verdicts(rising) == ["held", "not held", "not held"]
    mixed = make_frame(lambda beta, seed: 1e-5 / beta if seed < 2 else 1e-3 * beta, "plateau", "optimal")
    assert verdicts(mixed) == ["held in part", "held in part", "not held"]
    later = make_frame(lambda beta, seed: 1e-4 * (1 + seed % 2) / beta**0, "not_stationary", "saddle")
    assert verdicts(later) == ["held in part", "not tested", "held in part"]
    assert verdicts(make_frame(lambda beta, seed: 1.0, "saddle", "saddle", "adam"))[0] == "not tested"
    assert verdicts(falling.assign(beta=2.0)) == ["not tested"] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["networks", "--reduction", "mean"], ("--reduction", "'mean'", "'networks'")),
        (["networks", "--scale", "huge"], ("scale", "'huge'", "'quick'", "'paper'")),
        (["network"], ("STUDY", "'network'", "'networks'")),
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


def test_networks_are_read_as_the_certificate_reads_them():
    X, Y = data()
    weights = (torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    network, values, _ = read_network(weights, X, 3, "relu", None)
    task = make_task(network, values, Y, beta=0.1, loss=get_loss("squared"), reduction="mean", penalize_biases=False)
    report = cvxnn.certify_network(weights, X, Y, beta=0.1, time_limit=0)
    assert task.value(first_point(task, network)).objective == report.objective
