"""Networks of layerwise training as JSON-able headers and arrays, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from cvxnn.layerwise.network import LayerwiseNetwork, Standardizer, TrainedStage
from cvxnn.layerwise.reduction import Reduction
from cvxnn.layerwise.stage import GatedConvolution, PooledHead
from cvxnn.operators import PatchGeometry

__all__ = ["pack_network", "pack_stage", "unpack_network", "unpack_stage"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _tensor(arrays: dict[str, np.ndarray], name: str, ndim: int, kind: str = "f") -> torch.Tensor:
    if name not in arrays:
        raise ValueError(f"its array {name} is missing")
    array = arrays[name]
    if array.ndim != ndim or array.dtype.kind != kind:
        raise ValueError(f"its array {name} has shape {array.shape} and type {array.dtype}")
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"its array {name} has numbers that are not finite")
    return torch.from_numpy(array.copy())


def _pack_layer(layer: GatedConvolution, arrays: dict[str, np.ndarray], name: str) -> None:
    arrays[f"{name}.filters"] = _array(layer.filters)
    arrays[f"{name}.gates"] = _array(layer.gates)
    arrays[f"{name}.gate_index"] = _array(layer.gate_index)


def _unpack_layer(
    arrays: dict[str, np.ndarray], name: str, geometry: PatchGeometry, downsample: bool, gap: int
) -> GatedConvolution:
    filters = _tensor(arrays, f"{name}.filters", 2)
    gates = _tensor(arrays, f"{name}.gates", 2)
    index = _tensor(arrays, f"{name}.gate_index", 1, "i").long()
    if len(index) != len(filters) or len(gates) != filters.shape[1] or len(filters) == 0:
        raise ValueError(f"its arrays {name} do not fit each other")
    if int(index.min()) < 0 or int(index.max()) >= gates.shape[1]:
        raise ValueError(f"its array {name}.gate_index names gates that are not there")
    return GatedConvolution(filters, gates, index, geometry, downsample, gap)


def pack_stage(stage: TrainedStage, arrays: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """The header of a stage; its numbers are put into `arrays` under names that begin with `name`."""
    _pack_layer(stage.convolution, arrays, f"{name}.convolution")
    for part in ("weight", "bias", "pooling"):
        arrays[f"{name}.head.{part}"] = _array(getattr(stage.head, part))
    if stage.narrow is not None:
        _pack_layer(stage.narrow, arrays, f"{name}.features")
    return {
        "geometry": stage.convolution.geometry.to_dict(),
        "downsample": stage.convolution.downsample,
        "gap": stage.convolution.gap,
        "narrow": stage.narrow is not None,
        "reduction": dataclasses.asdict(stage.reduction),
    }


def unpack_stage(header: dict[str, Any], arrays: dict[str, np.ndarray], name: str) -> TrainedStage:
    """The inverse of :func:`pack_stage`.

    Raises
    ------
    ValueError, KeyError, TypeError
        Not what that function gives.
    """
    facts = header["geometry"]
    pairs = [tuple(int(size) for size in facts[key]) for key in ("filter_size", "stride", "padding")]
    if any(len(pair) != 2 for pair in pairs) or min(*pairs[0], *pairs[1]) < 1 or min(pairs[2]) < 0:
        raise ValueError(f"its geometry is {facts!r}")
    filter_size, stride, padding = ((pair[0], pair[1]) for pair in pairs)
    geometry = PatchGeometry(filter_size, stride, padding, bool(facts["bias"]))
    downsample = bool(header["downsample"])
    # Networks of files that were written before there was a gap were trained without one.
    gap = header.get("gap", 0)
    if not isinstance(gap, int) or isinstance(gap, bool) or gap < 0:
        raise ValueError(f"its gap is {gap!r}")
    convolution = _unpack_layer(arrays, f"{name}.convolution", geometry, downsample, gap)
    weight, bias = _tensor(arrays, f"{name}.head.weight", 2), _tensor(arrays, f"{name}.head.bias", 1)
    pooling = _tensor(arrays, f"{name}.head.pooling", 2)
    if weight.shape != (convolution.n_channels * len(pooling), len(bias)):
        raise ValueError(f"its head has weights of shape {tuple(weight.shape)}")
    narrow = _unpack_layer(arrays, f"{name}.features", geometry, downsample, gap) if header["narrow"] else None
    reduced = header["reduction"]
    reduction = Reduction(bool(reduced["mirror"]), int(reduced["size"]), int(reduced["stride"]))
    if reduction.size < 1 or reduction.stride < 1:
        raise ValueError(f"its reduction is {reduced!r}")
    return TrainedStage(convolution, PooledHead(weight, bias, pooling), narrow, reduction)


def pack_network(network: LayerwiseNetwork, arrays: dict[str, np.ndarray], name: str = "network") -> dict[str, Any]:
    """The header of a network; its numbers are put into `arrays`."""
    standardizer = network.standardizer
    arrays[f"{name}.mean"], arrays[f"{name}.deviation"] = _array(standardizer.mean), _array(standardizer.deviation)
    stages: list[Any] = list(network.stages)
    return {
        "scale": standardizer.scale,
        "each": standardizer.each,
        "mirror": standardizer.mirror,
        "dtype": str(standardizer.dtype).removeprefix("torch."),
        "image_shape": list(network.image_shape),
        "stages": [pack_stage(stage, arrays, f"{name}.stage{i}") for i, stage in enumerate(stages)],
    }


def unpack_network(header: dict[str, Any], arrays: dict[str, np.ndarray], name: str = "network") -> LayerwiseNetwork:
    """The inverse of :func:`pack_network`, on the CPU.

    Raises
    ------
    ValueError, KeyError, TypeError
        Not what that function gives.
    """
    mean, deviation = _tensor(arrays, f"{name}.mean", 1), _tensor(arrays, f"{name}.deviation", 1)
    shape = tuple(int(size) for size in header["image_shape"])
    if len(shape) != 3 or len(mean) != shape[0] or len(deviation) != shape[0]:
        raise ValueError(f"its images have shape {shape}, its means {tuple(mean.shape)}")
    stages = [unpack_stage(part, arrays, f"{name}.stage{i}") for i, part in enumerate(header["stages"])]
    if not stages:
        raise ValueError("it has no stages")
    channels = shape[0]
    for stage in stages:
        layer = stage.convolution
        channels = 4 * channels if layer.downsample else channels
        if layer.filters.shape[1] != layer.geometry.length(channels):
            raise ValueError(f"its filters have length {layer.filters.shape[1]} for {channels} channels")
        channels = stage.features.n_channels
    standardizer = Standardizer(
        float(header["scale"]),
        mean,
        deviation,
        _DTYPES[header["dtype"]],
        bool(header["each"]),
        bool(header["mirror"]),
    )
    return LayerwiseNetwork(standardizer, stages, shape)
