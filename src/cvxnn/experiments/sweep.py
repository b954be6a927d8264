"""A grid of independent computations: in parallel through joblib, one file per finished cell, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import joblib
import torch
from threadpoolctl import threadpool_limits

from cvxnn._version import __version__
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.files import from_json, to_json, write_atomically

__all__ = ["Cell", "CellStore", "backend_context", "run_sweep", "single_thread"]

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)


class Cell(Protocol):
    """A frozen dataclass of plain values: everything that determines the outcome of a cell."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def label(self) -> str:
        """Short name, for its file and for messages."""


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch and BLAS, so that times of parallel cells can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


class CellStore:
    """A JSON file per finished cell, named after its label and a fingerprint of its settings.

    Parameters
    ----------
    folder : Path
        Made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror or error}") from error

    @staticmethod
    def fingerprint(cell: Cell) -> str:
        """Checksum of the settings, with the name of their type and the version of cvxnn."""
        return _digest([type(cell).__name__, __version__, asdict(cell)])

    def path(self, cell: Cell) -> Path:
        """File of a cell."""
        return self.folder / f"{cell.label}-{self.fingerprint(cell)[:10]}.json"

    def save(self, cell: Cell, outcome: dict[str, Any]) -> None:
        """Write an outcome of plain values, in one step."""
        content = to_json(outcome, {}, "outcome")
        document = {
            "fingerprint": self.fingerprint(cell),
            "settings": asdict(cell),
            "outcome": content,
            "sha256": _digest(content),
        }
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path(cell), lambda temporary: _write_text(temporary, text))

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """The outcome, or None where there is no undamaged file of exactly these settings."""
        try:
            document = json.loads(self.path(cell).read_text(encoding="utf-8"))
            if document["fingerprint"] != self.fingerprint(cell) or document["sha256"] != _digest(document["outcome"]):
                return None
            return from_json(document["outcome"], {})
        except _UNREADABLE:
            return None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextmanager
def backend_context(backend: str | None, jobs: int) -> Iterator[None]:
    """Context in which joblib uses a backend; with None the one that the caller has configured.

    Raises
    ------
    InvalidInputError
        `jobs` is 0, or the backend is unknown, not installed, or without its cluster.
    """
    if jobs == 0:
        raise InvalidInputError("jobs is 0; a number of processes, or -1 for one per core, is wanted")
    try:
        if backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        chosen = {} if backend is None else {"backend": backend}
        context = joblib.parallel_config(n_jobs=jobs, **chosen)
    except (ImportError, ValueError, TypeError) as error:
        raise InvalidInputError(f"backend is {backend!r}, which joblib cannot use: {error}") from error
    with context:
        yield


def run_sweep(
    function: Callable[[Any], dict[str, Any]],
    cells: Sequence[Any],
    folder: Path,
    *,
    resume: bool = False,
    jobs: int = -1,
    backend: str | None = None,
    done: Callable[[Any, bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Compute the outcome of every cell, in parallel.

    Parameters
    ----------
    function : callable
        Outcome (a dict of plain values) of a cell; importable, for processes.
    cells : sequence of frozen dataclasses
        See :class:`Cell`; started in this order.
    folder : Path
        For the files of the cells; written as each is done, in this process.
    resume : bool
        Take the outcomes that are there for the same settings; otherwise all are computed and replaced.
    jobs : int
        Cells computed at the same time; -1 for one per core.
    backend : str, optional
        Backend of joblib; None for the one configured ("loky" if none is).
    done : callable, optional
        Called with each cell, and whether its outcome was there already.

    Returns
    -------
    list of dict
        In the order of the cells. After an error or Ctrl-C the finished cells stay in their files.

    Raises
    ------
    InvalidInputError
        `jobs` is 0, or the backend cannot be used.
    StorageError
        The folder cannot be written.
    """
    store = CellStore(folder)
    outcomes: dict[int, dict[str, Any]] = {}

    def take(index: int, outcome: dict[str, Any], resumed: bool) -> None:
        outcomes[index] = outcome
        if done is not None:
            done(cells[index], resumed)

    for index, cell in enumerate(cells):
        found = store.load(cell) if resume else None
        if found is not None:
            take(index, found, True)
    missing = [index for index in range(len(cells)) if index not in outcomes]
    with backend_context(backend, jobs):
        for index, outcome in _as_completed([(function, index, cells[index]) for index in missing]):
            store.save(cells[index], outcome)
            take(index, outcome, False)
    return [outcomes[index] for index in range(len(cells))]


def _as_completed(tasks: list[tuple[Any, int, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Outcomes as they are ready; a few at a time from backends that give them together only."""
    calls = [joblib.delayed(_numbered)(*task) for task in tasks]
    backend, _ = joblib.parallel.get_active_backend()
    if backend.supports_return_generator:
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
        return
    parallel = joblib.Parallel(batch_size=1)
    size = 2 * joblib.effective_n_jobs(parallel.n_jobs)
    for begin in range(0, len(calls), size):
        yield from parallel(calls[begin : begin + size])


def _numbered(function: Callable[[Any], dict[str, Any]], index: int, cell: Any) -> tuple[int, dict[str, Any]]:
    with single_thread():
        return index, function(cell)
