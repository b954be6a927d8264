"""Certificates of one random CNN problem, held against the interval around its optimum."""

from __future__ import annotations

from tests.soundness.check import Report, check_instance
from tests.soundness.cnn_problems import random_cnn_instance
from tests.soundness.cnn_relu_problems import random_cnn_relu_instance
from tests.soundness.relu_check import check_relu_instance

__all__ = ["check_cnn_problem", "check_cnn_relu_problem"]


def check_cnn_problem(seed: int, index: int, tamper: str | None = None, small: bool = False) -> Report:
    """Check linear or gated CNN problem number `index` of a seed, as `check_problem` does perceptrons."""
    return check_instance(random_cnn_instance(seed, index, small), seed, tamper)


def check_cnn_relu_problem(seed: int, index: int, tamper: str | None = None, small: bool = False) -> Report:
    """Check ReLU CNN problem number `index` of a seed, with one output and one cell, where dual norms are exact."""
    return check_relu_instance(random_cnn_relu_instance(seed, index, small), seed, tamper, small)
