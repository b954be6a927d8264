"""Trained networks as ONNX files, for use without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvxnn._version import __version__
from cvxnn.errors import DependencyError, InvalidInputError
from cvxnn.files import write_atomically
from cvxnn.networks import TwoLayerNetwork

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

    Parameters
    ----------
    model : fitted estimator of cvxnn, or TwoLayerNetwork
    path : str or path
        A file that exists is replaced, in one step.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
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
    _add_network(graph, network)
    document = graph.finish(network, _metadata(model))
    return write_atomically(path, lambda temporary: _write(temporary, document))


def _write(path: Path, document: bytes) -> None:
    path.write_bytes(document)


def _network_of(model: Any) -> TwoLayerNetwork:
    network = model if isinstance(model, torch.nn.Module) else getattr(model, "network_", None)
    if network is None and hasattr(model, "get_params"):
        raise InvalidInputError(f"model is a {type(model).__name__} that is not fitted; call fit before export_onnx")
    if not isinstance(network, TwoLayerNetwork):
        raise InvalidInputError(
            f"model is a {type(model).__name__}; a fitted estimator of cvxnn or a TwoLayerNetwork is wanted"
        )
    if network.hidden.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(f"model has weights of {network.hidden.dtype}; float32 or float64 is wanted")
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if n_bytes > _MAX_BYTES - 2**16:
        raise InvalidInputError(f"model has {n_bytes} bytes of weights; an ONNX file holds less than 2 GiB")
    return network


def _metadata(model: Any) -> dict[str, str]:
    """Class labels and feature names, where the model has them, as JSON."""
    names = {"classes": "classes_", "feature_names": "feature_names_in_"}
    return {key: json.dumps(getattr(model, name).tolist()) for key, name in names.items() if hasattr(model, name)}


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

    def finish(self, network: TwoLayerNetwork, metadata: dict[str, str]) -> bytes:
        """The checked model, serialised."""
        helper, kind = self.onnx.helper, self.type(network.hidden.dtype)
        n_features, n_outputs = len(network.hidden) - network.hidden_bias, len(network.bias)
        graph = helper.make_graph(
            self.nodes,
            "two_layer_network",
            [helper.make_tensor_value_info("x", kind, ["n", n_features])],
            [helper.make_tensor_value_info("y", kind, ["n", n_outputs])],
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


def _add_network(graph: _Graph, network: TwoLayerNetwork) -> None:
    """The operations of ``TwoLayerNetwork.forward``, from "x" to "y"."""
    bias = graph.constant("bias", network.bias)
    if network.hidden.shape[1] == 0:
        n_samples = graph.node("Shape", ["x"], "n_samples", start=0, end=1)
        shape = graph.node("Concat", [n_samples, graph.constant("n_outputs", [len(network.bias)])], "shape", axis=0)
        graph.node("Expand", [bias, shape], "y")
        return
    dtype = network.hidden.dtype
    samples = "x"
    if network.hidden_bias:
        one = graph.constant("one", torch.ones((), dtype=dtype))
        samples = graph.node("Pad", ["x", graph.constant("padding", [0, 0, 0, 1]), one], "samples")
    hidden = graph.node("MatMul", [samples, graph.constant("hidden_weights", network.hidden)], "hidden")
    if network.relu:
        hidden = graph.node("Relu", [hidden], "activations")
    if network.gates is not None:
        hidden = graph.node("Mul", [hidden, _add_gates(graph, network, samples)], "gated")
    outputs = graph.node("MatMul", [hidden, graph.constant("output_weights", network.output)], "outputs")
    graph.node("Add", [outputs, bias], "y")


def _add_gates(graph: _Graph, network: TwoLayerNetwork, samples: str) -> str:
    """Ones and zeros (n, m): whether the gate of each neuron is active."""
    rounded = graph.cast(samples, "rounded", network.sample_dtype)
    exact = graph.cast(rounded, "exact", torch.float64)
    products = graph.node("MatMul", [exact, graph.constant("gates", network.gates)], "products")
    zero = graph.constant("zero", np.zeros((), dtype=np.float64))
    active = graph.node("GreaterOrEqual", [products, zero], "active")
    numbers = graph.cast(active, "numbers", network.hidden.dtype)
    return graph.node("Gather", [numbers, graph.constant("gate_index", network.gate_index)], "masks", axis=1)
