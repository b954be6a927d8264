"""The page, the table and the pictures of the study of trained networks."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cvxnn._version import __version__
from cvxnn.experiments.claims import GLOBAL_GAP
from cvxnn.experiments.complexity_fits import as_dicts
from cvxnn.experiments.networks import NETWORKS_SCALES, NetworksGrid
from cvxnn.experiments.networks_audit import OPTIMAL, VERDICTS
from cvxnn.experiments.networks_claims import (
    THRESHOLDS,
    check_bounds,
    check_traps,
    judge_networks,
    network_frame,
    summarise_networks,
    trained_frame,
)
from cvxnn.experiments.networks_figures import draw_network_figures
from cvxnn.experiments.pages import markdown_table, write_page
from cvxnn.files import write_atomically

__all__ = ["networks_summary", "write_networks_report"]

_CAPTIONS = {
    "excess.png": "Every network by its excess over the optimum of all ReLU networks. Coloured: the interval that is "
    "proven, mostly shorter than its marker. Grey: what the gradient of the network alone proves, without solving "
    "anything. Values below 1e-10 are drawn there.",
    "improve.png": "Every network before and after `improve()`.",
    "training.png": "Excess during the training: medians over the seeds, bands from the smallest to the largest.",
    "certificate.png": "The certificate, for the worst network of two widths: the slope of a new neuron against its "
    "direction. A network is optimal where no slope is above beta (the grey line) and all of its neurons are at slope "
    "beta; a direction above it lowers the objective. Discs: the neurons, by size.",
}


def networks_summary(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is computed from the outcomes, for JSON."""
    frame = network_frame(outcomes)
    return {
        "certified": bool((frame["improved_gap"] <= OPTIMAL).all()),
        "n_improved": int((frame["improved_gap"] <= OPTIMAL).sum()),
        "n_runs": len(frame),
        "claims": as_dicts(judge_networks(frame)),
        "bounds": check_bounds(frame),
        "traps": check_traps(trained_frame(frame)),
        "cells": [{key: _finite(value) for key, value in part.items()} for part in summarise_networks(frame)],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_networks_report(outcomes: list[dict[str, Any]], grid: NetworksGrid, folder: Path) -> list[str]:
    """Write networks.csv, the pictures and report.md into a folder that exists; their names."""
    frame = network_frame(outcomes)
    write_atomically(folder / "networks.csv", lambda temporary: frame.to_csv(temporary, index=False))
    pictures = draw_network_figures(trained_frame(frame), outcomes, grid.n_samples, folder)
    text = _page(frame, grid, pictures)
    write_page(folder / "report.md", text)
    return ["report.md", "networks.csv", *pictures]


def _page(frame: pd.DataFrame, grid: NetworksGrid, pictures: list[str]) -> str:
    summary = summarise_networks(frame)
    claims = [(part.statement, f"**{part.verdict}**", part.found, part.rule) for part in judge_networks(frame)]
    parts = [
        "# Are networks trained by SGD and Adam globally optimal?",
        _settings(frame, grid),
        "## Claims of the paper",
        markdown_table(("The paper", "Verdict", "Found", "Rule"), claims),
        "The claims of section 4.1 are of gradient descent on the factors of gated networks; here they are judged on "
        "ReLU networks, for the betas where the optimum is not zero.",
        "## How far from the optimum",
        _distances(summary),
        "- *proven suboptimal*: a better network was found, and its objective is the proof; by more than so much, "
        "relative to the optimum.\n"
        "- *within 1%*: networks with a proof that no ReLU network, of any width, is more than 1% better.",
        "## What they end in",
        _endings(summary),
        "\n".join(f"- *{name.replace('_', ' ')}*: {words}." for name, words in VERDICTS.items()),
        _traps(trained_frame(frame)),
        "## After improve()",
        _improvements(summary),
        "## The bounds",
        _bounds(frame),
        "## Pictures" if pictures else "",
        "\n\n".join(f"![{name}]({name})\n\n{_CAPTIONS[name]}" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(frame: pd.DataFrame, grid: NetworksGrid) -> str:
    zero = sorted(frame.loc[frame["beta"] >= frame["beta_max"], "beta"].unique())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in zip(grid.optimizers, grid.learning_rates, strict=True))
    lines = [
        f"- Data: the class-balanced spiral, d = 2, c = 3, n = {grid.n_samples}, no biases, one-hot targets.",
        "- Objective: 1/(2n) ||outputs - targets||^2 + beta/2 (||W1||^2 + ||W2||^2), which is what torch's SGD and "
        "Adam minimise on that loss with `weight_decay=beta`.",
        f"- Hidden units m = {_words(grid.widths)}; beta = {_words(grid.betas)}; seeds {grid.seeds[0]} to "
        f"{grid.seeds[-1]} ({len(frame)} networks), torch's default initialisation, float64.",
        f"- Training: {grid.steps} full-batch steps, constant learning rates ({rates}), momentum 0.9 for SGD.",
        f"- beta_max = {float(frame['beta_max'].iloc[0]):.4g}: from there on the zero network is optimal"
        + (f" (here beta = {_words(zero)}; left out of the claims and pictures)." if zero else "."),
        f"- One thread per network. Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} "
        f"cores ({platform.machine()}), cvxnn {__version__}.",
        "- Every network: [networks.csv](networks.csv).",
    ]
    paper = NETWORKS_SCALES["paper"]
    if grid != paper:
        lines.append(
            f"- **Not the full scale**, which is m = {_words(paper.widths)}, beta = {_words(paper.betas)}, "
            f"{len(paper.seeds)} seeds and {paper.steps} steps."
        )
    return "\n".join(lines)


def _words(values: Sequence[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _case(part: dict[str, Any]) -> tuple[str, str, str]:
    return str(part["width"]), f"{part['beta']:g}", part["optimizer"]


def _distances(summary: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            *_case(part),
            f"{part['optimum_upper']:.8g}",
            f"{part['median_objective']:.8g}",
            f"{part['median_excess']:.1e}",
            f"{part['largest_excess']:.1e}",
            f"{part['median_own_gap']:.1e}",
            str(part["n_proven_suboptimal"]),
            *(str(part["n_proven_above"][f"{level:g}"]) for level in THRESHOLDS),
            f"{part['n_within_1_percent']} of {part['n_networks']}",
        )
        for part in summary
    ]
    above = ("proven suboptimal", *(f"by more than {level:g}" for level in THRESHOLDS))
    header = ("m", "beta", "optimiser", "optimum", "objective (median)", "excess (median)", "excess (largest)")
    return markdown_table((*header, "gap from the gradient alone (median)", *above, "within 1%"), rows)


def _endings(summary: Sequence[dict[str, Any]]) -> str:
    rows = []
    for part in summary:
        if part["zero_is_optimal"]:
            continue
        counts = [
            " / ".join(str(part[f"{prefix}verdicts"][name]) for prefix in ("", "continued_")) for name in VERDICTS
        ]
        rows.append(
            (
                *_case(part),
                *counts,
                f"{part['median_excess']:.1e} / {part['median_continued_excess']:.1e}",
                f"{part['median_stationarity']:.1e}",
                f"{part['median_distinct']:g}",
                f"{part['largest_gap_network_gates']:.1e}",
            )
        )
    if not rows:
        return ""
    names = (name.replace("_", " ") for name in VERDICTS)
    header = ("m", "beta", "optimiser", *names, "excess (median)", "residual (median)", "distinct neurons (median)")
    wide = (*header, "gap among networks with their patterns (largest)")
    return "As trained / after L-BFGS at the same width went on from there.\n\n" + markdown_table(wide, rows)


def _traps(frame: pd.DataFrame) -> str:
    check = check_traps(frame)
    if not check["n_networks"]:
        return ""
    return (
        f"Of the {check['n_networks']} networks that are more than {GLOBAL_GAP:g} above the optimum, "
        f"{check['n_optimal_for_their_patterns']} are within {GLOBAL_GAP:g} of the best network with the same "
        f"activation patterns (the largest gap is {check['largest_gap_network_gates']:.1e}), and L-BFGS halves the "
        f"excess of {check['n_halved_by_continuation']}. {check['n_with_witness']} have a witness, and "
        f"{check['n_with_spare_neurons']} have a spare neuron that could take its place."
    )


def _improvements(summary: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            *_case(part),
            f"{part['median_objective']:.8g}",
            f"{part['median_improved_objective']:.8g}",
            f"{part['largest_improved_gap']:.1e}",
            str(part["optimum_neurons"]),
            f"{part['median_train_seconds']:.2g}",
            f"{part['median_certify_seconds']:.2g}",
            f"{part['median_improve_seconds']:.2g}",
        )
        for part in summary
    ]
    header = ("m", "beta", "optimiser", "objective as trained", "after improve()", "largest certified gap")
    times = ("neurons, fewest", "training s", "certify s", "improve s")
    return (
        markdown_table((*header, *times), rows) + "\n\nMedians, but where it says otherwise. Seconds are per network."
    )


def _bounds(frame: pd.DataFrame) -> str:
    check = check_bounds(frame)
    width = float((frame["excess_most"] - frame["excess_least"]).max())
    return (
        f"The optimum of each problem is known apart from the networks, to a relative "
        f"{(frame['optimum_upper'] / frame['optimum_lower'] - 1).max():.1e}. Of {check['n_networks']} reports, "
        f"{check['n_lower_bounds_above']} have a lower bound above it, {check['n_objectives_below']} claim a network "
        f"below it, and {check['n_own_gaps_below']} have a gap from the gradient alone that is smaller than the "
        f"excess. The widest certified interval of an excess is {width:.1e} long."
    )
