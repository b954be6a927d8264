"""The page, tables and pictures of the study of iterations."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.lines import Line2D

from cvxnn._version import __version__
from cvxnn.experiments.complexity import COMPLEXITY_COLUMNS, METHODS, ComplexityGrid
from cvxnn.experiments.complexity_fits import (
    Exponent,
    as_dicts,
    fit_exponents,
    growth_factors,
    judge_complexity,
    medians,
)
from cvxnn.experiments.pages import markdown_table, write_page
from cvxnn.files import write_atomically
from cvxnn.plotting import COLOURS, MARKERS, panels, write_figure

__all__ = ["complexity_summary", "write_complexity_report"]

_NAMES = {
    "projected_gradient": "projected gradient on (19)",
    "frank_wolfe_faces": "Frank-Wolfe, exact atom by faces",
    "frank_wolfe_branching": "Frank-Wolfe, atom by branching",
    "frank_wolfe_alternating": "Frank-Wolfe, atom by alternating projections",
}
_AXES = {"n": "samples n", "d": "features d (= rank)", "n_gates": "gates P", "m": "columns per gate m"}
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")


def complexity_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is computed from the rows, for JSON."""
    frame = pd.DataFrame(rows)
    return {"claims": as_dicts(judge_complexity(frame)), "exponents": [_finite(fit) for fit in fit_exponents(frame)]}


def _finite(fit: Exponent) -> dict[str, Any]:
    fields = as_dicts([fit])[0]
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()
    }


def write_complexity_report(rows: list[dict[str, Any]], grid: ComplexityGrid, folder: Path) -> list[str]:
    """Write timings.csv, exponents.csv, complexity.png and report.md into a folder that exists; their names."""
    frame = pd.DataFrame(rows)[list(COMPLEXITY_COLUMNS)]
    fits = fit_exponents(frame)
    write_atomically(folder / "timings.csv", lambda temporary: frame.to_csv(temporary, index=False))
    table = pd.DataFrame(as_dicts(fits))
    write_atomically(folder / "exponents.csv", lambda temporary: table.to_csv(temporary, index=False))
    _draw(frame, folder / "complexity.png")
    text = _page(frame, fits, grid)
    write_page(folder / "report.md", text)
    return ["report.md", "timings.csv", "exponents.csv", "complexity.png"]


def _draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel per parameter, a line per method (and rank)."""
    table = medians(frame)
    present = [name for name in _AXES if name in set(table["parameter"])]
    figure, grid = panels(1, len(present), 3.6, 3.8, sharey=True)
    handles: dict[str, Any] = {}
    for axes, parameter in zip(grid[0], present, strict=True):
        part = table[table["parameter"] == parameter]
        ranks = sorted(part["d"].unique()) if parameter == "n" else []
        for (method, _), line in part.groupby(["method", "sweep"], sort=False):
            k = list(METHODS).index(method)
            rank = int(line["d"].iloc[0])
            style = _STYLES[ranks.index(rank) % len(_STYLES)] if ranks else "-"
            look = {"color": COLOURS[k], "marker": MARKERS[k], "markersize": 4, "linewidth": 1.5, "linestyle": style}
            line = line.sort_values("value")
            axes.fill_between(line["value"], line["min"], line["max"], color=COLOURS[k], alpha=0.15, linewidth=0)
            (drawn,) = axes.plot(line["value"], line["median"], **look)
            handles.setdefault(_NAMES[method], drawn)
        axes.set(xscale="log", yscale="log", xlabel=_AXES[parameter])
        if len(ranks) > 1:
            styles = [Line2D([], [], color="#555555", linestyle=_STYLES[i % len(_STYLES)]) for i in range(len(ranks))]
            axes.legend(styles, [f"rank {rank}" for rank in ranks], frameon=False, fontsize="small")
        if part["value"].max() < 100:
            axes.set_xticks(sorted(part["value"].unique()), labels=sorted(part["value"].unique()))
            axes.minorticks_off()
        axes.grid(visible=True, which="major", alpha=0.25)
    grid[0, 0].set_ylabel("processor seconds of an iteration")
    lines = [Line2D([], [], color=h.get_color(), marker=h.get_marker(), markersize=4) for h in handles.values()]
    figure.legend(lines, list(handles), frameon=False, loc="outside lower center", ncols=len(lines), fontsize="small")
    write_figure(figure, path)


def _page(frame: pd.DataFrame, fits: list[Exponent], grid: ComplexityGrid) -> str:
    claims = [(part.statement, f"**{part.verdict}**", part.found, part.rule) for part in judge_complexity(frame)]
    exponents = [
        (
            _NAMES[fit.method],
            fit.sweep,
            "" if fit.d is None else str(fit.d),
            f"{fit.smallest} to {fit.largest}",
            f"{fit.exponent:.2f}",
            f"{fit.low:.2f} to {fit.high:.2f}" if math.isfinite(fit.low) else "",
            f"{fit.tail:.2f}",
        )
        for fit in fits
    ]
    header = ("method", "sweep", "rank", "values", "exponent", "95% interval", "of the 3 largest values")
    parts = [
        "# The time of an iteration: projected gradient and Frank-Wolfe",
        _settings(frame, grid),
        "## The claim (A.1)",
        markdown_table(("Statement", "Verdict", "Found", "Rule"), claims),
        "![complexity](complexity.png)",
        "Lines are medians over the seeds, bands from the smallest to the largest.",
        "## Exponents",
        "Slopes of log time against log of the parameter, all seeds in one least-squares fit.",
        markdown_table(header, exponents),
        "## Growth with the rank",
        _growth(frame),
        "## What is timed",
        _methods(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(frame: pd.DataFrame, grid: ComplexityGrid) -> str:
    return "\n".join(
        [
            f"- Data: Gaussian X of full rank r = d, targets of a ReLU network with noise, c = {grid.n_outputs} "
            "outputs, squared loss (sum), beta 0.05 of the largest ||X^T D_k Y||; P different patterns, drawn.",
            f"- Where nothing else is said n = {grid.n}, d = {grid.d}, P = {grid.n_gates}, m = {grid.m}.",
            f"- {len(grid.seeds)} seeds; per cell the median over up to {int(frame['n_timed'].max())} iterations, in "
            "processor seconds of one thread, without set-up and certificates.",
            f"- Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores "
            f"({platform.machine()}), cvxnn {__version__}.",
            "- Every cell: [timings.csv](timings.csv); the fits: [exponents.csv](exponents.csv).",
        ]
    )


def _growth(frame: pd.DataFrame) -> str:
    """Factors of time per feature."""
    rows = []
    for method, name in _NAMES.items():
        words = ", ".join(f"{factor:.2f} ({a} to {b})" for a, b, factor in growth_factors(frame, method))
        if words:
            rows.append((name, words))
    return markdown_table(("method", "factor of the time for one more feature"), rows) if rows else ""


def _methods() -> str:
    return "\n".join(
        [
            "- `projected_gradient`: `bm_projected_gd` with one step for all columns and no momentum: a "
            "gradient, and projections onto the cones by an active-set method that starts from the last active rows. "
            "The paper counts a quadratic program per column.",
            '- `frank_wolfe_*`: `frank_wolfe` with variant="plain": a gradient, the best atom of every gate, and the '
            "step 2 / (k + 2). `faces` finds the atom exactly as the paper's reference does, from the faces of the "
            "cone; `branching` to a relative 1e-6, for at most three outputs; `alternating` takes the best local "
            "maximum of several starts.",
            "- Per iteration is not per digit: the default variant of `frank_wolfe`, which corrects all weights and "
            "moves its neurons, needs far fewer iterations than the plain one.",
        ]
    )
