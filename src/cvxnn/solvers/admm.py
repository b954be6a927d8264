"""ADMM with a kernel (math section 5): the ill-conditioning of A is solved away by one factorisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cvxnn.certificates import Certificate, relative_gap
from cvxnn.errors import UnsupportedError
from cvxnn.problem import Problem
from cvxnn.solvers.anderson import Anderson
from cvxnn.solvers.base import ILL_CONDITIONED, UNEVEN_DATA, Iterate, Solver, check_relaxation
from cvxnn.solvers.iterative_ridge import IterativeRidge
from cvxnn.solvers.looks import Looks
from cvxnn.solvers.penalties import balance, tolerated_imbalance
from cvxnn.solvers.ridge import FeatureRidge, Ridge
from cvxnn.solvers.sides import SIDES, choose_side, factor_bytes, fits, make_ridge
from cvxnn.validation import check_choice, check_flag, check_integer, check_positive

__all__ = ["Admm", "AdmmOptions"]

#: What the acceleration has of blocks and of predictions, in states.
_OF_BLOCKS, _OF_OUTPUTS = "anderson.blocks.", "anderson.outputs."
#: A penalty between this times the one wanted and one over this serves where it is factored for.
_NEAR = 0.6


@dataclass(frozen=True)
class AdmmOptions:
    """Options of ``admm``.

    Attributes
    ----------
    relaxation : float
        Over-relaxation, in (0, 2).
    rho : float or None
        First penalty of Z = W; None estimates it.
    adapt : bool
        Balance the primal and dual residuals by changing the penalties.
    memory : int
        Length of the Anderson acceleration; 0 for plain ADMM.
    side : {"auto", "samples", "features", "iterative"}
        Factor the n x n kernel or the (P p) x (P p) Gram matrix, or solve with the kernel by conjugate gradients,
        which forms neither. "auto" counts operations, and takes the last where the matrices do not fit in memory.
    """

    relaxation: float = 1.7
    rho: float | None = None
    adapt: bool = True
    memory: int = 10
    side: str = "auto"
    sides: ClassVar[tuple[str, ...]] = SIDES

    def __post_init__(self) -> None:
        check_positive(self.rho, "rho", allow_none=True)
        check_integer(self.memory, "memory", minimum=0)
        check_choice(self.side, "side", ("auto", *self.sides))
        check_relaxation(self.relaxation)
        check_flag(self.adapt, "adapt")


class Admm(Solver):
    """Splitting Z = W (and T = A(Z) + 1 b^T for losses other than the squared one).

    Squared loss: the quadratic step contains the loss and T is not needed. Any other loss: T carries the
    loss through its prox. The iteration is a fixed-point map of what the proxes are applied to, and is
    accelerated as such (:mod:`cvxnn.solvers.anderson`). The dual candidate is -lambda (squared), or
    sigma S, a gradient of the loss and so always in the domain of its conjugate. With the squared loss and the nuclear
    norm better points are looked for beside (:mod:`cvxnn.solvers.looks`).
    """

    name = "admm"
    Options = AdmmOptions
    default_max_iter: ClassVar[int] = 50_000
    sharded: ClassVar[bool] = True
    shares_gates: ClassVar[bool] = True
    per_gate: ClassVar[tuple[str, ...]] = (
        *("W", "U", "looks.Z", "ridge.blocks"),
        *(f"{_OF_BLOCKS}{name}" for name in ("last_image", "last_residual", "steps", "plain")),
    )

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if not problem.norm.has_prox:
            return f"it needs the prox of the norm, which {problem.norm.name} does not have; use 'frank_wolfe'"
        needed = factor_bytes(problem, choose_side(problem, AdmmOptions.memory), AdmmOptions.memory)
        if not fits(problem, needed):
            return f"its factorisation needs {needed / 2**30:.1f} GiB, more than is free; use 'fista'"
        return None

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        self.op = problem.operator
        self.squared = problem.loss.name == "squared"
        self.weights = problem.weights.to(problem.dtype)
        #: Penalties on rows of T go with the weights of the samples, as curvatures do: these are their roots.
        self.shares = (self.weights / self.weights.max()).sqrt().unsqueeze(1)
        self.used_weights = torch.where(self.weights > 0, self.weights.max(), 0.0)

    def start(self, point: Iterate | None) -> None:
        problem = self.problem
        side = self.options.side
        if side == "auto" and "ridge" not in self.kept:
            side = choose_side(problem, self.options.memory)
        if side == "iterative" and not self.op.has_kernel_columns:
            raise UnsupportedError(
                "side='iterative' needs columns of the kernel, which are there for perceptrons only; "
                "use 'samples' or 'features'"
            )
        # The curvature of the loss is the natural scale of the penalty on T = A(Z).
        self.sigma = float(self.weights.max()) * problem.loss.smoothness
        if "ridge" not in self.kept:
            step_weights = self.weights if self.squared else self._penalties()
            target = problem.Y if self.squared else None
            self._keep(make_ridge(side, self.op, step_weights, problem.output_bias, target))
        self.ridge: Ridge = self.kept["ridge"]
        self.sigma = self.kept["sigma"]
        self.iteration, self.next_adaptation = 0, 5
        self.tolerated = tolerated_imbalance(problem)
        self.anderson = self._acceleration() if self.options.memory else None
        self.looks = Looks(problem, self.ridge) if Looks.serve(problem) else None
        if self.looks is not None:
            self.check_every = self.looks.check_every
        self.W = problem.Y.new_zeros(self.op.block_shape)
        self.U = torch.zeros_like(self.W)
        self.T = torch.zeros_like(problem.Y)
        self.S = torch.zeros_like(problem.Y)
        self.residual: torch.Tensor | None = None
        self.rho = self.options.rho or self._estimate_rho(point)
        if self.options.rho is None and _NEAR < self.ridge.rho / self.rho < 1 / _NEAR:
            # What is factored already serves.
            self.rho = self.ridge.rho
        else:
            self.ridge.factor(self.rho)
        if point is not None:
            self._warm_start(point)
        # A point is asked for before the first step, where a round of "working_set" has just begun.
        self._last_Z = self._last_W = self.W

    def _acceleration(self) -> Anderson:
        if not self.op.shares_gates:
            return Anderson(self.options.memory)
        # What follows the blocks is the same in all processes.
        counted = slice(None) if self.op.counts_common else slice(math.prod(self.op.block_shape))
        return Anderson(self.options.memory, total=self.op.add_outputs, counted=counted)

    def _keep(self, ridge: Ridge) -> None:
        """For the next run of a path, with the penalty that its system is made for."""
        self.kept["ridge"], self.kept["sigma"] = ridge, self.sigma

    def _lengths(self, *blocks: torch.Tensor) -> list[float]:
        """Euclidean lengths over the blocks of all gates."""
        lengths = [float(torch.linalg.vector_norm(part)) for part in blocks]
        if not self.op.shares_gates:
            return lengths
        squares = [length**2 for length in lengths]
        return [math.sqrt(square) for square in self.op.over_gates(*squares)]

    def _warm_start(self, point: Iterate) -> None:
        self.W = point.blocks().to(self.W)
        outputs = self.op.double().apply(point.blocks().double())
        intercept = self.problem.best_intercept(outputs) if point.intercept is None else point.intercept.double()
        predictions = outputs + intercept
        dual = self.problem.dual_candidate(predictions) if point.dual is None else point.dual.double()
        blocks = self.op.double().adjoint(dual)
        # A dual point of another beta is scaled to fit this one.
        size = self.op.largest_over_gates(float(self.problem.norm.dual_estimate(blocks).max()))
        shrink = min(1.0, self.problem.beta / size) if size > 0 else 1.0
        self.U = (blocks * (-shrink / self.rho)).to(self.W)
        self.T, self.S = predictions.to(self.T), self._per_penalty((dual * shrink).to(self.S))

    def _penalties(self) -> torch.Tensor:
        """Penalties (n,) of T = A(Z): sigma for the largest weight."""
        return self.sigma * self.shares[:, 0].square()

    def _per_penalty(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (n, c) over their penalties; zero for samples without weight, whose T nothing depends on."""
        return torch.where(self.shares > 0, rows / self.sigma / self.shares.square(), 0.0)

    def _estimate_rho(self, point: Iterate | None) -> float:
        """beta sqrt(P min(p, q)) / ||Z||, the size of the multiplier over that of Z if all singular values are used.

        Z is taken from a lightly regularised least-squares fit, or from the warm start.
        """
        norm = 0.0 if point is None else self._lengths(point.blocks())[0]
        if norm == 0:
            norm = self.ridge.fit_norm(self.problem.Y)
        if not (norm > 0 and math.isfinite(norm)):
            return self.problem.beta
        _, p, q = self.op.block_shape
        return self.problem.beta * math.sqrt(self.op.total_gates * min(p, q)) / norm

    def step(self) -> None:
        self.iteration += 1
        if self.squared:
            self._squared_step()
        else:
            self._general_step()
        # Residuals across an extrapolation that is not yet found good, or was taken back, say nothing.
        settled = self.anderson is None or not self.anderson.unsettled
        due = self.options.adapt and settled and self.iteration >= self.next_adaptation
        if due and (self.looks is None or self.looks.dear):
            self.next_adaptation = int(1.5 * self.iteration) + 5
            self._adapt()
        if self.looks is not None and self.iteration >= self.looks.next:
            self._look(self.looks)

    def _look(self, looks: Looks) -> None:
        """Look for better points, and fit the penalty to what is in use there."""
        residual = self._last_residual()
        if residual is None:
            return
        wanted = looks.look(self.iteration, self.W, residual, self.tol)
        if wanted is None or not self.options.adapt or self.iteration < self.next_adaptation:
            return
        self.next_adaptation = int(1.5 * self.iteration) + 5
        if not 1 / self.tolerated < wanted / self.rho < self.tolerated:
            self._set_penalties(wanted / self.rho, 1.0)

    def _squared_step(self) -> None:
        solution = self.ridge.solve(self.W - self.U, self.problem.Y, want_residual=False)
        self.residual = solution.residual
        moved = torch.lerp(self.W, solution.Z, self.options.relaxation) + self.U
        if self.anderson is not None:
            moved = self.anderson.next((self.W + self.U).flatten(), moved.flatten()).view_as(moved)
        self._shrink(solution.Z, moved)

    def _general_step(self) -> None:
        target = self.T - self.S
        solution = self.ridge.solve(self.W - self.U, target)
        assert solution.residual is not None
        predictions = target - self._per_penalty(solution.residual)
        moved_T = torch.lerp(self.T, predictions, self.options.relaxation) + self.S
        moved_W = torch.lerp(self.W, solution.Z, self.options.relaxation) + self.U
        if self.anderson is not None:
            moved_W, moved_T = self._accelerate(self.anderson, moved_W, moved_T)
        self._last_predictions, self._last_T = predictions, self.T
        self.T = self.problem.loss.prox(moved_T, self.problem.Y, self.used_weights, self.sigma, start=self.T)
        self.S = moved_T - self.T
        self._shrink(solution.Z, moved_W)

    def _accelerate(
        self, anderson: Anderson, moved_W: torch.Tensor, moved_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One extrapolation of both parts, in the metric of the penalties."""
        root, roots = math.sqrt(self.rho), math.sqrt(self.sigma) * self.shares
        point = torch.cat([(self.W + self.U).flatten() * root, ((self.T + self.S) * roots).flatten()])
        image = torch.cat([moved_W.flatten() * root, (moved_T * roots).flatten()])
        first, second = anderson.next(point, image).split([moved_W.numel(), moved_T.numel()])
        moved_T = torch.where(roots > 0, second.view_as(moved_T) / roots, 0.0)
        return (first / root).view_as(moved_W), moved_T

    def _shrink(self, Z: torch.Tensor, moved: torch.Tensor) -> None:
        """The prox of the norm and the update of its multiplier."""
        self._last_Z, self._last_W = Z, self.W
        self.W, _ = self.problem.norm.prox(moved, self.problem.beta / self.rho)
        self.U = moved - self.W

    def _adapt(self) -> None:
        """Change penalties whose primal and dual residuals are far apart."""
        blocks = self._last_Z, self.W, self._last_Z - self.W, self.W - self._last_W, self.U
        rho_factor = balance(self._lengths(*blocks), self.tolerated)
        sigma_factor = 1.0
        if not self.squared:
            predictions, T, last_T, S = (
                self.shares * part for part in (self._last_predictions, self.T, self._last_T, self.S)
            )
            outputs = predictions, T, predictions - T, T - last_T, S
            sigma_factor = balance([float(torch.linalg.vector_norm(part)) for part in outputs], self.tolerated)
        if rho_factor == 1.0 and sigma_factor == 1.0:
            return
        self._set_penalties(rho_factor, sigma_factor)

    def _set_penalties(self, rho_factor: float, sigma_factor: float) -> None:
        """Change the penalties, and with them what is scaled by them."""
        self.rho *= rho_factor
        self.U = self.U / rho_factor
        if sigma_factor != 1.0:
            self.sigma *= sigma_factor
            self.S = self.S / sigma_factor
        self._refactor(sigma_factor != 1.0)
        if self.anderson is not None:
            self.anderson.reset()

    def _refactor(self, sigma_changed: bool) -> None:
        if sigma_changed:
            self.ridge.set_weights(self._penalties())
            self._keep(self.ridge)
        self.ridge.factor(self.rho)

    def iterate(self) -> Iterate:
        if self.looks is not None and self.looks.looked < self.iteration and self.looks.gap > self.tol:
            self._look(self.looks)
        better = None if self.looks is None else self.looks.best(self.iteration)
        if better is not None:
            return better
        if not self.squared:
            return Iterate(self.W, dual=self.sigma * self.shares.square() * self.S)
        residual = self._last_residual()
        return Iterate(self.W, dual=None if residual is None else -residual)

    def _last_residual(self) -> torch.Tensor | None:
        """That of the last quadratic step with the squared loss; None before the first one where it is not formed."""
        if self.residual is None and isinstance(self.ridge, FeatureRidge):
            self.residual = self.ridge.residual(self._last_Z, self.problem.Y)
        if self.residual is None and isinstance(self.ridge, IterativeRidge):
            self.residual = self.ridge.last_residual()
        return self.residual

    def estimated_gap(self) -> float | None:
        """From better points, or from the Gram matrix where passes over the samples take long."""
        if self.looks is not None:
            return self.looks.estimated_gap(self.iteration, self.tol)
        if not (self.squared and self.op.passes_are_dear and isinstance(self.ridge, FeatureRidge)):
            return None
        problem = self.problem
        slopes, norms = self.ridge.dual_values(self._last_Z)
        q = float(problem.norm.dual_estimate(self.op.unflatten(slopes)).max())
        s = min(1.0, problem.beta / q) if q > 0 else 1.0
        lower = s * norms.inner - s**2 / 2 * norms.square
        _, here = self.ridge.dual_values(self.W)
        primal = here.square / 2 + problem.beta * float(problem.norm.value(self.W)[1].sum())
        return relative_gap(primal, lower)

    def _is_ill_conditioned(self) -> bool:
        """Whether A A* is so large beside the penalties, by a bound of its trace over the gates."""
        penalties = self.weights if self.squared else self._penalties()
        largest = float(penalties.sum(dtype=torch.float64)) * self.op.double().prediction_norm ** 2
        return largest > ILL_CONDITIONED * self.rho

    def limited_by_rounding(self) -> bool:
        return self._is_ill_conditioned() or super().limited_by_rounding()

    def message(self, certificate: Certificate) -> str:
        return UNEVEN_DATA if self._is_ill_conditioned() else super().message(certificate)

    def state(self) -> dict[str, Any]:
        return {
            **self._acceleration_state(),
            **{f"ridge.{name}": value for name, value in self.ridge.state().items()},
            **({} if self.looks is None else {f"looks.{name}": value for name, value in self.looks.state().items()}),
            "W": self.W,
            "U": self.U,
            "T": self.T,
            "S": self.S,
            "rho": self.rho,
            "sigma": self.sigma,
            "iteration": self.iteration,
            "next_adaptation": self.next_adaptation,
        }

    def _acceleration_state(self) -> dict[str, Any]:
        """Vectors with their entries first: those of the blocks, which have rows of gates, and those of predictions."""
        if self.anderson is None:
            return {}
        state, n_blocks = {}, self.W.numel()
        for name, value in self.anderson.state().items():
            if isinstance(value, torch.Tensor):
                entries = value.movedim(-1, 0)
                state[_OF_BLOCKS + name], state[_OF_OUTPUTS + name] = entries[:n_blocks], entries[n_blocks:]
            else:
                state[f"anderson.{name}"] = value
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for name in [name for name in state if name.startswith(_OF_BLOCKS)]:
            rest = name.removeprefix(_OF_BLOCKS)
            joined = torch.cat([state.pop(name), state.pop(_OF_OUTPUTS + rest)])
            state[f"anderson.{rest}"] = joined.movedim(0, -1).contiguous()
        parts: dict[str, dict[str, Any]] = {"anderson": {}, "ridge": {}, "looks": {}}
        for name, value in state.items():
            owner, _, rest = name.partition(".")
            if rest:
                parts[owner][rest] = value
            else:
                setattr(self, name, value)
        if self.anderson is not None:
            self.anderson.load_state(parts["anderson"])
        if self.looks is not None:
            self.looks.load_state(parts["looks"])
        self._refactor(not self.squared)
        if parts["ridge"]:
            self.ridge.load_state(parts["ridge"])
