"""Tables from the figures of the comparison: `python benchmarks/comparison/table.py FILE.csv ...`.

With --pages the lines between `<!-- peers:begin -->` and `<!-- peers:end -->` of the README and of the page with all
results are made from the figures in docs/results/comparison.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pandas as pd
from results import INSTANCE, as_power, seconds_to
from summary import summary

TOLERANCES = (1e-4, 1e-6)
_ROOT = Path(__file__).resolve().parents[2]
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


def _name(dataset: str, beta: float, absolute: bool, n_gates: int) -> str:
    return f"{dataset}, P = {n_gates}, beta = {beta:g}" + ("" if absolute else " beta_max")


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _cell(entry: pd.Series, tol: float) -> str:
    """Seconds; or which cap was not enough; or nothing."""
    if entry["without_gap"]:
        return "another problem"
    return _seconds(entry[tol]) if math.isfinite(entry[tol]) else f"not in {entry['cap']:g}"


def markdown(table: pd.DataFrame) -> str:
    """A line per solver and a column per instance: seconds to two gaps, and the accuracy; from :func:`times`."""
    instances = list(table.groupby(INSTANCE, sort=False).groups)
    head = ["Seconds to a relative gap of 1e-4 / 1e-6"]
    head += [_name(*instance) for instance in instances]
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


def ratios(table: pd.DataFrame, ours: str = "cvxnn-auto") -> str:
    """How many times less than the best peer, per instance, with the geometric mean; caps count as times."""
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
            cells = [_name(*instance), as_power(tol), _seconds(our), best["solver"], _seconds(theirs) + mark]
            lines.append("| " + " | ".join([*cells, f"{theirs / our:.2g}"]) + " |")
    for tol, values in logs.items():
        if values:
            lines.append(f"| geometric mean | {as_power(tol)} | | | | {math.exp(sum(values) / len(values)):.2g} |")
    return "\n".join(lines) + "\n"


#: Pages with a table, and the figures that it is made of.
PAGES = {
    "README.md": ("small", "digits_ten"),
    "docs/results/peers.md": ("one_output", "small", "digits_ten", "ten_outputs"),
}


def page_table(page: str, folder: Path) -> str:
    """The table of a page, from the CSV files of a folder."""
    tables = [times(pd.read_csv(folder / f"{name}.csv")) for name in PAGES[page]]
    if page == "README.md":
        return summary(pd.concat(tables, ignore_index=True), beta=0.01, n_gates=100, tol=1e-6)
    return "\n".join(text for table in tables for text in (*all_tables(table), ratios(table)))


def all_tables(table: pd.DataFrame) -> list[str]:
    """One table per data set and number of gates."""
    return [markdown(part) for _, part in table.groupby(["dataset", "n_gates"], sort=False)]


def main() -> None:
    """Print the tables of some figures, or write those of the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*")
    parser.add_argument(
        "--pages", action="store_true", help="write the tables of the pages, from docs/results/comparison"
    )
    arguments = parser.parse_args()
    if not arguments.csv and not arguments.pages:
        parser.error("files with figures are wanted, or --pages")
    for file in arguments.csv:
        table = times(pd.read_csv(file))
        print("\n".join([*all_tables(table), ratios(table)]))
    for page in PAGES if arguments.pages else ():
        file = _ROOT / page
        text = page_table(page, _ROOT / "docs" / "results" / "comparison")
        file.write_text(_MARKS.sub(lambda match: match[1] + text + match[2], file.read_text()))  # noqa: B023


if __name__ == "__main__":
    main()
