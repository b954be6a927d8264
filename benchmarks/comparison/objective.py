"""The objective of all solvers: value, duality gap and accuracy, from the weights that a solver returns."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmark_utils.programs import best_bound, hits, make_program, predictions
from benchopt import BaseObjective

import cvxnn


class Objective(BaseObjective):
    """min over Z of 1/2 ||sum_k D_k X Z_k - Y||^2 + beta sum_k ||Z_k||_* with drawn gates, float64.

    Parameters
    ----------
    beta : float
        Relative to beta_max, from which on Z = 0 is optimal; or absolute.
    n_gates : int
        Gates that are drawn, with seed 0; the same for all solvers.
    cap : float
        Seconds for one run.
    target : float
        Relative gap at which a curve ends.
    """

    name = "Gated ReLU"
    min_benchopt_version = "1.9"
    requirements: list[str] = []
    parameters = {
        "beta, absolute": [(1e-1, False), (1e-2, False), (1e-3, False)],
        "n_gates": [100],
        "cap": [60],
        "target": [1e-6],
    }
    test_config = {"beta": 1e-1, "absolute": False, "n_gates": 5, "cap": 5, "target": 1e-4}
    test_dataset_name = "generated"

    def skip(self, missing: str = "", **_: Any) -> tuple[bool, str | None]:
        """Without the files of a data set, which says what is missing."""
        return (True, missing) if missing else (False, None)

    def set_data(
        self, X: Any, Y: Any, labels: Any = None, test_X: Any = None, test_labels: Any = None, missing: str = ""
    ) -> None:
        """Draw the gates and fix beta.

        Parameters
        ----------
        X : numpy.ndarray of shape (n, d)
        Y : numpy.ndarray of shape (n, c)
        labels : numpy.ndarray of shape (n,), optional
            +-1 for one output, otherwise the column of the class.
        test_X, test_labels : numpy.ndarray, optional
        """
        drawn = cvxnn.mlp_problem(X, Y, n_gates=self.n_gates, reduction="sum", random_state=0)
        self.beta_value = self.beta if self.absolute else self.beta * drawn.beta_max
        self.problem = make_program(X, Y, drawn.gates.numpy(), self.beta_value)
        self.X, self.Y, self.labels, self.test_X, self.test_labels = X, Y, labels, test_X, test_labels

    def get_objective(self) -> dict[str, Any]:
        """What a solver gets: data, gates, beta; labels for those that train a classifier of their own."""
        return {
            "X": self.X,
            "Y": self.Y,
            "gates": self.problem.gates.numpy(),
            "beta": self.beta_value,
            "labels": self.labels,
            "cap": self.cap,
        }

    def evaluate_result(self, Z: Any = None, predict: Any = None) -> dict[str, float]:
        """What the weights are worth.

        Parameters
        ----------
        Z : array-like of shape (P, d, c), optional
            Blocks. Value, bound and gap are those of :func:`cvxnn.certify`.
        predict : callable, optional
            For models of another kind, from samples to classes: accuracies only.

        Returns
        -------
        dict
            ``value``; ``gap``, to the best lower bound known; ``certified_gap``, proven from the weights alone;
            ``train_accuracy``, ``test_accuracy``; NaN where something is not defined.
        """
        nan = float("nan")
        report = {"cap": self.cap, "target": self.target}
        if Z is None:
            shares = [
                float(np.mean(predict(X) == labels)) if labels is not None else nan
                for X, labels in ((self.X, self.labels), (self.test_X, self.test_labels))
            ]
            values = {"value": nan, "gap": nan, "certified_gap": nan}
            return report | values | {"train_accuracy": shares[0], "test_accuracy": shares[1]}
        certificate = cvxnn.certify(self.problem, Z=Z)
        bound = best_bound(self.problem, 5 * self.cap, certificate.lower_bound)
        test = nan if self.test_X is None else hits(predictions(self.problem, Z, self.test_X), self.test_labels)
        return report | {
            "value": certificate.primal,
            "gap": max(0.0, certificate.primal - bound) / bound,
            "certified_gap": certificate.relative_gap,
            "train_accuracy": hits(predictions(self.problem, Z, self.X), self.labels),
            "test_accuracy": test,
        }

    def get_one_result(self) -> dict[str, Any]:
        """Weights zero."""
        return {"Z": np.zeros(self.problem.operator.block_shape)}
