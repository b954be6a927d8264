"""Two-layer perceptrons as scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data

from cvxnn.estimators.base import ConvexClassifier, ConvexEstimator, ConvexRegressor
from cvxnn.problem import Problem
from cvxnn.problems import mlp_problem
from cvxnn.samples import merge_duplicates
from cvxnn.solvers import solve

__all__ = ["ConvexMLP", "ConvexMLPClassifier", "ConvexMLPRegressor"]


class ConvexMLP(ConvexEstimator):
    """What classifier and regressor share; parameters are documented there."""

    def __init__(
        self,
        activation: str = "gated_relu",
        *,
        n_gates: int = 100,
        rank: int | None = None,
        beta: float = 1e-3,
        loss: str = "squared",
        solver: str = "auto",
        tol: float = 1e-4,
        max_iter: int | None = None,
        time_limit: float | None = None,
        hidden_bias: bool = True,
        output_bias: bool = True,
        gates: Any = None,
        gate_sampling: str = "gaussian",
        gate_quantile: float | Sequence[float] | None = None,
        norms: tuple[str, str] = ("l2", "l2"),
        solver_options: dict[str, Any] | None = None,
        dtype: str = "float64",
        random_state: Any = None,
        device: str = "auto",
        checkpoint: str | None = None,
        resume: bool = False,
        verbose: int = 0,
    ) -> None:
        self.activation = activation
        self.n_gates = n_gates
        self.rank = rank
        self.beta = beta
        self.loss = loss
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.hidden_bias = hidden_bias
        self.output_bias = output_bias
        self.gates = gates
        self.gate_sampling = gate_sampling
        self.gate_quantile = gate_quantile
        self.norms = norms
        self.solver_options = solver_options
        self.dtype = dtype
        self.random_state = random_state
        self.device = device
        self.checkpoint = checkpoint
        self.resume = resume
        self.verbose = verbose

    def _problem(self, X: np.ndarray, Y: np.ndarray, weights: np.ndarray, beta: float, random_state: Any) -> Problem:
        self._check_loss()
        arguments = self._problem_arguments() | {"beta": beta, "random_state": random_state}
        return mlp_problem(
            X,
            Y,
            reduction="mean",
            hidden_bias=self.hidden_bias,
            sample_weight=weights,
            gate_quantile=self.gate_quantile,
            **arguments,
        )

    def _solver_arguments(self) -> dict[str, Any]:
        kept = {"checkpoint": getattr(self, "checkpoint", None), "resume": getattr(self, "resume", False)}
        return super()._solver_arguments() | kept

    def _fit_targets(self, X: np.ndarray, Y: np.ndarray, sample_weight: Any) -> None:
        """Fit to a matrix of targets; samples that occur more than once are merged first."""
        weights = self._check_weights(sample_weight, Y)
        problem = self._problem(*merge_duplicates(X, Y, weights), self.beta, self.random_state)
        self._set_result(solve(problem, **self._solver_arguments()))

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs of the network, (n, c) float64."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            rows = torch.from_numpy(np.array(X, copy=True, order="C")).to(self.network_.bias.device)
            return self.network_(rows).double().cpu().numpy()


class ConvexMLPClassifier(ConvexClassifier, ConvexMLP):
    """A two-layer network classifier trained to a certified distance from the global optimum.

    There is no learning rate to tune, and ``certificate_`` says how far the training objective is, at
    most, from the best possible one for the same gates.

    Parameters
    ----------
    activation : {"gated_relu", "linear", "relu"}
        For "relu" each neuron stays in the cone of its gate: a plain ReLU network, certified among all networks
        with the activation patterns of the gates (with ``gates="enumerate"`` among all ReLU networks).
    n_gates : int
        Number of gates drawn; equal ones are merged.
    rank : int or None
        For Burer-Monteiro solvers; None for the convex ones.
    beta : float
        Regularisation (weight decay on both layers), for the mean loss.
    loss : {"squared", "cross_entropy", "huber", "logistic"}
        On one-hot labels.
    solver : str
        See :func:`cvxnn.solve`.
    tol : float
        Relative duality gap at which training ends.
    max_iter, time_limit : optional
        Limits; ending there raises a ``CertificationWarning``.
    hidden_bias, output_bias : bool
        Biases of the two layers; that of the output is not penalised.
    gates : array-like of shape (d + hidden_bias, P), "enumerate" or None
    gate_sampling : {"gaussian", "differences", "whitened", "kmeans"}
    gate_quantile : float, several, or None
    norms : pair of {"l1", "l2", "linf"}
    solver_options : dict or None
    dtype : {"float64", "float32"}
    random_state : int, RandomState or None
        Draws the gates.
    device : {"auto", "cpu", "cuda"}
    checkpoint : str or None
        File to which the state of the training is written every 30 seconds and at the end.
    resume : bool
        Go on from `checkpoint` where it exists.
    verbose : {0, 1, 2}

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    certificate_ : Certificate
    result_ : Result
    network_ : torch.nn.Module
    n_iter_ : int
    n_features_in_, feature_names_in_

    Examples
    --------
    >>> from cvxnn import ConvexMLPClassifier
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ConvexMLPClassifier(random_state=0).fit(X, y)
    >>> bool(model.certificate_.relative_gap <= 1e-4)
    True
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexMLPClassifier:
        """Train on X (n, d) and labels y (n,), numbers or strings."""
        X, Y = self._validate(X, y)
        self._fit_targets(X, Y, sample_weight)
        return self

    def _validate(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, dtype=np.float64, order="C")
        return X, self._encode(y)


class ConvexMLPRegressor(ConvexRegressor, ConvexMLP):
    """A two-layer network regressor trained to a certified distance from the global optimum.

    Parameters and attributes are those of :class:`ConvexMLPClassifier`, without classes; `loss` is
    "squared" or "huber", and y may have several columns.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexMLPRegressor:
        """Train on X (n, d) and targets y, (n,) or (n, c)."""
        X, Y = self._validate(X, y)
        self._fit_targets(X, Y, sample_weight)
        return self

    def _validate(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, dtype=np.float64, order="C", multi_output=True)
        return X, self._as_targets(y)
