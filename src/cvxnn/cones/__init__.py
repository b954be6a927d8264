"""The cones of ReLU networks: projection, interior points, repair, and the dual norms that they constrain."""

from cvxnn.cones.cones import FEASIBILITY, Cones
from cvxnn.cones.decomposition import decompose
from cvxnn.cones.dual_norm import ConeDual, cone_dual_norms
from cvxnn.cones.memory import LongProjections
from cvxnn.cones.projection import Projection

__all__ = ["FEASIBILITY", "ConeDual", "Cones", "LongProjections", "Projection", "cone_dual_norms", "decompose"]
