"""Estimators that choose beta by cross-validation along the regularisation path."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.base import is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import check_random_state

from cvxnn.errors import InvalidInputError
from cvxnn.estimators import ConvexMLP, ConvexMLPClassifier, ConvexMLPRegressor
from cvxnn.samples import merge_duplicates
from cvxnn.solvers import path, solve
from cvxnn.validation import check_integer, check_positive

__all__ = ["ConvexMLPClassifierCV", "ConvexMLPRegressorCV"]

_PARAMETERS = """
    Parameters
    ----------
    betas : sequence of float, optional
        Candidates; by default `n_betas` values from beta_max of the training set down to `ratio` times it,
        evenly spaced in the logarithm.
    n_betas : int
    ratio : float
    cv : int, splitter or iterable of splits
        As in scikit-learn: the number of (stratified) folds, and so on.
    scoring : str, callable or None
        As in scikit-learn; accuracy or R^2 by default.
    n_jobs : int or None
        Folds solved at the same time (joblib).

    The other parameters are those of the class without CV, except beta.

    Attributes
    ----------
    beta_ : float
        The value with the best mean score (the largest, if several tie).
    betas_ : ndarray of shape (n_betas,)
        Decreasing.
    cv_scores_ : ndarray of shape (n_betas, n_folds)

    Further attributes are those of the class without CV, trained on all samples with ``beta_``.
    """


class _PathCV(ConvexMLP):
    """The cross-validation; combined with an estimator below."""

    def __init__(
        self,
        activation: str = "gated_relu",
        *,
        betas: Any = None,
        n_betas: int = 10,
        ratio: float = 1e-4,
        cv: Any = 5,
        scoring: Any = None,
        n_jobs: int | None = None,
        n_gates: int = 100,
        rank: int | None = None,
        loss: str = "squared",
        solver: str = "auto",
        tol: float = 1e-4,
        max_iter: int | None = None,
        time_limit: float | None = None,
        hidden_bias: bool = True,
        output_bias: bool = True,
        gates: Any = None,
        gate_sampling: str = "gaussian",
        gate_quantile: float | None = None,
        norms: tuple[str, str] = ("l2", "l2"),
        solver_options: dict[str, Any] | None = None,
        dtype: str = "float64",
        random_state: Any = None,
        device: str = "auto",
        verbose: int = 0,
    ) -> None:
        self.betas = betas
        self.n_betas = n_betas
        self.ratio = ratio
        self.cv = cv
        self.scoring = scoring
        self.n_jobs = n_jobs
        super().__init__(
            activation,
            n_gates=n_gates,
            rank=rank,
            loss=loss,
            solver=solver,
            tol=tol,
            max_iter=max_iter,
            time_limit=time_limit,
            hidden_bias=hidden_bias,
            output_bias=output_bias,
            gates=gates,
            gate_sampling=gate_sampling,
            gate_quantile=gate_quantile,
            norms=norms,
            solver_options=solver_options,
            dtype=dtype,
            random_state=random_state,
            device=device,
            verbose=verbose,
        )
        del self.beta  # chosen in fit, no parameter
        del self.checkpoint, self.resume  # of one training; here there are many

    def fit(self: Any, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Choose beta by cross-validation, then train on all samples."""
        data, Y = self._validate(X, y)
        labels = self.classes_[Y.argmax(axis=1)] if is_classifier(self) else (Y[:, 0] if self._single_output else Y)
        weights = self._check_weights(sample_weight, Y)
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = int(check_random_state(seed).randint(2**31 - 1))
        problem = self._problem(*merge_duplicates(data, Y, weights), 1.0, seed)
        self.betas_ = self._candidates(problem.beta_max)
        splits = list(check_cv(self.cv, labels, classifier=is_classifier(self)).split(data, labels))
        score_weights = None if sample_weight is None else weights
        scores = Parallel(n_jobs=self.n_jobs)(
            delayed(_fold_scores)(self, data, Y, labels, weights, score_weights, split, seed) for split in splits
        )
        self.cv_scores_ = np.array(scores).T
        if not np.isfinite(self.cv_scores_).all():
            raise InvalidInputError(
                "scoring gave NaN or infinity on a fold (as R^2 does for a single sample); "
                "fewer folds or another scoring is wanted"
            )
        self.beta_ = float(self.betas_[int(np.argmax(self.cv_scores_.mean(axis=1)))])
        self._set_result(solve(problem.with_beta(self.beta_), **self._solver_arguments()))
        return self

    def _candidates(self: Any, beta_max: float) -> np.ndarray:
        if self.betas is not None:
            values = np.array([check_positive(beta, "betas") for beta in self.betas])
            if len(values) == 0:
                raise InvalidInputError("betas is empty; at least one value is wanted")
            return np.sort(values)[::-1]
        check_integer(self.n_betas, "n_betas")
        if not 0 < check_positive(self.ratio, "ratio") < 1:
            raise InvalidInputError(f"ratio is {self.ratio!r}; a number between 0 and 1 is wanted")
        return np.geomspace(1.0, self.ratio, self.n_betas) * (beta_max if beta_max > 0 else 1.0)


def _fold_scores(
    model: Any,
    X: np.ndarray,
    Y: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    score_weights: np.ndarray | None,
    split: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> list[float]:
    """Scores on the held-out part, for every beta."""
    train, test = split
    problem = model._problem(*merge_duplicates(X[train], Y[train], weights[train]), 1.0, seed)
    arguments = model._solver_arguments() | {"verbose": 0}
    trained = copy.copy(model)
    scorer = check_scoring(trained, scoring=model.scoring)
    extra = {} if score_weights is None else {"sample_weight": score_weights[test]}
    scores = []
    for result in path(problem, model.betas_, **arguments):
        trained.network_ = result.network()
        scores.append(float(scorer(trained, X[test], labels[test], **extra)))
    return scores


class ConvexMLPClassifierCV(_PathCV, ConvexMLPClassifier):
    __doc__ = "A :class:`ConvexMLPClassifier` that chooses beta by cross-validation along the path.\n" + _PARAMETERS


class ConvexMLPRegressorCV(_PathCV, ConvexMLPRegressor):
    __doc__ = "A :class:`ConvexMLPRegressor` that chooses beta by cross-validation along the path.\n" + _PARAMETERS
