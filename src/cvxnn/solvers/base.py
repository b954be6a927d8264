"""What a solver is: start, step, and the point it stands at. The driver owns the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from cvxnn.certificates import Certificate
from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem
from cvxnn.validation import check_positive

__all__ = ["ILL_CONDITIONED", "UNEVEN_DATA", "Iterate", "Solver", "check_relaxation", "make_options"]

#: Largest eigenvalue of A A* over the penalty of ADMM from which its steps are inexact in float64.
ILL_CONDITIONED = 1e13
#: What a run that ends there says.
UNEVEN_DATA = (
    "rounding errors limit the steps: columns of X differ by too much in size for this beta, as tiny ones beside a "
    "column of ones do; rescale them"
)


@dataclass
class Iterate:
    """A point, and the dual candidate that the solver has with it.

    `Z` of shape (P, p, q), or None where only `factors` (U, V) are there; `intercept` (c,) or None to have it
    minimised out; `dual` (n, c) or None. Where there are factors, their penalty (14) counts.
    """

    Z: torch.Tensor | None
    intercept: torch.Tensor | None = None
    dual: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def blocks(self) -> torch.Tensor:
        """Z, for solvers that work on it."""
        if self.Z is None:
            raise InvalidInputError("the point has no blocks Z")
        return self.Z


@dataclass(frozen=True)
class NoOptions:
    """For solvers without options."""


class Solver(ABC):
    """One method of minimisation on one problem.

    Class attributes
    ----------------
    name : str
    Options : type
        A frozen dataclass; its fields are what ``solver_options`` may contain.
    default_max_iter : int
    factored : bool
        Whether its points are Burer-Monteiro factors; the blocks Z are then never formed.
    check_every : int
        Iterations between two certificates (they get rarer in long runs).
    cones : bool
        Whether it keeps the columns of ReLU problems in their cones.
    sharded : bool
        Whether it runs on samples that are shared out to processes.
    shares_gates : bool
        Whether it runs on gates that are shared out to processes.
    per_gate : tuple of str
        The tensors of its state whose rows are those of the gates.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    default_max_iter: ClassVar[int] = 10_000
    factored: ClassVar[bool] = False
    check_every: int = 10
    cones: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    shares_gates: ClassVar[bool] = False
    per_gate: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        problem: Problem,
        options: Any,
        tol: float,
        time_limit: float | None,
        rank: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.rank = rank
        self.random_state = random_state
        self.problem = problem
        self.options = options
        self.tol = tol
        self.time_limit = time_limit
        #: What does not depend on beta and is shared with the runs of a path that follow.
        self.kept: dict[str, Any] = {}
        #: Set by a solver that cannot improve its point any more.
        self.finished = False

    def zero(self) -> Iterate:
        """The point Z = 0; for ReLU problems, which are certified from factors, one zero column per gate."""
        n_gates, p, q = self.problem.operator.block_shape
        like = self.problem.Y
        if self.problem.cones is not None:
            return Iterate(None, factors=(like.new_zeros(n_gates, p, 1), like.new_zeros(n_gates, q, 1)))
        return Iterate(like.new_zeros(n_gates, p, q))

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        """What this solver lacks for the problem, or None if it can serve it."""
        return None

    @abstractmethod
    def start(self, point: Iterate | None) -> None:
        """Prepare, from zero or from a given point."""

    @abstractmethod
    def step(self) -> None:
        """Do one iteration."""

    @abstractmethod
    def iterate(self) -> Iterate:
        """The current point; called only when it is to be certified. A solver may look for a better one, and change."""

    def estimated_gap(self) -> float | None:
        """About the relative gap that a certificate would find, where that takes long; None where it does not."""
        return None

    def run_facts(self) -> list[Any]:
        """What else determines the run, for the fingerprint of a checkpoint."""
        return []

    def facts(self) -> dict[str, Any]:
        """More that an entry of the trace should hold."""
        return {}

    def limited_by_rounding(self) -> bool:
        """Whether rounding errors may be what keeps the gap from falling: a run that stands still is then ended."""
        return self.problem.dtype == torch.float32

    def message(self, certificate: Certificate) -> str:
        """What a user should know about a run that ended at a stationary point above the tolerance."""
        if self.problem.dtype != torch.float32:
            return ""
        return "rounding errors of float32 keep the gap from falling; dtype='float64' goes further"

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`load_state` goes on to the same result."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""


def check_relaxation(value: Any) -> None:
    """Refuse an over-relaxation that is no number in (0, 2)."""
    if not check_positive(value, "relaxation") < 2:
        raise InvalidInputError(f"relaxation is {value!r}; a number between 0 and 2 is wanted")


def make_options(solver: type[Solver], given: dict[str, Any] | None) -> Any:
    """Build the options of a solver; an unknown name is an error that lists the known ones."""
    if given is not None and not isinstance(given, dict):
        raise InvalidInputError(f"solver_options is a {type(given).__name__}; a dict or None is wanted")
    names = [field.name for field in fields(solver.Options)]
    for name in given or {}:
        if name not in names:
            known = ", ".join(names) if names else "none"
            raise InvalidInputError(
                f"solver_options has {name!r}, which {solver.name!r} does not know; known options: {known}"
            )
    return solver.Options(**(given or {}))
