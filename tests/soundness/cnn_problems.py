"""Random CNN problems in plain NumPy: geometries, poolings, biases, hard images among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cvxnn
from cvxnn.losses import Huber
from tests.soundness.problems import OTHER_NORMS, random_targets, random_weights

__all__ = ["CNNInstance", "Geometry", "random_cnn_instance", "random_images"]

_LOSSES = ("squared", "cross_entropy", "huber", "logistic")


@dataclass(frozen=True)
class Geometry:
    """Filter, stride and padding (height, width), whether patches have a one, and P_a (a, K)."""

    filter_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    hidden_bias: bool
    pooling: np.ndarray

    def patches(self, images: np.ndarray) -> np.ndarray:
        """X_i of every image, (n, K, h), cut out one by one."""
        (f, g), (s, t), (p, q) = self.filter_size, self.stride, self.padding
        padded = np.pad(images, ((0, 0), (0, 0), (p, p), (q, q)))
        rows, columns = (padded.shape[2] - f) // s + 1, (padded.shape[3] - g) // t + 1
        found = [
            padded[:, :, i * s : i * s + f, j * t : j * t + g].reshape(len(images), -1)
            for i in range(rows)
            for j in range(columns)
        ]
        patches = np.stack(found, 1)
        ones = np.ones((*patches.shape[:2], 1))
        return np.concatenate([patches, ones], 2) if self.hidden_bias else patches


@dataclass(frozen=True)
class CNNInstance:
    """A problem without its beta; see `tests.soundness.problems.Instance`. ``gates`` are (h, P) or None."""

    index: int
    images: np.ndarray
    geometry: Geometry
    Y: np.ndarray
    gates: np.ndarray | None
    loss: str
    delta: float
    reduction: str
    output_bias: bool
    sample_weight: np.ndarray | None
    norms: tuple[str, str]
    fraction: float
    dtype: str
    storage: str
    traits: tuple[str, ...]

    @property
    def weights(self) -> np.ndarray:
        """Weights of the losses of the samples, (n,): the reduction and the sample weights."""
        given = np.ones(len(self.Y)) if self.sample_weight is None else self.sample_weight
        return given / given.sum() if self.reduction == "mean" else given

    @property
    def patterns(self) -> np.ndarray:
        """Where each gate is active, (n, K, P) bool."""
        X = self.geometry.patches(self.images)
        return np.ones((*X.shape[:2], 1), dtype=bool) if self.gates is None else X @ self.gates >= 0

    @property
    def pooled(self) -> np.ndarray:
        """Phi (n, a, P, h) by its definition."""
        X = self.geometry.patches(self.images).astype(np.longdouble)
        pooling = self.geometry.pooling.astype(np.longdouble)
        return np.einsum("ap,npk,nph->nakh", pooling, self.patterns, X).astype(float)

    def problem(self, beta: float) -> cvxnn.Problem:
        """The problem of cvxnn."""
        return cvxnn.cnn_problem(
            self.images,
            self.Y,
            activation="linear" if self.gates is None else "gated_relu",
            filter_size=self.geometry.filter_size,
            stride=self.geometry.stride,
            padding=self.geometry.padding,
            pooling=self.geometry.pooling,
            gates=self.gates,
            beta=beta,
            loss=Huber(self.delta) if self.loss == "huber" else self.loss,
            reduction=self.reduction,
            hidden_bias=self.geometry.hidden_bias,
            output_bias=self.output_bias,
            norms=self.norms,
            sample_weight=self.sample_weight,
            features=self.storage,
            dtype=self.dtype,
        )


def random_cnn_instance(seed: int, index: int, small: bool = False) -> CNNInstance:
    """Problem number `index` of the sequence of `seed`; losses, reductions and the output bias go round."""
    rng = np.random.default_rng([seed, index, 23])
    loss = _LOSSES[index % 4]
    n, c = int(rng.integers(4, 11 if small else 21)), int(rng.integers(2 if loss == "cross_entropy" else 1, 4))
    dtype = "float32" if rng.random() < 0.15 else "float64"
    images, traits = random_images(rng, n, small)
    images = images.astype(dtype).astype(np.float64)
    geometry = _random_geometry(rng, *images.shape[1:], small)
    h = geometry.patches(images[:1]).shape[2]
    flat = geometry.patches(images).mean(1)
    Y = random_targets(rng, flat, loss, c).astype(dtype).astype(np.float64)
    gates = None
    if rng.random() > 0.2:
        gates = rng.normal(size=(h, int(rng.integers(1, 4 if small else 6))))
        if rng.random() < 0.2:
            gates[:, 0] = 0
    norms = OTHER_NORMS[rng.integers(len(OTHER_NORMS))] if rng.random() < 0.2 else ("l2", "l2")
    return CNNInstance(
        index=index,
        images=images,
        geometry=geometry,
        Y=Y,
        gates=gates,
        loss=loss,
        delta=float(10 ** rng.uniform(-1, 1)),
        reduction=("mean", "sum")[index // 4 % 2],
        output_bias=bool(index // 8 % 2),
        sample_weight=random_weights(rng, n) if rng.random() < 0.3 else None,
        norms=norms,
        fraction=float(10 ** rng.uniform(-5, 0)),
        dtype=dtype,
        storage=("cached", "recomputed")[index % 2],
        traits=tuple(traits),
    )


def random_images(rng: np.random.Generator, n: int, small: bool) -> tuple[np.ndarray, list[str]]:
    """Images (n, channels, H, W), and what is unusual about them."""
    side = 4 if small else 6
    shape = (n, int(rng.integers(1, 3)), int(rng.integers(2, side + 1)), int(rng.integers(2, side + 1)))
    images, traits = rng.normal(size=shape), []
    if rng.random() < 0.2:
        images[rng.integers(n, size=1 + n // 8)] = 0
        traits.append("zero images")
    if rng.random() < 0.2:
        images[rng.integers(n, size=1 + n // 4)] = rng.normal()
        traits.append("constant images")
    if rng.random() < 0.2:
        images[rng.integers(n, size=1 + n // 4)] = images[rng.integers(n)]
        traits.append("duplicate images")
    if rng.random() < 0.2:
        images = images * 10 ** rng.uniform(-3, 3, size=(1, shape[1], 1, 1))
        traits.append("ill-scaled channels")
    if rng.random() < 0.1:
        images = images * 10 ** rng.uniform(-2, 2, size=(n, 1, 1, 1))
        traits.append("ill-scaled images")
    if rng.random() < 0.2:
        images = np.abs(images) * rng.integers(0, 2, shape)
        traits.append("background")
    return images, traits


def _random_geometry(rng: np.random.Generator, channels: int, height: int, width: int, small: bool) -> Geometry:
    padding = int(rng.integers(0, 2)), int(rng.integers(0, 2))
    sides = height + 2 * padding[0], width + 2 * padding[1]
    most = 2 if small or channels > 1 else 3
    filter_size = int(rng.integers(1, min(most, sides[0]) + 1)), int(rng.integers(1, min(most, sides[1]) + 1))
    stride = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    grid = [(side - f) // s + 1 for side, f, s in zip(sides, filter_size, stride, strict=True)]
    return Geometry(filter_size, stride, padding, bool(rng.random() < 0.5), _random_pooling(rng, grid))


def _random_pooling(rng: np.random.Generator, grid: list[int]) -> np.ndarray:
    """Averages over a grid of cells, or a matrix with signs, zeros and now and then a cell that pools nothing."""
    K = grid[0] * grid[1]
    if rng.random() < 0.4:
        P = rng.normal(size=(int(rng.integers(1, 4)), K)) * rng.integers(0, 2, K)
        if rng.random() < 0.2:
            P[0] = 0
        return P
    cells = [int(rng.integers(1, min(2, side) + 1)) for side in grid]
    P = np.zeros((*cells, *grid))
    for i in range(cells[0]):
        for j in range(cells[1]):
            rows = slice(i * grid[0] // cells[0], -(-(i + 1) * grid[0] // cells[0]))
            columns = slice(j * grid[1] // cells[1], -(-(j + 1) * grid[1] // cells[1]))
            P[i, j, rows, columns] = 1 / P[i, j, rows, columns].size
    return P.reshape(cells[0] * cells[1], K)
