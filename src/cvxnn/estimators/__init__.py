"""scikit-learn estimators: convex two-layer networks as classifiers and regressors."""

from cvxnn.estimators.attention import ConvexAttention, ConvexAttentionClassifier, ConvexAttentionRegressor
from cvxnn.estimators.base import ConvexClassifier, ConvexEstimator, project_to_simplex
from cvxnn.estimators.cnn import ConvexCNN, ConvexCNNClassifier, ConvexCNNRegressor
from cvxnn.estimators.mlp import ConvexMLP, ConvexMLPClassifier, ConvexMLPRegressor

__all__ = [
    "ConvexAttention",
    "ConvexAttentionClassifier",
    "ConvexAttentionRegressor",
    "ConvexCNN",
    "ConvexCNNClassifier",
    "ConvexCNNRegressor",
    "ConvexClassifier",
    "ConvexEstimator",
    "ConvexMLP",
    "ConvexMLPClassifier",
    "ConvexMLPRegressor",
    "project_to_simplex",
]
