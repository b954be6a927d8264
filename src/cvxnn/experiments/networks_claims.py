"""What the rows of the study of trained networks add up to, and what they say of the paper's claims."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from cvxnn.experiments.claims import GLOBAL_GAP, HELD, IN_PART, NO_RUNS, NOT_HELD
from cvxnn.experiments.complexity_fits import Statement
from cvxnn.experiments.networks import NETWORKS_COLUMNS
from cvxnn.experiments.networks_audit import VERDICTS

__all__ = [
    "THRESHOLDS",
    "check_bounds",
    "check_traps",
    "judge_networks",
    "network_frame",
    "summarise_networks",
    "trained_frame",
]

#: A network is counted as proven to be more than this above the optimum, relative.
THRESHOLDS = (1e-6, 1e-4, 1e-2)
_KEYS = ["width", "beta", "optimizer"]
#: What the bounds of one network and those of the optimum may differ by, in the last digits.
_ROUNDING = 1e-12


def network_frame(outcomes: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per network, the widest first."""
    frame = pd.DataFrame([row for outcome in outcomes for row in outcome["rows"]], columns=list(NETWORKS_COLUMNS))
    missing = ["witness_ratio", "witness_decrease", "curvature_ratio", "same_width_decrease"]
    names = [*missing, "continued_curvature_ratio", "continued_same_width_decrease"]
    return frame.astype(dict.fromkeys(names, float))


def trained_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of problems whose optimum is not zero."""
    return frame[frame["beta"] < frame["beta_max"]]


def summarise_networks(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Numbers per width, beta and optimiser."""
    return [
        dict(zip(_KEYS, map(_plain, key), strict=True)) | _summary(part)
        for key, part in frame.groupby(_KEYS, sort=False)
    ]


def _summary(part: pd.DataFrame) -> dict[str, Any]:
    counts = {
        f"{prefix}verdicts": {name: int((part[f"{prefix}verdict"] == name).sum()) for name in VERDICTS}
        for prefix in ("", "continued_")
    }
    return {
        "n_networks": len(part),
        "zero_is_optimal": bool((part["beta"] >= part["beta_max"]).all()),
        "optimum_lower": float(part["optimum_lower"].max()),
        "optimum_upper": float(part["optimum_upper"].min()),
        "optimum_neurons": int(part["improved_neurons"].min()),
        "median_objective": float(part["objective"].median()),
        "median_excess": float(part["excess"].median()),
        "largest_excess": float(part["excess"].max()),
        "largest_upper_bound": float(part["excess_most"].max()),
        "median_own_gap": float(part["own_gap"].median()),
        "median_gap_network_gates": float(part["gap_network_gates"].median()),
        "largest_gap_network_gates": float(part["gap_network_gates"].max()),
        "median_stationarity": float(part["stationarity"].median()),
        "median_continued_excess": float(part["continued_excess"].median()),
        "n_proven_suboptimal": int(part["proven_suboptimal"].sum()),
        "n_proven_above": {f"{level:g}": int((part["excess_least"] > level).sum()) for level in THRESHOLDS},
        "n_within_1_percent": int(part["within_1_percent"].sum()),
        "n_with_witness": int(part["witness_ratio"].notna().sum()),
        **counts,
        "median_distinct": float(part["n_distinct"].median()),
        "median_improved_objective": float(part["improved_objective"].median()),
        "largest_improved_gap": float(part["improved_gap"].max()),
        "median_train_seconds": float(part["train_seconds"].median()),
        "median_certify_seconds": float(part["certify_seconds"].median()),
        "median_improve_seconds": float(part["improve_seconds"].median()),
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def check_bounds(frame: pd.DataFrame) -> dict[str, int]:
    """How often the report of one network contradicts the optimum, which is known apart from it: never, if sound."""
    slack = _ROUNDING * frame["optimum_upper"]
    return {
        "n_networks": len(frame),
        "n_lower_bounds_above": int((frame["lower_relu_network"] > frame["optimum_upper"] + slack).sum()),
        "n_objectives_below": int((frame["best_objective"] < frame["optimum_lower"] - slack).sum()),
        "n_own_gaps_below": int((frame["own_gap"] < frame["excess"] - _ROUNDING).sum()),
    }


def check_traps(frame: pd.DataFrame, level: float = GLOBAL_GAP) -> dict[str, Any]:
    """Why networks are more than `level` above the optimum: their patterns, or training that is not done."""
    far = frame[frame["excess"] > level]
    return {
        "n_networks": len(far),
        "n_optimal_for_their_patterns": int((far["gap_network_gates"] <= level).sum()),
        "largest_gap_network_gates": float(far["gap_network_gates"].max()) if len(far) else 0.0,
        "n_halved_by_continuation": int((far["continued_excess"] < far["excess"] / 2).sum()),
        "n_with_witness": int(far["witness_ratio"].notna().sum()),
        "n_with_spare_neurons": int(far["same_width_decrease"].notna().sum()),
    }


def judge_networks(frame: pd.DataFrame) -> list[Statement]:
    """The claims of the paper, on the networks of problems whose optimum is not zero."""
    trained = trained_frame(frame)
    return [_saddles(trained), _easier(trained), _global(trained)]


def _saddles(frame: pd.DataFrame) -> Statement:
    descent = frame[frame["optimizer"] == "sgd"]
    either = (descent["verdict"] == "saddle") | (descent["continued_verdict"] == "saddle")
    traps = descent["verdict"].isin(["plateau", "stuck"]) | descent["continued_verdict"].isin(["plateau", "stuck"])
    verdict = NO_RUNS if descent.empty else HELD if (descent["verdict"] == "saddle").any() else NOT_HELD
    if verdict == NOT_HELD and (either | traps).any():
        verdict = IN_PART
    words = []
    for width, part in descent.groupby("width"):
        ends = [
            ", ".join(f"{count} {name}" for name, count in part[column].value_counts().items())
            for column in ("verdict", "continued_verdict")
        ]
        words.append(f"m = {width}: {ends[0]} of {len(part)}; continued by L-BFGS: {ends[1]}")
    return Statement(
        "SGD converges to saddle points",
        "[Our experiments uncover] cases where SGD converges to saddle points, even in two-layer neural networks (1.1)",
        verdict,
        ". ".join(words),
        "held if a network ends stationary (1e-6), more than 1e-6 above the optimum and with negative curvature; in "
        "part if it ends in another stationary point above the optimum, or only gets to one when L-BFGS goes on",
    )


def _easier(frame: pd.DataFrame) -> Statement:
    correlations = []
    for _, part in frame.groupby(["width", "optimizer", "seed"]):
        if part["beta"].nunique() > 1 and part["excess"].nunique() > 1:
            correlations.append(float(spearmanr(part["beta"], part["excess"]).statistic))
    share = float(np.mean(np.array(correlations) < 0)) if correlations else math.nan
    verdict = NO_RUNS if not correlations else HELD if share >= 0.9 else IN_PART if share >= 0.5 else NOT_HELD
    medians = frame.groupby("beta")["excess"].median()
    words = ", ".join(f"{gap:.1e} at beta {beta:g}" for beta, gap in medians.items())
    found = f"the excess falls with beta in {share:.0%} of {len(correlations)} series; median {words}"
    return Statement(
        "a larger beta makes it easier",
        "For larger values of beta, it becomes much easier for GD to find an optimal solution (4.1)",
        verdict,
        found if correlations else "",
        "share of series (m, optimiser, seed) with a negative Spearman correlation of excess and beta: held from 90%, "
        "in part from 50%",
    )


def _global(frame: pd.DataFrame) -> Statement:
    share = float((frame["excess"] <= GLOBAL_GAP).mean()) if len(frame) else math.nan
    verdict = NO_RUNS if frame.empty else HELD if share <= 0.05 else IN_PART if share <= 0.5 else NOT_HELD
    words = []
    for width, part in frame.groupby("width"):
        reached = ", ".join(f"{(part['excess'] <= level).mean():.0%} to {level:g}" for level in THRESHOLDS)
        words.append(f"m = {width}: {reached}")
    return Statement(
        "GD almost never finds the global minimum",
        "GD almost never finds the global minimum (4.1)",
        verdict,
        ". ".join(words),
        f"share of networks at most a relative {GLOBAL_GAP:g} above the optimum: held up to 5%, in part up to 50%",
    )
