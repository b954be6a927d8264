"""Certificates against an independent interval around the optimum; the full run is ``python -m tests.soundness``."""

import json

import numpy as np
import pytest

from tests.soundness.__main__ import WIDE, main, summarise
from tests.soundness.check import Report, check_problem
from tests.soundness.problems import random_instance
from tests.soundness.reference import Reference

N_PROBLEMS = 40


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
