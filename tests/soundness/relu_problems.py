"""Random ReLU training problems of low rank in plain NumPy, hard ones among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cvxnn
from cvxnn.losses import Huber
from tests.soundness.problems import random_targets, random_weights

__all__ = ["ReluInstance", "random_relu_instance"]

#: Cross-entropy needs two outputs.
_LOSSES = {"scalar": ("squared", "huber", "logistic"), "vector": ("squared", "cross_entropy", "huber", "logistic")}


@dataclass(frozen=True)
class ReluInstance:
    """A problem without its beta, which is ``fraction`` of the smallest beta that makes the zero network optimal.

    ``data`` (n, d) is without the column of ones of a hidden bias; ``gates`` (d, P) is None where all neurons are
    allowed.
    """

    index: int
    data: np.ndarray
    Y: np.ndarray
    gates: np.ndarray | None
    loss: str
    delta: float
    reduction: str
    hidden_bias: bool
    output_bias: bool
    sample_weight: np.ndarray | None
    fraction: float
    dtype: str
    caps: bool
    traits: tuple[str, ...]

    @property
    def X(self) -> np.ndarray:
        """The data as the neurons see them."""
        return np.hstack([self.data, np.ones((len(self.data), 1))]) if self.hidden_bias else self.data

    @property
    def pool(self) -> np.ndarray:
        """How the rows make the samples, (n, rows)."""
        return np.eye(len(self.data))

    def problem(self, beta: float) -> cvxnn.Problem:
        """The problem of cvxnn."""
        return cvxnn.mlp_problem(
            self.data,
            self.Y,
            activation="relu",
            gates="enumerate" if self.gates is None else self.gates,
            beta=beta,
            loss=Huber(self.delta) if self.loss == "huber" else self.loss,
            reduction=self.reduction,
            hidden_bias=self.hidden_bias,
            output_bias=self.output_bias,
            sample_weight=self.sample_weight,
            dtype=self.dtype,
        )

    @property
    def weights(self) -> np.ndarray:
        """Weights of the losses of the samples, (n,): the reduction and the sample weights."""
        given = np.ones(len(self.Y)) if self.sample_weight is None else self.sample_weight
        return given / given.sum() if self.reduction == "mean" else given


def random_relu_instance(seed: int, index: int, outputs: str = "scalar", small: bool = False) -> ReluInstance:
    """Problem number `index` of the sequence of `seed`, with one output or ("vector") two or three.

    The losses, reductions, the output bias and the choice of gates go round; everything else is drawn. X has rank 1 to
    3 and at most 20 rows (8 where `small`).
    """
    rng = np.random.default_rng([seed, index, len(outputs)])
    losses = _LOSSES[outputs]
    loss, turn = losses[index % len(losses)], index // len(losses)
    n = int(rng.integers(2, 9 if small else rng.choice([9, 15, 21])))
    hidden_bias = bool(rng.random() < 0.25)
    dtype = "float32" if rng.random() < 0.15 else "float64"
    rank = int(rng.choice([1, 2, 3], p=[0.1, 0.4, 0.5])) - hidden_bias
    data, traits = _random_data(rng, n, rank, dtype == "float32")
    data = data.astype(dtype).astype(np.float64)
    c = 1 if outputs == "scalar" else int(rng.integers(2, 4))
    Y = random_targets(rng, data if data.any() else data + 1, loss, c).astype(dtype).astype(np.float64)
    sample_weight = random_weights(rng, n) if rng.random() < 0.3 else None
    return ReluInstance(
        index=index,
        data=data,
        Y=Y,
        gates=_random_gates(rng, data, hidden_bias) if turn // 4 % 3 == 2 else None,
        loss=loss,
        delta=float(10 ** rng.uniform(-1, 1)),
        reduction=("mean", "sum")[turn % 2],
        hidden_bias=hidden_bias,
        output_bias=bool(turn // 2 % 2),
        sample_weight=sample_weight,
        fraction=float(10 ** rng.uniform(-4, np.log10(2))),
        dtype=dtype,
        caps=bool(rng.random() < 0.5),
        traits=tuple(traits),
    )


def _random_data(rng: np.random.Generator, n: int, rank: int, single: bool) -> tuple[np.ndarray, list[str]]:
    """Rows of at most this rank, exactly or up to rounding, with up to three features more than that."""
    traits = []
    if rank == 0:
        return rng.choice([0.0, 1.0], size=(n, 1)) * rng.normal(), ["rank 0 or constant"]
    grid = rng.random() < 0.15
    X = rng.integers(-2, 3, size=(n, rank)).astype(float) if grid else rng.normal(size=(n, rank))
    if grid:
        traits.append("grid")
    if rng.random() < 0.3:
        X[rng.integers(n, size=1 + n // 4)] = X[rng.integers(n)] * rng.choice([1.0, 3.0])
        traits.append("proportional rows")
    if rng.random() < 0.2:
        some = rng.integers(n, size=1 + n // 4)
        X[some] = -X[(some + 1) % n]
        traits.append("opposite rows")
    if rng.random() < 0.2:
        X[rng.integers(n, size=1 + n // 8)] = 0
        traits.append("zero rows")
    if rank > 1 and rng.random() < 0.2:
        X[:, -1] = 1
        traits.append("column of ones")
    more = int(rng.integers(0, 4))
    if more:
        # Exact multiples of single columns, which stay dependent in single precision, or sums up to rounding.
        exact = single or rng.random() < 0.5
        mix = np.eye(rank)[:, rng.integers(rank, size=more)] * rng.choice([-0.5, 1.0, 2.0], size=more)
        mix = mix if exact else rng.normal(size=(rank, more))
        X = np.hstack([X, X @ mix])
        traits.append("rank-deficient")
    kind = rng.random()
    if kind < 0.12:
        X = X * 10 ** rng.uniform(-8, 8)
        traits.append("scaled")
    elif kind < 0.2:
        X = X * 10 ** rng.uniform(-3, 3, size=(n, 1))
        traits.append("ill-scaled rows")
    elif kind < 0.27:
        X = X * 2.0 ** rng.integers(-10, 11, size=X.shape[1])
        traits.append("ill-scaled columns")
    return X, traits


def _random_gates(rng: np.random.Generator, data: np.ndarray, hidden_bias: bool) -> np.ndarray:
    """Normal gates, now and then copies, gates orthogonal to a sample and the gate 0, which is active everywhere."""
    X = np.hstack([data, np.ones((len(data), 1))]) if hidden_bias else data
    gates = rng.normal(size=(X.shape[1], int(rng.integers(1, 9))))
    if rng.random() < 0.2:
        gates[:, -1] = gates[:, 0]
    if rng.random() < 0.2:
        row = X[rng.integers(len(X))]
        if row.any():
            row = row / np.abs(row).max()
            gates[:, 0] -= row * (row @ gates[:, 0]) / (row @ row)
    if rng.random() < 0.1:
        gates[:, 0] = 0
    return gates
