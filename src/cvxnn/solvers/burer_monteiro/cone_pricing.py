"""Neurons that violate the dual constraint, found as cheaply as possible."""

from __future__ import annotations

import torch

from cvxnn.cones import Cones, cone_dual_norms
from cvxnn.cones.branching import MAX_OUTPUTS
from cvxnn.dual_norms import Neurons, price_cones
from cvxnn.norms import MatrixNorm
from cvxnn.operators import Operator

__all__ = ["violated_neurons"]

#: Gates looked at for witnesses before all are bounded from above: so many entries of X, within limits.
_FIRST_LOOK = 200_000
_FEWEST, _MOST = 8, 128
_STARTS = 4


def violated_neurons(
    op: Operator, norm: MatrixNorm, cones: Cones, nu: torch.Tensor, level: float, most: int, cheap: bool
) -> Neurons:
    """Neurons with a value above `level`, at least `most` where there are as many, in no order.

    Parameters
    ----------
    nu : torch.Tensor of shape (n, c)
        Gradient of the loss.
    cheap : bool
        What `bounds_are_cheap` says. Where they are not, witnesses of the gates with the largest spectral norms
        come first, and upper bounds only where there are none.
    """
    if not cheap:
        spectral = torch.cat([norm.dual_estimate(op.adjoint_blocks(nu, gates)) for gates in op.gate_batches()])
        order = torch.argsort(spectral, descending=True)
        order = order[spectral[order] > level]
        first = min(max(_FEWEST, _FIRST_LOOK // max(1, cones.rows.numel())), _MOST)
        found = _witnesses(op, cones, nu, order[:first], level, _STARTS)
        # With more outputs, upper bounds know no better witnesses than more starts do.
        if len(found) == 0 and min(op.block_shape[1:]) > MAX_OUTPUTS:
            return _witnesses(op, cones, nu, order, level, 4 * _STARTS)
        if len(found):
            return found
    found = price_cones(op, norm, cones, nu, above=level, most=most).neurons
    return found[found.lower > level]


def _witnesses(op: Operator, cones: Cones, nu: torch.Tensor, gates: torch.Tensor, level: float, starts: int) -> Neurons:
    seen = cone_dual_norms(cones, gates, op.select(gates).adjoint(nu), method="spectral", starts=starts)
    found = Neurons(gates, seen.u, seen.v, seen.lower, seen.upper)
    return found[found.lower > level]
