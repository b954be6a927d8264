"""Stage after stage: problem, training, certificate, and the maps that the next stage sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.distributed import Group, sample_group
from cvxnn.layerwise.checkpoint import RunFolder
from cvxnn.layerwise.features import pooled_fits
from cvxnn.layerwise.fitting_convex import train_convexly
from cvxnn.layerwise.fitting_sgd import NothingTrained, SgdStage
from cvxnn.layerwise.maps import StageMaps, channel_scales
from cvxnn.layerwise.memory import PeakMemory
from cvxnn.layerwise.network import Standardizer, TrainedStage
from cvxnn.layerwise.options import SgdOptions, StageOptions
from cvxnn.layerwise.reduction import stage_pooling
from cvxnn.layerwise.results import StageResult, accuracy
from cvxnn.layerwise.stage import GatedConvolution, PooledHead, unshuffle
from cvxnn.layerwise.ties import gates_off_ties
from cvxnn.layerwise.training import epoch_seed
from cvxnn.operators import CNNOperator
from cvxnn.operators.shared_images import SharedImages
from cvxnn.operators.sources import ImageSource
from cvxnn.problem import Problem
from cvxnn.problems import cnn_problem
from cvxnn.problems.patch_gates import PatchGates, choose_patch_gates

__all__ = ["LayerwiseRun", "Samples"]


@dataclass
class Samples:
    """Standardised images (n, C, H, W), spaced for the first stage, labels as indices, and the images of the stage.

    Of several processes each has the images of its share of the samples, and the labels of all.
    """

    images: torch.Tensor
    labels: np.ndarray
    group: Group | None = None
    source: torch.Tensor | StageMaps = field(init=False)

    def __post_init__(self) -> None:
        self.source = self.images

    @classmethod
    def of(
        cls,
        raw: torch.Tensor,
        labels: np.ndarray,
        standardizer: Standardizer,
        device: torch.device,
        gap: int,
        name: str = "X",
    ) -> Samples:
        """Images as they were given, standardised and with a gap: all, or those of this process."""
        group = sample_group()
        own = slice(None) if group is None else group.share(len(labels), name)
        return cls(standardizer.all(raw[own], gap).to(device), labels, group)

    @property
    def own(self) -> slice:
        """The samples whose images are here."""
        return slice(0, len(self.labels)) if self.group is None else self.group.share(len(self.labels))

    @property
    def all_images(self) -> torch.Tensor | ImageSource:
        """The images of the stage of all samples."""
        return self.source if self.group is None else SharedImages(self.source, self.group, len(self.labels))

    @property
    def rounding(self) -> float:
        """What readings of the images of the stage can differ by, the largest of all processes."""
        found = self.source.rounding if isinstance(self.source, StageMaps) else 0.0
        return found if self.group is None else self.group.largest(found)

    def accuracy(self, outputs: torch.Tensor) -> float:
        """Part of all samples whose largest output is that of their label, from the outputs (m, c) of those here."""
        if self.group is None:
            return accuracy(outputs, self.labels)
        right = (outputs.argmax(1).cpu().numpy() == self.labels[self.own]).sum()
        return self.group.sums(float(right))[0] / len(self.labels)


@dataclass
class LayerwiseRun:
    """One training of all stages.

    Attributes
    ----------
    stages : list of StageOptions
    sgd : SgdOptions
    train, validation : Samples
    n_outputs : int
    standardizer : Standardizer
    seed : int
    maps : {"auto", "cached", "recomputed"}
    mixed, certify : bool
    folder : RunFolder or None
    callbacks : sequence of callables
    verbose : int
    """

    stages: list[StageOptions]
    sgd: SgdOptions
    train: Samples
    validation: Samples | None
    n_outputs: int
    standardizer: Standardizer
    seed: int
    maps: str
    mixed: bool
    certify: bool
    folder: RunFolder | None
    callbacks: Sequence[Callable[[dict[str, Any]], Any]]
    verbose: int
    trained: list[TrainedStage] = field(default_factory=list)
    results: list[StageResult] = field(default_factory=list)

    @property
    def group(self) -> Group | None:
        """The processes that the samples are shared out to."""
        return self.train.group

    def stops(self, entry: dict[str, Any]) -> bool:
        """Whether a callback ends training; of several processes the first decides."""
        stop = [callback(entry) for callback in self.callbacks]
        return any(stop) if self.group is None or not stop else self.group.of_first(any(stop)) > 0

    def run(self) -> None:
        """Train what is not there yet; the stages are in `trained`, what is known of them in `results`."""
        self._enter(None, self.stages[0])
        for stage in self.stages:
            if stage.number > 1:
                self._enter(self.trained[-1].features, stage)
            loaded = None if self.folder is None else self.folder.load_stage(stage.number)
            if loaded is not None:
                self._keep(loaded[0], loaded[1].to(self.train.images.device))
                continue
            try:
                result, trained = self._train(stage)
            except NothingTrained:
                if not self.trained:
                    raise KeyboardInterrupt from None
                self.results[-1].status = "interrupted"
                return
            self._keep(result, trained)
            if result.status in ("diverged", "interrupted"):
                return
            if self.folder is not None:
                self.folder.save_stage(result, trained, self.seed)

    def _keep(self, result: StageResult, trained: TrainedStage) -> None:
        self.results.append(result)
        self.trained.append(trained)

    def _enter(self, layer: GatedConvolution | None, stage: StageOptions) -> None:
        """Set the images of a stage: those of the data, or the maps of the last stage."""
        for samples in (self.train, self.validation):
            if samples is None:
                continue
            if layer is None:
                samples.source = unshuffle(samples.images) if stage.downsample else samples.images
                continue
            reduction = self.trained[-1].reduction
            height, width = samples.source.shape[2:]
            height, width = reduction.grid(layer.geometry, height, width, layer.gap)
            height, width = (height // 2, width // 2) if stage.downsample else (height, width)
            pooling = self._pooling(stage, (height + stage.gap, width))
            samples.source = StageMaps(
                samples.source, layer, stage.geometry, pooling, stage.downsample, self.maps, reduction, stage.gap
            )

    def _pooling(self, stage: StageOptions, size: Sequence[int]) -> torch.Tensor:
        return stage_pooling(stage.pooling, stage.geometry, size[0], size[1], stage.reduction.mirror, stage.gap)

    def _train(self, stage: StageOptions) -> tuple[StageResult, TrainedStage]:
        begin = time.perf_counter()
        peak = PeakMemory(self.train.images.device)
        saved = None
        if self.folder is not None and stage.method == "sgd":
            saved = self.folder.load_training(stage.number)
        problem = self._problem(stage, None if saved is None else saved[1]["gates"])
        if stage.method == "sgd":
            result, trained = SgdStage(self, stage, problem, saved, begin).train()
        else:
            result, trained = train_convexly(self, stage, problem, begin)
        result.peak_bytes = peak.bytes
        return result, trained

    def _problem(self, stage: StageOptions, gates: np.ndarray | None) -> Problem:
        """The problem of a stage; with the gates of a checkpoint, these were drawn by the same run."""
        images = self.train.all_images
        problem = cnn_problem(
            images,
            np.eye(self.n_outputs)[self.train.labels],
            filter_size=stage.geometry.filter_size,
            stride=stage.geometry.stride,
            padding=stage.geometry.padding,
            pooling=self._pooling(stage, self.train.source.shape[2:]),
            gates=self._drawn_gates(stage, images) if gates is None else gates,
            beta=stage.beta,
            loss=stage.loss,
            hidden_bias=stage.geometry.bias,
            output_bias=stage.output_bias,
            features=self._storage(stage),
            dtype=self.train.images.dtype,
            device=self.train.images.device,
        )
        return problem.with_scope("sampled_gates")

    def _drawn_gates(self, stage: StageOptions, images: torch.Tensor | ImageSource) -> PatchGates:
        """New gates with their patterns."""
        return choose_patch_gates(
            images,
            stage.geometry,
            None,
            stage.n_gates,
            stage.gate_sampling,
            stage.gate_quantile,
            None,
            epoch_seed(self.seed, stage.number),
            "gated_relu",
            lambda drawn: gates_off_ties(drawn, stage.geometry, images),
        )

    def _storage(self, stage: StageOptions) -> str:
        """Whether the operator keeps the pooled patches of a stage, as in :data:`cvxnn.operators.FEATURES`."""
        if stage.method != "convex":
            return "auto"
        if self.sgd.features != "auto":
            return {"cached": "cached", "convolved": "recomputed"}[self.sgd.features]
        n, channels, height, width = self.train.source.shape
        numbers = len(self._pooling(stage, (height, width))) * stage.n_gates * stage.geometry.length(channels)
        size, device = self.train.images.dtype.itemsize, self.train.images.device
        # Certificates keep them in float64 too. Beside the patches, the solver has a Gram matrix and its factor.
        order = numbers if self.group is not None else min(n, numbers)
        needed = n * numbers * (8 if size == 8 else 8 + size) + 2 * order**2 * size
        return "cached" if pooled_fits(needed, device, self.group) else "auto"

    def _operator(self, problem: Problem) -> CNNOperator:
        """That of the samples of this process."""
        assert isinstance(problem.operator.local, CNNOperator)
        return problem.operator.local

    def validation_operator(self, problem: Problem) -> CNNOperator | None:
        """The operator of the validation set with the same gates, of the samples of this process."""
        if self.validation is None:
            return None
        op = self._operator(problem)
        return CNNOperator(self.validation.source, op.n_outputs, op.geometry, op.pooling, op.gates)

    def trained_stage(
        self, stage: StageOptions, problem: Problem, columns: Columns, bias: torch.Tensor
    ) -> TrainedStage:
        """The modules of a stage: all columns with the head, and what of them later stages see."""
        op = self._operator(problem)
        gates = problem.gates
        assert gates is not None
        convolution = GatedConvolution(columns.u, gates, columns.gate, stage.geometry, stage.downsample, stage.gap)
        head = PooledHead(op.split_right(columns.v), bias, op.pooling)
        if stage.width is None and not stage.normalize:
            return TrainedStage(convolution, head, None, stage.reduction)
        chosen = torch.argsort(columns.sizes(), descending=True, stable=True)[: stage.width]
        kept = columns[chosen.sort().values]
        layer = GatedConvolution(kept.u, gates, kept.gate, stage.geometry, stage.downsample, stage.gap)
        if stage.normalize:
            scales = channel_scales(op.images, layer, self.group)
            layer.filters.data.mul_(scales.unsqueeze(1).to(layer.filters))
        return TrainedStage(convolution, head, layer, stage.reduction)

    def result(
        self, stage: StageOptions, problem: Problem, trained: TrainedStage, status: str, trace: list[dict[str, Any]]
    ) -> StageResult:
        """What is known of a stage but for its times, its accuracy and its certificate."""
        op = self._operator(problem)
        source = self.train.source
        height, width = source.shape[2:]
        grid = stage.reduction.grid(op.geometry, height, width, stage.gap)
        return StageResult(
            number=stage.number,
            method=stage.method,
            loss=problem.loss.name,
            status=status,
            certificate=None,
            trace=trace,
            n_gates=op.n_gates,
            n_columns=trained.convolution.n_channels,
            channels=trained.features.n_channels,
            image_shape=tuple(source.shape[1:]),
            map_shape=(trained.features.n_channels, *grid),
            rounding=self.train.rounding,
        )
