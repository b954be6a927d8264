"""Trained networks as ONNX files, for use without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn._version import __version__
from cvxnn.errors import DependencyError, InvalidInputError, UnsupportedError
from cvxnn.files import write_atomically
from cvxnn.layerwise.network import LayerwiseNetwork
from cvxnn.networks import AttentionNetwork, Network, TwoLayerCNN, TwoLayerNetwork

__all__ = ["export_onnx"]

_OPSET = 17
_IR_VERSION = 8
#: A protobuf message, and so an ONNX file, cannot be longer.
_MAX_BYTES = 2**31 - 1


def export_onnx(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write the network of a model as an ONNX file with input "x", (n, d), and output "y", (n, c).

    n is free. Input and output have the type of the weights; gates are computed in float64. "y" are the
    outputs of the network: for a classifier column j belongs to class j of the "classes" in the metadata of
    the file, in JSON. Preprocessing of tables is not part of the network.

    For a CNN "x" are images (n, channels, H, W), multiplied with the "scale" in the metadata. Height and width
    are free in the file where neither the model nor the map of patches says which they are, as for the bare
    network of a convolution with strides; images of another size than in training are then cut or refused.

    For attention "x" are tokens (n, s, d), and "y" is (n, s, c) for outputs per token; s is free. The file has no
    mask: all tokens are valid and see one another.

    Parameters
    ----------
    model : fitted estimator of cvxnn, TwoLayerNetwork, TwoLayerCNN or AttentionNetwork
    path : str or path
        A file that exists is replaced, in one step.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    UnsupportedError
        The model is a layerwise network.
    DependencyError
        Without the extra ``cvxnn[onnx]``.
    InvalidInputError
        Not a model of cvxnn, not fitted, or weights that are neither float32 nor float64, or beyond 2 GiB.
    StorageError
        The folder does not exist or cannot be written, or the disk is full; nothing is left behind.
    """
    network = _network_of(model)
    try:
        import onnx
    except ImportError as error:
        raise DependencyError("export_onnx needs the package onnx: pip install 'cvxnn[onnx]'") from error
    graph = _Graph(onnx)
    if isinstance(network, TwoLayerCNN):
        shape = _add_cnn(graph, network, getattr(model, "image_shape_", None))
    elif isinstance(network, AttentionNetwork):
        shape = _add_attention(graph, network)
    else:
        shape = _add_network(graph, network)
    document = graph.finish(network, shape, _metadata(model))
    return write_atomically(path, lambda temporary: _write(temporary, document))


def _write(path: Path, document: bytes) -> None:
    path.write_bytes(document)


def _network_of(model: Any) -> Network:
    network = model if isinstance(model, torch.nn.Module) else getattr(model, "network_", None)
    if network is None and hasattr(model, "get_params"):
        raise InvalidInputError(f"model is a {type(model).__name__} that is not fitted; call fit before export_onnx")
    if isinstance(network, LayerwiseNetwork):
        raise UnsupportedError(
            "model is a layerwise network, for which there is no ONNX graph; save it with cvxnn.save"
        )
    if not isinstance(network, Network):
        raise InvalidInputError(
            f"model is a {type(model).__name__}; a fitted estimator of cvxnn or one of its networks is wanted"
        )
    if network.hidden.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(f"model has weights of {network.hidden.dtype}; float32 or float64 is wanted")
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if n_bytes > _MAX_BYTES - 2**16:
        raise InvalidInputError(f"model has {n_bytes} bytes of weights; an ONNX file holds less than 2 GiB")
    return network


def _metadata(model: Any) -> dict[str, str]:
    """Class labels, feature names and the scale of images, where the model has them, as JSON."""
    names = {"classes": "classes_", "feature_names": "feature_names_in_", "scale": "scale_"}
    found = {key: getattr(model, name) for key, name in names.items() if hasattr(model, name)}
    return {key: json.dumps(np.asarray(value).tolist()) for key, value in found.items()}


class _Graph:
    """Nodes and constants of an ONNX graph; values are referred to by name."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any) -> str:
        """Add a constant, an array or a tensor."""
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, operation: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output."""
        self.nodes.append(self.onnx.helper.make_node(operation, inputs, [output], **attributes))
        return output

    def cast(self, source: str, output: str, dtype: torch.dtype) -> str:
        """Convert a value to another type."""
        return self.node("Cast", [source], output, to=self.type(dtype))

    def type(self, dtype: torch.dtype) -> int:
        """The number that ONNX has for a type."""
        kinds = {torch.float32: self.onnx.TensorProto.FLOAT, torch.float64: self.onnx.TensorProto.DOUBLE}
        return kinds[dtype]

    def finish(self, network: Network, shape: list[int | str], metadata: dict[str, str]) -> bytes:
        """The checked model, serialised; `shape` is that of a sample."""
        parts = shape[:1] if isinstance(network, AttentionNetwork) and not network.pooled else []
        helper, kind = self.onnx.helper, self.type(network.hidden.dtype)
        graph = helper.make_graph(
            self.nodes,
            "two_layer_network",
            [helper.make_tensor_value_info("x", kind, ["n", *shape])],
            [helper.make_tensor_value_info("y", kind, ["n", *parts, len(network.bias)])],
            self.constants,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="cvxnn",
            producer_version=__version__,
        )
        helper.set_model_props(model, metadata)
        self.onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def _add_network(graph: _Graph, network: TwoLayerNetwork) -> list[int | str]:
    """The operations of ``TwoLayerNetwork.forward``, from "x" to "y"; the shape of a sample."""

    def hidden() -> str:
        return _add_hidden(graph, network, _add_hidden_bias(graph, network, "x", [0, 0, 0, 1]), axis=1)

    _add_outputs(graph, network, network.output, hidden)
    return [len(network.hidden) - network.hidden_bias]


def _add_cnn(graph: _Graph, network: TwoLayerCNN, image_shape: tuple[int, int, int] | None) -> list[int | str]:
    """The operations of ``TwoLayerCNN.forward``, from "x" to "y"; the shape of an image."""
    cells, c = len(network.pooling), len(network.bias)
    weights = network.output.view(-1, c, cells).permute(2, 0, 1).flatten(0, 1)

    def pooled() -> str:
        patches = _add_hidden_bias(graph, network, _add_patches(graph, network), [0, 0, 0, 0, 0, 1])
        maps = _add_hidden(graph, network, patches, axis=2)
        cellwise = graph.node("MatMul", [graph.constant("pooling", network.pooling), maps], "pooled")
        return graph.node("Reshape", [cellwise, graph.constant("flat", [0, len(weights)])], "features")

    _add_outputs(graph, network, weights, pooled)
    return [network.channels, *(_image_size(network) if image_shape is None else image_shape[1:])]


def _image_size(network: TwoLayerCNN) -> list[int | str]:
    """Height and width of the images; a name for a side that several sizes with the same map have."""
    geometry, sizes = network.geometry, _used_size(network)
    sides = zip(("height", "width"), sizes, geometry.stride, geometry.padding, strict=True)
    return [name if stride > 1 else size - 2 * p for name, size, stride, p in sides]


def _used_size(network: TwoLayerCNN) -> list[int]:
    """Height and width of the part of the padded images that patches reach."""
    geometry = network.geometry
    sides = zip(network.grid, geometry.stride, geometry.filter_size, strict=True)
    return [(cells - 1) * stride + size for cells, stride, size in sides]


def _add_patches(graph: _Graph, network: TwoLayerCNN) -> str:
    """Patches (n, K, h): a convolution in float64 is something that not every runtime has."""
    (top, left), used = network.geometry.padding, _used_size(network)
    sides = graph.constant("image_padding", [0, 0, top, left, 0, 0, top, left])
    zero = graph.constant("pixel", torch.zeros((), dtype=network.hidden.dtype))
    padded = graph.node("Pad", ["x", sides, zero], "padded")
    bounds = [graph.constant(name, values) for name, values in (("start", [0, 0]), ("stop", used), ("axes", [2, 3]))]
    reached = graph.node("Slice", [padded, *bounds], "reached")
    n_pixels = network.channels * used[0] * used[1]
    pixels = graph.node("Reshape", [reached, graph.constant("row", [0, n_pixels])], "pixels")
    # Where patches find their pixels: the geometry itself, applied to the numbers of the pixels.
    numbers = torch.arange(n_pixels, dtype=torch.float64).view(1, network.channels, *used)
    places = replace(network.geometry, padding=(0, 0), bias=False)(numbers)[0]
    return graph.node("Gather", [pixels, graph.constant("places", places.long())], "patches", axis=1)


def _add_attention(graph: _Graph, network: AttentionNetwork) -> list[int | str]:
    """The operations of ``AttentionNetwork.forward`` without a mask, from "x" to "y"; the shape of a sequence."""
    m, d = len(network.output), network.dim
    shape: list[int | str] = ["tokens", network.n_features]
    if m == 0:
        _add_constant(graph, network, 1 if network.pooled else 2)
        return shape
    samples = _add_hidden_bias(graph, network, "x", [0, 0, 0, 0, 0, 1])
    # Heads are axis 1: (n, 1, s, d) for the tokens, and (n, m, s, s) for the scores.
    keys = graph.node("Unsqueeze", [samples, graph.constant("heads_axis", [1])], "keys")
    turned = graph.node("Transpose", [keys], "turned", perm=[0, 1, 3, 2])
    left = graph.node("MatMul", [keys, graph.constant("score_weights", network.scores)], "left")
    if network.relu or network.gates is not None:
        scores = graph.node("MatMul", [left, turned], "scores")
        if network.relu:
            scores = graph.node("Relu", [scores], "activations")
        if network.gates is not None:
            exact, exact_turned = (
                graph.cast(graph.cast(part, f"rounded_{part}", network.sample_dtype), f"exact_{part}", torch.float64)
                for part in (keys, turned)
            )
            half = graph.node("MatMul", [exact, graph.constant("gates", network.gates)], "half_products")
            products = graph.node("MatMul", [half, exact_turned], "products")
            scores = graph.node("Mul", [scores, _add_active(graph, network, products, axis=1)], "gated")
        heads = graph.node("MatMul", [scores, keys], "heads")
    else:
        heads = graph.node("MatMul", [left, graph.node("MatMul", [turned, keys], "key_products")], "heads")
    if network.pooled:
        heads = graph.node("ReduceMean", [heads], "means", axes=[2], keepdims=1)
    tokenwise = graph.node("Transpose", [heads], "tokenwise", perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", [tokenwise, graph.constant("flat", [0, 0, m * d])], "features")
    weights = graph.constant("output_weights", network.output.view(m * d, len(network.bias)))
    outputs = graph.node(
        "Add", [graph.node("MatMul", [flat, weights], "outputs"), graph.constant("bias", network.bias)], "rows"
    )
    if network.pooled:
        graph.node("Squeeze", [outputs, graph.constant("rows_axis", [1])], "y")
    else:
        graph.node("Identity", [outputs], "y")
    return shape


def _add_hidden_bias(graph: _Graph, network: Network, samples: str, sides: list[int]) -> str:
    if not network.hidden_bias:
        return samples
    one = graph.constant("one", torch.ones((), dtype=network.hidden.dtype))
    return graph.node("Pad", [samples, graph.constant("padding", sides), one], "samples")


def _add_hidden(graph: _Graph, network: Network, samples: str, axis: int) -> str:
    """Activations of the hidden layer; `axis` is that of the neurons."""
    hidden = graph.node("MatMul", [samples, graph.constant("hidden_weights", network.hidden)], "hidden")
    if network.relu:
        hidden = graph.node("Relu", [hidden], "activations")
    if network.gates is not None:
        hidden = graph.node("Mul", [hidden, _add_gates(graph, network, samples, axis)], "gated")
    return hidden


def _add_outputs(graph: _Graph, network: Network, weights: torch.Tensor, features: Callable[[], str]) -> None:
    """The output layer; without neurons the bias alone."""
    if network.hidden.shape[1] == 0:
        _add_constant(graph, network, 1)
        return
    outputs = graph.node("MatMul", [features(), graph.constant("output_weights", weights)], "outputs")
    graph.node("Add", [outputs, graph.constant("bias", network.bias)], "y")


def _add_constant(graph: _Graph, network: Network, leading: int) -> None:
    """The bias for every sample, or for the first `leading` axes of the samples."""
    n_samples = graph.node("Shape", ["x"], "n_samples", start=0, end=leading)
    shape = graph.node("Concat", [n_samples, graph.constant("n_outputs", [len(network.bias)])], "shape", axis=0)
    graph.node("Expand", [graph.constant("bias", network.bias), shape], "y")


def _add_gates(graph: _Graph, network: Network, samples: str, axis: int) -> str:
    """Ones and zeros: whether the gate of each neuron is active."""
    rounded = graph.cast(samples, "rounded", network.sample_dtype)
    exact = graph.cast(rounded, "exact", torch.float64)
    products = graph.node("MatMul", [exact, graph.constant("gates", network.gates)], "products")
    return _add_active(graph, network, products, axis)


def _add_active(graph: _Graph, network: Network, products: str, axis: int) -> str:
    """Ones where products with gates are not negative; gates, on an axis, become neurons."""
    zero = graph.constant("zero", np.zeros((), dtype=np.float64))
    active = graph.node("GreaterOrEqual", [products, zero], "active")
    numbers = graph.cast(active, "numbers", network.hidden.dtype)
    return graph.node("Gather", [numbers, graph.constant("gate_index", network.gate_index)], "masks", axis=axis)
