"""What happens between stages: images with their mirror images, and average pooling of maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from cvxnn.errors import InvalidInputError
from cvxnn.operators import PatchGeometry, pooling_matrix

__all__ = ["Reduction", "mirrored", "stage_pooling"]


def mirrored(images: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) above their mirror images, (n, C, 2 H, W)."""
    return torch.cat([images, images.flip(3)], 2)


@dataclass(frozen=True)
class Reduction:
    """Maps of a stage as the images of the next one.

    Attributes
    ----------
    mirror : bool
        The maps are those of an image above its mirror image. Each of the two is taken on its own; with padding, the
        last rows of the one and the first of the other still see across the seam.
    size, stride : int
        Of an average pooling; 1 and 1 leave the maps as they are. It does not increase Euclidean norms.
    """

    mirror: bool = False
    size: int = 1
    stride: int = 1

    def __call__(self, maps: torch.Tensor, half: int) -> torch.Tensor:
        """Reduce maps (n, r, H', W'), of which the first and the last `half` rows are those of the two images."""
        parts = [maps[:, :, :half], maps[:, :, maps.shape[2] - half :]] if self.mirror else [maps]
        if self.size > 1 or self.stride > 1:
            parts = [functional.avg_pool2d(part, self.size, self.stride) for part in parts]
        return torch.cat(parts, 2) if self.mirror else parts[0]

    def half(self, geometry: PatchGeometry, height: int, width: int) -> int:
        """Rows of the map of one image, where images of so many rows and columns are convolved."""
        return geometry.grid(height // 2 if self.mirror else height, width)[0]

    def grid(self, geometry: PatchGeometry, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of what is left of the maps of images of so many rows and columns.

        Raises
        ------
        InvalidInputError
            The pooling is larger than the map.
        """
        rows, columns = self.half(geometry, height, width), geometry.grid(height, width)[1]
        if self.size > min(rows, columns):
            raise InvalidInputError(
                f"map_pooling has size {self.size}; at most {min(rows, columns)}, the size of the maps, is wanted"
            )
        rows, columns = ((side - self.size) // self.stride + 1 for side in (rows, columns))
        return (2 * rows if self.mirror else rows), columns


def stage_pooling(pooling: Any, geometry: PatchGeometry, height: int, width: int, mirror: bool) -> torch.Tensor:
    """The pooling matrix of a stage whose images have so many rows and columns.

    With `mirror` a cell is the mean of the same cell of an image and of its mirror image, so that the two are one.

    Raises
    ------
    InvalidInputError
        The pooling does not fit.
    """
    rows, columns = geometry.grid(height, width)
    if not mirror:
        return pooling_matrix(pooling, (rows, columns))
    half = geometry.grid(height // 2, width)[0]
    single = pooling_matrix(pooling, (half, columns)).unflatten(1, (half, columns))
    whole = single.new_zeros(len(single), rows, columns)
    whole[:, :half] += single / 2
    whole[:, rows - half :] += single / 2
    return whole.flatten(1)
