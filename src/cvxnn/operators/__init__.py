"""Architectures as linear maps from blocks of weights to predictions."""

from cvxnn.operators.attention import AttentionOperator
from cvxnn.operators.base import Operator
from cvxnn.operators.cnn import FEATURES, CNNOperator
from cvxnn.operators.mlp import MLPOperator
from cvxnn.operators.patches import PatchGeometry
from cvxnn.operators.pooling import pooling_matrix
from cvxnn.operators.rows import MappedRows, Rows, RowSource
from cvxnn.operators.sharded import ShardedOperator
from cvxnn.operators.sharded_gates import GateShardedOperator
from cvxnn.operators.streamed import StreamedMLPOperator

__all__ = [
    "FEATURES",
    "AttentionOperator",
    "CNNOperator",
    "GateShardedOperator",
    "MLPOperator",
    "MappedRows",
    "Operator",
    "PatchGeometry",
    "RowSource",
    "Rows",
    "ShardedOperator",
    "StreamedMLPOperator",
    "pooling_matrix",
]
