"""What the rows of the spiral study say of the paper's claims: by rules that are fixed here, with the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from cvxnn.experiments.spiral import COLUMNS, POLISHED

__all__ = [
    "GLOBAL_GAP",
    "OPTIMAL_GAP",
    "Claim",
    "frame_of",
    "global_summary",
    "judge_claims",
    "speed_table",
    "summarise",
    "theorem_check",
    "time_table",
]

HELD, IN_PART, NOT_HELD, NO_RUNS = "held", "held in part", "not held", "not tested"
#: A run has found the global minimum at this relative gap.
GLOBAL_GAP = 1e-4
#: A stationary point is optimal at this relative gap.
OPTIMAL_GAP = 1e-6
_SERIES = ["n", "m", "seed"]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, the rule it is judged by, and what was found.

    Attributes
    ----------
    name : str
    statement : str
        In the words of the paper.
    rule : str
    verdict : {"held", "held in part", "not held", "not tested"}
    found : dict of str
        The findings in words, by scope.
    numbers : dict
        For the gates drawn ("sampled", which the verdict is of) and for all ("all").
    """

    name: str
    statement: str
    rule: str
    verdict: str
    found: dict[str, str]
    numbers: dict[str, dict[str, Any]]


def frame_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table with the columns of the study, sampled gates first; None becomes NaN in numbers."""
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    order = frame.assign(scope=frame["scope"] != "sampled")
    frame = frame.loc[order.sort_values(["scope", "n", "beta", "seed"], kind="stable").index].reset_index(drop=True)
    names = ["theorem_bound", "seconds_to_best_gap", "target_gap", "seconds_to_target_gap", "smallest_eigenvalue"]
    for name in [*names, "eigenvalue_threshold"]:
        frame[name] = frame[name].astype(float)
    return frame


def nontrivial(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of problems whose optimum is not Z = 0."""
    return frame[frame["beta"] < frame["beta_max"]]


def _verdict(share: float, held: float, in_part: float) -> str:
    return HELD if share >= held else IN_PART if share >= in_part else NOT_HELD


def judge_claims(frame: pd.DataFrame) -> list[Claim]:
    """The claims of the paper, judged on the rows with sampled gates (as there) where Z = 0 is not optimal."""
    return [_judge(frame, *claim) for claim in _CLAIMS]


def _judge(
    frame: pd.DataFrame,
    name: str,
    statement: str,
    rule: str,
    measure: Callable[[pd.DataFrame], dict[str, Any]],
    verdict: Callable[[dict[str, Any]], str],
    words: Callable[[dict[str, Any]], str],
) -> Claim:
    parts = nontrivial(frame).groupby("scope", sort=False)
    numbers = {str(scope): measure(part) for scope, part in parts}
    main = next(iter(numbers.values()), None)
    found = {scope: words(part) for scope, part in numbers.items()}
    return Claim(name, statement, rule, NO_RUNS if main is None else verdict(main), found, numbers)


def _beta_numbers(frame: pd.DataFrame) -> dict[str, Any]:
    descent = frame[frame["solver"] == "bm_gd"]
    correlations, falling = [], []
    for _, series in descent.groupby(_SERIES):
        gaps = series.sort_values("beta")["true_gap"].to_numpy()
        if len(gaps) < 2:
            continue
        constant = bool((gaps == gaps[0]).all())
        correlations.append(0.0 if constant else float(spearmanr(np.arange(len(gaps)), gaps).statistic))
        falling.append(bool((np.diff(gaps) < 0).all()))
    return {
        "n_series": len(correlations),
        "share_negative": _mean([value < 0 for value in correlations]),
        "share_monotone": _mean(falling),
        "median_correlation": _median(correlations),
        "median_gap": {f"{beta:g}": float(gap) for beta, gap in descent.groupby("beta")["true_gap"].median().items()},
    }


def _beta_words(numbers: dict[str, Any]) -> str:
    gaps = ", ".join(f"{gap:.1e} at beta {beta}" for beta, gap in numbers["median_gap"].items())
    return (
        f"the gap falls with beta in {numbers['share_negative']:.0%} of {numbers['n_series']} series (at every step in "
        f"{numbers['share_monotone']:.0%}); median gap {gaps}"
    )


def _global_numbers(frame: pd.DataFrame) -> dict[str, Any]:
    gaps = frame.loc[frame["solver"] == "bm_gd", "true_gap"]
    counts = {f"{limit:g}": int((gaps <= limit).sum()) for limit in (1e-2, 1e-3, GLOBAL_GAP, OPTIMAL_GAP)}
    return {
        "n_runs": len(gaps),
        "share": _mean((gaps <= GLOBAL_GAP).tolist()),
        "counts": counts,
        "smallest_gap": float(gaps.min()) if len(gaps) else math.nan,
        "median_gap": _median(gaps.tolist()),
        "largest_gap": float(gaps.max()) if len(gaps) else math.nan,
    }


def _global_words(numbers: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} at most {limit}" for limit, count in numbers["counts"].items())
    return (
        f"of {numbers['n_runs']} runs {counts}; gaps from {numbers['smallest_gap']:.1e} to "
        f"{numbers['largest_gap']:.1e}, median {numbers['median_gap']:.1e}"
    )


def _rank_numbers(frame: pd.DataFrame) -> dict[str, Any]:
    descent = frame[frame["solver"] == "bm_gd"]
    table = descent.pivot_table(index=["n", "beta", "seed"], columns="m", values="true_gap").clip(lower=OPTIMAL_GAP)
    ratios = (table.max(axis=1) / table.min(axis=1)).tolist() if table.shape[1] > 1 else []
    return {
        "n_cells": len(ratios),
        "median_ratio": _median(ratios),
        "largest_ratio": max(ratios, default=math.nan),
        "median_gap": {str(int(m)): float(gap) for m, gap in table.median().items()},
        "share_falling": _mean((table.diff(axis=1).iloc[:, 1:] <= 0).all(axis=1).tolist()),
    }


def _rank_words(numbers: dict[str, Any]) -> str:
    gaps = ", ".join(f"{gap:.1e} for m = {m}" for m, gap in numbers["median_gap"].items())
    return (
        f"largest over smallest gap among the m of a cell: median {numbers['median_ratio']:.2g}, at most "
        f"{numbers['largest_ratio']:.2g} ({numbers['n_cells']} cells); median gap {gaps}; larger m is never worse in "
        f"{numbers['share_falling']:.0%}"
    )


def _saddle_numbers(frame: pd.DataFrame) -> dict[str, Any]:
    descent, polished = (frame[frame["solver"] == name] for name in ("bm_gd", POLISHED))
    stationary = polished[polished["is_stationary"].astype(bool)]
    above = stationary[stationary["true_gap"] > OPTIMAL_GAP]
    negative = above["smallest_eigenvalue"] < -above["eigenvalue_threshold"].fillna(0.0)
    ends = descent["smallest_eigenvalue"] < -descent["eigenvalue_threshold"].fillna(0.0)
    return {
        "n_runs": len(polished),
        "n_stationary": len(stationary),
        "n_not_optimal": len(above),
        "n_saddles": int(negative.sum()),
        "share": _mean(negative.tolist()),
        "n_reached_optimum": int((polished["true_gap"] <= OPTIMAL_GAP).sum()),
        "gd_stationary": int(descent["is_stationary"].astype(bool).sum()),
        "gd_negative_curvature": int(ends.sum()),
    }


def _saddle_words(numbers: dict[str, Any]) -> str:
    return (
        f"gradient descent itself ended stationary in {numbers['gd_stationary']} of {numbers['n_runs']} runs, and with "
        f"a negative eigenvalue of the Hessian in {numbers['gd_negative_curvature']}; continued, "
        f"{numbers['n_reached_optimum']} reach the optimum to {OPTIMAL_GAP:g}, {numbers['n_stationary']} end "
        f"stationary, {numbers['n_not_optimal']} of these above the optimum, {numbers['n_saddles']} of these as saddles"
    )


def _saddle_verdict(numbers: dict[str, Any]) -> str:
    return _verdict(numbers["share"], 0.9, 0.5) if numbers["n_not_optimal"] else NOT_HELD


def _convergence_numbers(frame: pd.DataFrame) -> dict[str, Any]:
    descent = frame[frame["solver"] == "bm_gd"]
    residuals = descent["stationarity"]
    return {
        "n_runs": len(descent),
        "share": _mean(descent["is_stationary"].astype(bool).tolist()),
        "n_stationary": int(descent["is_stationary"].astype(bool).sum()),
        "n_diverged": int((descent["status"] == "diverged").sum()),
        "smallest": float(residuals.min()) if len(residuals) else math.nan,
        "median": _median(residuals.tolist()),
        "largest": float(residuals.max()) if len(residuals) else math.nan,
    }


def _convergence_words(numbers: dict[str, Any]) -> str:
    return (
        f"{numbers['n_stationary']} of {numbers['n_runs']} runs end stationary, {numbers['n_diverged']} diverge; "
        f"residuals from {numbers['smallest']:.1e} to {numbers['largest']:.1e}, median {numbers['median']:.1e}"
    )


_CLAIMS: tuple[tuple[Any, ...], ...] = (
    (
        "Larger beta is easier",
        "For larger values of beta, it becomes much easier for GD to find an optimal solution (section 4.1)",
        "share of series (n, m, seed) with a negative Spearman correlation of true gap and beta: "
        "held from 90%, in part from 50%",
        _beta_numbers,
        lambda numbers: _verdict(numbers["share_negative"], 0.9, 0.5),
        _beta_words,
    ),
    (
        "GD almost never finds the optimum",
        "GD almost never finds the global minimum (section 4.1)",
        f"share of runs of gradient descent with a true gap of at most {GLOBAL_GAP:g}: held up to 5%, in part "
        "up to 50%",
        _global_numbers,
        lambda numbers: _verdict(1 - numbers["share"], 0.95, 0.5),
        _global_words,
    ),
    (
        "m matters little",
        "There is only a minor relationship between the optimality gap and the rank m (section 4.1)",
        f"largest over smallest true gap (at least {OPTIMAL_GAP:g} each) among the m of a cell, median: "
        "held up to 2, in part up to 10",
        _rank_numbers,
        lambda numbers: _verdict(-numbers["median_ratio"], -2.0, -10.0),
        _rank_words,
    ),
    (
        "The points found are saddles",
        "GD finds saddle points that are not quite local minima, but close (section 4.1)",
        f"share with a negative eigenvalue of the Hessian among stationary points with a true gap above "
        f"{OPTIMAL_GAP:g}, to which the end points of gradient descent were continued: held from 90%, in part from "
        "50%, not where there are none",
        _saddle_numbers,
        _saddle_verdict,
        _saddle_words,
    ),
    (
        "GD always converges",
        "We train for 20000 epochs such that GD always converges (C.1)",
        "share of runs of gradient descent that end at a relative stationarity residual of at most 1e-6: "
        "held from 99%, in part from 50%",
        _convergence_numbers,
        lambda numbers: _verdict(numbers["share"], 0.99, 0.5),
        _convergence_words,
    ),
)


def theorem_check(frame: pd.DataFrame) -> dict[str, Any]:
    """Theorem 3.4 at every stationary point: never below the true gap, and the duality gap never above it."""
    factored = frame[frame["m"].notna()]
    stationary = factored[factored["theorem_bound"].notna()]
    bound = stationary["theorem_bound"]
    moving = factored[factored["theorem_bound"].isna()]
    hard = nontrivial(stationary)
    return {
        "n_points": len(factored),
        "n_stationary": len(stationary),
        "n_trivial": len(stationary) - len(hard),
        "by_solver": {
            str(name): {"n_points": len(part), "n_above_optimum": int((part["true_gap"] > OPTIMAL_GAP).sum())}
            for name, part in hard.groupby("solver")
        },
        "largest_true_gap": float(stationary["true_gap"].max()) if len(stationary) else math.nan,
        "n_below_true_gap": int((bound < stationary["true_gap"] * (1 - 1e-9) - 1e-12).sum()),
        "n_looser_duality_gap": int((stationary["duality_gap"] > bound * (1 + 1e-9) + 1e-12).sum()),
        "n_above_optimum": int((stationary["true_gap"] > OPTIMAL_GAP).sum()),
        "n_not_stationary_below_true_gap": int((moving["paper_bound"] < moving["true_gap"] * (1 - 1e-9) - 1e-12).sum()),
        "n_not_stationary": len(moving),
        "n_duality_gap_below_true_gap": int(
            (factored["duality_gap"] < factored["true_gap"] * (1 - 1e-9) - 1e-12).sum()
        ),
    }


def global_summary(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Per scope and n: how many runs of "bm_global" are certified, its worst gap, and its times."""
    runs = frame[frame["solver"] == "bm_global"]
    return [
        {
            "scope": scope,
            "n": int(n),
            "n_runs": len(part),
            "n_certified": int((part["status"] == "certified").sum()),
            "worst_duality_gap": float(part["duality_gap"].max()),
            "worst_true_gap": float(part["true_gap"].max()),
            "median_seconds": float(part["seconds"].median()),
            "largest_seconds": float(part["seconds"].max()),
        }
        for (scope, n), part in runs.groupby(["scope", "n"], sort=False)
    ]


def speed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Per problem and m: seconds of gradient descent to its best gap over those of "bm_global".

    A gap below the tolerance of "bm_global" counts as that tolerance. `same_gap` compares with the time of
    "bm_global" to the same gap, `certified` with its time to its certificate; a run that did not get there has
    the ratio NaN.
    """
    keys = ["scope", "n", "beta", "seed", "m"]
    runs = nontrivial(frame)
    descent = runs[runs["solver"] == "bm_gd"].set_index(keys)
    wide = runs[runs["solver"] == "bm_global"].set_index(keys)
    table = pd.DataFrame(index=descent.index)
    table["gd_seconds"] = descent["seconds_to_target_gap"]
    table["gap"] = descent["target_gap"]
    table["same_gap"] = table["gd_seconds"] / wide["seconds_to_target_gap"]
    table["certified"] = table["gd_seconds"] / wide["seconds"].where(wide["status"] == "certified")
    return table.reset_index()


def summarise(ratios: Any) -> dict[str, Any]:
    """Quartiles and extremes of ratios, and how many are missing."""
    values = np.asarray(ratios, dtype=float)
    present = values[np.isfinite(values)]
    names = ("smallest", "lower_quartile", "median", "upper_quartile", "largest")
    shown = np.quantile(present, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(present) else [math.nan] * 5
    above = {f"at_least_{limit}": _mean((present >= limit).tolist()) for limit in (1, 20)}
    return {"n": len(present), "n_missing": len(values) - len(present), **dict(zip(names, shown, strict=True)), **above}


def time_table(frame: pd.DataFrame, solvers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Per scope and n: median seconds of each solver, and how often it was the fastest certified one in a problem.

    Gradient descent, which certifies nothing, counts with its time to its best gap and is never the fastest.
    """
    runs = nontrivial(frame).copy()
    descent = runs["solver"] == "bm_gd"
    runs["time"] = runs["seconds"].where(~descent, runs["seconds_to_best_gap"])
    out = []
    for (scope, n), part in runs.groupby(["scope", "n"], sort=False):
        certified = part[part["solver"].isin(solvers) & (part["status"] == "certified") & (part["solver"] != "bm_gd")]
        typical = certified.groupby(["beta", "seed", "solver"])["time"].median().unstack()
        fastest = typical.idxmin(axis=1).value_counts()
        out.append(
            {
                "scope": scope,
                "n": int(n),
                "n_problems": len(typical),
                "median_seconds": {
                    name: _median(part.loc[part["solver"] == name, "time"].tolist()) for name in solvers
                },
                "fastest_in": {name: int(fastest.get(name, 0)) for name in solvers if name != "bm_gd"},
            }
        )
    return out


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else math.nan


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else math.nan
