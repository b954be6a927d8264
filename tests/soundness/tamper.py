"""Deliberate mistakes in the certificates, to see that they are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from cvxnn import bounds
from cvxnn.losses import LOSSES
from cvxnn.norms import MatrixNorm

__all__ = ["TAMPERINGS", "tampered"]

TAMPERINGS = ("dual_norm", "intercept")


@contextmanager
def tampered(kind: str | None) -> Iterator[None]:
    """Within it certificates are wrong: "dual_norm" is 0.1% small, or 1^T nu = 0 of an "intercept" is forgotten."""
    with ExitStack() as stack:
        if kind == "dual_norm":
            stack.enter_context(mock.patch.object(MatrixNorm, "dual", _small(MatrixNorm.dual)))
        elif kind == "intercept":
            for loss in LOSSES.values():
                stack.enter_context(mock.patch.object(loss, "center_dual", _not_centered))
            stack.enter_context(mock.patch.object(bounds, "intercept_leak", _no_leak))
        elif kind is not None:
            raise ValueError(f"kind is {kind!r}; one of {TAMPERINGS} is wanted")
        yield


def _small(dual: Any) -> Any:
    def tampered_dual(self: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lower, upper = dual(self, *args)
        return 0.999 * lower, 0.999 * upper

    return tampered_dual


def _not_centered(self: Any, nu: torch.Tensor, Y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return nu


def _no_leak(problem: Any, nu: torch.Tensor) -> tuple[float, float]:
    """`intercept_leak` that allows nothing for column sums other than zero."""
    return 0.0, 0.0
