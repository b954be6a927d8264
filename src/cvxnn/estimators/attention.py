"""Blocks of self-attention as scikit-learn estimators."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from cvxnn.errors import InvalidInputError
from cvxnn.estimators.base import ConvexClassifier, ConvexEstimator, ConvexRegressor, plain_array
from cvxnn.networks import AttentionNetwork
from cvxnn.operators.queries import OUTPUTS
from cvxnn.operators.tokens import TokenMask, read_tokens
from cvxnn.problems import attention_problem
from cvxnn.samples import merge_duplicates
from cvxnn.solvers import Result, solve
from cvxnn.validation import as_array, as_numbers, check_choice, check_flag

__all__ = ["ConvexAttention", "ConvexAttentionClassifier", "ConvexAttentionRegressor"]

#: Up to so many numbers sequences that occur more than once are merged.
_MERGED = 2**25


class ConvexAttention(ConvexEstimator):
    """What classifier and regressor share; parameters are documented there."""

    def __init__(
        self,
        activation: str = "gated_relu",
        *,
        output: str = "mean",
        token_shape: tuple[int, int] | None = None,
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
        norms: tuple[str, str] = ("l2", "l2"),
        solver_options: dict[str, Any] | None = None,
        dtype: str = "float64",
        random_state: Any = None,
        device: str = "auto",
        verbose: int = 0,
    ) -> None:
        self.activation = activation
        self.output = output
        self.token_shape = token_shape
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
        self.norms = norms
        self.solver_options = solver_options
        self.dtype = dtype
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self.token_shape is not None
        tags.input_tags.three_d_array = True
        return tags

    # -- reading ------------------------------------------------------------------------------------------------

    def _validate(self, X: Any, y: Any, mask: Any, **options: Any) -> tuple[np.ndarray, TokenMask, Any]:
        """Tokens (n, s, d), their mask, and y; sets the shape of a sequence."""
        self._check_loss()
        check_choice(self.output, "output", OUTPUTS)
        shape = None if self.token_shape is None else _read_shape(self.token_shape)
        X = plain_array(X, "sequences")
        common: dict[str, Any] = {"dtype": np.float64, "allow_nd": True, "ensure_all_finite": mask is None}
        if self.output == "mean":
            X, y = validate_data(self, X, y, **common, **options)
        else:
            X = validate_data(self, X, **common)
        tokens, found = read_tokens(_sequences(X, shape), mask, "X")
        self.token_shape_ = tokens.shape[1:]
        if shape not in (None, tuple(self.token_shape_)):
            raise InvalidInputError(f"X has sequences of shape {tuple(self.token_shape_)}; token_shape is {shape}")
        self.n_features_in_ = int(np.prod(self.token_shape_))
        self._mask_kind = "" if mask is None else "tokens" if found.pairs is None else "pairs"
        return tokens, found, y

    def _read(self, X: Any, mask: Any) -> tuple[np.ndarray, TokenMask]:
        """New tokens, of any length, and their mask."""
        check_is_fitted(self)
        if mask is None and self._mask_kind == "pairs":
            raise InvalidInputError(
                "mask is None, but the model was trained with a mask of which token sees which; one is wanted"
            )
        X = plain_array(X, "sequences")
        # The number of columns of rows is checked here, the shape of tokens below.
        rows = getattr(X, "ndim", 2) <= 2
        X = validate_data(
            self, X, dtype=np.float64, allow_nd=True, ensure_2d=rows, ensure_all_finite=mask is None, reset=False
        )
        tokens = _sequences(X, self.token_shape_)
        if tokens.ndim == 3 and tokens.shape[2] != self.token_shape_[1]:
            raise InvalidInputError(f"X has tokens of {tokens.shape[2]} features; {self.token_shape_[1]} are wanted")
        return read_tokens(tokens, self._plain_mask(mask, len(tokens), tokens.shape[1]), "X")

    def _plain_mask(self, mask: Any, n: int, s: int) -> Any:
        """A mask of as many sequences as tokens is of the kind that it was in training."""
        if mask is None or np.shape(mask) != (n, s) or n != s or self._mask_kind == "":
            return mask
        array = as_array(mask, "mask")
        return array[None] if self._mask_kind == "pairs" else array[:, :, None] & array[:, None, :]

    # -- training -----------------------------------------------------------------------------------------------

    def _fit_targets(self, tokens: np.ndarray, mask: TokenMask, Y: np.ndarray, sample_weight: Any) -> None:
        """Fit to targets (n, c) or (n, s, c); sequences that occur more than once are merged first, where few."""
        weights = self._check_weights(sample_weight, Y if Y.ndim == 2 else Y.sum(1))
        if check_flag(self.hidden_bias, "hidden_bias"):
            tokens = np.concatenate([tokens, mask.valid.numpy()[:, :, None]], axis=2)
        if tokens.size <= _MERGED:
            tokens, mask, Y, weights = _merged(tokens, mask, Y, weights)
        problem = attention_problem(
            tokens, Y, output=self.output, mask=mask, sample_weight=weights, **self._problem_arguments()
        )
        self._set_result(solve(problem, **self._solver_arguments()))

    def _set_result(self, result: Result) -> None:
        super()._set_result(result)
        # The problem has the ones among its tokens; the network appends them itself.
        assert isinstance(self.network_, AttentionNetwork)
        self.network_.hidden_bias = bool(self.hidden_bias)

    # -- predictions --------------------------------------------------------------------------------------------

    def _rows(self, X: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Outputs (r, c) of sequences, or of valid tokens, and which tokens these are, (n, s)."""
        tokens, found = self._read(X, mask)
        device = self.network_.bias.device
        with torch.no_grad():
            outputs = self.network_(torch.from_numpy(tokens).to(device), found).double().cpu().numpy()
        if self.network_.pooled:
            return outputs, None
        valid = found.valid.numpy()
        return outputs[valid], valid

    def _token_targets(self, y: Any, tokens: np.ndarray, with_outputs: bool) -> np.ndarray:
        """Targets of every token, (n, s), or (n, s, c) where there may be several outputs."""
        if y is None:
            raise InvalidInputError("y is None; targets of every token are wanted")
        array = as_numbers(y, "y") if with_outputs else as_array(y, "y")
        n, s = tokens.shape[:2]
        if array.shape[:2] != (n, s) or array.ndim > 2 + with_outputs:
            more = f" or ({n}, {s}, outputs)" if with_outputs else ""
            raise InvalidInputError(f"y has shape {array.shape}; ({n}, {s}){more}, for every token, is wanted")
        return array


def _read_shape(shape: Any) -> tuple[int, int]:
    pair = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(side, Integral) and int(side) >= 1 for side in pair):
        raise InvalidInputError(f"token_shape is {shape!r}; (tokens, features) is wanted")
    return int(pair[0]), int(pair[1])


def _sequences(X: np.ndarray, shape: tuple[int, int] | None) -> np.ndarray:
    """Rows as sequences of a known shape; anything else as it is."""
    if X.ndim != 2:
        return X
    if shape is None:
        raise InvalidInputError(
            f"X has shape {X.shape}; (n, tokens, features) is wanted, or token_shape=(tokens, features) for sequences "
            "in rows"
        )
    s, d = shape
    if X.shape[1] != s * d:
        raise InvalidInputError(f"X has {X.shape[1]} columns; {s * d}, {d} for each of {s} tokens, are wanted")
    return X.reshape(len(X), s, d)


def _spread(values: np.ndarray, valid: np.ndarray | None, padding: Any) -> np.ndarray:
    """Values (r, ...) of the valid tokens as (n, s, ...), with another one at padding."""
    if valid is None:
        return values
    full = np.full((*valid.shape, *values.shape[1:]), padding, dtype=values.dtype)
    full[valid] = values
    return full


def _token_weights(sample_weight: Any, valid: np.ndarray | None) -> Any:
    """Weights of the valid tokens, from those of sequences."""
    if sample_weight is None or valid is None:
        return sample_weight
    return np.repeat(np.asarray(sample_weight), valid.sum(1))


def _merged(
    tokens: np.ndarray, mask: TokenMask, Y: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, TokenMask, np.ndarray, np.ndarray]:
    """Sequences that are equal in tokens, mask and targets as one."""
    n, s, _ = tokens.shape
    own = mask.pairs is not None and len(mask.pairs) == n > 1
    pairs = mask.pairs.numpy() if own and mask.pairs is not None else np.zeros((n, 0, 0), dtype=bool)
    parts = [tokens.reshape(n, -1), mask.valid.numpy().astype(float), pairs.reshape(n, -1).astype(float)]
    rows, targets, weights = merge_duplicates(np.hstack(parts), Y.reshape(n, -1), weights)
    values, valid, seen = np.split(rows, [tokens[0].size, tokens[0].size + s], axis=1)
    found = TokenMask(
        torch.from_numpy(valid.astype(bool)),
        torch.from_numpy(seen.astype(bool)).view(-1, s, s) if own else mask.pairs,
    )
    return values.reshape(-1, *tokens.shape[1:]), found, targets.reshape(-1, *Y.shape[1:]), weights


class ConvexAttentionClassifier(ConvexClassifier, ConvexAttention):
    """Self-attention as a classifier of sequences or of their tokens, trained to a certified distance from the optimum.

    Multi-head self-attention without softmax (equations (8), (104), (135) and (136)); see
    :func:`cvxnn.attention_problem`.

    Parameters
    ----------
    activation : {"gated_relu", "linear", "relu"}
        What the scores of a head pass: gates, nothing or a ReLU.
    output : {"mean", "tokens"}
        A class per sequence, from the mean over its valid tokens, or one per token.
    token_shape : (s, d), optional
        For sequences that are given as rows, (n, s * d).
    n_gates : int
        Number of gates drawn; equal ones are merged.
    rank : int or None
        For Burer-Monteiro solvers; None for the convex ones.
    beta : float
        Regularisation (weight decay on both matrices of a head), for the mean loss.
    loss : {"squared", "cross_entropy", "huber", "logistic"}
        On one-hot labels.
    solver : str
        See :func:`cvxnn.solve`.
    tol : float
        Relative duality gap at which training ends.
    max_iter, time_limit : optional
        Limits; ending there raises a ``CertificationWarning``.
    hidden_bias : bool
        Append a one to every token, seen by scores, values and gates, and penalised.
    output_bias : bool
        An intercept per output, not penalised.
    gates : array-like of shape (P, d + hidden_bias, d + hidden_bias), "enumerate" or None
    gate_sampling : {"gaussian", "differences", "whitened", "kmeans"}
    norms : pair of {"l1", "l2", "linf"}
    solver_options : dict or None
    dtype : {"float64", "float32"}
    random_state : int, RandomState or None
        Draws the gates.
    device : {"auto", "cpu", "cuda"}
    verbose : {0, 1, 2}

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    certificate_ : Certificate
    result_ : Result
    network_ : cvxnn.networks.AttentionNetwork
    token_shape_ : (s, d)
        In training; new sequences can have another number of tokens.
    n_iter_, n_features_in_ : int

    Examples
    --------
    >>> from cvxnn import ConvexAttentionClassifier
    >>> from sklearn.datasets import load_digits
    >>> data = load_digits()
    >>> tokens = data.images / 16  # 8 tokens of 8 pixels
    >>> model = ConvexAttentionClassifier("linear", beta=1e-3, tol=1e-3).fit(tokens[:500], data.target[:500])
    >>> bool(model.certificate_.relative_gap <= 1e-3)
    True
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> ConvexAttentionClassifier:
        """Train on tokens X (n, s, d), or rows, and labels y, (n,), or (n, s) with output "tokens".

        Parameters
        ----------
        sample_weight : array-like of shape (n,), optional
            Of the sequences.
        mask : array-like of bool, shape (n, s), (s, s) or (n, s, s), optional
            Which tokens are valid, or which see which, as in :func:`cvxnn.attention_problem`.
        """
        tokens, found, y = self._validate(X, y, mask)
        if self.output == "mean":
            Y = self._encode(y)
        else:
            valid = found.valid.numpy()
            Y = _spread(self._encode(self._token_targets(y, tokens, False)[valid]), valid, 0.0)
        self._fit_targets(tokens, found, Y, sample_weight)
        return self

    def predict(self, X: Any, mask: Any = None) -> np.ndarray:
        """Classes, (n,), or (n, s) with output "tokens", where padding has the first class."""
        outputs, valid = self._rows(X, mask)
        return _spread(self._labels(outputs), valid, self.classes_[0])

    def predict_proba(self, X: Any, mask: Any = None) -> np.ndarray:
        """Class probabilities (n, n_classes), or (n, s, n_classes), zeros at padding; see the losses.

        Softmax for cross-entropy, normalised sigmoids for logistic, and otherwise the Euclidean projection of the
        outputs onto the simplex.
        """
        outputs, valid = self._rows(X, mask)
        return _spread(self._probabilities(outputs), valid, 0.0)

    def decision_function(self, X: Any, mask: Any = None) -> np.ndarray:
        """Outputs of the network, (n, n_classes) or (n, s, n_classes); for two classes the second minus the first."""
        outputs, valid = self._rows(X, mask)
        return _spread(self._decisions(outputs), valid, 0.0)

    def score(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> float:
        """The share of sequences, or of valid tokens, that are classified right."""
        outputs, valid = self._rows(X, mask)
        if valid is not None:
            y = self._token_targets(y, valid, False)[valid]
        return float(accuracy_score(y, self._labels(outputs), sample_weight=_token_weights(sample_weight, valid)))


class ConvexAttentionRegressor(ConvexRegressor, ConvexAttention):
    """Self-attention as a regressor of sequences or of their tokens, trained to a certified distance from the optimum.

    Parameters and attributes are those of :class:`ConvexAttentionClassifier`, without classes; `loss` is "squared" or
    "huber". With output "tokens" it denoises, or predicts any sequence from another of the same length.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> ConvexAttentionRegressor:
        """Train on tokens X (n, s, d), or rows, and targets y: (n,) or (n, c); with "tokens" (n, s) or (n, s, c).

        Parameters
        ----------
        sample_weight : array-like of shape (n,), optional
            Of the sequences.
        mask : array-like of bool, shape (n, s), (s, s) or (n, s, s), optional
            Which tokens are valid, or which see which, as in :func:`cvxnn.attention_problem`.
        """
        tokens, found, y = self._validate(X, y, mask, multi_output=True)
        if self.output == "mean":
            Y = self._as_targets(y)
        else:
            targets = self._token_targets(y, tokens, True)
            self._single_output = targets.ndim == 2
            valid = found.valid.numpy()
            Y = np.where(valid[:, :, None], targets.reshape(*valid.shape, -1), 0.0)
        self._fit_targets(tokens, found, Y, sample_weight)
        return self

    def predict(self, X: Any, mask: Any = None) -> np.ndarray:
        """Predictions in the shape of y in training, zeros at padding."""
        outputs, valid = self._rows(X, mask)
        return _spread(self._shaped(outputs), valid, 0.0)

    def score(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> float:
        """R^2 over the sequences, or over the valid tokens."""
        outputs, valid = self._rows(X, mask)
        if valid is not None:
            y = self._token_targets(y, valid, True)[valid]
        return float(r2_score(y, outputs, sample_weight=_token_weights(sample_weight, valid)))
