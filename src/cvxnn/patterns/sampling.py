"""Random gates: Gaussian, differences of samples, whitened samples; with a threshold at a quantile."""

from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from cvxnn.errors import InvalidInputError
from cvxnn.patterns.activation import check_matrix

RandomState = int | np.random.RandomState | np.random.Generator | None
_Matrix = NDArray[np.float64]

_REDRAWS = 20
_SHRINKAGE = 1e-3
_BLOCK_ENTRIES = 1 << 24


def sample_gates(
    X: NDArray[np.floating],
    n_gates: int,
    *,
    method: str = "gaussian",
    quantile: float | None = None,
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
    method : {"gaussian", "differences", "whitened"}
        "gaussian": g ~ N(0, I). "differences": g = x_i - x_j for random pairs of distinct samples.
        "whitened": g = C^(-1) (x_i - mean), to unit length, with the covariance C of the samples, its
        diagonal raised by 0.001 of the mean variance; X g is then an inner product of whitened samples.
        Where all samples are equal, the last two are Gaussian.
    quantile : float in (0, 1), optional
        Each gate is inactive on this fraction of the samples (rounded to whole samples, at least one active
        and one inactive; samples that tie may fall together on either side). Needs ``bias_column=True``.
    bias_column : bool
        The last column of ``X`` is a column of ones. Without a ``quantile``, the hyperplane of "differences"
        goes through the middle of the pair and that of "whitened" through the median.
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
        thresholds = _quantiles(features, gates, 0.5 if quantile is None else float(quantile))
    return np.vstack([gates, -thresholds])


def _check_options(X: _Matrix, n_gates: int, method: str, quantile: float | None, bias_column: bool) -> None:
    if not isinstance(n_gates, Integral) or isinstance(n_gates, bool) or n_gates < 1:
        raise InvalidInputError(f"n_gates is {n_gates!r}; an integer of at least 1 is wanted.")
    if method not in _METHODS:
        raise InvalidInputError(f"method is {method!r}; one of {', '.join(map(repr, _METHODS))} is wanted.")
    if quantile is not None:
        if not isinstance(quantile, Real) or isinstance(quantile, bool) or not 0.0 < float(quantile) < 1.0:
            raise InvalidInputError(f"quantile is {quantile!r}; a number strictly between 0 and 1 is wanted.")
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
    mean = X.mean(axis=0)
    covariance = _covariance(X, mean)
    d = X.shape[1]
    covariance[np.diag_indices(d)] += _SHRINKAGE * np.trace(covariance) / d
    chosen = rng.choice(len(X), size=n_gates, replace=n_gates > len(X))
    gates = np.linalg.solve(covariance, (X[chosen] - mean).T)
    norms = np.linalg.norm(gates, axis=0)
    central = norms == 0.0
    if central.any():
        gates[:, central] = rng.standard_normal((d, int(central.sum())))
        norms = np.linalg.norm(gates, axis=0)
    return gates / norms, None


def _covariance(X: _Matrix, mean: _Matrix) -> _Matrix:
    covariance = np.zeros((X.shape[1], X.shape[1]))
    rows = max(1, _BLOCK_ENTRIES // X.shape[1])
    for i in range(0, len(X), rows):
        centred = X[i : i + rows] - mean
        covariance += centred.T @ centred
    return covariance / len(X)


def _quantiles(X: _Matrix, gates: _Matrix, q: float) -> _Matrix:
    """For each gate a threshold with q n of the values X g below it, halfway to the next value."""
    n = len(X)
    below = min(max(round(q * n), 1), n - 1)
    thresholds = np.empty(gates.shape[1])
    columns = max(1, _BLOCK_ENTRIES // n)
    for k in range(0, gates.shape[1], columns):
        block = slice(k, k + columns)
        values = X @ gates[:, block]
        if n == 1:
            thresholds[block] = values[0] - np.abs(values[0]) - 1.0
            continue
        values.partition([below - 1, below], axis=0)
        thresholds[block] = 0.5 * (values[below - 1] + values[below])
    return thresholds


_METHODS: dict[str, Callable[[_Matrix, int, np.random.Generator], tuple[_Matrix, _Matrix | None]]] = {
    "gaussian": _gaussian,
    "differences": _differences,
    "whitened": _whitened,
}
