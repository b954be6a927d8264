"""Options that commands share, and the estimator that those of ``fit`` stand for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from cvxnn.errors import InvalidInputError
from cvxnn.estimators import ConvexMLPClassifier, ConvexMLPRegressor
from cvxnn.model_selection import ConvexMLPClassifierCV, ConvexMLPRegressorCV

__all__ = ["Data", "Json", "Model", "Target", "folder", "make_estimator", "parse_beta", "parse_options"]

_DATA_HELP = "A CSV or Parquet file with a header, or a bundled name ('cvxnn datasets list')."
Data = Annotated[str, typer.Argument(metavar="DATA", help=_DATA_HELP, show_default=False)]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model.safetensors that 'cvxnn fit' wrote.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output; words go to standard error.")]
Target = Annotated[str | None, typer.Option(help="Target column.", show_default="that of the model")]

_ESTIMATORS: dict[tuple[str, bool], Any] = {
    ("classification", False): ConvexMLPClassifier,
    ("classification", True): ConvexMLPClassifierCV,
    ("regression", False): ConvexMLPRegressor,
    ("regression", True): ConvexMLPRegressorCV,
}


def folder(text: str) -> Path:
    """The folder of --out; an empty name, as of an unset shell variable, is refused."""
    if not text:
        raise InvalidInputError("--out is empty; the name of a folder is wanted")
    return Path(text)


def parse_beta(text: str) -> float | None:
    """A number, or None for "auto"."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(f"--beta is {text!r}; a positive number or 'auto' is wanted") from None


def parse_options(pairs: list[str] | None) -> dict[str, Any] | None:
    """Solver options from NAME=VALUE; values are numbers, true, false or texts."""
    options = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise InvalidInputError(f"--solver-option is {pair!r}; NAME=VALUE is wanted")
        options[name] = _value(text)
    return options or None


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def make_estimator(task: str, beta: float | None, parameters: dict[str, Any]) -> Any:
    """An estimator for a task; without a beta it is chosen by cross-validation."""
    kind = _ESTIMATORS[task, beta is None]
    known = inspect.signature(kind).parameters
    chosen = dict(parameters) if beta is None else {**parameters, "beta": beta}
    return kind(**{name: value for name, value in chosen.items() if name in known})
