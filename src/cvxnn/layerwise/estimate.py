"""Memory and work of every stage before anything is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cvxnn.layerwise.classifier import LayerwiseCNNClassifier
from cvxnn.layerwise.options import StageOptions, StageShape, read_sgd, read_stages, stage_shapes
from cvxnn.validation import check_integer

__all__ = ["layerwise_estimate"]


def layerwise_estimate(
    shape: Sequence[int], n: int, options: dict[str, Any] | None = None, *, n_outputs: int = 10
) -> list[dict[str, Any]]:
    """What every stage of a layerwise training will take.

    Parameters
    ----------
    shape : (C, H, W)
        Of the images.
    n : int
        Number of training images.
    options : dict, optional
        Parameters of :class:`LayerwiseCNNClassifier`; the others have their defaults.
    n_outputs : int
        Number of classes.

    Returns
    -------
    list of dict
        Per stage: stage, method, image_shape, map_shape, n_gates, columns, length (h), cells (a), and in bytes

        - gates_bytes: the patterns of all samples as bits,
        - images_bytes: the images of the stage, if they were all kept,
        - phi_bytes: pooled gated patches of all samples,
        - factors_bytes, blocks_bytes: the weights of (126) and of (23),
        - bm_batch_bytes, convex_batch_bytes: maps of one mini-batch in both forms by convolution,

        and in floating point operations of one epoch, forward and backward,

        - bm_flops, convex_flops: by convolution, (126) and (23), with the stages before it where their maps are
          computed again (with augmentation, or above 2 GiB),
        - bm_pooled_flops, convex_pooled_flops: from pooled patches that are there,
        - phi_flops: forming pooled patches once,
        - epochs.

    Raises
    ------
    InvalidInputError
        As :meth:`LayerwiseCNNClassifier.fit`.

    Examples
    --------
    >>> from cvxnn.layerwise import layerwise_estimate
    >>> first = layerwise_estimate((3, 32, 32), 50_000, {"n_stages": 1, "n_gates": 256})[0]
    >>> first["gates_bytes"], first["phi_bytes"], first["blocks_bytes"] // first["factors_bytes"]
    (1638400000, 5734400000, 16)
    """
    params = LayerwiseCNNClassifier(**(options or {})).get_params(deep=False)
    stages, sgd = read_stages(params), read_sgd(params)
    check_integer(n, "n")
    check_integer(n_outputs, "n_outputs", minimum=2)
    size = 8 if params["precision"] == "float64" else 4
    rows, earlier = [], 0
    for stage, sizes in zip(stages, stage_shapes(stages, shape, n_outputs), strict=True):
        row = _stage_row(stage, sizes, n, n_outputs, size, sgd.batch_size)
        kept = sgd.augment is None and (params["maps"] == "cached" or row["images_bytes"] <= 2**31)
        if stage.number > 1 and params["maps"] != "recomputed" and kept:
            earlier = 0
        for name in ("bm_flops", "convex_flops"):
            row[name] += n * earlier
        rows.append(row)
        K = math.prod(sizes.grid)
        gates = stage.n_gates if sgd.augment is not None else 0
        earlier += 2 * K * sizes.length * (sizes.out_channels + gates)
    return rows


def _stage_row(stage: StageOptions, sizes: StageShape, n: int, c: int, size: int, batch: int) -> dict[str, Any]:
    K, h, a, P = math.prod(sizes.grid), sizes.length, sizes.cells, stage.n_gates
    r = stage.rank * P if stage.method == "sgd" else sizes.columns
    # Forward, gradient of the weights, and gradient of the hidden outputs.
    per_column = 2 * K * h + 2 * K * a + 2 * a * c
    return {
        "stage": stage.number,
        "method": stage.method,
        "image_shape": (sizes.channels, sizes.height, sizes.width),
        "map_shape": (sizes.out_channels, *sizes.grid),
        "n_gates": P,
        "columns": r,
        "length": h,
        "cells": a,
        "gates_bytes": n * K * -(-P // 8),
        "images_bytes": n * sizes.channels * sizes.height * sizes.width * size,
        "phi_bytes": n * a * P * h * size,
        "factors_bytes": r * (h + a * c) * size,
        "blocks_bytes": P * h * a * c * size,
        "bm_batch_bytes": batch * K * (3 * r + P) * size,
        "convex_batch_bytes": batch * K * (3 * P * a * c + P) * size,
        "bm_flops": n * 2 * r * per_column,
        "convex_flops": n * 2 * P * a * c * (2 * K * h + 2 * K),
        "bm_pooled_flops": n * 4 * r * (a * h + a * c),
        "convex_pooled_flops": n * 4 * P * a * h * c,
        "phi_flops": n * 2 * K * P * h,
        "epochs": stage.epochs if stage.method == "sgd" else None,
    }
