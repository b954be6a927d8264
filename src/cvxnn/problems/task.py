"""What the problems of all architectures share: targets, loss, penalty, weights, types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvxnn.distributed import Group, current_group
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.losses import Loss, get_loss
from cvxnn.norms import MatrixNorm, get_norm
from cvxnn.operators import GateShardedOperator, Operator, ShardedOperator
from cvxnn.patterns import Coverage
from cvxnn.problem import Problem
from cvxnn.validation import (
    check_choice,
    check_flag,
    check_positive,
    check_range,
    check_sample_weight,
    encode_targets,
    resolve_device,
    resolve_dtype,
)

__all__ = ["ACTIVATIONS", "Task", "read_task"]

ACTIVATIONS = ("linear", "gated_relu", "relu")


@dataclass
class Task:
    """A problem without its data and gates, checked."""

    activation: str
    beta: float
    loss: Loss
    norm: MatrixNorm
    reduction: str
    hidden_bias: bool
    output_bias: bool
    dtype: torch.dtype
    device: torch.device
    Y: Any
    sample_weight: Any

    def check_samples(self, n: int, rows: np.ndarray | None = None) -> None:
        """Read targets and weights for n samples; with `rows`, (r,), targets are those of r parts of the samples."""
        targets, self.classes = encode_targets(self.Y, n if rows is None else len(rows))
        weights = check_sample_weight(self.sample_weight, n)
        self._total = weights.sum()
        self.sample_weight = weights if rows is None else weights[rows]
        self.Y = torch.tensor(targets, dtype=self.dtype)
        check_range(self.Y, "Y", least=1e-145)
        self.loss.check_targets(self.Y)

    @property
    def n_outputs(self) -> int:
        """Number of outputs c."""
        return self.Y.shape[1]

    def gated(self, gates: Any) -> bool:
        """Whether there are gates; a linear network that is given some is refused."""
        if self.activation != "linear":
            return True
        if gates is not None:
            raise InvalidInputError("gates are given but activation is 'linear', which has none; leave gates=None")
        return False

    def problem(self, operator: Operator, scope: str, coverage: Coverage | None = None) -> Problem:
        """The problem of an operator on the samples; within :func:`cvxnn.distributed.start` they are shared out."""
        group = current_group()
        if group is not None and self.activation == "relu":
            raise UnsupportedError(f"activation is 'relu', whose cones need the {group.shard} of all processes in one")
        if group is not None and operator.group is None:
            operator = _shared_out(operator, group)
        total = self._total if self.reduction == "mean" else 1.0
        return Problem(
            operator,
            self.Y.to(self.device),
            loss=self.loss,
            norm=self.norm,
            beta=self.beta,
            weights=torch.from_numpy(self.sample_weight / total).to(self.device),
            reduction=self.reduction,
            scope=scope,
            output_bias=self.output_bias,
            hidden_bias=self.hidden_bias,
            classes=self.classes,
            coverage=coverage,
        )


def _shared_out(operator: Operator, group: Group) -> Operator:
    """What a process keeps of an operator: some of the samples, or of the gates."""
    if operator.gates is not None:
        group.check_agreement(float(operator.gates.sum()), float(np.square(operator.gates).sum()))
    if group.shard == "samples":
        return ShardedOperator(operator.part(group.share(operator.n_samples)), group, operator.n_samples)
    if operator.gates is None:
        raise UnsupportedError("activation is 'linear', which has no gates to share out; shard='samples' is wanted")
    chosen = torch.arange(operator.n_gates, device=operator.device)[group.share(operator.n_gates, "gates")]
    return GateShardedOperator(operator.select(chosen), group, operator.gates, operator.n_gates)


def read_task(
    Y: Any,
    activation: str,
    beta: float,
    loss: str | Loss,
    reduction: str,
    norms: tuple[str, str],
    sample_weight: Any,
    hidden_bias: bool,
    output_bias: bool,
    dtype: Any,
    device: Any,
) -> Task:
    """Check what does not depend on the data; parameters and errors as for :func:`cvxnn.mlp_problem`."""
    check_choice(activation, "activation", ACTIVATIONS)
    check_choice(reduction, "reduction", ("mean", "sum"))
    hidden_bias, output_bias = check_flag(hidden_bias, "hidden_bias"), check_flag(output_bias, "output_bias")
    beta = check_positive(beta, "beta")
    norm = get_norm(norms)
    if activation == "relu" and norm.name != "nuclear":
        raise UnsupportedError(f"norms is {tuple(norms)!r}; ReLU problems are there for ('l2', 'l2') only")
    return Task(
        activation,
        beta,
        get_loss(loss),
        norm,
        reduction,
        hidden_bias,
        output_bias,
        resolve_dtype(dtype),
        resolve_device(device),
        Y,
        sample_weight,
    )
