"""A training problem: data, architecture, loss, norm and beta (math section 1)."""

from __future__ import annotations

import copy
import math
from functools import cached_property

import numpy as np
import torch

from cvxnn.cones import Cones
from cvxnn.dual_norms import gate_dual_norms
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.losses import Loss
from cvxnn.norms import MatrixNorm
from cvxnn.operators import Operator
from cvxnn.patterns import Coverage
from cvxnn.validation import check_positive

__all__ = ["Problem"]

#: Dual norms that may be 0 are rounding where they are at most about so many errors of their blocks.
_ROUNDING = 4.0
#: Of a unit of the objective, in powers of four: weights over it neither over- nor underflow.
_LARGEST_POWER = 450


class Problem:
    """minimise over Z and b:  F(A(Z) + 1 b^T) + beta * sum_k ||Z_k||_D.

    Build one with :func:`cvxnn.mlp_problem`, :func:`cvxnn.cnn_problem` or :func:`cvxnn.attention_problem`. The
    intercept b is there with ``output_bias`` only.

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
    coverage : Coverage or None
        What the neurons of ReLU patterns that are not listed can add to dual norms.
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
        coverage: Coverage | None = None,
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
        self.coverage = coverage

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
        return self.operator.total_gates

    @property
    def gates(self) -> torch.Tensor | None:
        """Gate vectors, (d, P) float64 (with the hidden bias d counts its row); None where there are none.

        Those of attention are matrices H_k, (P, d, d).
        """
        if self.operator.gates is None:
            return None
        return torch.from_numpy(self.operator.gates).to(self.device)

    @property
    def patterns(self) -> torch.Tensor:
        """Activation patterns, bool: (n, P) for the MLP, (n, K, P) for patches, (n, s, s, P) for pairs of tokens."""
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
        """The cones {u : (2 D_k - I) X u >= 0} of the columns of a ReLU problem (19); None for the others.

        Of rows that are equal up to scale and rounding only one bounds them, where there is a `coverage`.
        """
        if self.activation != "relu":
            return None
        rows, patterns = self.operator.double().cone_rows
        if self.coverage is not None:
            kept = torch.from_numpy(self.coverage.rows).to(rows.device)
            rows, patterns = rows[kept], patterns[kept]
        vectors = self.operator.gate_vectors
        return Cones(rows, patterns, None if vectors is None else torch.from_numpy(vectors).to(self.device))

    @cached_property
    def Y64(self) -> torch.Tensor:
        """The targets in float64."""
        return self.Y.double()

    def with_beta(self, beta: float) -> Problem:
        """The same problem with another beta; data, gates and cached matrices are shared."""
        other = copy.copy(self)
        other.beta = check_positive(beta, "beta")
        return other

    def in_units_of_beta(self) -> Problem:
        """The problem with its objective divided by about beta: the same points and minimisers, a dual norm of about 1.

        The unit is a power of four, so that weights, beta and their roots are divided without rounding.
        """
        unit = 4.0 ** min(max(math.frexp(self.beta)[1] // 2, -_LARGEST_POWER), _LARGEST_POWER)
        other = copy.copy(self)
        other.beta, other.weights = self.beta / unit, self.weights / unit
        other.__dict__.pop("beta_max", None)
        return other

    def with_gates(self, gates: torch.Tensor) -> Problem:
        """The problem with some of the gates only, (r,) indices; its optimum is no lower than that of all gates."""
        other = copy.copy(self)
        other.operator = self.operator.select(gates)
        other.scope = "given_gates"
        for cached in ("cones", "beta_max"):
            other.__dict__.pop(cached, None)
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
        `seconds`, where there are several outputs and the rank is above two. What a `coverage` allows for the
        neurons of patterns that are not listed is in all upper bounds.
        """
        op = self.operator.double()
        lower, upper = gate_dual_norms(op, self.norm, self.cones, nu, error, seconds)
        lower, upper = op.all_gates(torch.stack([lower, upper], 1)).unbind(1)
        if self.coverage is None:
            return lower, upper
        missed = self.coverage.allowance(op.row_sizes(nu).cpu().numpy())
        return (lower - missed).clamp_min(0), upper * self.coverage.growth + missed

    @cached_property
    def beta_max(self) -> float:
        """The beta from which on Z = 0 is optimal: the dual norm of the gradient at Z = 0.

        Computed as a rigorous upper bound, so that Z = 0 is certainly optimal at ``beta_max``. It is 0 where that
        bound is only what rounding allows for: there the gradient cannot be told from 0, and Z = 0 is optimal for
        every beta that a certificate can tell from 0.
        """
        op = self.operator.double()
        predictions = torch.zeros_like(self.Y64)
        if self.output_bias:
            predictions = predictions + self.loss.best_intercept(predictions, self.Y64, self.weights)
        nu = self.dual_candidate(predictions)
        error = op.adjoint_rounding(nu)
        lower, upper = self.dual_norms(nu, error)
        largest = float(upper.max())
        # Where the bound from below is 0, blocks have a Frobenius norm of at most about twice the error, and dual norms
        # of at most sqrt(p q) times that.
        allowed = _ROUNDING * math.sqrt(math.prod(op.block_shape[1:])) * error
        return 0.0 if float(lower.max()) == 0 and largest <= allowed else largest

    def dual_candidate(self, predictions: torch.Tensor) -> torch.Tensor:
        """The loss gradient at float64 predictions, made feasible for the unpenalised intercept."""
        return self.centred(self.loss.gradient(predictions, self.Y64, self.weights))

    def centred(self, nu: torch.Tensor) -> torch.Tensor:
        """A float64 dual candidate, made feasible for the unpenalised intercept where there is one."""
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
        Z = self.operator.own_gates(torch.as_tensor(Z, dtype=torch.float64, device=self.device))
        predictions = self.operator.double().apply(Z)
        if intercept is None:
            intercept = self.best_intercept(predictions)
        offset = torch.as_tensor(intercept, dtype=torch.float64, device=self.device)
        if not self.output_bias and bool(offset.any()):
            raise InvalidInputError("an intercept is given, but the problem has output_bias=False")
        value = self.loss.value(predictions + offset, self.Y64, self.weights)
        (penalty,) = self.operator.over_gates(float(self.norm.value(Z)[1].sum()))
        return float(value) + self.beta * penalty
