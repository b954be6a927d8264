"""Random ReLU CNN problems with one output and one cell, of patches of rank 3 at most, in plain NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cvxnn
from cvxnn.losses import Huber
from tests.soundness.cnn_problems import Geometry
from tests.soundness.problems import random_targets, random_weights

__all__ = ["CNNReluInstance", "random_cnn_relu_instance"]

_LOSSES = ("squared", "huber", "logistic")


@dataclass(frozen=True)
class CNNReluInstance:
    """A problem without its beta; see `tests.soundness.relu_problems.ReluInstance`, whose rows are patches here."""

    index: int
    data: np.ndarray
    geometry: Geometry
    Y: np.ndarray
    gates: np.ndarray | None
    loss: str
    delta: float
    reduction: str
    output_bias: bool
    sample_weight: np.ndarray | None
    fraction: float
    dtype: str
    caps: bool
    storage: str

    @property
    def X(self) -> np.ndarray:
        """All patches of all images, (n K, h)."""
        return np.concatenate(list(self.geometry.patches(self.data)))

    @property
    def pool(self) -> np.ndarray:
        """How the patches make the samples, (n, n K)."""
        return np.kron(np.eye(len(self.data)), self.geometry.pooling)

    @property
    def weights(self) -> np.ndarray:
        """Weights of the losses of the samples, (n,): the reduction and the sample weights."""
        given = np.ones(len(self.Y)) if self.sample_weight is None else self.sample_weight
        return given / given.sum() if self.reduction == "mean" else given

    def problem(self, beta: float) -> cvxnn.Problem:
        """The problem of cvxnn."""
        return cvxnn.cnn_problem(
            self.data,
            self.Y,
            activation="relu",
            filter_size=self.geometry.filter_size,
            stride=self.geometry.stride,
            padding=self.geometry.padding,
            pooling=self.geometry.pooling,
            gates="enumerate" if self.gates is None else self.gates,
            beta=beta,
            loss=Huber(self.delta) if self.loss == "huber" else self.loss,
            reduction=self.reduction,
            hidden_bias=self.geometry.hidden_bias,
            output_bias=self.output_bias,
            sample_weight=self.sample_weight,
            features=self.storage,
            dtype=self.dtype,
        )


def random_cnn_relu_instance(seed: int, index: int, small: bool = False) -> CNNReluInstance:
    """Problem number `index` of the sequence of `seed`; losses, reductions, output bias and gates go round.

    Patches have at most three numbers, the one of the bias included, and there are at most 20 of them (10 if small).
    """
    rng = np.random.default_rng([seed, index, 29])
    loss, turn = _LOSSES[index % 3], index // 3
    hidden_bias = bool(rng.random() < 0.3)
    shapes = ((1, 1), (1, 2), (2, 1)) if hidden_bias else ((1, 2), (2, 1), (1, 3), (1, 1))
    filter_size = shapes[rng.integers(len(shapes))]
    channels = 2 if filter_size == (1, 1) else 1
    stride, padding = (int(rng.integers(1, 3)), int(rng.integers(1, 3))), (0, int(rng.integers(0, 2)))
    sides = int(rng.integers(2, 4)), int(rng.integers(3, 5))
    grid = [(side + 2 * p - f) // s + 1 for side, f, s, p in zip(sides, filter_size, stride, padding, strict=True)]
    K = grid[0] * grid[1]
    pooling = np.full((1, K), 1 / K) if rng.random() < 0.6 else rng.normal(size=(1, K)) * rng.integers(0, 2, K)
    pooling = pooling if pooling.any() else np.ones((1, K))
    geometry = Geometry(filter_size, stride, padding, hidden_bias, pooling)
    n = max(2, int(rng.integers(2, 1 + max(2, (10 if small else 20) // K))))
    dtype = "float32" if rng.random() < 0.15 else "float64"
    images = _random_images(rng, (n, channels, *sides)).astype(dtype).astype(np.float64)
    Y = random_targets(rng, geometry.patches(images).mean(1), loss, 1).astype(dtype).astype(np.float64)
    gates = None
    if turn // 4 % 3 == 2:
        gates = rng.normal(size=(geometry.patches(images[:1]).shape[2], int(rng.integers(1, 7))))
    return CNNReluInstance(
        index=index,
        data=images,
        geometry=geometry,
        Y=Y,
        gates=gates,
        loss=loss,
        delta=float(10 ** rng.uniform(-1, 1)),
        reduction=("mean", "sum")[turn % 2],
        output_bias=bool(turn // 2 % 2),
        sample_weight=random_weights(rng, n) if rng.random() < 0.3 else None,
        fraction=float(10 ** rng.uniform(-4, np.log10(2))),
        dtype=dtype,
        caps=bool(rng.random() < 0.5),
        storage=("cached", "recomputed")[index % 2],
    )


def _random_images(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal pixels, small integers, or pixels on an empty background; now and then the same image twice."""
    kind = rng.random()
    images = rng.normal(size=shape)
    if kind < 0.2:
        images = rng.integers(-2, 3, size=shape).astype(float)
    elif kind < 0.4:
        images = images * rng.integers(0, 2, shape)
    elif kind < 0.5:
        images = images * 10 ** rng.uniform(-6, 6)
    if rng.random() < 0.2:
        images[0] = images[-1]
    return images
