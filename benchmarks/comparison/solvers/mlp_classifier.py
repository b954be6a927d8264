"""scikit-learn's MLPClassifier: a ReLU network, another problem; accuracy and time only."""

from __future__ import annotations

import warnings
from typing import Any

from benchopt import BaseSolver
from benchopt.stopping_criterion import SingleRunCriterion
from sklearn.neural_network import MLPClassifier


class Solver(BaseSolver):
    """Default settings."""

    name = "sklearn-mlp"
    requirements = ["scikit-learn"]
    sampling_strategy = "run_once"
    stopping_criterion = SingleRunCriterion()

    def skip(self, labels: Any, **_: Any) -> tuple[bool, str | None]:
        """Classes only."""
        return (True, "there are no classes") if labels is None else (False, None)

    def set_objective(self, X: Any, labels: Any, **_: Any) -> None:
        """Keep what is needed."""
        self.X, self.labels = X, labels

    def run(self, _: Any) -> None:
        """Train once."""
        self.model = MLPClassifier(random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.fit(self.X, self.labels)

    def get_result(self) -> dict[str, Any]:
        """The rule of the classifier."""
        return {"predict": self.model.predict}
