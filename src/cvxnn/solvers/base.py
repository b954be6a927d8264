"""What a solver is: start, step, and the point it stands at. The driver owns the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from cvxnn.errors import InvalidInputError
from cvxnn.problem import Problem

__all__ = ["Iterate", "Solver", "make_options"]


@dataclass
class Iterate:
    """A point, and the dual candidate that the solver has with it.

    `Z` of shape (P, p, q); `intercept` (c,) or None to have it minimised out; `dual` (n, c) or None.
    `factors` (U, V) stand for the point where they show a smaller penalty than a bound of the norm of Z.
    """

    Z: torch.Tensor
    intercept: torch.Tensor | None = None
    dual: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None


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
    check_every : int
        Iterations between two certificates (they get rarer in long runs).
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    default_max_iter: ClassVar[int] = 10_000
    check_every: ClassVar[int] = 10

    def __init__(self, problem: Problem, options: Any, tol: float, time_limit: float | None) -> None:
        self.problem = problem
        self.options = options
        self.tol = tol
        self.time_limit = time_limit
        #: Set by a solver that cannot improve its point any more.
        self.finished = False

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
        """The current point; called only when it is to be certified."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`load_state` goes on to the same result."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""


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
