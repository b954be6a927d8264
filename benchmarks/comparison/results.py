"""Curves of a run of the comparison, and the seconds to a gap."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

__all__ = ["INSTANCE", "as_power", "draw", "read_run", "seconds_to"]

INSTANCE = ["dataset", "beta", "absolute", "n_gates"]
#: Points of a curve whose seconds are at least so much of each other are interpolated.
_NEAR = 0.1
#: Points before this are those of Z = 0, for which nothing was done.
_NOTHING = 2e-4
_COLUMNS = {
    "dataset_name": "dataset",
    "p_obj_beta": "beta",
    "p_obj_absolute": "absolute",
    "p_obj_n_gates": "n_gates",
    "p_obj_cap": "cap",
    "solver_name": "solver",
    "idx_rep": "repetition",
    "stop_val": "stop_val",
    "time": "seconds",
    "objective_value": "objective",
    "objective_gap": "gap",
    "objective_certified_gap": "certified_gap",
    "objective_train_accuracy": "train_accuracy",
    "objective_test_accuracy": "test_accuracy",
}


def as_power(tol: float) -> str:
    """1e-6, whatever Python writes."""
    return f"{tol:.0e}".replace("e-0", "e-")


def read_run(parquet: Path) -> pd.DataFrame:
    """One row per run of a solver, under plain names."""
    raw = pd.read_parquet(parquet)
    return raw[[name for name in _COLUMNS if name in raw]].rename(columns=_COLUMNS)


def seconds_to(curve: pd.DataFrame, tol: float) -> float:
    """Seconds of a solver until a relative gap; infinity where it did not get there.

    Ours are the seconds until the gap was proven. For the others the time between two points of the curve is
    interpolated, in logarithms, where they are near each other, and the gap is that to the best bound known, which
    costs them nothing.
    """
    curve = curve.sort_values("seconds" if len(curve) else "stop_val")
    if curve["solver"].iloc[0].startswith("cvxnn-"):
        proven = curve[(curve["stop_val"] <= tol) & (curve["gap"] <= tol)]
        return float(proven["seconds"].min()) if len(proven) else float("inf")
    gaps, seconds = curve["gap"].to_numpy(), curve["seconds"].to_numpy()
    there = np.flatnonzero(gaps <= tol)
    if len(there) == 0:
        return float("inf")
    i = there[0]
    restarted = curve["solver"].iloc[0].startswith("cvxpy-")
    if i == 0 or restarted or not gaps[i - 1] > tol or seconds[i - 1] < _NEAR * seconds[i]:
        return float(seconds[i])
    floor = max(gaps[i], 1e-16)
    share = np.log(gaps[i - 1] / tol) / np.log(gaps[i - 1] / floor)
    return float(np.exp((1 - share) * np.log(seconds[i - 1]) + share * np.log(seconds[i])))


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Gap against seconds, a panel per instance."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    instances = list(rows.groupby(INSTANCE, sort=True))
    columns = min(3, len(instances))
    lines = -(-len(instances) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    names = sorted(rows["solver"].unique())
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    for axis in axes.flat[len(instances) :]:
        axis.set_visible(False)
    for axis, ((dataset, beta, absolute, n_gates), part) in zip(axes.flat, instances, strict=False):
        for name, curve in part.groupby("solver"):
            points = curve[curve["gap"].notna() & (curve["seconds"] > _NOTHING)].sort_values("seconds")
            if len(points):
                gap = points["gap"].clip(lower=1e-9)
                ours = name == "cvxnn-auto"
                style = {"color": "black", "linewidth": 2} if ours else {"color": colours[name], "linewidth": 1}
                axis.loglog(points["seconds"], gap, ".-", label=name, zorder=3 if ours else 2, **style)
        for tol in (1e-4, 1e-6):
            axis.axhline(tol, color="0.8", linewidth=0.8, zorder=0)
        axis.set_ylim(1e-9, 10)
        axis.set_title(f"{dataset}, {n_gates} gates, beta {beta:g}" + ("" if absolute else " beta_max"), fontsize=9)
        axis.set_xlabel("seconds")
        axis.set_ylabel("relative gap")
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=6, fontsize=8, bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)
