"""``cvxnn reproduce``."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cvxnn._version import __version__
from cvxnn.cli.options import Json, folder
from cvxnn.cli.report import INTERRUPTED, NOT_CERTIFIED, Report, check_folder, output_folder, print_error, write_json
from cvxnn.cli.reproduce_layerwise import check_data, chosen_grid, layerwise_runner, say_estimates, say_layerwise
from cvxnn.errors import InvalidInputError
from cvxnn.experiments.attention import ATTENTION_SCALES, run_attention
from cvxnn.experiments.attention_report import OPTIMUM_WIDTH, attention_summary, write_attention_report
from cvxnn.experiments.complexity import COMPLEXITY_SCALES, run_complexity
from cvxnn.experiments.complexity_report import complexity_summary, write_complexity_report
from cvxnn.experiments.layerwise import run_layerwise
from cvxnn.experiments.layerwise_report import layerwise_summary, uncertified, write_layerwise_report
from cvxnn.experiments.layerwise_settings import LAYERWISE_SCALES
from cvxnn.experiments.networks import NETWORKS_SCALES, run_networks
from cvxnn.experiments.networks_report import networks_summary, write_networks_report
from cvxnn.experiments.report import summary_of, write_report
from cvxnn.experiments.spiral import SCALES, run_spiral
from cvxnn.experiments.sweep import backend_context
from cvxnn.validation import check_choice

__all__ = ["STUDIES", "reproduce"]

STUDIES = ("spiral", "complexity", "networks", "layerwise", "attention")
_BACKEND_HELP = "Backend of joblib: loky, multiprocessing, threading, or dask or ray where they are installed."

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class _Study:
    """A study: its grids, how it is run, and what is written and said of the rows.

    `summary` gives what goes into the document, with "claims" (name, verdict, found); `missed` what, if anything, is
    not certified; `say` prints what belongs to this study alone.
    """

    scales: dict[str, Any]
    run: Callable[..., Rows]
    write: Callable[[Rows, Any, Path], list[str]]
    summary: Callable[[Rows], dict[str, Any]]
    missed: Callable[[dict[str, Any], Any], str]
    say: Callable[[Report, dict[str, Any]], None]
    cells: str


def reproduce(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="One of: spiral, complexity, networks, layerwise, attention.", show_default=False
        ),
    ],
    scale: Annotated[
        str, typer.Option(help="quick (minutes on two cores), paper, or for layerwise also convex.")
    ] = "quick",
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the image data sets of layerwise; the others generate theirs."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the results.", parser=folder, show_default="results/STUDY"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take the finished cells from DIR/cells.")] = False,
    jobs: Annotated[int, typer.Option(help="Cells computed at the same time; -1: one per core.")] = -1,
    backend: Annotated[str, typer.Option(help=_BACKEND_HELP)] = "loky",
    reduction: Annotated[
        str | None, typer.Option(help="Spiral: sum (default) or mean of the losses; beta is not rescaled.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Layerwise: one data set of the scale only.")] = None,
    stages: Annotated[int | None, typer.Option(help="Layerwise: the first stages only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Layerwise: another seed.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Layerwise: estimate memory and time, and train nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no report.")] = False,
) -> int:
    """Repeat a study of the paper: every run as CSV, its figures, and a page of its claims beside what was found."""
    check_choice(study, "STUDY", STUDIES)
    chosen = _studies()[study]
    check_choice(scale, "scale", tuple(chosen.scales))
    if data_dir is not None and not data_dir.is_dir():
        raise InvalidInputError(f"--data-dir is {str(data_dir)!r}, which is no folder; a folder is wanted")
    if reduction is not None and study != "spiral":
        raise InvalidInputError(f"--reduction is {reduction!r}, but STUDY is {study!r}; it is for 'spiral' only")
    if study != "layerwise" and (dry_run or any(value is not None for value in (dataset, stages, seed))):
        raise InvalidInputError(f"--dataset, --stages, --seed, --dry-run are for 'layerwise'; STUDY is {study!r}")
    grid = chosen.scales[scale]
    run = chosen.run
    if study == "layerwise":
        grid, note = chosen_grid(grid, dataset, stages, seed, None if data_dir is None else str(data_dir))
        if dry_run:
            return say_estimates(Report(as_json, quiet=quiet), grid, note)
        check_data(grid, None if data_dir is None else str(data_dir))
        run = layerwise_runner(None if data_dir is None else str(data_dir), note, quiet or as_json)
    target = Path("results") / study if out is None else out
    check_folder(target)
    with backend_context(backend, jobs):  # refused before anything is written
        pass
    grid = grid if reduction is None else dataclasses.replace(grid, reduction=reduction)
    report = Report(as_json, quiet=quiet)
    begin = time.perf_counter()
    bar = _Bar(len(grid.cells()), study, hidden=quiet or (as_json and not sys.stderr.isatty()))
    try:
        with bar:
            rows = run(grid, target / "cells", resume=resume, jobs=jobs, backend=backend, done=bar.advance)
    except KeyboardInterrupt:
        message = f"interrupted with {bar.n_done} of {bar.total} cells done; --resume goes on from there"
        return print_error(message, INTERRUPTED, as_json)
    document = {
        "command": "reproduce",
        "version": __version__,
        "study": study,
        "scale": scale,
        "settings": dataclasses.asdict(grid),
        "n_runs": len(rows),
        **chosen.summary(rows),
        "n_cells": bar.total,
        "n_resumed": bar.n_resumed,
        "seconds": time.perf_counter() - begin,
    }
    with output_folder(target) as temporary:
        names = [*chosen.write(rows, grid, temporary), "metrics.json"]
        document["files"] = names
        write_json(temporary / "metrics.json", document)
    _say(report, chosen, document, target)
    missed = chosen.missed(document, grid)
    if missed:
        report.warn(missed)
    report.finish(document)
    return NOT_CERTIFIED if missed else 0


def _say(report: Report, study: _Study, document: dict[str, Any], target: Path) -> None:
    resumed = f" ({document['n_resumed']} {study.cells} resumed)" if document["n_resumed"] else ""
    report.say(f"{document['n_cells']} {study.cells}, {document['n_runs']} runs{resumed}")
    for claim in document["claims"]:
        report.say(f"\n{claim['name']}: {claim['verdict'].upper()}")
        found = claim["found"]
        lines = [f"{scope} gates: {words}" for scope, words in found.items()] if isinstance(found, dict) else [found]
        for line in lines:
            report.say(f"  {line}")
    study.say(report, document)
    report.say(f"\nWritten to {target}: {', '.join(document['files'])}")


def _spiral_summary(rows: Rows) -> dict[str, Any]:
    summary = summary_of(rows)
    return {"certified": all(part["n_certified"] == part["n_runs"] for part in summary["bm_global"]), **summary}


def _spiral_missed(document: dict[str, Any], grid: Any) -> str:
    missed = sum(part["n_runs"] - part["n_certified"] for part in document["bm_global"])
    return f"{missed} of the runs of bm_global are not certified to {grid.tol:g}; runs.csv says which" if missed else ""


def _say_spiral(report: Report, document: dict[str, Any]) -> None:
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


def _say_complexity(report: Report, document: dict[str, Any]) -> None:
    fits = [fit for fit in document["exponents"] if fit["method"] in ("projected_gradient", "frank_wolfe_faces")]
    report.say()
    report.rows([(f"{fit['method']}, {fit['sweep']}", f"exponent {fit['exponent']:.2f}") for fit in fits])


def _networks_missed(document: dict[str, Any], grid: Any) -> str:
    missed = document["n_runs"] - document["n_improved"]
    if not missed:
        return ""
    return f"{missed} of {document['n_runs']} networks are not improved to {grid.tol:g}; networks.csv says which"


def _say_networks(report: Report, document: dict[str, Any]) -> None:
    report.say()
    report.rows(
        [
            (
                f"m = {part['width']}, beta {part['beta']:g}, {part['optimizer']}",
                f"excess {part['median_excess']:.1e} (largest {part['largest_excess']:.1e}), proven above 1e-6 in "
                f"{part['n_proven_above']['1e-06']} of {part['n_networks']}, within 1% in {part['n_within_1_percent']}",
            )
            for part in document["cells"]
        ]
    )


def _attention_missed(document: dict[str, Any], grid: Any) -> str:
    if document["certified"]:
        return ""
    width = document["optima"]["largest_width"]
    found = "not known" if width is None else f"known to {width:.1e} only"
    return f"the optimum of a problem is {found}, not to {OPTIMUM_WIDTH:g}; heads.csv says which"


def _say_attention(report: Report, document: dict[str, Any]) -> None:
    report.say()
    report.rows(
        [
            (
                f"d = {part['d']}, c = {part['c']}, {part['output']}, beta {part['fraction']:g} of beta_max",
                f"rank {part['optimum_rank']}, threshold {part['threshold']}; most heads of a local minimum above the "
                f"optimum: {part['most_heads_with_spurious'] or 'none'}",
            )
            for part in document["problems"]
        ]
    )


def _studies() -> dict[str, _Study]:
    return {
        "spiral": _Study(
            SCALES, run_spiral, write_report, _spiral_summary, _spiral_missed, _say_spiral, cells="problems"
        ),
        "complexity": _Study(
            COMPLEXITY_SCALES,
            run_complexity,
            write_complexity_report,
            complexity_summary,
            lambda document, grid: "",
            _say_complexity,
            cells="cells",
        ),
        "networks": _Study(
            NETWORKS_SCALES,
            run_networks,
            write_networks_report,
            networks_summary,
            _networks_missed,
            _say_networks,
            cells="cells",
        ),
        "layerwise": _Study(
            LAYERWISE_SCALES,
            run_layerwise,
            write_layerwise_report,
            layerwise_summary,
            lambda document, grid: uncertified(document["claims"]),
            say_layerwise,
            cells="trainings",
        ),
        "attention": _Study(
            ATTENTION_SCALES,
            run_attention,
            write_attention_report,
            attention_summary,
            _attention_missed,
            _say_attention,
            cells="cells",
        ),
    }


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
