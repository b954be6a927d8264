"""Time per epoch and peak memory of a stage, convex form (23) beside Burer-Monteiro form (126): Figure 6."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from cvxnn.layerwise import LayerwiseCNNClassifier, layerwise_estimate
from cvxnn.layerwise.features import ConvolvedFeatures, PooledFeatures
from cvxnn.layerwise.memory import PeakMemory
from cvxnn.layerwise.options import read_sgd, read_stages
from cvxnn.layerwise.precision import tensor_float32
from cvxnn.layerwise.training import Sgd, first_factors
from cvxnn.memory import available_bytes
from cvxnn.operators import CNNOperator
from cvxnn.problem import Problem
from cvxnn.problems import cnn_problem
from cvxnn.validation import resolve_device

__all__ = ["measure_costs"]

_BATCH = 128
_STEPS = 3
#: Part of the free memory that a form may need.
_SHARE = 0.8


def measure_costs(
    images: np.ndarray, parameters: dict[str, Any], seed: int, device: str, n_outputs: int = 10
) -> list[dict[str, Any]]:
    """A row per stage and form: seconds of an epoch of SGD with momentum, from a few batches, and peak memory.

    Both forms see images of the sizes that the stages of the Burer-Monteiro form give; those of later stages are
    random. "bm" convolves, "convex" pools the gated patches of each batch and multiplies with its P h a c weights, and
    "phi" is (126) from pooled patches that are there, in the first stage only. Each form is measured in a process of
    its own, so that its peak memory is its own. `map_channels` is what the form would hand to the next stage: P a c
    channels in the convex form, where nothing makes them fewer, and P m in factors.
    """
    n = len(images)
    rows: list[dict[str, Any]] = []
    plain = {name: value for name, value in parameters.items() if name not in ("step", "epochs", "decay_every")}
    for estimate in layerwise_estimate(images.shape[1:], n, plain, n_outputs=n_outputs):
        for form in ("convex", "bm", "phi") if estimate["stage"] == 1 else ("convex", "bm"):
            channels = estimate["columns"]
            if form == "convex":
                channels = estimate["n_gates"] * estimate["cells"] * n_outputs
            row = {"stage": estimate["stage"], "form": form, "map_channels": channels, "n_gates": estimate["n_gates"]}
            free = _SHARE * available_bytes(resolve_device(device))
            need = _need(estimate, form, n)
            if need > free:
                words = f"not measured: needs about {need / 2**30:.1f} of {free / 2**30:.1f} GiB"
                rows.append(row | {"status": words})
                continue
            size = estimate["image_shape"], estimate["n_gates"], n_outputs, form, seed, device
            rows.append(row | _in_a_process(size, n))
    return rows


def _need(estimate: dict[str, Any], form: str, n: int) -> float:
    """About the bytes that a form takes: weights, gradient and momentum, and what a batch needs."""
    phi = estimate["phi_bytes"] * _BATCH / n
    patches = 3 * phi / estimate["n_gates"] / estimate["cells"] * np.prod(estimate["map_shape"][1:])
    if form == "bm":
        return 3 * estimate["factors_bytes"] + patches + estimate["bm_batch_bytes"]
    return (3 * estimate["blocks_bytes"] if form == "convex" else 0) + 2 * phi + patches


def _in_a_process(size: tuple[Any, ...], n: int) -> dict[str, Any]:
    """Status, seconds of an epoch and peak memory, measured in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            seconds, peak = pool.submit(_measure, *size).result()
        except (BrokenProcessPool, torch.OutOfMemoryError, MemoryError):
            return {"status": "out of memory"}
    return {"status": "measured", "epoch_seconds": seconds * n / _BATCH, "peak_gib": peak / 2**30}


def _measure(
    shape: tuple[int, int, int], n_gates: int, n_outputs: int, form: str, seed: int, device: str
) -> tuple[float, float]:
    """Median seconds of the gradient of one batch, and the bytes by which the peak memory has grown."""
    rng = np.random.default_rng(seed)
    target = resolve_device(device)
    images = rng.standard_normal((_BATCH, *shape)).astype(np.float32)
    before = PeakMemory(target).bytes
    problem = cnn_problem(
        images,
        np.arange(_BATCH) % n_outputs,
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
    step = _convex_step(problem) if form == "convex" else _factored_step(problem, form, seed)
    peak, times = PeakMemory(target), []
    with tensor_float32(True):
        for _ in range(_STEPS + 1):
            begin = time.perf_counter()
            step()
            if target.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])), peak.bytes - before


def _convex_step(problem: Problem) -> Callable[[], Any]:
    """A step of momentum on the blocks Z; the pooled patches of the batch are formed once for both directions."""
    op = problem.operator
    Z = torch.zeros(op.n_features, op.n_outputs, dtype=op.dtype, device=op.device)
    momentum = torch.zeros_like(Z)

    def step() -> None:
        Phi = op.features(slice(None))
        gradient = problem.loss.gradient(Phi @ Z, problem.Y, problem.weights.to(op.dtype))
        momentum.mul_(0.9).addmm_(Phi.T, gradient)
        Z.add_(momentum, alpha=-1e-3)

    return step


def _factored_step(problem: Problem, form: str, seed: int) -> Callable[[], Any]:
    """A step on the factors, m = 1, as in training."""
    assert isinstance(problem.operator, CNNOperator)
    features = PooledFeatures(problem.operator) if form == "phi" else ConvolvedFeatures(problem.operator)
    params = LayerwiseCNNClassifier(1, batch_size=_BATCH).get_params(deep=False)
    stage, options = read_stages(params)[0], read_sgd(params)
    return Sgd(problem, features, first_factors(problem, 1, seed), stage, options, seed).run_epoch
