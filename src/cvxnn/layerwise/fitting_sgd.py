"""One stage by SGD on the factors: its course, its checkpoints, its certificate."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from cvxnn.certificates import Certificate, certify
from cvxnn.columns import Columns
from cvxnn.errors import CertificationWarning, DistributedError, StorageError
from cvxnn.layerwise.features import (
    AugmentedImages,
    BatchFeatures,
    ConvolvedFeatures,
    PooledFeatures,
    evaluate_outputs,
    pooled_fits,
)
from cvxnn.layerwise.network import TrainedStage
from cvxnn.layerwise.options import StageOptions
from cvxnn.layerwise.precision import tensor_float32
from cvxnn.layerwise.results import StageResult
from cvxnn.layerwise.training import Factors, Sgd, epoch_seed, first_factors
from cvxnn.operators import CNNOperator
from cvxnn.problem import Problem

if TYPE_CHECKING:
    from cvxnn.layerwise.fitting import LayerwiseRun

__all__ = ["NothingTrained", "SgdStage"]


class NothingTrained(Exception):
    """Ctrl-C before the first epoch of a stage."""


class SgdStage:
    """The training of one stage by SGD.

    Parameters
    ----------
    run : LayerwiseRun
    stage : StageOptions
    problem : Problem
    saved : pair or None
        Header and arrays of the checkpoint of this stage.
    begin : float
        When the work on the stage began, by ``time.perf_counter``.
    """

    def __init__(
        self,
        run: LayerwiseRun,
        stage: StageOptions,
        problem: Problem,
        saved: tuple[dict[str, Any], dict[str, np.ndarray]] | None,
        begin: float,
    ) -> None:
        self.run, self.stage, self.problem, self.begin = run, stage, problem, begin
        assert isinstance(problem.operator.local, CNNOperator)
        self.op = problem.operator.local
        assert self.op.gates is not None
        self.gates = self.op.gates
        self.kind = self._kind() if saved is None else saved[0]["features"]
        self.features = self._features(self.op)
        if run.sgd.augment is not None:
            layers = [trained.maps for trained in run.trained]
            images = AugmentedImages(
                run.train.images, layers, stage.downsample, run.sgd.augment, run.standardizer.black()
            )
            self.features = ConvolvedFeatures(self.op, images, run.mixed)
        self.first = first_factors(problem, stage.rank, epoch_seed(run.seed, stage.number, 0))
        self.sgd = Sgd(problem, self.features, self.first, stage, run.sgd, run.seed)
        self.trace: list[dict[str, Any]] = []
        self.spent = 0.0
        if saved is not None:
            self._restore(*saved)
        checked = run.validation_operator(problem)
        self.validation = None if checked is None else self._features(checked)

    def _kind(self) -> str:
        """Whether hidden outputs come from pooled patches, which must fit in memory, or by convolution."""
        options = self.run.sgd
        if options.augment is not None or options.features == "convolved":
            return "convolved"
        if options.features == "cached":
            return "pooled"
        needed = self.op.n_samples * self.op.n_features * self.op.dtype.itemsize
        return "pooled" if pooled_fits(needed, self.op.device, self.run.group) else "convolved"

    def _features(self, op: CNNOperator) -> BatchFeatures:
        return PooledFeatures(op) if self.kind == "pooled" else ConvolvedFeatures(op, mixed=self.run.mixed)

    def _restore(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        try:
            self.sgd.load_state(int(header["epoch"]), arrays)
            self.trace, self.spent = list(header["trace"]), float(header["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the checkpoint of stage {self.stage.number} cannot be restored: {error}") from error

    def _elapsed(self) -> float:
        return self.spent + time.perf_counter() - self.begin

    def train(self) -> tuple[StageResult, TrainedStage]:
        """All epochs that are left, and the certificate of what they end at.

        Raises
        ------
        NothingTrained
            Ctrl-C before the first epoch was finished.
        """
        run, stage, problem = self.run, self.stage, self.problem
        with tensor_float32(run.mixed):
            status, point, by_hand = self._epochs()
        seconds = self._elapsed()
        if status == "diverged":
            outputs = evaluate_outputs(self.features, point.u, point.outputs)
            finite = bool(torch.isfinite(outputs).all())
            point = point if (finite if run.group is None else not run.group.any(not finite)) else self.first
        trained = self._from_factors(point)
        result = run.result(stage, problem, trained, status, self.trace)
        result.features, result.seconds = self.kind, seconds
        if not by_hand:
            plain = self.features if run.sgd.augment is None else self._features(self.op)
            result.accuracy = run.train.accuracy(evaluate_outputs(plain, point.u, point.outputs))
            del plain
        result.validation_accuracy = self.trace[-1]["validation_accuracy"] if self.trace else None
        if run.certify and not by_hand and status != "diverged":
            # Pooled patches and momentum make room for the passes in float64.
            del self.features, self.sgd, self.validation
            result.certificate = self._certify(point)
            result.certify_seconds = self._elapsed() - seconds
            if status == "max_iter" and result.certificate.relative_gap <= stage.tol:
                result.status = "certified"
        return result, trained

    def _epochs(self) -> tuple[str, Factors, bool]:
        """Status, the factors after the last good epoch, and whether Ctrl-C ended it."""
        run, stage, sgd = self.run, self.stage, self.sgd
        point = sgd.factors.copy()
        try:
            while sgd.epoch < stage.epochs:
                entry = {"stage": stage.number} | sgd.run_epoch()
                if sgd.has_diverged(entry["loss"]):
                    self._warn_of_divergence()
                    return "diverged", point, False
                point = sgd.factors.copy()
                entry["validation_accuracy"] = None if self.validation is None else self._validate(self.validation)
                entry["seconds"] = self._elapsed()
                self.trace.append(entry)
                if run.folder is not None:
                    facts = {"epoch": sgd.epoch, "trace": self.trace, "seconds": self._elapsed(), "features": self.kind}
                    run.folder.save_training(stage.number, run.seed, facts, sgd.state() | {"gates": self.gates})
                self._report(entry)
                if run.stops(entry):
                    return "interrupted", point, False
        except KeyboardInterrupt as cause:
            if run.group is not None:
                # The other processes may be anywhere in their work, or gone.
                raise DistributedError(
                    f"training was interrupted in epoch {sgd.epoch + 1} of stage {stage.number}"
                ) from cause
            if not self.trace:
                raise NothingTrained from None
            return "interrupted", point, True
        return "max_iter", point, False

    def _validate(self, validation: BatchFeatures) -> float:
        assert self.run.validation is not None
        return self.run.validation.accuracy(self.sgd.outputs(validation))

    def _certify(self, point: Factors) -> Certificate:
        op = self.op
        rank = len(point.u) // op.n_gates
        U = point.u.view(op.n_gates, rank, -1).mT
        right = op.merge_right(point.weight)
        V = right.view(op.n_gates, rank, -1).mT
        return certify(self.problem, factors=(U, V), intercept=point.bias)

    def _from_factors(self, point: Factors) -> TrainedStage:
        op = self.op
        gate = torch.arange(op.n_gates, device=op.device).repeat_interleave(len(point.u) // op.n_gates)
        columns = Columns(gate, point.u, op.merge_right(point.weight))
        return self.run.trained_stage(self.stage, self.problem, columns, point.bias)

    def _warn_of_divergence(self) -> None:
        warnings.warn(
            f"training of stage {self.stage.number} diverged in epoch {self.sgd.epoch} and ends there; a step below "
            f"{self.stage.step:g} is wanted",
            CertificationWarning,
            stacklevel=2,
        )

    def _report(self, entry: dict[str, Any]) -> None:
        if not self.run.verbose or (self.run.group is not None and self.run.group.rank > 0):
            return
        held = entry["validation_accuracy"]
        tail = "" if held is None else f"  validation {100 * held:.2f}%"
        Console(stderr=True).print(
            f"stage {entry['stage']}  epoch {entry['epoch']}/{self.stage.epochs}  objective {entry['objective']:.5g}  "
            f"accuracy {100 * entry['accuracy']:.2f}%{tail}  {entry['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
