"""What happens between stages: images with their mirror images, and average pooling of maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from cvxnn.errors import InvalidInputError
from cvxnn.operators import PatchGeometry, pooling_matrix

__all__ = ["Reduction", "mirrored", "spaced", "stage_pooling"]


def mirrored(images: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) above their mirror images, (n, C, 2 H, W)."""
    return torch.cat([images, images.flip(3)], 2)


def spaced(images: torch.Tensor, gap: int) -> torch.Tensor:
    """Images (n, C, 2 H, W), one above the other, with so many rows of zeros between the two."""
    if gap == 0:
        return images
    half = images.shape[2] // 2
    between = images.new_zeros(*images.shape[:2], gap, images.shape[3])
    return torch.cat([images[:, :, :half], between, images[:, :, half:]], 2)


@dataclass(frozen=True)
class Reduction:
    """Maps of a stage as the images of the next one.

    Attributes
    ----------
    mirror : bool
        The maps are those of an image above its mirror image. Each of the two is taken on its own.
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

    def gap(self, geometry: PatchGeometry, height: int) -> int:
        """Rows of zeros between an image of so many rows and its mirror image, so that their maps are those of each.

        Patches of the one then see zeros in place of the other, as of padding: that wants as many rows. The first
        patch of the second image is one of the stack where the stride divides the rows above it. The maps of the two
        are the first and the last rows of the maps of the stack; patches between them belong to neither.
        """
        if not self.mirror:
            return 0
        padding = geometry.padding[0]
        return padding + -(height + padding) % geometry.stride[0]

    def half(self, geometry: PatchGeometry, height: int, width: int, gap: int = 0) -> int:
        """Rows of the map of one image, where images of so many rows, the gap among them, and columns are convolved."""
        return geometry.grid((height - gap) // 2 if self.mirror else height, width)[0]

    def grid(self, geometry: PatchGeometry, height: int, width: int, gap: int = 0) -> tuple[int, int]:
        """Rows and columns of what is left of the maps of images of so many rows, the gap among them, and columns.

        Raises
        ------
        InvalidInputError
            The pooling is larger than the map.
        """
        rows, columns = self.half(geometry, height, width, gap), geometry.grid(height, width)[1]
        if self.size > min(rows, columns):
            raise InvalidInputError(
                f"map_pooling has size {self.size}; at most {min(rows, columns)}, the size of the maps, is wanted"
            )
        rows, columns = ((side - self.size) // self.stride + 1 for side in (rows, columns))
        return (2 * rows if self.mirror else rows), columns


def stage_pooling(
    pooling: Any, geometry: PatchGeometry, height: int, width: int, mirror: bool, gap: int = 0
) -> torch.Tensor:
    """The pooling matrix of a stage whose images have so many rows, the gap among them, and columns.

    With `mirror` a cell is the mean of the same cell of an image and of its mirror image, so that the two are one.

    Raises
    ------
    InvalidInputError
        The pooling does not fit.
    """
    rows, columns = geometry.grid(height, width)
    if not mirror:
        return pooling_matrix(pooling, (rows, columns))
    half = geometry.grid((height - gap) // 2, width)[0]
    single = pooling_matrix(pooling, (half, columns)).unflatten(1, (half, columns))
    whole = single.new_zeros(len(single), rows, columns)
    whole[:, :half] += single / 2
    whole[:, rows - half :] += single / 2
    return whole.flatten(1)
