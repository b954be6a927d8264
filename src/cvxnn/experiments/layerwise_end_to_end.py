"""Networks trained end to end, beside the layerwise ones: of the same depth, and a small one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cvxnn.files import read_tensors, write_tensors
from cvxnn.layerwise.augment import augment_batch
from cvxnn.layerwise.memory import PeakMemory
from cvxnn.layerwise.precision import tensor_float32
from cvxnn.layerwise.training import epoch_seed
from cvxnn.validation import resolve_device

__all__ = ["deep_network", "epoch_file", "small_cnn", "train_end_to_end", "train_small_cnn"]

_TESTED = 1000
_LAST = torch.channels_last
Told = Callable[[dict[str, Any]], None]


def epoch_file(checkpoint: Path) -> Path:
    """The file that an end-to-end training writes after every epoch."""
    return checkpoint.with_name(f"{checkpoint.name}.epoch")


def deep_network(channels: int, n_classes: int, parameters: dict[str, Any], m: int) -> nn.Sequential:
    """Convolutions of P m channels with ReLU in place of the stages, average pooling to a grid, one linear layer."""
    width = parameters["n_gates"] * m
    padding = parameters.get("padding", 1)
    layers: list[nn.Module] = []
    for stage in range(1, parameters["n_stages"] + 1):
        if stage in parameters.get("downsample", ()):
            layers.append(nn.PixelUnshuffle(2))
            channels *= 4
        layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.ReLU()]
        channels = width
    grid = parameters.get("pooling", (2, 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.LazyLinear(n_classes))


def small_cnn(channels: int, n_classes: int) -> nn.Sequential:
    """Two 3 x 3 convolutions of 32 and 64 channels with pooling, and two dense layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(128),
        nn.ReLU(),
        nn.Linear(128, n_classes),
    )


def train_end_to_end(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    parameters: dict[str, Any],
    m: int,
    *,
    seed: int,
    device: str,
    checkpoint: Path,
    resume: bool,
    report: Told,
) -> dict[str, Any]:
    """Train a network of the depth of the layerwise one with the same SGD; a row for the table.

    Batches, momentum, weight decay, schedule, number of epochs and augmentation are those of a stage; the first step
    is that of the first stage. A checkpoint is written after every epoch.
    """
    data = _Data(train, train_labels, test, test_labels, device)
    network = data.network(lambda: deep_network(train.shape[1], int(train_labels.max()) + 1, parameters, m), seed)
    peak = PeakMemory(data.train.device)
    steps = parameters.get("step", (1e-1,))
    step = float(steps[0] if isinstance(steps, (tuple, list)) else steps)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=step,
        momentum=parameters.get("momentum", 0.9),
        weight_decay=parameters.get("beta", 5e-4),
    )
    schedule = torch.optim.lr_scheduler.StepLR(
        optimizer, parameters.get("decay_every", 15), parameters.get("decay", 0.2)
    )
    file = epoch_file(checkpoint)
    first, spent = _restore(file, network, optimizer, schedule) if resume and file.exists() else (1, 0.0)
    begin = time.perf_counter()
    epochs = parameters.get("epochs", 50)
    for epoch in range(first, epochs + 1):
        with tensor_float32(parameters.get("precision") == "mixed"):
            loss = _epoch(network, optimizer, data, parameters, epoch_seed(seed, epoch))
        schedule.step()
        seconds = spent + time.perf_counter() - begin
        _save(file, network, optimizer, schedule, epoch, seconds)
        report({"stage": "end to end", "epoch": epoch, "loss": loss, "seconds": seconds})
    return data.row(network) | {
        "stage": parameters["n_stages"],
        "status": "max_iter",
        "seconds": spent + time.perf_counter() - begin,
        "epochs": epochs,
        "peak_gib": peak.bytes / 2**30,
    }


def train_small_cnn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    seed: int,
    device: str,
    report: Told,
    epochs: int = 8,
    limit: float = math.inf,
) -> list[dict[str, Any]]:
    """Train the small CNN with Adam (step 0.001, batches of 128); a row per epoch, the time without testing.

    The last epoch is that in which the training has taken `limit` seconds.
    """
    data = _Data(train, train_labels, test, test_labels, device)
    network = data.network(lambda: small_cnn(train.shape[1], int(train_labels.max()) + 1), seed)
    peak = PeakMemory(data.train.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows, seconds = [], 0.0
    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        loss = _epoch(network, optimizer, data, {}, epoch_seed(seed, epoch))
        seconds += time.perf_counter() - begin
        report({"stage": "small CNN", "epoch": epoch, "loss": loss, "seconds": seconds})
        facts = {"stage": None, "status": "max_iter", "seconds": seconds, "epochs": epoch}
        rows.append(data.row(network) | facts | {"peak_gib": peak.bytes / 2**30})
        if seconds >= limit:
            break
    return rows


class _Data:
    """Standardised images on a device, channels last on a GPU."""

    def __init__(
        self, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, device: str
    ) -> None:
        target = resolve_device(device)
        pixels = torch.from_numpy(train).to(torch.float32) / 255
        self.mean = pixels.mean((0, 2, 3), keepdim=True)
        self.deviation = pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        self.train = ((pixels - self.mean) / self.deviation).to(target)
        self.test = ((torch.from_numpy(test).to(torch.float32) / 255 - self.mean) / self.deviation).to(target)
        if target.type == "cuda":
            self.train = self.train.contiguous(memory_format=_LAST)
            self.test = self.test.contiguous(memory_format=_LAST)
        self.train_labels = torch.from_numpy(train_labels.astype(np.int64)).to(target)
        self.test_labels = torch.from_numpy(test_labels.astype(np.int64)).to(target)

    def network(self, make: Callable[[], nn.Module], seed: int) -> nn.Module:
        """A network with weights of its own seed, whatever else was drawn before, on the device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = make()
            network(self.train[:2].cpu())
        network.to(self.train.device)
        if self.train.device.type == "cuda":
            for weight in network.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=_LAST)
        return network

    def row(self, network: nn.Module) -> dict[str, Any]:
        """Accuracies of both splits."""
        return {
            "train_accuracy": _accuracy(network, self.train, self.train_labels),
            "test_accuracy": _accuracy(network, self.test, self.test_labels),
        }


def _accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    with torch.no_grad():
        right = [
            (network(part).argmax(1) == seen).sum()
            for part, seen in zip(images.split(_TESTED), labels.split(_TESTED), strict=True)
        ]
    network.train()
    return float(torch.stack(right).sum()) / len(images)


def _epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, data: _Data, parameters: dict[str, Any], seed: int
) -> float:
    """One pass in a new order; the mean loss."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator).to(data.train.device)
    kind = parameters.get("augment")
    black = (-data.mean / data.deviation).flatten().to(data.train.device)
    mixed = parameters.get("precision") == "mixed" and data.train.device.type == "cuda"
    total = torch.zeros((), device=data.train.device)
    for rows in order.split(parameters.get("batch_size", 128)):
        images = data.train[rows]
        if kind is not None:
            images = augment_batch(images, kind, black, generator)
        with torch.autocast(data.train.device.type, torch.bfloat16, enabled=mixed):
            outputs = network(images)
        loss = nn.functional.cross_entropy(outputs.float(), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
    return float(total) / len(order)


def _save(
    file: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.StepLR,
    epoch: int,
    seconds: float,
) -> None:
    arrays = {f"network.{name}": value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        arrays[f"momentum.{i}"] = state["momentum_buffer"].cpu().numpy()
    write_tensors(file, "checkpoint", {"epoch": epoch, "seconds": seconds, "step": schedule.get_last_lr()[0]}, arrays)


def _restore(
    file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.StepLR
) -> tuple[int, float]:
    """Go on after the last epoch of a checkpoint: the next epoch, and the seconds spent."""
    header, arrays = read_tensors(file, "checkpoint")
    network.load_state_dict({name: torch.from_numpy(arrays[f"network.{name}"].copy()) for name in network.state_dict()})
    state = optimizer.state_dict()
    state["state"] = {
        i: {"momentum_buffer": torch.from_numpy(arrays[f"momentum.{i}"].copy())}
        for i in state["param_groups"][0]["params"]
    }
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = header["step"]
    schedule.last_epoch = header["epoch"]
    return header["epoch"] + 1, header["seconds"]
