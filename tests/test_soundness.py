"""Certificates against an independent interval around the optimum; the full run is ``python -m tests.soundness``."""

import json

import numpy as np
import pytest

from tests.soundness.__main__ import WIDE, main, summarise
from tests.soundness.check import Report, check_problem
from tests.soundness.cnn_check import check_cnn_problem, check_cnn_relu_problem
from tests.soundness.cnn_problems import random_cnn_instance
from tests.soundness.cnn_relu_problems import random_cnn_relu_instance
from tests.soundness.problems import random_instance
from tests.soundness.reference import Reference
from tests.soundness.relu_cells import cell_patterns
from tests.soundness.relu_check import check_relu_problem
from tests.soundness.relu_norms import ConeMaxima, project
from tests.soundness.relu_problems import random_relu_instance
from tests.soundness.relu_reference import ReluReference

N_PROBLEMS = 40
#: Scalar ReLU problems: all neurons, and given gates.
RELU_PROBLEMS = (1, 2, 3, 25)
RELU_MISTAKES = {
    "witness": (1, "lower_bound <= p*"),
    "projection": (1, "is the nearest point"),
    "caps": (1, "gate_ratios >= q_k / beta"),
    "feasibility": (25, "an infeasible point has an infinite gap"),
    "cone_model": (2, "primal <= objective of the true network"),
    "one_sign": (2, "lower_bound <= p*"),
}


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [check_problem(1, index, small=True) for index in range(N_PROBLEMS)]


def test_no_certificate_is_contradicted(reports: list[Report]) -> None:
    violations = [violation for report in reports for violation in report.violations]
    assert violations == []
    assert summarise(reports)["certificates"] > 20 * N_PROBLEMS


def test_intervals_are_narrow_enough_to_find_mistakes(reports: list[Report]) -> None:
    wide = [report.index for report in reports if report.relative_width > WIDE]
    assert len(wide) < N_PROBLEMS / 10


def test_every_loss_reduction_and_bias_comes_up(reports: list[Report]) -> None:
    assert len({(report.loss, report.reduction, report.output_bias) for report in reports}) == 16


@pytest.mark.parametrize(("tamper", "indices"), [("dual_norm", range(12)), ("intercept", range(8, 16))])
def test_deliberate_mistakes_are_found(tamper: str, indices: range) -> None:
    """Not in every problem: where the penalty is a small part of the optimum, 0.1% of it is smaller still."""
    found = 0
    for index in indices:
        violations = check_problem(1, index, tamper, small=True).violations
        found += "lower_bound <= p*" in {violation.statement for violation in violations}
    assert found > len(indices) / 2


def test_command_prints_json_and_fails_on_violations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--problems", "1", "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["violations"] == 0
    assert main(["--problems", "1", "--jobs", "1", "--tamper", "dual_norm"]) == 1
    assert "violations" in capsys.readouterr().out


@pytest.mark.parametrize("index", range(16))
def test_reference_duals_are_feasible_and_below_random_points(index: int) -> None:
    """Weak duality by the reference's own functions, from random candidates: conjugates and repairs are right."""
    reference = Reference(random_instance(2, index, small=True))
    rng = np.random.default_rng(index)
    for _ in range(20):
        value, nu = reference.dual_value(rng.normal(size=reference.Y.shape) * 10 ** rng.uniform(-3, 1))
        assert reference.dual_norm(nu) <= reference.beta * (1 + 1e-12)
        if reference.instance.output_bias:
            assert abs(nu.sum(0)).max() <= 1e-15 * max(1, abs(nu).sum())
        Z = rng.normal(size=reference.block_shape) * 10 ** rng.uniform(-3, 1)
        assert value <= reference.objective(Z, reference.best_intercept(Z))
        T = rng.normal(size=reference.Y.shape)
        young = reference.loss.value(T) + reference.loss.conjugate(nu) - (nu * T).sum()
        assert young >= -1e-15 * reference.plain_loss
        gradient = reference.loss.gradient(T)
        equality = reference.loss.value(T) + reference.loss.conjugate(gradient) - (gradient * T).sum()
        assert abs(equality) <= 1e-15 * max(reference.plain_loss, float(reference.loss.value(T)))


@pytest.fixture(scope="module")
def relu_reports() -> list[Report]:
    scalar = [check_relu_problem(0, index, small=True) for index in RELU_PROBLEMS]
    return [*scalar, check_relu_problem(0, 2, small=True, outputs="vector")]


def test_no_certificate_of_a_relu_problem_is_contradicted(relu_reports: list[Report]) -> None:
    assert [violation for report in relu_reports for violation in report.violations] == []
    assert summarise(relu_reports)["certificates"] > 15 * len(relu_reports)


def test_relu_intervals_of_one_output_are_narrow(relu_reports: list[Report]) -> None:
    assert max(report.relative_width for report in relu_reports[:-1]) < WIDE


@pytest.mark.parametrize("tamper", RELU_MISTAKES)
def test_deliberate_mistakes_with_cones_are_found(tamper: str) -> None:
    index, statement = RELU_MISTAKES[tamper]
    violations = check_relu_problem(0, index, tamper, small=True).violations
    assert statement in {violation.statement for violation in violations}


def test_command_serves_relu_problems(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--activation", "relu", "--problems", "1", "--first", "12", "--jobs", "1", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["certificates"] > 15
    with pytest.raises(SystemExit):
        main(["--tamper", "caps"])


def test_relu_problems_are_varied() -> None:
    instances = [random_relu_instance(0, index) for index in range(120)]
    assert {np.linalg.matrix_rank(instance.X) for instance in instances} >= {1, 2, 3}
    assert len({(i.loss, i.reduction, i.output_bias, i.gates is None) for i in instances}) == 24
    assert {trait for instance in instances for trait in instance.traits} >= {"scaled", "opposite rows", "zero rows"}


@pytest.mark.parametrize("index", range(0, 40, 5))
def test_cells_of_the_reference_are_all_that_dense_samples_see(index: int) -> None:
    X = random_relu_instance(1, index).X
    X = X[X.any(1)]
    if len(X) == 0:
        return
    u = np.random.default_rng(index).normal(size=(X.shape[1], 20_000)) / np.maximum(np.abs(X).max(0), 1e-300)[:, None]
    values = (X / np.linalg.norm(X, axis=1, keepdims=True)) @ u
    clear = (np.abs(values) > 1e-9 * np.linalg.norm(u, axis=0)).all(0)
    seen = {column.tobytes() for column in (values > 0).T[clear]}
    assert seen <= {pattern.tobytes() for pattern in cell_patterns(X)}


@pytest.mark.parametrize("seed", range(6))
def test_maxima_of_the_reference_hold_for_dense_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, c = rng.normal(size=(6, 2 + seed % 2)), 1 + seed % 3
    nu, u = rng.normal(size=(6, c)), rng.normal(size=(20_000, X.shape[1]))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    sampled = np.linalg.norm(np.maximum(u @ X.T, 0) @ nu, axis=1).max()
    lower, upper, best = ConeMaxima(X, cell_patterns(X)).interval(nu.astype(np.longdouble))
    assert sampled <= upper
    assert sampled * (1 - 1e-10) <= lower <= upper
    assert np.linalg.norm(np.maximum(X @ best, 0) @ nu) == pytest.approx(lower, rel=1e-12)


def test_projections_of_the_reference_survive_a_wrong_nnls(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    K = rng.normal(size=(5, 3))
    K = np.vstack([K, K[:2], -K[:1]])
    K /= np.linalg.norm(K, axis=1, keepdims=True)
    points = rng.normal(size=(10, 3))
    right = [project(K, g) for g in points]
    monkeypatch.setattr("tests.soundness.relu_norms.nnls", lambda A, b, maxiter: (np.zeros(A.shape[1]), 0.0))
    for g, expected in zip(points, right, strict=True):
        assert np.abs(project(K, g) - expected).max() < 1e-12


@pytest.mark.parametrize("index", [1, 4, 8, 25])
def test_relu_reference_duals_are_below_random_networks(index: int) -> None:
    reference = ReluReference(random_relu_instance(2, index, small=True))
    rng = np.random.default_rng(index)
    best = reference.interval
    for _ in range(10):
        value, nu = reference.dual_value(rng.normal(size=reference.Y.shape) * 10 ** rng.uniform(-3, 1))
        assert reference.dual_norm(nu)[1] <= reference.beta * (1 + 1e-12)
        assert value <= best.upper * (1 + 1e-12)


#: Gated and linear CNNs; and ReLU ones, of all neurons and of given gates.
CNN_PROBLEMS, CNN_RELU_PROBLEMS = range(5), (3, 24)


@pytest.fixture(scope="module")
def cnn_reports() -> list[Report]:
    reports = [check_cnn_problem(0, index, small=True) for index in CNN_PROBLEMS]
    return reports + [check_cnn_relu_problem(0, index, small=True) for index in CNN_RELU_PROBLEMS]


def test_no_certificate_of_a_cnn_is_contradicted(cnn_reports: list[Report]) -> None:
    assert [violation for report in cnn_reports for violation in report.violations] == []
    assert summarise(cnn_reports)["certificates"] > 15 * len(cnn_reports)
    assert sum(report.relative_width > WIDE for report in cnn_reports) <= 1


@pytest.mark.parametrize("tamper", ["dual_norm", "cnn_pooling"])
def test_deliberate_mistakes_in_cnns_are_found(tamper: str) -> None:
    found = [check_cnn_problem(0, index, tamper, small=True).violations for index in (0, 1)]
    assert any(found)


def test_deliberate_mistakes_in_relu_cnns_are_found() -> None:
    statements = {violation.statement for violation in check_cnn_relu_problem(0, 3, "one_sign", small=True).violations}
    assert "lower_bound <= p*" in statements


def test_cnn_problems_are_varied() -> None:
    instances = [random_cnn_instance(0, index) for index in range(64)]
    geometries = [instance.geometry for instance in instances]
    assert len({(i.loss, i.reduction, i.output_bias) for i in instances}) == 16
    assert {len(geometry.pooling) for geometry in geometries} >= {1, 2, 3, 4}
    assert len({(g.stride, g.padding, g.hidden_bias) for g in geometries}) > 20
    assert any((geometry.pooling < 0).any() for geometry in geometries)
    assert {instance.gates is None for instance in instances} == {True, False}
    relu = [random_cnn_relu_instance(0, index) for index in range(72)]
    assert len({(i.loss, i.reduction, i.output_bias, i.gates is None) for i in relu}) == 24
    assert max(len(instance.X) for instance in relu) <= 24


def test_command_serves_cnns(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--architecture", "cnn", "--activation", "relu", "--problems", "1", "--jobs", "1", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["certificates"] > 15
    with pytest.raises(SystemExit):
        main(["--architecture", "cnn", "--outputs", "vector"])
