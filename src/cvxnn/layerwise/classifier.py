"""The scikit-learn estimator of layerwise training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from cvxnn.certificates import Certificate
from cvxnn.distributed import common_seed, current_group, sample_group
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.estimators import project_to_simplex
from cvxnn.gates import GATE_SAMPLING
from cvxnn.layerwise.checkpoint import RunFolder, run_fingerprint
from cvxnn.layerwise.fitting import LayerwiseRun, Samples
from cvxnn.layerwise.inputs import read_labels, read_pixels, read_validation
from cvxnn.layerwise.network import LayerwiseNetwork, Standardizer, outputs_in_batches
from cvxnn.layerwise.options import PRECISIONS, read_sgd, read_stages, with_gaps
from cvxnn.layerwise.results import StageResult
from cvxnn.losses import get_loss
from cvxnn.validation import (
    check_choice,
    check_flag,
    check_positive,
    resolve_device,
    without_copy,
)

__all__ = ["LayerwiseCNNClassifier"]


class LayerwiseCNNClassifier(ClassifierMixin, BaseEstimator):
    """A deep image classifier trained stage after stage, each stage with a certificate.

    A stage is a two-layer gated CNN: convolution, gate, average pooling, linear layer. It is trained, its gated
    convolution is kept as the feature map of the next stage, and its head is kept for :meth:`staged_predict`
    (Belilovsky, Eickenberg, Oyallon 2019; Appendix C.2 of the paper). Given the stages before it, the problem of a
    stage is convex, and its certificate says how far its objective is, at most, from the best possible one.

    Where one entry per stage is wanted, give a list. Tuples of numbers do too, but for `filter_size`, `stride`,
    `padding` and `pooling`, where a tuple of two integers is height and width, and for `gate_quantile`.

    Parameters
    ----------
    n_stages : int
    n_gates : int or one per stage
        Draws of gates P.
    rank : int or one per stage
        Columns m per gate, for "sgd".
    filter_size, stride, padding, pooling : int, pair, or a list with one per stage
        As for :func:`cvxnn.cnn_problem`. Pooling is that of the heads; stages see the whole maps.
    downsample : sequence of int
        Numbers of the stages, from 1, whose images are pixel-unshuffled by 2 first (invertible downsampling).
    double_gates : bool
        Whether P doubles from each of these stages on. The paper does not say; here it does not.
    method : {"sgd", "convex"} or one per stage
        Momentum SGD on the factors (126), or :func:`cvxnn.solve` on the convex form (23).
    width : int, None or one per stage
        Channels that the next stage sees: the columns with the largest ||u|| ||v||; None keeps all.
    loss : {"cross_entropy", "squared", "huber", "logistic"}, None or one per stage
        None is cross-entropy for "sgd" and the squared loss for "convex".
    beta : float or one per stage
        Weight decay on the factors, for the mean loss.
    tol, max_iter : float, int or one per stage
        Relative gap that the convex solver is to reach, and its limit.
    epochs, batch_size, step, momentum, decay, decay_every
        Of SGD: the step is multiplied by `decay` every `decay_every` epochs. `step` and `epochs` may be given per
        stage; by default steps are 0.1 in the first stage and 0.01 later.
    augment : {None, "flip", "crop", "crop_flip"}
        Random changes of the images in SGD, crops after padding by 4 black pixels. Certificates are for the images
        as they are.
    hidden_bias, output_bias : bool
    gate_sampling : {"whitened", "gaussian", "differences", ...} or one per stage
    gate_quantile : float, None or "auto", or a list with one per stage
        "auto" is 0.7 with hidden biases and None without.
    normalize : "auto", bool or one per stage
        Whether filters are scaled so that the channels that the next stage sees have unit mean square; "auto" does
        so after convex stages.
    scale : float or "auto"
        Factor of the pixels; "auto" is 1/255 for 8-bit ones and 1 for others.
    map_pooling : None, int or (size, stride), or a list with one per stage
        Average pooling of the maps of a stage before the next stage sees them.
    mirror : bool
        Each sample is an image with its mirror image, one above the other: all filters see both, and they are pooled
        together, so that the outputs do not depend on which is which.
    standardize : bool or "image"
        Subtract the mean of each channel and divide by its standard deviation (True), or do so with each image, all
        channels together ("image"; 0.05 is added to its standard deviation).
    precision : {"float32", "float64", "mixed"}
        Of training; "mixed" convolves in bfloat16. Certificates are computed in float64.
    maps : {"auto", "cached", "recomputed"}
        Whether the images of later stages are kept in memory; "auto" keeps up to 2 GiB.
    features : {"auto", "cached", "convolved"}
        Whether SGD and convex solvers work on pooled gated patches that are formed once, where there is no
        augmentation. "auto" does so where they take at most half of the free memory, together with the matrices
        of convex solvers.
    certify : bool
        Certificates after stages trained by SGD, in passes over all samples.
    checkpoint : path or None
        A folder, written after every epoch and stage.
    resume : bool
        Go on from `checkpoint`, to the same result; also with more stages than there were.
    callbacks : sequence of callables
        Each is called with the newest entry of the trace; a true return value ends training.
    random_state : int, RandomState or None
    device : {"auto", "cpu", "cuda"}
    verbose : int
        1 writes a line per epoch on standard error.

    Attributes
    ----------
    stages_ : list of StageResult
        Certificate, status, trace, sizes and time of every stage.
    certificate_ : Certificate or None
        That of the last stage.
    network_ : LayerwiseNetwork
    classes_ : ndarray of shape (n_classes,)
    image_shape_ : tuple of int
    n_iter_ : int
        Epochs or iterations of all stages.

    Examples
    --------
    >>> from cvxnn.layerwise import LayerwiseCNNClassifier
    >>> from sklearn.datasets import load_digits
    >>> data = load_digits()
    >>> X, y = data.images[:300] / 16, data.target[:300]
    >>> model = LayerwiseCNNClassifier(2, n_gates=8, width=8, method="convex", tol=1e-2, random_state=0)
    >>> model.fit(X, y).score(X, y) > 0.9
    True
    """

    def __init__(
        self,
        n_stages: int = 3,
        *,
        n_gates: Any = 256,
        rank: Any = 1,
        filter_size: Any = 3,
        stride: Any = 1,
        padding: Any = 1,
        pooling: Any = (2, 2),
        downsample: Sequence[int] = (),
        double_gates: bool = False,
        method: Any = "sgd",
        width: Any = None,
        loss: Any = None,
        beta: Any = 5e-4,
        tol: Any = 1e-3,
        max_iter: Any = None,
        epochs: Any = 50,
        batch_size: int = 128,
        step: Any = None,
        momentum: float = 0.9,
        decay: float = 0.2,
        decay_every: int = 15,
        augment: str | None = None,
        hidden_bias: bool = True,
        output_bias: bool = True,
        gate_sampling: Any = "whitened",
        gate_quantile: Any = "auto",
        normalize: Any = "auto",
        map_pooling: Any = None,
        mirror: bool = False,
        scale: float | str = "auto",
        standardize: bool | str = True,
        precision: str = "float32",
        maps: str = "auto",
        features: str = "auto",
        certify: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
        random_state: Any = None,
        device: str = "auto",
        verbose: int = 0,
    ) -> None:
        self.n_stages = n_stages
        self.n_gates = n_gates
        self.rank = rank
        self.filter_size = filter_size
        self.stride = stride
        self.padding = padding
        self.pooling = pooling
        self.downsample = downsample
        self.double_gates = double_gates
        self.method = method
        self.width = width
        self.loss = loss
        self.beta = beta
        self.tol = tol
        self.max_iter = max_iter
        self.epochs = epochs
        self.batch_size = batch_size
        self.step = step
        self.momentum = momentum
        self.decay = decay
        self.decay_every = decay_every
        self.augment = augment
        self.hidden_bias = hidden_bias
        self.output_bias = output_bias
        self.gate_sampling = gate_sampling
        self.gate_quantile = gate_quantile
        self.normalize = normalize
        self.map_pooling = map_pooling
        self.mirror = mirror
        self.scale = scale
        self.standardize = standardize
        self.precision = precision
        self.maps = maps
        self.features = features
        self.certify = certify
        self.checkpoint = checkpoint
        self.resume = resume
        self.callbacks = callbacks
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any, validation: tuple[Any, Any] | None = None) -> LayerwiseCNNClassifier:
        """Train all stages.

        Parameters
        ----------
        X : array-like of shape (n, C, H, W) or (n, H, W)
            Pixels, 8-bit or floating.
        y : array-like of shape (n,)
            Labels of any kind.
        validation : pair (X, y), optional
            Images and labels whose accuracy is followed; training does not depend on them.

        Raises
        ------
        InvalidInputError
            A wrong parameter, shape or label; NaN or infinities.
        StorageError
            A checkpoint that is damaged, belongs to another run, or cannot be written.

        Notes
        -----
        Ctrl-C ends training with the epochs that were finished; the status of that stage is "interrupted", and
        there is no certificate for it. Before the first epoch it raises KeyboardInterrupt.

        Within :func:`cvxnn.distributed.start` each process keeps the images of its share of the samples, X read in
        passes (so that a memory map need not fit), and all of them end with the same network.
        """
        stages = read_stages(self.get_params(deep=False))
        sgd = read_sgd(self.get_params(deep=False))
        for stage in stages:
            get_loss(stage.loss)
            check_choice(stage.gate_sampling, "gate_sampling", GATE_SAMPLING)
        check_choice(self.precision, "precision", PRECISIONS)
        if self.standardize != "image":
            check_flag(self.standardize, "standardize")
        standardize = "image" if self.standardize == "image" else bool(self.standardize)
        if not isinstance(self.callbacks, Iterable) or not all(callable(each) for each in self.callbacks):
            raise InvalidInputError(
                "callbacks holds something that cannot be called; a sequence of functions is wanted"
            )
        if check_flag(self.resume, "resume") and self.checkpoint is None:
            raise InvalidInputError("resume=True needs the path of a checkpoint")
        if current_group() is not sample_group():
            raise UnsupportedError(
                "the gates are shared out to several processes; shard='samples' is wanted for stages"
            )
        device = resolve_device(self.device)
        images = read_pixels(X, "X")
        classes, labels = read_labels(y, len(images), "y")
        if len(classes) < 2:
            raise InvalidInputError(f"y has only one class, {classes.tolist()}; at least two classes are wanted")
        checked = read_validation(validation, images.shape[1:], classes)
        stages = with_gaps(stages, images.shape[1:], len(classes))
        scale = self._scale(images)
        folder, seed = self._folder(stages, asdict(sgd), images, labels, scale)

        dtype = torch.float64 if self.precision == "float64" else torch.float32
        raw = without_copy(images)
        standardizer = Standardizer.of(raw, scale, standardize, dtype, bool(self.mirror))
        gap = stages[0].gap * (2 if stages[0].downsample else 1)
        train = Samples.of(raw, labels, standardizer, device, gap)
        bad = not all(bool(torch.isfinite(part).all()) for part in (standardizer.deviation, train.images))
        if bad if train.group is None else train.group.any(bad):
            raise InvalidInputError("X has numbers that are too large; rescale it")
        held = None
        if checked is not None:
            held = Samples.of(without_copy(checked[0]), checked[1], standardizer, device, gap, "validation")
        run = LayerwiseRun(
            stages,
            sgd,
            train,
            held,
            len(classes),
            standardizer.to(device),
            seed,
            self.maps,
            self.precision == "mixed",
            check_flag(self.certify, "certify"),
            folder,
            tuple(self.callbacks),
            int(self.verbose),
        )
        run.run()
        self.classes_ = classes
        self.image_shape_ = tuple(images.shape[1:])
        self.n_features_in_ = int(np.prod(self.image_shape_))
        self.stages_: list[StageResult] = run.results
        self.certificate_: Certificate | None = run.results[-1].certificate
        self.network_ = LayerwiseNetwork(standardizer, run.trained, self.image_shape_)
        self.n_iter_ = sum(len(result.trace) for result in run.results)
        return self

    def _scale(self, images: np.ndarray) -> float:
        if isinstance(self.scale, str):
            check_choice(self.scale, "scale", ("auto",))
            return 1 / 255 if images.dtype == np.uint8 else 1.0
        return check_positive(self.scale, "scale")

    def _folder(
        self, stages: list[Any], sgd: dict[str, Any], images: np.ndarray, labels: np.ndarray, scale: float
    ) -> tuple[RunFolder | None, int]:
        """The folder of checkpoints, and the seed: that of the run that is resumed, where none is given."""
        given = isinstance(self.random_state, (int, np.integer))
        try:
            seed = int(check_random_state(common_seed(self.random_state)).randint(2**31))
        except ValueError as error:
            raise InvalidInputError(
                f"random_state is {self.random_state!r}; None, an integer from 0 to 2^32 - 1 or a RandomState is wanted"
            ) from error
        if self.checkpoint is None:
            return None, seed
        facts = [scale, self.standardize, self.mirror, self.precision, self.maps, sgd, seed if given else None]
        prints = [run_fingerprint([], [part, part.gap] if part.gap else [part]) for part in stages]
        data = run_fingerprint([images, labels], facts)
        chain = [run_fingerprint([], [data, *prints[: i + 1]]) for i in range(len(stages))]
        folder = RunFolder(self.checkpoint, chain, sample_group())
        if not self.resume:
            folder.clear()
            return folder, seed
        found = folder.seed()
        return folder, seed if found is None else found

    def _outputs(self, X: Any, wanted: list[int] | None = None) -> list[np.ndarray]:
        check_is_fitted(self)
        images = without_copy(read_pixels(X, "X"))
        if tuple(images.shape[1:]) != self.image_shape_:
            raise InvalidInputError(
                f"X has images of shape {tuple(images.shape[1:])}; {self.image_shape_}, as in training, is wanted"
            )
        return [part.numpy() for part in outputs_in_batches(self.network_, images, wanted)]

    @property
    def _last(self) -> list[int]:
        check_is_fitted(self)
        return [len(self.network_.stages) - 1]

    def decision_function(self, X: Any) -> np.ndarray:
        """Outputs of the network: (n, n_classes), or for two classes (n,), positive for the second."""
        outputs = self._outputs(X, self._last)[0]
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities (n, n_classes), by the loss of the last stage.

        Softmax for cross-entropy, normalised sigmoids for logistic, and otherwise the Euclidean projection of the
        outputs onto the simplex.
        """
        outputs = self._outputs(X, self._last)[0]
        loss = self.stages_[-1].loss
        if loss == "cross_entropy":
            return torch.softmax(torch.from_numpy(outputs), dim=1).numpy()
        if loss == "logistic":
            return torch.softmax(torch.nn.functional.logsigmoid(torch.from_numpy(outputs)), dim=1).numpy()
        return project_to_simplex(outputs)

    def predict(self, X: Any) -> np.ndarray:
        """The class with the largest output, for each sample."""
        outputs = self._outputs(X, self._last)[0]
        return self.classes_[outputs.argmax(axis=1)]

    def staged_predict(self, X: Any) -> list[np.ndarray]:
        """Predictions of the head of every stage, from one pass."""
        staged = self._outputs(X)
        return [self.classes_[outputs.argmax(axis=1)] for outputs in staged]

    def staged_score(self, X: Any, y: Any) -> list[float]:
        """Accuracy of the head of every stage."""
        y = np.asarray(y)
        return [float((predicted == y).mean()) for predicted in self.staged_predict(X)]
