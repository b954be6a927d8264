"""Layerwise training beside end-to-end training (Figures 1 and 5), convex stages on a CPU, and costs (Figure 6)."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cvxnn.errors import InvalidInputError
from cvxnn.experiments.layerwise_costs import measure_costs
from cvxnn.experiments.layerwise_end_to_end import train_end_to_end, train_small_cnn
from cvxnn.experiments.layerwise_settings import LayerwiseGrid
from cvxnn.experiments.sweep import CellStore
from cvxnn.images import IMAGE_SOURCES, load_images
from cvxnn.layerwise import LayerwiseCNNClassifier, layerwise_estimate

__all__ = [
    "LAYERWISE_COLUMNS",
    "ImageSet",
    "LayerwiseCell",
    "dry_run",
    "layerwise_cells",
    "read_images",
    "run_layerwise",
]

LAYERWISE_COLUMNS = (
    "dataset",
    "kind",
    "m",
    "stage",
    "status",
    "train_accuracy",
    "test_accuracy",
    "relative_gap",
    "objective",
    "lower_bound",
    "n_gates",
    "n_columns",
    "channels",
    "seconds",
    "certify_seconds",
    "epochs",
    "peak_gib",
    "n_train",
    "n_test",
)


@dataclass(frozen=True)
class LayerwiseCell:
    """One training, or one measurement of costs: everything that determines it (but the times).

    `options` are parameters of :class:`LayerwiseCNNClassifier` as pairs, lists as tuples.
    """

    kind: str
    dataset: str
    m: int
    n_train: int
    n_test: int
    options: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def label(self) -> str:
        """Short name."""
        return f"{self.dataset}-{self.kind}-m{self.m}-n{self.n_train}"

    def parameters(self) -> dict[str, Any]:
        """The options as keyword arguments."""
        return {
            name: list(value) if name in _LISTS and isinstance(value, tuple) else value for name, value in self.options
        }


#: Options whose tuples stand for lists with an entry per stage.
_LISTS = ("n_gates", "filter_size", "padding", "pooling", "map_pooling", "gate_quantile", "beta", "step", "width")


@dataclass
class ImageSet:
    """Images (n, C, H, W), 8-bit, and labels of the two splits."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    note: str

    def first(self, n_train: int, n_test: int) -> ImageSet:
        """The first images of each split; 0 for all."""
        a, b = n_train or len(self.train), n_test or len(self.test)
        return ImageSet(self.train[:a], self.train_labels[:a], self.test[:b], self.test_labels[:b], self.note)


@cache
def read_images(dataset: str, data_dir: str | None) -> ImageSet:
    """A data set from its official files, or the bundled digits.

    Raises
    ------
    InvalidInputError
        The data set is not known.
    StorageError
        Its files are not there; the message says where they are looked for and how to get them.
    """
    if dataset == "digits":
        data = load_digits()
        images = np.round(data.images[:, None] * 255 / 16).astype(np.uint8)
        parts = train_test_split(images, data.target, test_size=0.25, stratify=data.target, random_state=0)
        return ImageSet(parts[0], parts[2], parts[1], parts[3], "the bundled 8 x 8 digits")
    if dataset not in IMAGE_SOURCES:
        known = ", ".join(map(repr, ("digits", *IMAGE_SOURCES)))
        raise InvalidInputError(f"--dataset is {dataset!r}; one of {known} is wanted")
    train, test = load_images(dataset, "train", data_dir), load_images(dataset, "test", data_dir)
    return ImageSet(train.images, train.labels, test.images, test.labels, train.note)


def layerwise_cells(grid: LayerwiseGrid) -> list[LayerwiseCell]:
    """All trainings and measurements of a grid."""
    cells = []
    for setting in grid.settings:
        common = (setting.dataset, grid.n_train, grid.n_test)
        for kind in setting.kinds:
            for m in setting.ranks if kind in ("layerwise", "end_to_end") else (1,):
                options = tuple(sorted(setting.options.items()))
                cells.append(LayerwiseCell(kind, common[0], m, common[1], common[2], options, grid.seed))
    return cells


def run_layerwise(
    grid: LayerwiseGrid,
    folder: Path,
    *,
    data_dir: str | None = None,
    resume: bool = False,
    done: Callable[[LayerwiseCell, bool], None] | None = None,
    report: Callable[[LayerwiseCell, dict[str, Any]], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Rows of all cells, one for each stage of each training; one cell after the other, on all cores.

    Parameters
    ----------
    grid : LayerwiseGrid
    folder : Path
        For the files of finished cells, and the checkpoints of the others, written after every epoch.
    data_dir : str, optional
        Folder of the data sets, as for :func:`cvxnn.images.load_images`.
    resume : bool
        Take finished cells, and go on with unfinished ones at the epoch where they were.
    done, report : callables, optional
        Called with each finished cell and whether it was there already; with each epoch.
    device : {"auto", "cpu", "cuda"}

    Returns
    -------
    list of dict
        With the keys ``LAYERWISE_COLUMNS``; rows of costs have further ones.
    """
    store = CellStore(folder)
    cells = layerwise_cells(grid)
    for dataset in {cell.dataset for cell in cells}:
        read_images(dataset, data_dir)  # refused before anything is computed
    rows: list[dict[str, Any]] = []
    for cell in cells:
        outcome = store.load(cell) if resume else None
        found = outcome is not None
        if outcome is None:
            checkpoint = folder / f"{cell.label}-{store.fingerprint(cell)[:10]}"
            outcome = {"rows": _run_cell(cell, checkpoint, data_dir, resume, report, device)}
            store.save(cell, outcome)
        rows += outcome["rows"]
        if done is not None:
            done(cell, found)
    return rows


def _run_cell(
    cell: LayerwiseCell,
    checkpoint: Path,
    data_dir: str | None,
    resume: bool,
    report: Callable[[LayerwiseCell, dict[str, Any]], None] | None,
    device: str,
) -> list[dict[str, Any]]:
    data = read_images(cell.dataset, data_dir).first(cell.n_train, cell.n_test)
    parameters = cell.parameters()
    facts = {"dataset": cell.dataset, "kind": cell.kind, "m": cell.m}
    facts |= {"n_train": len(data.train), "n_test": len(data.test)}

    def told(entry: dict[str, Any]) -> None:
        if report is not None:
            report(cell, entry)

    if cell.kind == "costs":
        return [facts | row for row in measure_costs(data.train, parameters, cell.seed, device)]
    arrays = data.train, data.train_labels, data.test, data.test_labels
    if cell.kind == "small_cnn":
        return [facts | row for row in train_small_cnn(*arrays, seed=cell.seed, device=device, report=told)]
    if cell.kind == "end_to_end":
        row = train_end_to_end(
            *arrays,
            parameters,
            cell.m,
            seed=cell.seed,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
            report=told,
        )
        return [facts | row]
    model = LayerwiseCNNClassifier(
        **parameters,
        rank=cell.m,
        checkpoint=checkpoint,
        resume=resume,
        callbacks=(told,),
        random_state=cell.seed,
        device=device,
    )
    begin = time.perf_counter()
    model.fit(data.train, data.train_labels)
    trained = time.perf_counter() - begin
    tested = model.staged_score(data.test, data.test_labels)
    rows = []
    for stage, accuracy in zip(model.stages_, tested, strict=True):
        certificate = stage.certificate
        rows.append(
            facts
            | {
                "stage": stage.number,
                "status": stage.status,
                "train_accuracy": stage.accuracy,
                "test_accuracy": accuracy,
                "relative_gap": None if certificate is None else certificate.relative_gap,
                "objective": None if certificate is None else certificate.primal,
                "lower_bound": None if certificate is None else certificate.lower_bound,
                "n_gates": stage.n_gates,
                "n_columns": stage.n_columns,
                "channels": stage.channels,
                "seconds": stage.seconds,
                "certify_seconds": stage.certify_seconds,
                "epochs": len(stage.trace),
                "peak_gib": peak_gib(),
                "total_seconds": trained,
            }
        )
    return rows


def peak_gib() -> float:
    """The most memory of this process so far, in GiB: of the GPU where one is used, otherwise resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def dry_run(grid: LayerwiseGrid, rate: float) -> list[dict[str, Any]]:
    """Estimated memory and time of every stage.

    Parameters
    ----------
    grid : LayerwiseGrid
    rate : float
        Floating-point operations per second.
    """
    rows = []
    for cell in layerwise_cells(grid):
        if cell.kind not in ("layerwise", "convex"):
            continue
        n, shape = _SIZES[cell.dataset]
        n = cell.n_train or n
        for row in layerwise_estimate(shape, n, cell.parameters() | {"rank": cell.m}):
            features = row["n_gates"] * row["length"] * row["cells"]
            pooled = row["bm_pooled_flops"] < row["bm_flops"] and row["phi_bytes"] < 2**34
            kept = row["images_bytes"] if row["stage"] == 1 or row["images_bytes"] <= 2**31 else 0
            if row["epochs"] is None:
                flops = 2 * row["phi_flops"] + n * features**2 + features**3
                memory = 2 * features**2 * 8 + row["gates_bytes"] + kept
            else:
                flops = row["epochs"] * (row["bm_pooled_flops"] if pooled else row["bm_flops"]) + row["phi_flops"]
                memory = row["gates_bytes"] + kept + row["bm_batch_bytes"]
                memory += row["phi_bytes"] if pooled else 0
            rows.append(
                {
                    "dataset": cell.dataset,
                    "kind": cell.kind,
                    "m": cell.m,
                    **row,
                    "memory_gib": memory / 2**30,
                    "hours": flops / rate / 3600,
                }
            )
    return rows


#: Training images and shapes, for estimates without the data.
_SIZES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "digits": (1347, (1, 8, 8)),
    "fashion_mnist": (60_000, (1, 28, 28)),
    "cifar10": (50_000, (3, 32, 32)),
}


def with_changes(grid: LayerwiseGrid, dataset: str | None, n_stages: int | None, seed: int | None) -> LayerwiseGrid:
    """The grid for one data set, with another number of stages, or another seed.

    Raises
    ------
    InvalidInputError
        The grid does not have the data set, or that many stages.
    """
    settings = grid.settings
    if dataset is not None:
        settings = tuple(setting for setting in settings if setting.dataset == dataset)
        if not settings:
            known = ", ".join(sorted({repr(setting.dataset) for setting in grid.settings}))
            raise InvalidInputError(f"--dataset is {dataset!r}; one of {known} is wanted at this scale")
    if n_stages is not None:
        settings = tuple(setting.shortened(n_stages) for setting in settings)
    return dataclasses.replace(grid, settings=settings, seed=grid.seed if seed is None else seed)
