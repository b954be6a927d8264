"""Handwritten digits (scikit-learn), pixels in [0, 1]."""

from __future__ import annotations

from typing import Any

from benchmark_utils.samples import one_hot, signs, with_test
from benchopt import BaseDataset
from sklearn.datasets import load_digits


class Dataset(BaseDataset):
    """1,797 images of 8 x 8; the first `n` to train with. One output: +-1, is the digit at least 5?"""

    name = "digits"
    requirements = ["scikit-learn"]
    parameters = {"c": [1, 10], "n": [1437]}
    test_parameters = {"c": [1], "n": [50]}

    def get_data(self) -> dict[str, Any]:
        """Data of the objective."""
        X, y = load_digits(return_X_y=True)
        return with_test(X / 16, signs(y >= 5) if self.c == 1 else one_hot(y), self.n)
