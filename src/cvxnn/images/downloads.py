"""Downloads of known data sets: official files, checked by their hash, into the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.images.data import SPLITS
from cvxnn.images.known import check_files
from cvxnn.images.places import cache_folder, data_folder, locate, what_is_missing
from cvxnn.images.sources import IMAGE_SOURCES, ImageSource

__all__ = ["FetchedImages", "fetch_images", "image_source"]

_TIMEOUT = 30
_CHUNK = 1 << 16


@dataclass(frozen=True)
class FetchedImages:
    """Where the files of a data set are.

    Attributes
    ----------
    name : str
    files : tuple of Path
    downloaded : tuple of str
        Names of the files that were not there before.
    note : str
        What has to be said of the files; empty for the official ones.
    warnings : tuple of str
        A sentence for each file that should be an official one and is not.
    """

    name: str
    files: tuple[Path, ...]
    downloaded: tuple[str, ...] = ()
    note: str = ""
    warnings: tuple[str, ...] = ()


def image_source(name: Any) -> ImageSource:
    """The known data set of this name.

    Raises
    ------
    InvalidInputError
        An unknown name.
    """
    if not isinstance(name, str) or name not in IMAGE_SOURCES:
        raise InvalidInputError(f"name is {name!r}; one of {', '.join(map(repr, IMAGE_SOURCES))} is wanted")
    return IMAGE_SOURCES[name]


def fetch_images(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progress: bool = False,
) -> FetchedImages:
    """Have the files of a known data set on this machine: found in a folder of data, in the cache, or downloaded.

    A file is downloaded under another name, checked by its SHA256, and then moved to its place in one step. After an
    error or an interruption nothing is left of it.

    Parameters
    ----------
    name : str
        "fashion_mnist" or "cifar10".
    data_dir : path, optional
        Folder that has the files, directly or in a sub-folder of their usual name; nothing is downloaded then. By
        default the folder in the environment variable CVXNN_DATA_DIR, if the files are there.
    cache_dir : path, optional
        Folder to keep downloads in. By default the one in CVXNN_CACHE_DIR, or that of the user's cache.
    base_url : str, optional
        Address of a mirror (http or https), instead of the official one; the hashes wanted are the same.
    progress : bool
        Show a progress bar on standard error.

    Raises
    ------
    InvalidInputError
        An unknown name, a `data_dir` that is no folder, an address that is not of the web.
    StorageError
        The files are not in `data_dir`, cannot be downloaded or written, or are not the official ones.
    """
    source = image_source(name)
    folder = data_folder(data_dir)
    found = None if folder is None else locate(source, folder)
    if found is None and folder is not None and data_dir is not None:
        raise StorageError(f"{what_is_missing(source, folder)}; without data_dir the files are downloaded")
    if found is not None:
        note, warnings = check_files(source, found, SPLITS)
        return FetchedImages(name, found.paths(), (), note, tuple(warnings))
    place = cache_folder(cache_dir).absolute() / source.download.folder
    downloaded = _download(
        source, place, _checked_url(source.download.base_url if base_url is None else base_url), progress
    )
    return FetchedImages(name, tuple(place / file for file in source.download.sha256), tuple(downloaded))


def _checked_url(base_url: Any) -> str:
    parts = urlsplit(base_url) if isinstance(base_url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidInputError(f"base_url is {base_url!r}; an address that begins with http:// or https:// is wanted")
    return base_url.rstrip("/") + "/"


def _download(source: ImageSource, place: Path, base_url: str, progress: bool) -> list[str]:
    """Files downloaded, the ones already in `place` with the right hash left out."""
    import pooch

    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    keeper = pooch.create(place, base_url, registry=source.download.sha256)
    downloaded: list[str] = []
    try:
        with _progress(progress) as bars, _quiet(pooch.get_logger()):
            for name in source.download.sha256:
                downloader = _Downloader(name, bars)
                with _sentences(base_url + name, place):
                    keeper.fetch(name, downloader=downloader)
                if downloader.used:
                    downloaded.append(name)
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()
    return downloaded


@contextmanager
def _sentences(url: str, place: Path) -> Iterator[None]:
    """Errors of a download as one sentence."""
    from requests import exceptions

    try:
        yield
    except exceptions.Timeout as error:
        raise StorageError(f"cannot download {url}: no answer within {_TIMEOUT} s") from error
    except exceptions.HTTPError as error:
        raise StorageError(f"cannot download {url}: the server answers with {_status(error)}") from error
    except exceptions.ChunkedEncodingError as error:
        raise StorageError(f"cannot download {url}: the connection ended early; nothing is kept") from error
    except exceptions.SSLError as error:
        raise StorageError(f"cannot download {url}: the certificate of the server is not accepted") from error
    except exceptions.ConnectionError as error:
        raise StorageError(
            f"cannot download {url}: no connection to {urlsplit(url).netloc}; "
            "a folder that has the files can be named with data_dir or CVXNN_DATA_DIR"
        ) from error
    except exceptions.RequestException as error:
        raise StorageError(f"cannot download {url}: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot write to {place}: {error.strerror or error}") from error
    except ValueError as error:  # how pooch says that the hash is another one
        raise StorageError(f"{url} is not the official file: its SHA256 is another one; nothing is kept") from error


def _status(error: Any) -> str:
    return "an error" if error.response is None else f"status {error.response.status_code}"


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Downloader:
    """What pooch calls for a file that is to be downloaded."""

    def __init__(self, name: str, bars: Progress | None) -> None:
        self._name, self._bars, self.used = name, bars, False

    def __call__(self, url: str, output_file: Any, keeper: Any, check_only: bool = False) -> Any:
        import pooch

        self.used = True
        bar: Any = False if self._bars is None else _Bar(self._bars, self._name)
        get = pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, timeout=_TIMEOUT)
        return get(url, output_file, keeper, check_only=check_only)


def _progress(wanted: bool) -> Any:
    if not wanted:
        return nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


class _Bar:
    """A bar of rich with the methods that pooch calls."""

    def __init__(self, bars: Progress, name: str) -> None:
        self._bars = bars
        self._task = bars.add_task(name, total=None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "total":
            self._bars.update(self._task, total=value or None)
        else:
            super().__setattr__(name, value)

    def update(self, amount: int) -> None:
        self._bars.update(self._task, advance=amount)

    def reset(self) -> None:
        self._bars.update(self._task, completed=0)

    def close(self) -> None:
        self._bars.refresh()
