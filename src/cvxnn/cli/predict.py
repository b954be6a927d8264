"""``cvxnn predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from sklearn.base import is_classifier

from cvxnn._version import __version__
from cvxnn.cli.data import features_of, label_indices, load_model, open_source, scores, unknown_category_notes
from cvxnn.cli.fit import score_text
from cvxnn.cli.options import Data, Json, Model, Target, folder
from cvxnn.cli.pictures import draw_scores
from cvxnn.cli.report import Report, check_folder, output_folder, write_json
from cvxnn.files import write_atomically
from cvxnn.tables import number_values

__all__ = ["predict"]

_OUT_HELP = "Folder for predictions.csv, metrics.json and a picture."


def predict(
    model: Model,
    data: Data,
    target: Target = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help=_OUT_HELP, parser=folder)] = None,
    as_json: Json = False,
) -> int:
    """Predict with a trained MODEL for every row of DATA.

    Without --out the predictions are CSV on standard output. Where DATA has the target column, its values
    are compared with the predictions.
    """
    if out is not None:
        check_folder(out)
    trained = load_model(model)
    source = open_source(data)
    column = _target_column(trained, source.frame, source.choose_target(target) if target is not None else None)
    X = features_of(trained, source.frame, column)
    table = predictions_table(trained, X)
    y = None if column is None else _known_values(trained, source.frame[column])
    found = None if y is None else scores(trained, X, y)
    document: dict[str, Any] = {
        "command": "predict",
        "version": __version__,
        "model": model,
        "data": {"name": source.name, "target": column, "n_rows": len(table)},
        "scores": found,
    }
    report = Report(as_json, to_stderr=out is None)
    rows = [("data", f"{source.name}: {len(table)} rows")]
    report.rows(rows if found is None else [*rows, ("score", score_text(found))])
    for note in unknown_category_notes(trained, source.frame):
        report.say(note)
    if column is not None and y is None:
        report.say(f"Note: no score, since column {column!r} has missing values or classes unknown to the model.")
    if out is not None:
        with output_folder(out) as folder:
            write_atomically(folder / "predictions.csv", lambda path: table.to_csv(path, index=False))
            names = ["predictions.csv", "metrics.json"]
            if y is not None:
                names.append(draw_scores(folder / "predictions.png", trained, X, y, "samples"))
            document["files"] = names
            write_json(folder / "metrics.json", document)
        report.say(f"Written to {out}: {', '.join(names)}")
    elif as_json:
        document["predictions"] = {name: table[name].tolist() for name in table.columns}
    else:
        table.to_csv(sys.stdout, index=False)
    report.finish(document)
    return 0


def _target_column(model: Any, frame: pd.DataFrame, asked: str | None) -> str | None:
    """The column with true values, if the table has it."""
    if asked is not None:
        return asked
    remembered = getattr(getattr(model, "preprocessor_", None), "target", None)
    return remembered if remembered in frame.columns else None


def predictions_table(model: Any, X: Any) -> pd.DataFrame:
    """A column with the predictions, and for a classifier one per class with its probability."""
    table = pd.DataFrame({"prediction": model.predict(X)})
    if is_classifier(model):
        probabilities = model.predict_proba(X)
        for index, label in enumerate(model.classes_.tolist()):
            table[f"probability_{label}"] = probabilities[:, index]
    return table


def _known_values(model: Any, series: pd.Series) -> np.ndarray | None:
    """True values to compare with; None where some are missing or are no class of the model."""
    if series.isna().any():
        return None
    if not is_classifier(model):
        return number_values(str(series.name), series)
    index = label_indices(model, series)
    return None if (index < 0).any() else model.classes_[index]
