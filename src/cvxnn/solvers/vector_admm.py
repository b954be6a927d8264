"""ADMM for one output and the squared loss, where blocks are vectors: plain arrays, two precisions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from cvxnn.certificates import Certificate, relative_gap
from cvxnn.operators import MLPOperator
from cvxnn.problem import Problem
from cvxnn.solvers.admm import AdmmOptions
from cvxnn.solvers.anderson import Anderson
from cvxnn.solvers.base import ILL_CONDITIONED, UNEVEN_DATA, Iterate, Solver
from cvxnn.solvers.gate_kernels import KernelsOfSet
from cvxnn.solvers.gated_rows import centred, norms
from cvxnn.solvers.kernel_system import KernelSystem
from cvxnn.solvers.nystrom_system import NystromSystem
from cvxnn.solvers.radial import best_sizes, corrected_dual
from cvxnn.solvers.row_system import RowSystem
from cvxnn.solvers.scaled_samples import ScaledSamples
from cvxnn.solvers.sides import fits
from cvxnn.solvers.vector_costs import SYSTEMS, choose_system, factoring, passing, vector_bytes

__all__ = ["VectorAdmm"]

Array = NDArray[Any]

#: Above this gap the iteration goes on from the better point.
_FAR = 1e-3
#: Steps before the first better pair of points is looked for, and between two of them: far away, after the first one
#: where that is early, and then.
_FIRST_LOOK = 8
_FAR_APART = 4
_AFTER_FIRST = 7
_LOOKS_APART = (3, 8)
#: Steps after which the point is certified all the same: for the trace, callbacks and stalled runs.
_CERTIFY_EVERY = 50
#: The threshold beta / rho is so many times the mean norm of the blocks in use; by this factor it may be off.
_SHARE = 1.25
_TOLERATED = 4.0


#: What the next steps depend on.
_ARRAYS = ("W", "U", "G", "B", "image", "best_W", "best_r")
_NUMBERS = ("rho", "primal", "lower", "gap", "iteration", "looked", "certified_at", "next_look", "next_adaptation")


@dataclass(frozen=True)
class VectorAdmmOptions(AdmmOptions):
    """Options of ``vector_admm``: those of ``admm``, with another meaning of two.

    Attributes
    ----------
    adapt : bool
        Fit the penalty to the norms of the blocks in use.
    side : {"auto", "samples", "iterative"}
        Factor the kernel of the samples, or solve with it by preconditioned conjugate gradients; "auto" takes the
        cheaper one.
    """

    sides: ClassVar[tuple[str, ...]] = SYSTEMS


class VectorAdmm(Solver):
    """The iteration of ``admm`` on a group lasso, made to need few steps and little for each.

    - The kernel of many samples is factored in float32, or it is solved with by conjugate gradients. Each solution is
      the last one corrected, and what is added up from changes is formed anew in float64 before it counts, so that the
      precision is that of float64.
    - The primal objective is off by the square of the error of the iterates, the dual bound by the error itself. Every
      few steps a dual point is found near r that meets ||A_k*(r)|| <= beta to second order, and a primal point with
      the best sizes of the blocks (:mod:`cvxnn.solvers.radial`); both are small systems in the blocks in use. These
      points are the result, and far from the optimum the iteration goes on from them.
    - Arrays are NumPy's: with a few hundred samples a call of torch costs more than its arithmetic.

    Samples are scaled by the roots of their weights, so that all weigh the same here; r is orthogonal to the column
    of an intercept.
    """

    name = "vector_admm"
    Options = VectorAdmmOptions
    default_max_iter: ClassVar[int] = 50_000
    check_every: int = 1

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        op = problem.operator
        if type(op) is not MLPOperator or problem.cones is not None or problem.device.type != "cpu":
            return "it is for gated and linear perceptrons on data in memory, on the CPU; use 'admm'"
        if problem.Y.shape[1] != 1 or problem.norm.left != "l2":
            return "it needs one output and columns in the l2 norm; use 'admm'"
        if problem.loss.name != "squared":
            return f"it needs the squared loss, and this is {problem.loss.name!r}; use 'admm'"
        needed = vector_bytes(problem, "iterative")
        if not fits(problem, needed):
            return f"its matrices need {needed / 2**30:.1f} GiB, more than is free; use 'admm'"
        return None

    def __init__(self, problem: Problem, *arguments: Any, samples: ScaledSamples | None = None) -> None:
        super().__init__(problem, *arguments)
        samples = ScaledSamples(problem) if samples is None else samples
        self.root, self.y, self.x_size, self.y_size = samples.root, samples.y, samples.x_size, samples.y_size
        self.beta = problem.beta / self.x_size / self.y_size
        self.rows = samples.rows(problem.patterns)
        #: What forms the kernel, where not from nothing.
        self.kernels: KernelsOfSet | None = None
        self.ones = self.root / float(self.root.max()) if problem.output_bias else None

    def start(self, point: Iterate | None) -> None:
        if "system" not in self.kept:
            self._set_system(choose_system(self.problem) if self.options.side == "auto" else self.options.side)
        self.system: RowSystem = self.kept["system"]
        self.system.restart()
        shape = self.rows.shape
        self.W, self.U, self.G, self.B, self.best_W = _zeros(5, *shape)
        self.image, self.best_r = _zeros(2, len(self.y))
        self.primal, self.lower, self.gap = math.inf, 0.0, math.inf
        self.iteration = self.looked = self.certified_at = 0
        self.next_look, self.next_adaptation = _FIRST_LOOK, 0
        self.anderson = Anderson(self.options.memory, interval=2) if self.options.memory else None
        rho = self.options.rho
        self.rho = self._first_rho(point) if rho is None else rho / self.x_size**2
        self.system.factor(self.rho)
        if point is not None:
            self._warm_start(point)

    def _set_system(self, side: str) -> None:
        kind = KernelSystem if side == "samples" else NystromSystem
        self.kept["system"] = kind(self.rows, self.ones, self.kernels)
        self.system = self.kept["system"]

    def fitting_rho(self, side: str) -> float:
        """The first penalty of a run from zero with this system, as in the options."""
        self._set_system(side)
        return self._first_rho(None) * self.x_size**2

    def _first_rho(self, point: Iterate | None) -> float:
        """From the blocks of a warm start, or a lightly regularised least-squares fit, as if all blocks shared it.

        The penalty that the system is factored for is kept where it is about right.
        """
        if point is not None:
            sizes = norms(point.blocks()[:, :, 0].double().numpy() * (self.x_size / self.y_size))
            if sizes.any():
                wanted = self.beta / (_SHARE * float(sizes[sizes > 0].mean()))
                return self.system.rho if 0.5 < self.system.rho / wanted < 2 else wanted
        size = self.system.fit_norm(centred(self.y, self.ones)) / math.sqrt(self.rows.shape[0])
        return self.beta / (_SHARE * size) if size > 0 else self.beta

    def _warm_start(self, point: Iterate) -> None:
        """W and its multiplier from a point and its dual; a dual point of another beta is scaled to fit this one."""
        self.W = point.blocks()[:, :, 0].double().numpy() * (self.x_size / self.y_size)
        residual = centred(self.y - self.rows.apply(self.W), self.ones)
        if point.dual is not None:
            given = -point.dual.double().numpy()[:, 0]
            residual = centred(np.divide(given, self.root, where=self.root > 0, out=0 * given) / self.y_size, self.ones)
        blocks = self.rows.adjoint(residual)
        size = float(norms(blocks).max())
        self.U = blocks * (min(1.0, self.beta / size if size > 0 else 1.0) / self.rho)

    def step(self) -> None:
        self.iteration += 1
        dtype = self.system.dtype
        B = self.W - self.U
        self.image += self.system.low.apply((B - self.B).astype(dtype, copy=False))
        self.B = B
        self.G += self.system.change(self.y - self.image)
        last = self.W + self.U
        moved = self.G / self.rho
        moved += B
        moved -= self.W
        moved *= self.options.relaxation
        moved += last
        if self.anderson is not None:
            moved = self.anderson.next(last.ravel(), moved.ravel()).reshape(moved.shape)
        sizes = np.maximum(norms(moved), 1e-300)
        self.W = moved * np.maximum(1 - (self.beta / self.rho) / sizes, 0.0)[:, None]
        self.U = moved - self.W
        if self.iteration >= self.next_look:
            self._look()

    def _look(self) -> None:
        """A better primal and a better dual point from the sizes of the blocks; the best of them are kept."""
        self.steps_between, self.looked = self.iteration - self.looked, self.iteration
        # The first look is too early for a small gap, and serves the primal point and the penalty.
        early = self.iteration == _FIRST_LOOK and self.tol < _FAR
        if self.system.drifts and not early:
            # What has come together from changes in float32 is formed anew.
            self.image = self.rows.apply(self.B)
            self.G = self.rows.adjoint(self.system.r)
            self.system.refresh(self.G)
        before, sizes = self.gap, norms(self.W)
        used = sizes > 0
        W, sizes = self._better_point(sizes)
        if not early:
            self._better_dual(used)
        self.gap = relative_gap(self.primal, self.lower)
        if self.gap > _FAR:
            self.W = W
            if self.anderson is not None:
                self.anderson.reset()
        self.next_look = self.iteration + self._until_next_look(before)
        if self.options.adapt and self.gap > self.tol and self.iteration >= self.next_adaptation:
            self.next_adaptation = int(1.5 * self.iteration) + 5
            self._adapt(sizes[sizes > 0])
        self._reconsider()

    def _better_point(self, sizes: Array) -> tuple[Array, Array]:
        """W with the best sizes of its blocks; the better one of the two counts for the gap."""
        chosen = np.flatnonzero(sizes > 0)
        directions = self.W[chosen] / sizes[chosen, None]
        columns = self.rows.columns(chosen, directions)
        found = np.zeros_like(sizes)
        found[chosen] = best_sizes(columns, self.y, self.beta, self.ones)
        best = np.inf, self.W, sizes
        for t in (found, sizes):
            residual = centred(self.y - columns @ t[chosen], self.ones)
            primal = 0.5 * float(residual @ residual) + self.beta * float(t.sum())
            if primal < best[0]:
                W = np.zeros_like(self.W)
                W[chosen] = t[chosen, None] * directions
                best = primal, W, t
        if best[0] < self.primal:
            self.primal, self.best_W = best[:2]
        return best[1:]

    def _better_dual(self, used: Array) -> None:
        r, G = corrected_dual(self.rows, self.system, self.system.r, self.G, self.beta, used)
        for candidate, blocks in ((r, G), (self.system.r, self.G)):
            lower = self._dual_value(candidate, float(norms(blocks).max()))
            if lower > self.lower:
                self.lower, self.best_r = lower, candidate.copy()

    def _dual_value(self, r: Array, q: float) -> float:
        """That of the best multiple of r, where q is the largest ||A_k*(r)||."""
        square, inner = float(r @ r), float(r @ self.y)
        if not (square > 0 and inner > 0):
            return 0.0
        s = min(inner / square, self.beta / q if q > 0 else math.inf)
        return s * inner - s * s / 2 * square

    def _until_next_look(self, before: float) -> int:
        """Steps until the gap reaches the tolerance if it goes on to fall as it did since the last look."""
        least, most = _LOOKS_APART
        if self.gap == math.inf:
            return _AFTER_FIRST
        if self.gap > _FAR:
            return _FAR_APART
        most = max(most, self.iteration // 4)
        if not 0 < self.gap < before:
            return most
        if before == math.inf:
            return (least + most) // 2
        rate = math.log(before / self.gap) / max(1, self.steps_between)
        wanted = math.log(self.gap / (0.7 * self.tol)) / rate if self.tol > 0 else most
        return max(least, min(most, math.ceil(wanted)))

    def _adapt(self, sizes: Array) -> None:
        """Another penalty, where the threshold is far from the sizes of the blocks in use."""
        if len(sizes) == 0:
            return
        wanted = self.beta / (_SHARE * float(sizes.mean()))
        if 1 / _TOLERATED < wanted / self.rho < _TOLERATED:
            return
        self.U *= self.rho / wanted
        self.rho = wanted
        self.system.factor(wanted)
        if self.anderson is not None:
            self.anderson.reset()

    def _reconsider(self) -> None:
        """Factor the kernel after all, once conjugate gradients have taken as long as that would have."""
        if not isinstance(self.system, NystromSystem) or self.options.side != "auto" or self.gap <= self.tol:
            return
        sizes = len(self.y), *self.rows.shape
        if self.system.spent * passing(*sizes) > factoring(*sizes) and fits(self.problem, vector_bytes(self.problem)):
            r, image = self.system.r, self.system.image
            self._set_system("samples")
            self.system.r, self.system.image = r, image
            self.system.factor(self.rho)

    def estimated_gap(self) -> float | None:
        due = self.gap > self.tol and self.iteration - self.certified_at >= _CERTIFY_EVERY
        return None if due else self.gap

    def iterate(self) -> Iterate:
        if self.looked < self.iteration and self.gap > self.tol:
            self._look()
        self.certified_at = self.iteration
        return Iterate(self.blocks_of(self.best_W).to(self.problem.dtype), dual=self.dual_of(self.best_r))

    def blocks_of(self, W: Array) -> torch.Tensor:
        """Blocks (P, d, 1) of the problem."""
        return torch.from_numpy(W * (self.y_size / self.x_size))[:, :, None]

    def dual_of(self, r: Array) -> torch.Tensor:
        """The dual candidate (n, 1) that a residual r (n,) is."""
        return torch.from_numpy(-self.root * r * self.y_size)[:, None]

    def limited_by_rounding(self) -> bool:
        return self.system.largest > ILL_CONDITIONED * self.rho or super().limited_by_rounding()

    def message(self, certificate: Certificate) -> str:
        return UNEVEN_DATA if self.system.largest > ILL_CONDITIONED * self.rho else super().message(certificate)

    def state(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"system.{name}": value for name, value in self.system.state().items()}
        if self.anderson is not None:
            arrays |= {f"anderson.{name}": value for name, value in self.anderson.state().items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        # Files hold no infinities.
        infinite = [name for name, value in numbers.items() if value == math.inf]
        # Copies, as steps change some of them in place.
        state = {name: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for name, v in arrays.items()}
        return state | {name: None if name in infinite else value for name, value in numbers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Any]] = {"": {}, "system": {}, "anderson": {}}
        for name, value in state.items():
            part, _, short = name.rpartition(".")
            parts[part][short] = value.numpy().copy() if isinstance(value, torch.Tensor) else value
        for name, value in parts[""].items():
            setattr(self, name, math.inf if value is None else value)
        self._set_system("iterative" if "spent" in parts["system"] else "samples")
        self.system.load_state(parts["system"])
        if self.anderson is not None:
            self.anderson.load_state(parts["anderson"])


def _zeros(count: int, *shape: int) -> list[Array]:
    return [np.zeros(shape) for _ in range(count)]
