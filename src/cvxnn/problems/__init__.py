"""The constructors of training problems, one per architecture."""

from cvxnn.problems.attention import attention_problem
from cvxnn.problems.cnn import cnn_problem
from cvxnn.problems.mlp import mlp_problem
from cvxnn.problems.task import ACTIVATIONS

__all__ = ["ACTIVATIONS", "attention_problem", "cnn_problem", "mlp_problem"]
