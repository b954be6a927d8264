"""Gaussian data, and a network that has made the targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchopt import BaseDataset


class Dataset(BaseDataset):
    """`n` samples of `d` normal numbers; the outputs of a ReLU network with 5 neurons, and noise."""

    name = "generated"
    parameters = {"n, d": [(1000, 50)], "c": [1]}
    test_parameters = {"n, d": [(30, 4)], "c": [1]}

    def get_data(self) -> dict[str, Any]:
        """Data of the objective; there are no labels."""
        draw = np.random.default_rng(0)
        X = draw.standard_normal((self.n, self.d))
        hidden = np.maximum(X @ draw.standard_normal((self.d, 5)) / np.sqrt(self.d), 0)
        Y = hidden @ draw.standard_normal((5, self.c)) + 0.1 * draw.standard_normal((self.n, self.c))
        return {"X": X, "Y": Y}
