"""Pictures of a training and of its predictions: a PNG per function, written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cvxnn.certificates import Certificate
from cvxnn.errors import InvalidInputError
from cvxnn.files import write_atomically

__all__ = [
    "COLOURS",
    "MARKERS",
    "panels",
    "plot_confusion",
    "plot_decision_regions",
    "plot_gap",
    "plot_gates",
    "plot_regression_surface",
    "plot_residuals",
    "write_figure",
]

# Okabe and Ito's colours, distinguishable with every common colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"
_MANY = 30

PathLike = str | os.PathLike[str]


def _figure(width: float = 6.4, height: float = 4.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _tidy(axes)
    return figure, axes


def panels(
    rows: int, columns: int, width: float = 3.4, height: float = 3.0, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes in the style of the other pictures.

    Parameters
    ----------
    rows, columns : int
    width, height : float
        Of a panel, in inches.
    **options
        For ``Figure.subplots``.

    Returns
    -------
    Figure, and an ndarray of axes of shape (rows, columns)
    """
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        _tidy(axes)
    return figure, grid


def write_figure(figure: Figure, path: PathLike) -> Path:
    """Write a figure as PNG, whole or not at all."""
    return _write(figure, path)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: PathLike) -> Path:
    return write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def plot_gap(trace: Sequence[dict[str, Any]], path: PathLike, tol: float | None = None) -> Path:
    """Relative duality gap against time, with the tolerance.

    Parameters
    ----------
    trace : sequence of dict
        ``result.trace``.
    path : path
        PNG to write.
    tol : float, optional
        Drawn as a line.

    Returns
    -------
    Path
        Where the picture is.
    """
    figure, axes = _figure()
    shown = [(entry["seconds"], entry["relative_gap"]) for entry in trace if math.isfinite(entry["relative_gap"])]
    positive = [gap for _, gap in shown if gap > 0] + ([tol] if tol else [])
    floor = min(positive, default=1e-16) / 3
    if shown:
        seconds, gaps = zip(*shown, strict=True)
        axes.plot(seconds, np.maximum(gaps, floor), marker="o", markersize=3.5, color=_BLUE)
        axes.annotate(
            f"{gaps[-1]:.1e}",
            (seconds[-1], max(gaps[-1], floor)),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
            annotation_clip=False,
            color=_BLUE,
        )
    else:
        axes.text(0.5, 0.5, "no lower bound above zero was found", ha="center", transform=axes.transAxes)
    if tol:
        axes.axhline(tol, color=_ORANGE, linestyle="--")
        axes.margins(x=0.03)
        axes.annotate(
            f"tolerance {tol:g}",
            (0.0, tol),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(4, -12),
            color=_ORANGE,
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlim(left=0)
    axes.set_xlabel("time (seconds)")
    axes.set_ylabel("relative duality gap")
    axes.set_title("How far the objective can at most be from the best one")
    axes.grid(visible=True, which="major", alpha=0.25)
    return _write(figure, path)


def plot_gates(certificate: Certificate, path: PathLike) -> Path:
    """Dual norm of every gate relative to beta, sorted; at an optimum none is above 1.

    Parameters
    ----------
    certificate : Certificate
        Its ``gate_ratios`` are shown.
    path : path
    """
    ratios = np.sort(np.array([ratio for ratio in certificate.gate_ratios if math.isfinite(ratio)]))[::-1]
    largest = float(ratios.max(initial=0.0))
    figure, axes = _figure()
    rank = np.arange(1, len(ratios) + 1)
    if len(ratios) <= _MANY:
        axes.bar(rank, ratios, color=_BLUE, width=0.8 if len(ratios) > 1 else 0.3)
        axes.set_xlim(0, len(ratios) + 1)
        axes.set_xticks(rank if len(ratios) <= 15 else rank[::5])
    else:
        axes.fill_between(rank, ratios, step="mid", color=_BLUE, alpha=0.25)
        axes.step(rank, ratios, where="mid", color=_BLUE)
        axes.set_xlim(1, len(ratios))
    axes.axhline(1.0, color=_ORANGE, linestyle="--")
    axes.annotate(
        "beta",
        (1.0, 1.0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-4, 5),
        ha="right",
        color=_ORANGE,
    )
    axes.set_ylim(0, 1.12 * max(1.0, largest))
    axes.set_xlabel("gate, sorted")
    axes.set_ylabel("dual norm / beta")
    axes.set_title(f"Largest dual norm: {largest:.4g} beta. At an optimum: beta at most.")
    return _write(figure, path)


def plot_confusion(y_true: Any, y_pred: Any, path: PathLike, *, part: str = "samples") -> Path:
    """Counts of true against predicted classes.

    Parameters
    ----------
    y_true, y_pred : array-like of shape (n,)
    path : path
    part : str
        What the samples are, for the title ("test samples").
    """
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    _check_pair(y_true, y_pred)
    classes, index = np.unique(np.concatenate([y_true, y_pred]), return_inverse=True)
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (index[: len(y_true)], index[len(y_true) :]), 1)
    size = float(np.clip(2.8 + 0.42 * len(classes), 4.2, 14))
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
    if len(classes) <= _MANY:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.6 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour)
        names = [str(label) for label in classes]
        slanted = max(map(len, names)) > 4
        axes.set_xticks(range(len(classes)), names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(len(classes)), names)
    wrong = len(y_true) - int(np.trace(counts))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{wrong} of {len(y_true)} {part} misclassified")
    return _write(figure, path)


def plot_residuals(y_true: Any, y_pred: Any, path: PathLike, *, part: str = "samples") -> Path:
    """Predicted against true values, and a histogram of the differences.

    Parameters are those of :func:`plot_confusion`.
    """
    y_true = np.asarray(y_true, dtype=np.float64)
    y_pred = np.asarray(y_pred, dtype=np.float64)
    _check_pair(y_true, y_pred)
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _tidy(left)
    _tidy(right)
    low, high = float(min(y_true.min(), y_pred.min())), float(max(y_true.max(), y_pred.max()))
    margin = 0.04 * (high - low) or 1.0
    left.plot([low, high], [low, high], color=_ORANGE, linestyle="--", label="exact")
    left.scatter(y_true, y_pred, s=16, alpha=0.6, color=_BLUE, linewidths=0)
    left.set(
        xlim=(low - margin, high + margin),
        ylim=(low - margin, high + margin),
        xlabel="true value",
        ylabel="predicted value",
        title=f"Predictions for {len(y_true)} {part}",
    )
    left.legend(frameon=False, loc="upper left")
    residuals = y_pred - y_true
    right.hist(residuals, bins="auto" if len(residuals) < 10_000 else 100, color=_BLUE, alpha=0.8)
    right.axvline(0.0, color=_ORANGE, linestyle="--")
    rmse = math.sqrt(float(np.mean(residuals**2)))
    right.set(xlabel="predicted minus true", ylabel="samples", title=f"Errors: root mean square {rmse:.3g}")
    return _write(figure, path)


def _check_pair(y_true: np.ndarray, y_pred: np.ndarray) -> None:
    if y_true.ndim != 1 or y_true.shape != y_pred.shape or not len(y_true):
        raise InvalidInputError(
            f"y_true has shape {y_true.shape} and y_pred {y_pred.shape}; two vectors of the same length are wanted"
        )


def _grid(X: Any, n: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The points (m, 2), and a grid a little around them: its axes, and its points (n * n, 2)."""
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or X.shape[1] != 2 or not len(X):
        raise InvalidInputError(f"X has shape {X.shape}; two features and at least one sample are wanted")
    low, high = X.min(axis=0), X.max(axis=0)
    margin = np.where(high > low, 0.06 * (high - low), 1.0)
    across, up = (np.linspace(low[i] - margin[i], high[i] + margin[i], n) for i in (0, 1))
    points = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    return X, across, up, points


def plot_decision_regions(
    predict: Callable[[np.ndarray], np.ndarray],
    X: Any,
    y: Any,
    path: PathLike,
    *,
    feature_names: Sequence[str] = ("feature 1", "feature 2"),
) -> Path:
    """The class predicted everywhere in the plane, and the samples.

    Parameters
    ----------
    predict : callable
        Labels of points (m, 2).
    X : array-like of shape (n, 2)
    y : array-like of shape (n,)
    path : path
    feature_names : pair of str
    """
    X, across, up, points = _grid(X)
    y = np.asarray(y)
    predicted = np.asarray(predict(points))
    classes = np.unique(np.concatenate([y, predicted]))
    colours = [_colour(k, len(classes)) for k in range(len(classes))]
    figure, axes = _figure(6.6, 5.0)
    index = np.searchsorted(classes, predicted).reshape(len(up), len(across))
    levels = np.arange(len(classes) + 1) - 0.5
    axes.contourf(across, up, index, levels=levels, cmap=ListedColormap(colours), alpha=0.3)
    handles = []
    for k, label in enumerate(classes):
        members = X[y == label]
        marker = MARKERS[k % len(MARKERS)]
        axes.scatter(*members.T, s=22, color=colours[k], marker=marker, edgecolors="black", linewidths=0.5)
        handles.append(
            Line2D([], [], linestyle="", marker=marker, color=colours[k], markeredgecolor="black", label=str(label))
        )
    if len(classes) <= 12:
        figure.legend(handles=handles, title="class", frameon=False, loc="outside right center")
    axes.set(xlabel=feature_names[0], ylabel=feature_names[1], title="Predicted class (areas) and training samples")
    return _write(figure, path)


def _colour(k: int, n: int) -> Any:
    return COLOURS[k] if n <= len(COLOURS) else colormaps["viridis"](k / (n - 1))


def plot_regression_surface(
    predict: Callable[[np.ndarray], np.ndarray],
    X: Any,
    y: Any,
    path: PathLike,
    *,
    feature_names: Sequence[str] = ("feature 1", "feature 2"),
) -> Path:
    """The value predicted everywhere in the plane, and the samples in the colour of their true value.

    Parameters are those of :func:`plot_decision_regions`; `predict` returns numbers.
    """
    X, across, up, points = _grid(X)
    y = np.asarray(y, dtype=np.float64)
    surface = np.asarray(predict(points), dtype=np.float64).reshape(len(up), len(across))
    low, high = float(min(y.min(), surface.min())), float(max(y.max(), surface.max()))
    levels = np.linspace(low, high if high > low else low + 1.0, 21)
    figure, axes = _figure(6.6, 5.0)
    filled = axes.contourf(across, up, surface, levels=levels, cmap="viridis")
    axes.scatter(*X.T, c=y, s=24, cmap="viridis", vmin=levels[0], vmax=levels[-1], edgecolors="white", linewidths=0.7)
    bar = figure.colorbar(filled, ax=axes, label="value")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set(xlabel=feature_names[0], ylabel=feature_names[1], title="Predicted value (areas) and training samples")
    return _write(figure, path)
