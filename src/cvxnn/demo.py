"""``python -m cvxnn.demo``: handwritten digits, a certificate, and the usual methods beside it."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier

from cvxnn.certificates import Certificate
from cvxnn.errors import CertificationWarning, CvxnnError, StorageError
from cvxnn.estimators import ConvexMLPClassifier
from cvxnn.plotting import plot_confusion, plot_gap, plot_gates
from cvxnn.storage import save

__all__ = ["main"]

_METHODS: dict[str, Callable[[], Any]] = {
    "ConvexMLPClassifier (cvxnn)": lambda: ConvexMLPClassifier(random_state=0),
    "MLPClassifier (scikit-learn)": lambda: MLPClassifier(random_state=0, max_iter=1000),
    "LogisticRegression (scikit-learn)": lambda: LogisticRegression(max_iter=1000),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        ``--out DIR``, ``--folds N`` and ``--samples N``; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m cvxnn.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder for the pictures and the model")
    parser.add_argument("--folds", type=int, default=5, help="held-out parts; every sample is in one of them")
    parser.add_argument("--samples", type=int, default=None, help="use only the first so many digits")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments.out, arguments.folds, arguments.samples)
    except CvxnnError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _run(out: Path, n_folds: int, n_samples: int | None) -> int:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {out}: {error.strerror or error}") from error
    X, y = load_digits(return_X_y=True)
    X, y = X[:n_samples], y[:n_samples]
    folds = list(StratifiedKFold(n_folds, shuffle=True, random_state=0).split(X, y))
    console = Console(highlight=False)
    console.print(
        f"{len(X)} handwritten digits of 8 x 8 pixels. Each method is trained {n_folds} times with its default\n"
        f"settings, every time on all but one part in {n_folds}, and tested on the digits it has not seen. Pixels are\n"
        "centred, and divided by the standard deviation of all of them, as measured on the training digits.\n",
        soft_wrap=True,
    )
    accuracies, seconds, models = _compare(X, y, folds)
    console.print(_table(accuracies, seconds))
    model = models[0]
    console.print(f"\nWhat the certificate of the first network says (trained on {len(folds[0][0])} digits)\n")
    console.print(explain(model.certificate_), soft_wrap=True)
    files = _write(out, model, _scaled(X, *folds[0])[1], y[folds[0][1]])
    console.print(f"\nWritten to {out}:")
    for path, words in files:
        console.print(f"  {path}  {words}", soft_wrap=True)
    return 0 if all(each.result_.status == "certified" for each in models) else 3


def _scaled(X: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and test pixels, centred one by one and divided by one standard deviation for all."""
    mean, deviation = X[train].mean(axis=0), X[train].std()
    return (X[train] - mean) / deviation, (X[test] - mean) / deviation


def _compare(
    X: np.ndarray, y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[ConvexMLPClassifier]]:
    """Held-out accuracy and training time of every method on every fold, and the networks of cvxnn."""
    accuracies: dict[str, list[float]] = {name: [] for name in _METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in _METHODS}
    models = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", CertificationWarning)
        task = bar.add_task("training", total=len(folds) * len(_METHODS))
        for train, test in folds:
            X_train, X_test = _scaled(X, train, test)
            for name, build in _METHODS.items():
                bar.update(task, description=f"{name:33s}")
                begin = time.perf_counter()
                model = build().fit(X_train, y[train])
                seconds[name].append(time.perf_counter() - begin)
                accuracies[name].append(float(model.score(X_test, y[test])))
                bar.advance(task)
                if isinstance(model, ConvexMLPClassifier):
                    models.append(model)
    return accuracies, seconds, models


def _table(accuracies: dict[str, list[float]], seconds: dict[str, list[float]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("method")
    for name in ("test accuracy", "worst part", "best part", "seconds"):
        table.add_column(name, justify="right")
    for name, values in accuracies.items():
        cells = (np.mean(values), np.min(values), np.max(values))
        table.add_row(name, *(f"{cell:.2%}" for cell in cells), f"{np.mean(seconds[name]):.2f}")
    return table


def explain(certificate: Certificate) -> str:
    """The certificate in words for somebody who has never seen one."""
    if math.isfinite(certificate.relative_gap):
        percent = f"{100 * certificate.relative_gap:.2g}%"
        verdict = (
            f"the objective is at most {percent} above the lowest value that any weights can reach. No other seed for\n"
            "the weights, learning rate or longer training can improve it by more than that."
        )
    else:
        verdict = "the lower bound found so far is zero, which proves nothing; a longer training finds a better one."
    return (
        f"  training objective of this network        {certificate.primal:.8f}\n"
        f"  proven: no choice of weights gets below   {certificate.lower_bound:.8f}\n\n"
        "Training minimises the error on the training digits plus a penalty on the size of the weights. Usually\n"
        "nobody knows whether another run would have found better weights. Here the problem is convex, and\n"
        f"{verdict}\n"
        f"(Among networks with the same {len(certificate.gate_ratios)} gates, which were drawn at random. The "
        "certificate says nothing about\ndigits not seen in training: for these there is the test accuracy above.)"
    )


def _write(out: Path, model: ConvexMLPClassifier, X_test: np.ndarray, y_test: np.ndarray) -> list[tuple[Path, str]]:
    gap = plot_gap(model.result_.trace, out / "gap.png", tol=model.tol)
    gates = plot_gates(model.certificate_, out / "gates.png")
    confusion = plot_confusion(y_test, model.predict(X_test), out / "confusion.png", part="test digits")
    stored = save(model, out / "model.safetensors")
    return [
        (gap, "how the proven gap shrank in training"),
        (gates, "the gradient of every gate, relative to beta: at an exact optimum none is above 1"),
        (confusion, "which digits were mistaken for which"),
        (stored, "the first network, for cvxnn.load"),
    ]


if __name__ == "__main__":
    sys.exit(main())
