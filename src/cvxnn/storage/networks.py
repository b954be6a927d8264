"""Networks as tensors and a header."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cvxnn.errors import InvalidInputError
from cvxnn.networks import TwoLayerCNN, TwoLayerNetwork
from cvxnn.operators import PatchGeometry

__all__ = ["NETWORKS", "check_image_shape", "pack_network", "read_field", "unpack_network"]

NETWORKS: dict[str, type[TwoLayerNetwork] | type[TwoLayerCNN]] = {
    cls.__name__: cls for cls in (TwoLayerNetwork, TwoLayerCNN)
}
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


def pack_network(network: TwoLayerNetwork | TwoLayerCNN, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The header of a network; its tensors go into `arrays`."""
    tensors = {name: getattr(network, name, None) for name in _WEIGHTS}
    weights = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
    try:
        _check_weights(weights, _geometry_of(network))
    except ValueError as error:
        raise InvalidInputError(f"model has a network that cannot be stored: {error}") from error
    sample_dtype = str(network.sample_dtype).removeprefix("torch.")
    if sample_dtype not in _DTYPES:
        raise InvalidInputError(f"model has a network with sample_dtype {sample_dtype}; float32 or float64 is wanted")
    arrays.update({f"network.{name}": tensor.numpy() for name, tensor in weights.items()})
    header = {"hidden_bias": bool(network.hidden_bias), "sample_dtype": sample_dtype, "relu": bool(network.relu)}
    if isinstance(network, TwoLayerCNN):
        header |= {"geometry": network.geometry.to_dict(), "grid": list(network.grid)}
    return header


def unpack_network(
    kind: type[TwoLayerNetwork] | type[TwoLayerCNN], fields: dict[str, Any], arrays: dict[str, np.ndarray]
) -> TwoLayerNetwork | TwoLayerCNN:
    """The network of a header."""
    # Cloned, so that torch aligns the memory as it did for the network that was saved.
    weights = {
        name: torch.from_numpy(arrays[f"network.{name}"]).clone() for name in _WEIGHTS if f"network.{name}" in arrays
    }
    sample_dtype = read_field(fields, "sample_dtype", str)
    if sample_dtype not in _DTYPES:
        raise ValueError(f"its field sample_dtype is {sample_dtype!r}; float32 or float64 is wanted")
    geometry = _read_geometry(read_field(fields, "geometry", dict)) if kind is TwoLayerCNN else None
    _check_weights(weights, geometry)
    layers = weights["hidden"], weights["output"], weights["bias"], weights.get("gates"), weights.get("gate_index")
    relu = "relu" in fields and read_field(fields, "relu", bool)
    if geometry is not None:
        grid = _read_pair(fields, "grid", 1)
        pooling = weights["pooling"]
        if pooling.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"its pooling has {pooling.shape[1]} columns; {grid[0]} x {grid[1]} are wanted")
        return TwoLayerCNN(*layers, geometry, pooling, grid, _DTYPES[sample_dtype], relu)
    return TwoLayerNetwork(*layers, read_field(fields, "hidden_bias", bool), _DTYPES[sample_dtype], relu)


def _geometry_of(network: TwoLayerNetwork | TwoLayerCNN) -> PatchGeometry | None:
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


def _check_weights(weights: dict[str, torch.Tensor], geometry: PatchGeometry | None) -> None:
    cells = 1
    if geometry is not None:
        pooling = weights.get("pooling")
        if pooling is None or pooling.ndim != 2 or pooling.numel() == 0:
            raise ValueError("it has no pooling matrix")
        cells = len(pooling)
        area = geometry.filter_size[0] * geometry.filter_size[1]
        hidden = weights.get("hidden")
        if hidden is None or hidden.ndim != 2 or (len(hidden) - geometry.bias) % area or len(hidden) <= geometry.bias:
            raise ValueError(f"its filters do not fit into patches of {geometry.filter_size}")
    missing = [name for name in ("hidden", "output", "bias") if name not in weights]
    if missing or ("gates" in weights) != ("gate_index" in weights):
        raise ValueError(f"it has only {', '.join(weights) or 'none'} of the tensors {', '.join(_WEIGHTS)}")
    hidden, output, bias = weights["hidden"], weights["output"], weights["bias"]
    ranks = (hidden.ndim, output.ndim, bias.ndim)
    if ranks != (2, 2, 1) or hidden.shape[1] != len(output) or output.shape[1] != cells * len(bias):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, output, bias))
        raise ValueError(
            f"its layers have shapes {shapes}; (d, m), (m, {'c' if cells == 1 else f'{cells} c'}), (c,) are wanted"
        )
    types = {tensor.dtype for tensor in (hidden, output, bias, weights.get("pooling", bias))}
    if len(types) > 1 or not types <= set(_DTYPES.values()):
        raise ValueError("the types of its layers differ, or are not float32 or float64")
    if "gates" not in weights:
        return
    gates, index = weights["gates"], weights["gate_index"]
    if gates.ndim != 2 or len(gates) != len(hidden) or gates.dtype != torch.float64:
        raise ValueError(f"its gates have shape {tuple(gates.shape)}; ({len(hidden)}, P) of float64 is wanted")
    if index.shape != (len(output),) or index.dtype != torch.int64:
        raise ValueError(f"its gate_index has shape {tuple(index.shape)}; ({len(output)},) of int64 is wanted")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < gates.shape[1]:
        raise ValueError("its gate_index refers to gates that it does not have")
