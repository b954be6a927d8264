"""A trained classifier as a JSON-able header and arrays, for files."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from cvxnn.files import from_json, to_json
from cvxnn.layerwise.classifier import LayerwiseCNNClassifier
from cvxnn.layerwise.packing import pack_network, unpack_network
from cvxnn.layerwise.results import StageResult

__all__ = ["from_state", "to_state"]

#: Parameters that are not stored: they are about one run.
_OF_A_RUN = ("callbacks", "checkpoint", "resume")


def to_state(model: LayerwiseCNNClassifier) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a fitted classifier; :func:`from_state` restores all but the data.

    Parameters that are objects, such as a ``RandomState``, become None, and those that are about one run
    (`callbacks`, `checkpoint`, `resume`) their defaults.

    Raises
    ------
    sklearn.exceptions.NotFittedError
    TypeError
        Labels that are neither numbers nor strings.
    """
    check_is_fitted(model)
    arrays: dict[str, np.ndarray] = {}
    defaults = LayerwiseCNNClassifier().get_params(deep=False)
    params: dict[str, Any] = {}
    for name, value in model.get_params(deep=False).items():
        given = defaults[name] if name in _OF_A_RUN else value
        try:
            params[name] = to_json(given, arrays, f"params.{name}")
        except TypeError:
            params[name] = None
    classes = model.classes_
    if classes.dtype.kind not in "biufUO" or not all(
        isinstance(label, (bool, int, float, str)) for label in classes.tolist()
    ):
        raise TypeError(f"classes_ has type {classes.dtype}; numbers and strings can be stored")
    header = {
        "params": params,
        "classes": {"type": "object" if classes.dtype.kind == "O" else classes.dtype.str, "labels": classes.tolist()},
        "network": pack_network(model.network_, arrays),
        "stages": [result.to_dict() for result in model.stages_],
        "n_iter": model.n_iter_,
    }
    return header, arrays


def from_state(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> LayerwiseCNNClassifier:
    """The inverse of :func:`to_state`, on the CPU.

    Raises
    ------
    ValueError, KeyError, TypeError
        Not what that function gives.
    """
    params = {name: from_json(value, arrays) for name, value in header["params"].items()}
    model = LayerwiseCNNClassifier(**params)
    network = unpack_network(header["network"], arrays)
    classes = np.array(header["classes"]["labels"], dtype=np.dtype(header["classes"]["type"]))
    results = [StageResult.from_dict(values) for values in header["stages"]]
    last: Any = network.stages[-1]
    if len(results) != len(network.stages) or classes.ndim != 1 or len(classes) != len(last.head.bias):
        raise ValueError(f"its network has {len(network.stages)} stages and {len(last.head.bias)} outputs")
    model.classes_, model.network_, model.stages_ = classes, network, results
    model.certificate_ = results[-1].certificate
    model.image_shape_ = network.image_shape
    model.n_features_in_ = int(np.prod(network.image_shape))
    model.n_iter_ = int(header["n_iter"])
    return model
