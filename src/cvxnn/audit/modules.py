"""Two-layer networks found in torch modules by their structure, and checked against the module's own outputs."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cvxnn.audit.weights import TrainedNetwork, as_weights, from_arrays, place_weights
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.networks import TwoLayerNetwork

__all__ = ["PROBES", "from_module", "module_outputs"]

#: Largest difference of outputs, relative to their size, that counts as rounding: in float64 and in float32.
_TOLERANCE, _SINGLE_TOLERANCE = 1e-9, 1e-3
#: Multiples of the data on which outputs are compared.
PROBES = (1.0, -1.0, 1e3, -1e3)
_ACTIVATIONS = ("relu", "linear")


def from_module(
    module: nn.Module, inputs: torch.Tensor, X: torch.Tensor, n_outputs: int | None, activation: str | None
) -> TrainedNetwork:
    """The two linear layers of a module and the activation between them.

    Parameters
    ----------
    module : torch.nn.Module
        It is copied; neither its weights nor its mode are touched.
    inputs : torch.Tensor of shape (n, ...)
        What the module is to be called with.
    X : torch.Tensor of shape (n, d), float64
        The same, flattened.
    n_outputs : int, optional
    activation : {"relu", "linear"}, optional
        Found by comparing outputs where none is given.

    Raises
    ------
    UnsupportedError
        Other layers, or outputs that are not those of two linear layers with one of the activations.
    InvalidInputError
        Weights that are not finite, or of other sizes than the data.
    """
    if isinstance(module, TwoLayerNetwork):
        return _own_network(module, X.shape[1])
    layers = _two_linear_layers(module)
    weights = [as_weights(layer.weight, f"the weight of {name!r}") for name, layer in layers]
    biases = [None if layer.bias is None else as_weights(layer.bias, f"the bias of {name!r}") for name, layer in layers]
    # Layers can be registered in either order.
    orders = [(i, 1 - i) for i in (0, 1) if _fit(weights[i], weights[1 - i], X.shape[1], n_outputs)]
    if not orders:
        place_weights(weights[0], weights[1], X.shape[1], n_outputs)
    source = f"torch {type(module).__name__}"
    tried = _ACTIVATIONS if activation is None else (activation,)
    networks = [
        from_arrays(weights[i], biases[i], weights[j].T.contiguous(), biases[j], name, source)
        for name in tried
        for i, j in orders
    ]
    return _matching(module, inputs, X, networks)


def _fit(first: torch.Tensor, second: torch.Tensor, n_features: int, n_outputs: int | None) -> bool:
    """Whether two matrices of nn.Linear follow each other."""
    return (
        first.shape[1] == n_features
        and len(first) == second.shape[1]
        and (n_outputs is None or len(second) == n_outputs)
    )


def _own_network(module: TwoLayerNetwork, n_features: int) -> TrainedNetwork:
    rows = as_weights(module.hidden, "hidden").T.contiguous()
    wanted = rows.shape[1] - bool(module.hidden_bias)
    if wanted != n_features:
        raise InvalidInputError(f"X has {n_features} columns; {wanted}, the inputs of the network, are wanted")
    gates, index = module.gates, module.gate_index
    activation = "linear" if gates is None else "gated_relu"
    return TrainedNetwork(
        activation="relu" if getattr(module, "relu", False) else activation,
        hidden=rows[:, :n_features].contiguous(),
        output=as_weights(module.output, "output"),
        hidden_bias=rows[:, -1].clone() if module.hidden_bias else None,
        # These networks always have the parameter; zeros stand for none.
        output_bias=as_weights(module.bias, "bias") if bool(module.bias.any()) else None,
        gates=None if gates is None else as_weights(gates, "gates"),
        gate_index=None if index is None else index.cpu().clone(),
        source="TwoLayerNetwork",
        own=True,
    )


def _two_linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and layers; anything else with weights is refused by name."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    owned = {id(part) for _, layer in layers for part in (layer.weight, layer.bias) if part is not None}
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase):
            raise UnsupportedError(
                f"module has a {type(layer).__name__} ({name!r}), whose scale escapes the weight decay; a network of "
                "two linear layers is wanted"
            )
        if any(torch.nn.parameter.is_lazy(part) for part in layer.parameters(recurse=False)):
            raise InvalidInputError(f"module has a lazy layer ({name!r}) without values yet; call it on the data once")
        if hasattr(layer, "parametrizations") or getattr(layer, "_forward_pre_hooks", None):
            raise UnsupportedError(
                f"module has a parametrised weight or a hook in {name!r}; weight decay acts on other numbers than "
                "the weights there, and plain nn.Linear layers are wanted"
            )
        if not isinstance(layer, nn.Linear) and any(True for _ in layer.parameters(recurse=False)):
            raise UnsupportedError(
                f"module has a {type(layer).__name__} with weights of its own ({name!r}); a network of two nn.Linear "
                "is wanted, or give the weights as a tuple (W1, b1, W2, b2)"
            )
    if len(layers) != 2:
        raise UnsupportedError(f"module has {len(layers)} nn.Linear layers; a two-layer network has 2")
    if len(owned) != sum(1 + (layer.bias is not None) for _, layer in layers):
        raise UnsupportedError("module shares weights between its two layers; layers with their own weights are wanted")
    return layers


def _matching(
    module: nn.Module, inputs: torch.Tensor, X: torch.Tensor, networks: list[TrainedNetwork]
) -> TrainedNetwork:
    """The network whose outputs are those of the module, on the data and on multiples of them.

    On the data alone ReLU and no activation can agree: where all neurons are active.
    """
    cases = [(factor * X, *module_outputs(module, factor * inputs)) for factor in PROBES]
    worst = []
    for network in networks:
        off = max(_difference(network, *case) for case in cases)
        if off <= 1:
            return network
        worst.append(f"{network.activation} (off by {_difference(network, *cases[0]) * cases[0][2]:.1e})")
    raise UnsupportedError(
        "module gives other outputs than two linear layers with the activation "
        + " or ".join(dict.fromkeys(worst))
        + "; other activations, a softmax or sigmoid at the end, skip connections and scaled inputs are not covered"
    )


def _difference(network: TrainedNetwork, X: torch.Tensor, outputs: torch.Tensor, tolerance: float) -> float:
    """Largest difference between the outputs of a module and of a network, in units of what rounding allows."""
    expected = network.forward(X)
    seen = outputs.reshape(len(X), -1) if outputs.ndim == 1 else outputs
    if seen.shape != expected.shape:
        raise UnsupportedError(
            f"module gives outputs of shape {tuple(outputs.shape)}; {tuple(expected.shape)}, a row per sample, is "
            "wanted"
        )
    scale = max(float(expected.abs().max()), _size(network, X))
    difference = float((seen - expected).abs().max())
    if difference == 0:
        return 0.0
    allowed = tolerance * scale
    return difference / allowed if math.isfinite(difference) and allowed > 0 else math.inf


def _size(network: TrainedNetwork, X: torch.Tensor) -> float:
    """A size of the terms that the outputs are sums of, to which rounding is relative."""
    hidden = network.hidden.abs().sum(1) * X.abs().max()
    if network.hidden_bias is not None:
        hidden = hidden + network.hidden_bias.abs()
    return float((hidden @ network.output.abs()).max()) if len(hidden) else 0.0


def module_outputs(module: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Outputs in evaluation mode in float64, or in the module's own type where it insists on that."""
    try:
        twin = copy.deepcopy(module).cpu().eval()
    except Exception as error:
        raise UnsupportedError(f"module cannot be copied ({error}); give its weights (W1, b1, W2, b2)") from error
    dtype = next(twin.parameters()).dtype
    reason: Any = None
    for kind, tolerance in ((torch.float64, _TOLERANCE), (dtype, _tolerance(dtype))):
        try:
            with torch.no_grad():
                outputs = twin.to(kind)(inputs.to(kind))
        except Exception as error:
            reason = error
            continue
        if not isinstance(outputs, torch.Tensor):
            raise UnsupportedError(f"module returns a {type(outputs).__name__}; a tensor of outputs is wanted")
        if outputs.dtype != torch.float64:
            tolerance = max(tolerance, _tolerance(outputs.dtype))
        return outputs.double(), tolerance
    raise InvalidInputError(f"module cannot be called with X of shape {tuple(inputs.shape)}: {reason}")


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return _TOLERANCE
    return _SINGLE_TOLERANCE if dtype == torch.float32 else 5e-2
