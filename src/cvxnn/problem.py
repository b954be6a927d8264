"""A training problem: data, architecture, loss, norm and beta (math section 1)."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.cones import Cones
from cvxnn.dual_norms import gate_dual_norms
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.gates import choose_gates
from cvxnn.losses import Loss, get_loss
from cvxnn.norms import MatrixNorm, get_norm
from cvxnn.operators import MLPOperator, Operator
from cvxnn.validation import (
    as_matrix,
    check_choice,
    check_flag,
    check_positive,
    check_range,
    check_sample_weight,
    encode_targets,
    resolve_device,
    resolve_dtype,
)

__all__ = ["ACTIVATIONS", "Problem", "mlp_problem"]

ACTIVATIONS = ("linear", "gated_relu", "relu")


class Problem:
    """minimise over Z and b:  F(A(Z) + 1 b^T) + beta * sum_k ||Z_k||_D.

    Build one with :func:`cvxnn.mlp_problem`. The intercept b is there with ``output_bias`` only.

    Attributes
    ----------
    operator : Operator
        The linear map A in the working type.
    loss, norm : Loss, MatrixNorm
    beta : float
    Y : torch.Tensor of shape (n, c)
    weights : torch.Tensor of shape (n,), float64
        Weight of each sample's loss: 1 for "sum", 1/n for "mean", times the sample weights
        (with "mean" these are divided by their sum).
    output_bias, hidden_bias : bool
    scope : str
        What a certificate of this problem is relative to.
    classes : numpy.ndarray or None
        Class labels in the order of the output columns, where Y was labels.
    """

    def __init__(
        self,
        operator: Operator,
        Y: torch.Tensor,
        *,
        loss: Loss,
        norm: MatrixNorm,
        beta: float,
        weights: torch.Tensor,
        reduction: str,
        scope: str,
        output_bias: bool = False,
        hidden_bias: bool = False,
        classes: np.ndarray | None = None,
    ) -> None:
        self.operator = operator
        self.Y = Y
        self.loss = loss
        self.norm = norm
        self.beta = beta
        self.weights = weights
        self.reduction = reduction
        self.scope = scope
        self.output_bias = output_bias
        self.hidden_bias = hidden_bias
        self.classes = classes

    def __repr__(self) -> str:
        n, c = self.Y.shape
        return (
            f"Problem({self.operator.architecture}, {self.activation}, n={n}, outputs={c}, "
            f"gates={self.n_gates}, loss={self.loss.name}, reduction={self.reduction}, beta={self.beta:g})"
        )

    @property
    def activation(self) -> str:
        """Activation of the hidden layer."""
        return self.operator.activation

    @property
    def n_samples(self) -> int:
        """Number of samples n."""
        return self.operator.n_samples

    @property
    def n_gates(self) -> int:
        """Number of gates P that are used."""
        return self.operator.n_gates

    @property
    def gates(self) -> torch.Tensor | None:
        """Gate vectors, (d, P) float64 (with the hidden bias d counts its row); None where there are none."""
        if self.operator.gates is None:
            return None
        return torch.from_numpy(self.operator.gates).to(self.device)

    @property
    def patterns(self) -> torch.Tensor:
        """Activation patterns, (n, P) bool for the MLP."""
        return self.operator.patterns

    @property
    def dtype(self) -> torch.dtype:
        """Working type of the solvers; certificates are always computed in float64."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Device of the data and of the results."""
        return self.operator.device

    @cached_property
    def cones(self) -> Cones | None:
        """The cones {u : (2 D_k - I) X u >= 0} of the columns of a ReLU problem (19); None for the others."""
        if self.activation != "relu":
            return None
        return Cones(*self.operator.double().cone_rows, self.gates)

    @cached_property
    def Y64(self) -> torch.Tensor:
        """The targets in float64."""
        return self.Y.double()

    def with_beta(self, beta: float) -> Problem:
        """The same problem with another beta; data, gates and cached matrices are shared."""
        other = copy.copy(self)
        other.beta = check_positive(beta, "beta")
        return other

    def with_scope(self, scope: str) -> Problem:
        """The same problem; its certificates name another scope, which must be no wider than what is proven."""
        other = copy.copy(self)
        other.scope = scope
        return other

    def dual_norms(
        self, nu: torch.Tensor, error: float, seconds: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rigorous bounds (P,) of the dual norm of each block of A*(nu), known up to a Frobenius error.

        For ReLU the norms are maxima over the cones, and only the largest upper bound is made tight: within about
        `seconds`, where there are several outputs and the rank is above two.
        """
        return gate_dual_norms(self.operator.double(), self.norm, self.cones, nu, error, seconds)

    @cached_property
    def beta_max(self) -> float:
        """The beta from which on Z = 0 is optimal: the dual norm of the gradient at Z = 0.

        Computed as a rigorous upper bound, so that Z = 0 is certainly optimal at ``beta_max``.
        """
        op = self.operator.double()
        predictions = torch.zeros_like(self.Y64)
        if self.output_bias:
            predictions = predictions + self.loss.best_intercept(predictions, self.Y64, self.weights)
        nu = self.dual_candidate(predictions)
        return float(self.dual_norms(nu, op.adjoint_rounding(nu))[1].max())

    def dual_candidate(self, predictions: torch.Tensor) -> torch.Tensor:
        """The loss gradient at float64 predictions, made feasible for the unpenalised intercept."""
        nu = self.loss.gradient(predictions, self.Y64, self.weights)
        return self.loss.center_dual(nu, self.Y64, self.weights) if self.output_bias else nu

    def best_intercept(self, predictions: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """The intercept that minimises the loss for float64 predictions A(Z); zeros without output bias."""
        if not self.output_bias:
            return predictions.new_zeros(predictions.shape[1])
        return self.loss.best_intercept(predictions, self.Y64, self.weights, start=start)

    def objective(self, Z: torch.Tensor, intercept: torch.Tensor | None = None) -> float:
        """F(A(Z) + 1 b^T) + beta * Omega(Z) in float64; the best b where none is given.

        Raises
        ------
        UnsupportedError
            For ReLU, whose Omega is known from factors only (:func:`cvxnn.certify`).
        """
        if self.cones is not None:
            raise UnsupportedError("the penalty of a ReLU problem is that of its factors, not of Z; use cvxnn.certify")
        Z = torch.as_tensor(Z, dtype=torch.float64, device=self.device)
        predictions = self.operator.double().apply(Z)
        if intercept is None:
            intercept = self.best_intercept(predictions)
        offset = torch.as_tensor(intercept, dtype=torch.float64, device=self.device)
        if not self.output_bias and bool(offset.any()):
            raise InvalidInputError("an intercept is given, but the problem has output_bias=False")
        value = self.loss.value(predictions + offset, self.Y64, self.weights)
        return float(value + self.beta * self.norm.value(Z)[1].sum())


def _without_copy(data: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch warns of arrays that cannot be written to; nothing writes to the data.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)


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
    gate_quantile: float | None = None,
    max_cells: int | None = None,
    random_state: Any = 0,
    dtype: Any = "float64",
    device: Any = "cpu",
) -> Problem:
    """The training problem of a two-layer perceptron in convex form (equations (2), (3) and (5)).

    Parameters
    ----------
    X : array-like of shape (n, d)
        Data, NumPy or torch (or a data frame of numbers). A float64 ``numpy.memmap`` is not copied with
        ``dtype="float64"`` and without `hidden_bias`: rows are read when they are needed.
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
    gate_sampling : {"gaussian", "differences", "whitened"}
        How gates are drawn: normal vectors, differences of pairs of samples, or whitened samples.
    gate_quantile : float in (0, 1), optional
        Threshold of drawn gates: each is active on a fraction 1 - quantile of the samples; needs
        `hidden_bias`.
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
    check_choice(activation, "activation", ACTIVATIONS)
    check_choice(reduction, "reduction", ("mean", "sum"))
    hidden_bias, output_bias = check_flag(hidden_bias, "hidden_bias"), check_flag(output_bias, "output_bias")
    beta = check_positive(beta, "beta")
    loss_object, norm = get_loss(loss), get_norm(norms)
    if activation == "relu" and norm.name != "nuclear":
        raise UnsupportedError(f"norms is {tuple(norms)!r}; ReLU problems are there for ('l2', 'l2') only")
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)

    data = as_matrix(X, "X")
    targets, classes = encode_targets(Y, len(data))
    sample_weights = check_sample_weight(sample_weight, len(data))
    if hidden_bias:
        data = np.hstack([data, np.ones((len(data), 1))])
    # A memory-mapped array in the type of the problem stays where it is.
    mapped = isinstance(X, np.memmap) and not hidden_bias and torch_dtype == torch.float64
    tensor = _without_copy(data) if mapped else torch.tensor(data, dtype=torch_dtype)
    Y_tensor = torch.tensor(targets, dtype=torch_dtype)
    check_range(tensor, "X")
    check_range(Y_tensor, "Y", squares_count=True)
    loss_object.check_targets(Y_tensor)

    gate_vectors = pattern_tensor = None
    scope = "linear_network"
    if activation != "linear":
        gate_vectors, bits, scope = choose_gates(
            tensor.double().numpy(),
            gates,
            n_gates,
            hidden_bias,
            gate_sampling,
            gate_quantile,
            max_cells,
            random_state,
        )
        pattern_tensor = torch.from_numpy(bits).to(torch_device)
        if activation == "relu" and scope == "all_gates":
            # By continuity the patterns of the boundaries of cells add nothing: these are all neurons.
            scope = "relu_network"
    elif gates is not None:
        raise InvalidInputError("gates are given but activation is 'linear', which has none; leave gates=None")

    total = sample_weights.sum() if reduction == "mean" else 1.0
    operator = MLPOperator(tensor.to(torch_device), targets.shape[1], gate_vectors, pattern_tensor, activation)
    return Problem(
        operator,
        Y_tensor.to(torch_device),
        loss=loss_object,
        norm=norm,
        beta=beta,
        weights=torch.from_numpy(sample_weights / total).to(torch_device),
        reduction=reduction,
        scope=scope,
        output_bias=output_bias,
        hidden_bias=hidden_bias,
        classes=classes,
    )
