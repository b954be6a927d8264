"""The Burer-Monteiro problem near a point, as a function of the variables that a local method moves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.operators import Operator
from cvxnn.problem import Problem
from cvxnn.solvers.burer_monteiro.curvatures import Curvature
from cvxnn.solvers.burer_monteiro.grams import WhitenedGrams

__all__ = [
    "CG_LIMIT",
    "LocalProblem",
    "absolute_blocks",
    "block_slopes",
    "jacobian",
    "selected_features",
    "violated",
]

#: Iterations of conjugate gradients in one step of Newton's method, and the residual at which they end.
CG_LIMIT = 100
CG_ACCURACY = 0.1


class LocalProblem(ABC):
    """Objective (14) with l2 norms and fixed gates of the columns, in float64.

    Parameters
    ----------
    problem : Problem
    loss : FactoredLoss
    columns : Columns
        Their gates are those of the variables.
    grams : callable
        Returns the Gram matrices of the gates; called where they are needed.
    """

    def __init__(
        self, problem: Problem, loss: FactoredLoss, columns: Columns, grams: Callable[[], WhitenedGrams]
    ) -> None:
        self.grams = grams
        self.problem = problem
        self.loss = loss
        self.op = loss.op
        self.gate = columns.gate
        self.beta = problem.beta
        #: The gates that have columns, and the place of each column's gate among them.
        self.gates, self.place = torch.unique(columns.gate, return_inverse=True)

    @property
    @abstractmethod
    def n_variables(self) -> int:
        """Number of variables."""

    @abstractmethod
    def variables(self, columns: Columns, intercept: torch.Tensor) -> list[torch.Tensor]:
        """The variables of a point, columns by rows first."""

    def length(self, parts: Sequence[torch.Tensor]) -> float:
        """Euclidean length of the columns among the variables; an intercept, of the size of Y, is left out."""
        return math.sqrt(sum(float(part.square().sum()) for part in parts[:2]))

    @abstractmethod
    def point(self, parts: Sequence[torch.Tensor]) -> tuple[Columns, torch.Tensor]:
        """Columns and intercept of variables."""

    @abstractmethod
    def evaluate(self, parts: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """Objective and gradients; what they need is kept for `curvature`."""

    @abstractmethod
    def curvature(self, parts: Sequence[torch.Tensor], dense: bool) -> Curvature:
        """A positive semi-definite model of the Hessian at the last point evaluated.

        It is the Hessian with the negative eigenvalues of its indefinite part turned positive; this part is
        block-diagonal, a small block per gate.
        """

    @abstractmethod
    def products_are_cheap(self) -> bool:
        """Whether a product with the curvature costs no more than an evaluation."""

    @abstractmethod
    def curvature_cost(self) -> float:
        """Floating-point operations of one dense curvature and its factorisation, about."""


def selected_features(loss: FactoredLoss, gate: torch.Tensor) -> torch.Tensor:
    """D_k X for the gate of each column, (n, r, p, w): the hidden outputs of unit vectors."""
    op = loss.op
    p = op.block_shape[1]
    units = torch.eye(p, dtype=op.dtype, device=gate.device)
    every = gate.repeat_interleave(p)
    return op.hidden(every, units.repeat(len(gate), 1), slice(0, op.n_samples)).view(-1, len(gate), p, op.width)


def block_slopes(op: Operator, Phi: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Blocks A_k*(gradient) (k, p, q) of the gates whose features are Phi (n, k, p, w)."""
    products = torch.einsum("nkpw,nc->kpwc", Phi, gradient)
    return op.merge_right(products.reshape(-1, products.shape[3])).view(*products.shape[:2], -1)


def jacobian(op: Operator, Phi: torch.Tensor, hidden: torch.Tensor, v: torch.Tensor, bias: bool) -> torch.Tensor:
    """Derivatives of the predictions (n, c) in the columns and, where there is one, the intercept: (N, n, c).

    Parameters
    ----------
    Phi : torch.Tensor of shape (n, r, p, w)
    hidden : torch.Tensor of shape (n, r w)
    v : torch.Tensor of shape (r, q)
    bias : bool
    """
    (n, r, p, w), q = Phi.shape, v.shape[1]
    c = q // w
    units = torch.eye(q, dtype=v.dtype, device=v.device)
    J = v.new_zeros(r * (p + q) + (c if bias else 0), n, c)
    J[: r * p] = torch.einsum("nrpw,rwc->rpnc", Phi, op.split_right(v).view(r, w, c)).reshape(r * p, n, c)
    right = torch.einsum("nrw,qwc->rqnc", hidden.view(n, r, w), op.split_right(units).view(q, w, c))
    J[r * p : r * (p + q)] = right.reshape(r * q, n, c)
    if bias:
        J[r * (p + q) :] = units[:c, :c].unsqueeze(1)
    return J


def absolute_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Symmetric blocks with the absolute values of their eigenvalues."""
    values, vectors = torch.linalg.eigh(blocks)
    return (vectors * values.abs().unsqueeze(1)) @ vectors.mT


def violated(
    loss: FactoredLoss, gates: torch.Tensor, gradient: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular pairs of G_k = A_k*(gradient) above beta: place of k in `gates`, w (t, p), x (t, q), values (t,)."""
    op = loss.op
    found = []
    place = torch.full((op.n_gates,), -1, dtype=torch.long, device=gates.device)
    place[gates] = torch.arange(len(gates), device=gates.device)
    for batch in op.gate_batches():
        here = place[batch]
        if bool((here < 0).all()):
            continue
        G = op.adjoint_blocks(gradient, batch)[here >= 0]
        left, values, right = singular_pairs(G)
        which, column = (values > beta).nonzero().unbind(1)
        found.append((here[here >= 0][which], left.mT[which, column], right.mT[which, column], values[which, column]))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


def singular_pairs(G: torch.Tensor, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular vectors (k, p, m), (k, q, m) and values (k, m), the largest first, by the smaller Gram matrix."""
    if G.shape[1] < G.shape[2]:
        right, values, left = singular_pairs(G.mT, most)
        return left, values, right
    squares, V = torch.linalg.eigh(G.mT @ G)
    values, V = squares.flip(1)[:, :most].clamp_min(0).sqrt(), V.flip(2)[:, :, :most]
    U = G @ V
    return U / values.clamp_min(1e-300).unsqueeze(1), values, V
