"""Small problems and explicit matrices that several test files share."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn.operators import MLPOperator
from cvxnn.problem import Problem

LOSSES = ("squared", "cross_entropy", "huber", "logistic")
NORMS = tuple((left, right) for left in ("l1", "l2", "linf") for right in ("l1", "l2", "linf"))


def make_data(n: int = 24, d: int = 3, c: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X (n, d), regression targets (n, c), and labels (n,) of c classes (at least two), all present."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    scores = X @ rng.standard_normal((d, max(c, 2))) + 0.3 * rng.standard_normal((n, max(c, 2)))
    labels = scores.argmax(1)
    labels[: max(c, 2)] = np.arange(max(c, 2))
    return X, np.tanh(scores[:, :c]), labels


def make_problem(
    loss: str = "squared", *, n: int = 24, d: int = 3, c: int = 2, seed: int = 0, **options: Any
) -> Problem:
    """A problem that every solver finishes in a fraction of a second."""
    X, Y, labels = make_data(n, d, c, seed)
    targets = np.eye(max(c, 2))[labels] if loss in ("cross_entropy", "logistic") else Y
    return cvxnn.mlp_problem(X, targets, loss=loss, **({"n_gates": 5, "beta": 2e-2} | options))


def process_context() -> Any:
    """Processes that begin with what the tests of several processes import, as a fork of one that has it already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed_worker", "tests.kills", "cvxnn.layerwise"])
    return context


def explicit_matrix(op: MLPOperator) -> np.ndarray:
    """The n x (P d) matrix [D_1 X, ..., D_P X], from its definition."""
    X, bits = op.X.double().numpy(), op.patterns.numpy()
    return np.concatenate([bits[:, [k]] * X for k in range(bits.shape[1])], axis=1)


def random_blocks(problem: Problem, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Blocks Z of the right shape, float64."""
    shape = problem.operator.block_shape
    return scale * torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
