"""Points of a problem in float64, with their objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY
from cvxnn.errors import InvalidInputError
from cvxnn.norms import VECTOR_NORMS
from cvxnn.problem import Problem

__all__ = ["Evaluation", "as_tensor", "column_penalties", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A point in float64, with its objective."""

    Z: torch.Tensor | None
    factors: tuple[torch.Tensor, torch.Tensor] | None
    intercept: torch.Tensor
    outputs: torch.Tensor
    predictions: torch.Tensor
    loss: float
    penalty: float
    primal: float
    infeasibility: float = 0.0

    def at(self, Z: torch.Tensor | None, factors: tuple[torch.Tensor, torch.Tensor] | None) -> Evaluation:
        """The same for copies of the point, which may be of another type."""
        pair = None if factors is None else (factors[0].double(), factors[1].double())
        return replace(self, Z=None if Z is None else Z.double(), factors=pair)

    def is_feasible(self, problem: Problem) -> bool:
        """Whether this is a point of the problem: any network is, where all neurons are allowed."""
        return self.infeasibility <= FEASIBILITY or problem.scope == "relu_network"


def evaluate(
    problem: Problem, Z: Any = None, *, factors: tuple[Any, Any] | None = None, intercept: Any = None
) -> Evaluation:
    """Objective of a point in float64; parameters and errors as for :func:`cvxnn.certify`.

    For ReLU it is that of the true network, with the activations (X u)_+.
    """
    if (Z is None) == (factors is None):
        raise InvalidInputError("exactly one of Z and factors is wanted")
    op = problem.operator.double()
    blocks = pair = None
    infeasibility = 0.0
    if factors is not None:
        pair = _check_factors(problem, factors)
        columns = Columns.from_factors(*pair)
        outputs = op.network_outputs(columns)
        if problem.cones is not None:
            used = columns.without_zeros()
            infeasibility = float(problem.cones.violation(used.gate, used.u).max()) if len(used) else 0.0
        (penalty,) = op.over_gates(float(column_penalties(problem, pair[0].mT, pair[1].mT).sum()))
    elif problem.cones is not None:
        raise InvalidInputError("Z is given for a ReLU problem; factors=(U, V), whose columns are in cones, are wanted")
    else:
        blocks = op.own_gates(as_tensor(problem, Z, "Z"))
        if tuple(blocks.shape) != op.block_shape:
            raise InvalidInputError(f"Z has shape {tuple(blocks.shape)}; {op.block_shape} is wanted")
        outputs = op.apply(blocks) if op.over_gates(float(blocks.any()))[0] > 0 else torch.zeros_like(problem.Y64)
        (penalty,) = op.over_gates(float(problem.norm.value(blocks)[1].sum()))

    offset = problem.best_intercept(outputs) if intercept is None else as_tensor(problem, intercept, "intercept")
    if offset.shape != outputs.shape[1:]:
        raise InvalidInputError(f"intercept has shape {tuple(offset.shape)}; {tuple(outputs.shape[1:])} is wanted")
    if not problem.output_bias and bool(offset.any()):
        raise InvalidInputError("an intercept is given, but the problem has output_bias=False")
    predictions = outputs + offset
    loss = float(problem.loss.value(predictions, problem.Y64, problem.weights))
    if math.isnan(loss):
        loss = math.inf
    return Evaluation(
        Z=blocks,
        factors=pair,
        intercept=offset,
        outputs=outputs,
        predictions=predictions,
        loss=loss,
        penalty=penalty,
        primal=loss + problem.beta * penalty,
        infeasibility=infeasibility,
    )


def _check_factors(problem: Problem, factors: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    n_gates, p, q = problem.operator.block_shape
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise InvalidInputError("factors is not a pair; (U, V) is wanted")
    given = zip(factors, ("U", "V"), strict=True)
    U, V = (problem.operator.own_gates(as_tensor(problem, part, name)) for part, name in given)
    m = U.shape[-1] if U.ndim == 3 else 0
    if U.shape != (n_gates, p, m) or V.shape != (n_gates, q, m):
        raise InvalidInputError(
            f"factors have shapes {tuple(U.shape)} and {tuple(V.shape)}; "
            f"({n_gates}, {p}, m) and ({n_gates}, {q}, m) are wanted"
        )
    return U, V


def column_penalties(problem: Problem, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """1/2 (||u_j||_C^2 + ||v_j||_R^2) of each column, the penalty of (14)."""
    left = VECTOR_NORMS[problem.norm.left].value(u)
    right = VECTOR_NORMS[problem.norm.right].value(v)
    return (left.square() + right.square()) / 2


def as_tensor(problem: Problem, value: Any, name: str) -> torch.Tensor:
    """What a user gave, in float64 on the device of the problem, if it is finite."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=problem.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name} cannot be read as an array of numbers: {error}") from error
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidInputError(f"{name} contains NaN or infinity; finite numbers are wanted")
    return tensor
