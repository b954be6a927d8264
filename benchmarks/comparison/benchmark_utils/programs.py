"""The convex program of an instance, its best known lower bound, and the classes that outputs stand for."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

import cvxnn

__all__ = ["best_bound", "features", "hits", "make_program", "predictions"]

#: Bounds found in this process only, so that no result of another version is ever read.
_BOUNDS: dict[str, float] = {}
_TIGHT = 1e-9


def make_program(X: np.ndarray, Y: np.ndarray, gates: np.ndarray, beta: float) -> cvxnn.Problem:
    """min 1/2 ||sum_k D_k X Z_k - Y||^2 + beta sum_k ||Z_k||_*, float64, without biases."""
    return cvxnn.mlp_problem(X, Y, gates=gates, beta=beta, reduction="sum")


def features(X: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """[D_1 X, ..., D_P X] of shape (n, P d), by columns as coordinate descent wants it."""
    active = (X @ gates >= 0).astype(np.float64)
    return np.concatenate([active[:, k : k + 1] * X for k in range(gates.shape[1])], axis=1).copy(order="F")


def _key(problem: cvxnn.Problem) -> str:
    parts = [*problem.operator.data_tensors(), problem.operator.patterns, problem.Y]
    digest = hashlib.sha256(repr(problem.beta).encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part.numpy()).tobytes())
    return digest.hexdigest()


def best_bound(problem: cvxnn.Problem, time_limit: float, candidate: float = 0.0) -> float:
    """The largest lower bound known: of a reference run, not timed, and of whatever was certified since.

    Parameters
    ----------
    time_limit : float
        Limit of the reference run, in seconds.
    candidate : float
        A lower bound from a certificate, to be remembered.
    """
    key = _key(problem)
    if key not in _BOUNDS:
        reference = cvxnn.solve(problem, tol=_TIGHT, time_limit=time_limit)
        _BOUNDS[key] = reference.certificate.lower_bound
    _BOUNDS[key] = max(_BOUNDS[key], candidate)
    return _BOUNDS[key]


def hits(outputs: np.ndarray, labels: np.ndarray | None) -> float:
    """Fraction of samples whose class, the sign or the largest output, is the label; NaN without labels."""
    if labels is None or len(labels) == 0:
        return float("nan")
    classes = np.where(outputs[:, 0] >= 0, 1, -1) if outputs.shape[1] == 1 else outputs.argmax(1)
    return float(np.mean(classes == labels))


def predictions(problem: cvxnn.Problem, Z: Any, X: np.ndarray) -> np.ndarray:
    """Outputs of the network with blocks Z for other samples."""
    return problem.operator.predict(torch.as_tensor(Z, dtype=problem.dtype), X).numpy()
