"""Pictures of the study of trained networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D

from cvxnn.datasets import spiral
from cvxnn.plotting import COLOURS, MARKERS, panels, write_figure

__all__ = ["draw_network_figures"]

#: Numbers below are drawn here.
FLOOR = 1e-13
_EXCESS_FLOOR = 1e-10
_ANGLES = 2881
_TITLES = {"sgd": "SGD", "adam": "Adam"}
_GREY = "#777777"


def draw_network_figures(
    frame: pd.DataFrame, outcomes: list[dict[str, Any]], n_samples: int, folder: Path
) -> list[str]:
    """Draw all pictures; their names.

    Parameters
    ----------
    frame : pandas.DataFrame
        Rows of the problems whose optimum is not zero.
    outcomes : list of dict
        Those of all cells.
    n_samples : int
    folder : Path
    """
    if frame.empty:
        return []
    betas = set(frame["beta"])
    shown = [outcome for outcome in outcomes if outcome["cell"]["beta"] in betas]
    return [
        _draw_excess(frame, folder / "excess.png"),
        _draw_improvement(frame, folder / "improve.png"),
        _draw_training(shown, folder / "training.png"),
        _draw_certificate(frame, shown, n_samples, folder / "certificate.png"),
    ]


def _draw_excess(frame: pd.DataFrame, path: Path) -> str:
    """Every network: its certified interval, and what its own gradient proves."""
    widths, betas = sorted(frame["width"].unique()), sorted(frame["beta"].unique())
    optimizers = list(frame["optimizer"].unique())
    figure, grid = panels(1, len(widths), max(3.0, 0.8 * len(betas)), 4.2, sharey=True)
    for axes, width in zip(grid[0], widths, strict=True):
        for i, beta in enumerate(betas):
            for k, optimizer in enumerate(optimizers):
                part = frame[(frame["width"] == width) & (frame["beta"] == beta) & (frame["optimizer"] == optimizer)]
                part = part.sort_values("excess")
                at = i + 0.4 * (k - (len(optimizers) - 1) / 2) + np.linspace(-0.15, 0.15, len(part))
                low, high = (part[name].clip(lower=_EXCESS_FLOOR) for name in ("excess_least", "excess_most"))
                axes.scatter(
                    at, part["own_gap"].clip(lower=_EXCESS_FLOOR), s=9, marker="_", color=_GREY, linewidths=0.8
                )
                axes.vlines(at, low, high, color=COLOURS[k], linewidth=1.6)
                axes.scatter(at, high, s=9, marker=MARKERS[k], color=COLOURS[k], linewidths=0)
        axes.set(yscale="log", title=f"m = {width}", xlabel="beta")
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.axhline(0.01, color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.grid(visible=True, which="major", axis="y", alpha=0.25)
    grid[0, 0].set_ylabel("(objective - optimum) / optimum")
    handles: list[Any] = [
        Line2D([], [], color=COLOURS[k], marker=MARKERS[k], markersize=4, linewidth=1.6) for k in range(len(optimizers))
    ]
    handles += [
        Line2D([], [], color=_GREY, marker="_", linestyle=""),
        Line2D([], [], color=_GREY, linestyle=(0, (1, 2)), linewidth=0.8),
    ]
    names = [f"{_TITLES[name]}: certified interval" for name in optimizers]
    labels = [*names, "upper bound from the network's gradient alone", "1%"]
    columns = len(labels) if len(widths) > 2 else 2
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns, fontsize="small")
    write_figure(figure, path)
    return path.name


def _draw_improvement(frame: pd.DataFrame, path: Path) -> str:
    """Excess as trained against the certified gap after improve()."""
    widths = sorted(frame["width"].unique())
    figure, grid = panels(1, 1, 5.6, 4.6)
    axes = grid[0, 0]
    for k, width in enumerate(widths):
        part = frame[frame["width"] == width]
        before, after = (part[name].clip(lower=FLOOR) for name in ("excess_most", "improved_gap"))
        axes.scatter(
            before, after, s=14, alpha=0.6, color=COLOURS[k], marker=MARKERS[k], linewidths=0, label=f"m = {width}"
        )
    ends = [FLOOR / 2, 2 * max(float(frame["excess_most"].max()), 1e-2)]
    axes.plot(ends, ends, color=_GREY, linewidth=0.8)
    axes.axhline(1e-6, color=_GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate("1e-6", (ends[1], 1e-6), xytext=(-4, 3), textcoords="offset points", ha="right", color=_GREY)
    axes.annotate("no change", (1e-10, 1e-10), xytext=(-4, 3), textcoords="offset points", ha="right", color=_GREY)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=(FLOOR / 2, 1e-2),
        xlabel="certified upper bound of the excess, as trained",
        ylabel="certified gap after improve()",
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.0))
    axes.grid(visible=True, which="major", alpha=0.25)
    write_figure(figure, path)
    return path.name


def _draw_training(outcomes: list[dict[str, Any]], path: Path) -> str:
    """Median excess against the steps, with a band from the smallest to the largest."""
    widths = sorted({outcome["cell"]["width"] for outcome in outcomes})
    betas = sorted({outcome["cell"]["beta"] for outcome in outcomes})
    optimizers = list(dict.fromkeys(outcome["cell"]["optimizer"] for outcome in outcomes))
    figure, grid = panels(len(optimizers), len(widths), 3.0, 2.7, sharex=True, sharey=True)
    for outcome in outcomes:
        cell = outcome["cell"]
        axes = grid[optimizers.index(cell["optimizer"]), widths.index(cell["width"])]
        steps = np.array([step for step, _ in outcome["trace"]]) + 1
        values = np.maximum(np.array([values for _, values in outcome["trace"]]), FLOOR)
        colour = COLOURS[betas.index(cell["beta"])]
        axes.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, np.median(values, axis=1), color=colour, linewidth=1.5)
    for i, optimizer in enumerate(optimizers):
        for j, width in enumerate(widths):
            grid[i, j].set(xscale="log", yscale="log", title=f"{_TITLES[optimizer]}, m = {width}")
            grid[i, j].grid(visible=True, which="major", alpha=0.25)
        grid[i, 0].set_ylabel("excess, relative")
    for axes in grid[-1]:
        axes.set_xlabel("step + 1")
    lines = [Line2D([], [], color=COLOURS[k]) for k in range(len(betas))]
    labels = [f"beta = {beta:g}" for beta in betas]
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(labels), fontsize="small")
    write_figure(figure, path)
    return path.name


def _draw_certificate(frame: pd.DataFrame, outcomes: list[dict[str, Any]], n_samples: int, path: Path) -> str:
    """Slope of a new neuron against its direction, for the worst network of the smallest and of the largest width."""
    X, y = spiral(n_samples)
    data = torch.from_numpy(X), torch.from_numpy(np.eye(int(y.max()) + 1)[y])
    widths = sorted({int(frame["width"].min()), int(frame["width"].max())})
    figure, grid = panels(len(widths), 1, 8.0, 2.9, sharex=True)
    for axes, width in zip(grid[:, 0], widths, strict=True):
        rows = frame[frame["width"] == width]
        worst = rows.loc[rows["excess"].idxmax()]
        outcome = next(
            outcome
            for outcome in outcomes
            if tuple(outcome["cell"].values()) == (width, worst["beta"], worst["optimizer"])
        )
        example = outcome["example"]
        for k, (key, name) in enumerate((("trained", "as trained"), ("improved", "after improve()"))):
            _draw_slopes(axes, example[key], data, float(worst["beta"]), COLOURS[5 * (1 - k)], name, 1 - k)
        axes.axhline(1.0, color=_GREY, linewidth=0.8)
        axes.set(
            ylabel="slope / beta",
            title=f"m = {width}, {_TITLES[worst['optimizer']]}, beta = {worst['beta']:g}: "
            f"{100 * worst['excess']:.2g}% above the optimum",
        )
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= axes.get_ylim()[1]])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels), fontsize="small")
    grid[-1, 0].set_xlabel("direction of the neuron (degrees)")
    grid[-1, 0].set_xticks(range(-180, 181, 60))
    write_figure(figure, path)
    return path.name


def _draw_slopes(
    axes: Any,
    weights: list[list[list[float]]],
    data: tuple[torch.Tensor, torch.Tensor],
    beta: float,
    colour: str,
    name: str,
    row: int,
) -> None:
    """||sum_i (x_i . u)_+ nu_i|| / beta over the circle, and where the neurons are."""
    X, Y = data
    W1, W2 = (torch.tensor(part, dtype=torch.float64) for part in weights)
    nu = ((X @ W1.T).clamp_min(0) @ W2.T - Y) / len(X)
    angles = torch.linspace(-torch.pi, torch.pi, _ANGLES, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()])
    slopes = torch.linalg.vector_norm((X @ circle).clamp_min(0).T @ nu, dim=1) / beta
    axes.plot(angles.rad2deg(), slopes, color=colour, linewidth=1.5, label=f"slope, {name}")
    sizes = torch.linalg.vector_norm(W1, dim=1) * torch.linalg.vector_norm(W2, dim=0)
    live = sizes > 1e-6 * sizes.max()
    at = torch.atan2(W1[live, 1], W1[live, 0]).rad2deg()
    area = 60 * sizes[live] / sizes.max() + 6
    axes.scatter(
        at,
        torch.full_like(at, -0.12 - 0.16 * row),
        s=area,
        color=colour,
        alpha=0.5,
        linewidths=0,
        label=f"neurons, {name}",
    )
