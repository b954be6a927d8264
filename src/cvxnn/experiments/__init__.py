"""The paper's experiments: grids of problems, run in parallel and resumably, and what they say of its claims."""

from cvxnn.experiments.spiral import SCALES, SpiralGrid, run_spiral
from cvxnn.experiments.sweep import run_sweep

__all__ = ["SCALES", "SpiralGrid", "run_spiral", "run_sweep"]
