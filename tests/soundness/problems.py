"""Random training problems in plain NumPy, hard ones among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cvxnn
from cvxnn.losses import Huber

__all__ = ["Instance", "random_instance"]

LOSSES = ("squared", "cross_entropy", "huber", "logistic")
OTHER_NORMS = (("l1", "l2"), ("l2", "l1"), ("l1", "l1"), ("l1", "linf"), ("linf", "l1"))


@dataclass(frozen=True)
class Instance:
    """A problem without its beta, which is ``fraction`` of the smallest beta that makes Z = 0 optimal.

    ``gates`` (d, P) is None for the linear network. ``traits`` names what is unusual about the data.
    """

    index: int
    X: np.ndarray
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
    traits: tuple[str, ...]

    @property
    def weights(self) -> np.ndarray:
        """Weights of the losses of the samples, (n,): the reduction and the sample weights."""
        given = np.ones(len(self.X)) if self.sample_weight is None else self.sample_weight
        return given / given.sum() if self.reduction == "mean" else given

    @property
    def patterns(self) -> np.ndarray:
        """Where each gate is active, (n, P) bool."""
        if self.gates is None:
            return np.ones((len(self.X), 1), dtype=bool)
        return self.X @ self.gates >= 0

    @property
    def pooled(self) -> np.ndarray:
        """What gate k sees of sample i, (n, 1, P, d): a CNN has a row for every cell."""
        return (self.patterns[:, :, None] * self.X[:, None, :])[:, None]

    def problem(self, beta: float) -> cvxnn.Problem:
        """The problem of cvxnn."""
        return cvxnn.mlp_problem(
            self.X,
            self.Y,
            activation="linear" if self.gates is None else "gated_relu",
            gates=self.gates,
            beta=beta,
            loss=Huber(self.delta) if self.loss == "huber" else self.loss,
            reduction=self.reduction,
            output_bias=self.output_bias,
            norms=self.norms,
            sample_weight=self.sample_weight,
            dtype=self.dtype,
        )


def random_instance(seed: int, index: int, small: bool = False) -> Instance:
    """Problem number `index` of the sequence of `seed`.

    The losses, reductions and the output bias go round, so that every combination comes up in 16 problems;
    everything else is drawn. `small` ones have at most 25 samples, 4 features, 3 outputs and 6 gates, the
    others 80, 8, 5 and 30.
    """
    rng = np.random.default_rng([seed, index])
    loss = LOSSES[index % 4]
    reduction = ("mean", "sum")[index // 4 % 2]
    most_samples, most_features, most_outputs, most_gates = (25, 4, 3, 6) if small else (80, 8, 5, 30)
    n, d = int(rng.integers(5, most_samples + 1)), int(rng.integers(1, most_features + 1))
    c = int(rng.integers(2 if loss == "cross_entropy" else 1, most_outputs + 1))
    X, traits = _random_data(rng, n, d)
    dtype = "float32" if rng.random() < 0.15 else "float64"
    X = X.astype(dtype).astype(np.float64)
    Y = random_targets(rng, X, loss, c).astype(dtype).astype(np.float64)
    norms = ("l2", "l2")
    if rng.random() < 0.2:
        norms = OTHER_NORMS[rng.integers(len(OTHER_NORMS))]
    return Instance(
        index=index,
        X=X,
        Y=Y,
        gates=None if rng.random() < 0.15 else _random_gates(rng, X, most_gates),
        loss=loss,
        delta=float(10 ** rng.uniform(-1, 1)),
        reduction=reduction,
        output_bias=bool(index // 8 % 2),
        sample_weight=random_weights(rng, n) if rng.random() < 0.3 else None,
        norms=norms,
        fraction=float(10 ** rng.uniform(-6, 0)),
        dtype=dtype,
        traits=tuple(traits),
    )


def _random_data(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, list[str]]:
    X, traits = rng.normal(size=(n, d)), []
    if d > 1 and rng.random() < 0.2:
        rank = int(rng.integers(1, d))
        X = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))
        traits.append("rank-deficient")
    if rng.random() < 0.2:
        X = X * 10 ** rng.uniform(-3, 3, size=d)
        traits.append("ill-scaled columns")
    if rng.random() < 0.1:
        X = X * 10 ** rng.uniform(-2, 2, size=(n, 1))
        traits.append("ill-scaled rows")
    if rng.random() < 0.3:
        X[rng.integers(n, size=n // 4)] = X[rng.integers(n)]
        traits.append("duplicate rows")
    if rng.random() < 0.3:
        X[rng.integers(n, size=1 + n // 8)] = 0
        traits.append("zero rows")
    if d > 1 and rng.random() < 0.2:
        X[:, -1] = 1
        traits.append("column of ones")
    return X, traits


def random_targets(rng: np.random.Generator, X: np.ndarray, loss: str, c: int) -> np.ndarray:
    """Targets that a network can fit in part: a random teacher with noise, or noise alone."""
    spread = X.std() or 1.0
    signal = np.maximum(X @ rng.normal(size=(X.shape[1], c)), 0) / spread * rng.choice([0, 1])
    scores = signal + rng.normal(size=signal.shape) * 10 ** rng.uniform(-2, 0.5)
    if loss in ("squared", "huber"):
        return scores * 10 ** rng.uniform(-1, 1)
    if loss == "logistic":
        if rng.random() < 0.3:
            return 1 / (1 + np.exp(-scores))
        labels = (scores > np.quantile(scores, rng.uniform(0.1, 0.9), axis=0)).astype(float)
        if rng.random() < 0.1:
            labels[:, 0] = rng.integers(2)
        return labels
    if rng.random() < 0.7:
        return np.eye(c)[scores.argmax(1)]
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def random_weights(rng: np.random.Generator, n: int) -> np.ndarray:
    weights = rng.uniform(0.1, 3, size=n)
    if rng.random() < 0.3:
        weights[rng.integers(n, size=n // 4)] = 0
    weights[0] = 1
    return weights


def _random_gates(rng: np.random.Generator, X: np.ndarray, most: int) -> np.ndarray:
    """Normal gates, some of them copies, and now and then the gate 0, which is active everywhere."""
    gates = rng.normal(size=(X.shape[1], int(rng.integers(1, most + 1))))
    if rng.random() < 0.2:
        gates[:, -1] = gates[:, 0]
    if rng.random() < 0.1:
        gates[:, 0] = 0
    return gates
