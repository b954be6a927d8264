"""What `solve` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cvxnn.certificates import Certificate
from cvxnn.networks import Network, build_network
from cvxnn.problem import Problem

__all__ = ["Result"]


@dataclass
class Result:
    """The best point found, why the solver stopped, and the certificate of exactly this point.

    Attributes
    ----------
    problem : Problem
    solver : str
    status : {"certified", "stationary", "max_iter", "time_limit", "diverged", "interrupted"}
    n_iter : int
    seconds : float
        Wall-clock time, set-up and certificates included.
    trace : list of dict
        Per certificate: iteration, seconds, primal, lower_bound, relative_gap (best so far).
    Z : torch.Tensor of shape (P, p, q) or None
        None from the Burer-Monteiro solvers, which never form it.
    factors : pair of torch.Tensor or None
        (U, V) of shapes (P, p, m) and (P, q, m), with zero columns where a gate has fewer than m neurons.
        They are there where the point is known through them; the certificate is then that of (14).
    intercept : torch.Tensor of shape (c,)
        The unpenalised output bias; zeros without one.
    dual : torch.Tensor of shape (n, c)
        The dual point that proves ``certificate.lower_bound``:
        ``certify(problem, Z=result.Z, intercept=result.intercept, dual=result.dual)`` repeats the proof, and
        for a result with factors ``certify(problem, factors=result.factors, intercept=..., dual=...)``.
    message : str
        For a point that is stationary above the tolerance: what holds it there, where that is known.
    certificate : Certificate
    """

    problem: Problem
    solver: str
    status: str
    n_iter: int
    seconds: float
    certificate: Certificate
    Z: torch.Tensor | None
    intercept: torch.Tensor
    dual: torch.Tensor | None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    message: str = ""

    @property
    def objective(self) -> float:
        """The objective of the returned point, ``certificate.primal``."""
        return self.certificate.primal

    def network(self, dtype: torch.dtype | None = None) -> Network:
        """The trained network as a module that predicts on new data.

        Its neurons are the factors where the result has them, and otherwise those that the norm of Z is the
        cost of: the penalty (14) of the network is ``certificate.penalty``. It can be larger only for blocks
        given as `init` and not improved, with an l-infinity side and no l1 side.

        Parameters
        ----------
        dtype : torch.dtype, optional
            Type of its weights; by default that of the problem.
        """
        return build_network(self.problem, self.Z, self.intercept, factors=self.factors, dtype=dtype)

    def __repr__(self) -> str:
        return (
            f"Result(solver={self.solver!r}, status={self.status!r}, objective={self.objective:.8g}, "
            f"relative_gap={self.certificate.relative_gap:.2e}, n_iter={self.n_iter}, "
            f"seconds={self.seconds:.3g})"
        )
