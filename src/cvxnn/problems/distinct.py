"""Gates with equal patterns on the samples of all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from cvxnn.distributed import sample_group
from cvxnn.patterns import PatchBits

__all__ = ["distinct_everywhere"]


def distinct_everywhere(
    bits: PatchBits, informative: Callable[[slice], torch.Tensor], batches: list[slice]
) -> np.ndarray:
    """The first gate of every distinct pattern over the samples of all processes, without empty ones.

    Parameters
    ----------
    bits : PatchBits
        Of the samples of this process.
    informative : callable
        Returns which patches of some samples tell gates apart, bool (rows, K): those that are zero do not.
    batches : list of slice
        Samples to take at a time.
    """
    group = sample_group()
    digests = [hashlib.blake2b(digest_size=16) for _ in range(bits.n_gates)]
    active = torch.zeros(bits.n_gates, dtype=torch.bool)
    for rows in batches:
        seen = bits.rows(rows)[informative(rows)].cpu()
        active |= seen.any(0)
        for digest, column in zip(digests, np.packbits(seen.numpy(), axis=0).T, strict=True):
            digest.update(np.ascontiguousarray(column).data)
    keys = [digest.digest() + bytes([bool(on)]) for digest, on in zip(digests, active, strict=True)]
    whole = [keys] if group is None else group.gather_bytes(keys)
    first: dict[bytes, int] = {}
    for k, parts in enumerate(zip(*whole, strict=True)):
        if any(part[-1] for part in parts):
            first.setdefault(b"".join(parts), k)
    return np.fromiter(first.values(), dtype=np.int64, count=len(first))
