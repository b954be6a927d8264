"""What the estimators of all architectures share."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets

from cvxnn.certificates import Certificate
from cvxnn.errors import CertificationWarning, InvalidInputError
from cvxnn.solvers import Result
from cvxnn.validation import as_matrix, check_sample_weight

__all__ = ["ConvexClassifier", "ConvexEstimator", "ConvexRegressor", "plain_array", "project_to_simplex"]


def plain_array(X: Any, what: str) -> Any:
    """Tensors and lists as arrays; `what` they are is said where the parts of a list do not fit together."""
    if isinstance(X, torch.Tensor):
        return X.detach().cpu().numpy()
    try:
        return np.asarray(X) if isinstance(X, (list, tuple)) else X
    except ValueError as error:
        raise InvalidInputError(f"X cannot be read as {what} of one size: {error}") from error


def project_to_simplex(outputs: np.ndarray) -> np.ndarray:
    """Euclidean projection of each row of `outputs`, (n, c), onto the probability simplex.

    By sorting (Held, Wolfe, Crowder 1974).
    """
    # A common shift changes nothing, nor do entries more than 1 below the largest, whose projection is 0.
    outputs = np.maximum(outputs - outputs.max(axis=1, keepdims=True), -1.0)
    descending = -np.sort(-outputs, axis=1)
    excess = np.cumsum(descending, axis=1) - 1
    rank = np.arange(1, outputs.shape[1] + 1)
    n_positive = (descending - excess / rank > 0).sum(axis=1)
    threshold = excess[np.arange(len(outputs)), n_positive - 1] / n_positive
    projected = np.maximum(outputs - threshold[:, None], 0)
    return projected / projected.sum(axis=1, keepdims=True)


class ConvexEstimator(BaseEstimator):
    """Training by :func:`cvxnn.solve`; the parameters are those of the classes below."""

    _losses: ClassVar[tuple[str, ...]] = ()

    def _check_loss(self) -> None:
        if self.loss not in self._losses:
            known = ", ".join(map(repr, self._losses))
            raise InvalidInputError(f"loss is {self.loss!r}; one of {known} is wanted")

    def _problem_arguments(self) -> dict[str, Any]:
        """What the problems of all architectures take, where it is a parameter."""
        names = (
            "activation", "gates", "n_gates", "beta", "loss", "output_bias", "norms", "gate_sampling", "random_state",
            "dtype", "device",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _solver_arguments(self) -> dict[str, Any]:
        return {
            "solver": self.solver,
            "rank": self.rank,
            "tol": self.tol,
            "max_iter": self.max_iter,
            "time_limit": self.time_limit,
            "solver_options": self.solver_options,
            "random_state": self.random_state,
            "verbose": self.verbose,
        }

    def _check_weights(self, sample_weight: Any, Y: np.ndarray) -> np.ndarray:
        return check_sample_weight(sample_weight, len(Y))

    def _set_result(self, result: Result) -> None:
        self.result_ = result
        self.certificate_: Certificate = result.certificate
        self.n_iter_ = max(1, result.n_iter)
        self.network_ = result.network()
        if result.status != "certified":
            warnings.warn(
                f"training ended as {result.status!r} at a relative duality gap of "
                f"{result.certificate.relative_gap:.1e}, above tol={self.tol:g}; raise max_iter or time_limit",
                CertificationWarning,
                stacklevel=4,
            )

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs of the network, (n, c) float64."""
        raise NotImplementedError


class ConvexClassifier(ClassifierMixin, ConvexEstimator):
    """Labels as one-hot targets, and outputs as classes and probabilities."""

    _losses = ("squared", "cross_entropy", "huber", "logistic")

    def _encode(self, y: np.ndarray) -> np.ndarray:
        """One-hot targets (n, n_classes) of labels; sets `classes_`."""
        try:
            check_classification_targets(y)
            self.classes_, index = np.unique(y, return_inverse=True)
        except TypeError as error:
            raise InvalidInputError("y mixes labels of different types; labels of one type are wanted") from error
        if len(self.classes_) < 2:
            raise InvalidInputError(f"y has only one class, {self.classes_.tolist()}; at least two classes are wanted")
        return np.eye(len(self.classes_))[index]

    def _check_weights(self, sample_weight: Any, Y: np.ndarray) -> np.ndarray:
        weights = super()._check_weights(sample_weight, Y)
        if np.count_nonzero(weights @ Y) < 2:
            raise InvalidInputError("only one class has samples of positive weight; at least two classes are wanted")
        return weights

    def decision_function(self, X: Any) -> np.ndarray:
        """Outputs of the network: (n, n_classes), or for two classes (n,), positive for the second."""
        return self._decisions(self._outputs(X))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities (n, n_classes).

        Softmax for cross-entropy, normalised sigmoids for logistic, and otherwise the Euclidean projection
        of the outputs onto the simplex.
        """
        return self._probabilities(self._outputs(X))

    def predict(self, X: Any) -> np.ndarray:
        """The class with the largest output, for each sample."""
        return self._labels(self._outputs(X))

    def _decisions(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs

    def _probabilities(self, outputs: np.ndarray) -> np.ndarray:
        if self.loss == "cross_entropy":
            return torch.softmax(torch.from_numpy(outputs), dim=1).numpy()
        if self.loss == "logistic":
            log_odds = torch.nn.functional.logsigmoid(torch.from_numpy(outputs))
            return torch.softmax(log_odds, dim=1).numpy()
        return project_to_simplex(outputs)

    def _labels(self, outputs: np.ndarray) -> np.ndarray:
        return self.classes_[outputs.argmax(axis=1)]


class ConvexRegressor(RegressorMixin, MultiOutputMixin, ConvexEstimator):
    """Targets as a matrix, and outputs in the shape of the targets."""

    _losses = ("squared", "huber")

    def _as_targets(self, y: np.ndarray) -> np.ndarray:
        """Targets (n, c) of y, (n,) or (n, c), numbers in any type; remembers which."""
        self._single_output = y.ndim == 1
        return as_matrix(y[:, None] if y.ndim == 1 else y, "y")

    def _shaped(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (n, c) as y was in training."""
        return outputs[:, 0] if self._single_output else outputs

    def predict(self, X: Any) -> np.ndarray:
        """Predictions, (n,) or (n, c) as y was in training."""
        return self._shaped(self._outputs(X))
