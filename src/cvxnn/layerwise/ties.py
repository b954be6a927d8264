"""Thresholds of gates moved off patches that occur many times, whose patterns rounding would decide."""

from __future__ import annotations

import math

import numpy as np
import torch

from cvxnn.operators import PatchGeometry
from cvxnn.operators.sources import ImageSource

__all__ = ["gates_off_ties"]

#: Patches that are looked at, and numbers in them.
_PATCHES = 2**16
_NUMBERS = 2**26
#: Patches whose value is below this, relative to the norms of gate and patches, are at the threshold.
_MARGIN = 1e-5
#: Thresholds are moved where so many of the patches are there, and towards fewer active ones where so many remain.
_SHARE = 1e-3
_LEFT_ACTIVE = 0.02


def gates_off_ties(gates: np.ndarray, geometry: PatchGeometry, images: torch.Tensor | ImageSource) -> np.ndarray | None:
    """Gates (h, P) with other thresholds where more than 0.1% of the patches are at one; None where none is moved.

    Images have patches that occur many times, such as those of an empty background. Where the quantile that a
    threshold is at falls among them, the sign of x . g is one of rounding errors, and differs between types, batches
    and machines: the network would not be the one that was trained. The threshold is moved halfway to the next value.

    Parameters
    ----------
    gates : array of shape (h, P)
        With hidden biases the last row holds the thresholds; without there are none to move.
    geometry : PatchGeometry
    images : torch.Tensor or ImageSource of shape (n, C, H, W)
        Of all samples.
    """
    if not geometry.bias:
        return None
    patches = _some_patches(geometry, images)
    size = _MARGIN * float(patches.norm(dim=1).square().mean().sqrt())
    moved = gates.copy()
    for start in range(0, gates.shape[1], 16):
        some = torch.from_numpy(gates[:, start : start + 16]).to(patches.device)
        values, margins = patches @ some, size * some.norm(dim=0)
        tied = (values.abs() <= margins).double().mean(0)
        for k in torch.nonzero(tied > _SHARE).flatten().tolist():
            moved[-1, start + k] -= _shift(values[:, k], float(margins[k]))
    return moved if (moved != gates).any() else None


def _shift(values: torch.Tensor, margin: float) -> float:
    """How far a threshold is to rise."""
    above, below = values[values > margin], values[values < -margin]
    if len(above) > _LEFT_ACTIVE * len(values) or (len(below) == 0 and len(above) > 0):
        return max(float(above.min()) / 2, 4 * margin)
    return min(float(below.max()) / 2, -4 * margin) if len(below) > 0 else -4 * margin


def _some_patches(geometry: PatchGeometry, images: torch.Tensor | ImageSource) -> torch.Tensor:
    """Patches of images that are spread over the data, in float64."""
    images = images if isinstance(images, torch.Tensor) else images.double()
    rng = np.random.default_rng(0)
    h, n_patches = geometry.length(images.shape[1]), math.prod(geometry.grid(*images.shape[2:]))
    wanted = min(_PATCHES, _NUMBERS // h)
    n = min(len(images), max(1, 4 * wanted // n_patches))
    chosen = np.sort(rng.permutation(len(images))[:n])
    each = min(n_patches, -(-wanted // n))
    together = max(1, _NUMBERS // (4 * n_patches * h))
    parts = []
    for index in np.array_split(chosen, -(-n // together)):
        found = geometry(images[torch.from_numpy(index).to(images.device)].double())
        place = rng.random((len(index), n_patches)).argsort(1)[:, :each]
        rows = torch.from_numpy(place).to(images.device).unsqueeze(2).expand(-1, -1, found.shape[2])
        parts.append(torch.gather(found, 1, rows).flatten(0, 1))
    return torch.cat(parts)
