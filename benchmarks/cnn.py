"""CNN problems: `python benchmarks/cnn.py {epoch,passes} [--images N] [--repeats R] [--data-dir DIR] [--json]`.

epoch:  one epoch of stochastic gradients on the Burer-Monteiro factors of stage 1 (CIFAR-10, P = 256, 3x3, padding 1,
        2 x 2 pooling, m = 1, batches of 128, no augmentation): from pooled patches Phi, formed once, beside batched
        convolution: ours, and torch's conv2d with autograd, gates recomputed or kept as bits. "layerwise SGD" is an
        epoch as the classifier trains it, the others are the gradients alone.
passes: one application and one adjoint of a stage, from kept and from recomputed Phi.

Without the data set the images are random; the time does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import cvxnn
from cvxnn.columns import Columns
from cvxnn.errors import CvxnnError
from cvxnn.factored import FactoredLoss
from cvxnn.images import load_images
from cvxnn.layerwise.features import ConvolvedFeatures, PooledFeatures
from cvxnn.layerwise.options import read_sgd, read_stages
from cvxnn.layerwise.training import Sgd, first_factors
from machine import describe, matrix_rate

BATCH = 128


def cifar(n: int, data_dir: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Images with about zero mean and unit variance, labels, and where they are from."""
    try:
        data = load_images("cifar10", "train", data_dir)
        images, labels, origin = data.images[:n], data.labels[:n], "CIFAR-10"
    except CvxnnError:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        labels, origin = rng.integers(0, 10, n), "random images"
    return ((images / 255 - 0.47) / 0.25).astype(np.float32), labels, origin


def stage(images: np.ndarray, labels: np.ndarray, features: str) -> cvxnn.Problem:
    """Stage 1 of the layerwise CNN of the paper."""
    return cvxnn.cnn_problem(
        images,
        labels,
        filter_size=3,
        padding=1,
        pooling=(2, 2),
        n_gates=256,
        hidden_bias=True,
        output_bias=True,
        loss="cross_entropy",
        beta=5e-4,
        features=features,
        dtype="float32",
    )


def factor_epoch(problem: cvxnn.Problem, order: torch.Tensor) -> Callable[[], None]:
    """Gradients of all batches with our operators."""
    op = problem.operator
    like = torch.zeros((), dtype=op.dtype)
    columns = Columns(
        torch.arange(op.n_gates),
        0.1 * torch.randn(op.n_gates, op.block_shape[1]).to(like),
        0.1 * torch.randn(op.n_gates, op.block_shape[2]).to(like),
    )
    b = problem.Y.new_zeros(problem.Y.shape[1])

    def epoch() -> None:
        for rows in order.split(BATCH):
            FactoredLoss(problem, rows=rows).slopes(columns, b)

    return epoch


def sgd_epoch(problem: cvxnn.Problem, pooled: bool) -> Callable[[], Any]:
    """An epoch of training as `LayerwiseCNNClassifier` does it: order, gradients, momentum, loss and accuracy."""
    op: Any = problem.operator
    params = cvxnn.LayerwiseCNNClassifier(1, batch_size=BATCH).get_params(deep=False)
    features = PooledFeatures(op) if pooled else ConvolvedFeatures(op)
    return Sgd(problem, features, first_factors(problem, 1, 0), read_stages(params)[0], read_sgd(params), 0).run_epoch


def conv2d_epoch(problem: cvxnn.Problem, labels: np.ndarray, order: torch.Tensor, bits: bool) -> Callable[[], None]:
    """Gradients of all batches with torch's convolution and autograd."""
    op: Any = problem.operator
    gates = torch.from_numpy(op.gates).float()
    gate_filters, gate_bias = gates[:-1].T.reshape(-1, 3, 3, 3).contiguous(), gates[-1].clone()
    filters = (0.1 * torch.randn(op.n_gates, 3, 3, 3)).requires_grad_()
    bias = torch.zeros(op.n_gates, requires_grad=True)
    head = torch.nn.Linear(4 * op.n_gates, 10)
    targets = torch.from_numpy(labels.astype(np.int64))

    def epoch() -> None:
        for rows in order.split(BATCH):
            images = op.images[rows]
            maps = functional.conv2d(images, filters, bias, padding=1)
            if bits:
                active = op.bits.rows(rows).mT.reshape(maps.shape)
            else:
                active = functional.conv2d(images, gate_filters, gate_bias, padding=1) >= 0
            outputs = head(functional.adaptive_avg_pool2d(maps * active, 2).flatten(1))
            functional.cross_entropy(outputs, targets[rows]).backward()

    return epoch


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Median wall-clock seconds, the first run not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def epoch_rows(images: np.ndarray, labels: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """One row per way to compute an epoch."""
    cached, recomputed = stage(images, labels, "cached"), stage(images, labels, "recomputed")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    cached.operator.features(slice(0, 1))  # forms Phi
    once = time.perf_counter() - begin
    ways: dict[str, Callable[[], Any]] = {
        "layerwise SGD, from Phi": sgd_epoch(cached, True),
        "layerwise SGD, by convolution": sgd_epoch(recomputed, False),
        "gradients alone, from Phi": factor_epoch(cached, order),
        "convolution, patches times filters": factor_epoch(recomputed, order),
        "convolution, torch conv2d, gates recomputed": conv2d_epoch(recomputed, labels, order, False),
        "convolution, torch conv2d, gates as bits": conv2d_epoch(recomputed, labels, order, True),
    }
    rows: list[dict[str, Any]] = [{"what": name, "seconds": timed(work, repeats)} for name, work in ways.items()]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    return [*rows, {"what": "forming Phi, once", "seconds": once, "ratio": once / rows[0]["seconds"]}]


def pass_rows(images: np.ndarray, labels: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """One row per pass over the samples."""
    rows: list[dict[str, Any]] = []
    for features in ("cached", "recomputed"):
        op = stage(images, labels, features).operator
        Z, L = torch.randn(op.block_shape, dtype=op.dtype), torch.randn(len(images), 10, dtype=op.dtype)
        works = {"application": lambda op=op, Z=Z: op.apply(Z), "adjoint": lambda op=op, L=L: op.adjoint(L)}
        rows += [{"what": f"{name}, Phi {features}", "seconds": timed(work, repeats)} for name, work in works.items()]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["epoch", "passes"])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels, origin = cifar(options.images, options.data_dir)
    rows = (epoch_rows if options.table == "epoch" else pass_rows)(images, labels, options.repeats)
    machine = f"{describe()}; {matrix_rate(torch.float32):.0f} GFLOP/s float32; {len(images)} images, {origin}"
    if options.json:
        print(json.dumps({"table": options.table, "machine": machine, "rows": rows}))
        return
    table = Table("what", "seconds", "times the first", title=machine)
    for row in rows:
        table.add_row(row["what"], f"{row['seconds']:.3f}", f"{row['ratio']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
