"""The Burer-Monteiro problem near a point, as a function of the variables that a local method moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem

__all__ = ["LocalProblem", "absolute_blocks", "gate_grams", "selected_features"]


class LocalProblem(ABC):
    """Objective (14) with l2 norms and fixed gates of the columns, in float64.

    Parameters
    ----------
    problem : Problem
    loss : FactoredLoss
    columns : Columns
        Their gates are those of the variables.
    """

    def __init__(self, problem: Problem, loss: FactoredLoss, columns: Columns) -> None:
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

    @abstractmethod
    def point(self, parts: Sequence[torch.Tensor]) -> tuple[Columns, torch.Tensor]:
        """Columns and intercept of variables."""

    @abstractmethod
    def evaluate(self, parts: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """Objective and gradients; what they need is kept for `curvature`."""

    @abstractmethod
    def curvature(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """A positive semi-definite model of the Hessian at the last point evaluated, and a metric of steps.

        The model is the Hessian with the negative eigenvalues of its indefinite part turned positive; this
        part is block-diagonal, a small block per gate. Both are dense, (N, N).
        """

    @abstractmethod
    def curvature_cost(self) -> float:
        """Floating-point operations of one curvature and its factorisation, about."""


def selected_features(loss: FactoredLoss, gate: torch.Tensor) -> torch.Tensor:
    """D_k X for the gate of each column, (n, r, p): the activations of unit vectors."""
    op = loss.op
    p = op.block_shape[1]
    units = torch.eye(p, dtype=op.dtype, device=gate.device)
    every = gate.repeat_interleave(p)
    return op.hidden(every, units.repeat(len(gate), 1), slice(0, op.n_samples)).view(-1, len(gate), p)


def gate_grams(loss: FactoredLoss, gates: torch.Tensor) -> torch.Tensor:
    """X^T D_k W D_k X of each gate, (k, p, p), W the weights of the samples."""
    op = loss.op
    p = op.block_shape[1]
    units = torch.eye(p, dtype=op.dtype, device=gates.device)
    grams = []
    root = loss.weights.sqrt().unsqueeze(1)
    for gate in gates:
        features = op.hidden(gate.repeat(p), units, slice(0, op.n_samples)) * root
        grams.append(features.T @ features)
    return torch.stack(grams) if grams else units.new_zeros(0, p, p)


def absolute_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Symmetric blocks with the absolute values of their eigenvalues."""
    values, vectors = torch.linalg.eigh(blocks)
    return (vectors * values.abs().unsqueeze(1)) @ vectors.mT
