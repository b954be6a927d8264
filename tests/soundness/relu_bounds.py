"""Projections onto cones and bounds of dual norms for random matrices, held against multipliers and witnesses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cvxnn.cones import cone_dual_norms
from cvxnn.neurons import neuron_dual_norm
from tests.soundness.relu_norms import project
from tests.soundness.relu_reference import ReluReference

if TYPE_CHECKING:
    from tests.soundness.relu_check import ReluChecker

__all__ = ["check_bounds"]

_METHODS = ("copositive", "branching", "spectral", "auto")


def check_bounds(checker: ReluChecker, rng: np.random.Generator) -> None:
    """Projections and bounds of the dual norms for random matrices, with the methods in turn."""
    P, d, c = checker.problem.n_gates, checker.instance.X.shape[1], checker.instance.Y.shape[1]
    gate = rng.integers(P, size=8)
    G = rng.normal(size=(8, d, c)) * 10 ** rng.uniform(-8, 8)
    exact = ReluReference(checker.instance, checker.reference.patterns[checker.numbers], checker.reference.beta).cones
    projected = checker.cones.project(torch.from_numpy(gate), torch.from_numpy(G[:, :, 0]))
    for k, z, point, polar in zip(gate, G[:, :, 0], projected.point, projected.polar, strict=True):
        nearest = project(exact.normals(int(k)), z).astype(float)
        size = np.linalg.norm(z)
        checker.expect("projection", "is the nearest point", np.linalg.norm(point.numpy() - nearest) / size, 1e-8)
        bound = np.linalg.norm(z + polar.numpy()) / size
        checker.expect("projection", "its multiplier proves it", np.linalg.norm(nearest) / size - bound)
    method = _METHODS[checker.report.index % len(_METHODS)]
    for name in {"auto", method}:
        found = cone_dual_norms(checker.cones, torch.from_numpy(gate), torch.from_numpy(G), method=name)
        for i, k in enumerate(gate):
            lower, upper, _ = exact.bounds(int(k), G[i].astype(np.longdouble))
            size = np.linalg.norm(G[i])
            checker.expect(f"{name} bound", "upper >= q", (lower - float(found.upper[i])) / size)
            checker.expect(f"{name} bound", "lower <= q", (float(found.lower[i]) - upper) / size)
    _check_neurons(checker, rng)


def _check_neurons(checker: ReluChecker, rng: np.random.Generator) -> None:
    """The dual norm over all neurons without their patterns, and its witness."""
    if not checker.reference.all_neurons:
        return
    c = checker.instance.Y.shape[1]
    for nu in (rng.normal(size=(len(checker.reference.Y), c)), checker.reference.interval.nu.astype(float)):
        rows = checker.reference.full(nu)
        lower, upper, _ = checker.reference.dual_norm(nu.astype(np.longdouble))
        size = float((np.linalg.norm(checker.instance.X, axis=1) * np.linalg.norm(rows, axis=1)).sum()) or 1.0
        found = neuron_dual_norm(
            torch.from_numpy(checker.instance.X), torch.from_numpy(rows), time_limit=0.2, max_nodes=5000, starts=16
        )
        checker.expect("neuron_dual_norm", "upper >= q", (lower - found.upper) / size, 1e-12)
        checker.expect("neuron_dual_norm", "lower <= q", (found.lower - upper) / size, 1e-12)
        u = found.u.numpy().astype(np.longdouble)
        value = np.maximum(checker.instance.X.astype(np.longdouble) @ u, 0) @ rows
        reached = float(np.sqrt((value**2).sum()))
        checker.expect("neuron_dual_norm", "its neuron attains lower", (found.lower - reached) / size, 1e-12)
