"""Pictures of the spiral study: the paper's Figures 2, 3 and 4, the same for "bm_global", speed ratios and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cvxnn.datasets import spiral
from cvxnn.experiments.claims import nontrivial, speed_table
from cvxnn.plotting import COLOURS, MARKERS, panels, write_figure

__all__ = ["draw_figures"]

#: Gaps below are drawn here.
FLOOR = 1e-12
_SCOPES = {"sampled": "sampled gates", "all": "all gates"}
_SOLVERS = {
    "bm_gd": "bm_gd, to its best gap",
    "bm_global": "bm_global",
    "admm": "admm",
    "interior_point": "interior_point",
}


@dataclass(frozen=True)
class _Curve:
    """A column of the rows of a solver and scope, as a line with a band from minimum to maximum."""

    solver: str
    scope: str
    column: str
    label: str
    colour: str
    style: Any = "-"
    marker: str = "o"
    width: float = 1.5


_DESCENT = {
    scope: (
        _Curve("bm_gd", scope, "paper_bound", "formula of Theorem 3.4", COLOURS[1], "--", "s"),
        _Curve("bm_gd", scope, "duality_gap", "duality gap", COLOURS[2], ":", "^"),
        _Curve("bm_gd", scope, "true_gap", "actual gap", COLOURS[0]),
    )
    for scope in _SCOPES
}
_GLOBAL = (
    _Curve("bm_global", "sampled", "duality_gap", "duality gap, sampled gates", COLOURS[2], ":", "^"),
    _Curve("bm_global", "sampled", "true_gap", "actual gap, sampled gates", COLOURS[0], "-", "o", 4.0),
    _Curve("bm_global", "all", "duality_gap", "duality gap, all gates", COLOURS[1], ":", "v"),
    _Curve("bm_global", "all", "true_gap", "actual gap, all gates", COLOURS[3], "-", "D"),
)


def draw_figures(frame: pd.DataFrame, folder: Path, tol: float) -> list[str]:
    """Draw all figures.

    Parameters
    ----------
    frame : pandas.DataFrame
        See :func:`cvxnn.experiments.claims.frame_of`.
    folder : Path
    tol : float
        Relative gap asked of "bm_global".

    Returns
    -------
    list of str
        Names of the files.
    """
    sizes = sorted(int(n) for n in frame["n"].unique())
    names = [_draw_data(sizes, folder / "figure3.png")]
    for suffix, curves, limit in (
        ("", _DESCENT["sampled"], None),
        ("_all", _DESCENT["all"], None),
        ("_global", _GLOBAL, tol),
    ):
        present = [
            curve for curve in curves if ((frame["scope"] == curve.scope) & (frame["solver"] == curve.solver)).any()
        ]
        if not present:
            continue
        for name, shown in (("figure2", sizes[-1:]), ("figure4", sizes[:-1])):
            if shown:
                names.append(_draw_gaps(frame, shown, present, limit, folder / f"{name}{suffix}.png"))
    if len(nontrivial(frame)):
        names += [_draw_ratios(frame, folder / "ratio.png"), _draw_times(frame, folder / "times.png")]
    return names


def _draw_data(sizes: Sequence[int], path: Path) -> str:
    """Figure 3."""
    columns = min(3, len(sizes))
    figure, grid = panels(-(-len(sizes) // columns), columns, 3.1, 3.1, sharex=True, sharey=True)
    for axes, n in zip(grid.flat, sizes, strict=False):
        X, y = spiral(n)
        for label in range(int(y.max()) + 1):
            points = X[y == label]
            axes.scatter(
                *points.T,
                s=22,
                color=COLOURS[label],
                marker=MARKERS[label],
                alpha=0.8,
                linewidths=0,
                label=f"class {label}",
            )
        axes.set(title=f"n = {n}", aspect="equal", xlim=(-0.57, 0.57), ylim=(-0.57, 0.57))
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in list(grid.flat)[len(sizes) :]:
        axes.remove()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
    write_figure(figure, path)
    return path.name


def _draw_gaps(
    frame: pd.DataFrame, sizes: Sequence[int], curves: Sequence[_Curve], tol: float | None, path: Path
) -> str:
    """Figures 2 and 4: a row of panels per n, a panel per m."""
    ranks = sorted(int(m) for m in frame["m"].dropna().unique())
    figure, grid = panels(len(sizes), len(ranks), 3.3, 2.9, sharex=True, sharey="row")
    _widen(figure)
    for row, n in zip(grid, sizes, strict=True):
        for axes, m in zip(row, ranks, strict=True):
            part = frame[(frame["n"] == n) & (frame["m"] == m)]
            for curve in curves:
                _draw_curve(axes, part[(part["solver"] == curve.solver) & (part["scope"] == curve.scope)], curve)
            if tol is not None:
                axes.axhline(tol, color="#555555", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.set(xscale="log", yscale="log", title=f"n = {n}, m = {m}")
            axes.grid(visible=True, which="major", alpha=0.25)
        row[0].set_ylabel("relative optimality gap")
        _limit(row[0], tol)
    for axes in grid[-1]:
        axes.set_xlabel("beta")
    handles = [Line2D([], [], label=curve.label, **_look(curve)) for curve in curves]
    if tol is not None:
        handles.append(Line2D([], [], color="#555555", linewidth=0.8, linestyle=(0, (1, 2)), label=f"asked: {tol:g}"))
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=min(3, len(handles)))
    write_figure(figure, path)
    return path.name


def _widen(figure: Figure) -> None:
    """Room between panels for the numbers at their ends."""
    figure.set_layout_engine("constrained", wspace=0.06)


def _draw_curve(axes: Any, rows: pd.DataFrame, curve: _Curve) -> None:
    values = rows.assign(value=rows[curve.column].clip(lower=FLOOR))
    values = values[np.isfinite(values["value"])]
    if not len(values):
        return
    grouped = values.groupby("beta")["value"]
    mean = grouped.mean()
    axes.fill_between(mean.index, grouped.min(), grouped.max(), color=curve.colour, alpha=0.18, linewidth=0)
    axes.plot(mean.index, mean, **_look(curve))


def _look(curve: _Curve) -> dict[str, Any]:
    return {
        "color": curve.colour,
        "linestyle": curve.style,
        "linewidth": curve.width,
        "marker": curve.marker,
        "markersize": 3 + curve.width,
        "markeredgewidth": 0,
    }


def _limit(axes: Any, tol: float | None) -> None:
    """At least two decades, and the floor visible where something lies on it."""
    low, high = axes.get_ylim()
    if high / low < 100:
        middle = np.sqrt(high * low)
        low, high = middle / 10, middle * 10
    if low <= 3 * FLOOR:
        low = FLOOR / 3
    axes.set_ylim(low, max(high, 3 * tol) if tol else high)


def _draw_ratios(frame: pd.DataFrame, path: Path) -> str:
    """The distribution of the two speed ratios, per scope."""
    table = speed_table(frame)
    figure, grid = panels(1, 2, 4.4, 3.6, sharey=True)
    titles = {"same_gap": "bm_global to the same gap", "certified": "bm_global to its certificate"}
    for axes, (column, title) in zip(grid[0], titles.items(), strict=True):
        for k, (scope, part) in enumerate(table.groupby("scope", sort=False)):
            values = np.sort(part[column].to_numpy())
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            share = np.arange(1, len(values) + 1) / len(part)
            label = f"{_SCOPES[str(scope)]}: median {np.median(values):.3g} ({len(values)} of {len(part)} runs)"
            axes.step(values, share, where="post", color=COLOURS[k], label=label)
            axes.plot(np.median(values), np.median(share), marker=MARKERS[k], color=COLOURS[k])
        axes.axvline(1, color="#555555", linewidth=0.8)
        axes.axvline(20, color="#555555", linewidth=0.8, linestyle="--")
        axes.annotate("20", (20, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -8), textcoords="offset points")
        axes.set(xscale="log", xlabel="time of bm_gd to its best gap / time of bm_global", title=title, ylim=(0, 1.03))
        axes.grid(visible=True, which="major", alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    grid[0, 0].set_ylabel("share of runs at most there")
    write_figure(figure, path)
    return path.name


def _draw_times(frame: pd.DataFrame, path: Path) -> str:
    """Seconds of each solver against beta: a row of panels per scope, a panel per n."""
    runs = nontrivial(frame)
    sizes = sorted(int(n) for n in runs["n"].unique())
    scopes = list(runs["scope"].unique())
    figure, grid = panels(len(scopes), len(sizes), 3.0, 2.8, sharex=True, sharey=True)
    _widen(figure)
    for row, scope in zip(grid, scopes, strict=True):
        for axes, n in zip(row, sizes, strict=True):
            part = runs[(runs["scope"] == scope) & (runs["n"] == n)]
            for k, solver in enumerate(_SOLVERS):
                column = "seconds_to_best_gap" if solver == "bm_gd" else "seconds"
                _draw_curve(
                    axes,
                    part[part["solver"] == solver],
                    _Curve(solver, scope, column, solver, COLOURS[k], "-", MARKERS[k]),
                )
            axes.set(xscale="log", yscale="log", title=f"{_SCOPES[scope]}, n = {n}")
            axes.grid(visible=True, which="major", alpha=0.25)
        row[0].set_ylabel("seconds")
    for axes in grid[-1]:
        axes.set_xlabel("beta")
    handles = [
        Line2D([], [], color=COLOURS[k], marker=MARKERS[k], markersize=4, label=label)
        for k, label in enumerate(_SOLVERS.values())
    ]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=4 if len(sizes) > 2 else 2)
    write_figure(figure, path)
    return path.name
