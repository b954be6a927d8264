"""One stage of a layerwise network as torch modules: the gated convolution, and the head that it was trained with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from cvxnn.layerwise.reduction import spaced
from cvxnn.operators import PatchGeometry
from cvxnn.operators.pooling import Support

__all__ = ["GatedConvolution", "PooledHead", "convolve", "pooled_outputs", "unshuffle"]


def unshuffle(images: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) as (n, 4 C, H / 2, W / 2): invertible downsampling (pixel-unshuffle by 2)."""
    return functional.pixel_unshuffle(images, 2)


def convolve(images: torch.Tensor, filters: torch.Tensor, geometry: PatchGeometry) -> torch.Tensor:
    """Products (n, K, r) of all patches of images (n, C, H, W) with filters (r, h).

    In float64 by the product of the patches with the filters, each entry a sum of h terms, for which rounding
    errors are bounded; otherwise by the convolution of torch.
    """
    if images.dtype == torch.float64:
        return geometry(images) @ filters.T
    weight, bias = split_bias(filters, images.shape[1], geometry)
    weight = weight.contiguous(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    maps = functional.conv2d(images, weight, bias, geometry.stride, geometry.padding)
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def split_bias(
    filters: torch.Tensor, channels: int, geometry: PatchGeometry
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Filters (r, h) as weights (r, C, height, width) and biases (r,) of a convolution."""
    length = filters.shape[1] - geometry.bias
    weight = filters[:, :length].reshape(len(filters), channels, *geometry.filter_size)
    return weight, filters[:, length] if geometry.bias else None


class GatedConvolution(nn.Module):
    """Images -> maps 1{g_k(j) . x >= 0} (u_j . x) over the patches x: m P channels of one stage.

    Parameters
    ----------
    filters : torch.Tensor of shape (r, h)
        The u_j, channel by channel as in ``torch.nn.functional.unfold``, with the hidden bias in the last column.
    gates : torch.Tensor of shape (h, P), float64
        Kept in float64 whatever the module is converted to; those of float32 images are rounded to their type.
    gate_index : torch.Tensor of shape (r,)
        Gate of each filter.
    geometry : PatchGeometry
    downsample : bool
        Whether images are pixel-unshuffled by 2 first.
    gap : int
        Rows of zeros that are put between an image and its mirror image below it, after downsampling.
    """

    gates: torch.Tensor
    gate_index: torch.Tensor

    def __init__(
        self,
        filters: torch.Tensor,
        gates: torch.Tensor,
        gate_index: torch.Tensor,
        geometry: PatchGeometry,
        downsample: bool = False,
        gap: int = 0,
    ) -> None:
        super().__init__()
        used, index = torch.unique(gate_index, return_inverse=True)
        self.filters = nn.Parameter(filters.detach().clone().contiguous())
        self.register_buffer("gates", gates.double()[:, used].contiguous())
        self.register_buffer("gate_index", index)
        self.geometry = geometry
        self.downsample, self.gap = downsample, gap

    @property
    def n_channels(self) -> int:
        """Channels r of the maps."""
        return len(self.filters)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps (n, r, H', W') of images (n, C, H, W), or (n, C, 2 H, 2 W) with downsampling."""
        return self.maps(self.prepared(images))

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images as they are convolved: downsampled, and with the gap."""
        return spaced(unshuffle(images) if self.downsample else images, self.gap)

    def maps(self, images: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (n, r, H', W') of images that are :meth:`prepared` already.

        Parameters
        ----------
        active : torch.Tensor of shape (n, K, P), bool, optional
            The patterns; computed from the gates in the type of the images where not given.
        """
        filters = self.filters.to(images.dtype)
        if active is None:
            active = convolve(images, self.gates.T.to(images.dtype), self.geometry) >= 0
        maps, spread = convolve(images, filters, self.geometry), self.spread(active)
        maps = maps * spread if maps.requires_grad else maps.mul_(spread)
        return maps.mT.unflatten(2, self.geometry.grid(*images.shape[2:]))

    def spread(self, active: torch.Tensor) -> torch.Tensor:
        """Patterns (n, K, P) of the gates as those of the filters, (n, K, r)."""
        n_gates, r = self.gates.shape[1], len(self.gate_index)
        if r == n_gates and bool((self.gate_index[1:] > self.gate_index[:-1]).all()):
            return active
        return active.index_select(2, self.gate_index)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GatedConvolution:
        # Conversions of the module move the gates, but never round them.
        gates = self.gates
        super()._apply(fn, recurse)
        self.gates = gates.to(self.gates.device)
        return self


class PooledHead(nn.Module):
    """Maps (n, r, H', W') -> outputs (n, c): linear pooling to a cells, then a linear layer with intercept.

    Parameters
    ----------
    weight : torch.Tensor of shape (r a, c)
        Column by column, the a cells of a channel side by side.
    bias : torch.Tensor of shape (c,)
    pooling : torch.Tensor of shape (a, K)
    """

    pooling: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, pooling: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().contiguous())
        self.bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("pooling", pooling.to(weight))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Outputs (n, c)."""
        return pool(maps.flatten(2).mT, self.pooling) @ self.weight + self.bias


def pool(maps: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
    """Maps (n, K, r) pooled by P_a (a, K) to (n, r a), the cells of a channel side by side."""
    return torch.matmul(pooling, maps).mT.flatten(1)


def pooled_outputs(layer: GatedConvolution, head: PooledHead, images: torch.Tensor) -> torch.Tensor:
    """``head(layer.maps(images))`` from the pooled gated patches: sum_a <P_a D_k X, sum_j u_j v_ja^T> over gates k."""
    filters = layer.filters.to(images.dtype)
    active = convolve(images, layer.gates.T.to(images.dtype), layer.geometry) >= 0
    patches = layer.geometry(images)
    support = Support(head.pooling)
    weighted = patches[:, support.index] * support.weights.to(images.dtype).unsqueeze(2)
    pooled = torch.matmul(active[:, support.index].to(images.dtype).mT, weighted)
    columns = head.weight.view(len(filters), len(support.index), -1)
    # (r, h, a, c), summed over the columns of each gate.
    blocks = filters[:, :, None, None] * columns[:, None]
    blocks = blocks.new_zeros(layer.gates.shape[1], *blocks.shape[1:]).index_add(0, layer.gate_index, blocks)
    return pooled.flatten(1) @ blocks.permute(2, 0, 1, 3).flatten(0, 2) + head.bias
