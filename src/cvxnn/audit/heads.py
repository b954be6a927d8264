"""Blocks of linear attention, however they are given, as the matrices W1 and W2 of their heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cvxnn.audit.modules import PROBES, module_outputs
from cvxnn.audit.weights import TrainedNetwork, as_weights
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.networks import AttentionNetwork
from cvxnn.operators.queries import OUTPUTS
from cvxnn.operators.tokens import TokenMask, read_tokens
from cvxnn.validation import check_choice

__all__ = ["HEADS_WANTED", "Heads", "read_heads"]

#: Sequences on which a module is compared with the formula.
_COMPARED = 64
#: Names of the four projections, in mappings and as endings of the names of layers.
_PROJECTIONS = {
    "query": ("query", "q_proj", "to_q", "wq", "w_q", "q", "queries"),
    "key": ("key", "k_proj", "to_k", "wk", "w_k", "k", "keys"),
    "value": ("value", "v_proj", "to_v", "wv", "w_v", "v", "values"),
    "out": ("out", "out_proj", "to_out", "wo", "w_o", "o", "output", "proj"),
}
#: For weights that may be those of attention.
HEADS_WANTED = "of attention the module itself is wanted, or its heads as {'W1': (m, d, d), 'W2': (m, d, c)}"
_PRODUCTS = "heads W1 = query key^T and W2 = value out, weight decay on these products"
_WANTED = (
    "sum_j X W1_j X^T X W2_j is wanted: W1 (m, d, d) and W2 (m, d, c) for m heads, or query, key, value and out "
    "projections of every head, without a softmax"
)


@dataclass(frozen=True, eq=False)
class Heads:
    """A block X -> sum_j X W1_j X^T X W2_j + b, and the tokens that it saw.

    Attributes
    ----------
    network : TrainedNetwork
        W1 as rows of `hidden`, (m, d d), read column by column; W2 as rows of `output`, (m, d c), row by row.
    n_outputs : int
    tokens : torch.Tensor of shape (n, s, d), float64
        With the ones of a hidden bias.
    mask : TokenMask
    output : {"mean", "tokens"}
    hidden_bias : bool
    """

    network: TrainedNetwork
    n_outputs: int
    tokens: torch.Tensor
    mask: TokenMask
    output: str
    hidden_bias: bool = False


def read_heads(module: Any, X: Any, mask: Any, output: str | None, activation: str | None) -> Heads | None:
    """The heads of a block of linear attention; None where the module is none.

    Raises
    ------
    InvalidInputError, UnsupportedError
        It is attention, but not of this kind, or does not fit the tokens; a mask or an output without attention.
    """
    module = getattr(module, "network_", module)
    if not _is_attention(module):
        for name, given in (("mask", mask), ("output", output)):
            if given is not None:
                advice = "" if isinstance(module, nn.Module) else f"; {HEADS_WANTED}"
                raise InvalidInputError(f"{name} is given, but the module is no attention; leave {name}=None{advice}")
        return None
    if activation not in (None, "linear", "identity"):
        raise UnsupportedError(f"activation is {activation!r}; of attention, linear blocks are certified")
    if output is not None:
        check_choice(output, "output", OUTPUTS)
    array, found = read_tokens(X, mask, "X")
    tokens = torch.from_numpy(array)
    if isinstance(module, AttentionNetwork):
        return _of_network(module, tokens, found, output)
    if isinstance(module, nn.Module):
        return _of_module(module, tokens, found, output)
    if isinstance(module, (tuple, list)):
        module = dict(zip(("W1", "W2"), module, strict=True))
    network, c = _of_mapping(module, tokens.shape[2])
    return Heads(network, c, tokens, found, output or "mean")


def _is_attention(module: Any) -> bool:
    if isinstance(module, nn.Module):
        softmax = any(isinstance(part, nn.MultiheadAttention) for part in module.modules())
        if softmax:
            raise UnsupportedError(f"module has a MultiheadAttention, whose softmax has no convex form here; {_WANTED}")
        return isinstance(module, AttentionNetwork) or _tensors(module) is not None or _layers(module) is not None
    if isinstance(module, Mapping):
        return all(_ndim(module.get(name)) == 3 for name in ("W1", "W2")) or all(
            _ndim(module.get(name)) == 3 for name in _PROJECTIONS
        )
    return isinstance(module, (tuple, list)) and len(module) == 2 and all(_ndim(part) == 3 for part in module)


def _ndim(value: Any) -> int:
    try:
        return len(torch.as_tensor(value).shape)
    except (TypeError, ValueError, RuntimeError):
        return 0


def _of_network(module: AttentionNetwork, tokens: torch.Tensor, mask: TokenMask, output: str | None) -> Heads:
    if module.relu or module.gates is not None:
        raise UnsupportedError(
            "module is attention with a ReLU or with gates; of attention, linear blocks are certified (for a result "
            "of cvxnn.solve there is result.certificate)"
        )
    own = "mean" if module.pooled else "tokens"
    if output not in (None, own):
        raise InvalidInputError(f"output is {output!r}, but the network has outputs for {own!r}")
    if tokens.shape[2] != module.n_features:
        raise InvalidInputError(f"X has tokens of {tokens.shape[2]} features; {module.n_features} are wanted")
    if module.sample_dtype == torch.float32:
        tokens = tokens.float().double()
    if module.hidden_bias:
        tokens = torch.cat([tokens, mask.valid.unsqueeze(2).double()], dim=2)
    bias = as_weights(module.bias, "bias")
    network = TrainedNetwork(
        activation="linear",
        hidden=as_weights(module.hidden, "hidden").T.contiguous(),
        output=as_weights(module.output, "output"),
        # These networks always have the parameter; zeros stand for none.
        output_bias=bias if bool(bias.any()) else None,
        source="AttentionNetwork",
        own=True,
    )
    return Heads(network, len(bias), tokens, mask, own, module.hidden_bias)


def _of_mapping(mapping: Mapping[str, Any], d: int) -> tuple[TrainedNetwork, int]:
    """{"W1", "W2"} or the four projections of each head, and a "bias" of the outputs."""
    known = {"W1", "W2"} if "W1" in mapping else set(_PROJECTIONS)
    others = sorted(set(mapping) - known - {"bias"})
    if others:
        raise InvalidInputError(f"module has {others[0]!r}, which a block of attention has not; {_WANTED}")
    parts = {name: as_weights(mapping[name], name) for name in known}
    bias = mapping.get("bias")
    bias = None if bias is None else as_weights(bias, "bias")
    if "W1" in known:
        return _block(parts["W1"], parts["W2"], bias, d, "weights of heads")
    query, key, value, out = (parts[name] for name in _PROJECTIONS)
    if query.shape != key.shape or value.shape[::2] != (len(out), out.shape[1]) or len(query) != len(value):
        shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value, out))
        raise InvalidInputError(
            f"query, key, value and out have shapes {shapes}; (m, d, r), (m, d, r), (m, d, t) and (m, t, c) are wanted"
        )
    return _block(query @ key.mT, value @ out, bias, d, _PRODUCTS)


def _block(
    W1: torch.Tensor, W2: torch.Tensor, bias: torch.Tensor | None, d: int, source: str
) -> tuple[TrainedNetwork, int]:
    m = len(W1)
    if W1.shape != (m, d, d) or W2.shape[:2] != (m, d) or W2.shape[2] == 0:
        raise InvalidInputError(
            f"W1 and W2 have shapes {tuple(W1.shape)} and {tuple(W2.shape)}; (m, {d}, {d}) and (m, {d}, c) are wanted "
            f"for tokens of {d} features"
        )
    c = W2.shape[2]
    if bias is not None and bias.shape != (c,):
        raise InvalidInputError(f"bias has shape {tuple(bias.shape)}; ({c},) is wanted")
    hidden = W1.mT.reshape(m, -1).contiguous()
    return TrainedNetwork("linear", hidden, W2.reshape(m, -1).contiguous(), None, bias, source=source), c


# -- modules ----------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> list[nn.Parameter] | None:
    """Two parameters (m, d, d) and (m, d, c), and perhaps a bias (c,), in order; None for another module."""
    parts = list(module.parameters())
    cubes = [part for part in parts if part.ndim == 3]
    vectors = [part for part in parts if part.ndim == 1]
    return [*cubes, *vectors] if len(cubes) == 2 and len(vectors) <= 1 and len(parts) == 2 + len(vectors) else None


def _layers(module: nn.Module) -> dict[str, nn.Linear] | None:
    """The four projections by name, where there are such; None for another module."""
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    found = {}
    for kind, names in _PROJECTIONS.items():
        fits = [part for name, part in layers.items() if name.rpartition(".")[2].lower() in names]
        if len(fits) == 1:
            found[kind] = fits[0]
    if len(found) < 4:
        return None
    if len(layers) > 4 or sum(1 for _ in module.parameters()) != sum(
        1 + (part.bias is not None) for part in found.values()
    ):
        raise UnsupportedError(
            f"module has weights besides its query, key, value and out projections (a {type(module).__name__} with "
            f"{len(layers)} linear layers); a single block {_WANTED}"
        )
    return found


def _of_module(module: nn.Module, tokens: torch.Tensor, mask: TokenMask, output: str | None) -> Heads:
    few = tokens[:_COMPARED]
    cases = [(factor * few, *module_outputs(module, factor * few)) for factor in PROBES]
    n, s, d = few.shape
    shape = tuple(cases[0][1].shape)
    kinds = {3: "tokens", 2: "mean"}
    kind = kinds.get(len(shape), "")
    if shape[:-1] not in ((n,), (n, s)) or not kind:
        raise UnsupportedError(f"module gives outputs of shape {shape}; ({n}, c) or ({n}, {s}, c) is wanted")
    if output not in (None, kind):
        raise InvalidInputError(f"output is {output!r}, but the module has outputs of shape {shape}, for {kind!r}")
    for network, c in _candidates(module, d):
        if c == shape[-1] and all(_agrees(network, c, kind, *case) for case in cases):
            return Heads(network, c, tokens, mask, kind)
    raise UnsupportedError(
        f"module gives other outputs than linear attention with its weights; a block {_WANTED}, and no normalisation, "
        "skip connection or mask of its own"
    )


def _candidates(module: nn.Module, d: int) -> Iterator[tuple[TrainedNetwork, int]]:
    """What the block can be: its heads, and the scale of its scores, are not told by the weights."""
    source = f"torch {type(module).__name__}"
    tensors = _tensors(module)
    if tensors is not None:
        first, second, *bias = (as_weights(part, "a parameter of module") for part in tensors)
        for W1, W2 in ((first, second), (second, first)):
            if W1.shape[1:] == (d, d) and W2.shape[:2] == (len(W1), d):
                yield _block(W1, W2, bias[0] if bias else None, d, source)
        return
    layers = _layers(module)
    assert layers is not None
    weights = {kind: as_weights(layer.weight, f"the weight of {kind}") for kind, layer in layers.items()}
    for kind, layer in layers.items():
        if kind != "out" and layer.bias is not None and bool(layer.bias.any()):
            raise UnsupportedError(f"module has a bias in its {kind} projection; projections without one are wanted")
    last = layers["out"].bias
    free = None if last is None else as_weights(last, "the bias of out")
    query, key, value, out = (weights[kind] for kind in _PROJECTIONS)
    if query.shape != key.shape or out.shape[1] != len(value) or {query.shape[1], value.shape[1]} != {d}:
        raise InvalidInputError(
            f"the projections of module have {query.shape[1]} and {value.shape[1]} inputs, and {len(query)}, "
            f"{len(key)} and {len(value)} outputs of query, key and value, of which out takes {out.shape[1]}; as many "
            f"are wanted for query and key, and for value and out, from tokens of {d} features"
        )
    inner = math.gcd(len(query), len(value))
    for m in (m for m in range(1, inner + 1) if inner % m == 0):
        r = len(query) // m
        W1 = query.view(m, r, d).mT @ key.view(m, r, d)
        W2 = value.view(m, -1, d).mT @ out.T.reshape(m, -1, len(out))
        for scale in (1.0, r**-0.5):
            yield _block(scale * W1, W2, free, d, f"{source}, {_PRODUCTS}")


def _agrees(
    network: TrainedNetwork, c: int, output: str, tokens: torch.Tensor, outputs: torch.Tensor, tolerance: float
) -> bool:
    """Whether the outputs of a module are those of a block, up to rounding."""
    bias = torch.zeros(c, dtype=torch.float64) if network.output_bias is None else network.output_bias
    u, v, pooled = network.hidden.T, network.output, output == "mean"
    with torch.no_grad():
        expected = AttentionNetwork(u, v, bias, pooled=pooled)(tokens)
        size = AttentionNetwork(u.abs(), v.abs(), bias.abs(), pooled=pooled)(tokens.abs()).max()
    return bool((outputs - expected).abs().max() <= tolerance * size)
