"""Options of all stages from what a user gives: one value for all, or one per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cvxnn.errors import InvalidInputError
from cvxnn.layerwise.augment import AUGMENT
from cvxnn.layerwise.maps import MAPS
from cvxnn.layerwise.reduction import Reduction, stage_pooling
from cvxnn.operators import PatchGeometry
from cvxnn.validation import check_choice, check_flag, check_integer, check_pair, check_positive

__all__ = [
    "METHODS",
    "PRECISIONS",
    "SgdOptions",
    "StageOptions",
    "StageShape",
    "read_sgd",
    "read_stages",
    "stage_shapes",
    "with_gaps",
]

METHODS = ("sgd", "convex")
PRECISIONS = ("float32", "float64", "mixed")
#: Step of the first stage and of those after it, where none is given (C.2, CIFAR-10).
FIRST_STEP, LATER_STEP = 1e-1, 1e-2
_DEFAULT_LOSS = {"sgd": "cross_entropy", "convex": "squared"}
_GATE_QUANTILE = 0.7


@dataclass(frozen=True)
class StageOptions:
    """What one stage is; `number` counts from 1. Fields are those of :class:`LayerwiseCNNClassifier`.

    `gap`, the rows of zeros between an image and its mirror image, depends on the images: see :func:`with_gaps`.
    """

    number: int
    n_gates: int
    rank: int
    geometry: PatchGeometry
    pooling: Any
    downsample: bool
    method: str
    width: int | None
    loss: str
    beta: float
    tol: float
    max_iter: int | None
    step: float
    epochs: int
    gate_sampling: str
    gate_quantile: Any
    output_bias: bool
    normalize: bool
    reduction: Reduction
    gap: int = field(default=0, repr=False)


@dataclass(frozen=True)
class SgdOptions:
    """What all stages that are trained by SGD share."""

    batch_size: int
    momentum: float
    decay: float
    decay_every: int
    augment: str | None
    features: str


@dataclass(frozen=True)
class StageShape:
    """Sizes of one stage: images (C, H, W) after downsampling, rows of H that are the gap between an image and its
    mirror image, map, length of a patch, cells, columns, channels."""

    channels: int
    height: int
    width: int
    gap: int
    grid: tuple[int, int]
    length: int
    cells: int
    columns: int
    out_channels: int


def _per_stage(value: Any, name: str, n_stages: int, listed: bool) -> list[Any]:
    """One value per stage; `listed` tells that the value is a sequence with an entry per stage."""
    if not listed:
        return [value] * n_stages
    if len(value) != n_stages:
        raise InvalidInputError(f"{name} has {len(value)} entries; {n_stages}, one per stage, are wanted")
    return list(value)


def _scalars(value: Any, name: str, n_stages: int) -> list[Any]:
    return _per_stage(value, name, n_stages, isinstance(value, (list, tuple, np.ndarray)))


def _pairs(value: Any, name: str, n_stages: int) -> list[Any]:
    """A tuple of two integers is a pair for all stages, a list (or a tuple of pairs) has an entry per stage."""
    nested = isinstance(value, tuple) and any(isinstance(part, (tuple, list, np.ndarray)) for part in value)
    return _per_stage(value, name, n_stages, isinstance(value, list) or nested)


def read_stages(params: dict[str, Any]) -> list[StageOptions]:
    """The options of every stage from the parameters of the estimator.

    Raises
    ------
    InvalidInputError
        A wrong value, or a sequence with another number of entries than there are stages.
    """
    n = check_integer(params["n_stages"], "n_stages")
    hidden_bias = check_flag(params["hidden_bias"], "hidden_bias")
    output_bias = check_flag(params["output_bias"], "output_bias")
    downsample = _downsample(params["downsample"], n)
    double = check_flag(params["double_gates"], "double_gates")
    names = ("n_gates", "rank", "method", "width", "loss", "beta", "tol", "max_iter", "epochs", "gate_sampling")
    lists = {name: _scalars(params[name], name, n) for name in names}
    lists |= {name: _pairs(params[name], name, n) for name in ("filter_size", "stride", "padding", "pooling")}
    lists["gate_quantile"] = _per_stage(
        params["gate_quantile"], "gate_quantile", n, isinstance(params["gate_quantile"], list)
    )
    lists["map_pooling"] = _pairs(params["map_pooling"], "map_pooling", n)
    mirror = check_flag(params["mirror"], "mirror")
    lists["normalize"] = _scalars(params["normalize"], "normalize", n)
    default = [FIRST_STEP, *[LATER_STEP] * (n - 1)]
    lists["step"] = default if params["step"] is None else _scalars(params["step"], "step", n)
    stages = []
    for i in range(n):
        given = {name: values[i] for name, values in lists.items()}
        factor = 2 ** sum(number <= i + 1 for number in downsample) if double else 1
        method = check_choice(given["method"], "method", METHODS)
        geometry = PatchGeometry(
            check_pair(given["filter_size"], "filter_size", 1),
            check_pair(given["stride"], "stride", 1),
            check_pair(given["padding"], "padding", 0),
            hidden_bias,
        )
        quantile = given["gate_quantile"]
        if isinstance(quantile, str):
            check_choice(quantile, "gate_quantile", ("auto",))
            quantile = _GATE_QUANTILE if hidden_bias else None
        normalize = given["normalize"]
        stages.append(
            StageOptions(
                number=i + 1,
                n_gates=factor * check_integer(given["n_gates"], "n_gates"),
                rank=check_integer(given["rank"], "rank"),
                geometry=geometry,
                pooling=given["pooling"],
                downsample=i + 1 in downsample,
                method=method,
                width=check_integer(given["width"], "width", allow_none=True),
                loss=_DEFAULT_LOSS[method] if given["loss"] is None else given["loss"],
                beta=check_positive(given["beta"], "beta"),
                tol=check_positive(given["tol"], "tol", allow_zero=True),
                max_iter=check_integer(given["max_iter"], "max_iter", allow_none=True),
                step=check_positive(given["step"], "step"),
                epochs=check_integer(given["epochs"], "epochs"),
                gate_sampling=given["gate_sampling"],
                gate_quantile=quantile,
                output_bias=output_bias,
                normalize=method == "convex" if isinstance(normalize, str) else check_flag(normalize, "normalize"),
                reduction=Reduction(mirror, *_map_pooling(given["map_pooling"])),
            )
        )
        if isinstance(normalize, str):
            check_choice(normalize, "normalize", ("auto",))
    return stages


def _map_pooling(value: Any) -> tuple[int, int]:
    """Size and stride of an average pooling; a number is both, None is no pooling."""
    return (1, 1) if value is None else check_pair(value, "map_pooling", 1)


def _downsample(value: Any, n_stages: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, (int, np.integer)) else value
    if not isinstance(numbers, (Sequence, np.ndarray)) or isinstance(numbers, str):
        raise InvalidInputError(f"downsample is {value!r}; numbers of stages from 1 to {n_stages} are wanted")
    for number in numbers:
        whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        if not whole or not 1 <= number <= n_stages:
            raise InvalidInputError(f"downsample is {value!r}; numbers of stages from 1 to {n_stages} are wanted")
    return tuple(sorted({int(number) for number in numbers}))


def read_sgd(params: dict[str, Any]) -> SgdOptions:
    """The options that SGD shares over the stages.

    Raises
    ------
    InvalidInputError
        A wrong value.
    """
    momentum = check_positive(params["momentum"], "momentum", allow_zero=True)
    if momentum >= 1:
        raise InvalidInputError(f"momentum is {params['momentum']!r}; a number in [0, 1) is wanted")
    decay = check_positive(params["decay"], "decay")
    if decay > 1:
        raise InvalidInputError(f"decay is {params['decay']!r}; a number in (0, 1] is wanted")
    if params["augment"] is not None:
        check_choice(params["augment"], "augment", AUGMENT)
    check_choice(params["maps"], "maps", MAPS)
    check_choice(params["features"], "features", ("auto", "cached", "convolved"))
    if params["augment"] is not None and (params["mirror"] or params["standardize"] == "image"):
        raise InvalidInputError(
            f"augment is {params['augment']!r}; with mirror=True or standardize='image' images are not augmented"
        )
    if params["augment"] is not None and "sgd" not in np.atleast_1d(params["method"]):
        raise InvalidInputError(f"augment is {params['augment']!r}; it is for stages trained by 'sgd'")
    if params["features"] == "cached" and params["augment"] is not None:
        raise InvalidInputError("features is 'cached', but augmented images change from epoch to epoch; use 'auto'")
    return SgdOptions(
        check_integer(params["batch_size"], "batch_size"),
        momentum,
        decay,
        check_integer(params["decay_every"], "decay_every"),
        params["augment"],
        params["features"],
    )


def stage_shapes(stages: list[StageOptions], image_shape: Sequence[int], n_outputs: int) -> list[StageShape]:
    """Sizes of every stage for images (C, H, W); widths that a solution decides are taken at their most.

    Raises
    ------
    InvalidInputError
        Maps that cannot be downsampled, or filters or pooling that do not fit.
    """
    channels, height, width = (int(size) for size in image_shape)
    mirror = stages[0].reduction.mirror
    copies = 2 if mirror else 1
    height = copies * height
    shapes = []
    for stage in stages:
        if stage.downsample:
            if height % (2 * copies) or width % 2:
                raise InvalidInputError(
                    f"downsample has stage {stage.number}, whose maps are {height // copies} x "
                    f"{width}; even sizes are wanted"
                )
            channels, height, width = 4 * channels, height // 2, width // 2
        gap = stage.reduction.gap(stage.geometry, height // copies)
        height += gap
        grid = stage.geometry.grid(height, width)
        cells = len(stage_pooling(stage.pooling, stage.geometry, height, width, mirror, gap))
        length = stage.geometry.length(channels)
        rank = stage.rank if stage.method == "sgd" else min(length, cells * n_outputs)
        columns = rank * stage.n_gates
        out = columns if stage.width is None else min(stage.width, columns)
        shapes.append(StageShape(channels, height, width, gap, grid, length, cells, columns, out))
        channels, (height, width) = out, stage.reduction.grid(stage.geometry, height, width, gap)
    return shapes


def with_gaps(stages: list[StageOptions], image_shape: Sequence[int], n_outputs: int) -> list[StageOptions]:
    """The stages with the gaps that they need for images (C, H, W).

    Raises
    ------
    InvalidInputError
        As :func:`stage_shapes`.
    """
    shapes = stage_shapes(stages, image_shape, n_outputs)
    return [replace(stage, gap=sizes.gap) for stage, sizes in zip(stages, shapes, strict=True)]
