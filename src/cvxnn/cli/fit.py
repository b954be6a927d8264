"""``cvxnn fit``."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from cvxnn._version import __version__
from cvxnn.cli.data import MAX_CLASSES, DataError, data_errors, open_source, scores, split_rows, target_values
from cvxnn.cli.options import Data, Json, folder, make_estimator, parse_beta, parse_options
from cvxnn.cli.pictures import draw_pictures
from cvxnn.cli.report import NOT_CERTIFIED, Report, check_folder, output_folder, write_json
from cvxnn.distributed import SHARDS, start
from cvxnn.errors import CertificationWarning, CvxnnError, InvalidInputError
from cvxnn.storage import save
from cvxnn.tables import TablePreprocessor
from cvxnn.validation import check_choice, check_integer, resolve_device

__all__ = ["fit"]

_TASKS = ("classification", "regression")
_ADVICE = {"max_iter": "; raise --max-iter", "time_limit": "; raise --time-limit"}
_TASK_HELP = (
    "'classification' or 'regression'; by default classification for texts, booleans and integers with at most "
    f"{MAX_CLASSES} distinct values, and regression for other numbers."
)


def fit(
    data: Data,
    target: Annotated[str | None, typer.Option(help="Target column.", show_default="the last column")] = None,
    task: Annotated[str | None, typer.Option(help=_TASK_HELP, show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for model.safetensors, metrics.json and PNG pictures.", parser=folder),
    ] = None,
    test_size: Annotated[float, typer.Option(help="Fraction of the rows held out for testing; 0 for none.")] = 0.2,
    as_json: Json = False,
    activation: Annotated[str, typer.Option(help="gated_relu, relu or linear.")] = "gated_relu",
    n_gates: Annotated[int, typer.Option(help="Number of gates drawn.")] = 100,
    rank: Annotated[int | None, typer.Option(help="Neurons per gate, for Burer-Monteiro solvers.")] = None,
    beta: Annotated[str, typer.Option(help="Regularisation; 'auto' chooses it by cross-validation.")] = "1e-3",
    loss: Annotated[str, typer.Option(help="squared, huber, cross_entropy or logistic.")] = "squared",
    solver: Annotated[str, typer.Option(help="auto, admm, fista, frank_wolfe, interior_point.")] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap at which training ends.")] = 1e-4,
    max_iter: Annotated[int | None, typer.Option(help="Limit of iterations.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Limit in seconds.")] = None,
    hidden_bias: Annotated[bool, typer.Option(help="Bias in the hidden layer.")] = True,
    output_bias: Annotated[bool, typer.Option(help="Unpenalised bias of the outputs.")] = True,
    gates: Annotated[str | None, typer.Option(help="'enumerate' takes all gates (few features only).")] = None,
    gate_sampling: Annotated[str, typer.Option(help="gaussian, differences or whitened.")] = "gaussian",
    gate_quantile: Annotated[float | None, typer.Option(help="Gates are active on 1 - quantile of the rows.")] = None,
    norms: Annotated[str, typer.Option(help="Norms of the two layers: l1, l2 or linf, with a comma.")] = "l2,l2",
    solver_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the solver.")] = None,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    random_state: Annotated[int, typer.Option(help="Seed of the gates and of the held-out rows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep the state of the training in FILE, every 30 seconds.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --checkpoint where it exists.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Share the training rows out to the processes of torchrun.")
    ] = False,
    shard: Annotated[str, typer.Option(help="What --distributed shares out: samples or gates.")] = "samples",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line per certificate.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no report.")] = False,
) -> int:
    """Train a network on DATA and say how far it can be from the global optimum.

    Numeric columns are standardised, all others one-hot encoded; the model remembers how.
    """
    number = parse_beta(beta)
    if task is not None:
        check_choice(task, "task", _TASKS)
    check_integer(random_state, "random_state", minimum=0)
    check_choice(shard, "shard", SHARDS)
    if shard != "samples" and not distributed:
        raise InvalidInputError(f"shard is {shard!r}, which says what --distributed shares out; give that too")
    if out is not None:
        check_folder(out)
    parameters: dict[str, Any] = {
        "activation": activation,
        "n_gates": n_gates,
        "rank": rank,
        "loss": loss,
        "solver": solver,
        "tol": tol,
        "max_iter": max_iter,
        "time_limit": time_limit,
        "hidden_bias": hidden_bias,
        "output_bias": output_bias,
        "gates": gates,
        "gate_sampling": gate_sampling,
        "gate_quantile": gate_quantile,
        "norms": tuple(name.strip() for name in norms.split(",")),
        "solver_options": parse_options(solver_option),
        "dtype": dtype,
        "random_state": random_state,
        "device": device,
        "verbose": _verbosity(verbose, quiet, as_json),
    }
    if number is None and checkpoint is not None:
        raise InvalidInputError("--checkpoint is given with --beta auto, which trains many times; a beta is wanted")
    if resume and checkpoint is None:
        raise InvalidInputError("--resume is given without --checkpoint; the name of a file is wanted")
    parameters |= {"checkpoint": checkpoint, "resume": resume}
    # All processes do the same; the first one reports and writes.
    is_first = not distributed or os.environ.get("RANK", "0") == "0"
    report = Report(as_json and is_first, quiet=quiet or not is_first)
    source = open_source(data)
    column = source.choose_target(target)
    fallback = source.task if target is None else None
    y, task = target_values(source.frame[column], task or fallback)
    with data_errors():
        TablePreprocessor(column).fit(source.frame)  # errors count the rows of the whole table
    train, test = split_rows(y, task, test_size, random_state)
    split = {"test_size": test_size, "random_state": random_state, "n_rows": len(y)} if len(test) else None
    preprocessor = TablePreprocessor(column, split)
    with data_errors():
        X = preprocessor.fit(source.frame.iloc[train]).transform(source.frame)
    if number is None:
        report.say("Choosing beta by cross-validation ...")
    with start(shard=shard, device="cuda" if _on_gpu(device) else "cpu") if distributed else nullcontext() as group:
        model = _train(make_estimator(task, number, parameters), X[train], y[train])
    if not is_first:
        return 0
    model.preprocessor_ = preprocessor
    document = _document(source.name, column, task, model, X, y, train, test)
    if group is not None:
        document["processes"] = {"number": group.size, "seconds_in_communication": group.seconds}
    report.rows(_rows(document))
    report.say()
    report.say(model.certificate_.summary())
    if number is not None and (document["scores"]["test"] or {}).get("r2", 0.0) < 0:
        report.say("\nOn the test rows the mean of the target predicts better; --beta auto chooses beta for new data.")
    if out is not None:
        document["files"] = _write(out, document, model, source.frame, X, y, train, test)
        report.say()
        report.say(f"Written to {out}: {', '.join(document['files'])}")
    if not document["certified"]:
        report.warn(
            f"not certified to tol={tol:g}: training ended as {document['status']!r} at a relative duality gap of "
            f"{model.certificate_.relative_gap:.1e}{_ADVICE.get(document['status'], '')}"
        )
    report.finish(document)
    return 0 if document["certified"] else NOT_CERTIFIED


def _on_gpu(device: str) -> bool:
    return resolve_device(device).type == "cuda"


def _verbosity(verbose: bool, quiet: bool, as_json: bool) -> int:
    if quiet and verbose:
        raise InvalidInputError("--verbose and --quiet are given; one of them is wanted")
    if quiet or (as_json and not verbose and not sys.stderr.isatty()):
        return 0
    return 2 if verbose else 1


def _train(model: Any, X: np.ndarray, y: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CertificationWarning)
        try:
            return model.fit(X, y)
        except CvxnnError:
            raise
        except ValueError as error:
            raise DataError(f"the training data cannot be used: {error}") from error


def _document(
    name: str,
    column: str,
    task: str,
    model: Any,
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
) -> dict[str, Any]:
    """What there is to say about a training, for JSON."""
    result = model.result_
    return {
        "command": "fit",
        "version": __version__,
        "data": {
            "name": name,
            "target": column,
            "task": task,
            "n_train": len(train),
            "n_test": len(test),
            "n_features": X.shape[1],
            "n_outputs": len(result.intercept),
        },
        "model": type(model).__name__,
        "parameters": model.get_params(deep=False),
        "beta": result.problem.beta,
        "n_gates": result.problem.n_gates,
        "n_neurons": len(model.network_.output),
        "solver": result.solver,
        "status": result.status,
        "certified": result.status == "certified",
        "n_iter": result.n_iter,
        "seconds": result.seconds,
        "scores": {
            "train": scores(model, X[train], y[train]),
            "test": scores(model, X[test], y[test]) if len(test) else None,
        },
        "certificate": model.certificate_.to_dict(),
    }


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    data, parameters = document["data"], document["parameters"]
    outputs = f"{data['n_outputs']} classes" if data["task"] == "classification" else data["task"]
    rows = [
        ("data", f"{data['name']}: {data['n_train']} training rows, {data['n_features']} features, {outputs}"),
        ("target", data["target"]),
        ("model", f"{parameters['activation']}, {parameters['loss']} loss, beta {document['beta']:.3g}"),
        ("gates", f"{document['n_gates']} distinct, {document['n_neurons']} neurons"),
        ("training", f"{document['status']} after {document['n_iter']} iterations of {document['solver']}"),
        ("time", f"{document['seconds']:.2f} s{_processes(document)}"),
        ("train", score_text(document["scores"]["train"])),
    ]
    if document["scores"]["test"] is not None:
        rows.append(("test", f"{score_text(document['scores']['test'])} ({data['n_test']} rows held out)"))
    return rows


def _processes(document: dict[str, Any]) -> str:
    """How many processes shared the work, if there were several."""
    if "processes" not in document:
        return ""
    share = document["processes"]["seconds_in_communication"] / max(document["seconds"], 1e-9)
    return f" on {document['processes']['number']} processes, {share:.0%} of it in communication"


def score_text(values: dict[str, float]) -> str:
    """Scores in words."""
    if "accuracy" in values:
        return f"accuracy {values['accuracy']:.2%}"
    return f"R2 {values['r2']:.4f}, root mean squared error {values['rmse']:.4g}"


def _write(
    out: Path,
    document: dict[str, Any],
    model: Any,
    frame: pd.DataFrame,
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
) -> list[str]:
    """Model, metrics and pictures into a folder; their names."""
    with output_folder(out) as folder:
        save(model, folder / "model.safetensors")
        pictures = draw_pictures(folder, model, frame.iloc[train], X, y, train, test)
        names = ["model.safetensors", "metrics.json", *pictures]
        write_json(folder / "metrics.json", {**document, "files": names})
    return names
