"""The patches of images: rows of X_i, ordered as in torch's unfold, with a one for the bias."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from cvxnn.errors import InvalidInputError

__all__ = ["PatchGeometry"]


@dataclass(frozen=True)
class PatchGeometry:
    """How images (n, channels, H, W) are cut into patches.

    Attributes
    ----------
    filter_size, stride, padding : pair of int
        Height and width.
    bias : bool
        Whether a 1 is appended to every patch, those that reach into the padding included.
    """

    filter_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    bias: bool

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of patches.

        Raises
        ------
        InvalidInputError
            The filter is larger than the padded image.
        """
        sizes = []
        for name, size, f, s, p in zip(
            ("height", "width"), (height, width), self.filter_size, self.stride, self.padding, strict=True
        ):
            if f > size + 2 * p:
                raise InvalidInputError(
                    f"filter_size has a {name} of {f}, but the images, with padding, have {size + 2 * p}; "
                    "a filter no larger than the padded images is wanted"
                )
            sizes.append((size + 2 * p - f) // s + 1)
        return sizes[0], sizes[1]

    def length(self, channels: int) -> int:
        """Length h of a patch."""
        return channels * self.filter_size[0] * self.filter_size[1] + self.bias

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The patches (n, K, h) of images (n, channels, H, W)."""
        if self.filter_size == self.stride == (1, 1) and self.padding == (0, 0):
            # As unfold, which copies them in another order first.
            columns = images.flatten(2)
        else:
            columns = functional.unfold(images, self.filter_size, padding=self.padding, stride=self.stride)
        n, h, n_patches = columns.shape
        patches = images.new_empty(n, n_patches, h + self.bias)
        patches[:, :, :h] = columns.mT
        if self.bias:
            patches[:, :, h] = 1
        return patches

    def to_dict(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
