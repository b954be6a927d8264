"""What is known of a trained stage: certificate, status, course, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from cvxnn.certificates import Certificate

__all__ = ["StageResult", "accuracy"]


@dataclass
class StageResult:
    """One stage of :class:`LayerwiseCNNClassifier`.

    Attributes
    ----------
    number : int
        Counted from 1.
    method, loss : str
    status : {"certified", "max_iter", "stationary", "time_limit", "diverged", "interrupted"}
        "max_iter" also where all epochs of SGD were run and the gap is above `tol` (or not known).
    certificate : Certificate or None
        Of the stage's problem, given the stages before it; None with ``certify=False`` or after Ctrl-C.
    trace : list of dict
        SGD: per epoch stage, epoch, step, loss, objective, accuracy (the last three as seen in training),
        validation_accuracy, seconds. Convex: the trace of the solver.
    seconds, certify_seconds : float
        Training with its preparation, and the certificate of SGD.
    n_gates, n_columns : int
        Gates after duplicates were merged, and columns u_j of the stage.
    channels : int
        Channels that the next stage sees.
    image_shape, map_shape : tuple of int
        (C, H, W) of the images of the stage, after downsampling, and of its maps. With ``mirror=True`` H counts the
        rows of both images and, in the first, those of the zeros between them.
    accuracy, validation_accuracy : float or None
        Of the stage's head on the training set without augmentation, and on the validation set.
    features : {"pooled", "convolved", "solver"}
        How SGD computed hidden outputs.
    rounding : float
        What readings of the stage's images can differ by (relative); 0 where they were kept in memory.
    peak_bytes : int
        The most memory while the stage was trained and certified: allocated on a GPU, otherwise resident.
    """

    number: int
    method: str
    loss: str
    status: str
    certificate: Certificate | None
    trace: list[dict[str, Any]] = field(repr=False)
    seconds: float = 0.0
    certify_seconds: float = 0.0
    n_gates: int = 0
    n_columns: int = 0
    channels: int = 0
    image_shape: tuple[int, ...] = ()
    map_shape: tuple[int, ...] = ()
    accuracy: float | None = None
    validation_accuracy: float | None = None
    features: str = "solver"
    rounding: float = 0.0
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON; infinities become None."""
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["certificate"] = None if self.certificate is None else self.certificate.to_dict()
        values["trace"] = [{key: _json(value) for key, value in entry.items()} for entry in self.trace]
        values["image_shape"], values["map_shape"] = list(self.image_shape), list(self.map_shape)
        return {key: _json(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StageResult:
        """The inverse of :meth:`to_dict`."""
        # Files that were written before peak_bytes was kept do not have it.
        known = {"peak_bytes": 0} | {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        if known["certificate"] is not None:
            known["certificate"] = Certificate.from_dict(known["certificate"])
        known["trace"] = [
            {key: math.inf if v is None and key in _INFINITE else v for key, v in entry.items()}
            for entry in known["trace"]
        ]
        known["rounding"] = math.inf if known["rounding"] is None else known["rounding"]
        known["image_shape"], known["map_shape"] = tuple(known["image_shape"]), tuple(known["map_shape"])
        return cls(**known)


def accuracy(outputs: torch.Tensor, labels: np.ndarray) -> float:
    """Part of the samples whose largest output is that of their label."""
    return float((outputs.argmax(1).cpu().numpy() == labels).mean())


_INFINITE = ("primal", "relative_gap", "loss", "objective")


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
