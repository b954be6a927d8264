"""Who is told how far a long pass over the samples has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Watcher", "batches_of", "watch_passes"]

#: Called with what is computed, and the fraction that is done.
Watcher = Callable[[str, float], None]

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watch_passes(watcher: Watcher) -> Iterator[None]:
    """Have a function told of all passes within."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def batches_of(batches: Sequence[slice], what: str) -> Iterator[slice]:
    """The batches of a pass; the watcher is told after each."""
    watcher = _watcher.get()
    for i, rows in enumerate(batches, start=1):
        yield rows
        if watcher is not None and len(batches) > 1:
            watcher(what, i / len(batches))
