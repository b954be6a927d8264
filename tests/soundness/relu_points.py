"""Networks at which the certificates of a ReLU problem are looked at: feasible ones and infeasible ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.soundness.cnn_relu_problems import CNNReluInstance
from tests.soundness.relu_problems import ReluInstance
from tests.soundness.relu_reference import Network, ReluReference

__all__ = ["PointSource"]

#: A name, a network, and the options "intercept" (that of the network is given) and "dual".
Points = Iterator[tuple[str, Network, dict[str, Any]]]


class PointSource:
    """Networks for one problem."""

    def __init__(self, instance: ReluInstance | CNNReluInstance, reference: ReluReference) -> None:
        self.instance, self.reference = instance, reference

    def feasible(self, rng: np.random.Generator) -> Points:
        """Zero, the best network known, scaled ones and random feasible ones."""
        best = self.best()
        yield "zero", self.reference.zero, {}
        yield "reference", best, {"intercept": True}
        yield "half the reference", self.with_intercept(0.7 * best.u, 0.7 * best.v, best.gate), {}
        for scale in (1e-3, 1.0, 30.0):
            yield f"random feasible, scale {scale:g}", self.random_network(rng, scale), {}
        if self.instance.output_bias:
            shifted = best.intercept + rng.normal(size=len(best.intercept))
            yield "random intercept", Network(best.u, best.v, best.gate, shifted), {"intercept": True}

    def infeasible(self, rng: np.random.Generator) -> Points:
        """Random columns of wrong cells, and columns pushed out of their cones by about a given amount."""
        network = self.random_network(rng, 1.0)
        wrong = rng.integers(len(self.reference.patterns), size=len(network.gate))
        turned = network.u + rng.normal(size=network.u.shape) * np.linalg.norm(network.u, axis=1, keepdims=True)
        yield "random columns", self.with_intercept(turned, network.v, wrong), {}
        yield "columns of other cells", self.with_intercept(network.u, network.v, wrong), {}
        kept = np.flatnonzero(self.reference.cones.kept)
        for amount in (1e-13, 5e-11, 2e-10, 1e-7, 1e-4, 0.03):
            if len(kept) == 0 or len(network.gate) == 0:
                return
            u = network.u.copy()
            row = self.instance.X[rng.choice(kept)]
            row = row / np.linalg.norm(row)
            pattern = self.reference.patterns[network.gate[0]]
            place = np.argmax(self.reference.cones.rows @ (self.reference.Q.T @ row))
            sign = 1.0 if pattern[kept][place] else -1.0
            u[0] -= row * (row @ u[0]) + sign * amount * np.linalg.norm(u[0]) * row
            yield f"a column out by about {amount:g}", self.with_intercept(u, network.v, network.gate), {}

    def with_duals(self, rng: np.random.Generator) -> Points:
        """The best network with dual points near the optimal one, and random ones."""
        best, nu = self.best(), self.reference.samples(self.reference.interval.nu.astype(float))
        noise = rng.normal(size=nu.shape)
        noise /= np.linalg.norm(noise)
        for name, dual in {
            "reference dual": nu,
            "1e-8 from the dual": nu + 1e-8 * np.linalg.norm(nu) * noise,
            "random dual": noise,
            "reference dual times 1.3": 1.3 * nu,
        }.items():
            yield name, best, {"dual": dual}

    def best(self) -> Network:
        """The best network known with the gate of each neuron, in whose cone it is."""
        best = self.reference.interval.network
        if len(best.gate) and (best.gate < 0).any():
            return Network(best.u, best.v, self.cells(best.u), best.intercept)
        return best

    def cells(self, u: np.ndarray) -> np.ndarray:
        """The pattern that each neuron (m, d) violates least."""
        rows = self.reference.cones.rows @ self.reference.Q.T
        signs = np.where(self.reference.patterns[:, self.reference.cones.kept], 1.0, -1.0)
        if rows.shape[0] == 0:
            return np.zeros(len(u), int)
        return (signs[:, None, :] * (u @ rows.T)[None]).min(2).argmax(0)

    def with_intercept(self, u: np.ndarray, v: np.ndarray, gate: np.ndarray) -> Network:
        """A network with its best intercept."""
        return Network(u, v, gate, self.reference.best_intercept(u, v))

    def random_network(self, rng: np.random.Generator, scale: float) -> Network:
        """Random neurons of the size of the best network, each in its cone."""
        m, d, c = int(rng.integers(1, 5)), self.instance.X.shape[1], self.instance.Y.shape[1]
        best = self.reference.interval.network
        size = scale * (np.sqrt((best.u**2).sum()) or np.sqrt(1 / self.reference.size))
        u, v = rng.normal(size=(m, d)), size * rng.normal(size=(m, c))
        if self.reference.all_neurons:
            gate = self.cells(u)
        else:
            gate = rng.integers(len(self.reference.patterns), size=m)
            u = np.array([self.reference._inside(int(k), z) for k, z in zip(gate, u, strict=True)])
            moving = np.linalg.norm(u, axis=1) > 1e-6
            u, v, gate = u[moving], v[moving], gate[moving]
        return self.with_intercept(size * u, v, gate)
