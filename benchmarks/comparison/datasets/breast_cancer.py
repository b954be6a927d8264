"""Breast cancer (scikit-learn), standardised."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmark_utils.samples import signs, with_test
from benchopt import BaseDataset
from sklearn.datasets import load_breast_cancer


class Dataset(BaseDataset):
    """569 samples of 30 numbers, 455 of them (drawn with seed 0) to train with; +-1."""

    name = "breast_cancer"
    requirements = ["scikit-learn"]

    def get_data(self) -> dict[str, Any]:
        """Data of the objective."""
        X, y = load_breast_cancer(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(X))
        X = (X - X.mean(0)) / X.std(0)
        return with_test(X[order], signs(y[order] == 1), 455)
