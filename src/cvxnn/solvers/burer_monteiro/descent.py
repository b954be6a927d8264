"""L-BFGS on a local problem that goes on where it stopped, in whitened variables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from cvxnn.solvers.burer_monteiro.grams import WhitenedGrams
from cvxnn.solvers.burer_monteiro.local import LocalProblem

__all__ = ["QuasiNewton"]

#: The objective as L-BFGS sees it at the start.
_SCALE = 1e8


class QuasiNewton:
    """L-BFGS with strong Wolfe line search (torch) on the variables of a local problem.

    Parameters
    ----------
    local : LocalProblem
    parts : list of torch.Tensor
        Start.
    grams : WhitenedGrams or None
        Where given, the variables are z = (X^T D_k W D_k X + beta I)^(1/2) u in place of u.
    history : int
        Number of pairs that approximate the Hessian; they are kept from call to call of :meth:`run`.
    """

    def __init__(
        self, local: LocalProblem, parts: Sequence[torch.Tensor], grams: WhitenedGrams | None, history: int
    ) -> None:
        self.local = local
        self.white = None if grams is None else grams.columns(local.gate, torch.ones_like(parts[0][:, 0]))
        first = parts[0] if self.white is None else self.white.power(parts[0], local.beta, 0.5)
        self.variables = [part.clone().requires_grad_() for part in (first, *parts[1:])]
        self.optimizer = torch.optim.LBFGS(
            self.variables, history_size=history, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
        )
        self.value = float("inf")
        #: torch refuses pairs whose product is below 1e-10 in absolute terms: the objective is scaled up.
        self.scale = _SCALE / max(abs(local.evaluate(self.parts())[0]), 1e-300)

    def parts(self) -> list[torch.Tensor]:
        """The variables of the local problem."""
        first, *others = (part.detach() for part in self.variables)
        return [first if self.white is None else self.white.power(first, self.local.beta, -0.5), *others]

    def _closure(self) -> float:
        with torch.no_grad():
            self.value, slopes = self.local.evaluate(self.parts())
            if self.white is not None:
                slopes[0] = self.white.power(slopes[0], self.local.beta, -0.5)
            for variable, slope in zip(self.variables, slopes, strict=True):
                variable.grad = self.scale * slope
        return self.scale * self.value

    def run(self, limit: int, deadline: float | None) -> bool:
        """At most `limit` iterations, in runs of ten up to the deadline; False if no step was possible."""
        before = [part.detach().clone() for part in self.variables]
        for start in range(0, limit, 10):
            group = self.optimizer.param_groups[0]
            group["max_iter"] = min(10, limit - start)
            group["max_eval"] = 10 * group["max_iter"]
            self.optimizer.step(self._closure)
            if deadline is not None and time.perf_counter() >= deadline:
                break
        return any(bool((part != old).any()) for part, old in zip(self.variables, before, strict=True))

    def state(self) -> dict[str, Any]:
        """The variables and what approximates the Hessian."""
        memory = dict(self.optimizer.state[self.variables[0]])
        state = {f"lbfgs.x{i}": part.detach().clone() for i, part in enumerate(self.variables)}
        for name in ("old_dirs", "old_stps", "ro"):
            if memory.get(name):
                state[f"lbfgs.{name}"] = torch.stack([torch.as_tensor(entry) for entry in memory[name]])
        for name in ("d", "prev_flat_grad"):
            if memory.get(name) is not None:
                state[f"lbfgs.{name}"] = memory[name].clone()
        numbers = {name: float(memory[name]) for name in ("t", "H_diag", "prev_loss") if name in memory}
        numbers["scale"] = self.scale
        numbers |= {name: int(memory[name]) for name in ("n_iter", "func_evals") if name in memory}
        return state | {"lbfgs.numbers": numbers}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        with torch.no_grad():
            for i, part in enumerate(self.variables):
                part.copy_(state[f"lbfgs.x{i}"])
        memory = self.optimizer.state[self.variables[0]]
        numbers = dict(state["lbfgs.numbers"])
        self.scale = numbers.pop("scale")
        if not numbers:
            return
        memory.update(numbers)
        for name in ("old_dirs", "old_stps", "ro"):
            memory[name] = list(state.get(f"lbfgs.{name}", ()))
        for name in ("d", "prev_flat_grad"):
            if f"lbfgs.{name}" in state:
                memory[name] = state[f"lbfgs.{name}"]
