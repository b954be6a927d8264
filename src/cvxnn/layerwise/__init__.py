"""Layerwise training: deep networks from two-layer gated CNNs, stage after stage."""

from cvxnn.layerwise.classifier import LayerwiseCNNClassifier
from cvxnn.layerwise.estimate import layerwise_estimate
from cvxnn.layerwise.maps import StageMaps
from cvxnn.layerwise.network import LayerwiseNetwork
from cvxnn.layerwise.results import StageResult
from cvxnn.layerwise.stage import GatedConvolution
from cvxnn.layerwise.state import from_state, to_state

__all__ = [
    "GatedConvolution",
    "LayerwiseCNNClassifier",
    "LayerwiseNetwork",
    "StageMaps",
    "StageResult",
    "from_state",
    "layerwise_estimate",
    "to_state",
]
