"""Tables from the CSV of the comparison: `python benchmarks/comparison/table.py FILE.csv ... [--write PAGE.md]`.

With --write the lines between `<!-- peers:begin -->` and `<!-- peers:end -->` are replaced: by all tables, or with
--summary by the short one of the README.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pandas as pd
from results import INSTANCE, seconds_to
from summary import summary

TOLERANCES = (1e-4, 1e-6)
_MARKS = re.compile(r"(<!-- peers:begin -->\n).*?(<!-- peers:end -->)", re.DOTALL)


def times(rows: pd.DataFrame) -> pd.DataFrame:
    """Median seconds to each tolerance, a row per instance and solver, with the best accuracy on the test samples."""
    entries = []
    for (*instance, solver), curves in rows.groupby([*INSTANCE, "solver"], sort=False):
        entry = dict(zip(INSTANCE, instance, strict=True)) | {"solver": solver, "cap": curves["cap"].iloc[0]}
        for tol in TOLERANCES:
            runs = [seconds_to(curve, tol) for _, curve in curves.groupby("repetition")]
            entry[tol] = pd.Series(runs).median()
        last = curves.sort_values("seconds").groupby("repetition").last()
        entry |= {"seconds": last["seconds"].median(), "accuracy": last["test_accuracy"].median()}
        entry["without_gap"] = bool(curves["gap"].isna().all())
        entries.append(entry)
    return pd.DataFrame(entries)


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _cell(entry: pd.Series, tol: float) -> str:
    """Seconds; or which cap was not enough; or nothing."""
    if entry["without_gap"]:
        return "another problem"
    return _seconds(entry[tol]) if math.isfinite(entry[tol]) else f"not in {entry['cap']:g}"


def markdown(rows: pd.DataFrame) -> str:
    """One table: a line per solver, two columns per instance, and the accuracy."""
    table = times(rows)
    instances = list(table.groupby(INSTANCE, sort=False).groups)
    head = ["Seconds to a relative gap of 1e-4 / 1e-6"]
    head += [f"{dataset}, P = {gates}, beta = {beta:g} beta_max" for dataset, beta, gates in instances]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for solver in table["solver"].unique():
        cells = [solver]
        for instance in instances:
            mine = table[(table[INSTANCE] == list(instance)).all(axis=1) & (table["solver"] == solver)]
            if mine.empty:
                cells.append("")
                continue
            entry = mine.iloc[0]
            cell = " / ".join(_cell(entry, tol) for tol in TOLERANCES)
            if entry["without_gap"]:
                cell = f"another problem; trained in {_seconds(entry['seconds'])} s"
            accuracy = "" if math.isnan(entry["accuracy"]) else f" ({entry['accuracy']:.1%})"
            cells.append(cell + accuracy)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratios(rows: pd.DataFrame, ours: str = "cvxnn-auto") -> str:
    """How many times less than the best peer, per instance, with the geometric mean; caps count as times."""
    table = times(rows)
    table = table[~table["without_gap"]]
    lines = ["| Instance | gap | ours, s | best peer | its seconds | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    logs: dict[float, list[float]] = {tol: [] for tol in TOLERANCES}
    for instance, part in table.groupby(INSTANCE, sort=False):
        mine, peers = part[part["solver"] == ours], part[~part["solver"].str.startswith("cvxnn-")]
        if mine.empty or peers.empty:
            continue
        for tol in TOLERANCES:
            best = peers.loc[peers[tol].clip(upper=peers["cap"]).idxmin()]
            theirs, our = min(best[tol], best["cap"]), mine.iloc[0][tol]
            logs[tol].append(math.log(theirs / our))
            mark = "" if math.isfinite(best[tol]) else " (cap)"
            name = f"{instance[0]}, P = {instance[2]}, beta = {instance[1]:g}"
            lines.append(
                f"| {name} | {tol:g} | {_seconds(our)} | {best['solver']} | {_seconds(theirs)}{mark} | "
                f"{theirs / our:.2g} |"
            )
    for tol, values in logs.items():
        if values:
            lines.append(f"| geometric mean | {tol:g} | | | | {math.exp(sum(values) / len(values)):.2g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables, or write the first one into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--summary", action="store_true", help="the table of the README")
    parser.add_argument("--beta", type=float, default=0.01, help="of the summary, relative to beta_max")
    arguments = parser.parse_args()
    rows = pd.concat([pd.read_csv(file) for file in arguments.csv], ignore_index=True)
    if arguments.summary:
        text = summary(times(rows), arguments.beta, n_gates=100, tol=1e-6)
    else:
        parts = [markdown(part) for _, part in rows.groupby(["dataset", "n_gates"], sort=False)]
        text = "\n".join([*parts, ratios(rows)])
    if arguments.write is None:
        print(text)
        return
    page = arguments.write.read_text()
    if not _MARKS.search(page):
        parser.error(f"{arguments.write} has no lines <!-- peers:begin --> and <!-- peers:end -->")
    arguments.write.write_text(_MARKS.sub(lambda match: match[1] + text + match[2], page))


if __name__ == "__main__":
    main()
