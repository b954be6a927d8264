"""Deliberate mistakes, to see that they are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from cvxnn import bounds, certificates, dual_norms, evaluation
from cvxnn.cones import ConeDual, Cones, cones
from cvxnn.cones import cone_dual_norms as exact_dual_norms
from cvxnn.cones.caps import bounding_caps
from cvxnn.cones.projection import Projection
from cvxnn.losses import LOSSES
from cvxnn.norms import MatrixNorm
from cvxnn.operators import CNNOperator, MLPOperator

__all__ = ["RELU_TAMPERINGS", "TAMPERINGS", "tampered"]

TAMPERINGS = ("dual_norm", "intercept", "cnn_pooling")
RELU_TAMPERINGS = ("witness", "projection", "caps", "feasibility", "cone_model", "one_sign")


@contextmanager
def tampered(kind: str | None) -> Iterator[None]:
    """Within it certificates are wrong.

    "dual_norm" is 0.1% small, or 1^T nu = 0 of an "intercept" is forgotten; "cnn_pooling" forgets the last cell of a
    CNN in the adjoint. For ReLU: the upper bound of a dual norm is
    the value at a "witness", the one from the leading singular vector; the "projection" onto a cone is one sweep over
    its half-spaces; the angles of "caps" are halved; "feasibility" is taken for granted up to 1e-3; the primal value is
    that of the "cone_model" D X u; the maximum of ||G^T u|| is over the "one_sign" u^T G >= 0 only (c = 1).
    """
    with ExitStack() as stack:
        if kind == "dual_norm":
            stack.enter_context(mock.patch.object(MatrixNorm, "dual", _small(MatrixNorm.dual)))
        elif kind == "intercept":
            for loss in LOSSES.values():
                stack.enter_context(mock.patch.object(loss, "center_dual", _not_centered))
            stack.enter_context(mock.patch.object(bounds, "intercept_leak", _no_leak))
        elif kind == "cnn_pooling":
            stack.enter_context(mock.patch.object(CNNOperator, "adjoint", _without_last_cell(CNNOperator.adjoint)))
        elif kind in ("witness", "one_sign"):
            wrong = _at_witness if kind == "witness" else _one_sign
            stack.enter_context(mock.patch.object(dual_norms, "cone_dual_norms", wrong))
        elif kind == "projection":
            stack.enter_context(mock.patch.object(Cones, "project", _one_sweep))
        elif kind == "caps":
            stack.enter_context(mock.patch.object(cones, "bounding_caps", _narrow_caps))
        elif kind == "feasibility":
            for module in (certificates, evaluation):
                stack.enter_context(mock.patch.object(module, "FEASIBILITY", 1e-3))
        elif kind == "cone_model":
            stack.enter_context(mock.patch.object(MLPOperator, "network_outputs", MLPOperator.apply_columns))
        elif kind is not None:
            raise ValueError(f"kind is {kind!r}; one of {TAMPERINGS + RELU_TAMPERINGS} is wanted")
        yield


def _small(dual: Any) -> Any:
    def tampered_dual(self: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lower, upper = dual(self, *args)
        return 0.999 * lower, 0.999 * upper

    return tampered_dual


def _without_last_cell(adjoint: Any) -> Any:
    def tampered_adjoint(self: CNNOperator, L: torch.Tensor) -> torch.Tensor:
        G = adjoint(self, L).clone()
        G[:, :, self.width - 1 :: self.width] = 0
        return G

    return tampered_adjoint


def _not_centered(self: Any, nu: torch.Tensor, Y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return nu


def _no_leak(problem: Any, nu: torch.Tensor) -> tuple[float, float]:
    """`intercept_leak` that allows nothing for column sums other than zero."""
    return 0.0, 0.0


def _at_witness(cones: Cones, gate: torch.Tensor, G: torch.Tensor, *arguments: Any, **options: Any) -> ConeDual:
    """Bounds, both at the projection of the leading left singular vector, times its singular value."""
    found = exact_dual_norms(cones, gate, G, *arguments, **options)
    left, values, _ = torch.linalg.svd(G, full_matrices=False)
    u = cones.project(gate, left[:, :, 0] * values[:, :1]).point
    u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-300)
    value = torch.einsum("bdc,bd->bc", G, u).norm(dim=1)
    return replace(found, lower=torch.minimum(found.lower, value), upper=value)


def _one_sign(cones: Cones, gate: torch.Tensor, G: torch.Tensor, *arguments: Any, **options: Any) -> ConeDual:
    """Bounds of the largest G . u for c = 1, in place of |G . u|."""
    found = exact_dual_norms(cones, gate, G, *arguments, **options)
    if G.shape[2] > 1:
        return found
    upper = cones.project(gate, G[:, :, 0]).point.norm(dim=1) * (1 + 1e-12)
    return replace(found, lower=torch.minimum(found.lower, upper), upper=upper)


def _one_sweep(self: Cones, gate: torch.Tensor, z: torch.Tensor, start: Projection | None = None) -> Projection:
    """Projections onto one half-space after another, once; what was added counts as K^T lambda."""
    signs, point = self.signs(gate), z.double().clone()
    for i, row in enumerate(self.rows):
        normal = signs[:, i : i + 1] * row
        point -= (point * normal).sum(1, keepdim=True).clamp_max(0) * normal
    width = min(self.rows.shape[1], len(self.rows))
    index = torch.full((len(gate), width), -1, dtype=torch.long)
    return Projection(point, index, torch.zeros(len(gate), width, dtype=torch.float64), point - z)


def _narrow_caps(*arguments: Any) -> Any:
    """Caps of half the angle."""
    caps = bounding_caps(*arguments)
    return None if caps is None else replace(caps, angle=caps.angle / 2)
