"""Random problems of self-attention in plain NumPy, hard ones among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.soundness.problems import LOSSES, random_targets, random_weights

__all__ = ["AttentionInstance", "random_attention_instance"]


@dataclass(frozen=True)
class AttentionInstance:
    """A problem without its beta, as :class:`tests.soundness.problems.Instance`.

    ``tokens`` (n, s, d), zeros where there is padding; ``pairs`` (n, s, s): M; ``mask`` is what is passed on. ``Y``
    has a row per sequence, or per valid token; ``gates`` (P, d, d) is None for the linear block.
    """

    index: int
    tokens: np.ndarray
    mask: np.ndarray | None
    pairs: np.ndarray
    valid: np.ndarray
    output: str
    Y: np.ndarray
    gates: np.ndarray | None
    relu: bool
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
        """Weights of the losses of the rows: those of their sequences."""
        given = np.ones(len(self.tokens)) if self.sample_weight is None else self.sample_weight
        given = given / given.sum() if self.reduction == "mean" else given
        return given if self.output == "mean" else np.repeat(given, self.valid.sum(1))

    @property
    def patterns(self) -> np.ndarray:
        """M o D_k, bool (n, s, s, P)."""
        if self.gates is None:
            return self.pairs[:, :, :, None]
        scores = np.einsum("nta,kab,nsb->ntsk", self.tokens, self.gates, self.tokens)
        return (scores >= 0) & self.pairs[:, :, :, None]

    def rows(self, per_token: np.ndarray) -> np.ndarray:
        """Rows of predictions of what belongs to every token, (n, s, ...)."""
        if self.output == "tokens":
            return per_token[self.valid]
        sums = (per_token * self.valid[(...,) + (None,) * (per_token.ndim - 2)]).sum(1)
        return sums / self.valid.sum(1)[(...,) + (None,) * (per_token.ndim - 2)].astype(per_token.dtype)


def random_attention_instance(seed: int, index: int, relu: bool = False) -> AttentionInstance:
    """Problem number `index` of the sequence of `seed`: losses, outputs, reductions and the bias go round.

    With `relu` tokens have one feature and there is one output per row, or (every fourth) two features in few pairs.
    """
    rng = np.random.default_rng([seed, index, 7])
    loss = ("squared", "huber", "logistic")[index % 3] if relu else LOSSES[index % 4]
    turn = index // len(LOSSES)
    n, s, d = int(rng.integers(2, 8)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    c = int(rng.integers(2 if loss == "cross_entropy" else 1, 4))
    if relu:
        n, s, d, c = (1, 2, 2, 1) if index % 4 == 3 else (n, s, 1, 1)
    dtype = "float32" if rng.random() < 0.3 or (relu and d > 1) else "float64"
    tokens, traits = _random_tokens(rng, n, s, d)
    tokens = tokens.astype(dtype).astype(np.float64)
    mask, pairs, valid = _random_mask(rng, n, s)
    tokens = np.where(valid[:, :, None], tokens, 0.0)
    output = ("mean", "tokens")[turn % 2]
    n_rows = n if output == "mean" else int(valid.sum())
    features = tokens.mean(1) if output == "mean" else tokens[valid]
    Y = random_targets(rng, features if features.any() else features + 1, loss, c)
    assert len(Y) == n_rows
    gates = None
    if not relu and rng.random() < 0.7:
        gates = rng.normal(size=(int(rng.integers(1, 5)), d, d))
        if rng.random() < 0.2:
            gates[0] = 0
    return AttentionInstance(
        index=index,
        tokens=tokens,
        mask=mask,
        pairs=pairs,
        valid=valid,
        output=output,
        Y=Y.astype(dtype).astype(np.float64),
        gates=gates,
        relu=relu,
        loss=loss,
        delta=float(10 ** rng.uniform(-1, 1)),
        reduction=("mean", "sum")[turn // 2 % 2],
        output_bias=bool(turn // 4 % 2),
        sample_weight=random_weights(rng, n) if rng.random() < 0.3 else None,
        norms=("l2", "l2"),
        fraction=float(10 ** rng.uniform(-5, 0)),
        dtype=dtype,
        traits=tuple(traits),
    )


def _random_tokens(rng: np.random.Generator, n: int, s: int, d: int) -> tuple[np.ndarray, list[str]]:
    tokens, traits = rng.normal(size=(n, s, d)), []
    if rng.random() < 0.15:
        tokens = rng.integers(-2, 3, size=(n, s, d)).astype(float)
        traits.append("grid")
    if rng.random() < 0.2:
        tokens = tokens * 10 ** rng.uniform(-2, 2, size=(n, s, 1))
        traits.append("ill-scaled tokens")
    if rng.random() < 0.2:
        tokens[rng.integers(n, size=1 + n // 4)] = tokens[rng.integers(n)]
        traits.append("duplicate sequences")
    if rng.random() < 0.2:
        tokens[:, rng.integers(s)] = tokens[:, rng.integers(s)]
        traits.append("duplicate tokens")
    if rng.random() < 0.2:
        tokens[rng.integers(n), rng.integers(s)] = 0
        traits.append("zero token")
    if d > 1 and rng.random() < 0.2:
        tokens[:, :, -1] = 1
        traits.append("ones")
    return tokens, traits


def _random_mask(rng: np.random.Generator, n: int, s: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """What is passed on, M (n, s, s), and the valid tokens (n, s)."""
    kind = rng.integers(4)
    full = np.ones((n, s, s), dtype=bool)
    if kind == 0:
        return None, full, full[:, 0]
    if kind == 1:
        valid = rng.random((n, s)) < 0.7
        valid[np.arange(n), rng.integers(s, size=n)] = True
        pairs = valid[:, :, None] & valid[:, None, :]
        return (pairs if n == s else valid), pairs, valid
    if kind == 2:
        causal = np.tril(np.ones((1, s, s), dtype=bool))
        return causal, full & causal, full[:, 0]
    pairs = rng.random((n, s, s)) < 0.6
    pairs[np.arange(n), rng.integers(s, size=n), rng.integers(s, size=n)] = True
    return pairs, pairs, pairs.any(1) | pairs.any(2)
