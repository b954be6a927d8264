"""The report of a network as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cvxnn.certificates import STATIONARITY_TOLERANCE

if TYPE_CHECKING:
    from cvxnn.audit.report import NetworkReport

__all__ = ["summary_text"]

_AMONG = {
    "linear_network": "two-layer linear networks",
    "network_gates": "networks with its own activation patterns",
    "given_gates": "networks with the given gates",
    "sampled_gates": "networks with its own and the sampled gates",
    "all_gates": "gated networks with gates from every cell of the data",
    "relu_network": "two-layer ReLU networks of any width",
}
#: What samples, neurons and the networks of a scope are called.
_NAMES = {"mlp": ("samples", "neuron"), "attention": ("sequences", "head")}
_AMONG_HEADS = {"linear_network": "blocks of linear attention with any number of heads"}


def summary_text(report: NetworkReport) -> str:
    """At most 30 lines."""
    samples, neuron = _NAMES[report.architecture]
    patterns = f"; {report.n_patterns} patterns" if report.architecture == "mlp" else ""
    dead = f", {report.n_dead} of them dead on these data" if report.n_dead else ""
    rows = [
        (
            "network",
            f"{report.activation}, {report.n_neurons} {neuron}s{dead}{patterns} ({report.source})",
        ),
        ("data", f"{report.n_samples} {samples}, {report.n_features} features, {report.n_outputs} outputs"),
        ("objective", f"{report.loss} loss ({report.reduction}), beta {report.beta:.4g}"),
        ("  as trained", f"{report.objective:.8g}   (loss {report.loss_value:.8g})"),
        ("  balanced", f"{report.balanced_objective:.8g}"),
    ]
    if report.best_bias_objective is not None:
        rows.append(("  best bias", f"{report.best_bias_objective:.8g}"))
    if report.proven_suboptimal:
        rows.append(("  best found", f"{report.best_objective:.8g}"))
    near = "stationary" if report.stationarity <= STATIONARITY_TOLERANCE else "not stationary"
    rows.append(("stationarity", f"{report.stationarity:.2e}   ({near})"))
    lines = [f"{name:<14} {value}" for name, value in rows]
    return "\n".join([*lines, "", *_table(report), "", *_verdicts(report)])


def _table(report: NetworkReport) -> list[str]:
    """Certificates by scope."""
    lines = [f"{'scope':<14} {'objective':>14} {'lower bound':>14} {'gap':>9}"]
    for name, found in report.certificates.items():
        lines.append(f"{name:<14} {found.primal:>14.8g} {found.lower_bound:>14.8g} {found.relative_gap:>9.2e}")
    return lines


def _verdicts(report: NetworkReport) -> list[str]:
    found = report.certificate
    _, neuron = _NAMES[report.architecture]
    among = (_AMONG if report.architecture == "mlp" else _AMONG_HEADS).get(found.scope, found.scope)
    if found.lower_bound <= 0 < found.primal:
        lines = ["Nothing is proven about this network: all lower bounds are zero."]
    elif found.at_rounding:
        lines = [f"Globally optimal among {among}, up to rounding."]
    else:
        far = found.relative_gap > 1
        most = f"{1 + found.relative_gap:.3g} times" if far else f"{_percent(found.relative_gap)} above"
        lines = [f"At most {most} the best possible among {among}."]
    if report.proven_suboptimal:
        lines.append(
            f"Not optimal: a network with objective {report.best_objective:.8g} was found, "
            f"{_percent(report.excess[0] / (1 + report.excess[0]))} lower; improve() returns it."
        )
    witness = report.witness
    if witness is not None:
        active = f" active on {witness.n_active} samples" if report.architecture == "mlp" else ""
        lines.append(
            f"Witness: a {neuron}{active} has slope {witness.ratio:.4g} beta; adding it lowers the objective by "
            f"{witness.decrease:.3g}."
        )
    return lines


def _percent(part: float) -> str:
    return f"{100 * part:.2g}%"
