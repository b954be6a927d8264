"""The page, tables and pictures of the layerwise study."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cvxnn._version import __version__
from cvxnn.experiments.layerwise import LAYERWISE_COLUMNS
from cvxnn.experiments.layerwise_claims import CERTIFIED, layerwise_claims
from cvxnn.experiments.layerwise_settings import LayerwiseGrid
from cvxnn.experiments.pages import write_page
from cvxnn.files import write_atomically
from cvxnn.plotting import COLOURS, MARKERS, panels, write_figure

__all__ = ["layerwise_summary", "uncertified", "write_layerwise_report"]

_FORMS = {"convex": "convex form (23)", "bm": "factors (126), convolved", "phi": "factors (126), from Phi"}


def layerwise_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is computed from the rows, for JSON."""
    frame = _trainings(rows)
    last = frame.groupby(["dataset", "kind", "m"], sort=False).tail(1)
    return {"claims": layerwise_claims(frame, _costs(rows)), "final": last[list(_FINAL)].to_dict("records")}


def uncertified(claims: list[dict[str, Any]]) -> str:
    """Where convex stages are above the tolerance, as a sentence; empty where none is."""
    names = [claim["name"].split(":")[0] for claim in claims if _is_missed(claim)]
    return (
        f"convex stages are not certified to {CERTIFIED:g} on {', '.join(names)}; stages.csv says which"
        if names
        else ""
    )


def _is_missed(claim: dict[str, Any]) -> bool:
    return claim["name"].endswith("convex stages certified") and claim["verdict"] != "held"


COST_COLUMNS = ("dataset", "stage", "form", "epoch_seconds", "peak_gib", "map_channels", "n_gates", "status")
_FINAL = ("dataset", "kind", "m", "stage", "train_accuracy", "test_accuracy", "seconds")


def _trainings(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([row for row in rows if row["kind"] != "costs"])
    return frame.reindex(columns=list(dict.fromkeys([*LAYERWISE_COLUMNS, *frame.columns]))).fillna({"stage": 0})


def _costs(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([row for row in rows if row["kind"] == "costs"])
    return frame.reindex(columns=list(COST_COLUMNS))


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
    write_page(folder / "report.md", text)
    return names


def _draw_accuracy(frame: pd.DataFrame, path: Path) -> None:
    """Figure 1 (test) and Figure 5 (training): accuracy after every stage, a row per data set."""
    datasets = list(dict.fromkeys(frame["dataset"]))
    figure, grid = panels(len(datasets), 2, 4.4, 3.4)
    for line, dataset in zip(grid, datasets, strict=True):
        part = frame[frame["dataset"] == dataset]
        for axes, split in zip(line, ("test", "train"), strict=True):
            _draw_split(axes, part, f"{split}_accuracy")
            axes.set_title(f"{dataset.replace('_', '-')}, {'test' if split == 'test' else 'training'} images")
            axes.set_xlabel("stage")
            axes.set_ylabel("accuracy (%)")
            axes.set_xticks(sorted(set(part["stage"].astype(int)) - {0}) or [1])
        line[0].legend(fontsize=7)
    write_figure(figure, path)


def _draw_split(axes: Any, part: pd.DataFrame, value: str) -> None:
    """Layerwise trainings as lines over the stages, networks trained end to end as levels."""
    colours = {m: COLOURS[i] for i, m in enumerate(sorted(set(part["m"])))}
    for (kind, m), line in part.groupby(["kind", "m"], sort=False):
        if kind in ("layerwise", "convex"):
            label = "convex" if kind == "convex" else f"layerwise, m = {m}"
            marker = MARKERS[list(colours).index(m)]
            axes.plot(line["stage"], 100 * line[value], color=colours[m], marker=marker, label=label)
            continue
        small = kind == "small_cnn"
        axes.axhline(
            100 * line[value].iloc[-1],
            color=COLOURS[5] if small else colours[m],
            linestyle="--" if small else ":",
            label="small CNN, end to end" if small else f"end to end, m = {m}",
        )


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
    images = "all images" if grid.n_train == 0 else f"{grid.n_train} training and {grid.n_test} test images at most"
    lines = [
        "# Layerwise training",
        "",
        f"cvxnn {__version__}, torch {torch.__version__}, {_machine()}; {images}, seed {grid.seed}.",
        "",
        *(f"{dataset}: {note}.\n" for dataset, note in _notes(rows).items()),
        "| Claim | Verdict | Found | Rule |",
        "| --- | --- | --- | --- |",
        *(
            f"| {claim['name']} | {claim['verdict']} | {claim['found']} | {claim['rule']} |"
            for claim in layerwise_claims(frame, costs)
        ),
        "",
    ]
    if len(frame):
        lines += [
            "## Accuracy",
            "",
            "![Accuracy after every stage](accuracy.png)",
            "",
            "| Data | Training | m | Stage | Training | Test | Gap | Columns | Seconds | Epochs | Peak GiB | Status |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *(_stage_row(row) for row in frame.to_dict("records")),
            "",
            "Gaps are relative, and those of a stage's problem given the stages before it. Seconds are those of the "
            "stage; the certificate of a stage that SGD trained takes the seconds in stages.csv. Epochs are iterations "
            "where the stage is convex. Peak memory is that of the stage with its certificate: allocated on a GPU, "
            "otherwise resident, with Python, the data and what earlier trainings left. Networks that are trained end "
            "to end have ReLU, the channels of the stages, the first step for all layers, and one training of as many "
            "epochs as a stage.",
            "",
        ]
    if len(costs):
        lines += [
            "## Costs",
            "",
            *(["![Time and memory of both forms](costs.png)", ""] if "costs.png" in names else []),
            "| Data | Stage | Form | Seconds per epoch | Peak GiB | Channels of its map |",
            "| --- | ---: | --- | ---: | ---: | ---: |",
            *(_cost_row(row) for row in costs.to_dict("records")),
            "",
            "Steps of SGD with momentum on batches of 128, m = 1, in float32 (TF32 on a GPU), from a few batches, on "
            "random images of the sizes that the stages have; memory is what a new process takes in addition. The "
            "convex form sees the same images as the factors. As its own feature map it would have P a c channels, "
            "which is why it cannot be trained layerwise.",
            "",
        ]
    for setting in grid.settings:
        options = ", ".join(f"{name}={value!r}" for name, value in setting.parameters().items())
        lines += [f"Settings for {setting.dataset}: `LayerwiseCNNClassifier({options})`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} CPU threads"


def _notes(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What has to be said of the images of each data set."""
    return {row["dataset"]: row["images"] for row in rows if row.get("images")}


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
    return f"| {row['dataset']} | {row['stage']} | {_FORMS[row['form']]} | {seconds} | {peak} | {row['map_channels']} |"


def _number(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else form.format(value)
