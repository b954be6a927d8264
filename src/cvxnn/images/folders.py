"""Images in folders: a sub-folder per class."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cvxnn.errors import DependencyError, InvalidInputError, StorageError
from cvxnn.images.data import SPLITS, ImageData
from cvxnn.validation import check_choice, check_integer

__all__ = ["read_image_folder"]

_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_GREY = frozenset(("1", "L", "LA"))
_COLOUR = frozenset(("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"))
_JPEG = "decoded from JPEG files; another decoder may give pixels that differ a little"


def read_image_folder(
    folder: str | os.PathLike[str],
    split: str = "train",
    *,
    size: Any = None,
    channels: int | None = None,
) -> ImageData:
    """Images from a folder with a sub-folder per class, in sorted order.

    A folder with sub-folders ``train`` and ``test`` has the classes in each of these, and those of ``train`` count.
    Any other folder is all for training. Images lie in the folder of their class or deeper; files without the suffix
    of an image, and names that begin with a dot, are ignored. Photographs are turned upright, and transparency is
    dropped.

    Parameters
    ----------
    folder : path
    split : {"train", "test"}
    size : int or (int, int), optional
        Height and width to resize to (bilinear, without regard to the aspect ratio); by default all images must
        have the same size.
    channels : {1, 3}, optional
        Grey or colour; by default grey if all images are.

    Raises
    ------
    InvalidInputError
        No such folder, wrong `split`, `size` or `channels`.
    StorageError
        No classes or images, no test part, a class that the training part lacks, images of unequal size or of more
        than 8 bits per channel, or a file that cannot be read.
    DependencyError
        Pillow is missing.
    """
    check_choice(split, "split", SPLITS)
    shape = _as_size(size)
    if channels is not None and check_integer(channels, "channels") not in (1, 3):
        raise InvalidInputError(f"channels is {channels!r}; 1 (grey) or 3 (colour) is wanted")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InvalidInputError(f"folder is {str(folder)!r}, which is no folder; a folder of images is wanted")
    _pillow()
    part, classes = _classes(root, split)
    files = [(path, label) for label, name in enumerate(classes) for path in _files(part / name)]
    if not files:
        raise StorageError(f"{part} has no images in its sub-folders; files such as CLASS/1.png are wanted")
    if split == "train":
        _check_no_class_empty(part, classes, {label for _, label in files})
    paths = [path for path, _ in files]
    modes, formats = zip(*map(_kind, paths), strict=True)
    grey = channels == 1 or (channels is None and _GREY.issuperset(modes))
    note = _JPEG if "JPEG" in formats else ""
    images = _read_all(paths, shape, "L" if grey else "RGB")
    return ImageData(images, np.array([label for _, label in files]), classes, str(folder), split, note)


def _as_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, np.integer)) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidInputError(f"size is {size!r}; an integer, or height and width, is wanted")
    return check_integer(pair[0], "size"), check_integer(pair[1], "size")


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DependencyError("reading image folders needs Pillow: pip install 'cvxnn[images]'") from error
    return Image, ImageOps


def _classes(root: Path, split: str) -> tuple[Path, list[str]]:
    """The folder of the split, and the names of the classes."""
    if not (root / "train").is_dir():
        if split == "test":
            raise StorageError(f"{root} has no sub-folders 'train' and 'test'; without them all images are 'train'")
        return root, _sub_folders(root)
    classes, part = _sub_folders(root / "train"), root / split
    if not part.is_dir():
        raise StorageError(f"{root} has a sub-folder 'train', but no sub-folder {split!r}")
    for name in _sub_folders(part):
        if name not in classes:
            raise StorageError(f"{part} has the class {name!r}, which {root / 'train'} lacks")
    return part, classes


def _sub_folders(folder: Path) -> list[str]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror or error}") from error
    if not names:
        raise StorageError(f"{folder} has no sub-folders; one for each class is wanted")
    return names


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def _check_no_class_empty(part: Path, classes: list[str], seen: set[int]) -> None:
    for label, name in enumerate(classes):
        if label not in seen:
            raise StorageError(f"{part / name} has no images; at least one of each class is wanted")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    Image, _ = _pillow()
    try:
        yield
    except StorageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise StorageError(f"{path} cannot be read as an image: {error}") from error


def _kind(path: Path) -> tuple[str, str]:
    """Pixel mode and file format, from the header."""
    Image, _ = _pillow()
    with _readable(path), Image.open(path) as image:
        if image.mode not in _GREY and image.mode not in _COLOUR:
            raise StorageError(f"{path} has pixels of kind {image.mode!r}; 8 bits per channel are wanted")
        return image.mode, image.format or ""


def _read_all(paths: list[Path], shape: tuple[int, int] | None, mode: str) -> np.ndarray:
    """All images as one array (n, channels, H, W)."""
    images = None
    for i, path in enumerate(paths):
        pixels = _read(path, shape, mode)
        if images is None:
            try:
                images = np.empty((len(paths), *pixels.shape), dtype=np.uint8)
            except MemoryError as error:
                raise StorageError(
                    f"{len(paths)} images as large as {path} do not fit into memory; resize them with size"
                ) from error
        if pixels.shape != images.shape[1:]:
            (_, height, width), (_, first_height, first_width) = pixels.shape, images.shape[1:]
            raise StorageError(
                f"{path} has {height} x {width} pixels and {paths[0]} has {first_height} x {first_width}; "
                "images of the same size, or size=(height, width) to resize them, are wanted"
            )
        images[i] = pixels
    assert images is not None
    return images


def _read(path: Path, shape: tuple[int, int] | None, mode: str) -> np.ndarray:
    Image, ImageOps = _pillow()
    with _readable(path), Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert(mode)
        if shape is not None and image.size != (shape[1], shape[0]):
            image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
