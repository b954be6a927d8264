"""Two-layer CNNs as scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from cvxnn.errors import InvalidInputError
from cvxnn.estimators.base import ConvexClassifier, ConvexEstimator, ConvexRegressor, plain_array
from cvxnn.problems import cnn_problem
from cvxnn.samples import merge_duplicates
from cvxnn.solvers import solve
from cvxnn.validation import check_positive, read_images

__all__ = ["ConvexCNN", "ConvexCNNClassifier", "ConvexCNNRegressor"]

#: Up to so many pixels images that occur more than once are merged.
_MERGED = 2**25
#: Types in which images are kept as they are; others become the first.
_TYPES = [np.float64, np.float32, np.uint8]


class ConvexCNN(ConvexEstimator):
    """What classifier and regressor share; parameters are documented there."""

    def __init__(
        self,
        activation: str = "gated_relu",
        *,
        filter_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        pooling: Any = (2, 2),
        image_shape: tuple[int, int, int] | None = None,
        scale: float | str | None = "auto",
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
        gate_sampling: str = "kmeans",
        gate_quantile: float | Sequence[float] | None = 0.5,
        norms: tuple[str, str] = ("l2", "l2"),
        features: str = "auto",
        solver_options: dict[str, Any] | None = None,
        dtype: str = "float64",
        random_state: Any = None,
        device: str = "auto",
        verbose: int = 0,
    ) -> None:
        self.activation = activation
        self.filter_size = filter_size
        self.stride = stride
        self.padding = padding
        self.pooling = pooling
        self.image_shape = image_shape
        self.scale = scale
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
        self.features = features
        self.solver_options = solver_options
        self.dtype = dtype
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self.image_shape is not None
        tags.input_tags.three_d_array = True
        return tags

    def _validate(self, X: Any, y: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, channels, H, W) as they are given, and y; sets the shape and the scale."""
        X, y = validate_data(self, plain_array(X, "images"), y, dtype=_TYPES, allow_nd=True, **options)
        images = read_images(X, self.image_shape)
        self.image_shape_ = images.shape[1:]
        self.n_features_in_ = int(np.prod(self.image_shape_))
        if isinstance(self.scale, str):
            if self.scale != "auto":
                raise InvalidInputError(f"scale is {self.scale!r}; 'auto', a positive number or None is wanted")
            self.scale_ = 1 / 255 if images.dtype == np.uint8 else 1.0
        else:
            self.scale_ = 1.0 if self.scale is None else check_positive(self.scale, "scale")
        return images, y

    def _scaled(self, images: np.ndarray) -> np.ndarray:
        kind = "float32" if self.dtype == "float32" else "float64"
        return images.astype(kind) * np.array(self.scale_, dtype=kind)

    def _fit_targets(self, images: np.ndarray, Y: np.ndarray, sample_weight: Any) -> None:
        """Fit to a matrix of targets; images that occur more than once are merged first, where they are few."""
        self._check_loss()
        weights = self._check_weights(sample_weight, Y)
        images = self._scaled(images)
        if images.size <= _MERGED:
            rows, Y, weights = merge_duplicates(images.reshape(len(images), -1).astype(np.float64), Y, weights)
            images = rows.reshape(-1, *self.image_shape_)
        problem = cnn_problem(
            images,
            Y,
            filter_size=self.filter_size,
            stride=self.stride,
            padding=self.padding,
            pooling=self.pooling,
            hidden_bias=self.hidden_bias,
            sample_weight=weights,
            gate_quantile=self.gate_quantile if self.hidden_bias else None,
            features=self.features,
            **self._problem_arguments(),
        )
        self._set_result(solve(problem, **self._solver_arguments()))

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = plain_array(X, "images")
        # The number of columns of rows of pixels is checked here, the shape of images below.
        rows = getattr(X, "ndim", 2) <= 2
        X = validate_data(self, X, dtype=_TYPES, allow_nd=True, ensure_2d=rows, reset=False)
        images = read_images(X, self.image_shape_)
        if images.shape[1:] != self.image_shape_:
            raise InvalidInputError(f"X has images of shape {images.shape[1:]}; {self.image_shape_} is wanted")
        outputs = []
        with torch.no_grad():
            for part in np.array_split(images, -(-len(images) // 1024)):
                batch = torch.from_numpy(self._scaled(part)).to(self.network_.bias.device)
                outputs.append(self.network_(batch).double().cpu().numpy())
        return np.concatenate(outputs)


class ConvexCNNClassifier(ConvexClassifier, ConvexCNN):
    """A two-layer CNN classifier trained to a certified distance from the global optimum.

    Convolution, gates, linear pooling and a fully connected layer (equations (23), (127) and (130)); see
    :func:`cvxnn.cnn_problem`.

    Parameters
    ----------
    activation : {"gated_relu", "linear", "relu"}
    filter_size, stride, padding : int or pair of int
    pooling : pair of int, or array-like of shape (a, K)
        Output grid of an average pooling, or any matrix.
    image_shape : (channels, H, W), optional
        For images that are given as rows, (n, channels * H * W); images (n, H, W) and (n, channels, H, W) have it.
    scale : "auto", float or None
        What pixels are multiplied with: 1 / 255 for bytes and 1 for other numbers with "auto"; None is 1.
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
    gates : array-like of shape (h, P), "enumerate" or None
    gate_sampling : {"gaussian", "differences", "whitened", "kmeans"}
    gate_quantile : float, several, or None
        Not used without a hidden bias.
    norms : pair of {"l1", "l2", "linf"}
    features : {"auto", "cached", "recomputed"}
        Whether the pooled gated patches are kept in memory.
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
    network_ : torch.nn.Module
        Of the scaled images.
    image_shape_ : (channels, H, W)
    scale_ : float
    n_iter_, n_features_in_ : int

    Examples
    --------
    >>> from cvxnn import ConvexCNNClassifier
    >>> from sklearn.datasets import load_digits
    >>> data = load_digits()
    >>> model = ConvexCNNClassifier(n_gates=10, beta=1e-4, tol=1e-3, scale=1 / 16, random_state=0)
    >>> model = model.fit(data.images[:500], data.target[:500])
    >>> bool(model.certificate_.relative_gap <= 1e-3)
    True
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexCNNClassifier:
        """Train on images X, (n, channels, H, W), (n, H, W) or rows, and labels y (n,), numbers or strings."""
        images, y = self._validate(X, y)
        self._fit_targets(images, self._encode(y), sample_weight)
        return self


class ConvexCNNRegressor(ConvexRegressor, ConvexCNN):
    """A two-layer CNN regressor trained to a certified distance from the global optimum.

    Parameters and attributes are those of :class:`ConvexCNNClassifier`, without classes; `loss` is "squared" or
    "huber", and y may have several columns.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexCNNRegressor:
        """Train on images X, (n, channels, H, W), (n, H, W) or rows, and targets y, (n,) or (n, c)."""
        images, y = self._validate(X, y, multi_output=True)
        self._fit_targets(images, self._as_targets(y), sample_weight)
        return self
