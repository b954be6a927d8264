"""Deep points of polyhedral cones {u : K u >= 0}: the unit vectors whose least slack is largest."""

from __future__ import annotations

import torch
from torch import Tensor

from cvxnn.cones.projection import Constraints, solve

__all__ = ["deep_points"]


def deep_points(rows: Tensor, signs: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Unit vectors g with the largest margin min_i (diag(signs) rows g)_i, from min ||w|| s.t. K w >= 1, g = w/||w||.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
        Unit rows, float64.
    signs : Tensor of shape (r, n)
    guess : Tensor of shape (r, d), optional
        Points that are taken where they are deeper than what was found.

    Returns
    -------
    point : Tensor of shape (r, d)
    margin : Tensor of shape (r,)
        Not positive where the cone has no interior (that float64 can tell); infinite without rows.
    """
    constraints = Constraints(rows, signs, torch.ones_like(signs[:, :1]).expand_as(signs))
    origin = rows.new_zeros(len(signs), rows.shape[1])
    found, _ = solve(constraints, origin)
    choices = [_unit(found.point)] + ([] if guess is None else [_unit(guess)])
    margins = torch.stack([_margin(rows, signs, choice) for choice in choices])
    margin, best = margins.max(dim=0)
    return torch.stack(choices)[best, torch.arange(len(signs), device=signs.device)], margin


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of norm 1, the first unit vector in place of those that are zero or not finite."""
    largest = vectors.abs().amax(1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    first = torch.zeros_like(vectors)
    first[:, 0] = 1.0
    scaled = torch.where(usable, vectors / torch.where(usable, largest, 1.0), first)
    return scaled / scaled.norm(dim=1, keepdim=True)


def _margin(rows: Tensor, signs: Tensor, point: Tensor) -> Tensor:
    if len(rows) == 0:
        return point.new_full((len(point),), torch.inf)
    return (point @ rows.T).mul_(signs).amin(1)
