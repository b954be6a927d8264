"""Random crops and flips of a batch of images, drawn from a seeded generator."""

from __future__ import annotations

import torch

__all__ = ["AUGMENT", "PADDING", "augment_batch"]

AUGMENT = ("flip", "crop", "crop_flip")
#: Black pixels around an image of which a random part of its size is taken.
PADDING = 4


def augment_batch(
    images: torch.Tensor,
    kind: str,
    fill: torch.Tensor,
    generator: torch.Generator,
    padding: int = PADDING,
    among: tuple[torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """Images (n, C, H, W), each shifted by up to `padding` pixels and mirrored with probability 1/2.

    Parameters
    ----------
    images : torch.Tensor of shape (n, C, H, W)
    kind : {"flip", "crop", "crop_flip"}
    fill : torch.Tensor of shape (C,)
        Value of the pixels outside the image.
    generator : torch.Generator
        On the CPU: the draws do not depend on the device.
    among : pair of torch.Tensor of shape (n,) and int, optional
        Where the images are in a batch of so many; the draws are those of the whole batch.
    """
    n, channels, height, width = images.shape
    place, total = (slice(None), n) if among is None else (among[0].cpu(), among[1])
    if kind in ("crop", "crop_flip"):
        shifts = torch.randint(0, 2 * padding + 1, (2, total), generator=generator)[:, place].to(images.device)
        shape = (n, channels, height + 2 * padding, width + 2 * padding)
        padded = fill.to(images).view(1, -1, 1, 1).expand(shape).clone()
        padded[:, :, padding : padding + height, padding : padding + width] = images
        rows = shifts[0].unsqueeze(1) + torch.arange(height, device=images.device)
        columns = shifts[1].unsqueeze(1) + torch.arange(width, device=images.device)
        sample = torch.arange(n, device=images.device).view(-1, 1, 1)
        images = padded.permute(0, 2, 3, 1)[sample, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
    if kind in ("flip", "crop_flip"):
        mirrored = (torch.rand(total, generator=generator)[place] < 0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images
