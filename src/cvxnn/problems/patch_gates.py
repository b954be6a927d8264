"""The gates of a CNN: given, drawn or enumerated on the patches of all images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.gates import choose_gates, draw_gates
from cvxnn.operators import PatchGeometry
from cvxnn.operators.base import row_batches
from cvxnn.operators.shared_images import SharedImages
from cvxnn.operators.sources import ImageSource
from cvxnn.patterns import Coverage, PatchBits, activation_patterns, patch_bits
from cvxnn.patterns.activation import pack_columns
from cvxnn.problems.distinct import distinct_everywhere

__all__ = ["PatchGates", "choose_patch_gates", "distinct_gates"]

#: Up to so many patches are looked at together; of more, so many are drawn to sample gates from.
_PATCHES = 2**17
#: Numbers in the patches that are drawn, unless there would be fewer patches than four times their length.
_NUMBERS = 2**26
_IMAGES = 4096
#: Bytes of the patches of one batch of images: on a CPU larger ones are slower, as memory is mapped anew for each.
_BATCH_BYTES = {"cpu": 2**25, "cuda": 2**27}


@dataclass(frozen=True)
class PatchGates:
    """Gates (h, P) with what is known of them, as :class:`cvxnn.gates.ChosenGates`; patterns of all patches.

    Of images that are shared out to processes, the patterns are those of this process.
    """

    gates: np.ndarray
    bits: PatchBits
    scope: str
    coverage: Coverage | None = None


def choose_patch_gates(
    images: torch.Tensor | ImageSource,
    geometry: PatchGeometry,
    gates: Any,
    n_gates: int,
    gate_sampling: str,
    gate_quantile: float | Sequence[float] | None,
    max_cells: int | None,
    random_state: Any,
    activation: str,
    adjust: Callable[[np.ndarray], np.ndarray | None] | None = None,
) -> PatchGates:
    """Gate vectors, their patterns on all patches, and the scope that they give.

    Parameters
    ----------
    images : torch.Tensor or ImageSource of shape (n, channels, H, W)
        Those that are shared out to processes are read by all of them at the same time.
    adjust : callable, optional
        From drawn gates (h, P) to those that are used in their place, None where these are the same. It looks at each
        gate by itself; which of them are merged is decided by the patterns of those that were drawn.

    Notes
    -----
    Where there are more than 131,072 patches, so many (fewer of long ones) are drawn at random for what sampling
    takes from the data (whitening, differences, quantiles).
    """
    n = len(images)
    n_patches = int(np.prod(geometry.grid(*images.shape[2:])))

    if isinstance(images, ImageSource):
        images = images.double()

    held, own = images, slice(None)
    if isinstance(images, SharedImages):
        held, own = images.local, images.own

    def patches(rows: Any) -> torch.Tensor:
        """Of the images that are here."""
        return geometry(held[rows].double())

    if n * n_patches <= _PATCHES:
        X = geometry(images[:].double()).flatten(0, 1).cpu().numpy()
        chosen = choose_gates(
            X, gates, n_gates, geometry.bias, gate_sampling, gate_quantile, max_cells, random_state, activation
        )
        moved = None if adjust is None or gates is not None else adjust(chosen.gates)
        if moved is not None:
            chosen = replace(chosen, gates=moved, patterns=activation_patterns(X, moved))
        data = torch.from_numpy(chosen.patterns).view(n, n_patches, -1)[own].to(images.device)
        return PatchGates(chosen.gates, PatchBits(data, data.shape[2]), chosen.scope, chosen.coverage)
    if isinstance(gates, str):
        raise UnsupportedError(
            f"gates is {gates!r} and the images have {n * n_patches} patches; all patterns are enumerated for at most "
            f"{_PATCHES} patches"
        )
    if gates is None:
        sample = _drawn_patches(images, geometry, n_patches, random_state)
    else:
        sample = geometry(images[:1].double())[0]
    found, scope = draw_gates(
        sample.cpu().numpy(), gates, n_gates, geometry.bias, gate_sampling, gate_quantile, random_state
    )
    moved = None if adjust is None or gates is not None else adjust(found)
    n_drawn = found.shape[1]
    place = np.arange(n_drawn)
    if moved is not None:
        # Both are looked at in one pass: images can take long to read.
        changed = np.flatnonzero((moved != found).any(axis=0))
        place[changed] = n_drawn + np.arange(len(changed))
        found = np.concatenate([found, moved[:, changed]], axis=1)
    vectors = torch.from_numpy(found).to(images.device)
    size = 8 * n_patches * (2 * geometry.length(images.shape[1]) + 2 * found.shape[1])
    batches = row_batches(len(held), size, _batch_bytes(images))
    bits = patch_bits(len(held), patches, vectors, batches[0].stop)
    if gates is not None:
        return PatchGates(found, bits, scope)

    def informative(rows: slice) -> torch.Tensor:
        if geometry.bias:
            return torch.ones(rows.stop - rows.start, n_patches, dtype=torch.bool, device=images.device)
        return patches(rows).any(2)

    distinct = distinct_everywhere if isinstance(images, SharedImages) else distinct_gates
    kept = distinct(bits.first(n_drawn), informative, batches)
    if len(kept) == found.shape[1]:
        return PatchGates(found, bits, scope)
    if len(kept) == 0:
        raise InvalidInputError(f"none of the {n_drawn} gates is active on any patch; draw more gates")
    bits = bits.select(torch.from_numpy(place[kept]).to(images.device))
    return PatchGates(np.ascontiguousarray(found[:, place[kept]]), bits, scope)


def _batch_bytes(images: torch.Tensor | ImageSource) -> int:
    return _BATCH_BYTES.get(images.device.type, _BATCH_BYTES["cuda"])


def _drawn_patches(
    images: torch.Tensor | ImageSource, geometry: PatchGeometry, n_patches: int, random_state: Any
) -> torch.Tensor:
    """Patches at random positions of random images."""
    seed = random_state if isinstance(random_state, (int, np.integer)) else None
    rng = np.random.default_rng(check_random_state(seed).randint(2**31))
    chosen = np.sort(rng.permutation(len(images))[:_IMAGES])
    length = geometry.length(images.shape[1])
    wanted = min(_PATCHES, max(_NUMBERS // length, 4 * length))
    each = min(n_patches, -(-wanted // len(chosen)))
    parts = []
    together = max(1, min(256, _batch_bytes(images) // (16 * n_patches * length)))
    for part in np.array_split(chosen, -(-len(chosen) // together)):
        rows = geometry(images[torch.from_numpy(part).to(images.device)].double())
        place = torch.from_numpy(rng.random((len(part), n_patches)).argsort(1)[:, :each]).to(images.device)
        parts.append(torch.gather(rows, 1, place.unsqueeze(2).expand(-1, -1, rows.shape[2])).flatten(0, 1))
    return torch.cat(parts)


def distinct_gates(bits: PatchBits, informative: Callable[[slice], torch.Tensor], batches: list[slice]) -> np.ndarray:
    """The first gate of every distinct pattern, without empty ones.

    Parameters
    ----------
    bits : PatchBits
    informative : callable
        Returns which patches of some samples tell gates apart, bool (rows, K): those that are zero do not.
    batches : list of slice
        Samples to take at a time.
    """
    label = np.zeros(bits.n_gates, dtype=np.int64)
    active = np.zeros(bits.n_gates, dtype=bool)
    for rows in batches:
        seen = bits.rows(rows)[informative(rows)].cpu().numpy()
        active |= seen.any(0)
        keys = zip(label.tolist(), pack_columns(seen), strict=True)
        names: dict[tuple[int, bytes], int] = {}
        label = np.array([names.setdefault(key, k) for k, key in enumerate(keys)])
        if active.all() and len(names) == bits.n_gates:
            break
    return np.array([k for k in range(bits.n_gates) if label[k] == k and active[k]], dtype=np.int64)
