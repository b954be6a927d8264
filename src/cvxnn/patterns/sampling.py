"""Random gates: Gaussian, differences of samples, whitened samples or their clusters; thresholds at quantiles."""

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from cvxnn.errors import InvalidInputError
from cvxnn.patterns.activation import check_matrix

RandomState = int | np.random.RandomState | np.random.Generator | None
_Matrix = NDArray[np.float64]

_REDRAWS = 20
_SHRINKAGE = 1e-3
_BLOCK_ENTRIES = 1 << 24
#: Samples that are clustered, and steps of Lloyd's algorithm.
_CLUSTERED = 100_000
_LLOYD_STEPS = 25


def sample_gates(
    X: NDArray[np.floating],
    n_gates: int,
    *,
    method: str = "gaussian",
    quantile: float | Sequence[float] | None = None,
    bias_column: bool = False,
    random_state: RandomState = None,
) -> NDArray[np.float64]:
    """Draw gate vectors at random.

    Parameters
    ----------
    X : array (n, d)
        Samples (or patches) in rows. With ``method="gaussian"`` and no ``quantile`` only d matters.
    n_gates : int
        How many gates to draw.
    method : {"gaussian", "differences", "whitened", "kmeans"}
        "gaussian": g ~ N(0, I). "differences": g = x_i - x_j for random pairs of distinct samples.
        "whitened": g = C^(-1) (x_i - mean), to unit length, with the covariance C of the samples, its
        diagonal raised by 0.001 of the mean variance; X g is then an inner product of whitened samples.
        "kmeans": as "whitened", with the centres of a k-means clustering of the whitened samples (25 steps of
        Lloyd's algorithm, of at most 100,000 of them) in place of samples.
        Where all samples are equal, the last three are Gaussian.
    quantile : float in (0, 1), or several, optional
        Each gate is inactive on this fraction of the samples (rounded to whole samples, at least one active
        and one inactive; samples that tie may fall together on either side). Several are taken in turn, gate by
        gate. Needs ``bias_column=True``.
    bias_column : bool
        The last column of ``X`` is a column of ones. Without a ``quantile``, the hyperplane of "differences"
        goes through the middle of the pair, those of "whitened" and "kmeans" through the median.
    random_state : int, numpy.random.RandomState, numpy.random.Generator or None
        An integer gives the same gates each time; None draws from NumPy's global state, as in scikit-learn.

    Returns
    -------
    gates : array (d, n_gates)
        Gate vectors in columns. Fewer gates drawn with the same seed need not be the first of these.

    Raises
    ------
    InvalidInputError
        A bad argument, or ``quantile`` without a column of ones.

    Notes
    -----
    Sections 2 and 7 of the maths; the latter compares the three kinds on images.
    """
    X = check_matrix("X", X)
    _check_options(X, n_gates, method, quantile, bias_column)
    rng = _generator(random_state)
    if method == "gaussian" and quantile is None:
        return rng.standard_normal((X.shape[1], n_gates))
    features = X[:, :-1] if bias_column else X
    gates, thresholds = _METHODS[method](features, n_gates, rng)
    if not bias_column:
        return gates
    if quantile is not None or thresholds is None:
        thresholds = _quantiles(features, gates, _check_quantiles(0.5 if quantile is None else quantile))
    return np.vstack([gates, -thresholds])


def _check_options(X: _Matrix, n_gates: int, method: str, quantile: Any, bias_column: bool) -> None:
    if not isinstance(n_gates, Integral) or isinstance(n_gates, bool) or n_gates < 1:
        raise InvalidInputError(f"n_gates is {n_gates!r}; an integer of at least 1 is wanted.")
    if method not in _METHODS:
        raise InvalidInputError(f"method is {method!r}; one of {', '.join(map(repr, _METHODS))} is wanted.")
    if quantile is not None:
        _check_quantiles(quantile)
        if not bias_column:
            raise InvalidInputError(
                f"quantile is {quantile!r} and bias_column is False; a threshold needs a column of ones as "
                "the last column of X (hidden_bias) and bias_column=True."
            )
    if bias_column:
        if not (X[:, -1] == 1.0).all():
            raise InvalidInputError("bias_column is True and the last column of X is not a column of ones.")
        if X.shape[1] < 2 and (quantile is not None or method != "gaussian"):
            raise InvalidInputError(
                f"X has only the column of ones; method {method!r} with quantile {quantile!r} needs a feature."
            )


def _check_quantiles(quantile: Any) -> list[float]:
    """A quantile, or several, as a list."""
    several = list(quantile) if isinstance(quantile, (Sequence, np.ndarray)) else [quantile]
    fractions = [isinstance(q, Real) and not isinstance(q, bool) and 0.0 < float(q) < 1.0 for q in several]
    if isinstance(quantile, str) or not fractions or not all(fractions):
        raise InvalidInputError(f"quantile is {quantile!r}; numbers strictly between 0 and 1 are wanted.")
    return [float(q) for q in several]


def _generator(random_state: RandomState) -> np.random.Generator:
    if isinstance(random_state, np.random.Generator):
        return random_state
    try:
        state = check_random_state(random_state)
    except ValueError as error:
        raise InvalidInputError(
            f"random_state is {random_state!r}; None, an integer from 0 to 2^32 - 1, a RandomState or a "
            "Generator is wanted."
        ) from error
    return np.random.default_rng(state.randint(0, 2**31 - 1, size=4))


def _gaussian(X: _Matrix, n_gates: int, rng: np.random.Generator) -> tuple[_Matrix, _Matrix | None]:
    return rng.standard_normal((X.shape[1], n_gates)), None


def _differences(X: _Matrix, n_gates: int, rng: np.random.Generator) -> tuple[_Matrix, _Matrix | None]:
    if np.array_equal(X, np.broadcast_to(X[0], X.shape)):
        return _gaussian(X, n_gates, rng)
    first, second = _draw_pairs(len(X), n_gates, rng)
    for _ in range(_REDRAWS):
        equal = np.flatnonzero((X[first] == X[second]).all(axis=1))
        if equal.size == 0:
            break
        first[equal], second[equal] = _draw_pairs(len(X), equal.size, rng)
    else:
        equal = np.flatnonzero((X[first] == X[second]).all(axis=1))
        rows = np.unique(X, axis=0, return_index=True)[1]
        i, j = _draw_pairs(len(rows), equal.size, rng)
        first[equal], second[equal] = rows[i], rows[j]
    gates = X[first] - X[second]
    middles = 0.5 * (X[first] + X[second])
    return np.ascontiguousarray(gates.T), np.einsum("kd,kd->k", gates, middles)


def _draw_pairs(n: int, size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of indices i != j below n."""
    first = rng.integers(0, n, size=size)
    return first, (first + rng.integers(1, n, size=size)) % n


def _whitened(X: _Matrix, n_gates: int, rng: np.random.Generator) -> tuple[_Matrix, _Matrix | None]:
    if np.array_equal(X, np.broadcast_to(X[0], X.shape)):
        return _gaussian(X, n_gates, rng)
    mean, covariance = _moments(X)
    chosen = rng.choice(len(X), size=n_gates, replace=n_gates > len(X))
    return _unit(np.asarray(np.linalg.solve(covariance, (X[chosen] - mean).T), dtype=np.float64), rng), None


def _kmeans(X: _Matrix, n_gates: int, rng: np.random.Generator) -> tuple[_Matrix, _Matrix | None]:
    if np.array_equal(X, np.broadcast_to(X[0], X.shape)):
        return _gaussian(X, n_gates, rng)
    mean, covariance = _moments(X)
    values, vectors = np.linalg.eigh(covariance)
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    chosen = rng.permutation(len(X))[:_CLUSTERED]
    clusters = KMeans(
        min(n_gates, len(chosen)), init="random", n_init=1, max_iter=_LLOYD_STEPS, random_state=int(rng.integers(2**31))
    )
    with warnings.catch_warnings():
        # Fewer distinct samples than clusters give centres twice, and gates that are merged.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres = clusters.fit((X[chosen] - mean) @ whitening).cluster_centers_
    return _unit(whitening @ np.resize(centres, (n_gates, len(mean))).T, rng), None


def _unit(gates: _Matrix, rng: np.random.Generator) -> _Matrix:
    """Columns of unit length; those that are zero become Gaussian."""
    norms = np.linalg.norm(gates, axis=0)
    central = norms == 0.0
    if central.any():
        gates[:, central] = rng.standard_normal((len(gates), int(central.sum())))
        norms = np.linalg.norm(gates, axis=0)
    return gates / norms


def _moments(X: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Mean and covariance, its diagonal raised by 0.001 of the mean variance."""
    mean = X.mean(axis=0)
    covariance = _covariance(X, mean)
    covariance[np.diag_indices(len(mean))] += _SHRINKAGE * np.trace(covariance) / len(mean)
    return mean, covariance


def _covariance(X: _Matrix, mean: _Matrix) -> _Matrix:
    covariance = np.zeros((X.shape[1], X.shape[1]))
    rows = max(1, _BLOCK_ENTRIES // X.shape[1])
    for i in range(0, len(X), rows):
        centred = X[i : i + rows] - mean
        covariance += centred.T @ centred
    return covariance / len(X)


def _quantiles(X: _Matrix, gates: _Matrix, fractions: Sequence[float]) -> _Matrix:
    """For each gate a threshold with q n of the values X g below it, halfway to the next value; the q in turn."""
    n = len(X)
    thresholds = np.empty(gates.shape[1])
    columns = max(1, _BLOCK_ENTRIES // n)
    for start in range(0, gates.shape[1], columns):
        values = X @ gates[:, start : start + columns]
        for k, column in enumerate(values.T, start=start):
            below = min(max(round(fractions[k % len(fractions)] * n), 1), n - 1)
            if n == 1:
                thresholds[k] = column[0] - np.abs(column[0]) - 1.0
                continue
            ends = np.partition(column, [below - 1, below])[below - 1 : below + 1]
            thresholds[k] = 0.5 * (ends[0] + ends[1])
    return thresholds


_METHODS: dict[str, Callable[[_Matrix, int, np.random.Generator], tuple[_Matrix, _Matrix | None]]] = {
    "gaussian": _gaussian,
    "differences": _differences,
    "whitened": _whitened,
    "kmeans": _kmeans,
}
