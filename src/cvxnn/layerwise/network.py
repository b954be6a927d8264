"""All stages of a layerwise network, each with its head, as one torch module."""

from __future__ import annotations

import math

import torch
from torch import nn

from cvxnn.errors import InvalidInputError
from cvxnn.layerwise.reduction import Reduction, mirrored, spaced
from cvxnn.layerwise.stage import GatedConvolution, PooledHead, pooled_outputs
from cvxnn.networks import with_channel
from cvxnn.operators.base import row_batches

__all__ = ["LayerwiseNetwork", "Standardizer", "TrainedStage", "outputs_in_batches"]

_BATCH_BYTES = 2**27


#: Added to the standard deviation of the pixels of an image, of about 1: images without contrast stay so.
_LEAST_CONTRAST = 0.05


class Standardizer(nn.Module):
    """Images -> (scale * images - mean) / deviation per channel, computed in float64, in the working type.

    Parameters
    ----------
    scale : float
    mean, deviation : torch.Tensor of shape (C,), float64
    dtype : torch.dtype
        Type of the result.
    each : bool
        Subtract the mean of each image from it and divide by its standard deviation plus 0.05, all channels together.
    mirror : bool
        Put each image above its mirror image.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self,
        scale: float,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        dtype: torch.dtype,
        each: bool = False,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        self.scale = float(scale)
        self.each, self.mirror = each, mirror
        self.dtype = dtype
        self.register_buffer("mean", mean.double(), persistent=True)
        self.register_buffer("deviation", deviation.double(), persistent=True)

    @classmethod
    def of(
        cls, images: torch.Tensor, scale: float, standardize: bool | str, dtype: torch.dtype, mirror: bool = False
    ) -> Standardizer:
        """With the mean and the standard deviation of each channel over all pixels (True), or of each "image"."""
        channels = images.shape[1]
        total, squares = torch.zeros(2, channels, dtype=torch.float64, device=images.device)
        if standardize is not True:
            return cls(scale, total, squares + 1, dtype, standardize == "image", mirror)
        count = images.numel() / channels
        for rows in _image_batches(images):
            total += (images[rows].double() * scale).sum((0, 2, 3))
        mean = total / count
        for rows in _image_batches(images):
            squares += (images[rows].double() * scale - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
        deviation = (squares / count).sqrt()
        return cls(scale, mean, torch.where(deviation > 0, deviation, 1.0), dtype, False, mirror)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Standardised images, with their mirror images below where there are any."""
        values = (images.double() * self.scale - self.mean.view(-1, 1, 1)) / self.deviation.view(-1, 1, 1)
        if self.each:
            flat = values.flatten(1)
            contrast = flat.std(1, correction=0) + _LEAST_CONTRAST
            values = ((flat - flat.mean(1, keepdim=True)) / contrast.unsqueeze(1)).view_as(values)
        values = values.to(self.dtype)
        return mirrored(values) if self.mirror else values

    def all(self, images: torch.Tensor, gap: int = 0) -> torch.Tensor:
        """All images, a part at a time, with so many rows of zeros between an image and its mirror image."""
        n, channels, height, width = images.shape
        shape = (n, channels, (2 * height if self.mirror else height) + gap, width)
        out = torch.empty(shape, dtype=self.dtype, device=images.device)
        for rows in _image_batches(images):
            out[rows] = spaced(self(images[rows]), gap)
        return out

    def black(self) -> torch.Tensor:
        """What a pixel of 0 becomes, (C,)."""
        return (-self.mean / self.deviation).to(self.dtype)


def _image_batches(images: torch.Tensor) -> list[slice]:
    return row_batches(len(images), 16 * math.prod(images.shape[1:]), _BATCH_BYTES)


class TrainedStage(nn.Module):
    """A stage with all its columns and its head, and what of it is the feature map of later stages.

    Parameters
    ----------
    convolution : GatedConvolution
        All columns that the stage was trained with.
    head : PooledHead
    features : GatedConvolution or None
        The channels that later stages see: some of the columns, scaled. None where these are all, as they are.
    reduction : Reduction
        What is left of their maps for later stages.
    """

    def __init__(
        self,
        convolution: GatedConvolution,
        head: PooledHead,
        features: GatedConvolution | None,
        reduction: Reduction | None = None,
    ) -> None:
        super().__init__()
        self.reduction = Reduction() if reduction is None else reduction
        self.convolution = convolution
        self.head = head
        self.narrow = features

    @property
    def features(self) -> GatedConvolution:
        """The feature map of later stages."""
        return self.convolution if self.narrow is None else self.narrow

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """What the next stage sees of images of this one."""
        layer = self.features
        images = layer.prepared(images)
        height, width = images.shape[2:]
        half = self.reduction.half(layer.geometry, height, width, layer.gap)
        return self.reduction(layer.maps(images), half)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs of the stage's own head, (n, c), from what :meth:`maps` of the stage before gives."""
        layer = self.convolution
        if layer.n_channels <= layer.gates.shape[1]:
            return self.head(layer(images))
        # With more columns than gates the pooled gated patches of (24) are fewer numbers than the maps.
        return pooled_outputs(layer, self.head, layer.prepared(images))


class LayerwiseNetwork(nn.Module):
    """Images as they were given in training -> outputs (n, c) of the head of the last stage.

    Images of one channel may be (n, H, W).

    Parameters
    ----------
    standardizer : Standardizer
    stages : list of TrainedStage
    image_shape : tuple of int
        (C, H, W) of the images.
    """

    def __init__(self, standardizer: Standardizer, stages: list[TrainedStage], image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.standardizer = standardizer
        self.stages = nn.ModuleList(stages)
        self.image_shape = tuple(int(size) for size in image_shape)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs of the last stage."""
        return self.staged(images, [len(self.stages) - 1])[0]

    def staged(self, images: torch.Tensor, wanted: list[int] | None = None) -> list[torch.Tensor]:
        """Outputs of the heads of some stages (counted from 0; by default all), from one pass.

        Raises
        ------
        InvalidInputError
            Images of another shape than those of training.
        """
        images = with_channel(images, self.image_shape[0])
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise InvalidInputError(
                f"images have shape {tuple(images.shape)}; (n, {', '.join(map(str, self.image_shape))}) is wanted"
            )
        chosen = range(len(self.stages)) if wanted is None else wanted
        maps = self.standardizer(images)
        outputs = {}
        for i in range(max(chosen) + 1):
            stage = self.stages[i]
            assert isinstance(stage, TrainedStage)
            if i in chosen:
                outputs[i] = stage(maps)
            if i < max(chosen):
                maps = stage.maps(maps)
        return [outputs[i] for i in chosen]

    def sample_bytes(self) -> int:
        """About how much memory the largest maps of one image take."""
        largest, (channels, height, width) = 1, self.image_shape
        height = 2 * height if self.standardizer.mirror else height
        for stage in self.stages:
            assert isinstance(stage, TrainedStage)
            layer = stage.convolution
            if layer.downsample:
                channels, height, width = 4 * channels, height // 2, width // 2
            height += layer.gap
            grid = layer.geometry.grid(height, width)
            n_gates = layer.gates.shape[1]
            columns = max(stage.features.n_channels, min(layer.n_channels, n_gates)) + n_gates
            largest = max(largest, math.prod(grid) * (3 * columns + layer.filters.shape[1]))
            height, width = stage.reduction.grid(layer.geometry, height, width, layer.gap)
            channels = stage.features.n_channels
        return 8 * largest


def outputs_in_batches(
    network: LayerwiseNetwork, images: torch.Tensor, wanted: list[int] | None = None
) -> list[torch.Tensor]:
    """Outputs (n, c) of stages for many images, a part at a time, on the CPU in float64."""
    device = network.standardizer.mean.device
    parts = []
    with torch.no_grad():
        for rows in row_batches(len(images), network.sample_bytes(), 2 * _BATCH_BYTES):
            parts.append([out.double().cpu() for out in network.staged(images[rows].to(device), wanted)])
    return [torch.cat(stage) for stage in zip(*parts, strict=True)]
