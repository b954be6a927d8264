"""``cvxnn reproduce``."""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cvxnn._version import __version__
from cvxnn.cli.options import Json, folder
from cvxnn.cli.report import INTERRUPTED, NOT_CERTIFIED, Report, check_folder, output_folder, print_error, write_json
from cvxnn.errors import InvalidInputError
from cvxnn.experiments.report import summary_of, write_report
from cvxnn.experiments.spiral import SCALES, SpiralGrid, run_spiral
from cvxnn.experiments.sweep import backend_context
from cvxnn.validation import check_choice

__all__ = ["STUDIES", "reproduce"]

STUDIES = ("spiral",)
_BACKEND_HELP = "Backend of joblib: loky, multiprocessing, threading, or dask or ray where they are installed."


def reproduce(
    study: Annotated[str, typer.Argument(metavar="STUDY", help=f"One of: {', '.join(STUDIES)}.", show_default=False)],
    scale: Annotated[str, typer.Option(help="quick (at most two minutes on two cores) or paper.")] = "quick",
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of data sets, for studies that need one; the spiral is generated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the results.", parser=folder, show_default="results/STUDY"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take the finished cells from DIR/cells.")] = False,
    jobs: Annotated[int, typer.Option(help="Cells computed at the same time; -1: one per core.")] = -1,
    backend: Annotated[str, typer.Option(help=_BACKEND_HELP)] = "loky",
    reduction: Annotated[str, typer.Option(help="sum or mean of the losses; beta is not rescaled.")] = "sum",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no report.")] = False,
) -> int:
    """Repeat a study of the paper: every run as CSV, its figures, and a page of its claims beside what was found."""
    check_choice(study, "STUDY", STUDIES)
    check_choice(scale, "scale", tuple(SCALES))
    if data_dir is not None and not data_dir.is_dir():
        raise InvalidInputError(f"--data-dir is {str(data_dir)!r}, which is no folder; a folder is wanted")
    target = Path("results") / study if out is None else out
    check_folder(target)
    with backend_context(backend, jobs):  # refused before anything is written
        pass
    grid = dataclasses.replace(SCALES[scale], reduction=reduction)
    report = Report(as_json, quiet=quiet)
    begin = time.perf_counter()
    bar = _Bar(len(grid.cells()), study, hidden=quiet or (as_json and not sys.stderr.isatty()))
    try:
        with bar:
            rows = run_spiral(grid, target / "cells", resume=resume, jobs=jobs, backend=backend, done=bar.advance)
    except KeyboardInterrupt:
        message = f"interrupted with {bar.n_done} of {bar.total} cells done; --resume goes on from there"
        return print_error(message, INTERRUPTED, as_json)
    document = _document(study, scale, grid, rows)
    document |= {"n_cells": bar.total, "n_resumed": bar.n_resumed, "seconds": time.perf_counter() - begin}
    with output_folder(target) as temporary:
        names = [*write_report(rows, grid, temporary), "metrics.json"]
        document["files"] = names
        write_json(temporary / "metrics.json", document)
    _say(report, document, target)
    if not document["certified"]:
        missed = sum(part["n_runs"] - part["n_certified"] for part in document["bm_global"])
        report.warn(f"{missed} of the runs of bm_global are not certified to {grid.tol:g}; runs.csv says which")
    report.finish(document)
    return 0 if document["certified"] else NOT_CERTIFIED


def _document(study: str, scale: str, grid: SpiralGrid, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summary_of(rows)
    return {
        "command": "reproduce",
        "version": __version__,
        "study": study,
        "scale": scale,
        "settings": dataclasses.asdict(grid),
        "n_runs": len(rows),
        "certified": all(part["n_certified"] == part["n_runs"] for part in summary["bm_global"]),
        **summary,
    }


def _say(report: Report, document: dict[str, Any], target: Path) -> None:
    resumed = f" ({document['n_resumed']} problems resumed)" if document["n_resumed"] else ""
    report.say(f"{document['n_cells']} problems, {document['n_runs']} runs{resumed}")
    for claim in document["claims"]:
        report.say(f"\n{claim['name']}: {claim['verdict'].upper()}")
        for scope, words in claim["found"].items():
            report.say(f"  {scope} gates: {words}")
    certified, n_runs = (sum(part[name] for part in document["bm_global"]) for name in ("n_certified", "n_runs"))
    check, ratios = document["theorem"], document["speed"]
    report.say()
    report.rows(
        [
            (
                "Theorem 3.4",
                f"{check['n_stationary']} stationary points, bound below the true gap at {check['n_below_true_gap']}, "
                f"duality gap looser at {check['n_looser_duality_gap']}",
            ),
            ("bm_global", f"{certified} of {n_runs} runs certified to {document['settings']['tol']:g}"),
            (
                "bm_gd / bm_global",
                f"median ratio of times to the same gap {ratios['same_gap']['both']['median']:.3g}, "
                f"to the certificate {ratios['certified']['both']['median']:.3g}",
            ),
        ]
    )
    report.say(f"\nWritten to {target}: {', '.join(document['files'])}")


class _Bar(AbstractContextManager["_Bar"]):
    """Progress over cells on standard error."""

    def __init__(self, total: int, name: str, hidden: bool) -> None:
        self.total, self.n_done, self.n_resumed = total, 0, 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=hidden,
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def advance(self, cell: Any, resumed: bool) -> None:
        """Count a finished cell."""
        self.n_done += 1
        self.n_resumed += resumed
        self._progress.update(self._task, advance=1, description=f"{cell.label:32s}")
