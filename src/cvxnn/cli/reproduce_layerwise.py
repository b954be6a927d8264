"""What ``cvxnn reproduce layerwise`` has of its own: data sets, estimates, progress of epochs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cvxnn._version import __version__
from cvxnn.cli.report import Report
from cvxnn.errors import StorageError
from cvxnn.experiments.layerwise import LayerwiseCell, read_images, run_layerwise, with_changes
from cvxnn.experiments.layerwise_estimates import dry_run
from cvxnn.experiments.layerwise_settings import LayerwiseGrid
from cvxnn.layerwise.precision import tensor_float32
from cvxnn.validation import resolve_device

__all__ = ["check_data", "chosen_grid", "layerwise_runner", "say_estimates", "say_layerwise"]

_SECONDS_BETWEEN = 5.0
_WAYS = {"pooled": "from Phi", "convolved": "convolved", "solver": "solver", "end to end": ""}
#: About what convolutions reach on a data-centre GPU.
_GPU_RATE = 2e13


def chosen_grid(
    grid: LayerwiseGrid, dataset: str | None, stages: int | None, seed: int | None, data_dir: str | None
) -> tuple[LayerwiseGrid, str]:
    """The grid as asked for, and a note. A grid of few images falls back to the bundled digits where there are none."""
    if dataset == "digits" and grid.n_train:
        return with_changes(_with_digits(grid), None, stages, seed), ""
    grid = with_changes(grid, dataset, stages, seed)
    if grid.n_train and dataset is None and data_dir is None:
        try:
            read_images(grid.settings[0].dataset, None)
        except StorageError as error:
            return _with_digits(grid), f"The bundled digits are used: {error}"
    return grid, ""


def check_data(grid: LayerwiseGrid, data_dir: str | None) -> None:
    """Read the data sets, so that one that is not there is named before anything else is said."""
    for setting in grid.settings:
        read_images(setting.dataset, data_dir)


def _with_digits(grid: LayerwiseGrid) -> LayerwiseGrid:
    settings = (dataclasses.replace(grid.settings[0], dataset="digits"),)
    return dataclasses.replace(grid, settings=settings)


def layerwise_runner(data_dir: str | None, note: str, hidden: bool) -> Callable[..., list[dict[str, Any]]]:
    """:func:`run_layerwise` as the other studies are called; what an epoch has reached is printed now and then."""
    console = Console(stderr=True)
    last = 0.0

    def told(cell: LayerwiseCell, entry: dict[str, Any]) -> None:
        nonlocal last
        if hidden or time.perf_counter() - last < _SECONDS_BETWEEN:
            return
        last = time.perf_counter()
        known = {"epoch": "epoch {}", "iteration": "iteration {}", "loss": "loss {:.4g}", "relative_gap": "gap {:.1e}"}
        seen = [form.format(entry[name]) for name, form in known.items() if entry.get(name) is not None]
        console.print(f"{cell.label}  stage {entry.get('stage', '')}  {'  '.join(seen)}", highlight=False)

    def run(
        grid: LayerwiseGrid, folder: Path, *, resume: bool, jobs: int, backend: str, done: Any
    ) -> list[dict[str, Any]]:
        if note and not hidden:
            console.print(note, highlight=False)
        return run_layerwise(grid, folder, data_dir=data_dir, resume=resume, done=done, report=told)

    return run


def say_layerwise(report: Report, document: dict[str, Any]) -> None:
    """The accuracies of the last stages."""
    report.say()
    report.rows(
        [
            (
                f"{row['dataset']}, {row['kind'].replace('_', ' ')}, m = {row['m']}",
                f"train {row['train_accuracy']:.2%}, test {row['test_accuracy']:.2%}",
            )
            for row in document["final"]
        ]
    )


def say_estimates(report: Report, grid: LayerwiseGrid, note: str) -> int:
    """Print what a run would take on this machine, and on a GPU."""
    device = resolve_device("auto")
    rate = _matrix_rate(device)
    rows = dry_run(grid, rate, device)
    if note:
        report.say(note)
    report.say(f"Estimates at {rate / 1e9:.0f} GFLOP/s, the rate of a matrix product in float32 on this {device.type}:")
    report.say()
    report.rows(
        [
            (
                f"{row['dataset']} {row['kind']} m={row['m']} stage {row['stage']}",
                f"{row['memory_gib']:7.2f} GiB {row['hours']:9.2f} h  {_WAYS[row['way']]}",
            )
            for row in rows
        ]
    )
    hours = sum(row["hours"] for row in rows)
    report.say(f"\nTogether {hours:.2f} h; certificates, costs and the small CNN are not counted.")
    document = {"command": "reproduce", "version": __version__, "study": "layerwise", "rate": rate, "stages": rows}
    if device.type == "cpu":
        on_gpu = hours * rate / _GPU_RATE
        report.say(f"At {_GPU_RATE / 1e12:.0f} TFLOP/s, assumed for a GPU in TF32: {on_gpu:.2f} h.")
        document |= {"gpu_rate": _GPU_RATE, "gpu_hours": on_gpu}
    report.finish(document | {"hours": hours})
    return 0


def _matrix_rate(device: torch.device, size: int = 1500) -> float:
    """Floating-point operations per second of a matrix product in float32, on a GPU in TF32."""
    A = torch.randn(size, size, device=device)
    best = float("inf")
    with tensor_float32(True):
        for _ in range(4):
            begin = time.perf_counter()
            float((A @ A)[0, 0])
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
