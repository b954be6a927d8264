"""Check many random problems: ``python -m tests.soundness --problems 300 --seed 0 --jobs 2 [--json]``.

With ``--activation relu`` these are ReLU problems of low rank, with one output, or ``--outputs vector``: two or three.
With ``--architecture attention`` they are blocks of self-attention: linear, gated ReLU and small ones of ReLU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.soundness.attention import check_attention_problem
from tests.soundness.check import TOLERANCE, Report, check_problem, set_threads
from tests.soundness.relu_check import check_relu_problem
from tests.soundness.tamper import RELU_TAMPERINGS, TAMPERINGS

#: Relative width from which an interval is counted as wide.
WIDE = 1e-6
_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 where a certificate is contradicted."""
    parser = argparse.ArgumentParser(prog="python -m tests.soundness", description=__doc__)
    parser.add_argument("--problems", type=int, default=300, help="how many (300)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sequence of problems (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    parser.add_argument("--architecture", choices=("mlp", "attention"), default="mlp", help="of the problems (mlp)")
    parser.add_argument("--activation", choices=("gated", "relu"), default="gated", help="of the problems (gated)")
    parser.add_argument("--outputs", choices=("scalar", "vector"), default="scalar", help="of ReLU problems (scalar)")
    parser.add_argument("--tamper", choices=TAMPERINGS + RELU_TAMPERINGS, help="make this mistake on purpose")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    if given.tamper in RELU_TAMPERINGS and given.activation != "relu":
        parser.error(f"--tamper {given.tamper} is for --activation relu")
    begin = time.perf_counter()
    if given.architecture != "mlp" and given.activation == "relu":
        parser.error("--activation relu is for --architecture mlp; problems of attention have all activations")
    check = check_problem if given.activation == "gated" else partial(check_relu_problem, outputs=given.outputs)
    if given.architecture == "attention":
        check = check_attention_problem
    indices = range(given.first, given.first + given.problems)
    with Progress(
        TextColumn("soundness"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=len(indices))
        reports = []
        for report in run(given.seed, indices, given.jobs, given.tamper, check):
            reports.append(report)
            violations = sum(len(report.violations) for report in reports)
            progress.update(task, advance=1, description=f"{violations} violations")
    reports.sort(key=lambda report: report.index)
    summary = summarise(reports) | {"seed": given.seed, "seconds": round(time.perf_counter() - begin, 1)}
    if given.json:
        details = [dataclasses.asdict(report) for report in reports]
        print(json.dumps(summary | {"problems_detail": details}, default=float))
    else:
        show(reports, summary)
    return 1 if summary["violations"] else 0


def run(
    seed: int, indices: range, jobs: int, tamper: str | None, check: Callable[..., Report] = check_problem
) -> Iterator[Report]:
    """Reports as they are done, in `jobs` processes."""
    if jobs <= 1:
        set_threads()
        for index in indices:
            yield check(seed, index, tamper)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=set_threads) as pool:
        futures = [pool.submit(check, seed, index, tamper) for index in indices]
        for future in as_completed(futures):
            yield future.result()


def summarise(reports: list[Report]) -> dict[str, Any]:
    """The numbers over all problems."""
    return {
        "problems": len(reports),
        "certificates": sum(report.n_certificates for report in reports),
        "violations": sum(len(report.violations) for report in reports),
        "wide_intervals": sum(report.relative_width > WIDE for report in reports),
        "widest_interval": max((report.relative_width for report in reports), default=0.0),
        "worst_lower_margin": max((report.lower_margin for report in reports), default=0.0),
        "worst_primal_margin": max((report.primal_margin for report in reports), default=0.0),
    }


def show(reports: list[Report], summary: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(title=f"Certificates against independent intervals, seed {summary['seed']}", box=box.SIMPLE)
    for name in ("loss", "reduction", "output bias"):
        table.add_column(name)
    for name in ("problems", "wide", "certificates", "violations", "lower margin", "primal margin"):
        table.add_column(name, justify="right")
    groups = sorted({(report.loss, report.reduction, report.output_bias) for report in reports})
    for loss, reduction, bias in groups:
        chosen = [r for r in reports if (r.loss, r.reduction, r.output_bias) == (loss, reduction, bias)]
        table.add_row(loss, reduction, "yes" if bias else "no", *_cells(summarise(chosen)))
    table.add_section()
    table.add_row("all", "", "", *_cells(summary))
    console.print(table)
    console.print(f"wide: the interval is wider than {WIDE:g}, relative to the optimal value")
    console.print(
        f"margins: relative distance of the worst certificate beyond the interval (wrong above {TOLERANCE:g})"
    )
    wide = [report for report in reports if report.relative_width > WIDE]
    for report in wide:
        console.print(f"problem {report.index} ({report.loss}): relative width {report.relative_width:.1e}")
    violations = [violation for report in reports for violation in report.violations]
    for violation in violations[:_SHOWN]:
        console.print(
            f"problem {violation.index}, {violation.point}: not {violation.statement!r}, off by {violation.excess:.2e}",
            style="red",
        )
    if len(violations) > _SHOWN:
        console.print(f"... and {len(violations) - _SHOWN} more", style="red")
    console.print(f"{summary['seconds']} seconds")


def _cells(summary: dict[str, Any]) -> list[str]:
    counts = [str(summary[name]) for name in ("problems", "wide_intervals", "certificates", "violations")]
    return [*counts, f"{summary['worst_lower_margin']:.1e}", f"{summary['worst_primal_margin']:.1e}"]


if __name__ == "__main__":
    sys.exit(main())
