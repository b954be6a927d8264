"""The page, the table and the pictures of the study of self-attention."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cvxnn._version import __version__
from cvxnn.experiments.attention import ATTENTION_SCALES, FORMS, KINDS, AttentionGrid
from cvxnn.experiments.attention_claims import (
    attention_frame,
    check_optima,
    judge_attention,
    summarise_heads,
    summarise_problems,
)
from cvxnn.experiments.attention_figures import draw_attention_figures
from cvxnn.experiments.complexity_fits import as_dicts
from cvxnn.experiments.pages import finite, listing, markdown_table, write_page
from cvxnn.files import write_atomically

__all__ = ["OPTIMUM_WIDTH", "attention_summary", "write_attention_report"]

#: The optimum counts as known in an interval of this relative width.
OPTIMUM_WIDTH = 1e-8
_CAPTIONS = {
    "gap.png": "Final gap to the certified optimum against the number of heads, all runs of a size. Dashed: "
    "min(d^2, d c); dotted: d^2 + d c; grey: 1e-6. The last row is Adam without polishing. Gaps below 1e-10 are drawn "
    "there.",
    "rank.png": "Rank of (27) at local minima; larger marks are more frequent.",
    "eigenvalue.png": "Smallest eigenvalue of the Hessian over beta, at stationary points. A spurious local minimum is "
    "right of the grey line and not below the horizontal one. `padded` points are local minima with one head, with "
    "zeros in the others.",
}


def attention_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is computed from the rows, for JSON."""
    frame = attention_frame(rows)
    check = check_optima(frame)
    return {
        "certified": check["largest_width"] <= OPTIMUM_WIDTH,
        "claims": as_dicts(judge_attention(frame)),
        "optima": {key: finite(value) for key, value in check.items()},
        "problems": [{key: finite(value) for key, value in part.items()} for part in summarise_problems(frame)],
        "heads": [{key: finite(value) for key, value in part.items()} for part in summarise_heads(frame)],
    }


def write_attention_report(rows: list[dict[str, Any]], grid: AttentionGrid, folder: Path) -> list[str]:
    """Write heads.csv, the pictures and report.md into a folder that exists; their names."""
    frame = attention_frame(rows)
    write_atomically(folder / "heads.csv", lambda temporary: frame.to_csv(temporary, index=False))
    pictures = draw_attention_figures(frame, folder)
    write_page(folder / "report.md", _page(frame, grid, pictures))
    return ["report.md", "heads.csv", *pictures]


def _page(frame: pd.DataFrame, grid: AttentionGrid, pictures: list[str]) -> str:
    claims = [(part.statement, f"**{part.verdict}**", part.found, part.rule) for part in judge_attention(frame)]
    parts = [
        "# Linear self-attention: local minima and the number of heads",
        _settings(frame, grid),
        "## Claims",
        markdown_table(("Statement", "Verdict", "Found", "Rule"), claims),
        "## Problems",
        _problems(frame),
        "## By the number of heads",
        _heads(frame),
        "\n".join(f"- *{kind.replace('_', ' ')}*: {words}." for kind, words in KINDS.items()),
        _optima(frame),
        "## Pictures",
        "\n\n".join(f"![{name}]({name})\n\n{_CAPTIONS[name]}" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(frame: pd.DataFrame, grid: AttentionGrid) -> str:
    lines = [
        "- Objective (26): 1/(2n) ||outputs - targets||^2 + beta/2 sum_j (||U_j||^2 + ||V_j||^2), outputs "
        "sum_j X_i U_j X_i^T X_i V_j, per token or averaged over the tokens.",
        f"- Data: n = {grid.n} sequences of s = {grid.s} tokens. Output `mean`: Gaussian tokens, targets of a random "
        "block of min(d^2, d c) heads with noise. Output `tokens`: clean tokens on a line of their sequence, with "
        "noise of 0.5; the targets are the first c clean features (denoising).",
        f"- (d, c) = {', '.join(f'({d}, {c})' for d, c in grid.sizes)}; beta = {listing(grid.fractions)} of beta_max; "
        f"data seeds {listing(grid.seeds)}; m = 1 .. 2 min(d^2, d c), and d^2 + d c + 1.",
        *(f"- `{form}`: {words}." for form, words in FORMS.items()),
        f"- {grid.starts} starts per number of heads for the first two, at most 5 for the others.",
        f"- {grid.descent_steps} steps of gradient descent, {grid.adam_steps} of Adam (learning rate "
        f"{grid.learning_rate:g}, falling to zero along a cosine); then L-BFGS, Newton's method on the stationarity "
        f"conditions, and at most {grid.max_escapes} times on from a saddle along its negative curvature "
        f"({int((frame['n_escapes'] > 0).sum())} of {len(frame)} runs met one).",
        f"- Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores "
        f"({platform.machine()}), cvxnn {__version__}. Every run: [heads.csv](heads.csv).",
    ]
    paper = ATTENTION_SCALES["paper"]
    if grid != paper:
        lines.append(
            f"- **Not the full scale**, which is (d, c) = {', '.join(f'({d}, {c})' for d, c in paper.sizes)}, beta = "
            f"{listing(paper.fractions)} of beta_max, {paper.starts} starts."
        )
    return "\n".join(lines)


def _problems(frame: pd.DataFrame) -> str:
    rows = [
        (
            f"{part['d']}, {part['c']}",
            part["output"],
            f"{part['fraction']:g}",
            f"{part['optimum_upper']:.8g}",
            str(part["optimum_rank"]),
            str(part["threshold"]),
            str(part["paper_bound"]),
            f"{part['n_minima']} of {part['n_runs']}",
            _or_none(part["most_heads_with_spurious"], "d"),
            _or_none(part["largest_spurious_gap"], ".1e"),
        )
        for part in summarise_problems(frame)
    ]
    header = ("d, c", "output", "beta / beta_max", "optimum", "rank of Z", "min(d^2, d c)", "d^2 + d c")
    found = ("local minima", "most heads with one above the optimum", "largest gap of these")
    return markdown_table((*header, *found), rows)


def _or_none(value: Any, form: str) -> str:
    return "none" if value is None else format(value, form)


def _heads(frame: pd.DataFrame) -> str:
    """All problems of a size together."""
    rows = []
    for (d, c, form, m), part in frame.groupby(["d", "c", "form", "m"], sort=False):
        minima = part[part["kind"] == "local_minimum"]
        counts = " / ".join(str(int((part["kind"] == kind).sum())) for kind in KINDS)
        spurious = int((minima["gap"] > 1e-6).sum())
        rows.append(
            (
                f"{d}, {c}",
                form,
                str(m) + (" *" if m >= part["threshold"].iloc[0] else ""),
                counts,
                str(spurious),
                f"{minima['gap'].max():.1e}" if len(minima) else "none",
                f"{part['trained_gap'].median():.1e}",
                f"{part['rank'].min()} to {part['rank'].max()}",
            )
        )
    kinds = " / ".join(kind.replace("_", " ") for kind in KINDS)
    header = ("d, c", "form", "m", kinds, "local minima above 1e-6", "largest gap of local minima")
    wide = (*header, "gap after training (median)", "rank of (27)")
    return markdown_table(wide, rows) + "\n\n\\* at least min(d^2, d c) heads."


def _optima(frame: pd.DataFrame) -> str:
    check = check_optima(frame)
    return (
        f"The optimum of each problem is known to a relative {check['largest_width']:.1e}, apart from the runs. Of "
        f"{check['n_runs']} runs {check['n_below_optimum']} are below it, and the duality gap of "
        f"{check['n_bounds_above']} puts a lower bound above it."
    )
