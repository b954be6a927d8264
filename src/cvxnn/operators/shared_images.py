"""Images that are shared out to several processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cvxnn.distributed import Group
from cvxnn.operators.sources import ImageSource

__all__ = ["SharedImages"]


class SharedImages(ImageSource):
    """The images (n, channels, H, W) of all processes, of which each holds a range.

    All processes read the same images at the same time: what one of them does not hold, another sends.

    Parameters
    ----------
    local : torch.Tensor or ImageSource of shape (m, channels, H, W)
        Those of this process, its share of them.
    group : Group
    n_samples : int
        Number of images n of all processes.
    dtype : torch.dtype, optional
        Of the images as they are read; by default that of `local`.
    """

    def __init__(
        self, local: torch.Tensor | ImageSource, group: Group, n_samples: int, dtype: torch.dtype | None = None
    ) -> None:
        self.local, self.group = local, group
        self.own = group.share(n_samples)
        self.shape = torch.Size((n_samples, *local.shape[1:]))
        self.dtype, self.device = dtype or local.dtype, local.device

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(self), device=self.device)[rows]
        place = ((index >= self.own.start) & (index < self.own.stop)).nonzero()[:, 0]
        images = self.new_zeros(len(index), *self.shape[1:])
        if len(place) > 0:
            images[place] = self.local[index[place] - self.own.start].to(self.dtype)
        self.group.add_up(images)
        return images

    def double(self) -> SharedImages:
        # A tensor is converted as it is read, without a copy of all of it.
        local = self.local.double() if isinstance(self.local, ImageSource) else self.local
        return SharedImages(local, self.group, len(self), torch.float64)

    @property
    def rounding(self) -> float:
        return self.group.largest(self.local.rounding if isinstance(self.local, ImageSource) else 0.0)

    def tensors(self) -> Iterable[torch.Tensor]:
        return self.local.tensors() if isinstance(self.local, ImageSource) else (self.local,)
