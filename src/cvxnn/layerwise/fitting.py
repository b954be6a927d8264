"""Stage after stage: problem, training, certificate, and the maps that the next stage sees."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cvxnn.certificates import Certificate, certify
from cvxnn.columns import Columns
from cvxnn.errors import CertificationWarning, StorageError
from cvxnn.layerwise.checkpoint import RunFolder
from cvxnn.layerwise.features import (
    AugmentedImages,
    BatchFeatures,
    ConvolvedFeatures,
    PooledFeatures,
    evaluate_outputs,
    pooled_bytes,
)
from cvxnn.layerwise.maps import StageMaps, channel_scales
from cvxnn.layerwise.network import Standardizer, TrainedStage
from cvxnn.layerwise.options import SgdOptions, StageOptions
from cvxnn.layerwise.reduction import stage_pooling
from cvxnn.layerwise.results import StageResult
from cvxnn.layerwise.stage import GatedConvolution, PooledHead, unshuffle
from cvxnn.layerwise.ties import gates_off_ties
from cvxnn.layerwise.training import Factors, Sgd, epoch_seed, first_factors
from cvxnn.operators import CNNOperator
from cvxnn.problem import Problem
from cvxnn.problems import cnn_problem
from cvxnn.solvers import solve
from cvxnn.solvers.admm import available_bytes

__all__ = ["LayerwiseRun", "Samples"]

#: Columns of convex solutions with less than this part of the largest singular value are rounding.
_NO_COLUMN = {torch.float32: 1e-6, torch.float64: 1e-12}
#: Part of the free memory that pooled patches may take.
_POOLED_SHARE = 0.5


@dataclass
class Samples:
    """Standardised images (n, C, H, W), labels as indices, and the images of the stage at hand."""

    images: torch.Tensor
    labels: np.ndarray
    source: torch.Tensor | StageMaps = field(init=False)

    def __post_init__(self) -> None:
        self.source = self.images


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
            except _NothingTrained:
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
            size = reduction.grid(layer.geometry, *samples.source.shape[2:])
            size = (size[0] // 2, size[1] // 2) if stage.downsample else size
            pooling = self._pooling(stage, size)
            samples.source = StageMaps(
                samples.source, layer, stage.geometry, pooling, stage.downsample, self.maps, reduction
            )

    def _pooling(self, stage: StageOptions, size: Sequence[int]) -> torch.Tensor:
        return stage_pooling(stage.pooling, stage.geometry, size[0], size[1], stage.reduction.mirror)

    def _train(self, stage: StageOptions) -> tuple[StageResult, TrainedStage]:
        begin = time.perf_counter()
        saved = None
        if self.folder is not None and stage.method == "sgd":
            saved = self.folder.load_training(stage.number)
        problem = self._problem(stage, None if saved is None else saved[1]["gates"])
        if stage.method == "sgd":
            return self._train_sgd(stage, problem, saved, begin)
        return self._train_convex(stage, problem, begin)

    def _problem(self, stage: StageOptions, gates: np.ndarray | None) -> Problem:
        """The problem of a stage; with the gates of a checkpoint, these were drawn by the same run."""
        problem = self._problem_of(stage, gates)
        if gates is None:
            moved = gates_off_ties(self._operator(problem))
            problem = problem if moved is None else self._problem_of(stage, moved)
        return problem.with_scope("sampled_gates")

    def _problem_of(self, stage: StageOptions, gates: np.ndarray | None) -> Problem:
        return cnn_problem(
            self.train.source,
            np.eye(self.n_outputs)[self.train.labels],
            filter_size=stage.geometry.filter_size,
            stride=stage.geometry.stride,
            padding=stage.geometry.padding,
            pooling=self._pooling(stage, self.train.source.shape[2:]),
            gates=gates,
            n_gates=stage.n_gates,
            beta=stage.beta,
            loss=stage.loss,
            hidden_bias=stage.geometry.bias,
            output_bias=stage.output_bias,
            gate_sampling=stage.gate_sampling,
            gate_quantile=stage.gate_quantile,
            random_state=epoch_seed(self.seed, stage.number),
            dtype=self.train.images.dtype,
            device=self.train.images.device,
        )

    def _operator(self, problem: Problem) -> CNNOperator:
        assert isinstance(problem.operator, CNNOperator)
        return problem.operator

    def _validation_operator(self, op: CNNOperator) -> CNNOperator | None:
        """The operator of the validation set with the same gates."""
        if self.validation is None:
            return None
        return CNNOperator(self.validation.source, op.n_outputs, op.geometry, op.pooling, op.gates)

    # SGD ------------------------------------------------------------------------------------------------------------

    def _features(self, stage: StageOptions, op: CNNOperator, kind: str) -> BatchFeatures:
        if kind == "pooled":
            return PooledFeatures(op)
        if self.sgd.augment is None:
            return ConvolvedFeatures(op, mixed=self.mixed)
        layers = [trained.maps for trained in self.trained]
        images = AugmentedImages(
            self.train.images, layers, stage.downsample, self.sgd.augment, self.standardizer.black()
        )
        return ConvolvedFeatures(op, images, self.mixed)

    def _kind(self, op: CNNOperator) -> str:
        """Whether hidden outputs come from pooled patches, which must fit in memory, or by convolution."""
        if self.sgd.augment is not None or self.sgd.features == "convolved":
            return "convolved"
        fits = pooled_bytes(op) <= _POOLED_SHARE * available_bytes(op.device)
        return "pooled" if fits or self.sgd.features == "cached" else "convolved"

    def _train_sgd(
        self,
        stage: StageOptions,
        problem: Problem,
        saved: tuple[dict[str, Any], dict[str, np.ndarray]] | None,
        begin: float,
    ) -> tuple[StageResult, TrainedStage]:
        op = self._operator(problem)
        assert op.gates is not None
        kind = self._kind(op) if saved is None else saved[0]["features"]
        features = self._features(stage, op, kind)
        first = first_factors(problem, stage.rank, epoch_seed(self.seed, stage.number, 0))
        sgd = Sgd(problem, features, first, stage, self.sgd, self.seed)
        trace: list[dict[str, Any]] = []
        spent = 0.0
        if saved is not None:
            header, arrays = saved
            try:
                sgd.load_state(int(header["epoch"]), arrays)
                trace, spent = list(header["trace"]), float(header["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise StorageError(f"the checkpoint of stage {stage.number} cannot be restored: {error}") from error
        checked = self._validation_operator(op)
        validation = None
        if checked is not None:
            validation = PooledFeatures(checked) if kind == "pooled" else ConvolvedFeatures(checked, mixed=self.mixed)

        def elapsed() -> float:
            return spent + time.perf_counter() - begin

        status = "max_iter"
        point = sgd.factors.copy()
        by_hand = False
        try:
            while sgd.epoch < stage.epochs:
                entry = {"stage": stage.number} | sgd.run_epoch()
                if sgd.has_diverged(entry["loss"]):
                    status = "diverged"
                    self._warn_of_divergence(stage, sgd.epoch)
                    break
                point = sgd.factors.copy()
                entry["validation_accuracy"] = None if validation is None else self._accuracy(sgd.outputs(validation))
                entry["seconds"] = elapsed()
                trace.append(entry)
                if self.folder is not None:
                    facts = {"epoch": sgd.epoch, "trace": trace, "seconds": elapsed(), "features": kind}
                    self.folder.save_training(stage.number, self.seed, facts, sgd.state() | {"gates": op.gates})
                self._report(entry, stage.epochs)
                stop = [callback(entry) for callback in self.callbacks]
                if any(stop):
                    status = "interrupted"
                    break
        except KeyboardInterrupt:
            if not trace:
                raise _NothingTrained from None
            status, by_hand = "interrupted", True
        seconds = elapsed()
        if status == "diverged" and not bool(torch.isfinite(evaluate_outputs(features, point.u, point.outputs)).all()):
            point = first
        trained = self._from_factors(stage, problem, point)
        result = self._result(stage, problem, trained, status, trace)
        result.features, result.seconds = kind, seconds
        if not by_hand:
            plain = features if self.sgd.augment is None else ConvolvedFeatures(op, mixed=self.mixed)
            result.accuracy = _share(evaluate_outputs(plain, point.u, point.outputs), self.train.labels)
        result.validation_accuracy = trace[-1]["validation_accuracy"] if trace else None
        if self.certify and not by_hand and status != "diverged":
            del features, sgd
            result.certificate = self._certify(problem, point)
            result.certify_seconds = elapsed() - seconds
            if status == "max_iter" and result.certificate.relative_gap <= stage.tol:
                result.status = "certified"
        return result, trained

    def _accuracy(self, outputs: torch.Tensor) -> float:
        assert self.validation is not None
        return _share(outputs, self.validation.labels)

    def _certify(self, problem: Problem, point: Factors) -> Certificate:
        op = problem.operator
        rank = len(point.u) // op.n_gates
        U = point.u.view(op.n_gates, rank, -1).mT
        right = op.merge_right(point.weight)
        V = right.view(op.n_gates, rank, -1).mT
        return certify(problem, factors=(U, V), intercept=point.bias)

    def _from_factors(self, stage: StageOptions, problem: Problem, point: Factors) -> TrainedStage:
        op = problem.operator
        gate = torch.arange(op.n_gates, device=op.device).repeat_interleave(len(point.u) // op.n_gates)
        return self._stage(stage, problem, Columns(gate, point.u, op.merge_right(point.weight)), point.bias)

    def _warn_of_divergence(self, stage: StageOptions, epoch: int) -> None:
        warnings.warn(
            f"training of stage {stage.number} diverged in epoch {epoch} and ends there; a step below "
            f"{stage.step:g} is wanted",
            CertificationWarning,
            stacklevel=2,
        )

    def _report(self, entry: dict[str, Any], epochs: int) -> None:
        if not self.verbose:
            return
        held = entry["validation_accuracy"]
        tail = "" if held is None else f"  validation {100 * held:.2f}%"
        Console(stderr=True).print(
            f"stage {entry['stage']}  epoch {entry['epoch']}/{epochs}  objective {entry['objective']:.5g}  "
            f"accuracy {100 * entry['accuracy']:.2f}%{tail}  {entry['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    # Convex ---------------------------------------------------------------------------------------------------------

    def _train_convex(self, stage: StageOptions, problem: Problem, begin: float) -> tuple[StageResult, TrainedStage]:
        def called(entry: dict[str, Any]) -> bool:
            stop = [callback({"stage": stage.number} | entry) for callback in self.callbacks]
            return any(stop)

        solution = solve(
            problem,
            tol=stage.tol,
            max_iter=stage.max_iter,
            checkpoint=None if self.folder is None else self.folder.solver_file(stage.number),
            resume=self.folder is not None,
            callbacks=(called,) if self.callbacks else (),
            verbose=self.verbose,
        )
        if solution.factors is not None:
            columns = Columns.from_factors(*solution.factors)
        else:
            assert solution.Z is not None
            columns = Columns.from_blocks(solution.Z.double())
        columns = columns.without_zeros(_NO_COLUMN[problem.dtype]).to(problem.Y)
        if len(columns) == 0:
            _, p, q = problem.operator.block_shape
            like = problem.Y
            columns = Columns(
                torch.zeros(1, dtype=torch.long, device=like.device), like.new_zeros(1, p), like.new_zeros(1, q)
            )
        trained = self._stage(stage, problem, columns, solution.intercept.to(problem.Y))
        result = self._result(stage, problem, trained, solution.status, solution.trace)
        result.seconds = time.perf_counter() - begin
        result.certificate = solution.certificate
        op = self._operator(problem)
        result.accuracy = _share(_outputs(op, columns, solution.intercept), self.train.labels)
        checked = self._validation_operator(op)
        if checked is not None:
            assert self.validation is not None
            held = _share(_outputs(checked, columns, solution.intercept), self.validation.labels)
            result.validation_accuracy = held
        if solution.status not in ("certified", "interrupted"):
            warnings.warn(
                f"stage {stage.number} ended as {solution.status!r} at a relative duality gap of "
                f"{solution.certificate.relative_gap:.1e}, above tol={stage.tol:g}; raise max_iter",
                CertificationWarning,
                stacklevel=2,
            )
        return result, trained

    # Both -----------------------------------------------------------------------------------------------------------

    def _stage(self, stage: StageOptions, problem: Problem, columns: Columns, bias: torch.Tensor) -> TrainedStage:
        """The modules of a stage: all columns with the head, and what of them later stages see."""
        op = self._operator(problem)
        gates = problem.gates
        assert gates is not None
        convolution = GatedConvolution(columns.u, gates, columns.gate, stage.geometry, stage.downsample)
        head = PooledHead(op.split_right(columns.v), bias, op.pooling)
        if stage.width is None and not stage.normalize:
            return TrainedStage(convolution, head, None, stage.reduction)
        chosen = torch.argsort(columns.sizes(), descending=True, stable=True)[: stage.width]
        kept = columns[chosen.sort().values]
        layer = GatedConvolution(kept.u, gates, kept.gate, stage.geometry, stage.downsample)
        if stage.normalize:
            scales = channel_scales(op.images, layer)
            layer.filters.data.mul_(scales.unsqueeze(1).to(layer.filters))
        return TrainedStage(convolution, head, layer, stage.reduction)

    def _result(
        self, stage: StageOptions, problem: Problem, trained: TrainedStage, status: str, trace: list[dict[str, Any]]
    ) -> StageResult:
        op = self._operator(problem)
        source = self.train.source
        grid = stage.reduction.grid(op.geometry, *source.shape[2:])
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
            rounding=source.rounding if isinstance(source, StageMaps) else 0.0,
        )


class _NothingTrained(Exception):
    """Ctrl-C before the first epoch of a stage."""


def _outputs(op: CNNOperator, columns: Columns, intercept: torch.Tensor) -> torch.Tensor:
    return op.apply_columns(columns) + intercept.to(columns.u)


def _share(outputs: torch.Tensor, labels: np.ndarray) -> float:
    """Part of the samples whose largest output is that of their label."""
    return float((outputs.argmax(1).cpu().numpy() == labels).mean())
