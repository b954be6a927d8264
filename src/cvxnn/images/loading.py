"""Images by name or from a folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.images.data import SPLITS, ImageData
from cvxnn.images.downloads import fetch_images
from cvxnn.images.folders import read_image_folder
from cvxnn.images.known import read_split
from cvxnn.images.places import Found, cache_folder, data_folder, locate, what_is_missing
from cvxnn.images.sources import IMAGE_SOURCES, ImageSource
from cvxnn.validation import check_choice

__all__ = ["load_images"]


def load_images(
    name_or_folder: str | os.PathLike[str],
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> ImageData:
    """Images and labels of a known data set, or of a folder with a sub-folder per class.

    A known data set is looked for in `data_dir`, or else in the folder in the environment variable CVXNN_DATA_DIR and
    then in the cache. Files that are not the official ones are read all the same: `note` says so, and for
    Fashion-MNIST, whose official files are to be had everywhere, a warning too.

    Parameters
    ----------
    name_or_folder : str or path
        "fashion_mnist", "cifar10", or a folder (see :func:`cvxnn.images.read_image_folder`). A folder that has one
        of these names is meant by ``"./cifar10"`` or by a Path.
    split : {"train", "test"}
    data_dir : path, optional
        Folder with the official files, directly or in a sub-folder ``fashion-mnist``, ``cifar-10-batches-bin`` or
        ``cifar-10-batches-py``: IDX files, gzipped or not; batches of CIFAR-10, unpacked or not.
    cache_dir : path, optional
        Folder of downloads; by default the one in CVXNN_CACHE_DIR, or that of the user's cache.
    download : bool
        Download a known data set that is not found; only without `data_dir`.
    size, channels
        For folders only: height and width to resize to, and 1 (grey) or 3 (colour).

    Returns
    -------
    ImageData

    Raises
    ------
    InvalidInputError
        Neither a known name nor a folder, or a wrong argument.
    StorageError
        Files that are missing, cut or damaged, or cannot be downloaded.
    DependencyError
        A folder of images without Pillow.

    Examples
    --------
    >>> from cvxnn.images import load_images
    >>> train = load_images("fashion_mnist", data_dir="data")  # doctest: +SKIP
    >>> train.images.shape, train.labels.shape  # doctest: +SKIP
    ((60000, 1, 28, 28), (60000,))
    """
    check_choice(split, "split", SPLITS)
    if isinstance(name_or_folder, str) and name_or_folder in IMAGE_SOURCES:
        if size is not None or channels is not None:
            raise InvalidInputError(f"size and channels are for folders of images; {name_or_folder!r} takes neither")
        return _load_known(IMAGE_SOURCES[name_or_folder], split, data_dir, cache_dir, download)
    is_path = isinstance(name_or_folder, (str, os.PathLike)) and name_or_folder != ""
    if not is_path or not Path(name_or_folder).expanduser().is_dir():
        known = ", ".join(map(repr, IMAGE_SOURCES))
        raise InvalidInputError(
            f"name_or_folder is {str(name_or_folder)!r}; one of {known} or a folder of images is wanted"
        )
    return read_image_folder(name_or_folder, split, size=size, channels=channels)


def _load_known(source: ImageSource, split: str, data_dir: Any, cache_dir: Any, download: bool) -> ImageData:
    found = _find(source, split, data_dir, cache_dir, download)
    data, remarks = read_split(source, found, split)
    for remark in remarks:
        warnings.warn(remark, UserWarning, stacklevel=3)
    return data


def _find(source: ImageSource, split: str, data_dir: Any, cache_dir: Any, download: bool) -> Found:
    folder = data_folder(data_dir)
    found = None if folder is None else locate(source, folder, (split,))
    if found is None and folder is not None and data_dir is not None:
        raise StorageError(what_is_missing(source, folder, (split,)))
    if found is None:
        cache = cache_folder(cache_dir)
        found = locate(source, cache, (split,))
        if found is None and download:
            fetch_images(source.name, cache_dir=cache)
            found = locate(source, cache, (split,))
    if found is None:
        places = "" if folder is None else f"{what_is_missing(source, folder, (split,))}, and "
        raise StorageError(
            f"{places}{source.title} is not in the cache; 'cvxnn datasets fetch {source.name}' downloads it, "
            "and data_dir or CVXNN_DATA_DIR names a folder that has it"
        )
    return found
