"""Memory and time of the layerwise study before it is run."""

from __future__ import annotations

import math
from typing import Any

import torch

from cvxnn.experiments.layerwise_settings import LayerwiseGrid
from cvxnn.layerwise import layerwise_estimate
from cvxnn.layerwise.features import POOLED_SHARE
from cvxnn.memory import available_bytes

__all__ = ["dry_run"]

#: Training images and shapes, so that the data are not needed.
_SIZES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "digits": (1347, (1, 8, 8)),
    "fashion_mnist": (60_000, (1, 28, 28)),
    "cifar10": (50_000, (3, 32, 32)),
}
#: What of the maps of earlier stages is kept with ``maps="auto"``.
_KEPT_BYTES = 2**31


def dry_run(grid: LayerwiseGrid, rate: float, device: torch.device) -> list[dict[str, Any]]:
    """Estimated memory and time of every stage, and of the networks trained end to end.

    Parameters
    ----------
    grid : LayerwiseGrid
    rate : float
        Floating-point operations per second.
    device : torch.device
        Whether pooled patches are kept depends on its free memory.

    Returns
    -------
    list of dict
        The rows of :func:`cvxnn.layerwise.layerwise_estimate` with dataset, kind, m, way ("pooled" patches,
        "convolved", or the "solver"), memory_gib and hours.
    """
    rows: list[dict[str, Any]] = []
    for setting, kind, m in grid.cells():
        if kind not in ("layerwise", "convex", "end_to_end"):
            continue
        n, shape = _SIZES[setting.dataset]
        n = min(n, grid.n_train or n)
        parameters = setting.parameters() | {"rank": m}
        estimates = layerwise_estimate(shape, n, parameters)
        facts = {"dataset": setting.dataset, "kind": kind, "m": m}
        if kind == "end_to_end":
            rows.append(facts | _end_to_end(estimates, parameters, n, rate))
            continue
        raw = estimates[0]["images_bytes"]
        augmented = parameters.get("augment") is not None
        for row in estimates:
            way, memory, flops = _stage(row, n, augmented, POOLED_SHARE * available_bytes(device))
            memory += raw if row["stage"] > 1 else 0
            rows.append(facts | row | {"way": way, "memory_gib": memory / 2**30, "hours": flops / rate / 3600})
    return rows


def _stage(row: dict[str, Any], n: int, augmented: bool, free: float) -> tuple[str, float, float]:
    """How a stage is computed, its bytes, and its floating-point operations."""
    memory = row["gates_bytes"]
    if row["stage"] == 1 or row["images_bytes"] <= _KEPT_BYTES:
        memory += row["images_bytes"]
    if row["epochs"] is None:
        features = row["n_gates"] * row["length"] * row["cells"]
        # The Gram matrix of the features and its factor, and Phi in the pass that forms it and in certificates.
        return "solver", memory + 2 * features**2 * 8, 2 * row["phi_flops"] + n * features**2 + features**3
    pooled = not augmented and row["phi_bytes"] <= free
    epoch = row["bm_pooled_flops"] if pooled else row["bm_flops"]
    memory += row["phi_bytes"] if pooled else row["bm_batch_bytes"]
    return "pooled" if pooled else "convolved", memory, row["epochs"] * epoch + row["phi_flops"]


def _end_to_end(estimates: list[dict[str, Any]], parameters: dict[str, Any], n: int, rate: float) -> dict[str, Any]:
    """The network of the same depth: forward and backward through all of its convolutions."""
    batch = parameters.get("batch_size", 128)
    positions = [math.prod(row["map_shape"][1:]) for row in estimates]
    products = sum(K * row["length"] * row["columns"] for K, row in zip(positions, estimates, strict=True))
    maps = sum(3 * K * row["columns"] * 4 for K, row in zip(positions, estimates, strict=True))
    return {
        "stage": "all",
        "way": "end to end",
        "epochs": estimates[0]["epochs"],
        "memory_gib": (estimates[0]["images_bytes"] + batch * maps) / 2**30,
        "hours": estimates[0]["epochs"] * n * 6 * products / rate / 3600,
    }
