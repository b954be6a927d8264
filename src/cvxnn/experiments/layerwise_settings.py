"""The settings of the layerwise study: those of the paper (C.2), a quick one, and convex recipes for a CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cvxnn.errors import InvalidInputError

__all__ = ["LAYERWISE_SCALES", "PAPER_ACCURACY", "PAPER_STAGES", "LayerwiseGrid", "Setting", "as_parameters"]

#: Test accuracies that the paper reports for layerwise training (section 4.2), in percent, by data set and m.
PAPER_ACCURACY = {
    ("fashion_mnist", 1): 91.5,
    ("fashion_mnist", 2): 91.4,
    ("fashion_mnist", 4): 91.6,
    ("cifar10", 1): 80.9,
    ("cifar10", 2): 81.1,
    ("cifar10", 4): 81.5,
}
#: Stages after which it does.
PAPER_STAGES = {"fashion_mnist": 3, "cifar10": 5}


@dataclass(frozen=True)
class Setting:
    """What is trained on one data set.

    Attributes
    ----------
    dataset : str
    kinds : tuple of str
        Of "layerwise" and "end_to_end" (for every rank), "convex", "small_cnn" and "costs".
    options : dict
        Parameters of :class:`cvxnn.LayerwiseCNNClassifier`.
    ranks : tuple of int
        Columns m per gate.
    """

    dataset: str
    kinds: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (1, 2, 4)

    def parameters(self) -> dict[str, Any]:
        """The options as keyword arguments."""
        return as_parameters(self.options)

    def shortened(self, n_stages: int) -> Setting:
        """The first stages only."""
        most = self.options["n_stages"]
        if not 1 <= n_stages <= most:
            raise InvalidInputError(f"--stages is {n_stages}; a number from 1 to {most} is wanted for {self.dataset!r}")
        options = {
            name: value[:n_stages] if isinstance(value, tuple) and name in _PER_STAGE and len(value) == most else value
            for name, value in self.options.items()
        }
        if "downsample" in options:
            options["downsample"] = tuple(stage for stage in options["downsample"] if stage <= n_stages)
        return dataclasses.replace(self, options=options | {"n_stages": n_stages})


#: Options that may have an entry per stage; these are tuples here, and lists for the classifier.
_PER_STAGE = ("n_gates", "filter_size", "padding", "pooling", "map_pooling", "gate_quantile", "beta", "step", "width")


def as_parameters(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a setting as keyword arguments of :class:`cvxnn.LayerwiseCNNClassifier`."""
    return {
        name: list(value) if name in _PER_STAGE and isinstance(value, tuple) else value
        for name, value in options.items()
    }


@dataclass(frozen=True)
class LayerwiseGrid:
    """The grid of the study; `n_train` and `n_test` images of each data set, 0 for all."""

    settings: tuple[Setting, ...]
    n_train: int = 0
    n_test: int = 0
    seed: int = 0

    def cells(self) -> list[tuple[Setting, str, int]]:
        """Setting, kind and rank of everything that is computed."""
        return [
            (setting, kind, m)
            for setting in self.settings
            for kind in setting.kinds
            for m in (setting.ranks if kind in ("layerwise", "end_to_end") else (1,))
        ]


_KINDS = ("layerwise", "end_to_end", "costs")
_PAPER_FASHION = {"n_stages": 3, "n_gates": 256, "step": (2e-1, 5e-2, 5e-3), "precision": "mixed"}
_PAPER_CIFAR = {
    "n_stages": 5,
    "n_gates": 256,
    "step": (1e-1, 1e-2, 1e-2, 1e-2, 1e-2),
    "downsample": (3, 4),
    "augment": "crop_flip",
    "precision": "mixed",
}
_SHORT = {"n_stages": 2, "n_gates": 16, "epochs": 8, "decay_every": 3, "batch_size": 32}
_MIXED_QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9)
_CONVEX = {"method": "convex", "tol": 1e-3, "gate_sampling": "kmeans", "mirror": True, "precision": "float64"}
_CONVEX_FASHION = _CONVEX | {
    "n_stages": 2,
    "n_gates": (28, 22),
    "filter_size": (5, 1),
    "padding": (2, 0),
    "pooling": ((5, 5), (3, 3)),
    "gate_quantile": (0.5, _MIXED_QUANTILES),
    "map_pooling": ((4, 1), None),
    "width": 64,
    "beta": (1e-4, 5e-5),
}
_CONVEX_CIFAR = _CONVEX | {
    "n_stages": 2,
    "n_gates": (56, 38),
    "filter_size": (3, 1),
    "padding": 0,
    "pooling": ((3, 3), (3, 3)),
    "gate_quantile": (_MIXED_QUANTILES, _MIXED_QUANTILES),
    "map_pooling": ((5, 1), None),
    "width": 48,
    "beta": (6e-5, 2e-4),
    "standardize": "image",
    "features": "cached",
}

#: Grids by the name of ``--scale``.
LAYERWISE_SCALES: dict[str, LayerwiseGrid] = {
    "quick": LayerwiseGrid(
        (
            Setting(
                "fashion_mnist",
                _KINDS,
                _PAPER_FASHION | _SHORT | {"step": (2e-1, 5e-2), "precision": "float32"},
            ),
        ),
        n_train=2000,
        n_test=2000,
    ),
    "paper": LayerwiseGrid(
        (Setting("fashion_mnist", _KINDS, _PAPER_FASHION), Setting("cifar10", _KINDS, _PAPER_CIFAR))
    ),
    "convex": LayerwiseGrid(
        (
            Setting("fashion_mnist", ("convex", "small_cnn"), _CONVEX_FASHION),
            Setting("cifar10", ("convex", "small_cnn"), _CONVEX_CIFAR),
        )
    ),
}
