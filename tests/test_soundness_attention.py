"""Certificates of attention problems against independent intervals around their optima.

The full run is ``python -m tests.soundness --architecture attention``.
"""

import json

import numpy as np
import pytest

from tests.soundness.__main__ import WIDE, main
from tests.soundness.attention import AttentionReference, check_attention_problem
from tests.soundness.attention_problems import random_attention_instance
from tests.soundness.check import Report

#: Linear and gated blocks; ReLU with one feature and with two.
PROBLEMS = (0, 2, 5, 8, 9, 10, 12, 13, 3, 11, 15)


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [check_attention_problem(0, index) for index in PROBLEMS]


def test_no_certificate_is_contradicted(reports: list[Report]) -> None:
    assert [violation for report in reports for violation in report.violations] == []
    assert sum(report.n_certificates for report in reports) > 20 * len(PROBLEMS)
    assert max(report.relative_width for report in reports) < WIDE


def test_deliberate_mistakes_are_found() -> None:
    found = 0
    for index in (4, 6, 8, 10, 12, 14):
        violations = check_attention_problem(0, index, "dual_norm").violations
        found += "lower_bound <= p*" in {violation.statement for violation in violations}
    assert found > 3


def test_problems_are_varied() -> None:
    instances = [random_attention_instance(0, index) for index in range(100)]
    assert len({(i.loss, i.output, i.reduction, i.output_bias) for i in instances}) == 32
    assert len({(i.mask is None, i.gates is None, i.valid.all(), i.output) for i in instances}) >= 10
    traits = {trait for instance in instances for trait in instance.traits}
    assert traits >= {"grid", "ill-scaled tokens", "zero token", "duplicate tokens"}


@pytest.mark.parametrize("index", range(4))
def test_features_of_the_reference_are_those_of_heads(index: int) -> None:
    instance = random_attention_instance(1, index)
    reference = AttentionReference(instance)
    rng = np.random.default_rng(index)
    d, c = instance.tokens.shape[2], reference.Y.shape[1]
    U, V = rng.standard_normal((d, d)), rng.standard_normal((d, c))
    X, k = instance.tokens, instance.patterns.shape[3] - 1
    scores = np.einsum("nta,ab,nsb->nts", X, U, X) * instance.patterns[:, :, :, k]
    expected = instance.rows(np.einsum("nts,nsl,lc->ntc", scores, X, V))[reference.used]
    Z = np.zeros(reference.block_shape)
    Z[k] = np.outer(U.T.ravel(), V.ravel())
    np.testing.assert_allclose(
        reference.predictions(Z).astype(float), expected, rtol=1e-9, atol=1e-9 * abs(expected).max()
    )


def test_command_serves_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--architecture", "attention", "--problems", "1", "--first", "10", "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificates"] > 15
    with pytest.raises(SystemExit):
        main(["--architecture", "attention", "--activation", "relu"])
