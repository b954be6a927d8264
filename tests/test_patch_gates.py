"""Gates of CNN problems that are changed after they were drawn: in one pass what otherwise takes two."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.errors import InvalidInputError
from cvxnn.operators import PatchGeometry
from cvxnn.problems import patch_gates
from cvxnn.problems.patch_gates import choose_patch_gates


def images(seed=0):
    """Bars on a background: few patches that differ, so that some drawn gates have equal patterns."""
    values = torch.zeros(40, 1, 7, 7, dtype=torch.float64)
    values[:, :, 2:4] = torch.randn(40, 1, 1, 1, generator=torch.Generator().manual_seed(seed)).sign()
    return values


def choose(geometry, adjust, gates=None):
    return choose_patch_gates(images(), geometry, gates, 40, "gaussian", None, None, 1, "gated_relu", adjust)


def moved(gates):
    """Every third gate as another one."""
    found = gates.copy()
    first = np.round(found[0] * 1e6).astype(np.int64) % 3 == 0
    found[-1, first] -= 0.5
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("limit", [2**17, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_gates_are_merged_by_what_was_drawn(bias, limit, packed, monkeypatch):
    monkeypatch.setattr(patch_gates, "_PATCHES", limit)
    if packed:
        monkeypatch.setattr("cvxnn.patterns.bits._PLAIN", 0)
    geometry = PatchGeometry((2, 2), (1, 1), (0, 0), bias)
    drawn, found = choose(geometry, None), choose(geometry, moved)
    assert 3 < drawn.gates.shape[1] < 40
    assert np.array_equal(found.gates, moved(drawn.gates))
    assert not np.array_equal(found.gates, drawn.gates)
    active = geometry(images()) @ torch.from_numpy(found.gates) >= 0
    assert torch.equal(found.bits.rows(slice(None)), active)
    assert found.bits.n_gates == found.gates.shape[1]
    assert found.scope == drawn.scope == "sampled_gates"
    same = choose(geometry, lambda gates: None)
    assert np.array_equal(same.gates, drawn.gates)
    assert torch.equal(same.bits.rows(slice(None)), drawn.bits.rows(slice(None)))
    # Given gates stay what they are.
    given = choose(geometry, moved, drawn.gates)
    assert np.array_equal(given.gates, drawn.gates)
    assert given.scope == "given_gates"


def test_problems_take_gates_with_their_patterns():
    geometry = PatchGeometry((2, 2), (1, 1), (0, 0), True)
    found = choose(geometry, moved)
    options = {"filter_size": 2, "hidden_bias": True, "pooling": 1}
    problem = cvxnn.cnn_problem(images().numpy(), np.arange(40) % 2, gates=found, **options)
    plain = cvxnn.cnn_problem(images().numpy(), np.arange(40) % 2, gates=found.gates, **options)
    assert problem.operator.bits is found.bits
    assert torch.equal(problem.patterns, plain.patterns)
    assert problem.beta_max == plain.beta_max
    assert problem.scope == "sampled_gates"
    with pytest.raises(InvalidInputError, match="gates are given but activation is 'linear'"):
        cvxnn.cnn_problem(images().numpy(), np.arange(40) % 2, gates=found, activation="linear", **options)
