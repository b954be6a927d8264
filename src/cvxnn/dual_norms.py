"""The dual norm of A*(nu), gate by gate: spectral and other norms, or maxima over cones (math section 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cvxnn.cones import Cones, cone_dual_norms
from cvxnn.norms import MatrixNorm, NuclearNorm
from cvxnn.operators import Operator

__all__ = ["ConePrices", "Neurons", "bounds_are_cheap", "gate_dual_norms", "price_cones"]

#: Gates whose cones are looked at together; the number grows from round to round. So few are looked at at once.
_FIRST_ROUND = 64
_FEW_GATES = 1_000
_LARGEST_ROUND = 16_384
#: Bounds closer than this to the largest value found decide nothing any more.
_DECIDED = 1e-12


@dataclass
class Neurons:
    """Unit neurons in the cones of their gates, with two-sided bounds of what is best there.

    Attributes
    ----------
    gate : torch.Tensor of shape (r,)
    u : torch.Tensor of shape (r, d)
        Feasible, of norm 1 (or 0, where the maximum is 0).
    v : torch.Tensor of shape (r, c)
        G_k^T u / ||G_k^T u||: the loss falls along (u, -v).
    lower, upper : torch.Tensor of shape (r,)
        Bounds of max ||G_k^T u|| in the cone; ``lower`` is that of this u.
    """

    gate: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    def __len__(self) -> int:
        return len(self.gate)

    def __getitem__(self, chosen: torch.Tensor) -> Neurons:
        return Neurons(*(part[chosen] for part in (self.gate, self.u, self.v, self.lower, self.upper)))

    @classmethod
    def joined(cls, parts: list[Neurons]) -> Neurons:
        """One list of several."""
        names = ("gate", "u", "v", "lower", "upper")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass
class ConePrices:
    """Bounds of the dual norm of every gate, and the neurons of those gates that were looked at closely."""

    lower: torch.Tensor
    upper: torch.Tensor
    neurons: Neurons


def gate_dual_norms(
    op: Operator, norm: MatrixNorm, cones: Cones | None, nu: torch.Tensor, error: float, seconds: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rigorous lower and upper bounds (P,) of the dual norm of every block of A*(nu) + E, ||E_k||_F <= error.

    With cones the largest upper bound is as tight as the methods make it within about `seconds`, where these
    count (:func:`bounds_are_cheap`); those of the other gates may be looser.
    """
    if cones is not None:
        prices = price_cones(op, norm, cones, nu, error, seconds=seconds)
        return prices.lower, prices.upper
    if isinstance(norm, NuclearNorm) and op.streams_blocks:
        shape, size = op.block_shape[1:], op.adjoint_size(nu)
        pairs = [norm.dual_of_parts(op.adjoint_parts(nu, k), shape, size, error) for k in range(op.n_gates)]
        return nu.new_tensor([lower for lower, _ in pairs]), nu.new_tensor([upper for _, upper in pairs])
    batches = [norm.dual(op.adjoint_blocks(nu, gates), error) for gates in op.gate_batches()]
    lower, upper = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return lower, upper


def price_cones(
    op: Operator,
    norm: MatrixNorm,
    cones: Cones,
    nu: torch.Tensor,
    error: float = 0.0,
    above: float | None = None,
    most: int | None = None,
    seconds: float | None = None,
) -> ConePrices:
    """Cone-constrained dual norms: a matrix product for all gates, then exact cones for those that remain.

    Parameters
    ----------
    above : float, optional
        Look closely at all gates with a bound above this, until `most` have a value above it; by default at those
        that can have the largest value.
    seconds : float, optional
        Where bounds are dear, no further gates are looked at after this time: their bounds stay spectral.

    Notes
    -----
    The spectral norm bounds the maximum over the cone, and so does that over a cap around it. Gates are taken in
    decreasing order of these bounds, until they are below the largest value found (or below `above`).
    """
    upper = torch.cat(
        [_cheap_bounds(op.adjoint_blocks(nu, gates), norm, cones, gates, error) for gates in op.gate_batches()]
    )
    lower = torch.zeros_like(upper)
    order = torch.argsort(upper, descending=True)
    found: list[Neurons] = []
    count = 0
    cheap = bounds_are_cheap(op, cones)
    deadline = math.inf if seconds is None or cheap else time.perf_counter() + seconds
    first = len(order) if op.block_shape[2] == 1 and len(order) < _FEW_GATES else _FIRST_ROUND
    for part in _rounds(len(order), first if cheap else 4):
        gates = order[part]
        level = float(lower.max()) * (1 + _DECIDED) if above is None else above
        gates = gates[upper[gates] > level]
        if len(gates) == 0 and found:
            break
        gates = gates if len(gates) else order[:1]
        blocks = blocks_of(op, nu, gates)
        seen = cone_dual_norms(cones, gates, blocks, error, deadline=deadline)
        upper[gates] = torch.minimum(upper[gates], seen.upper)
        lower[gates] = seen.lower
        found.append(Neurons(gates, seen.u, seen.v, seen.lower, upper[gates]))
        count += int((seen.lower > level).sum())
        if time.perf_counter() > deadline or (most is not None and count >= most):
            break
    return ConePrices(lower, upper, Neurons.joined(found))


def _cheap_bounds(G: torch.Tensor, norm: MatrixNorm, cones: Cones, gates: slice, error: float) -> torch.Tensor:
    """The smaller of the spectral norm and the bound over a cap around the cone."""
    spectral = norm.dual(G, error)[1]
    if cones.caps is None:
        return spectral
    return torch.minimum(spectral, cones.caps.dual_norm_bounds(G, gates) + error)


def blocks_of(op: Operator, nu: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Blocks (r, p, q) of A*(nu) for a list of gates."""
    return op.select(gates).adjoint(nu)


def bounds_are_cheap(op: Operator, cones: Cones) -> bool:
    """Whether the dual norms of cones have closed forms or are projections: one output, or rank two."""
    if op.block_shape[2] == 1 or cones.n_features <= 2 or len(cones.rows) == 0:
        return True
    return int(torch.linalg.matrix_rank(cones.rows)) <= 2


def _rounds(n: int, first: int) -> Iterator[slice]:
    start, size = 0, first
    while start < n:
        yield slice(start, min(start + size, n))
        start, size = start + size, min(4 * size, _LARGEST_ROUND)
