"""Samples of Fashion-MNIST from the folder in CVXNN_DATA_DIR; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmark_utils.samples import one_hot, signs, with_test
from benchopt import BaseDataset

from cvxnn.errors import CvxnnError
from cvxnn.images import load_images


class Dataset(BaseDataset):
    """The first `n` training images, 784 pixels in [0, 1]; tested with 2,000 test images. One output: is it a shirt?"""

    name = "fashion_mnist"
    parameters = {"c": [1, 10], "n": [1000]}
    test_parameters = {"c": [1], "n": [30]}

    def get_data(self) -> dict[str, Any]:
        """Data of the objective."""
        try:
            parts = [load_images("fashion_mnist", split=split) for split in ("train", "test")]
        except CvxnnError as error:
            return {"X": None, "Y": None, "missing": str(error)}
        sizes = (self.n, 2_000)
        X = np.concatenate(
            [part.images[:n].reshape(n, -1) / 255 for part, n in zip(parts, sizes, strict=True)],
        )
        y = np.concatenate([part.labels[:n] for part, n in zip(parts, sizes, strict=True)])
        return with_test(X, signs(y == 6) if self.c == 1 else one_hot(y), self.n)
