"""The images of a stage: maps of the stages before it, kept in memory or computed as they are read."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch.nn import functional

from cvxnn.distributed import Group
from cvxnn.layerwise.reduction import Reduction, spaced
from cvxnn.layerwise.stage import GatedConvolution, unshuffle
from cvxnn.operators import PatchGeometry
from cvxnn.operators.base import row_batches
from cvxnn.operators.sources import ImageSource
from cvxnn.patterns import PatchBits, gather_bits

__all__ = ["MAPS", "StageMaps", "channel_scales"]

MAPS = ("auto", "cached", "recomputed")

#: Bytes of maps that are kept with maps="auto".
_CACHE_BYTES = 2**31
#: Bytes of the temporaries of one batch of samples.
_BATCH_BYTES = 2**25
_EPS = 2.0**-53


class StageMaps(ImageSource):
    """The maps of a stage on all samples, the images of the next one.

    The problem of the next stage is that of the maps as numbers. Kept maps, in the working type, are these numbers.
    Otherwise they are the maps of the given filters and of gate patterns that are computed once, in float64, and
    stored as bits: everything else is linear, and a reading in float64 differs from them by rounding only.

    Parameters
    ----------
    parent : torch.Tensor or StageMaps of shape (n, C, H, W)
        Images of the stage, with its gap.
    layer : GatedConvolution
        Its downsampling and gap are those of the parent's maps, which have been done.
    geometry, pooling : PatchGeometry, torch.Tensor of shape (a, K)
        Of the next stage, for :attr:`rounding`.
    downsample : bool
        Whether the maps are pixel-unshuffled for the next stage.
    storage : {"auto", "cached", "recomputed"}
        Whether the maps are kept; "auto" keeps up to 2 GiB.
    reduction : Reduction, optional
        What is left of the maps, before they are pixel-unshuffled.
    gap : int
        Rows of zeros between the maps of an image and of its mirror image, for the next stage.

    Notes
    -----
    Let x be the images of the parent, read with an error of at most e in Frobenius norm, U the filters and
    s the number of patches that a pixel is in. As gating, average pooling with windows of k x k pixels and
    pixel-unshuffling do not increase norms, the maps are read with an error of at most
    ||U||_2 sqrt(s) e + gamma ||U||_F ||X||_F, X the patches of x as read and gamma = 4 (h + k^2 + 6) 2^-53, more than
    what sums of h and of k^2 terms, in any order, lose of the product of the norms.
    """

    def __init__(
        self,
        parent: torch.Tensor | StageMaps,
        layer: GatedConvolution,
        geometry: PatchGeometry,
        pooling: torch.Tensor,
        downsample: bool = False,
        storage: str = "auto",
        reduction: Reduction | None = None,
        gap: int = 0,
    ) -> None:
        self.parent, self.layer, self.downsample, self.gap = parent, layer, downsample, gap
        self.reduction = Reduction() if reduction is None else reduction
        self.dtype, self.device = parent.dtype, parent.device
        n, _, height, width = parent.shape
        self._grid = layer.geometry.grid(height, width)
        self._half = self.reduction.half(layer.geometry, height, width, layer.gap)
        shape = (n, layer.n_channels, *self.reduction.grid(layer.geometry, height, width, layer.gap))
        if downsample:
            shape = (n, 4 * shape[1], shape[2] // 2, shape[3] // 2)
        shape = (*shape[:2], shape[2] + gap, shape[3])
        self.shape = torch.Size(shape)
        size = math.prod(shape) * self.dtype.itemsize
        self.kept: torch.Tensor | None = None
        if storage == "cached" or (storage == "auto" and size <= _CACHE_BYTES):
            self.kept = torch.empty(shape, dtype=self.dtype, device=self.device)
        h = layer.filters.shape[1]
        n_gates = layer.gates.shape[1]
        positions = math.prod(self._grid)
        batches = row_batches(n, 8 * positions * (2 * h + 2 * n_gates + 3 * layer.n_channels), _BATCH_BYTES)
        self._together = batches[0].stop
        self.errors = torch.zeros(n, dtype=torch.float64, device=self.device)
        #: What :attr:`rounding` is relative to, squared, of each sample; noted when its maps are first read in float64.
        self._cells = torch.zeros(n, dtype=torch.float64, device=self.device)
        self._unread = torch.ones(n, dtype=torch.bool, device=self.device)
        self._next = geometry, pooling.to(self.device)
        self._double: StageMaps | None = None
        self._bits: PatchBits | None = None
        exact = parent.double() if isinstance(parent, StageMaps) else parent
        if self.kept is None:
            self._bits = self._read_gates(exact)
            return
        for rows in batches:
            images = exact[rows].double()
            self.kept[rows] = self._maps(images, self._active(images)).to(self.dtype)

    def _active(self, images: torch.Tensor) -> torch.Tensor:
        """The patterns of images of the parent, in float64."""
        return self.layer.geometry(images) @ self.layer.gates >= 0

    def _read_gates(self, exact: torch.Tensor | StageMaps) -> PatchBits:
        """One pass over the images of the parent for the patterns, and for bounds of the errors of readings."""
        layer = self.layer
        U = layer.filters.detach().double()
        gamma = 4 * (U.shape[1] + self.reduction.size**2 + 6) * _EPS
        spectral = float(torch.linalg.matrix_norm(U, 2)) * (1 + 1e-6)
        spread = spectral * math.sqrt(_patches_of_a_pixel(layer.geometry))
        inherited = exact.errors if isinstance(exact, StageMaps) else self.errors

        def part(rows: slice) -> torch.Tensor:
            images = exact[rows].double()
            norms = _patch_squares(images, layer.geometry).sum(1).sqrt()
            self.errors[rows] = spread * inherited[rows] + gamma * float(U.norm()) * norms
            return self._active(images)

        return gather_bits(len(self), None, layer.gates.shape[1], self.device, part, self._together)

    @torch.no_grad()
    def _maps(self, images: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        maps = self.reduction(self.layer.maps(images, active), self._half)
        return spaced(unshuffle(maps) if self.downsample else maps, self.gap)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if self.kept is not None:
            return self.kept[rows].to(self.dtype)
        index = torch.arange(len(self), device=self.device)[rows] if isinstance(rows, slice) else rows
        if len(index) <= self._together:
            return self._read(rows)
        # Larger batches are slower: on a CPU memory is mapped anew for each.
        shape = (len(index), *self.shape[1:])
        maps = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        for place in row_batches(len(index), 1, self._together):
            maps[place] = self._read(index[place])
        return maps

    def _read(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Maps of a few samples, computed again."""
        assert self._bits is not None
        maps = self._maps(self.parent[rows].to(self.dtype), self._bits.rows(rows))
        if self.dtype == torch.float64 and bool(self._unread[rows].any()):
            geometry, pooling = self._next
            self._cells[rows] = (_patch_squares(maps, geometry).sqrt() @ pooling.abs().T).square().sum(1)
            self._unread[rows] = False
        return maps

    def double(self) -> StageMaps:
        if self.dtype == torch.float64:
            return self
        if self._double is None:
            self._double = copy.copy(self)
            self._double.dtype = torch.float64
            if isinstance(self.parent, StageMaps):
                self._double.parent = self.parent.double()
        return self._double

    @property
    def cached(self) -> bool:
        """Whether the maps are kept in memory."""
        return self.kept is not None

    @property
    def rounding(self) -> float:
        """What two readings in float64 can differ by, relative to the norm that the next stage's bounds rest on.

        That norm is the Frobenius norm of the matrix of sum_k |P_ak| ||x_ik||, over samples i and cells a, x_ik
        the patches of the next stage; the bound holds for its filter size and pooling. Zero for kept maps.
        """
        if self.kept is not None:
            return 0.0
        unread = self._unread.nonzero()[:, 0]
        for place in row_batches(len(unread), 1, self._together):
            self.double()._read(unread[place])
        geometry, pooling = self._next
        # sum_k |P_ak| ||E_k|| <= ||P_a|| sqrt(s) ||E||_F for an error E of an image, E_k that of patch k.
        wide = float(pooling.norm()) * math.sqrt(_patches_of_a_pixel(geometry))
        largest = wide * float(self.errors.norm())
        cells = float(self._cells.sum())
        return 2 * largest / math.sqrt(cells) if cells > 0 else math.inf

    def tensors(self) -> Iterable[torch.Tensor]:
        parent = self.parent.tensors() if isinstance(self.parent, StageMaps) else (self.parent,)
        return (*parent, self.layer.filters.detach(), self.layer.gates, self.layer.gate_index)


def _patches_of_a_pixel(geometry: PatchGeometry) -> int:
    """The most patches that one pixel is in."""
    return math.prod(-(-f // s) for f, s in zip(geometry.filter_size, geometry.stride, strict=True))


def _patch_squares(images: torch.Tensor, geometry: PatchGeometry) -> torch.Tensor:
    """Squared norms (n, K) of the patches of float64 images."""
    squares = images.square().sum(1, keepdim=True)
    ones = squares.new_ones(1, 1, *geometry.filter_size)
    sums = functional.conv2d(squares, ones, stride=geometry.stride, padding=geometry.padding)
    return sums.flatten(1) + geometry.bias


def channel_scales(
    images: torch.Tensor | ImageSource, layer: GatedConvolution, group: Group | None = None
) -> torch.Tensor:
    """One over the root mean square of each channel of the maps over all samples, (r,) float64; 1 where that is 0.

    With a group the images are those of this process, of the samples of all.
    """
    n, _, height, width = images.shape
    positions = math.prod(layer.geometry.grid(height, width))
    size = images.dtype.itemsize * positions * (2 * layer.filters.shape[1] + 4 * layer.n_channels)
    total = torch.zeros(layer.n_channels, dtype=torch.float64, device=images.device)
    with torch.no_grad():
        for rows in row_batches(n, size, _BATCH_BYTES):
            total += layer.maps(images[rows]).double().square().sum((0, 2, 3))
    if group is not None:
        n = int(group.sums(n)[0])
        group.add_up(total)
    root = (total / (n * positions)).sqrt()
    return torch.where(root > 0, 1 / root, 1.0)
