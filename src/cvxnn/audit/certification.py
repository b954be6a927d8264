"""`certify_network`: certificates for two-layer networks trained by anyone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cvxnn.audit.attention import make_attention_task
from cvxnn.audit.bounding import with_extra_gates
from cvxnn.audit.heads import Heads, read_heads
from cvxnn.audit.reading import Habits, read_network
from cvxnn.audit.report import NetworkReport, audit
from cvxnn.audit.task import first_point, make_task
from cvxnn.errors import InvalidInputError
from cvxnn.losses import get_loss
from cvxnn.validation import as_array, as_matrix, check_choice, check_flag, check_positive, encode_targets

__all__ = ["certify_network"]

#: Seconds for bounds over all neurons and for a witness, where no time is given for better ones.
_BOUND_TIME = 5.0


def certify_network(
    module: Any,
    X: Any,
    Y: Any,
    *,
    beta: float | None = None,
    loss: Any = None,
    reduction: str = "mean",
    penalize_biases: bool = False,
    gates: Any = None,
    activation: str | None = None,
    mask: Any = None,
    output: str | None = None,
    time_limit: float = 10.0,
    tol: float = 1e-4,
    random_state: Any = 0,
) -> NetworkReport:
    """Say how far a trained two-layer network can be from the global optimum of its training problem.

    Parameters
    ----------
    module : torch.nn.Module, mapping, tuple, scikit-learn MLP or estimator of cvxnn
        A module with two ``nn.Linear`` and a ReLU or nothing between them (found by structure, and checked against
        the module's own outputs); a state dict; weights (W1, W2) or (W1, b1, W2, b2) with W1 (m, d) and W2 (c, m) as
        in torch; ``MLPClassifier`` or ``MLPRegressor`` with one hidden layer; a
        :class:`cvxnn.networks.TwoLayerNetwork`. Nothing is changed in it. A block of linear attention
        sum_j X W1_j X^T X W2_j is {"W1": (m, d, d), "W2": (m, d, c)}, with a "bias" (c,) if any; or the projections
        {"query": (m, d, r), "key": (m, d, r), "value": (m, d, t), "out": (m, t, c)}, whose products are W1 and W2; or
        a module of these, checked against its own outputs; or a :class:`cvxnn.networks.AttentionNetwork`.
    X : array-like of shape (n, d)
        The training data as the network saw them; more than two dimensions are flattened. For attention tokens
        (n, s, d).
    Y : array-like of shape (n,) or (n, c)
        For attention with outputs per token (n, s, c) or (n, s).
        1-D integers or strings are class labels: indices of the outputs where they are 0 .. c-1, otherwise classes
        in sorted order. 1-D floats are one regression output; 2-D is taken as it is.
    beta : float
        Weight decay: the objective is F + beta/2 (||W1||^2 + ||W2||^2), for attention with the matrices of all heads
        (of projections it is on their products, and not on the projections). For scikit-learn it is alpha by default
        (alpha / n with "mean").
    loss : {"squared", "cross_entropy", "huber", "logistic"} or Loss
        "squared", which is 1/2 ||.||^2, by default; for scikit-learn its own.
    reduction : {"mean", "sum"}
        Mean over the samples (never over outputs), or sum.
    penalize_biases : bool
        Whether the biases have weight decay too. A hidden bias must have it, or be zero.
    gates : None, "enumerate", int or array-like (d, P)
        Further patterns for certificates relative to a sample of gates: given, or a number of Gaussian draws.
        "enumerate" takes all patterns of the data, however many. For weights with activation "gated_relu" these are
        the gates of the network itself, (d, m).
    activation : {"relu", "linear", "gated_relu"}, optional
        For weights, which do not tell ("relu" by default); a module is checked against it. Attention is linear.
    mask : array-like of bool, optional
        For attention: which tokens are valid, or which see which, as in :func:`cvxnn.attention_problem`.
    output : {"mean", "tokens"}, optional
        For weights of attention, which do not tell ("mean" by default, "tokens" where Y is (n, s, c)).
    time_limit : float
        Seconds for the search of better dual points and networks; 0 takes the network's own gradient only.
    tol : float
        Relative gap at which that search ends.
    random_state : int, RandomState or None
        Of drawn gates.

    Returns
    -------
    NetworkReport

    Raises
    ------
    InvalidInputError
        Wrong shapes or values, NaN or infinities.
    UnsupportedError
        Other networks than two linear layers with ReLU, nothing or gates between them, or a hidden bias without
        weight decay; attention with a softmax, a ReLU or gates.

    Examples
    --------
    >>> import cvxnn, torch
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> network = torch.nn.Sequential(
    ...     torch.nn.Linear(2, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1, bias=False)
    ... )
    >>> report = cvxnn.certify_network(network, X, torch.tensor([2.0, -2.0]), beta=0.5, reduction="sum")
    >>> round(report.improve().objective, 6)
    1.75
    """
    check_choice(reduction, "reduction", ("mean", "sum"))
    penalize_biases = check_flag(penalize_biases, "penalize_biases")
    time_limit = check_positive(time_limit, "time_limit", allow_zero=True)
    tol = check_positive(tol, "tol", allow_zero=True)
    if output is None and np.ndim(Y) == 3 and not isinstance(getattr(module, "network_", module), torch.nn.Module):
        output = "tokens"
    heads = read_heads(module, X, mask, output, activation)
    request = {
        "gates": None,
        "random_state": random_state,
        "tol": tol,
        "time_limit": time_limit,
        "bound_time": min(_BOUND_TIME, time_limit) if time_limit > 0 else _BOUND_TIME,
        "penalize_biases": penalize_biases,
    }
    shared: dict[str, Any] = {"reduction": reduction, "penalize_biases": penalize_biases}
    if heads is not None:
        targets, loss = _head_targets(Y, heads, loss)
        beta = _default_beta(Habits(), reduction, 1) if beta is None else beta
        block = make_attention_task(heads, targets, beta=check_positive(beta, "beta"), loss=get_loss(loss), **shared)
        with_extra_gates(block, gates, random_state)
        return audit(block, first_point(block, heads.network), source=heads.network.source, request=request)
    n_outputs = _known_outputs(Y)
    network, data, habits = read_network(module, X, n_outputs, activation, gates)
    targets, loss = _targets(Y, network.output.shape[1], habits, loss, len(data))
    if beta is None:
        beta = _default_beta(habits, reduction, len(data))
    task = make_task(
        network,
        data,
        targets,
        beta=check_positive(beta, "beta"),
        loss=get_loss(loss),
        **shared,
    )
    own_gates = network.activation == "gated_relu" and isinstance(module, (Mapping, tuple, list))
    task = with_extra_gates(task, None if own_gates else gates, random_state)
    request["gates"] = None if own_gates else gates
    return audit(task, first_point(task, network), source=network.source, request=request)


def _default_beta(habits: Habits, reduction: str, n_samples: int) -> float:
    if not habits.beta_sum:
        raise InvalidInputError("beta is not given; the weight decay that the network was trained with is wanted")
    return habits.beta_sum if reduction == "sum" else habits.beta_sum / n_samples


def _known_outputs(Y: Any) -> int | None:
    """Number of outputs, where the targets say it."""
    shape, kind = np.shape(Y), str(getattr(Y, "dtype", ""))
    if len(shape) == 2:
        return shape[1]
    return 1 if len(shape) == 1 and "float" in kind else None


def _head_targets(Y: Any, heads: Heads, loss: Any) -> tuple[torch.Tensor, Any]:
    """Targets (n, c), or (n, s, c) for outputs per token with zeros at padding, and the loss."""
    c = heads.n_outputs
    if heads.output == "mean":
        return _targets(Y, c, Habits(), loss, len(heads.tokens))
    array = as_array(Y, "Y")
    n, s = heads.mask.valid.shape
    if array.ndim not in (2, 3) or array.shape[:2] != (n, s):
        raise InvalidInputError(
            f"Y has shape {array.shape}; ({n}, {s}, {c}) or ({n}, {s}), targets of every token, is wanted"
        )
    rows, loss = _targets(array[heads.mask.valid.numpy()], c, Habits(), loss, int(heads.mask.valid.sum()))
    targets = rows.new_zeros(n, s, c)
    targets[heads.mask.valid] = rows
    return targets, loss


def _targets(Y: Any, c: int, habits: Habits, loss: Any, n_samples: int) -> tuple[torch.Tensor, Any]:
    """Targets (n, c), and the loss."""
    loss = habits.loss if loss is None else loss
    values = Y.detach().cpu().numpy() if isinstance(Y, torch.Tensor) else np.asarray(Y)
    if len(np.shape(values)) == 1 and len(values) != n_samples:
        raise InvalidInputError(f"Y has {len(values)} entries but X has {n_samples} rows; as many are wanted")
    if values.ndim == 1 and habits.classes is not None:
        return torch.from_numpy(_by_class(values, habits.classes, c)), loss
    if values.ndim == 1 and values.dtype.kind in "iu" and c > 1 and values.min() >= 0 and values.max() < c:
        return torch.from_numpy(np.eye(c)[values]), loss
    targets, classes = encode_targets(values, n_samples)
    if classes is not None and c == 1 and len(classes) == 2 and getattr(loss, "name", loss) == "logistic":
        targets = targets[:, 1:]
    if targets.shape[1] != c:
        seen = f"{len(classes)} classes" if classes is not None else f"{targets.shape[1]} columns"
        raise InvalidInputError(
            f"Y has {seen} but the network has {c} outputs; one per output is wanted"
            + (" (numbers as targets of one output are floats)" if classes is not None and c == 1 else "")
        )
    return torch.tensor(as_matrix(targets, "Y")), loss


def _by_class(values: np.ndarray, classes: np.ndarray, c: int) -> np.ndarray:
    """One-hot rows in the order of a classifier's classes; a column of zeros and ones for two with one output."""
    index = np.searchsorted(classes, values).clip(max=len(classes) - 1)
    unknown = np.flatnonzero(classes[index] != values)
    if len(unknown):
        raise InvalidInputError(f"Y has the label {values[unknown[0]]!r}, which is none of the model's classes")
    return index[:, None].astype(np.float64) if c == 1 else np.eye(len(classes))[index]
