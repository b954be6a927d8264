"""Time per epoch and peak memory of a stage, convex form (23) beside Burer-Monteiro form (126): Figure 6."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.layerwise import layerwise_estimate
from cvxnn.problems import cnn_problem
from cvxnn.validation import resolve_device

__all__ = ["measure_costs"]

_BATCH = 128
_STEPS = 3
#: Stages whose convex weights, gradient and momentum would take more than this are not measured.
_MOST_BYTES = 4 * 2**30


def measure_costs(
    images: np.ndarray, parameters: dict[str, Any], seed: int, device: str, n_outputs: int = 10
) -> list[dict[str, Any]]:
    """A row per stage and form: seconds of an epoch of gradients by convolution, from a few batches, and peak memory.

    The images of later stages are random, of the sizes that they have. Each form is measured in a process of its own,
    so that its peak memory is its own. "phi" is (126) from pooled patches, in the first stage only.
    """
    n = len(images)
    rows: list[dict[str, Any]] = []
    plain = {name: value for name, value in parameters.items() if name not in ("step", "epochs", "decay_every")}
    for estimate in layerwise_estimate(images.shape[1:], n, plain, n_outputs=n_outputs):
        for form in ("convex", "bm", "phi") if estimate["stage"] == 1 else ("convex", "bm"):
            row = {"stage": estimate["stage"], "form": form, "status": "measured"}
            need = 3 * estimate["blocks_bytes"] if form == "convex" else 3 * estimate["factors_bytes"]
            if need > _MOST_BYTES:
                rows.append(row | {"status": f"needs about {need / 2**30:.0f} GiB for weights, gradient and momentum"})
                continue
            size = estimate["image_shape"], estimate["n_gates"], n_outputs, form, seed, device
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                seconds, peak = pool.apply(_measure, size)
            rows.append(row | {"epoch_seconds": seconds * n / _BATCH, "peak_gib": peak / 2**30})
    return rows


def _measure(
    shape: tuple[int, int, int], n_gates: int, n_outputs: int, form: str, seed: int, device: str
) -> tuple[float, float]:
    """Median seconds of the gradient of one batch, and the bytes by which the peak memory has grown."""
    rng = np.random.default_rng(seed)
    target = resolve_device(device)
    images = rng.standard_normal((_BATCH, *shape)).astype(np.float32)
    labels = np.arange(_BATCH) % n_outputs
    before = _peak(target)
    problem = cnn_problem(
        images,
        labels,
        filter_size=3,
        padding=1,
        pooling=(2, 2),
        n_gates=n_gates,
        hidden_bias=True,
        output_bias=True,
        loss="cross_entropy",
        features="cached" if form == "phi" else "recomputed",
        dtype="float32",
        device=target,
    )
    op = problem.operator
    times = []
    if form == "convex":
        Z = torch.zeros(op.block_shape, dtype=op.dtype, device=target)
        momentum = torch.zeros_like(Z)
    else:
        like = torch.zeros((), dtype=op.dtype, device=target)
        u = torch.randn(op.n_gates, op.block_shape[1]).to(like)
        columns = Columns(
            torch.arange(op.n_gates, device=target), u, torch.randn(op.n_gates, op.block_shape[2]).to(like)
        )
    for _ in range(_STEPS + 1):
        begin = time.perf_counter()
        if form == "convex":
            outputs = op.features(slice(None)) @ op.flatten(Z)
            gradient = problem.loss.gradient(outputs, problem.Y, problem.weights.to(op.dtype))
            momentum.mul_(0.9).add_(op.adjoint(gradient))
            Z.add_(momentum, alpha=-1e-3)
        else:
            FactoredLoss(problem).slopes(columns, problem.Y.new_zeros(n_outputs))
        if target.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])), _peak(target) - before


def _peak(device: torch.device) -> float:
    """Bytes of the largest memory so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
