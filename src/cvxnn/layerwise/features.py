"""Hidden outputs of a batch as functions of the filters: from pooled gated patches, or by convolution."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from cvxnn.distributed import Group
from cvxnn.layerwise.augment import augment_batch
from cvxnn.layerwise.stage import convolve, pool, unshuffle
from cvxnn.memory import available_bytes
from cvxnn.operators import CNNOperator
from cvxnn.operators.base import row_batches

__all__ = ["POOLED_SHARE", "AugmentedImages", "BatchFeatures", "ConvolvedFeatures", "PooledFeatures", "pooled_fits"]

#: Part of the free memory that pooled patches may take.
POOLED_SHARE = 0.5

_BATCH_BYTES = 2**27
#: The same on a CPU for one tensor: several times faster than whole batches (measured).
_PART_BYTES = 2**22


#: Places (B,) in a batch, and the size of the batch.
Among = tuple[torch.Tensor, int]


class BatchFeatures(Protocol):
    """Hidden outputs (B, r a) of samples, differentiable in filters u (r, h), r = P m, sorted by gate.

    `start_epoch` sets the seed of what is random in an epoch. `among` says where the samples are in a batch that
    several processes share, and how large that is: what is random is drawn for all of it.
    """

    def start_epoch(self, seed: int) -> None: ...

    def hidden(self, rows: torch.Tensor, u: torch.Tensor, among: Among | None = None) -> torch.Tensor: ...

    def evaluation_batches(self, n_columns: int) -> list[slice]: ...


def pooled_fits(needed: int, device: torch.device, group: Group | None) -> bool:
    """Whether so many bytes are at most half of the free memory, in every process of a group."""
    if group is None:
        return needed <= POOLED_SHARE * available_bytes(device)
    # The processes of one machine share its memory; GPUs have their own.
    there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return not group.any(needed * there > POOLED_SHARE * available_bytes(device))


class PooledFeatures:
    """From Phi (n, a, P, h), formed once: a h numbers per gate and sample in every epoch (math section 2).

    Parameters
    ----------
    op : CNNOperator
    """

    def __init__(self, op: CNNOperator) -> None:
        self.cells, self.n_gates = op.width, op.n_gates
        if op.cached:
            self.phi = op.pooled(slice(0, op.n_samples))
        else:
            shape = (op.n_samples, op.width, op.n_gates, op.block_shape[1])
            self.phi = torch.empty(shape, dtype=op.dtype, device=op.device)
            for rows in op.feature_batches():
                self.phi[rows] = op.pooled(rows)

    def start_epoch(self, seed: int) -> None:
        """Nothing is random."""

    def hidden(self, rows: torch.Tensor, u: torch.Tensor, among: Among | None = None) -> torch.Tensor:
        """One product per cell and gate: (m, h) times (h, B)."""
        if len(rows) == 0:
            return _of_nothing(u, self.cells)
        hidden: torch.Tensor = _PooledProducts.apply(u, self.phi, rows)
        return hidden

    def evaluation_batches(self, n_columns: int) -> list[slice]:
        """Slices of samples that are looked at together."""
        return row_batches(len(self.phi), self.phi[0].numel() * self.phi.element_size(), _BATCH_BYTES)


class _PooledProducts(torch.autograd.Function):
    """Phi of some samples times the filters of each gate; both passes gather Phi in parts that fit in a cache."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, phi: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.phi, ctx.rows, ctx.shape = phi, rows, u.shape
        cells, n_gates, h = phi.shape[1:]
        factors = u.view(n_gates, -1, h).repeat(cells, 1, 1)
        hidden = u.new_empty(len(rows), n_gates, u.shape[0] // n_gates, cells)
        for place, part in _gathered(phi, rows):
            products = torch.bmm(factors, part.mT).view(cells, n_gates, -1, part.shape[1])
            hidden[place] = products.permute(3, 1, 2, 0)
        return hidden.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        phi, rows = ctx.phi, ctx.rows
        cells, n_gates, h = phi.shape[1:]
        m = ctx.shape[0] // n_gates
        slopes = gradients[0].view(len(rows), n_gates, m, cells).permute(3, 1, 2, 0)
        slopes = slopes.reshape(cells * n_gates, m, len(rows))
        total = phi.new_zeros(cells * n_gates, m, h)
        for place, part in _gathered(phi, rows):
            total.baddbmm_(slopes[:, :, place], part)
        return total.view(cells, n_gates, m, h).sum(0).view(ctx.shape), None, None


def _gathered(phi: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Phi of some samples as (a P, part, h), a part at a time, in one buffer."""
    size = phi[0].numel() * phi.element_size()
    batches = row_batches(len(rows), size, _cache_bytes(phi.device))
    buffer = phi.new_empty(batches[0].stop, *phi.shape[1:])
    for place in batches:
        part = buffer[: place.stop - place.start]
        torch.index_select(phi, 0, rows[place], out=part)
        yield place, part.flatten(1, 2).transpose(0, 1)


def _cache_bytes(device: torch.device) -> int:
    """What is worked on together: on a CPU about what its caches hold."""
    return _PART_BYTES if device.type == "cpu" else _BATCH_BYTES


def _of_nothing(u: torch.Tensor, cells: int) -> torch.Tensor:
    """Hidden outputs of no samples, with gradients of 0."""
    return u.new_zeros(0, len(u) * cells) + 0 * u.sum()


class ConvolvedFeatures:
    """By convolution with the filters, gating and pooling, a batch of images at a time.

    Parameters
    ----------
    op : CNNOperator
        Its stored patterns are used: reading bits is as fast as computing them again for patches of 27 numbers
        (measured on a CPU), and faster for longer ones.
    images : AugmentedImages, optional
        Images that change from epoch to epoch, in place of those of the operator; their patterns are computed.
    mixed : bool
        Convolve with the filters that are trained in bfloat16; gates and earlier stages stay as they are.
    """

    def __init__(self, op: CNNOperator, images: AugmentedImages | None = None, mixed: bool = False) -> None:
        self.op, self.images = op, images
        self.pooling = op.pooling.to(op.dtype)
        self.mixed = mixed
        assert op.gates is not None
        self.gates = torch.from_numpy(op.gates.T.copy()).to(op.device, op.dtype)

    def start_epoch(self, seed: int) -> None:
        """New crops and flips."""
        if self.images is not None:
            self.images.start_epoch(seed)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.mixed:
            return torch.autocast(self.op.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def hidden(self, rows: torch.Tensor, u: torch.Tensor, among: Among | None = None) -> torch.Tensor:
        """Convolution, gate, pooling."""
        op = self.op
        images = None if self.images is None else self.images.batch(rows, among)
        if len(rows) == 0:
            return _of_nothing(u, op.width)
        size = op.dtype.itemsize * op.n_patches * len(u)
        parts = row_batches(len(rows), size, _cache_bytes(op.device))
        return torch.cat([self._hidden(rows[part], None if images is None else images[part], u) for part in parts])

    def _hidden(self, rows: torch.Tensor, augmented: torch.Tensor | None, u: torch.Tensor) -> torch.Tensor:
        op = self.op
        with torch.no_grad():
            if augmented is not None:
                assert self.images is not None
                images = self.images.maps(augmented)
                active = convolve(images, self.gates, op.geometry) >= 0
            else:
                assert op.bits is not None
                images, active = op.images[rows].to(op.dtype), op.bits.rows(rows)
            if len(u) > op.n_gates:
                active = active.repeat_interleave(len(u) // op.n_gates, dim=2)
        with self._precision():
            return pool(convolve(images, u, op.geometry) * active, self.pooling).to(u.dtype)

    def evaluation_batches(self, n_columns: int) -> list[slice]:
        """Slices of samples that are looked at together."""
        op = self.op
        size = op.dtype.itemsize * op.n_patches * (3 * n_columns + op.n_gates + op.block_shape[1])
        return row_batches(op.n_samples, size, _BATCH_BYTES)


class AugmentedImages:
    """Images of a stage from randomly cropped and mirrored images of the data set, through the stages before it.

    Parameters
    ----------
    images : torch.Tensor of shape (n, C, H, W)
        Standardised images.
    layers : sequence of callables
        The maps of the stages before it.
    downsample : bool
        Whether the stage itself downsamples.
    kind, fill : str, torch.Tensor
        As for :func:`augment_batch`.
    """

    def __init__(
        self,
        images: torch.Tensor,
        layers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        downsample: bool,
        kind: str,
        fill: torch.Tensor,
    ) -> None:
        self.images, self.layers, self.downsample = images, layers, downsample
        self.kind, self.fill = kind, fill
        self.generator = torch.Generator()

    def start_epoch(self, seed: int) -> None:
        """New crops and flips."""
        self.generator.manual_seed(seed)

    def batch(self, rows: torch.Tensor, among: Among | None = None) -> torch.Tensor:
        """The images of the next batch of the epoch, changed."""
        return augment_batch(self.images[rows], self.kind, self.fill, self.generator, among=among)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Changed images through the stages before this one."""
        for layer in self.layers:
            images = layer(images)
        return unshuffle(images) if self.downsample else images


def evaluate_outputs(
    features: BatchFeatures, u: torch.Tensor, outputs: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Outputs (n, c) of all samples, without augmentation."""
    device = u.device
    with torch.no_grad():
        parts = [
            outputs(features.hidden(torch.arange(rows.start, rows.stop, device=device), u))
            for rows in features.evaluation_batches(len(u))
        ]
    return torch.cat(parts)
