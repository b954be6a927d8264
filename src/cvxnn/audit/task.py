"""The training problem that a network is judged by: data, loss and penalty, and points of it."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils import skip_init

from cvxnn.audit.weights import TrainedNetwork
from cvxnn.columns import Columns
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.networks import AttentionNetwork, TwoLayerNetwork
from cvxnn.patterns import activation_patterns
from cvxnn.problem import Problem
from cvxnn.problems import mlp_problem

__all__ = ["Point", "Task", "first_point", "make_task"]

#: Steps of Newton's method for a penalised output bias.
_NEWTON_STEPS = 50


@dataclass(frozen=True, eq=False)
class Point:
    """Neurons (u_j, v_j) and an output bias.

    Attributes
    ----------
    columns : Columns
        u (m, d), a hidden bias in its last column, v (m, c), and the gates of a gated network.
    bias : torch.Tensor of shape (c,)
    """

    columns: Columns
    bias: torch.Tensor

    def __len__(self) -> int:
        return len(self.columns)

    def with_neuron(self, gate: int, u: torch.Tensor, v: torch.Tensor) -> Point:
        """The point with one more neuron."""
        fresh = Columns(self.columns.gate.new_tensor([gate]), u.unsqueeze(0), v.unsqueeze(0))
        return Point(Columns.joined(self.columns, fresh), self.bias)


@dataclass(frozen=True)
class Value:
    """Objective of a point: the loss, and beta times the penalty."""

    loss: float
    penalty: float
    objective: float


@dataclass(frozen=True, eq=False)
class Task:
    """minimise F(act(X U) V + 1 b^T) + beta/2 (||U||^2 + ||V||^2), with beta/2 ||b||^2 where b is penalised.

    Attributes
    ----------
    activation : {"relu", "linear", "gated_relu"}
    X : torch.Tensor of shape (n, d), float64
        With the column of ones of a hidden bias.
    Y : torch.Tensor of shape (n, c), float64
    gates : torch.Tensor of shape (d, P) or None
        Of a gated network, the first `n_own_gates` its own; `gates_scope` is the scope of all.
    penalised_bias : bool
        Whether an output bias is penalised. Problems then leave its penalty out, which only lowers their optimum.
    """

    activation: str
    X: torch.Tensor
    Y: torch.Tensor
    loss: Any
    beta: float
    reduction: str
    hidden_bias: bool
    output_bias: bool
    penalised_bias: bool
    gates: torch.Tensor | None = None
    n_own_gates: int = 0
    gates_scope: str = "given_gates"

    architecture: ClassVar[str] = "mlp"

    @property
    def n_features(self) -> int:
        """Features of a sample (of a token), without a hidden bias."""
        return self.X.shape[-1] - self.hidden_bias

    @property
    def n_outputs(self) -> int:
        """Outputs c."""
        return self.Y.shape[-1]

    @cached_property
    def base(self) -> Problem:
        """The linear problem of the same data, for what does not depend on the activation."""
        return self._problem("linear")

    @cached_property
    def enumerated(self) -> Problem:
        """The problem with all patterns of the data."""
        return self._problem(self.activation, gates="enumerate")

    def problem(self, gates: torch.Tensor, scope: str) -> Problem:
        """The problem with given gates (d, P)."""
        return self._problem(self.activation, gates=gates.numpy()).with_scope(scope)

    def _problem(self, activation: str, **options: Any) -> Problem:
        return mlp_problem(
            self.X,
            self.Y,
            activation=activation,
            beta=self.beta,
            loss=self.loss,
            reduction=self.reduction,
            output_bias=self.output_bias,
            **options,
        )

    @property
    def informative(self) -> np.ndarray:
        """Rows of X that are not zero: the others are active for every gate, and tell none apart."""
        return self.X.any(dim=1).numpy()

    @cached_property
    def bits(self) -> torch.Tensor | None:
        """Patterns (n, P) of the gates of a gated network."""
        if self.gates is None:
            return None
        return torch.from_numpy(activation_patterns(self.X.numpy(), self.gates.numpy()))

    def hidden(self, columns: Columns) -> torch.Tensor:
        """Hidden outputs (n, m w), those of a neuron side by side; w is 1, and d for the heads of attention."""
        values = self.X @ columns.u.T
        if self.activation == "relu":
            return values.clamp_min(0)
        return values if self.bits is None else values * self.bits[:, columns.gate]

    def outputs(self, point: Point) -> torch.Tensor:
        """Predictions (n, c)."""
        return self.hidden(point.columns) @ self.split_right(point.columns.v) + point.bias

    def split_right(self, v: torch.Tensor) -> torch.Tensor:
        """v of neurons as the weights (m w, c) of their hidden outputs."""
        return self.base.operator.split_right(v)

    def live(self, columns: Columns) -> torch.Tensor:
        """Whether each neuron does anything on the data, (m,) bool."""
        return self.hidden(columns).any(dim=0).view(len(columns), -1).any(dim=1)

    def loss_value(self, outputs: torch.Tensor) -> float:
        """F."""
        return float(self.base.loss.value(outputs, self.base.Y64, self.base.weights))

    def gradient(self, outputs: torch.Tensor) -> torch.Tensor:
        """Gradient of F (n, c)."""
        return self.base.loss.gradient(outputs, self.base.Y64, self.base.weights)

    def value(self, point: Point) -> Value:
        """Objective of a point, as its weights are."""
        columns = point.columns
        penalty = float(columns.u.square().sum() + columns.v.square().sum()) / 2
        penalty += self.bias_penalty(point)
        loss = self.loss_value(self.outputs(point))
        return Value(loss, penalty, loss + self.beta * penalty)

    def bias_penalty(self, point: Point) -> float:
        """1/2 ||b||^2 where the output bias is penalised."""
        return float(point.bias.square().sum()) / 2 if self.penalised_bias else 0.0

    def with_best_bias(self, point: Point) -> Point:
        """The point with the output bias that is best for its neurons, if that is better than its own."""
        if not self.output_bias:
            return point
        outputs = self.outputs(dataclasses.replace(point, bias=torch.zeros_like(point.bias)))
        bias = self._penalised_bias(outputs) if self.penalised_bias else self.base.best_intercept(outputs)
        other = dataclasses.replace(point, bias=bias)
        return other if self.value(other).objective < self.value(point).objective else point

    def _penalised_bias(self, outputs: torch.Tensor) -> torch.Tensor:
        """Minimiser over b of F(outputs + 1 b^T) + beta/2 ||b||^2, by Newton's method."""
        loss, Y, w = self.base.loss, self.base.Y64, self.base.weights
        c = outputs.shape[1]
        bias = outputs.new_zeros(c)
        eye = torch.eye(c, dtype=outputs.dtype)
        for _ in range(_NEWTON_STEPS):
            slope = loss.gradient(outputs + bias, Y, w).sum(0) + self.beta * bias
            directions = eye.unsqueeze(1).expand(c, len(outputs), c)
            hessian = loss.hessian_product(outputs + bias, Y, w, directions).sum(1) + self.beta * eye
            step = torch.linalg.solve(hessian, slope)
            bias = bias - step
            if float(step.norm()) <= 1e-14 * (1 + float(bias.norm())):
                break
        return bias

    def weights_of(self, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float | None]:
        """The weights of the two sides of a neuron as users know them, and its hidden bias."""
        return u[: self.n_features].clone(), v, float(u[-1]) if self.hidden_bias else None

    def module(self, point: Point, dtype: torch.dtype) -> nn.Module:
        """The network of a point: linear layers of torch where there are no gates."""
        u, v = point.columns.u.to(dtype), point.columns.v.to(dtype)
        if self.gates is not None:
            gates, index = self.gates.clone(), point.columns.gate.clone()
            return TwoLayerNetwork(u.T, v, point.bias.to(dtype), gates, index, self.hidden_bias, self.X.dtype)
        with warnings.catch_warnings():
            # torch warns of layers without neurons.
            warnings.simplefilter("ignore", UserWarning)
            first = skip_init(nn.Linear, self.n_features, len(u), bias=self.hidden_bias, dtype=dtype)
            second = skip_init(nn.Linear, len(u), v.shape[1], bias=self.output_bias, dtype=dtype)
        with torch.no_grad():
            first.weight.copy_(u[:, : self.n_features])
            second.weight.copy_(v.T)
            if self.hidden_bias:
                first.bias.copy_(u[:, -1])
            if self.output_bias:
                second.bias.copy_(point.bias)
        layers = [first, nn.ReLU(), second] if self.activation == "relu" else [first, second]
        return nn.Sequential(*layers)

    def point_of(self, network: TwoLayerNetwork | AttentionNetwork) -> Point:
        """Neurons of a network that a solver returned."""
        index = network.gate_index
        gate = torch.zeros(network.hidden.shape[1], dtype=torch.long) if index is None else index
        columns = Columns(gate, network.hidden.detach().double().T.contiguous(), network.output.detach().double())
        return Point(columns, network.bias.detach().double())


def make_task(
    network: TrainedNetwork,
    X: torch.Tensor,
    Y: torch.Tensor,
    *,
    beta: float,
    loss: Any,
    reduction: str,
    penalize_biases: bool,
) -> Task:
    """The task of a network.

    Raises
    ------
    UnsupportedError
        A hidden bias that is not penalised.
    """
    constant = network.hidden_bias
    hidden_bias = constant is not None and (network.own or penalize_biases)
    if constant is not None and not hidden_bias and bool(constant.any()):
        raise UnsupportedError(
            "module has a hidden bias and penalize_biases is False: with a bias free of charge the dual norm over its "
            "neurons has no bound here, so that nothing can be certified; train with weight decay on the biases and "
            "give penalize_biases=True, or use bias=False in the first layer"
        )
    output_bias = network.output_bias is not None
    return Task(
        activation=network.activation,
        X=torch.cat([X, torch.ones_like(X[:, :1])], dim=1) if hidden_bias else X,
        Y=Y,
        loss=loss,
        beta=beta,
        reduction=reduction,
        hidden_bias=hidden_bias,
        output_bias=output_bias,
        penalised_bias=output_bias and penalize_biases,
        gates=network.gates,
        n_own_gates=0 if network.gates is None else network.gates.shape[1],
    )


def first_point(task: Task, network: TrainedNetwork) -> Point:
    """The network as a point of its task.

    Raises
    ------
    InvalidInputError
        Its predictions or weights are so large that the objective overflows.
    """
    u = network.hidden
    if task.hidden_bias and network.hidden_bias is not None:
        u = torch.cat([u, network.hidden_bias.unsqueeze(1)], dim=1)
    gate = torch.zeros(len(u), dtype=torch.long) if network.gate_index is None else network.gate_index
    bias = network.output_bias
    zero = network.output.new_zeros(task.n_outputs)
    point = Point(Columns(gate, u, network.output), zero if bias is None or not task.output_bias else bias)
    if not np.isfinite(task.value(point).objective):
        raise InvalidInputError("module has weights whose objective overflows; smaller weights are wanted")
    return point
