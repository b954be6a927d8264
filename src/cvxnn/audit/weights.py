"""A trained two-layer network as arrays, read from weight matrices, state dicts and mappings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvxnn.errors import InvalidInputError, UnsupportedError

__all__ = ["TrainedNetwork", "as_weights", "from_arrays", "from_mapping", "from_tuple", "place_weights"]

#: Entries of a checkpoint under which its weights may be.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
#: Names that the tensors of a :class:`cvxnn.networks.TwoLayerNetwork` have.
_OWN_NAMES = ("hidden", "output", "bias", "gates", "gate_index")


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """x -> sum_j act(x . u_j + a_j) v_j + b in float64, on the CPU.

    Attributes
    ----------
    activation : {"relu", "linear", "gated_relu"}
    hidden : torch.Tensor of shape (m, d)
        u_j in rows, as in ``torch.nn.Linear``.
    output : torch.Tensor of shape (m, c)
        v_j in rows.
    hidden_bias : torch.Tensor of shape (m,) or None
    output_bias : torch.Tensor of shape (c,) or None
    gates : torch.Tensor of shape (d or d + 1, P) or None
        Of a gated network; the last row is that of a hidden bias.
    gate_index : torch.Tensor of shape (m,) or None
    source : str
        What it was read from.
    own : bool
        A network of this package, whose hidden bias is penalised and whose output bias is not.
    """

    activation: str
    hidden: torch.Tensor
    output: torch.Tensor
    hidden_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    gate_index: torch.Tensor | None = None
    source: str = "weights"
    own: bool = False

    @property
    def n_neurons(self) -> int:
        """Number of neurons m."""
        return len(self.hidden)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Outputs (n, c) by the two-layer formula, for X (n, d) in float64."""
        values = X @ self.hidden.T
        if self.hidden_bias is not None:
            values = values + self.hidden_bias
        if self.activation == "relu":
            values = values.clamp_min(0)
        elif self.gates is not None and self.gate_index is not None:
            samples = X if len(self.gates) == X.shape[1] else torch.cat([X, torch.ones_like(X[:, :1])], dim=1)
            values = values * ((samples @ self.gates) >= 0)[:, self.gate_index]
        outputs = values @ self.output
        return outputs if self.output_bias is None else outputs + self.output_bias


def as_weights(value: Any, name: str) -> torch.Tensor:
    """An array of weights in float64 on the CPU; NaN, infinities and other than floating numbers are refused."""
    if torch.nn.parameter.is_lazy(value):
        raise InvalidInputError(f"{name} has no values yet (a lazy layer); call the module on the data once")
    try:
        tensor = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        if tensor.is_quantized or tensor.is_complex() or tensor.dtype == torch.bool:
            raise InvalidInputError(f"{name} has type {tensor.dtype}; real numbers are wanted")
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
        tensor = tensor.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{name} cannot be read as an array of numbers: {error}") from error
    if not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(tensor.isnan().any()) else "infinity"
        raise InvalidInputError(f"{name} contains {kind}; finite weights are wanted")
    return tensor.clone()


def from_tuple(
    weights: tuple[Any, ...], n_features: int, n_outputs: int | None, activation: str, gates: Any = None
) -> TrainedNetwork:
    """(W1, W2) or (W1, b1, W2, b2), a bias being an array or None; W1 (m, d) and W2 (c, m) as in torch."""
    if len(weights) not in (2, 4):
        raise InvalidInputError(f"module is a tuple of {len(weights)}; (W1, W2) or (W1, b1, W2, b2) is wanted")
    names = ("W1", "W2") if len(weights) == 2 else ("W1", "b1", "W2", "b2")
    given = dict(zip(names, weights, strict=True))
    parts = {name: None if value is None else as_weights(value, name) for name, value in given.items()}
    if parts["W1"] is None or parts["W2"] is None:
        raise InvalidInputError("module has None for a weight matrix; only a bias may be None")
    fits = _fits(parts["W1"], parts["W2"], n_features, n_outputs)
    if not fits:
        raise InvalidInputError(_no_fit(parts["W1"], parts["W2"], n_features, n_outputs))
    hidden, output = fits[0]
    source = _source("weight matrices", parts["W2"], output)
    return from_arrays(hidden, parts.get("b1"), output, parts.get("b2"), activation, source, gates)


def from_mapping(
    mapping: Mapping[str, Any], n_features: int, n_outputs: int | None, activation: str, gates: Any = None
) -> TrainedNetwork:
    """A state dict, or any mapping of names to arrays, with two matrices and at most a bias for each."""
    mapping = _unwrapped(mapping)
    if {"hidden", "output"} <= set(mapping) <= set(_OWN_NAMES):
        return _from_own_names(mapping, n_features, activation)
    arrays = {str(name): as_weights(value, str(name)) for name, value in mapping.items()}
    matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
    vectors = {name: array for name, array in arrays.items() if array.ndim == 1}
    others = [name for name in arrays if name not in matrices and name not in vectors]
    if len(matrices) != 2 or len(vectors) > 2 or others:
        shown = ", ".join(f"{name} {tuple(array.shape)}" for name, array in list(arrays.items())[:8])
        raise UnsupportedError(
            f"module has the tensors {shown or 'none'}; two matrices, with at most one bias vector for each, are "
            "wanted (a network of two linear layers)"
        )
    first, second = _in_order(matrices, n_features, n_outputs)
    biases = _biases(first, second, matrices, vectors, n_features, n_outputs)
    hidden, output = _fits(matrices[first], matrices[second], n_features, n_outputs)[0]
    source = _source("state dict", matrices[second], output)
    return from_arrays(hidden, biases[0], output, biases[1], activation, source, gates)


def from_arrays(
    hidden: torch.Tensor,
    hidden_bias: torch.Tensor | None,
    output: torch.Tensor,
    output_bias: torch.Tensor | None,
    activation: str,
    source: str,
    gates: Any = None,
) -> TrainedNetwork:
    """A network of checked parts: hidden (m, d), output (m, c) and the biases (m,), (c,)."""
    for bias, name, size in ((hidden_bias, "hidden", len(hidden)), (output_bias, "output", output.shape[1])):
        if bias is not None and tuple(bias.shape) != (size,):
            raise InvalidInputError(f"the {name} bias has shape {tuple(bias.shape)}; ({size},) is wanted")
    index = None
    if activation == "gated_relu":
        gates, index = _own_gates(gates, hidden, hidden_bias)
    else:
        gates = None
    return TrainedNetwork(activation, hidden, output, hidden_bias, output_bias, gates, index, source)


def place_weights(
    first: torch.Tensor, second: torch.Tensor, n_features: int, n_outputs: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices in their order as (hidden (m, d), output (m, c)), in torch's layout or its transpose."""
    fits = _fits(first, second, n_features, n_outputs)
    if not fits:
        raise InvalidInputError(_no_fit(first, second, n_features, n_outputs))
    return fits[0]


def _own_gates(gates: Any, hidden: torch.Tensor, hidden_bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates (d, m) of a gated network given as weights, one per neuron."""
    rows, m = hidden.shape[1] + (hidden_bias is not None), len(hidden)
    wanted = f"({rows}, {m}), a column per neuron, is wanted"
    if gates is None or isinstance(gates, (str, int)):
        raise InvalidInputError(f"gates is {gates!r}, but the weights are of a gated network: an array {wanted}")
    found = as_weights(gates, "gates")
    if tuple(found.shape) != (rows, m):
        raise InvalidInputError(f"gates has shape {tuple(found.shape)}; {wanted}")
    return found, torch.arange(m)


def _unwrapped(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a checkpoint that holds more than these."""
    for name in _WRAPPERS:
        if isinstance(mapping.get(name), Mapping):
            return mapping[name]
    return mapping


def _from_own_names(mapping: Mapping[str, Any], n_features: int, activation: str) -> TrainedNetwork:
    """The state dict of a :class:`cvxnn.networks.TwoLayerNetwork`; a hidden bias is a further row of hidden."""
    arrays = {name: as_weights(value, name) for name, value in mapping.items()}
    gates, index = arrays.get("gates"), arrays.get("gate_index")
    if (gates is None) != (index is None):
        raise InvalidInputError("module has only one of gates and gate_index; both or neither are wanted")
    hidden, output = arrays["hidden"], arrays["output"]
    if hidden.ndim != 2 or output.ndim != 2 or hidden.shape[1] != len(output):
        shapes = f"{tuple(hidden.shape)} and {tuple(output.shape)}"
        raise InvalidInputError(f"hidden and output have shapes {shapes}; (d, m) and (m, c) are wanted")
    bias, source = arrays.get("bias"), "TwoLayerNetwork weights"
    if bias is not None and bias.shape != output.shape[1:]:
        raise InvalidInputError(f"bias has shape {tuple(bias.shape)}; {tuple(output.shape[1:])} is wanted")
    if len(hidden) - n_features not in (0, 1):
        raise InvalidInputError(f"hidden has {len(hidden)} rows; {n_features}, or one more for a bias, are wanted")
    constant = hidden[-1].clone() if len(hidden) > n_features else None
    rows = hidden[:n_features].T.contiguous()
    if index is None or gates is None:
        return TrainedNetwork(activation, rows, output, constant, bias, source=source, own=True)
    index = index.long()
    whole = gates.ndim == 2 and len(gates) == len(hidden) and index.shape == (len(output),)
    if not whole or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < gates.shape[1]):
        raise InvalidInputError(
            f"gates and gate_index have shapes {tuple(gates.shape)} and {tuple(index.shape)}; ({len(hidden)}, P) and "
            f"({len(output)},), with entries below P, are wanted"
        )
    return TrainedNetwork("gated_relu", rows, output, constant, bias, gates, index, source, own=True)


def _fits(
    first: torch.Tensor, second: torch.Tensor, n_features: int, n_outputs: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(hidden (m, d), output (m, c)) for the layouts that fit, that of torch first."""
    if first.ndim != 2 or second.ndim != 2 or 0 in (*first.shape, *second.shape):
        return []
    layouts = ((first, second.T), (first.T, second))
    return [
        (hidden.contiguous(), output.contiguous())
        for hidden, output in layouts
        if len(hidden) == len(output)
        and hidden.shape[1] == n_features
        and (n_outputs is None or output.shape[1] == n_outputs)
    ]


def _source(name: str, second: torch.Tensor, output: torch.Tensor) -> str:
    """Where weights are from, and that they are not as in torch where that is so."""
    return name if torch.equal(output, second.T) else f"{name}, read as (d, m) and (m, c)"


def _no_fit(first: torch.Tensor, second: torch.Tensor, n_features: int, n_outputs: int | None) -> str:
    c = "c" if n_outputs is None else n_outputs
    return (
        f"the weights have shapes {tuple(first.shape)} and {tuple(second.shape)}; (m, {n_features}) and ({c}, m), "
        "as in torch.nn.Linear, are wanted for these X and Y"
    )


def _in_order(matrices: dict[str, torch.Tensor], n_features: int, n_outputs: int | None) -> tuple[str, str]:
    """Names of the hidden and of the output matrix: by shape, then by the numbers in the names."""
    first, second = matrices
    orders = {
        (a, b): _fits(matrices[a], matrices[b], n_features, n_outputs) for a, b in ((first, second), (second, first))
    }
    fits = [names for names, found in orders.items() if found]
    if not fits:
        raise InvalidInputError(_no_fit(matrices[first], matrices[second], n_features, n_outputs))
    # The layout of torch in one order is preferred to its transpose in the other.
    straight = [names for names in fits if orders[names][0][0].shape == matrices[names[0]].shape]
    fits = straight or fits
    if len(fits) == 1:
        return fits[0]
    numbers = [[int(digits) for digits in re.findall(r"\d+", name)] for name in (first, second)]
    if numbers[0] == numbers[1]:
        raise InvalidInputError(
            f"the matrices {first!r} and {second!r} fit in either order; give them as a tuple (W1, W2) or "
            "(W1, b1, W2, b2)"
        )
    return (first, second) if numbers[0] < numbers[1] else (second, first)


def _biases(
    first: str,
    second: str,
    matrices: dict[str, torch.Tensor],
    vectors: dict[str, torch.Tensor],
    n_features: int,
    n_outputs: int | None,
) -> list[torch.Tensor | None]:
    """The bias of each of the two matrices: by the layer in its name, or else by its length."""
    hidden, output = _fits(matrices[first], matrices[second], n_features, n_outputs)[0]
    sizes = (len(hidden), output.shape[1])
    found: list[torch.Tensor | None] = [None, None]
    for name, vector in vectors.items():
        places = [i for i, matrix in enumerate((first, second)) if _layer(name) == _layer(matrix)]
        if len(places) != 1:
            places = [i for i in (0, 1) if sizes[i] == len(vector)]
        if len(places) != 1 or found[places[0]] is not None:
            raise InvalidInputError(
                f"the vector {name!r} of length {len(vector)} belongs to none of the layers {first!r} and {second!r}, "
                "or to both; give a tuple (W1, b1, W2, b2)"
            )
        found[places[0]] = vector
    return found


def _layer(name: str) -> str:
    """What a weight and a bias of one layer have in common: "fc1" of "fc1.weight", "1" of "b1"."""
    prefix, dot, _ = name.rpartition(".")
    return prefix if dot else "".join(re.findall(r"\d+", name))
