"""Gates and the activation patterns they make: sampling, enumeration, removal of duplicates."""

from cvxnn.patterns.activation import activation_patterns, deduplicate_gates
from cvxnn.patterns.bits import PatchBits, gather_bits, patch_bits
from cvxnn.patterns.coverage import Coverage
from cvxnn.patterns.enumeration import DEFAULT_MAX_CELLS, count_cells_bound, enumerate_cells, enumerate_gates
from cvxnn.patterns.sampling import sample_gates

__all__ = [
    "DEFAULT_MAX_CELLS",
    "Coverage",
    "PatchBits",
    "activation_patterns",
    "count_cells_bound",
    "deduplicate_gates",
    "enumerate_cells",
    "enumerate_gates",
    "gather_bits",
    "patch_bits",
    "sample_gates",
]
