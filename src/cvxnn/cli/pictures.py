"""The pictures of a training and of predictions, as the commands write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import is_classifier

from cvxnn import plotting

__all__ = ["draw_pictures", "draw_scores"]


def draw_pictures(
    folder: Path,
    model: Any,
    table: pd.DataFrame,
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
) -> list[str]:
    """All pictures of a training; `table` has the training rows as they were read. Returns the file names."""
    result = model.result_
    written = [
        plotting.plot_gap(result.trace, folder / "gap.png", tol=model.tol),
    ]
    if model.certificate_.gate_ratios:
        written.append(plotting.plot_gates(model.certificate_, folder / "gates.png"))
    rows, part = (test, "test samples") if len(test) else (train, "training samples")
    names = [path.name for path in written]
    name = "confusion.png" if is_classifier(model) else "residuals.png"
    names.append(draw_scores(folder / name, model, X[rows], y[rows], part))
    preprocessor = model.preprocessor_
    if preprocessor.feature_names == preprocessor.columns and len(preprocessor.columns) == 2:
        names.append(_draw_plane(folder, model, table, y[train]))
    return names


def draw_scores(path: Path, model: Any, X: Any, y: np.ndarray, part: str) -> str:
    """Confusion matrix or residuals; the file's name."""
    draw = plotting.plot_confusion if is_classifier(model) else plotting.plot_residuals
    return draw(y, model.predict(X), path, part=part).name


def _draw_plane(folder: Path, model: Any, table: pd.DataFrame, y: np.ndarray) -> str:
    """Decision regions or the surface over two numeric columns, in their own units."""
    columns = model.preprocessor_.columns

    def predict(points: np.ndarray) -> np.ndarray:
        return model.predict(model.preprocessor_.transform(pd.DataFrame(points, columns=columns)))

    draw = plotting.plot_decision_regions if is_classifier(model) else plotting.plot_regression_surface
    name = "decision_regions.png" if is_classifier(model) else "regression_surface.png"
    points = table[columns].to_numpy(dtype=np.float64)
    return draw(predict, points, y, folder / name, feature_names=columns).name
