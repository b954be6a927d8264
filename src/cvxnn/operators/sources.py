"""Images that are computed when they are needed, such as the feature maps of earlier stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

__all__ = ["ImageSource"]


class ImageSource(ABC):
    """Images (n, channels, H, W) read like a tensor, a few samples at a time; they need not be in memory.

    Attributes
    ----------
    shape : torch.Size
    dtype : torch.dtype
    device : torch.device
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def new_zeros(self, *size: int) -> torch.Tensor:
        """A tensor of the type and on the device of the images."""
        return torch.zeros(*size, dtype=self.dtype, device=self.device)

    @abstractmethod
    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some of the images."""

    @abstractmethod
    def double(self) -> ImageSource:
        """The same images in float64, of which these are roundings."""

    @property
    @abstractmethod
    def rounding(self) -> float:
        """Bound of the difference of two readings of an image in float64, relative to its Frobenius norm."""

    @abstractmethod
    def tensors(self) -> Iterable[torch.Tensor]:
        """The data that define the images, for fingerprints."""
