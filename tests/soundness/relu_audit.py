"""Reports of `certify_network` on random networks, held against intervals around the optima of their scopes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import cvxnn
from cvxnn.losses import Huber
from tests.soundness.relu_reference import Network, ReluReference

if TYPE_CHECKING:
    from tests.soundness.relu_check import ReluChecker

__all__ = ["check_audit"]


def check_audit(checker: ReluChecker, rng: np.random.Generator) -> None:
    """The report of a random network, and of what it is improved to, where the problem is one of all neurons."""
    instance, reference = checker.instance, checker.reference
    if instance.sample_weight is not None or not reference.all_neurons or instance.dtype != "float64":
        return
    network = checker.source.random_network(rng, 10 ** rng.uniform(-1, 0.5))
    if instance.index % 3 == 0:
        best = reference.interval.network
        size = 10 ** rng.uniform(-9, -2)
        u = best.u * (1 + size * rng.normal(size=best.u.shape))
        network = checker.source.with_intercept(u, best.v, best.gate)
    if len(network.u) == 0:
        return
    network = Network(network.u * 1.3, network.v / 1.3, network.gate, network.intercept)
    for limit in (0.0,) if checker.small else (0.0, 0.3):
        report = cvxnn.certify_network(
            _weights(checker, network),
            instance.data,
            instance.Y,
            beta=reference.beta,
            loss=Huber(instance.delta) if instance.loss == "huber" else instance.loss,
            reduction=instance.reduction,
            penalize_biases=instance.hidden_bias,
            time_limit=limit,
        )
        _check_report(checker, report, network, f"audit for {limit:g} seconds")
    if instance.index % 4 == 0 and not checker.small:
        better = report.improve(time_limit=0.3)
        _check_report(checker, better, _read(checker, better.network()), "improved network")
        gain = (better.objective - report.balanced_objective) / max(reference.interval.size, report.balanced_objective)
        checker.expect("improved network", "is not worse", gain)


def _weights(checker: ReluChecker, network: Network) -> dict[str, torch.Tensor]:
    """A state dict in the layout of torch."""
    d = checker.instance.data.shape[1]
    weights = {"0.weight": network.u[:, :d], "2.weight": network.v.T}
    if checker.instance.hidden_bias:
        weights["0.bias"] = network.u[:, d]
    if checker.instance.output_bias:
        weights["2.bias"] = network.intercept
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}


def _read(checker: ReluChecker, module: torch.nn.Module) -> Network:
    """The weights of a module (Linear, ReLU, Linear)."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    first, second = layers
    parts = [first.weight] if first.bias is None else [first.weight, first.bias[:, None]]
    u = torch.cat(parts, dim=1).detach().double().numpy()
    v = second.weight.T.detach().double().numpy()
    intercept = np.zeros(v.shape[1]) if second.bias is None else second.bias.detach().double().numpy()
    return Network(u, v, np.full(len(u), -1), intercept)


def _penalty_of_bias(checker: ReluChecker, intercept: np.ndarray) -> float:
    """beta/2 ||b||^2 where biases have weight decay."""
    decays = checker.instance.hidden_bias and checker.instance.output_bias
    return checker.reference.beta / 2 * float((intercept**2).sum()) if decays else 0.0


def _check_report(checker: ReluChecker, report: cvxnn.NetworkReport, network: Network, point: str) -> None:
    reference, interval = checker.reference, checker.reference.interval
    value = reference.objective(network) + _penalty_of_bias(checker, network.intercept)
    scale = max(abs(value), 1e-6 * reference.plain_loss)
    checker.expect(point, "objective is that of the network", abs(report.objective - value) / scale)
    checker.expect(point, "balancing only lowers it", (report.balanced_objective - report.objective) / scale)
    extra = _penalty_of_bias(checker, interval.network.intercept)
    size = max(interval.size, interval.upper + extra)
    checker.expect(point, "best_objective >= p*", (interval.lower - report.best_objective) / size)
    own = _own_upper(checker, network)
    for scope, found in report.certificates.items():
        upper = own if scope == "network_gates" else interval.upper + extra
        checker.report.n_certificates += 1
        below = (found.lower_bound - upper) / max(size, upper)
        checker.report.lower_margin = max(checker.report.lower_margin, below)
        checker.expect(f"{point}, {scope}", "lower_bound <= p*", below)
        checker.expect(f"{point}, {scope}", "primal >= p*", (interval.lower - found.primal) / size)
        ratios = found.dual_norm_ratio_lower - found.dual_norm_ratio
        checker.expect(f"{point}, {scope}", "dual_norm_ratio_lower <= dual_norm_ratio", ratios)
    if report.witness is not None:
        _check_witness(checker, report, point)


def _own_upper(checker: ReluChecker, network: Network) -> float:
    """Objective of a good network with the patterns of this one (of this one where there are several outputs)."""
    instance, reference = checker.instance, checker.reference
    # Neurons on the border of cells have the patterns of both sides.
    values = instance.X @ network.u.T
    sizes = np.linalg.norm(instance.X, axis=1)[:, None] * np.linalg.norm(network.u, axis=1)
    upper = reference.objective(network) + _penalty_of_bias(checker, network.intercept)
    live = (values > 0).any(0)
    clear = (np.abs(values) > 1e-9 * sizes) | (sizes == 0)
    if len(reference.Y[0]) > 1 or len(network.u) > 12 or not live.any() or not clear.all():
        return upper
    patterns = np.unique((values[:, live] >= 0).T, axis=0)
    narrow = ReluReference(instance, patterns, reference.beta).interval
    return min(upper, narrow.upper + _penalty_of_bias(checker, narrow.network.intercept))


def _check_witness(checker: ReluChecker, report: cvxnn.NetworkReport, point: str) -> None:
    """The decrease is real: the objective falls by this much when the neuron is added."""
    witness = report.witness
    assert witness is not None
    before = _read(checker, report.network())
    u, v = (part.numpy()[None] for part in witness.neuron)
    after = Network(np.vstack([before.u, u]), np.vstack([before.v, v]), np.zeros(0), before.intercept)
    first, second = checker.reference.objective(before), checker.reference.objective(after)
    off = abs(first - second - witness.decrease) / max(abs(first), 1e-6 * checker.reference.plain_loss)
    checker.expect(point, "the witness lowers the objective by what is said", off)
    if not second < first:
        checker.violated(point, "the witness lowers the objective", second - first)
