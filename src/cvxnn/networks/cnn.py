"""Two-layer CNNs as torch modules."""

from __future__ import annotations

import torch
from torch import nn

from cvxnn.errors import InvalidInputError
from cvxnn.networks.mlp import GatedModule
from cvxnn.operators import PatchGeometry
from cvxnn.operators.base import row_batches

__all__ = ["TwoLayerCNN", "with_channel"]

#: Bytes of the maps of one batch of images.
_BATCH_BYTES = 2**27


def with_channel(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images (n, H, W) of one channel as (n, 1, H, W); all others as they are."""
    return images.unsqueeze(1) if images.ndim == 3 and channels == 1 else images


class TwoLayerCNN(GatedModule):
    """Convolution, gates or ReLU, linear pooling, fully connected layer: images (n, channels, H, W) -> (n, c).

    Images of one channel may be (n, H, W).

    For each patch x of an image and each filter u_j the map is 1{g_k(j) . x >= 0} (x . u_j), or without gates x . u_j
    for the linear and (x . u_j)_+ for the ReLU network.

    Parameters
    ----------
    hidden : torch.Tensor of shape (h, m)
        One filter u_j per column, in the order of ``torch.nn.functional.unfold`` (the hidden bias in its last row).
    output : torch.Tensor of shape (m, c a)
        Row j holds the weights of filter j, output by output, cell by cell.
    bias : torch.Tensor of shape (c,)
    gates : torch.Tensor of shape (h, P) or None
        Gate vectors, kept in float64.
    gate_index : torch.Tensor of shape (m,) or None
        Gate of each filter.
    geometry : PatchGeometry
        Filter size, stride, padding and hidden bias.
    pooling : torch.Tensor of shape (a, K)
    grid : pair of int
        Rows and columns of the map of patches, K in all.
    sample_dtype : torch.dtype, optional
        Type of the images in training, by default that of `hidden`. Images are rounded to it before their gates are
        computed in float64, whatever type the module is converted to later.
    relu : bool
        Whether the activation is ReLU; there are then no gates.
    """

    gate_index: torch.Tensor | None
    pooling: torch.Tensor

    def __init__(
        self,
        hidden: torch.Tensor,
        output: torch.Tensor,
        bias: torch.Tensor,
        gates: torch.Tensor | None,
        gate_index: torch.Tensor | None,
        geometry: PatchGeometry,
        pooling: torch.Tensor,
        grid: tuple[int, int],
        sample_dtype: torch.dtype | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden.contiguous())
        self.output = nn.Parameter(output.contiguous())
        self.bias = nn.Parameter(bias)
        self.geometry = geometry
        self.grid = grid
        self.sample_dtype = hidden.dtype if sample_dtype is None else sample_dtype
        self.relu = relu
        self.register_buffer("gates", None if gates is None else gates.contiguous())
        self.register_buffer("gate_index", gate_index)
        self.register_buffer("pooling", pooling.to(hidden))

    @property
    def hidden_bias(self) -> bool:
        """Whether a 1 is appended to every patch."""
        return self.geometry.bias

    @property
    def channels(self) -> int:
        """Channels of the images."""
        height, width = self.geometry.filter_size
        return (len(self.hidden) - self.hidden_bias) // (height * width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs (n, c) of images (n, channels, H, W), some at a time.

        Raises
        ------
        InvalidInputError
            Not images with as many channels, or of a size that gives another map of patches than in training.
        """
        images = with_channel(images, self.channels)
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise InvalidInputError(
                f"images have shape {tuple(images.shape)}; (n, {self.channels}, height, width) is wanted"
            )
        grid = self.geometry.grid(*images.shape[2:])
        if grid != self.grid:
            raise InvalidInputError(
                f"images of {images.shape[2]} x {images.shape[3]} give {grid[0]} x {grid[1]} patches; "
                f"{self.grid[0]} x {self.grid[1]}, as in training, are wanted"
            )
        n_gates = 0 if self.gates is None else self.gates.shape[1]
        per_image = 8 * self.pooling.shape[1] * (2 * len(self.hidden) + 2 * len(self.output) + 2 * n_gates + 1)
        batches = row_batches(len(images), per_image, _BATCH_BYTES) if len(images) else [slice(0, 0)]
        outputs = [self._outputs(images[rows]) for rows in batches]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _outputs(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.geometry(images.to(self.hidden.dtype)) @ self.hidden
        if self.relu:
            maps = torch.relu(maps)
        if self.gates is not None:
            active = self.geometry(images.to(self.sample_dtype).double()) @ self.gates >= 0
            maps = maps * active[:, :, self.gate_index]
        pooled = torch.matmul(self.pooling, maps)
        cells, c = len(self.pooling), len(self.bias)
        weights = self.output.view(-1, c, cells).permute(2, 0, 1).flatten(0, 1)
        return pooled.flatten(1) @ weights + self.bias
