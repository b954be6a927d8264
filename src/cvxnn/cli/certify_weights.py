"""``cvxnn certify`` for weights that were trained elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cvxnn._version import __version__
from cvxnn.audit import NetworkReport, certify_network
from cvxnn.cli.data import DataError, Source, data_errors, open_source, target_values
from cvxnn.cli.report import NOT_CERTIFIED, Report
from cvxnn.cli.weights import read_weights
from cvxnn.errors import InvalidInputError
from cvxnn.tables import TablePreprocessor, number_values
from cvxnn.validation import check_choice, check_positive

__all__ = ["WeightsRequest", "certify_weights"]

_DEFAULT_TOL = 1e-4


@dataclass(frozen=True)
class WeightsRequest:
    """Options of the command, as given."""

    beta: float | None
    loss: str | None
    reduction: str
    activation: str | None
    task: str | None
    penalize_biases: bool
    standardise: bool
    gates: str | None
    time_limit: float
    tol: float | None


def certify_weights(model: str, data: str, target: str | None, request: WeightsRequest, as_json: bool) -> int:
    """Run the command on a file of weights."""
    weights = read_weights(model)
    if request.beta is None:
        kind = "the weights of a network" if isinstance(weights, dict) else "a bare network, no trained model"
        raise InvalidInputError(
            f"--beta is missing and {model} holds {kind}; the weight decay of its training is wanted"
        )
    if request.task is not None:
        check_choice(request.task, "task", ("classification", "regression"))
    tol = check_positive(_DEFAULT_TOL if request.tol is None else request.tol, "tol", allow_zero=True)
    source = open_source(data)
    column = source.choose_target(target)
    X = _features(source, column, request.standardise)
    fallback = source.task if target is None else None
    Y, task = target_values(source.frame[column], request.task or fallback)
    found = certify_network(
        weights,
        X,
        Y,
        beta=request.beta,
        loss=request.loss or "squared",
        reduction=request.reduction,
        penalize_biases=request.penalize_biases,
        gates=_gates(request.gates),
        activation=request.activation,
        time_limit=request.time_limit,
        tol=tol,
    )
    certified = found.certificate.relative_gap <= tol
    _say(model, source, column, request, found, tol, task, as_json)
    return 0 if certified else NOT_CERTIFIED


def _say(
    model: str,
    source: Source,
    column: str,
    request: WeightsRequest,
    found: NetworkReport,
    tol: float,
    task: str,
    as_json: bool,
) -> None:
    certificate = found.certificate
    certified = certificate.relative_gap <= tol
    document: dict[str, Any] = {
        "command": "certify",
        "version": __version__,
        "model": model,
        "data": {"name": source.name, "target": column, "rows": "all", "n_rows": found.n_samples},
        "beta": found.beta,
        "loss": found.loss,
        "reduction": found.reduction,
        "activation": found.activation,
        "tol": tol,
        "certified": certified,
        "certificate": certificate.to_dict(),
        "report": found.to_dict(),
    }
    report = Report(as_json)
    features = "standardised and encoded as 'cvxnn fit' does" if request.standardise else "taken as they are in DATA"
    report.rows(
        [
            ("model", f"{model}: {found.activation}, {found.loss} loss, beta {found.beta:.3g}, {found.reduction}"),
            ("data", f"{source.name}: all rows, {found.n_samples}; {task}; target {column!r}; features {features}"),
        ]
    )
    report.say()
    report.say(found.summary())
    if not certified:
        report.warn(f"not certified to tol={tol:g}: the relative duality gap is {certificate.relative_gap:.1e}")
    report.finish(document)


def _features(source: Source, target: str, standardise: bool) -> np.ndarray:
    """The feature columns in their order."""
    if standardise:
        with data_errors():
            return TablePreprocessor(target).fit(source.frame).transform(source.frame)
    names = [name for name in source.frame.columns if name != target]
    if not names:
        raise DataError(f"{source.name} has no column besides the target {target!r}; features are wanted")
    with data_errors():
        return np.column_stack([number_values(name, source.frame[name]) for name in names])


def _gates(text: str | None) -> Any:
    if text is None or text == "enumerate":
        return text
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"--gates is {text!r}; 'enumerate' or a number of gates to draw is wanted") from None
