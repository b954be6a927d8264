"""What a command says: tables for people, one JSON object for programs, files that are written together."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cvxnn.errors import StorageError
from cvxnn.files import write_atomically

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "NOT_CERTIFIED",
    "WRONG_USE",
    "Report",
    "output_folder",
    "print_error",
    "write_json",
]

FAILED, WRONG_USE, NOT_CERTIFIED, INTERRUPTED = 1, 2, 3, 130


class Report:
    """Where a command's words go: standard output, or standard error where that is for a program.

    Parameters
    ----------
    as_json : bool
        One JSON object is to be the only thing on standard output.
    to_stderr : bool
        Words go to standard error all the same.
    quiet : bool
        No words, only warnings and errors.
    """

    def __init__(self, as_json: bool, *, to_stderr: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self._console = Console(stderr=as_json or to_stderr, quiet=quiet, highlight=False, markup=False)

    def say(self, text: str = "") -> None:
        """Print a paragraph."""
        self._console.print(text, soft_wrap=True)

    def rows(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values in two aligned columns."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)

    def table(self, header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> None:
        """Print a table with a header; the columns with the given indices are aligned to the right."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        right = set(right)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def warn(self, sentence: str) -> None:
        """Print a sentence on standard error, whatever else is asked for."""
        print(f"Warning: {sentence}", file=sys.stderr)

    def finish(self, document: dict[str, Any]) -> None:
        """Print the JSON object, if it is asked for."""
        if self.as_json:
            print(_dump(document))


def print_error(message: str, status: int, as_json: bool) -> int:
    """Print an error on standard error, with JSON on standard output too, and return the exit status."""
    sentence = " ".join(message.split())
    print(f"Error: {sentence}", file=sys.stderr)
    if as_json:
        # What went wrong may be standard output itself.
        with suppress(OSError):
            print(_dump({"error": sentence}))
    return status


def _dump(document: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(document), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """Only what JSON has; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_json(path: Path, document: dict[str, Any]) -> Path:
    """Write a document as JSON, in one step."""

    def write(temporary: Path) -> None:
        temporary.write_text(_dump(document, indent=2) + "\n", encoding="utf-8")

    return write_atomically(path, write)


def check_folder(path: Path) -> None:
    """Refuse an output folder that cannot be made, before any work is done.

    Raises
    ------
    StorageError
        A file is in the way, or there is no permission.
    """
    try:
        for ancestor in (path, *path.absolute().parents):
            if ancestor.is_dir():
                if not os.access(ancestor, os.W_OK | os.X_OK):
                    raise StorageError(f"cannot write to {path}: no permission for {ancestor}")
                return
            if ancestor.exists() or ancestor.is_symlink():
                raise StorageError(f"cannot write to {path}: {ancestor} is not a folder")
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write to {path}: {error.strerror or error}") from error


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `path` at the end; after an error nothing is left of them.

    Raises
    ------
    StorageError
        The folder cannot be made, or is not writable.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path, prefix=".cvxnn-"))
    except OSError as error:
        _remove_empty(made)
        raise StorageError(f"cannot write to {path}: {error.strerror or error}") from error
    done = False
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            file.replace(path / file.name)
        done = True
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write to {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            _remove_empty(made)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
