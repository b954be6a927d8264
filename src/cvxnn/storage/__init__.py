"""Trained models on disk: safetensors with a JSON header, written whole or not at all, and read without pickle."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from cvxnn.certificates import Certificate
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.estimators import (
    ConvexAttention,
    ConvexAttentionClassifier,
    ConvexAttentionRegressor,
    ConvexCNN,
    ConvexCNNClassifier,
    ConvexCNNRegressor,
    ConvexMLPClassifier,
    ConvexMLPRegressor,
)
from cvxnn.files import from_json, read_tensors, to_json, write_tensors
from cvxnn.layerwise import LayerwiseCNNClassifier, from_state, to_state
from cvxnn.model_selection import ConvexMLPClassifierCV, ConvexMLPRegressorCV
from cvxnn.networks import AttentionNetwork, Network, TwoLayerCNN, TwoLayerNetwork
from cvxnn.storage.networks import (
    NETWORKS,
    check_image_shape,
    check_token_shape,
    pack_network,
    read_field,
    unpack_network,
)
from cvxnn.tables import TablePreprocessor

__all__ = ["load", "save"]

_ESTIMATORS: dict[str, type[BaseEstimator]] = {
    cls.__name__: cls
    for cls in (
        ConvexMLPClassifier,
        ConvexMLPRegressor,
        ConvexMLPClassifierCV,
        ConvexMLPRegressorCV,
        ConvexCNNClassifier,
        ConvexCNNRegressor,
        ConvexAttentionClassifier,
        ConvexAttentionRegressor,
    )
}
_CLASSIFIERS = (ConvexMLPClassifier, ConvexCNNClassifier, ConvexAttentionClassifier)
_REGRESSORS = (ConvexMLPRegressor, ConvexCNNRegressor, ConvexAttentionRegressor)

#: Fitted attributes that are scalars (stored where a model has them), and their types.
_SCALARS: dict[str, type] = {
    "n_features_in_": int,
    "n_iter_": int,
    "status_": str,
    "seconds_": float,
    "beta_": float,
    "_single_output": bool,
    "scale_": float,
    "image_shape_": list,
    "token_shape_": list,
    "_mask_kind": str,
}
#: Fitted attributes that are arrays.
_ARRAYS = ("betas_", "cv_scores_")
_REQUIRED = ("n_features_in_", "n_iter_")
#: The network of an architecture that is not the perceptron, and fitted attributes that its estimators need.
_ARCHITECTURES: dict[type, tuple[type[Network], tuple[str, ...]]] = {
    ConvexCNN: (TwoLayerCNN, ("scale_", "image_shape_")),
    ConvexAttention: (AttentionNetwork, ("token_shape_", "_mask_kind")),
}
_LABEL_TYPE = re.compile(r"\|b1|[|<>][iuf][1248]|[<>]U(\d{1,6})|object")


def save(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a trained model to one file, in one step.

    The file is safetensors with a JSON header; :func:`load` restores predictions, probabilities, the
    certificate and the dual point that proves it. The data and ``result_`` are not stored. Parameters that
    are objects (a ``RandomState``, a splitter, a scoring function) are stored as None.

    Parameters
    ----------
    model : fitted estimator of cvxnn, TwoLayerNetwork, TwoLayerCNN or AttentionNetwork
    path : str or path
        A file that exists is replaced; it survives when writing fails.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InvalidInputError
        Not a model of cvxnn, or not fitted.
    StorageError
        The folder does not exist or cannot be written, or the disk is full; nothing is left behind.

    Examples
    --------
    >>> import cvxnn, tempfile
    >>> model = cvxnn.ConvexMLPClassifier(random_state=0).fit([[0.0], [1.0]], ["no", "yes"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = cvxnn.save(model, f"{folder}/model.safetensors")
    ...     cvxnn.load(file).predict([[0.0], [1.0]]).tolist()
    ['no', 'yes']
    """
    arrays: dict[str, np.ndarray] = {}
    if type(model) in NETWORKS.values():
        header = {"class": type(model).__name__, "network": pack_network(model, arrays)}
    elif type(model) is LayerwiseCNNClassifier:
        header = _pack_layerwise(model, arrays)
    elif isinstance(model, BaseEstimator) and _ESTIMATORS.get(type(model).__name__) is type(model):
        header = _pack_estimator(model, arrays)
    else:
        known = ", ".join([*_ESTIMATORS, LayerwiseCNNClassifier.__name__, *NETWORKS])
        raise InvalidInputError(f"model is a {type(model).__name__}; one of {known} is wanted")
    return write_tensors(path, "model", header, arrays)


def load(path: str | os.PathLike[str]) -> Any:
    """Read a model that :func:`save` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    estimator, TwoLayerNetwork, TwoLayerCNN or AttentionNetwork
        On the CPU, with the same predictions. An estimator has all its attributes but ``result_``, which
        needs the data; of the result there are ``certificate_``, ``dual_``, ``status_`` and ``seconds_``.
        ``dual_``, a torch.Tensor of shape (n, c), is the dual point of the training problem, whose samples
        are those of :func:`cvxnn.samples.merge_duplicates`: merged and reordered. For them, with their
        weights, ``certify(problem, ..., dual=model.dual_)`` repeats the proof, as ``cvxnn certify`` does.

    Raises
    ------
    StorageError
        No such file, not a model of cvxnn, from a newer version, or damaged.
    """
    header, arrays = read_tensors(path, "model")
    try:
        name = read_field(header, "class", str)
        if name in NETWORKS:
            return unpack_network(NETWORKS[name], read_field(header, "network", dict), arrays)
        if name == LayerwiseCNNClassifier.__name__:
            return _unpack_layerwise(read_field(header, "state", dict), arrays)
        if name not in _ESTIMATORS:
            raise ValueError(f"its class is {name!r}, which this version of cvxnn does not have")
        return _unpack_estimator(_ESTIMATORS[name], header, arrays)
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise StorageError(f"{os.fsdecode(path)} holds no model that can be restored: {error}") from error


def _pack_layerwise(model: LayerwiseCNNClassifier, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        state, numbers = to_state(model)
    except NotFittedError as error:
        raise InvalidInputError("model is a LayerwiseCNNClassifier that is not fitted; call fit before save") from error
    except TypeError as error:
        raise InvalidInputError(f"model cannot be stored: {error}") from error
    arrays.update(numbers)
    return {"class": type(model).__name__, "state": state}


def _unpack_layerwise(state: dict[str, Any], arrays: dict[str, np.ndarray]) -> LayerwiseCNNClassifier:
    try:
        return from_state(state, arrays)
    except KeyError as error:
        raise ValueError(f"its field {error} is missing") from error


def _pack_estimator(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if not hasattr(model, "network_"):
        raise InvalidInputError(f"model is a {type(model).__name__} that is not fitted; call fit before save")
    facts = _result_facts(model)
    if facts["dual_"] is not None:
        arrays["dual_"] = facts["dual_"].detach().cpu().numpy()
    arrays.update({name: np.asarray(getattr(model, name)) for name in _ARRAYS if hasattr(model, name)})
    names = getattr(model, "feature_names_in_", None)
    preprocessor = getattr(model, "preprocessor_", None)
    return {
        "class": type(model).__name__,
        "network": pack_network(model.network_, arrays),
        "parameters": _pack_parameters(model, arrays),
        "fitted": {name: to_json(value, arrays, name) for name, value in _scalars(model, facts)},
        "classes": _pack_labels(model.classes_) if hasattr(model, "classes_") else None,
        "feature_names": None if names is None else [str(name) for name in names],
        "certificate": to_json(_certificate_fields(model.certificate_), arrays, "certificate"),
        "preprocessing": None if preprocessor is None else _pack_preprocessor(preprocessor, arrays),
    }


def _scalars(model: Any, facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, kind in _SCALARS.items():
        if name in facts or hasattr(model, name):
            value: Any = facts.get(name, getattr(model, name, None))
            yield name, list(value) if kind is list else value


def _result_facts(model: Any) -> dict[str, Any]:
    """What is kept of ``result_``; a model that was loaded has it as attributes."""
    result = getattr(model, "result_", None)
    if result is not None:
        return {"dual_": result.dual, "status_": result.status, "seconds_": result.seconds}
    known = {name: getattr(model, name) for name in ("status_", "seconds_") if hasattr(model, name)}
    return {"dual_": getattr(model, "dual_", None), **known}


def _unpack_estimator(cls: type[BaseEstimator], header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    model: Any = cls(**_unpack_parameters(cls, read_field(header, "parameters", dict), arrays))
    known = [found for base, found in _ARCHITECTURES.items() if issubclass(cls, base)]
    kind, needed = known[0] if known else (TwoLayerNetwork, ())
    model.network_ = unpack_network(kind, read_field(header, "network", dict), arrays)
    fitted = read_field(header, "fitted", dict)
    required = {*_REQUIRED, *(["_single_output"] if issubclass(cls, _REGRESSORS) else [])}
    required |= set(needed)
    for name, wanted in _SCALARS.items():
        if name in fitted or name in required:
            value = read_field(fitted, name, wanted)
            setattr(model, name, tuple(value) if wanted is list else value)
    for name in _ARRAYS:
        if name in arrays:
            setattr(model, name, arrays[name])
    if issubclass(cls, _CLASSIFIERS):
        model.classes_ = _unpack_labels(read_field(header, "classes", dict))
    names = read_field(header, "feature_names", (list, type(None)))
    if names is not None:
        model.feature_names_in_ = np.array(names, dtype=object)
    model.certificate_ = _unpack_certificate(from_json(read_field(header, "certificate", dict), arrays))
    if "dual_" in arrays:
        model.dual_ = torch.from_numpy(arrays["dual_"])
    preprocessing = read_field(header, "preprocessing", (dict, type(None)))
    if preprocessing is not None:
        model.preprocessor_ = TablePreprocessor.from_dict(from_json(preprocessing, arrays))
    _check_estimator(model, names)
    return model


def _check_estimator(model: Any, names: list[Any] | None) -> None:
    """Refuse a header whose parts do not belong together."""
    network = model.network_
    n_features = len(network.hidden) - network.hidden_bias
    if isinstance(model, ConvexCNN):
        check_image_shape(network, model.image_shape_)
        n_features = math.prod(model.image_shape_)
    if isinstance(model, ConvexAttention):
        check_token_shape(network, model.token_shape_)
        n_features = math.prod(model.token_shape_)
    if model.n_features_in_ != n_features:
        raise ValueError(f"its n_features_in_ is {model.n_features_in_}; its network has {n_features} inputs")
    if names is not None and (len(names) != n_features or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"its feature names are {str(names)[:60]}; {n_features} strings are wanted")
    n_outputs = len(network.bias)
    if hasattr(model, "classes_") and len(model.classes_) != n_outputs:
        raise ValueError(f"it has {len(model.classes_)} classes; its network has {n_outputs} outputs")


def _pack_preprocessor(preprocessor: TablePreprocessor, arrays: dict[str, np.ndarray]) -> Any:
    try:
        return to_json(preprocessor.to_dict(), arrays, "preprocessing")
    except TypeError as error:
        raise InvalidInputError(f"model has a preprocessor_ that cannot be stored: {error}") from error


def _pack_parameters(model: BaseEstimator, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    parameters = {}
    for name, value in model.get_params(deep=False).items():
        found: dict[str, np.ndarray] = {}
        try:
            parameters[name] = to_json(value, found, f"parameters.{name}")
        except TypeError:
            parameters[name] = None
        else:
            arrays.update(found)
    return parameters


def _unpack_parameters(
    cls: type[BaseEstimator], parameters: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    unknown = sorted(set(parameters) - set(cls().get_params(deep=False)))
    if unknown:
        raise ValueError(f"its parameter {unknown[0]!r} is unknown to this version of cvxnn")
    return {name: from_json(value, arrays) for name, value in parameters.items()}


def _pack_labels(labels: np.ndarray) -> dict[str, Any]:
    name = "object" if labels.dtype == object else labels.dtype.str
    values = labels.tolist()
    if not _LABEL_TYPE.fullmatch(name) or not all(isinstance(value, (bool, int, float, str)) for value in values):
        raise InvalidInputError(f"classes_ are of type {labels.dtype}; numbers, booleans or strings can be stored")
    return {"dtype": name, "values": values}


def _unpack_labels(fields: dict[str, Any]) -> np.ndarray:
    name, values = read_field(fields, "dtype", str), read_field(fields, "values", list)
    if not _LABEL_TYPE.fullmatch(name):
        raise ValueError(f"its labels are of type {name!r}; numbers, booleans or strings are wanted")
    if not all(isinstance(value, (bool, int, float, str)) for value in values):
        raise ValueError("its labels are neither numbers nor strings")
    labels = np.array(values, dtype=np.dtype(name))
    if labels.tolist() != values:
        raise ValueError(f"its labels do not fit into the type {name!r}")
    return labels


def _certificate_fields(certificate: Certificate) -> dict[str, Any]:
    return {field.name: getattr(certificate, field.name) for field in dataclasses.fields(certificate)}


_CERTIFICATE_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float,),
    "float | None": (float, type(None)),
    "str": (str,),
    "tuple[float, ...]": (tuple,),
}


def _unpack_certificate(fields: Any) -> Certificate:
    if not isinstance(fields, dict):
        raise ValueError("its certificate is no dictionary")
    fields = {"infeasibility": 0.0} | fields
    for field in dataclasses.fields(Certificate):
        if field.type in _CERTIFICATE_TYPES:
            read_field(fields, field.name, _CERTIFICATE_TYPES[str(field.type)])
    if not all(isinstance(ratio, float) for ratio in fields["gate_ratios"]):
        raise ValueError("its certificate has gate_ratios that are no numbers")
    return Certificate(**fields)
