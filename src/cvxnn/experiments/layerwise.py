"""Layerwise training beside end-to-end training (Figures 1 and 5), convex stages on a CPU, and costs (Figure 6)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cvxnn.errors import InvalidInputError
from cvxnn.experiments.layerwise_costs import measure_costs
from cvxnn.experiments.layerwise_end_to_end import epoch_file, train_end_to_end, train_small_cnn
from cvxnn.experiments.layerwise_settings import LayerwiseGrid, as_parameters
from cvxnn.experiments.sweep import CellStore
from cvxnn.images import IMAGE_SOURCES, load_images
from cvxnn.layerwise import LayerwiseCNNClassifier

__all__ = [
    "LAYERWISE_COLUMNS",
    "ImageSet",
    "LayerwiseCell",
    "layerwise_cells",
    "read_images",
    "run_layerwise",
    "with_changes",
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
    "drawn_gates",
    "n_gates",
    "n_columns",
    "channels",
    "seconds",
    "certify_seconds",
    "epochs",
    "peak_gib",
    "n_train",
    "n_test",
    "images",
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
        return as_parameters(dict(self.options))


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
    return [
        LayerwiseCell(
            kind, setting.dataset, m, grid.n_train, grid.n_test, tuple(sorted(setting.options.items())), grid.seed
        )
        for setting, kind, m in grid.cells()
    ]


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
    rows: list[dict[str, Any]] = []
    for cell in cells:
        outcome = store.load(cell) if resume else None
        found = outcome is not None
        if outcome is None:
            checkpoint = folder / f"{cell.label}-{store.fingerprint(cell)[:10]}"
            outcome = {"rows": _run_cell(cell, checkpoint, data_dir, resume, report, device)}
            store.save(cell, outcome)
            epoch_file(checkpoint).unlink(missing_ok=True)
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
    facts |= {"n_train": len(data.train), "n_test": len(data.test), "images": data.note}

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
    if any(stage.status == "interrupted" for stage in model.stages_):
        # The classifier keeps what it has after Ctrl-C; a study goes on from its checkpoint.
        raise KeyboardInterrupt
    tested = model.staged_score(data.test, data.test_labels)
    rows, gates = [], parameters["n_gates"]
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
                "drawn_gates": gates[stage.number - 1] if isinstance(gates, list) else gates,
                "n_gates": stage.n_gates,
                "n_columns": stage.n_columns,
                "channels": stage.channels,
                "seconds": stage.seconds,
                "certify_seconds": stage.certify_seconds,
                "epochs": stage.trace[-1].get("epoch", stage.trace[-1].get("iteration")) if stage.trace else 0,
                "peak_gib": stage.peak_bytes / 2**30,
                "total_seconds": trained,
            }
        )
    return rows


def with_changes(grid: LayerwiseGrid, dataset: str | None, n_stages: int | None, seed: int | None) -> LayerwiseGrid:
    """The grid for one data set, with another number of stages, or another seed.

    Raises
    ------
    InvalidInputError
        The grid does not have the data set, or that many stages, or the seed is out of range.
    """
    settings = grid.settings
    if dataset is not None:
        settings = tuple(setting for setting in settings if setting.dataset == dataset)
        if not settings:
            known = ", ".join(sorted({repr(setting.dataset) for setting in grid.settings}))
            raise InvalidInputError(f"--dataset is {dataset!r}; one of {known} is wanted at this scale")
    if n_stages is not None:
        settings = tuple(setting.shortened(n_stages) for setting in settings)
    if seed is not None and not 0 <= seed < 2**32:
        raise InvalidInputError(f"--seed is {seed}; a number from 0 to {2**32 - 1} is wanted")
    return dataclasses.replace(grid, settings=settings, seed=grid.seed if seed is None else seed)
