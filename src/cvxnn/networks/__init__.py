"""Solutions as torch modules: the two-layer network that a convex solution stands for."""

from cvxnn.networks.attention import AttentionNetwork
from cvxnn.networks.building import Network, build_network
from cvxnn.networks.cnn import TwoLayerCNN, with_channel
from cvxnn.networks.mlp import TwoLayerNetwork, balanced_factors, padded_factors

__all__ = [
    "AttentionNetwork",
    "Network",
    "TwoLayerCNN",
    "TwoLayerNetwork",
    "balanced_factors",
    "build_network",
    "padded_factors",
    "with_channel",
]
