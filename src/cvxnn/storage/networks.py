"""Networks as tensors and a header."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cvxnn.errors import InvalidInputError
from cvxnn.networks import AttentionNetwork, Network, TwoLayerCNN, TwoLayerNetwork
from cvxnn.operators import PatchGeometry

__all__ = ["NETWORKS", "check_image_shape", "check_token_shape", "pack_network", "read_field", "unpack_network"]

NETWORKS: dict[str, type[Network]] = {cls.__name__: cls for cls in (TwoLayerNetwork, TwoLayerCNN, AttentionNetwork)}
_WEIGHTS = ("hidden", "output", "bias", "gates", "gate_index", "pooling")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def read_field(fields: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of the header, of the type wanted."""
    value = fields.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"its field {name} is {str(value)[:60]!r}; {wanted} is wanted")
    return value


def pack_network(network: Network, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The header of a network; its tensors go into `arrays`."""
    tensors = {name: getattr(network, name, None) for name in _WEIGHTS}
    weights = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
    try:
        _check_weights(type(network), weights, _geometry_of(network))
    except ValueError as error:
        raise InvalidInputError(f"model has a network that cannot be stored: {error}") from error
    sample_dtype = str(network.sample_dtype).removeprefix("torch.")
    if sample_dtype not in _DTYPES:
        raise InvalidInputError(f"model has a network with sample_dtype {sample_dtype}; float32 or float64 is wanted")
    arrays.update({f"network.{name}": tensor.numpy() for name, tensor in weights.items()})
    header = {"hidden_bias": bool(network.hidden_bias), "sample_dtype": sample_dtype, "relu": bool(network.relu)}
    if isinstance(network, TwoLayerCNN):
        header |= {"geometry": network.geometry.to_dict(), "grid": list(network.grid)}
    if isinstance(network, AttentionNetwork):
        header |= {"pooled": bool(network.pooled)}
    return header


def unpack_network(kind: type[Network], fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> Network:
    """The network of a header."""
    # Cloned, so that torch aligns the memory as it did for the network that was saved.
    weights = {
        name: torch.from_numpy(arrays[f"network.{name}"]).clone() for name in _WEIGHTS if f"network.{name}" in arrays
    }
    sample_dtype = read_field(fields, "sample_dtype", str)
    if sample_dtype not in _DTYPES:
        raise ValueError(f"its field sample_dtype is {sample_dtype!r}; float32 or float64 is wanted")
    geometry = _read_geometry(read_field(fields, "geometry", dict)) if kind is TwoLayerCNN else None
    _check_weights(kind, weights, geometry)
    layers = weights["hidden"], weights["output"], weights["bias"], weights.get("gates"), weights.get("gate_index")
    relu = "relu" in fields and read_field(fields, "relu", bool)
    if geometry is not None:
        grid = _read_pair(fields, "grid", 1)
        pooling = weights["pooling"]
        if pooling.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"its pooling has {pooling.shape[1]} columns; {grid[0]} x {grid[1]} are wanted")
        return TwoLayerCNN(*layers, geometry, pooling, grid, _DTYPES[sample_dtype], relu)
    hidden_bias = read_field(fields, "hidden_bias", bool)
    if kind is AttentionNetwork:
        pooled = read_field(fields, "pooled", bool)
        return AttentionNetwork(*layers, pooled, hidden_bias, _DTYPES[sample_dtype], relu)
    return TwoLayerNetwork(*layers, hidden_bias, _DTYPES[sample_dtype], relu)


def _geometry_of(network: Network) -> PatchGeometry | None:
    return network.geometry if isinstance(network, TwoLayerCNN) else None


def _read_geometry(fields: dict[str, Any]) -> PatchGeometry:
    return PatchGeometry(
        _read_pair(fields, "filter_size", 1),
        _read_pair(fields, "stride", 1),
        _read_pair(fields, "padding", 0),
        read_field(fields, "bias", bool),
    )


def _read_pair(fields: dict[str, Any], name: str, least: int) -> tuple[int, int]:
    pair = read_field(fields, name, list)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= least for side in pair)
    if len(pair) != 2 or not whole:
        raise ValueError(f"its {name} is {str(pair)[:60]}; two whole numbers of at least {least} are wanted")
    return pair[0], pair[1]


def check_image_shape(network: TwoLayerCNN, shape: tuple[Any, ...]) -> None:
    """Refuse a shape (channels, H, W) that the network does not take."""
    if len(shape) != 3 or not all(isinstance(side, int) and side >= 1 for side in shape):
        raise ValueError(f"its image_shape_ is {str(shape)[:60]}; three whole numbers are wanted")
    if shape[0] != network.channels or network.geometry.grid(shape[1], shape[2]) != network.grid:
        raise ValueError(f"its images have shape {shape}, which its network does not take")


def check_token_shape(network: AttentionNetwork, shape: tuple[Any, ...]) -> None:
    """Refuse a shape (s, d) that the network does not take."""
    if len(shape) != 2 or not all(isinstance(side, int) and side >= 1 for side in shape):
        raise ValueError(f"its token_shape_ is {str(shape)[:60]}; two whole numbers are wanted")
    if shape[1] != network.n_features:
        raise ValueError(f"its tokens have {shape[1]} features; its network takes {network.n_features}")


def _check_weights(kind: type[Network], weights: dict[str, torch.Tensor], geometry: PatchGeometry | None) -> None:
    missing = [name for name in ("hidden", "output", "bias") if name not in weights]
    if missing or ("gates" in weights) != ("gate_index" in weights):
        raise ValueError(f"it has only {', '.join(weights) or 'none'} of the tensors {', '.join(_WEIGHTS)}")
    hidden, output, bias = weights["hidden"], weights["output"], weights["bias"]
    # Weights of the output layer that belong to one output, and how a shape says it.
    each, row = 1, "c"
    if geometry is not None:
        each = _cells(weights, geometry)
        row = f"{each} c"
    elif kind is AttentionNetwork:
        each = math.isqrt(len(hidden)) if hidden.ndim == 2 else 1
        row = "d c"
        if hidden.ndim != 2 or each * each != len(hidden) or each == 0:
            raise ValueError(f"its hidden has shape {tuple(hidden.shape)}; (d d, m) is wanted")
    ranks = (hidden.ndim, output.ndim, bias.ndim)
    if ranks != (2, 2, 1) or hidden.shape[1] != len(output) or output.shape[1] != each * len(bias):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, output, bias))
        raise ValueError(f"its layers have shapes {shapes}; (d, m), (m, {row}), (c,) are wanted")
    types = {tensor.dtype for tensor in (hidden, output, bias, weights.get("pooling", bias))}
    if len(types) > 1 or not types <= set(_DTYPES.values()):
        raise ValueError("the types of its layers differ, or are not float32 or float64")
    if "gates" in weights:
        _check_gates(weights, (-1, each, each) if kind is AttentionNetwork else (len(hidden), -1))


def _cells(weights: dict[str, torch.Tensor], geometry: PatchGeometry) -> int:
    """Cells of the pooling of a CNN."""
    pooling, hidden = weights.get("pooling"), weights["hidden"]
    if pooling is None or pooling.ndim != 2 or pooling.numel() == 0:
        raise ValueError("it has no pooling matrix")
    area = geometry.filter_size[0] * geometry.filter_size[1]
    if hidden.ndim != 2 or (len(hidden) - geometry.bias) % area or len(hidden) <= geometry.bias:
        raise ValueError(f"its filters do not fit into patches of {geometry.filter_size}")
    return len(pooling)


def _check_gates(weights: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    """Gates of a shape, with -1 for their number P, and an index into them."""
    gates, index = weights["gates"], weights["gate_index"]
    place = shape.index(-1)
    n_gates = gates.shape[place] if gates.ndim == len(shape) else 0
    if tuple(gates.shape) != tuple(n_gates if side < 0 else side for side in shape) or gates.dtype != torch.float64:
        wanted = ", ".join("P" if side < 0 else str(side) for side in shape)
        raise ValueError(f"its gates have shape {tuple(gates.shape)}; ({wanted}) of float64 is wanted")
    if index.shape != (len(weights["output"]),) or index.dtype != torch.int64:
        raise ValueError(
            f"its gate_index has shape {tuple(index.shape)}; ({len(weights['output'])},) of int64 is wanted"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n_gates:
        raise ValueError("its gate_index refers to gates that it does not have")
