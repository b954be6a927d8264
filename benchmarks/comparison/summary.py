"""The README's table: what each solver solves and proves, and its seconds on a few instances."""

from __future__ import annotations

import math

import pandas as pd
from results import INSTANCE, as_power

__all__ = ["summary"]

#: Solver, what it is, the problem that it solves, and what it proves of its result.
_ROWS = (
    ("cvxnn-auto", "cvxnn (`auto`)", "convex; linear, gated ReLU, ReLU", "duality gap of the returned point"),
    ("cvxpy-clarabel", "CVXPY, Clarabel", "convex, as you write it", "tolerances of the solver"),
    ("cvxpy-scs", "CVXPY, SCS", "convex, as you write it", "tolerances of the solver"),
    ("scnn-rfista", "scnn 0.0.10, R-FISTA", "convex; one output", "none"),
    ("skglm-groupbcd", "skglm 0.5, GroupBCD", "convex; one output", "none"),
    ("torch-lbfgs", "torch, L-BFGS on the factors", "not convex", "none; a gap by `cvxnn.certify`"),
    ("torch-adam", "torch, Adam on the factors", "not convex", "none; a gap by `cvxnn.certify`"),
    ("sklearn-mlp", "scikit-learn `MLPClassifier`", "another: a ReLU network", "none"),
)
_NAMES = {"breast_cancer": "Breast cancer", "digits": "Digits", "spiral": "Spiral", "fashion_mnist": "Fashion-MNIST"}


def _title(dataset: str) -> str:
    """digits[c=10,n=1437] as "Digits, 10 outputs, n = 1,437"."""
    name, _, inside = dataset.partition("[")
    given = dict(part.split("=") for part in inside.rstrip("]").split(",") if part)
    parts = [_NAMES.get(name, name)]
    if "c" in given:
        parts.append("1 output" if given["c"] == "1" else f"{given['c']} outputs")
    if "n" in given:
        parts.append(f"n = {int(given['n']):,}")
    return ", ".join(parts)


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _cell(entries: pd.DataFrame, tol: float) -> str:
    """Seconds to the gap of the best setting of a solver, with the accuracy on test samples."""
    if entries.empty:
        return ""
    entry = entries.loc[entries[tol].fillna(math.inf).idxmin()]
    if entry["without_gap"]:
        text = f"trained in {_seconds(entry['seconds'])}"
    elif math.isfinite(entry[tol]):
        text = _seconds(entry[tol])
    else:
        text = f"more than {entry['cap']:g}"
    return text if math.isnan(entry["accuracy"]) else f"{text} ({entry['accuracy']:.1%})"


def summary(table: pd.DataFrame, beta: float, n_gates: int, tol: float) -> str:
    """Markdown: a line per solver, a column per data set, of the instances with this beta and number of gates.

    Parameters
    ----------
    table : pandas.DataFrame
        Of :func:`table.times`.
    """
    table = table[(table["beta"] == beta) & (table["n_gates"] == n_gates)]
    instances = list(table.groupby(INSTANCE, sort=False).groups)
    head = ["", "Problem", "Proof of the result", *(_title(instance[0]) for instance in instances)]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for solver, name, solves, proves in _ROWS:
        mine = table[table["solver"].str.partition("[")[0] == solver]
        if mine.empty:
            continue
        parts = [mine[(mine[INSTANCE] == list(instance)).all(axis=1)] for instance in instances]
        lines.append("| " + " | ".join([name, solves, proves, *(_cell(part, tol) for part in parts)]) + " |")
    lines.append("")
    lines.append(
        f"Seconds on one core to a relative gap of {as_power(tol)} of one convex program: P = {n_gates} gates "
        f"drawn, the sum of squares, beta = {beta:g} beta_max, float64; in brackets the accuracy on test samples. "
        "cvxnn proves its gap; the others reach it without knowing. `make bench` measures, "
        "`benchmarks/comparison/table.py` makes the table; [all figures](docs/results/peers.md)."
    )
    return "\n".join(lines) + "\n"
