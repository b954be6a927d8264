"""Pictures of the study of self-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from cvxnn.experiments.attention import KINDS
from cvxnn.experiments.claims import OPTIMAL_GAP
from cvxnn.plotting import COLOURS, MARKERS, panels, write_figure

__all__ = ["draw_attention_figures"]

#: Gaps below are drawn here.
FLOOR = 1e-10
_GREY = "#777777"
_TITLES = {"factors": "factors (26), polished", "network": "network by Adam, polished", "adam": "as Adam ends"}
_STATIONARY = {"factors": _TITLES["factors"], "network": _TITLES["network"], "padded": "one head and zeros"}
_DOTS: dict[str, Any] = {"linestyle": "", "markersize": 4}


def draw_attention_figures(frame: pd.DataFrame, folder: Path) -> list[str]:
    """Draw all pictures; their names."""
    return [
        _draw_gaps(frame, folder / "gap.png"),
        _draw_ranks(frame, folder / "rank.png"),
        _draw_eigenvalues(frame, folder / "eigenvalue.png"),
    ]


def _sizes(frame: pd.DataFrame) -> list[tuple[int, int]]:
    pairs = frame[["d", "c"]].drop_duplicates().sort_values(["d", "c"])
    return [(int(d), int(c)) for d, c in pairs.itertuples(index=False)]


def _spread(part: pd.DataFrame) -> np.ndarray:
    """Numbers of heads, apart from one another where there are many."""
    offsets = part.groupby("m").cumcount() / part.groupby("m")["m"].transform("size") - 0.5
    return (part["m"] + 0.6 * offsets).to_numpy()


def _mark_thresholds(axes: Any, part: pd.DataFrame, labelled: bool) -> None:
    least, paper = int(part["threshold"].iloc[0]), int(part["paper_bound"].iloc[0])
    axes.axvline(least - 0.5, color="#000000", linewidth=1.0, linestyle="--")
    axes.axvline(paper + 0.5, color=_GREY, linewidth=1.0, linestyle=":")
    heads = sorted(part["m"].unique())
    axes.set_xticks(heads if len(heads) <= 9 else [m for m in heads if m % 2 == 0 or m == 1])
    if labelled:
        axes.set_xlabel("heads m")


def _draw_gaps(frame: pd.DataFrame, path: Path) -> str:
    """The final gap of every run against the number of heads, and that of Adam before polishing."""
    sizes = _sizes(frame)
    rows = [("factors", "gap"), ("network", "gap"), ("network", "trained_gap")]
    figure, grid = panels(len(rows), len(sizes), 2.7, 2.3, sharey=True)
    for i, (form, column) in enumerate(rows):
        for axes, (d, c) in zip(grid[i], sizes, strict=True):
            part = frame[(frame["d"] == d) & (frame["c"] == c) & (frame["form"] == form)]
            at, gaps = _spread(part), part[column].clip(lower=FLOOR).to_numpy()
            for k, kind in enumerate(KINDS):
                chosen = (part["kind"] == kind).to_numpy()
                axes.plot(at[chosen], gaps[chosen], color=_colour(k), marker=MARKERS[k], **(_DOTS | {"markersize": 3}))
            axes.axhline(OPTIMAL_GAP, color=_GREY, linewidth=0.8)
            _mark_thresholds(axes, part, i == len(rows) - 1)
            axes.set_yscale("log")
            if i == 0:
                axes.set_title(f"d = {d}, c = {c}")
        grid[i, 0].set_ylabel(f"gap, {_TITLES['adam' if column == 'trained_gap' else form]}", fontsize="small")
    handles, labels = _legend(frame[frame["form"].isin([form for form, _ in rows])])
    handles += [
        Line2D([], [], color="#000000", linestyle="--", linewidth=1.0),
        Line2D([], [], color=_GREY, linestyle=":", linewidth=1.0),
    ]
    labels += ["min(d^2, d c)", "d^2 + d c"]
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels), fontsize="small")
    write_figure(figure, path)
    return path.name


def _colour(k: int) -> str:
    return (COLOURS[0], COLOURS[5], COLOURS[1], _GREY)[k]


def _legend(frame: pd.DataFrame) -> tuple[list[Any], list[str]]:
    present = [(k, kind) for k, kind in enumerate(KINDS) if (frame["kind"] == kind).any()]
    handles = [Line2D([], [], color=_colour(k), marker=MARKERS[k], **_DOTS) for k, _ in present]
    return handles, [kind.replace("_", " ") for _, kind in present]


def _draw_ranks(frame: pd.DataFrame, path: Path) -> str:
    """The rank of (27) at local minima against the number of heads."""
    sizes = _sizes(frame)
    figure, grid = panels(1, len(sizes), 2.7, 2.7)
    minima = frame[frame["kind"] == "local_minimum"]
    for axes, (d, c) in zip(grid[0], sizes, strict=True):
        part = minima[(minima["d"] == d) & (minima["c"] == c)]
        whole = frame[(frame["d"] == d) & (frame["c"] == c)]
        heads = sorted(whole["m"].unique())
        axes.plot(heads, heads, color=_GREY, linewidth=0.8)
        optimal = part["gap"] <= OPTIMAL_GAP
        for shift, colour, marker, chosen in ((-0.12, COLOURS[0], "o", optimal), (0.12, COLOURS[5], "s", ~optimal)):
            counts = part[chosen].groupby(["m", "rank"]).size()
            if len(counts):
                m, rank = (counts.index.get_level_values(name).to_numpy() for name in ("m", "rank"))
                axes.scatter(
                    m + shift, rank, s=6 + 60 * counts / counts.max(), color=colour, marker=marker, linewidths=0
                )
        _mark_thresholds(axes, whole, True)
        most = int(whole["threshold"].iloc[0])
        axes.set(title=f"d = {d}, c = {c}", ylim=(0, most + 1.5), yticks=range(most + 2))
    grid[0, 0].set_ylabel("rank of (27) at local minima")
    handles = [
        Line2D([], [], color=COLOURS[0], marker="o", **_DOTS),
        Line2D([], [], color=COLOURS[5], marker="s", **_DOTS),
        Line2D([], [], color=_GREY, linewidth=0.8),
    ]
    labels = ["at the optimum", "above the optimum", "rank = m"]
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize="small")
    write_figure(figure, path)
    return path.name


def _draw_eigenvalues(frame: pd.DataFrame, path: Path) -> str:
    """The smallest eigenvalue of the Hessian against the gap, at stationary points, few and enough heads apart."""
    figure, grid = panels(1, 2, 4.0, 3.4, sharey=True, sharex=True)
    stationary = frame[frame["kind"] != "not_stationary"]
    enough = stationary["m"] >= stationary["threshold"]
    titles = ("m < min(d^2, d c)", "m >= min(d^2, d c)")
    for axes, title, chosen in zip(grid[0], titles, (~enough, enough), strict=True):
        part = stationary[chosen]
        for k, form in enumerate(_STATIONARY):
            seen = part[part["form"] == form]
            axes.plot(
                seen["gap"].clip(lower=FLOOR),
                seen["smallest_eigenvalue"] / seen["beta"],
                color=COLOURS[(0, 3, 5)[k]],
                marker=MARKERS[k],
                alpha=0.6,
                label=_STATIONARY[form],
                **(_DOTS | {"markersize": 3}),
            )
        axes.axvline(OPTIMAL_GAP, color=_GREY, linewidth=0.8)
        axes.axhline(0.0, color=_GREY, linewidth=0.8)
        axes.set(xscale="log", title=title, xlabel="gap at stationary points")
        axes.set_yscale("symlog", linthresh=1e-4)
    grid[0, 0].set_ylabel("smallest eigenvalue / beta")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize="small")
    write_figure(figure, path)
    return path.name
