"""Architectures as linear maps from blocks of weights to predictions."""

from cvxnn.operators.attention import AttentionOperator
from cvxnn.operators.base import Operator
from cvxnn.operators.cnn import FEATURES, CNNOperator
from cvxnn.operators.mlp import MLPOperator
from cvxnn.operators.patches import PatchGeometry
from cvxnn.operators.pooling import pooling_matrix

__all__ = ["FEATURES", "AttentionOperator", "CNNOperator", "MLPOperator", "Operator", "PatchGeometry", "pooling_matrix"]
