"""The spiral of three classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmark_utils.samples import one_hot, with_test
from benchopt import BaseDataset

from cvxnn.datasets import spiral


class Dataset(BaseDataset):
    """`n` points in the plane, and a third feature that is one."""

    name = "spiral"
    parameters = {"n": [150]}
    test_parameters = {"n": [30]}

    def get_data(self) -> dict[str, Any]:
        """Data of the objective."""
        X, y = spiral(self.n)
        return with_test(np.column_stack([X, np.ones(len(X))]), one_hot(np.asarray(y)), len(X))
