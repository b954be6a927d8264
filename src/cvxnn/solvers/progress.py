"""A progress bar on standard error: how far the gap has come, on a logarithmic scale."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from cvxnn.operators.passes import watch_passes

__all__ = ["Progress"]


class Progress:
    """Shows nothing (verbose 0), a bar (1), or a line per certificate (2)."""

    def __init__(self, name: str, tol: float, verbose: int) -> None:
        self.name = name
        self.tol = max(tol, 1e-12)
        self.verbose = int(verbose)
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._watching = ExitStack()

    def __enter__(self) -> Progress:
        if self.verbose == 1:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("iteration {task.fields[iteration]}  relative gap {task.fields[gap]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=1.0, iteration=0, gap="-")
            self._watching.enter_context(watch_passes(self._show_pass))
        return self

    def __exit__(self, *exc: object) -> None:
        self._watching.close()
        if self._bar is not None:
            self._bar.stop()

    def _show_pass(self, what: str, done: float) -> None:
        assert self._bar is not None
        note = f"{self.name}, {what} {done:.0%}" if done < 1 else self.name
        self._bar.update(self._task, description=note)

    def estimate(self, iteration: int, gap: float) -> None:
        """Show a gap that is not certified yet."""
        if self._bar is not None:
            self._bar.update(self._task, iteration=iteration, gap=f"about {gap:.0e}" if gap < math.inf else "-")

    def update(self, entry: dict[str, Any]) -> None:
        """Show the newest entry of the trace."""
        gap = entry["relative_gap"]
        if self._bar is not None:
            done = math.log(max(min(gap, 1.0), self.tol)) / math.log(self.tol) if self.tol < 1 else 1.0
            self._bar.update(
                self._task,
                completed=min(1.0, max(0.0, done)),
                iteration=entry["iteration"],
                gap=f"{gap:.1e}",
            )
        elif self.verbose >= 2:
            self._console.print(
                f"{self.name:14s} {entry['iteration']:7d} {entry['seconds']:9.2f} s  "
                f"primal {entry['primal']:.10g}  lower {entry['lower_bound']:.10g}  gap {gap:.2e}",
                highlight=False,
                soft_wrap=True,
            )
