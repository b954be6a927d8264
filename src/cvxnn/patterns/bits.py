"""Activation patterns of patches: bits, eight to a byte where they are many."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["PatchBits", "gather_bits", "patch_bits"]

#: Up to so many patterns are kept as one byte each.
_PLAIN = 2**26
_ENTRIES = 2**24


class PatchBits:
    """Patterns 1{X_i g_k >= 0} of all samples, (n, K, P), read a few samples at a time.

    Parameters
    ----------
    data : torch.Tensor
        The patterns themselves, bool (n, K, P), or packed bytes (n, K, ceil(P / 8)).
    n_gates : int
    """

    def __init__(self, data: torch.Tensor, n_gates: int) -> None:
        self.data = data
        self.n_gates = n_gates
        self.packed = data.dtype == torch.uint8

    def __len__(self) -> int:
        return len(self.data)

    @property
    def n_patches(self) -> int:
        """Patches K of a sample."""
        return self.data.shape[1]

    def rows(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """The patterns of some samples, bool (rows, K, P)."""
        part = self.data[rows]
        return _unpack(part, self.n_gates) if self.packed else part

    def subset(self, rows: torch.Tensor) -> PatchBits:
        """The patterns of some samples."""
        return PatchBits(self.data[rows], self.n_gates)

    def first(self, n_gates: int) -> PatchBits:
        """The patterns of the first gates, without a copy."""
        return PatchBits(self.data if self.packed else self.data[:, :, :n_gates], n_gates)

    def select(self, gates: torch.Tensor) -> PatchBits:
        """The patterns of some gates."""
        if not self.packed:
            return PatchBits(self.data[:, :, gates], len(gates))
        return gather_bits(len(self), self.n_patches, len(gates), self.data.device, lambda r: self.rows(r)[:, :, gates])


def patch_bits(
    n: int,
    patches: Callable[[slice], torch.Tensor],
    gates: torch.Tensor,
    batch: int,
) -> PatchBits:
    """The patterns of gates (h, P), computed once in float64.

    Parameters
    ----------
    n : int
        Number of samples.
    patches : callable
        Returns the patches (rows, K, h) of a slice of samples, in float64.
    gates : torch.Tensor of shape (h, P), float64
    batch : int
        Samples to take at a time.
    """
    return gather_bits(n, None, gates.shape[1], gates.device, lambda rows: patches(rows) @ gates >= 0, batch)


def gather_bits(
    n: int,
    n_patches: int | None,
    n_gates: int,
    device: torch.device,
    part: Callable[[slice], torch.Tensor],
    batch: int | None = None,
) -> PatchBits:
    """Patterns put together from parts, packed where they are many."""
    if batch is None:
        batch = max(1, _ENTRIES // max(1, (n_patches or 1) * n_gates))
    data: torch.Tensor | None = None
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        bits = part(rows)
        packed = n * bits.shape[1] * n_gates > _PLAIN
        bits = _pack(bits) if packed else bits
        if data is None:
            data = torch.empty(n, *bits.shape[1:], dtype=bits.dtype, device=device)
        data[rows] = bits
    assert data is not None
    return PatchBits(data, n_gates)


def _masks(device: torch.device) -> torch.Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """Bool (..., P) as bytes (..., ceil(P / 8))."""
    whole = functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (whole * _masks(bits.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: torch.Tensor, n_gates: int) -> torch.Tensor:
    bits = (packed.unsqueeze(-1) & _masks(packed.device)) != 0
    return bits.flatten(-2)[..., :n_gates]
