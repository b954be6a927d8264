"""Self-attention blocks as training problems."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cvxnn.distributed import common_seed
from cvxnn.errors import InvalidInputError
from cvxnn.losses import Loss
from cvxnn.operators import AttentionOperator
from cvxnn.operators.pairs import allowed_pairs
from cvxnn.operators.queries import OUTPUTS, Queries
from cvxnn.operators.tokens import TokenMask, read_tokens
from cvxnn.problem import Problem
from cvxnn.problems.task import read_task
from cvxnn.problems.token_gates import choose_token_gates
from cvxnn.validation import as_array, check_choice, check_range

__all__ = ["attention_problem"]


def attention_problem(
    tokens: Any,
    Y: Any,
    *,
    activation: str = "gated_relu",
    output: str = "mean",
    mask: Any = None,
    gates: Any = None,
    n_gates: int = 100,
    beta: float = 1e-2,
    loss: str | Loss = "squared",
    reduction: str = "mean",
    output_bias: bool = False,
    norms: tuple[str, str] = ("l2", "l2"),
    sample_weight: Any = None,
    gate_sampling: str = "gaussian",
    max_cells: int | None = None,
    random_state: Any = 0,
    dtype: Any = "float64",
    device: Any = "cpu",
) -> Problem:
    """The training problem of a block of self-attention in convex form (equations (104), (135) and (136)).

    The block (8) has heads j with matrices U_j (d x d) and V_j (d x c) and no softmax:
    ``f(X_i) = sum_j sigma(X_i U_j X_i^T) X_i V_j``, X_i (s x d) the tokens of sequence i (Lemmas 3.9 and B.3).

    Parameters
    ----------
    tokens : array-like of shape (n, s, d)
        Sequences of s tokens; what is at padding is not looked at. There is no hidden bias: append a one to each
        token where scores and values are to have one.
    Y : array-like
        With output "mean" as for :func:`cvxnn.mlp_problem`, (n,) or (n, c). With "tokens" (n, s, c), or (n, s): floats
        are one output, integers or strings class labels. Targets of padding are not looked at.
    activation : {"linear", "gated_relu", "relu"}
        "linear" has one block and no gates: sigma is the identity. Gated ReLU multiplies the scores of gate k by
        D_k^(i) = 1{X_i H_k X_i^T >= 0}. With "relu" the matrices of gate k are constrained to the cone
        (2 D_k^(i) - 1) o (X_i U X_i^T) >= 0 for all i, and solutions are plain ReLU blocks.
    output : {"mean", "tokens"}
        Predictions of a sequence are the mean over its valid tokens, or there are c for every valid token.
    mask : array-like of bool, shape (n, s), (s, s) or (n, s, s), optional
        (n, s): which tokens are valid; the others are padding. (1, s, s), (n, s, s), or (s, s) where n is not s: which
        token (row) sees which (column); a token that neither sees nor is seen is padding.
    gates : array-like of shape (P, d, d), "enumerate" or None
        Matrices H_k, kept in order and number. "enumerate" takes one for every open cell of the arrangement of all
        pairs of tokens that see one another, in dimension d^2 (small rank only); None draws `n_gates`.
    n_gates : int
        Number of draws; equal patterns are merged and patterns without an active pair dropped.
    beta, loss, reduction, norms
        As for :func:`cvxnn.mlp_problem`; "mean" divides by the number of sequences, for "tokens" too.
    output_bias : bool
        An intercept per output, unpenalised and minimised out.
    sample_weight : array-like of shape (n,), optional
        Non-negative weights of the sequences.
    gate_sampling : {"gaussian", "differences", "whitened", "kmeans"}
        How gates are drawn: normal matrices, or from pairs of tokens x_t x_t'^T: differences, whitened pairs, or the
        centres of their clusters.
    max_cells : int, optional
        Limit of "enumerate"; more cells are refused.
    random_state : int, RandomState or None
    dtype : {"float64", "float32"}
        Working type of the solvers. The tokens are rounded to it once; gates and certificates are computed in float64
        for exactly the rounded tokens.
    device : str
        "cpu", "cuda" or "auto".

    Returns
    -------
    Problem
        Its blocks Z_k are d^2 x (d c): row index k d + a for U[a, k], column index l c + b for V[l, b]. A row of its
        predictions is a sequence or, with output "tokens", a valid token, sequence by sequence. ``gates`` are
        (P, d, d) and ``patterns`` (n, s, s, P), False for pairs that do not count.

    Raises
    ------
    InvalidInputError
        Wrong shapes or values, NaN or infinities in valid tokens, sequences without a valid token, only one class.
    UnsupportedError
        Too many cells to enumerate, or norms that ReLU is not available for.

    Notes
    -----
    The cones of ReLU, and their cells, are those of the rows x_t x_t'^T in float64.

    Examples
    --------
    >>> import cvxnn
    >>> from sklearn.datasets import load_digits
    >>> data = load_digits()
    >>> tokens = data.images[:200] / 16  # 8 tokens of 8 pixels
    >>> problem = cvxnn.attention_problem(tokens, data.target[:200], activation="linear", beta=1e-2)
    >>> cvxnn.solve(problem, tol=1e-4).status
    'certified'
    """
    check_choice(output, "output", OUTPUTS)
    random_state = common_seed(random_state)
    array, found = read_tokens(tokens, mask)
    rows = None
    if output == "tokens":
        Y, rows = _token_targets(Y, found)
    task = read_task(Y, activation, beta, loss, reduction, norms, sample_weight, False, output_bias, dtype, device)
    task.check_samples(len(array), rows)
    tensor = torch.tensor(array, dtype=task.dtype).to(task.device)
    check_range(tensor, "tokens", least=0.0)
    _check_cubes(tensor)
    found = found.to(task.device)
    queries = Queries.of_mask(found, output)
    if not task.gated(gates):
        allowed = None if found.pairs is None else allowed_pairs(found)
        return task.problem(AttentionOperator(tensor, queries, task.n_outputs, allowed), "linear_network")
    allowed = allowed_pairs(found)
    chosen = choose_token_gates(
        tensor, queries, allowed, gates, n_gates, gate_sampling, max_cells, random_state, activation
    )
    operator = AttentionOperator(tensor, queries, task.n_outputs, allowed, chosen.gates, chosen.bits, activation)
    return task.problem(operator, chosen.scope, chosen.coverage)


def _token_targets(Y: Any, mask: TokenMask) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the valid tokens, and the sequence of each."""
    array = as_array(Y, "Y")
    n, s = mask.valid.shape
    if array.ndim not in (2, 3) or array.shape[:2] != (n, s):
        raise InvalidInputError(
            f"Y has shape {array.shape}; ({n}, {s}) or ({n}, {s}, outputs), targets of every token, are wanted"
        )
    valid = mask.valid.numpy()
    return array[valid], np.nonzero(valid)[0]


def _check_cubes(tokens: torch.Tensor) -> None:
    """Refuse tokens that products of three overflow or underflow for."""
    largest = float(tokens.abs().max())
    limit = (torch.finfo(tokens.dtype).max / tokens.numel()) ** (1 / 6)
    if largest > limit or 0 < largest < 1 / limit:
        way = "overflow" if largest > 1 else "underflow"
        kind = str(tokens.dtype).removeprefix("torch.")
        raise InvalidInputError(
            f"tokens have entries of up to {largest:g}; the squares of products of three {way} in {kind}; rescale them"
        )
    assert math.isfinite(largest)
