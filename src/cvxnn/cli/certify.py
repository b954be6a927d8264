"""``cvxnn certify``."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import typer
from sklearn.base import is_classifier

from cvxnn import certificates
from cvxnn._version import __version__
from cvxnn.audit import certify_network
from cvxnn.certificates import Certificate
from cvxnn.cli.certify_weights import WeightsRequest, certify_weights
from cvxnn.cli.data import (
    DataError,
    Source,
    data_errors,
    features_of,
    label_indices,
    load_model,
    open_source,
    split_rows,
    target_values,
    unknown_category_notes,
)
from cvxnn.cli.options import Data, Json, Target
from cvxnn.cli.report import NOT_CERTIFIED, Report
from cvxnn.cli.weights import holds_foreign_weights
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.networks import TwoLayerNetwork, padded_factors
from cvxnn.problems import mlp_problem
from cvxnn.samples import merge_duplicates
from cvxnn.tables import number_values
from cvxnn.validation import check_choice, check_positive

__all__ = ["certify"]

_MODEL_HELP = (
    "A model.safetensors that 'cvxnn fit' wrote, or the weights of a two-layer network: safetensors, a torch state "
    "dict (.pt, .pth) or .npz."
)
_TASK_HELP = "For weights: 'classification' or 'regression'; by default as for 'cvxnn fit'."
_PARTS = ("train", "test", "all")
_ROWS_HELP = (
    "'train', 'test' or 'all' rows of DATA; by default the training rows where DATA is the table that 'cvxnn fit' "
    "split, and all otherwise."
)


def certify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)],
    data: Data,
    target: Target = None,
    beta: Annotated[float | None, typer.Option(help="Regularisation.", show_default="that of the model")] = None,
    loss: Annotated[str | None, typer.Option(help="Loss.", show_default="that of the model")] = None,
    reduction: Annotated[str, typer.Option(help="mean or sum of the losses; beta is not rescaled.")] = "mean",
    activation: Annotated[
        str | None, typer.Option(help="Activation of the network.", show_default="that of the model")
    ] = None,
    rows: Annotated[str | None, typer.Option(help=_ROWS_HELP, show_default=False)] = None,
    tol: Annotated[
        float | None, typer.Option(help="Relative gap for exit status 0.", show_default="that of the model")
    ] = None,
    task: Annotated[str | None, typer.Option(help=_TASK_HELP, show_default=False)] = None,
    penalize_biases: Annotated[
        bool, typer.Option("--penalize-biases", help="For weights: the biases had weight decay too.")
    ] = False,
    standardise: Annotated[
        bool,
        typer.Option("--standardise", help="For weights: standardise and encode the features as 'cvxnn fit' does."),
    ] = False,
    gates: Annotated[
        str | None, typer.Option(help="For weights: a number of gates to draw, or 'enumerate' for all patterns.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="For ReLU networks and weights: seconds for the search of better bounds.")
    ] = 10.0,
    as_json: Json = False,
) -> int:
    """Say how far a trained MODEL can be from the global optimum of the training problem on DATA.

    MODEL is a model of 'cvxnn fit', or the weights of a two-layer network that was trained elsewhere; these need
    --beta, the weight decay. Nothing in a file is executed.
    """
    if holds_foreign_weights(model):
        if rows is not None:
            raise InvalidInputError("--rows is for models of 'cvxnn fit'; weights are certified on all rows of DATA")
        request = WeightsRequest(
            beta=beta,
            loss=loss,
            reduction=reduction,
            activation=activation,
            task=task,
            penalize_biases=penalize_biases,
            standardise=standardise,
            gates=gates,
            time_limit=time_limit,
            tol=tol,
        )
        return certify_weights(model, data, target, request, as_json)
    for name, given in (("--task", task), ("--gates", gates)):
        if given is not None:
            raise InvalidInputError(f"{name} is for weights; the model remembers it")
    for name, flag in (("--penalize-biases", penalize_biases), ("--standardise", standardise)):
        if flag:
            raise InvalidInputError(f"{name} is for weights; the model remembers how it was trained")
    trained = load_model(model)
    if not isinstance(trained.network_, TwoLayerNetwork):
        raise UnsupportedError(
            f"{model} holds a {type(trained).__name__}; models of 'cvxnn fit' are certified here, and others in Python"
        )
    if activation is not None and activation != trained.activation:
        raise UnsupportedError(f"--activation is {activation!r}, but the model is {trained.activation!r}")
    beta = check_positive(_model_beta(trained) if beta is None else beta, "beta")
    tol = check_positive(trained.tol if tol is None else tol, "tol", allow_zero=True)
    source = open_source(data)
    remembered = getattr(getattr(trained, "preprocessor_", None), "target", None)
    column = source.choose_target(target, remembered)
    X = np.asarray(features_of(trained, source.frame, column))
    Y = _target_matrix(trained, source.frame[column])
    chosen, part = _choose_rows(trained, source, column, rows)
    X, Y = X[chosen], Y[chosen]
    network_report = None
    if trained.activation == "relu":
        network_report = certify_network(
            trained.network_,
            X,
            Y,
            beta=beta,
            loss=loss or trained.loss,
            reduction=reduction,
            time_limit=time_limit,
            tol=tol,
        )
        certificate = network_report.certificate
    else:
        certificate = certify_model(trained, X, Y, beta=beta, loss=loss or trained.loss, reduction=reduction)
    certified = certificate.relative_gap <= tol
    document: dict[str, Any] = {
        "command": "certify",
        "version": __version__,
        "model": model,
        "data": {"name": source.name, "target": column, "rows": part, "n_rows": len(X)},
        "beta": beta,
        "loss": loss or trained.loss,
        "reduction": reduction,
        "activation": trained.activation,
        "tol": tol,
        "certified": certified,
        "certificate": certificate.to_dict(),
    }
    if network_report is not None:
        document["report"] = network_report.to_dict()
    report = Report(as_json)
    for note in unknown_category_notes(trained, source.frame):
        report.say(note)
    of = f" of {len(source.frame)}" if len(X) < len(source.frame) else ""
    report.rows(
        [
            ("model", f"{model}: {trained.activation}, {document['loss']} loss, beta {beta:.3g}, {reduction}"),
            ("data", f"{source.name}: {part} rows, {len(X)}{of}"),
        ]
    )
    report.say()
    report.say(certificate.summary() if network_report is None else network_report.summary())
    if not certified:
        report.warn(f"not certified to tol={tol:g}: the relative duality gap is {certificate.relative_gap:.1e}")
    report.finish(document)
    return 0 if certified else NOT_CERTIFIED


def _model_beta(model: Any) -> float:
    return model.beta_ if hasattr(model, "beta_") else model.beta


def _choose_rows(model: Any, source: Source, column: str, asked: str | None) -> tuple[np.ndarray, str]:
    """Indices of the rows to certify on, and which part they are."""
    everything = np.arange(len(source.frame))
    split = getattr(getattr(model, "preprocessor_", None), "split", None)
    fits = split is not None and split.get("n_rows") == len(everything)
    part = asked or ("train" if fits else "all")
    check_choice(part, "rows", _PARTS)
    if part == "all":
        return everything, part
    if split is None or not fits:
        raise InvalidInputError(f"--rows is {part!r}, but DATA is not the table that the model was trained on")
    task = "classification" if is_classifier(model) else "regression"
    y, _ = target_values(source.frame[column], task)
    try:
        train, test = split_rows(y, task, float(split["test_size"]), int(split["random_state"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the split that the model remembers cannot be repeated ({error!r})") from error
    return (train, part) if part == "train" else (test, part)


def _target_matrix(model: Any, series: Any) -> np.ndarray:
    """Targets as the estimator trains on them, (n, c)."""
    if not is_classifier(model):
        with data_errors():
            values = number_values(str(series.name), series)[:, None]
        if len(model.network_.bias) != 1:
            raise DataError(f"the model has {len(model.network_.bias)} outputs; one with a single target is wanted")
        return values
    index = label_indices(model, series)
    if (index < 0).any():
        unknown = series.iloc[int(np.flatnonzero(index < 0)[0])]
        raise DataError(f"target {series.name!r} has the value {unknown!r}, which is no class of the model")
    return np.eye(len(model.classes_))[index]


def certify_model(model: Any, X: np.ndarray, Y: np.ndarray, *, beta: float, loss: str, reduction: str) -> Certificate:
    """Certificate of a trained estimator's network for a training problem with the gates of the network.

    The penalty is that of the neurons, balanced (equation (14) of the paper); with l2 norms on both layers it
    is that of their sum per gate, which is no larger.

    Parameters
    ----------
    model : fitted estimator
    X : ndarray of shape (n, d)
    Y : ndarray of shape (n, c)
    beta, loss, reduction
        As for :func:`cvxnn.mlp_problem`.
    """
    network = model.network_
    data, targets, weights = merge_duplicates(X, Y, np.ones(len(X)))
    problem = mlp_problem(
        data,
        targets,
        activation=model.activation,
        gates=None if network.gates is None else network.gates.cpu().numpy(),
        beta=beta,
        loss=loss,
        reduction=reduction,
        hidden_bias=model.hidden_bias,
        output_bias=model.output_bias,
        norms=model.norms,
        sample_weight=weights,
        dtype=model.dtype,
    )
    dual = getattr(model, "dual_", None)
    if dual is not None and (dual.shape != problem.Y.shape or loss != model.loss):
        dual = None
    intercept = network.bias.detach().double() if model.output_bias else None
    point: dict[str, Any] = {"factors": padded_factors(network, (problem.norm.left, problem.norm.right))}
    if problem.norm.name == "nuclear":
        point = {"Z": point["factors"][0] @ point["factors"][1].mT}
    return certificates.certify(problem, **point, intercept=intercept, dual=dual)
