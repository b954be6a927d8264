"""What the paper says of layerwise training, beside what was found."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cvxnn.experiments.layerwise_settings import PAPER_ACCURACY, PAPER_STAGES

__all__ = ["CERTIFIED", "layerwise_claims"]

#: Relative gap of convex stages.
CERTIFIED = 1e-3
#: Points of accuracy within which a figure counts as reached.
_CLOSE = 0.5
#: Training images and gates from which on a run is at the paper's scale.
_MOST_IMAGES, _MOST_GATES = 50_000, 256
_NOT_TESTED = "not tested"

Claim = dict[str, str]


def layerwise_claims(frame: pd.DataFrame, costs: pd.DataFrame) -> list[Claim]:
    """Name, verdict (held, held in part, not held, not tested), what was found, and the rule of the verdict.

    Parameters
    ----------
    frame, costs : pandas.DataFrame
        The rows of the trainings and of the costs.
    """
    claims = []
    for dataset, part in frame[frame["kind"] == "layerwise"].groupby("dataset", sort=False):
        ends = part.groupby("m").tail(1)
        claims += [_reached(row) for row in ends.to_dict("records")]
        claims.append(_grows(str(dataset), part))
        deep = frame[(frame["kind"] == "end_to_end") & (frame["dataset"] == dataset)]
        if len(deep):
            claims.append(_matches(str(dataset), ends, deep))
    claims += [
        _certified(str(dataset), part)
        for dataset, part in frame[frame["kind"] == "convex"].groupby("dataset", sort=False)
    ]
    claims += [_cheaper(costs, value) for value in ("epoch_seconds", "peak_gib") if len(costs)]
    return claims


def _at_scale(row: dict[str, Any]) -> bool:
    """Whether a training is that of the paper: all images, all gates, all stages."""
    stages = PAPER_STAGES.get(row["dataset"])
    return (
        stages is not None
        and row["n_train"] >= _MOST_IMAGES
        and row["stage"] >= stages
        and row["drawn_gates"] >= _MOST_GATES
    )


def _verdict(held: list[bool], tested: bool) -> str:
    if not tested or not held:
        return _NOT_TESTED
    return "held" if all(held) else "held in part" if any(held) else "not held"


def _reached(row: dict[str, Any]) -> Claim:
    """The accuracy of the paper after its stages."""
    wanted = PAPER_ACCURACY.get((row["dataset"], row["m"]))
    seen = 100 * row["test_accuracy"]
    against = "" if wanted is None else f"; the paper: {wanted}% after {PAPER_STAGES[row['dataset']]}"
    return {
        "name": f"{row['dataset']}, m = {row['m']}: the accuracy of the paper",
        "verdict": _verdict([wanted is not None and seen >= wanted - _CLOSE], wanted is not None and _at_scale(row)),
        "found": f"{seen:.2f}% after {int(row['stage'])} stages on {int(row['n_train'])} images{against}",
        "rule": f"at least that of the paper less {_CLOSE} points, with its stages, gates and images",
    }


def _grows(dataset: str, part: pd.DataFrame) -> Claim:
    """Stages improve on those before them."""
    ends = [(line["test_accuracy"].iloc[0], line["test_accuracy"].iloc[-1]) for _, line in part.groupby("m")]
    deep = part["stage"].max() > 1
    return {
        "name": f"{dataset}: accuracy grows with the stages",
        "verdict": _verdict([last > first for first, last in ends], deep and _all_at_scale(part)),
        "found": ", ".join(
            f"m = {m}: {100 * first:.2f}% to {100 * last:.2f}%"
            for m, (first, last) in zip(sorted(set(part["m"])), ends, strict=True)
        ),
        "rule": "test accuracy after the last stage above that after the first, for every m",
    }


def _all_at_scale(part: pd.DataFrame) -> bool:
    return all(_at_scale(row) for row in part.groupby("m").tail(1).to_dict("records"))


def _matches(dataset: str, ends: pd.DataFrame, deep: pd.DataFrame) -> Claim:
    """Layerwise networks match those of the same depth trained end to end."""
    both = ends.merge(deep, on="m", suffixes=("", "_deep"))
    pairs = [(row["m"], 100 * row["test_accuracy"], 100 * row["test_accuracy_deep"]) for row in both.to_dict("records")]
    return {
        "name": f"{dataset}: layerwise matches end to end",
        "verdict": _verdict([seen >= other - _CLOSE for _, seen, other in pairs], _all_at_scale(ends)),
        "found": ", ".join(f"m = {m}: {seen:.2f}% beside {other:.2f}%" for m, seen, other in pairs),
        "rule": f"at least the network of the same depth and width less {_CLOSE} points, for every m",
    }


def _certified(dataset: str, part: pd.DataFrame) -> Claim:
    """Convex stages are solved to the certified tolerance."""
    stages = [f"stage {int(row['stage'])}: {100 * row['test_accuracy']:.2f}%" for row in part.to_dict("records")]
    return {
        "name": f"{dataset}: convex stages certified",
        "verdict": _verdict((part["relative_gap"] <= CERTIFIED).tolist(), True),
        "found": f"{', '.join(stages)}; largest gap {part['relative_gap'].max():.1e}",
        "rule": f"relative duality gap of every stage at most {CERTIFIED:g}",
    }


def _cheaper(costs: pd.DataFrame, value: str) -> Claim:
    """The Burer-Monteiro form takes less than the convex one."""
    what = {"epoch_seconds": "time", "peak_gib": "memory"}[value]
    table = costs.pivot_table(index=["dataset", "stage"], columns="form", values=value)
    ratios = (table["convex"] / table["bm"]).dropna() if {"bm", "convex"} <= set(table.columns) else pd.Series()
    found = f"(23) over (126): {ratios.min():.2g} to {ratios.max():.2g} times" if len(ratios) else "nothing measured"
    return {
        "name": f"the factors take less {what} than the convex form",
        "verdict": _verdict((ratios > 1).tolist(), costs["n_gates"].max() >= _MOST_GATES),
        "found": found,
        "rule": f"in every stage where both were measured, with {_MOST_GATES} gates",
    }
