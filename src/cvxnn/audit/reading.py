"""From what users have (a torch module, a state dict, matrices, a scikit-learn model) to a :class:`TrainedNetwork`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cvxnn.audit.heads import HEADS_WANTED
from cvxnn.audit.modules import from_module
from cvxnn.audit.weights import TrainedNetwork, as_weights, from_arrays, from_mapping, from_tuple
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.validation import as_matrix, check_choice

__all__ = ["ACTIVATIONS", "Habits", "read_network"]

ACTIVATIONS = ("relu", "linear", "gated_relu")
#: Names of the linear activation elsewhere.
_IDENTITY = "identity"


@dataclass(frozen=True)
class Habits:
    """What a model was trained on, where the model says so.

    Attributes
    ----------
    loss : str
    beta_sum : float or None
        beta for the sum of the losses; that for their mean is beta_sum / n.
    classes : numpy.ndarray or None
        Labels in the order of the outputs; two labels with one output are its targets 0 and 1.
    """

    loss: str = "squared"
    beta_sum: float | None = None
    classes: np.ndarray | None = None


def read_network(
    module: Any, X: Any, n_outputs: int | None, activation: str | None = None, gates: Any = None
) -> tuple[TrainedNetwork, torch.Tensor, Habits]:
    """Read a network, whatever it is given as.

    Parameters
    ----------
    module : torch.nn.Module, mapping, tuple, fitted scikit-learn MLP, or fitted estimator of cvxnn
    X : array-like of shape (n, ...)
        Samples; more than two dimensions are flattened.
    n_outputs : int, optional
        Number of outputs, where it is known from the targets.
    activation : {"relu", "linear", "gated_relu"}, optional
        "relu" by default for weights; a module tells itself.
    gates : array-like of shape (d, m), optional
        For weights with activation "gated_relu": the gate of each neuron.

    Returns
    -------
    (network, X, habits)
        X in float64, (n, d).

    Raises
    ------
    InvalidInputError, UnsupportedError
        With one sentence about what is in the way.
    """
    if activation == _IDENTITY:
        activation = "linear"
    if activation is not None:
        check_choice(activation, "activation", ACTIVATIONS)
    inputs = _inputs(X)
    data = torch.from_numpy(as_matrix(inputs.reshape(len(inputs), -1), "X"))
    module = getattr(module, "network_", module)
    habits = Habits()
    if isinstance(module, nn.Module):
        network = from_module(module, inputs, data, n_outputs, activation)
        if network.own and getattr(module, "sample_dtype", None) == torch.float32:
            # Such a network rounds its samples, before its gates see them.
            data = data.float().double()
    elif _is_sklearn(module):
        network, habits = _from_sklearn(module, data.shape[1])
    elif isinstance(module, (Mapping, tuple, list)):
        network = _from_weights(module, inputs, n_outputs, activation or "relu", gates)
    else:
        raise InvalidInputError(
            f"module is a {type(module).__name__}; a torch.nn.Module, a state dict, a tuple (W1, W2) or "
            "(W1, b1, W2, b2), or a scikit-learn MLPClassifier or MLPRegressor is wanted"
        )
    if activation is not None and network.activation != activation:
        raise InvalidInputError(f"activation is {activation!r}, but the network is {network.activation!r}")
    return network, data, habits


def _from_weights(
    weights: Any, inputs: torch.Tensor, n_outputs: int | None, activation: str, gates: Any
) -> TrainedNetwork:
    """Two layers; weights for sequences that are none may be those of attention, which the error says."""
    n_features = inputs[0].numel()
    try:
        if isinstance(weights, Mapping):
            return from_mapping(weights, n_features, n_outputs, activation, gates)
        return from_tuple(tuple(weights), n_features, n_outputs, activation, gates)
    except (InvalidInputError, UnsupportedError) as error:
        if inputs.ndim != 3:
            raise
        raise type(error)(f"{error}; {HEADS_WANTED}") from error


def _inputs(X: Any) -> torch.Tensor:
    """X as a tensor of its own shape, in float64."""
    if isinstance(X, torch.Tensor):
        found = X.detach().to("cpu", torch.float64) if not X.is_complex() else X
    else:
        array = X.to_numpy() if hasattr(X, "to_numpy") else X
        try:
            found = torch.from_numpy(np.array(array, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"X cannot be read as an array of numbers: {error}") from error
    if found.ndim < 2 or found.numel() == 0 or found.is_complex():
        raise InvalidInputError(
            f"X has shape {tuple(found.shape)}; (n, d) of real numbers, a row per sample, is wanted"
        )
    return found


def _is_sklearn(module: Any) -> bool:
    return hasattr(module, "hidden_layer_sizes") and hasattr(module, "get_params")


def _from_sklearn(model: Any, n_features: int) -> tuple[TrainedNetwork, Habits]:
    """MLPClassifier and MLPRegressor with one hidden layer; alpha/(2 n) ||W||^2 is the penalty with beta = alpha/n."""
    name = type(model).__name__
    if not hasattr(model, "coefs_"):
        raise InvalidInputError(f"module is a {name} that is not fitted; call fit before certify_network")
    if len(model.coefs_) != 2:
        raise UnsupportedError(f"module is a {name} with {len(model.coefs_) - 1} hidden layers; 1 is wanted")
    names = {"relu": "relu", _IDENTITY: "linear"}
    if model.activation not in names:
        raise UnsupportedError(
            f"module is a {name} with activation {model.activation!r}; 'relu' or 'identity' is wanted"
        )
    losses = {"identity": "squared", "logistic": "logistic", "softmax": "cross_entropy"}
    if model.out_activation_ not in losses:
        raise UnsupportedError(
            f"module is a {name} with loss {getattr(model, 'loss', '')!r}; the squared or logarithmic loss is wanted"
        )
    hidden, output = (as_weights(coefs, f"coefs_[{i}]") for i, coefs in enumerate(model.coefs_))
    if len(hidden) != n_features:
        raise InvalidInputError(f"X has {n_features} columns; {len(hidden)}, the inputs of the {name}, are wanted")
    biases = [as_weights(bias, f"intercepts_[{i}]") for i, bias in enumerate(model.intercepts_)]
    network = from_arrays(
        hidden.T.contiguous(), biases[0], output, biases[1], names[model.activation], f"scikit-learn {name}"
    )
    classes = getattr(model, "classes_", None)
    single = isinstance(classes, np.ndarray) and classes.ndim == 1
    return network, Habits(losses[model.out_activation_], float(model.alpha), classes if single else None)
