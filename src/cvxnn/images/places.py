"""Where the files of a known data set are on this machine: the user's folder of data, and the cache."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.images.data import SPLITS
from cvxnn.images.sources import ImageSource, Layout

__all__ = ["CACHE_VARIABLE", "DATA_VARIABLE", "Found", "cache_folder", "data_folder", "locate", "what_is_missing"]

DATA_VARIABLE = "CVXNN_DATA_DIR"
CACHE_VARIABLE = "CVXNN_CACHE_DIR"


@dataclass(frozen=True)
class Found:
    """Files of a data set in one of its forms, in a folder or in its archive."""

    layout: Layout
    place: Path

    @property
    def in_archive(self) -> bool:
        return self.place.name == self.layout.archive

    def paths(self, splits: Iterable[str] = SPLITS) -> tuple[Path, ...]:
        """The files of the splits, or the archive."""
        if self.in_archive:
            return (self.place,)
        return tuple(self.place / name for split in splits for name in self.layout.files[split])

    def contents(self, split: str) -> dict[str, bytes]:
        """By name, the bytes of the files of a split.

        Raises
        ------
        StorageError
            A file that cannot be read, a damaged archive, or one that lacks a file.
        """
        names = self.layout.files[split]
        try:
            return self._unpacked(names) if self.in_archive else {n: (self.place / n).read_bytes() for n in names}
        except StorageError:
            raise
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise StorageError(f"{self.place} is cut or damaged: {error}") from error
        except OSError as error:
            raise StorageError(f"cannot read {error.filename or self.place}: {error.strerror or error}") from error

    def _unpacked(self, names: tuple[str, ...]) -> dict[str, bytes]:
        wanted = {f"{self.layout.folder}/{name}": name for name in names}
        found: dict[str, bytes] = {}
        with tarfile.open(self.place, "r|gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() and member.name in wanted else None
                if stream is not None:
                    found[wanted[member.name]] = stream.read()
                if len(found) == len(wanted):
                    break
        for name in names:
            if name not in found:
                raise StorageError(f"{self.place} lacks {self.layout.folder}/{name}")
        return {name: found[name] for name in names}


def data_folder(data_dir: Any = None) -> Path | None:
    """The folder of data given, or the one in the environment variable CVXNN_DATA_DIR, or None.

    Raises
    ------
    InvalidInputError
        It is no folder.
    """
    name = "data_dir" if data_dir is not None else DATA_VARIABLE
    value = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    if value is None:
        return None
    folder = _as_folder(value, name)
    if not folder.is_dir():
        raise InvalidInputError(f"{name} is {str(value)!r}, which is no folder; a folder with data sets is wanted")
    return folder


def cache_folder(cache_dir: Any = None) -> Path:
    """The folder that downloads are kept in: as given, by CVXNN_CACHE_DIR, or the user's cache; it may not exist."""
    if cache_dir is not None:
        return _as_folder(cache_dir, "cache_dir")
    if os.environ.get(CACHE_VARIABLE):
        return _as_folder(os.environ[CACHE_VARIABLE], CACHE_VARIABLE)
    import pooch

    return Path(pooch.os_cache("cvxnn"))


def _as_folder(value: Any, name: str) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise InvalidInputError(f"{name} is {value!r}; the name of a folder is wanted")
    return Path(value).expanduser()


def locate(source: ImageSource, root: Path, splits: Iterable[str] = SPLITS) -> Found | None:
    """The files of the splits, in `root` or in the folder of their name in it, or their archive; None if not there."""
    splits = tuple(splits)
    for layout in source.layouts:
        for place in (root / layout.folder, root):
            found = Found(layout, place)
            if all(path.is_file() for path in found.paths(splits)):
                return found
    for layout in source.layouts:
        for place in (root / layout.archive, root / layout.folder / layout.archive):
            if layout.archive and place.is_file():
                return Found(layout, place)
    return None


def what_is_missing(source: ImageSource, root: Path, splits: Iterable[str] = SPLITS) -> str:
    """Why :func:`locate` found nothing, in half a sentence."""
    splits = tuple(splits)
    for layout in source.layouts:
        for place in (root / layout.folder, root):
            paths = Found(layout, place).paths(splits)
            lacking = [path.name for path in paths if not path.is_file()]
            if len(lacking) < len(paths):
                return f"{place} lacks {', '.join(lacking)} of {source.title}"
    forms = [f"{layout.files['train'][0]}" for layout in source.layouts]
    forms += [layout.archive for layout in source.layouts if layout.archive]
    folders = dict.fromkeys(layout.folder for layout in source.layouts)
    return f"{root} has no {source.title} in it or in its sub-folder {' or '.join(folders)} ({', '.join(forms)}, ...)"
