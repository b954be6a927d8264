"""Two-layer perceptrons as training problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cvxnn.distributed import common_seed
from cvxnn.gates import choose_gates
from cvxnn.losses import Loss
from cvxnn.memory import check_memory
from cvxnn.operators import MLPOperator
from cvxnn.problem import Problem
from cvxnn.problems.rows import as_row_source, streamed_operator
from cvxnn.problems.task import Task, read_task
from cvxnn.validation import as_matrix, check_range, without_copy

__all__ = ["mlp_problem"]


def _check_memory(X: Any, task: Task, n_gates: int) -> None:
    """Copies of X in float64, with the column of ones, and in the type of the problem; patterns of a byte."""
    shape: tuple[int, ...] = tuple(getattr(X, "shape", ()))
    if len(shape) != 2:
        return
    double = str(getattr(X, "dtype", "")).endswith("float64")
    per_row = shape[1] * (8 * ((not double) + task.hidden_bias) + task.dtype.itemsize) + n_gates
    advice = "X as a numpy.memmap or a RowSource is read in passes"
    check_memory(shape[0] * per_row, torch.device("cpu"), f"a problem with X of shape {shape}", advice)


def mlp_problem(
    X: Any,
    Y: Any,
    *,
    activation: str = "gated_relu",
    gates: Any = None,
    n_gates: int = 100,
    beta: float = 1e-2,
    loss: str | Loss = "squared",
    reduction: str = "mean",
    hidden_bias: bool = False,
    output_bias: bool = False,
    norms: tuple[str, str] = ("l2", "l2"),
    sample_weight: Any = None,
    gate_sampling: str = "gaussian",
    gate_quantile: float | Sequence[float] | None = None,
    max_cells: int | None = None,
    random_state: Any = 0,
    dtype: Any = "float64",
    device: Any = "cpu",
) -> Problem:
    """The training problem of a two-layer perceptron in convex form (equations (2), (3) and (5)).

    Parameters
    ----------
    X : array-like of shape (n, d) or RowSource
        Data, NumPy or torch (or a data frame of numbers). A ``numpy.memmap`` and sources such as
        :class:`cvxnn.ParquetRows` are not copied: rows are read when they are needed, in passes, and only their
        patterns are kept, a bit per gate. ReLU and "enumerate" need them in memory.
    Y : array-like of shape (n,) or (n, c)
        1-D integers or strings are class labels (one-hot, one column per class); 1-D floats are one
        regression output; 2-D is taken as it is.
    activation : {"linear", "gated_relu", "relu"}
        "linear" has one block and no gates. With "relu" the columns of U_k are constrained to the cone
        (2 D_k - I) X u >= 0 (19), and solutions are plain ReLU networks.
    gates : array-like of shape (d, P), "enumerate" or None
        Gate vectors, kept in order and number; "enumerate" takes one for every open cell of the
        arrangement (small rank only), for ReLU all that its neurons can have; None draws `n_gates`. With
        `hidden_bias` a gate has d + 1 entries.
    n_gates : int
        Number of draws; equal patterns are merged and patterns without an active sample dropped.
    beta : float
        Regularisation, never rescaled: beta for "mean" is beta for "sum" divided by n.
    loss : {"squared", "cross_entropy", "huber", "logistic"} or Loss
        "squared" is 1/2 ||.||^2.
    reduction : {"mean", "sum"}
        "sum" adds the losses of samples and outputs, "mean" divides that by n (never by c).
    hidden_bias : bool
        Append a column of ones to X, seen by the gates and penalised.
    output_bias : bool
        An intercept per output, unpenalised and minimised out.
    norms : pair of {"l1", "l2", "linf"}
        Norm of the columns of the left factor, and of the right factor (Lemma 3.1); l2 with l2 for ReLU.
    sample_weight : array-like of shape (n,), optional
        Non-negative weights; with "mean" the losses are divided by their sum.
    gate_sampling : {"gaussian", "differences", "whitened", "kmeans"}
        How gates are drawn: normal vectors, differences of pairs of samples, whitened samples, or the centres of
        their clusters.
    gate_quantile : float in (0, 1), or several, optional
        Threshold of drawn gates: each is active on a fraction 1 - quantile of the samples; several are taken in
        turn. Needs `hidden_bias`.
    max_cells : int, optional
        Limit of "enumerate"; more cells are refused.
    random_state : int, RandomState or None
    dtype : {"float64", "float32"}
        Working type of the solvers. The data are rounded to it once; certificates are computed in
        float64 for exactly the rounded data.
    device : str
        "cpu", "cuda" or "auto".

    Returns
    -------
    Problem

    Raises
    ------
    InvalidInputError
        Wrong shapes or values, NaN or infinities, only one class.
    UnsupportedError
        Too many cells to enumerate, or norms that ReLU is not available for.

    Examples
    --------
    >>> import cvxnn
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> problem = cvxnn.mlp_problem((X - X.mean(0)) / X.std(0), y, n_gates=20, beta=1e-2)
    >>> cvxnn.solve(problem, tol=1e-4).status
    'certified'
    """
    random_state = common_seed(random_state)
    task = read_task(
        Y, activation, beta, loss, reduction, norms, sample_weight, hidden_bias, output_bias, dtype, device
    )
    source = as_row_source(X)
    needed_in_memory = isinstance(X, np.memmap) and (activation == "relu" or isinstance(gates, str))
    if source is not None and not needed_in_memory:
        task.check_samples(len(source))
        sampling = {"n_gates": n_gates, "gate_sampling": gate_sampling, "gate_quantile": gate_quantile}
        return task.problem(*streamed_operator(source, task, gates, **sampling, random_state=random_state))
    if not isinstance(X, np.memmap):
        _check_memory(X, task, n_gates if gates is None and isinstance(n_gates, int) else 1)
    data = as_matrix(X, "X")
    task.check_samples(len(data))
    if task.hidden_bias:
        data = np.hstack([data, np.ones((len(data), 1))])
    # A memory-mapped array in the type of the problem stays where it is.
    mapped = isinstance(X, np.memmap) and not task.hidden_bias and task.dtype == torch.float64
    tensor = without_copy(data) if mapped else torch.tensor(data, dtype=task.dtype)
    check_range(tensor, "X")

    found = None
    if task.gated(gates):
        found = choose_gates(
            tensor.double().numpy(),
            gates,
            n_gates,
            task.hidden_bias,
            gate_sampling,
            gate_quantile,
            max_cells,
            random_state,
            activation,
        )
    if found is None:
        return task.problem(MLPOperator(tensor.to(task.device), task.n_outputs), "linear_network")
    bits = torch.from_numpy(found.patterns).to(task.device)
    operator = MLPOperator(tensor.to(task.device), task.n_outputs, found.gates, bits, activation)
    return task.problem(operator, found.scope, found.coverage)
