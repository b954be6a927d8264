"""Architectures as linear maps from blocks of weights to predictions."""

from cvxnn.operators.base import Operator
from cvxnn.operators.mlp import MLPOperator

__all__ = ["MLPOperator", "Operator"]
