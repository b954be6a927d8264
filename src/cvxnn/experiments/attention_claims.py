"""What the rows of the study of self-attention say of Corollary 3.10, by rules that are fixed here."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cvxnn.experiments.attention import ATTENTION_COLUMNS, KINDS
from cvxnn.experiments.claims import GLOBAL_GAP, HELD, IN_PART, NO_RUNS, NOT_HELD, OPTIMAL_GAP
from cvxnn.experiments.complexity_fits import Statement

__all__ = ["attention_frame", "check_optima", "judge_attention", "summarise_heads", "summarise_problems"]

PROBLEM = ["d", "c", "output", "fraction", "seed"]
#: Of the runs that a claim is about so many have to end at local minima for it to count as held.
_ENOUGH = 0.9
#: What the proofs of two points of one problem may differ by, in the last digits.
_ROUNDING = 1e-12
_RULE = (
    f"held if there are such local minima and none is more than a relative {OPTIMAL_GAP:g} above the certified "
    f"optimum; in part if fewer than {_ENOUGH:.0%} of the runs that it is about ended at local minima; not held if one "
    "is above"
)


def attention_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per run, problem by problem, with rising numbers of heads."""
    frame = pd.DataFrame(rows, columns=list(ATTENTION_COLUMNS))
    order = [*PROBLEM, "form", "m", "start"]
    return frame.sort_values(order, kind="stable").reset_index(drop=True)


def judge_attention(frame: pd.DataFrame) -> list[Statement]:
    """The claims, each about local minima by second order; theorems have no say in what counts as one."""
    left = frame["form"] != "padded"
    wide, enough = frame["m"] > frame["paper_bound"], frame["m"] >= frame["threshold"]
    return [
        _none_above(
            frame[wide & left],
            "Corollary 3.10, number of heads",
            "The linear-activation self-attention network (26) has no spurious local minima as long as the number of "
            "heads satisfies m > m* where m* < d^2 + d c (Corollary 3.10)",
            "m > d^2 + d c",
        ),
        _none_above(
            frame[frame["rank"] < frame["m"]],
            "Corollary 3.10, rank",
            "If for any local minimum of (26) the matrix R (27) is rank-deficient, then this local minimum is also a "
            "global minimum (Corollary 3.10)",
            "rank of (27) below m, any m",
            everything=False,
        ),
        _none_above(
            frame[enough & left],
            "beyond: min(d^2, d c) heads",
            "Beyond the paper: m >= min(d^2, d c) heads already exclude spurious local minima",
            "m >= min(d^2, d c)",
        ),
        _none_above(
            frame[enough & (frame["form"] == "network")],
            "the original network",
            "Linear self-attention with sufficiently many heads has no spurious local minima (abstract; the original "
            "network (8), trained by Adam)",
            "Adam, m >= min(d^2, d c)",
        ),
        _ways_out(frame[enough]),
        _needed(frame[~enough]),
    ]


def _none_above(frame: pd.DataFrame, name: str, statement: str, where: str, everything: bool = True) -> Statement:
    """That no local minimum of some runs is above the optimum."""
    minima = frame[frame["kind"] == "local_minimum"]
    above = int((minima["gap"] > OPTIMAL_GAP).sum())
    if minima.empty:
        verdict = NO_RUNS
    elif above:
        verdict = NOT_HELD
    else:
        verdict = IN_PART if everything and len(minima) < _ENOUGH * len(frame) else HELD
    found = f"{where}: {len(minima)} of {len(frame)} runs end at local minima, {above} of these above the optimum"
    if len(minima):
        found += f", the largest gap is {minima['gap'].max():.1e}"
    others = frame[frame["kind"] != "local_minimum"]
    if len(others):
        counts = ", ".join(f"{count} {kind}" for kind, count in others["kind"].value_counts().items()).replace("_", " ")
        found += f" (others: {counts}; largest gap {others['gap'].max():.1e})"
    trained = frame.loc[frame["form"] == "network", "trained_gap"]
    if name == "the original network" and len(trained):
        found += (
            f"; as Adam left them {(trained <= GLOBAL_GAP).mean():.0%} are within {GLOBAL_GAP:g} of the optimum, the "
            f"largest gap is {trained.max():.1e}"
        )
    return Statement(name, statement, verdict, found, _RULE)


def _ways_out(frame: pd.DataFrame) -> Statement:
    """That stationary points above the optimum have negative curvature."""
    above = frame[(frame["kind"] != "not_stationary") & (frame["gap"] > OPTIMAL_GAP)]
    saddles = above[above["kind"] == "saddle"]
    verdict = NO_RUNS if above.empty else HELD if len(saddles) == len(above) else NOT_HELD
    found = ""
    if len(above):
        eigenvalues = above["smallest_eigenvalue"] / above["beta"]
        gaps = f"gaps of {above['gap'].min():.1e} to {above['gap'].max():.1e}"
        found = (
            f"m >= min(d^2, d c): {len(above)} stationary points above the optimum, {len(saddles)} of them saddles; "
            f"{gaps}, smallest eigenvalues of {eigenvalues.min():.1e} to {eigenvalues.max():.1e} beta"
        )
        escaped = frame[frame["form"] == "escaped"]
        if len(escaped):
            reached = int((escaped["gap"] <= OPTIMAL_GAP).sum())
            found += f"; along these {reached} of {len(escaped)} runs come to the optimum"
    return Statement(
        "the ways out of saddles",
        "Beyond the paper: with m >= min(d^2, d c) heads every stationary point above the optimum has a direction of "
        "negative curvature",
        verdict,
        found,
        f"held if all stationary points more than a relative {OPTIMAL_GAP:g} above the optimum are saddles",
    )


def _needed(frame: pd.DataFrame) -> Statement:
    """That there are spurious local minima with fewer heads."""
    minima = frame[frame["kind"] == "local_minimum"]
    above = minima[minima["gap"] > GLOBAL_GAP]
    spurious = above[above["m"] >= above["optimum_rank"]]
    verdict = NO_RUNS if minima.empty else HELD if len(spurious) else IN_PART if len(above) else NOT_HELD
    found = (
        f"of {len(minima)} local minima with m < min(d^2, d c), {len(above)} are above the optimum, "
        f"{len(spurious)} of these with m at least the rank of the optimum, which such a block could reach"
    )
    if len(spurious):
        found += f" (gaps of {spurious['gap'].min():.1e} to {spurious['gap'].max():.1e})"
    rule = (
        f"held if a local minimum with m < min(d^2, d c), but at least as many heads as the optimum needs, is more "
        f"than a relative {GLOBAL_GAP:g} above it; in part if only blocks with fewer heads than the optimum needs are"
    )
    return Statement(
        "few heads are not enough",
        "Not in the paper: below the threshold there are spurious local minima",
        verdict,
        found if len(minima) else "",
        rule,
    )


def check_optima(frame: pd.DataFrame) -> dict[str, Any]:
    """Whether the optimum is certified, and how often a run contradicts it: never, if both are sound."""
    widths = (frame["optimum_upper"] - frame["optimum_lower"]) / frame["optimum_lower"]
    slack = _ROUNDING * frame["optimum_upper"]
    bounds = frame["primal"] / (1 + frame["duality_gap"])
    return {
        "n_runs": len(frame),
        "largest_width": float(widths.max()),
        "n_below_optimum": int((frame["primal"] < frame["optimum_lower"] - slack).sum()),
        "n_bounds_above": int((bounds > frame["optimum_upper"] + slack).sum()),
    }


def summarise_heads(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Numbers per problem, form and number of heads."""
    keys = [*PROBLEM, "form", "m"]
    return [
        dict(zip(keys, (_plain(value) for value in key), strict=True)) | _numbers(part)
        for key, part in frame.groupby(keys, sort=False)
    ]


def _numbers(part: pd.DataFrame) -> dict[str, Any]:
    minima = part[part["kind"] == "local_minimum"]
    return {
        "threshold": int(part["threshold"].iloc[0]),
        "optimum_rank": int(part["optimum_rank"].iloc[0]),
        "n_runs": len(part),
        "kinds": {kind: int((part["kind"] == kind).sum()) for kind in KINDS},
        "n_optimal": int((part["gap"] <= OPTIMAL_GAP).sum()),
        "largest_gap": float(part["gap"].max()),
        "largest_gap_of_minima": float(minima["gap"].max()) if len(minima) else None,
        "median_trained_gap": float(part["trained_gap"].median()),
        "n_trained": int((part["trained_gap"] <= GLOBAL_GAP).sum()),
        "smallest_rank": int(part["rank"].min()),
        "largest_rank": int(part["rank"].max()),
    }


def summarise_problems(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Per problem: the optimum, its rank, the thresholds, and where local minima above the optimum were found."""
    rows = []
    for key, part in frame.groupby(PROBLEM, sort=False):
        minima = part[part["kind"] == "local_minimum"]
        above = minima[minima["gap"] > OPTIMAL_GAP]
        rows.append(
            dict(zip(PROBLEM, (_plain(value) for value in key), strict=True))
            | {
                "beta": float(part["beta"].iloc[0]),
                "optimum_lower": float(part["optimum_lower"].max()),
                "optimum_upper": float(part["optimum_upper"].min()),
                "optimum_rank": int(part["optimum_rank"].iloc[0]),
                "threshold": int(part["threshold"].iloc[0]),
                "paper_bound": int(part["paper_bound"].iloc[0]),
                "n_runs": len(part),
                "n_minima": len(minima),
                "most_heads_with_spurious": None if above.empty else int(above["m"].max()),
                "largest_spurious_gap": None if above.empty else float(above["gap"].max()),
                "n_escapes": int(part["n_escapes"].sum()),
            }
        )
    return rows


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
