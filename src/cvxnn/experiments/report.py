"""The page of the spiral study: settings, claims, theorem, certificates and times, computed from the rows."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cvxnn._version import __version__
from cvxnn.experiments.claims import (
    Claim,
    frame_of,
    global_summary,
    judge_claims,
    nontrivial,
    speed_table,
    summarise,
    theorem_check,
    time_table,
)
from cvxnn.experiments.figures import draw_figures
from cvxnn.experiments.pages import markdown_table, write_page
from cvxnn.experiments.spiral import SCALES, SpiralGrid
from cvxnn.files import write_atomically

__all__ = ["summary_of", "write_report"]

_TIMED = ("bm_global", "admm", "interior_point", "bm_gd")
_CAPTIONS = {
    "figure3.png": "Figure 3: the data.",
    "figure2.png": "Figure 2: gradient descent, sampled gates. Lines are means over the seeds, bands minimum to "
    "maximum; gaps below 1e-12 are drawn there.",
    "figure4.png": "Figure 4: the same for the other n.",
    "figure2_all.png": "Figure 2 with all patterns enumerated.",
    "figure4_all.png": "Figure 4 with all patterns enumerated.",
    "figure2_global.png": "Figure 2 with `bm_global`.",
    "figure4_global.png": "Figure 4 with `bm_global`.",
}


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is computed from the rows, for JSON."""
    frame = frame_of(rows)
    speed = speed_table(frame)
    return {
        "claims": [asdict(claim) for claim in judge_claims(frame)],
        "theorem": theorem_check(frame),
        "bm_global": global_summary(frame),
        "speed": {
            column: {
                scope: summarise(part[column]) for scope, part in [("both", speed), *speed.groupby("scope", sort=False)]
            }
            for column in ("same_gap", "certified")
        },
        "times": time_table(frame, _timed(frame)),
    }


def write_report(rows: list[dict[str, Any]], grid: SpiralGrid, folder: Path) -> list[str]:
    """Write runs.csv, the pictures and report.md into a folder.

    Parameters
    ----------
    rows : list of dict
        Of :func:`cvxnn.experiments.run_spiral`.
    grid : SpiralGrid
        Its settings.
    folder : Path
        It exists.

    Returns
    -------
    list of str
        Names of the files.
    """
    frame = frame_of(rows)
    table = frame.copy()
    table["m"] = table["m"].astype("Int64")
    write_atomically(folder / "runs.csv", lambda temporary: table.to_csv(temporary, index=False))
    pictures = draw_figures(frame, folder, grid.tol)
    text = _page(frame, grid, pictures)
    write_page(folder / "report.md", text)
    return ["report.md", "runs.csv", *pictures]


def _timed(frame: pd.DataFrame) -> tuple[str, ...]:
    present = set(frame["solver"])
    return tuple(name for name in _TIMED if name in present)


def _page(frame: pd.DataFrame, grid: SpiralGrid, pictures: Sequence[str]) -> str:
    parts = [
        "# The three-class spiral: the paper's claims and what was found",
        _settings(frame, grid),
        "## Claims of the paper",
        _claims(judge_claims(frame)),
        *_pictures(pictures, ("figure3.png", "figure2.png", "figure4.png", "figure2_all.png", "figure4_all.png")),
        "## Theorem 3.4 and the duality gap",
        _theorem(theorem_check(frame)),
        "## `bm_global` on every problem",
        _global(global_summary(frame), grid.tol),
        *_pictures(pictures, ("figure2_global.png", "figure4_global.png")),
        "## Time",
        _speed(frame, grid.tol),
        *_pictures(pictures, ("ratio.png",)),
        _times(frame),
        *_pictures(pictures, ("times.png",)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pictures(present: Sequence[str], wanted: Iterable[str]) -> list[str]:
    return [
        f"![{name.removesuffix('.png')}]({name})" + (f"\n\n{_CAPTIONS[name]}" if name in _CAPTIONS else "")
        for name in wanted
        if name in present
    ]


def _listing(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in values)


def _settings(frame: pd.DataFrame, grid: SpiralGrid) -> str:
    problems = frame.groupby(["scope", "n", "seed"])["n_gates"].first()
    gates = [
        f"{scope}, n = {n}: {part.min()}" + (f" to {part.max()}" if part.max() > part.min() else "")
        for (scope, n), part in problems.groupby(level=["scope", "n"], sort=False)
    ]
    hard = nontrivial(frame)
    keys = ["scope", "n", "beta", "seed"]
    n_problems, n_hard = (len(part[keys].drop_duplicates()) for part in (frame, hard))
    trivial = frame[frame["beta"] >= frame["beta_max"]].groupby("n")["beta"].unique()
    zero = "; ".join(f"n = {n} (beta = {_listing(sorted(betas))})" for n, betas in trivial.items())
    certified = (frame["optimum_upper"] - frame["optimum_lower"]) / frame["optimum_lower"]
    reference = "interior point" if (frame["solver"] == "interior_point").any() else "ADMM (cvxpy is not installed)"
    lines = [
        f"- Data: the class-balanced spiral, d = 2, c = 3, n = {_listing(sorted(grid.sizes))}; squared loss on one-hot "
        f'labels, reduction "{grid.reduction}" (the paper does not say which; with "mean", beta = 0.1 makes Z = 0 '
        "optimal; `--reduction mean` repeats the study with it).",
        f"- beta = {_listing(grid.betas)}; m = {_listing(grid.ranks)}; seeds {_listing(grid.seeds)} (each draws the "
        "gates and the first weights).",
        f"- Gates: {grid.n_gates} draws, equal patterns merged, or one for every open cell of the arrangement "
        f"({'; '.join(gates)}).",
        f"- Gradient descent: {grid.epochs} epochs, momentum 0.9, step 1.0 times 0.9 on plateaus (C.1).",
        f"- Optimum: {reference}, certified in an interval of relative width at most {certified.max():.1e}. Gaps are "
        "relative to its upper end.",
        f"- {n_problems} problems. In {n_problems - n_hard} of them Z = 0 is optimal (beta >= beta_max)"
        + (f": {zero}. They are left out of the claims and of the ratios of times." if zero else "."),
        "- One thread per run; times include set-up and certificates. Python "
        f"{platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), "
        f"cvxnn {__version__}.",
        "- Every run: [runs.csv](runs.csv).",
    ]
    if grid.epochs != SCALES["paper"].epochs:
        lines.insert(
            4,
            f"- **Not the paper's scale**: gradient descent has {grid.epochs} epochs in place of "
            f"{SCALES['paper'].epochs}, and what is said of it is judged after these.",
        )
    if 3 in grid.sizes:
        lines.insert(
            1,
            "- n = 3 puts the only sample of every class at the centre of the spiral (radius 0), so that X = 0, every "
            "network predicts 0 and the optimum is ||Y||^2 / 2 for every beta. The scan of the paper says 3; 15 is "
            "likely meant.",
        )
    return "\n".join(lines)


def _claims(claims: Sequence[Claim]) -> str:
    rows = [
        (
            claim.statement,
            f"**{claim.verdict}**",
            ". ".join(f"{scope.capitalize()} gates: {words}" for scope, words in claim.found.items()),
            claim.rule,
        )
        for claim in claims
    ]
    return markdown_table(("The paper", "Verdict", "Found", "Rule"), rows) + (
        "\n\nVerdicts are of the sampled gates, as in the paper, for the problems where Z = 0 is not optimal. The "
        "continuation of gradient descent goes downhill, so that it can leave a saddle point; what it shows is that "
        "the way down was not at its end."
    )


def _theorem(check: dict[str, Any]) -> str:
    found = "; ".join(
        f"{part['n_points']} of {name}, {part['n_above_optimum']} of them above the optimum"
        for name, part in check["by_solver"].items()
    )
    return "\n".join(
        [
            f"- {check['n_stationary']} of {check['n_points']} points are stationary (relative residual at most 1e-6), "
            f"{check['n_trivial']} of them where Z = 0 is optimal. The others: {found or 'none'}. Above the optimum "
            "means by more than a relative 1e-6; the largest gap of a stationary point is "
            f"{check['largest_true_gap']:.2g}.",
            "- `few_gates` is a stationary point of the problem with a tenth of the gates, and zero in the others, "
            "which makes it a stationary point of the whole problem far above the optimum.",
            "- `bm_gd+polish` is the end of gradient descent, continued by L-BFGS on (14) and by Newton's method on "
            "the stationarity conditions (68), (69).",
            "- At stationary points the bound of Theorem 3.4 is below the true gap in "
            f"{check['n_below_true_gap']} cases, and the duality gap is looser than it in "
            f"{check['n_looser_duality_gap']} cases.",
            f"- At the {check['n_not_stationary']} other points the theorem does not apply; evaluated there all the "
            f"same, its formula is below the true gap in {check['n_not_stationary_below_true_gap']} cases.",
            "- The duality gap, which is valid everywhere, is below the true gap in "
            f"{check['n_duality_gap_below_true_gap']} of all {check['n_points']} points.",
        ]
    )


def _global(summary: Sequence[dict[str, Any]], tol: float) -> str:
    total, certified = (sum(part[name] for part in summary) for name in ("n_runs", "n_certified"))
    rows = [
        (
            part["scope"],
            str(part["n"]),
            f"{part['n_certified']} of {part['n_runs']}",
            f"{part['worst_duality_gap']:.1e}",
            f"{part['worst_true_gap']:.1e}",
            f"{part['median_seconds']:.3g}",
            f"{part['largest_seconds']:.3g}",
        )
        for part in summary
    ]
    header = ("gates", "n", f"certified to {tol:g}", "worst duality gap", "worst true gap", "median s", "longest s")
    found = f"**{certified} of {total} runs certified** to a relative duality gap of {tol:g}."
    return f"{found}\n\n{markdown_table(header, rows)}"


def _speed(frame: pd.DataFrame, tol: float) -> str:
    table = speed_table(frame)
    rows = []
    for column, name in (("same_gap", "to the same gap"), ("certified", f"to the certificate at {tol:g}")):
        for scope, part in [("both", table), *table.groupby("scope", sort=False)]:
            found = summarise(part[column])
            shown = (found[key] for key in ("smallest", "lower_quartile", "median", "upper_quartile", "largest"))
            at_least = f"{found['at_least_20']:.0%}" if found["n"] else "-"
            rows.append((name, str(scope), *(f"{value:.3g}" for value in shown), at_least, str(found["n_missing"])))
    header = ("bm_global", "gates", "smallest", "25%", "median", "75%", "largest", "at least 20", "did not get there")
    return (
        "Time of `bm_gd` to the best gap it ever reaches, over the time of `bm_global` at the same m (a gap below "
        f"{tol:g} counts as {tol:g}):\n\n{markdown_table(header, rows)}"
    )


def _times(frame: pd.DataFrame) -> str:
    solvers = _timed(frame)
    summary = time_table(frame, solvers)
    if not summary:
        return ""
    rows = [
        (
            part["scope"],
            str(part["n"]),
            *(f"{part['median_seconds'][name]:.3g}" for name in solvers),
            _fastest(part["fastest_in"], part["n_problems"]),
        )
        for part in summary
    ]
    gap = float(nontrivial(frame).loc[frame["solver"] == "bm_gd", "true_gap"].median())
    medians = ("median s of " + name + (" (to its best gap)" if name == "bm_gd" else "") for name in solvers)
    return markdown_table(("gates", "n", *medians, "fastest certified"), rows) + "\n\n" + _advice(summary, solvers, gap)


def _fastest(counts: dict[str, int], n_problems: int) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} in {count} of {n_problems}" for name, count in ordered if count)


def _advice(summary: Sequence[dict[str, Any]], solvers: Sequence[str], descent: float) -> str:
    """Which solver to use when, from the times."""
    convex = [name for name in solvers if name != "bm_gd"]
    n_problems = sum(part["n_problems"] for part in summary)
    totals = {name: sum(part["fastest_in"][name] for part in summary) for name in convex}
    best = max(totals, key=lambda name: totals[name])
    ranking = ", ".join(f"`{name}` in {count}" for name, count in sorted(totals.items(), key=lambda item: -item[1]))
    ratios = [
        part["median_seconds"]["bm_global"] / part["median_seconds"][best]
        for part in summary
        if part["median_seconds"][best] > 0 and math.isfinite(part["median_seconds"].get("bm_global", math.nan))
    ]
    against = ""
    if best != "bm_global" and ratios:
        against = f" (`bm_global` takes {min(ratios):.2g} to {max(ratios):.2g} times as long, by medians)"
    reason = "the blocks are 2 x 3, so factors save no memory over them, and a convex solver finds this easy"
    return (
        f"Of {n_problems} problems with a certified solution, the fastest to one is {ranking}. So on problems of this "
        f"size use `{best}`{against}" + (f": {reason}. " if best != "bm_global" else ". ") + "`bm_global` is for a "
        "network of given width, for factors with a proof, and for blocks too large to be formed; `interior_point` for "
        f"the last digits of a small problem; `bm_gd` proves little, and ends at a gap of {descent:.1e} (median)."
    )
