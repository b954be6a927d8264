"""Local training of a two-layer network: all neurons at once, free to cross from cell to cell."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch
from scipy.optimize import minimize

from cvxnn.audit.task import Point, Task
from cvxnn.columns import Columns

__all__ = ["descend"]


class _OutOfTimeError(Exception):
    """The deadline has passed."""


def descend(task: Task, point: Point, *, max_iter: int, deadline: float) -> Point:
    """L-BFGS on the objective of the network, from a point; the best point met.

    Parameters
    ----------
    task : Task
        Not of a gated network's gates: those stay as they are.
    max_iter : int
    deadline : float
        In seconds of ``time.perf_counter``.
    """
    m, d = point.columns.u.shape
    c = point.columns.v.shape[1]
    parts = [point.columns.u.reshape(-1), point.columns.v.reshape(-1)]
    if task.output_bias:
        parts.append(point.bias)
    best = (np.inf, torch.cat(parts).numpy())

    def unpack(x: np.ndarray) -> Point:
        flat = torch.from_numpy(x)
        u, v = flat[: m * d].view(m, d), flat[m * d : m * (d + c)].view(m, c)
        return Point(Columns(point.columns.gate, u, v), flat[m * (d + c) :] if task.output_bias else point.bias)

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        if time.perf_counter() > deadline:
            raise _OutOfTimeError
        value, slopes = _slopes(task, unpack(x))
        if value < best[0]:
            best = (value, x.copy())
        return value, slopes

    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 20, "ftol": 0.0, "gtol": 1e-14}
    with contextlib.suppress(_OutOfTimeError):
        minimize(evaluate, best[1], jac=True, method="L-BFGS-B", options=options)
    return unpack(best[1])


def _slopes(task: Task, point: Point) -> tuple[float, np.ndarray]:
    """Objective and its gradient (of a side at kinks) in (u, v, b)."""
    columns = point.columns
    hidden = task.hidden(columns)
    outputs = hidden @ columns.v + point.bias
    gradient = task.gradient(outputs)
    back = gradient @ columns.v.T
    if task.activation == "relu":
        back = back * (hidden > 0)
    elif task.bits is not None:
        back = back * task.bits[:, columns.gate]
    left = back.T @ task.X + task.beta * columns.u
    right = hidden.T @ gradient + task.beta * columns.v
    parts = [left.reshape(-1), right.reshape(-1)]
    if task.output_bias:
        parts.append(gradient.sum(0) + (task.beta * point.bias if task.penalised_bias else 0.0))
    penalty = float(columns.u.square().sum() + columns.v.square().sum()) / 2 + task.bias_penalty(point)
    return task.loss_value(outputs) + task.beta * penalty, torch.cat(parts).numpy()
