"""What every reader of images returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SPLITS", "ImageData"]

SPLITS = ("train", "test")


@dataclass(frozen=True)
class ImageData:
    """Images with their labels.

    Attributes
    ----------
    images : ndarray of shape (n, channels, H, W), uint8
        Pixels from 0 to 255; three channels are red, green, blue.
    labels : ndarray of shape (n,), int64
        Indices into `classes`.
    classes : list of str
    name : str
        The known name, or the folder that the images are from.
    split : {"train", "test"}
    note : str
        What has to be said where a number from these images is reported, such as that they are JPEG copies; empty
        for the official files.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    name: str
    split: str
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        n, channels, height, width = self.images.shape
        note = f", {self.note}" if self.note else ""
        return (
            f"ImageData({self.name}, {self.split}: {n} images, {channels} x {height} x {width}, "
            f"{len(self.classes)} classes{note})"
        )
