"""The network of a point of a problem."""

from __future__ import annotations

import torch

from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError
from cvxnn.networks.attention import AttentionNetwork
from cvxnn.networks.cnn import TwoLayerCNN
from cvxnn.networks.mlp import TwoLayerNetwork, balanced_factors
from cvxnn.operators import AttentionOperator, CNNOperator
from cvxnn.problem import Problem

__all__ = ["Network", "build_network"]

#: The modules that stand for the points of problems.
Network = TwoLayerNetwork | TwoLayerCNN | AttentionNetwork


def build_network(
    problem: Problem,
    Z: torch.Tensor | None,
    intercept: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Network:
    """The network of a point of a problem, with the same predictions.

    Parameters
    ----------
    problem : Problem
    Z : torch.Tensor of shape (P, p, q) or None
        Blocks, split by :func:`balanced_factors`; not used where there are factors.
    intercept : torch.Tensor of shape (c,)
    factors : pair (U, V), shapes (P, p, m) and (P, q, m), optional
        The neurons themselves; columns that are zero are left out.
    dtype : torch.dtype, optional
        Type of the weights; by default that of the problem.

    Raises
    ------
    InvalidInputError
        There are neither blocks nor factors.
    """
    if factors is not None:
        columns = Columns.from_factors(*(part.detach() for part in factors)).without_zeros()
        U, V, index = columns.u.T, columns.v.T, columns.gate
    elif Z is not None:
        U, V, index = balanced_factors(Z, (problem.norm.left, problem.norm.right))
    else:
        raise InvalidInputError("Z and factors are None; one of them is wanted")
    dtype = problem.dtype if dtype is None else dtype
    relu = problem.activation == "relu"
    gates = None if relu else problem.gates
    arguments = (
        U.to(dtype),
        V.T.to(dtype),
        intercept.detach().clone().to(dtype),
        None if gates is None else gates.clone(),
        None if gates is None else index,
    )
    op = problem.operator.plain
    if isinstance(op, CNNOperator):
        height, width = op.images.shape[2:]
        grid = op.geometry.grid(height, width)
        return TwoLayerCNN(*arguments, op.geometry, op.pooling.clone(), grid, problem.dtype, relu)
    if isinstance(op, AttentionOperator):
        return AttentionNetwork(*arguments, pooled=op.rows.pooled, sample_dtype=problem.dtype, relu=relu)
    return TwoLayerNetwork(*arguments, problem.hidden_bias, problem.dtype, relu)
