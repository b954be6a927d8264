"""The page, tables and pictures of the layerwise study."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cvxnn._version import __version__
from cvxnn.experiments.layerwise import LAYERWISE_COLUMNS
from cvxnn.experiments.layerwise_settings import PAPER_ACCURACY, LayerwiseGrid
from cvxnn.files import write_atomically
from cvxnn.plotting import COLOURS, MARKERS, panels, write_figure

__all__ = ["layerwise_claims", "layerwise_summary", "write_layerwise_report"]

_FORMS = {"convex": "convex form (23)", "bm": "BM form (126)", "phi": "BM from Phi"}
#: Points of accuracy within which a figure of the paper counts as reproduced.
_CLOSE = 0.5


def layerwise_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is computed from the rows, for JSON."""
    frame = _trainings(rows)
    best = frame.loc[frame.groupby(["dataset", "kind", "m"])["stage"].idxmax()] if len(frame) else frame
    return {"claims": layerwise_claims(rows), "final": best[list(_FINAL)].to_dict("records")}


_FINAL = ("dataset", "kind", "m", "stage", "train_accuracy", "test_accuracy", "seconds")


def layerwise_claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the paper says of layerwise training, and what was found."""
    frame = _trainings(rows)
    claims = []
    for (dataset, m), part in frame[frame["kind"] == "layerwise"].groupby(["dataset", "m"]):
        last = part.loc[part["stage"].idxmax()]
        seen = 100 * last["test_accuracy"]
        found = f"{seen:.2f}% after {int(last['stage'])} stages of {int(last['n_train'])} images"
        deep = frame[(frame["kind"] == "end_to_end") & (frame["dataset"] == dataset) & (frame["m"] == m)]
        if len(deep):
            found += f"; end to end {100 * deep['test_accuracy'].iloc[0]:.2f}%"
        wanted = PAPER_ACCURACY.get((dataset, m))
        full = int(last["n_train"]) >= 50_000 and last["stage"] >= 3
        verdict = "not tested at this scale"
        if wanted is not None and full:
            verdict = "reproduced" if seen >= wanted - _CLOSE else "not reproduced"
            found += f"; the paper {wanted}%"
        claims.append({"name": f"layerwise, {dataset}, m = {m}", "verdict": verdict, "found": found})
    for dataset, part in frame[frame["kind"] == "convex"].groupby("dataset"):
        stages = [f"stage {int(row.stage)} {100 * row.test_accuracy:.2f}%" for row in part.itertuples()]
        certified = bool((part["relative_gap"] <= 1e-3).all())
        claims.append(
            {
                "name": f"convex stages, {dataset}",
                "verdict": "certified" if certified else "not certified",
                "found": f"{', '.join(stages)}; largest gap {part['relative_gap'].max():.1e}",
            }
        )
    costs = _costs(rows)
    if len(costs):
        table = costs.pivot_table(index=["dataset", "stage"], columns="form", values="epoch_seconds")
        if {"bm", "convex"} <= set(table.columns):
            ratios = (table["convex"] / table["bm"]).dropna()
            claims.append(
                {
                    "name": "BM costs less than the convex form",
                    "verdict": "reproduced" if bool((ratios > 1).all()) else "not reproduced",
                    "found": f"epochs by convolution, (23) over (126): {ratios.min():.2g} to {ratios.max():.2g} times",
                }
            )
    return claims


def _trainings(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([row for row in rows if row["kind"] != "costs"])
    return frame.reindex(columns=list(dict.fromkeys([*LAYERWISE_COLUMNS, *frame.columns]))).fillna({"stage": 0})


def _costs(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([row for row in rows if row["kind"] == "costs"])
    return frame.reindex(columns=["dataset", "stage", "form", "epoch_seconds", "peak_gib", "status"])


def write_layerwise_report(rows: list[dict[str, Any]], grid: LayerwiseGrid, folder: Path) -> list[str]:
    """Write stages.csv, costs.csv, the pictures and report.md into a folder that exists; their names."""
    names = ["report.md"]
    frame, costs = _trainings(rows), _costs(rows)
    if len(frame):
        write_atomically(folder / "stages.csv", lambda temporary: frame.to_csv(temporary, index=False))
        _draw_accuracy(frame, folder / "accuracy.png")
        names += ["stages.csv", "accuracy.png"]
    if len(costs):
        write_atomically(folder / "costs.csv", lambda temporary: costs.to_csv(temporary, index=False))
        names.append("costs.csv")
        if costs["epoch_seconds"].notna().any():
            _draw_costs(costs, folder / "costs.png")
            names.append("costs.png")
    text = _page(frame, costs, rows, grid, names)
    write_atomically(folder / "report.md", lambda temporary: _write_text(temporary, text))
    return names


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _draw_accuracy(frame: pd.DataFrame, path: Path) -> None:
    """Figures 1 and 5: accuracy after every stage, a panel per data set."""
    datasets = list(dict.fromkeys(frame["dataset"]))
    figure, grid = panels(1, len(datasets), 4.6, 3.8)
    for axes, dataset in zip(grid[0], datasets, strict=True):
        part = frame[frame["dataset"] == dataset]
        staged = part[part["kind"].isin(["layerwise", "convex"])]
        for i, ((kind, m), line) in enumerate(staged.groupby(["kind", "m"])):
            name = "convex" if kind == "convex" else f"m = {m}"
            for split, style in (("test", "-"), ("train", "--")):
                axes.plot(
                    line["stage"],
                    100 * line[f"{split}_accuracy"],
                    style,
                    color=COLOURS[i],
                    marker=MARKERS[i],
                    label=f"{name}, {split}",
                )
        others = part[part["kind"].isin(["end_to_end", "small_cnn"])]
        for i, ((kind, m), line) in enumerate(others.groupby(["kind", "m"])):
            name = "small CNN" if kind == "small_cnn" else f"end to end, m = {m}"
            best = 100 * line["test_accuracy"].iloc[-1]
            axes.axhline(best, color=COLOURS[i], linestyle=":", label=f"{name}, test")
        axes.set_title(dataset.replace("_", "-"))
        axes.set_xlabel("stage")
        axes.set_ylabel("accuracy (%)")
        axes.set_xticks(sorted(set(staged["stage"].astype(int))) or [1])
        axes.legend(fontsize=7)
    write_figure(figure, path)


def _draw_costs(costs: pd.DataFrame, path: Path) -> None:
    """Figure 6: time per epoch and peak memory per stage, by form."""
    datasets = list(dict.fromkeys(costs["dataset"]))
    figure, grid = panels(len(datasets), 2, 4.6, 3.4)
    labels = {"epoch_seconds": "seconds per epoch", "peak_gib": "peak memory (GiB)"}
    for line, dataset in zip(grid, datasets, strict=True):
        part = costs[(costs["dataset"] == dataset) & costs["epoch_seconds"].notna()]
        for axes, (value, label) in zip(line, labels.items(), strict=True):
            for i, (form, points) in enumerate(part.groupby("form", sort=False)):
                axes.plot(points["stage"], points[value], color=COLOURS[i], marker=MARKERS[i], label=_FORMS[str(form)])
            axes.set_yscale("log")
            axes.set_xlabel("stage")
            axes.set_ylabel(label)
            axes.set_title(dataset.replace("_", "-"))
            axes.set_xticks(sorted(set(part["stage"].astype(int))))
            axes.legend(fontsize=7)
    write_figure(figure, path)


def _page(
    frame: pd.DataFrame, costs: pd.DataFrame, rows: list[dict[str, Any]], grid: LayerwiseGrid, names: list[str]
) -> str:
    where = "CUDA" if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    images = "all images" if grid.n_train == 0 else f"{grid.n_train} training and {grid.n_test} test images"
    lines = [
        "# Layerwise training",
        "",
        f"cvxnn {__version__}, torch {torch.__version__}, {platform.machine()}, {where}; {images}, seed {grid.seed}.",
        "",
        "| Claim | Verdict | Found |",
        "| --- | --- | --- |",
        *(f"| {claim['name']} | {claim['verdict']} | {claim['found']} |" for claim in layerwise_claims(rows)),
        "",
    ]
    if "accuracy.png" in names:
        lines += ["![Accuracy after every stage](accuracy.png)", ""]
    if len(frame):
        lines += [
            "| Data | Training | m | Stage | Train | Test | Gap | Columns | Seconds | Epochs | Peak GiB | Status |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *(_stage_row(row) for row in frame.to_dict("records")),
            "",
            "Seconds are those of the stage, without certificates of stages trained by SGD. Peak memory is that "
            "of the process so far.",
            "",
        ]
    if "costs.png" in names:
        lines += ["![Time and memory of both forms](costs.png)", ""]
    if len(costs):
        lines += [
            "| Data | Stage | Form | Seconds per epoch | Peak GiB |",
            "| --- | ---: | --- | ---: | ---: |",
            *(_cost_row(row) for row in costs.to_dict("records")),
            "",
        ]
    for setting in grid.settings:
        options = ", ".join(f"{name}={value!r}" for name, value in setting.options.items())
        lines += [f"Settings for {setting.dataset}: `LayerwiseCNNClassifier({options})`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _stage_row(row: dict[str, Any]) -> str:
    parts = [
        row["dataset"],
        row["kind"].replace("_", " "),
        str(row["m"]),
        str(int(row["stage"])) if row["stage"] else "",
        _number(row["train_accuracy"], "{:.2%}"),
        _number(row["test_accuracy"], "{:.2%}"),
        _number(row["relative_gap"], "{:.1e}"),
        _number(row["n_columns"], "{:.0f}"),
        _number(row["seconds"], "{:.1f}"),
        _number(row["epochs"], "{:.0f}"),
        _number(row["peak_gib"], "{:.1f}"),
        str(row["status"]),
    ]
    return f"| {' | '.join(parts)} |"


def _cost_row(row: dict[str, Any]) -> str:
    measured = row["status"] == "measured"
    seconds = _number(row["epoch_seconds"], "{:.3g}") if measured else row["status"]
    peak = _number(row["peak_gib"], "{:.2f}")
    return f"| {row['dataset']} | {row['stage']} | {_FORMS[row['form']]} | {seconds} | {peak} |"


def _number(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else form.format(value)
