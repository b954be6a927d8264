"""The quadratic step of ADMM by conjugate gradients, where no square matrix fits in memory (math section 5)."""

from __future__ import annotations

import math

import torch

from cvxnn.columns import Columns
from cvxnn.operators import Operator
from cvxnn.operators.base import row_batches
from cvxnn.operators.symmetric import add_product
from cvxnn.solvers.ridge import Ridge, RidgeSolution, Step, cholesky, kernel_fit_norm, solve_factored

__all__ = ["IterativeRidge", "n_landmarks"]

#: Samples whose columns of the kernel make the preconditioner, and numbers of all of them at most (2 GiB in float32).
_LANDMARKS = 2000
_MOST_NUMBERS = 2**29
#: A step ends where the residual of its system is below this times that of its start, which is the last step's point.
_REDUCTION = 0.1
_LIMIT = 50


def n_landmarks(n_samples: int) -> int:
    """Columns of the kernel that the preconditioner is made of."""
    return min(n_samples, _LANDMARKS, max(1, _MOST_NUMBERS // n_samples))


class IterativeRidge(Ridge):
    """Through products with the kernel K = A A*, each an adjoint and an application of the operator.

    The system is (I + diag(sqrt a) K diag(sqrt a) / rho) x = diag(sqrt a) (C - A(B)), with x orthogonal to sqrt a
    where there is an intercept. Conjugate gradients start at the last solution, as those of two steps are close. They
    are preconditioned by a Nystrom approximation K_S K_SS^-1 K_S^T of the kernel (as CRONOS does; Feng, Frangella,
    Pilanci 2024), from the columns K_S of some samples: few eigenvalues of K are above rho.

    Of samples that are shared out to processes each has its rows of x and K_S; sums over them, the matrices of the
    order of S and the blocks are whole in all processes.
    """

    def __init__(self, operator: Operator, weights: torch.Tensor, intercept: bool) -> None:
        self._low_rank = _nystrom(operator, weights)
        self._local = operator.local
        n, c = self._local.n_samples, operator.n_outputs
        #: The last solution x, A*(sqrt a x), and the application of A to it.
        self.x = weights.new_zeros(n, c)
        self.blocks = weights.new_zeros(operator.block_shape)
        self.image = weights.new_zeros(n, c)
        self._root = operator.own(weights).sqrt().unsqueeze(1)
        super().__init__(operator, weights, intercept)

    @property
    def order(self) -> int:
        return self._low_rank.shape[1]

    def set_weights(self, weights: torch.Tensor) -> None:
        root = self.operator.own(weights).sqrt().unsqueeze(1)
        # The multiplier sqrt a x stays.
        self.x = torch.where(root > 0, self.x * (self._root / root), 0.0)
        self._root = root
        self._total = weights.sum()
        self._gram = weights.new_zeros(self.order, self.order)
        for rows in row_batches(len(root), self.order * weights.element_size()):
            add_product(self._gram, self._low_rank[rows] * root[rows])
        self._summed(self._gram)

    def fit_norm(self, C: torch.Tensor) -> float:
        total = self.operator.summed
        scale = total(float(self._low_rank.square().sum())) / len(C)
        target = self.operator.own(C - C.mean(0) if self.intercept else C)
        return kernel_fit_norm(lambda v: self._pushed(self._pulled(v)), scale, target, total)

    def factor(self, rho: float) -> None:
        self.rho = 0.0
        self._factor = cholesky(lambda system: torch.div(self._gram, rho, out=system.mT), 1.0, self._factor)
        self.rho = rho

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """What all processes have of a sum over the samples, in place."""
        self.operator.summed(0.0, part)
        return part

    def _length(self, x: torch.Tensor) -> float:
        return math.sqrt(self.operator.summed(float(torch.linalg.vector_norm(x)) ** 2))

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        """The part that is orthogonal to sqrt a, where there is an intercept."""
        if not self.intercept:
            return x
        return x - self._root * (self._summed((self._root * x).sum(0)) / self._total)

    def _preconditioned(self, r: torch.Tensor) -> torch.Tensor:
        inner = solve_factored(self._factor, self._pulled(self._root * r))
        return self._centred(r - self._root * self._pushed(inner) / self.rho)

    def _pulled(self, x: torch.Tensor) -> torch.Tensor:
        """L^T x for the factor L of the approximation: with x as short rows this is several times faster."""
        return self._summed(x.T.contiguous() @ self._low_rank).T

    def _pushed(self, w: torch.Tensor) -> torch.Tensor:
        """L w, in the same way."""
        return (w.T.contiguous() @ self._low_rank.T).T

    def solve(self, B: torch.Tensor, C: torch.Tensor, want_residual: bool = True) -> RidgeSolution:
        target = self._centred(self._root * (self.operator.own(C) - self._local.apply(B)))
        residual = target - self.x - self._centred(self._root * self.image) / self.rho
        rounding = 10 * torch.finfo(C.dtype).eps * self._length(target)
        left = self._length(residual)
        goal = max(rounding, _REDUCTION * left)
        direction, inner = torch.zeros_like(residual), torch.ones_like(residual[0])
        for _ in range(_LIMIT):
            if not self.operator.agreed(left > goal):
                break
            z = self._preconditioned(residual)
            new = self._summed((residual * z).sum(0))
            direction = z + direction * (new / inner)
            inner = new
            blocks = self._summed(self._local.adjoint(self._root * direction).contiguous())
            image = self._local.apply(blocks)
            curved = direction + self._centred(self._root * image) / self.rho
            bend = self._summed((direction * curved).sum(0))
            length = torch.where(bend > 0, inner / bend, 0.0)
            inner = torch.where(inner > 0, inner, 1.0)
            self.x = self.x + length * direction
            self.image = self.image + length * image
            self.blocks = self.blocks + self.operator.unflatten(self.operator.flatten(blocks) * length)
            residual = residual - length * curved
            left = self._length(residual)
        return RidgeSolution(B + self.blocks / self.rho, self.last_residual() if want_residual else None)

    def metric(self, columns: Columns, hidden: torch.Tensor) -> tuple[torch.Tensor, Step]:
        # That of the preconditioner.
        root = self._root
        solved = root * self._preconditioned(self._centred(root * hidden.to(root)))
        gram = self._summed(hidden.to(root).T @ solved).double()

        def step(weights: torch.Tensor) -> torch.Tensor:
            return self.operator.whole(solved @ weights.to(solved)).double()

        return (gram + gram.T) / 2, step

    def last_residual(self) -> torch.Tensor:
        """a o (C - A(Z) - 1 b^T) of the last solution, of all samples."""
        return self.operator.whole(self._root * self.x)

    def state(self) -> dict[str, torch.Tensor]:
        x, image = self.operator.whole(torch.cat([self.x, self.image], 1)).chunk(2, 1)
        return {"x": x, "blocks": self.blocks, "image": image}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.x, self.image = (self.operator.own(state[name]) for name in ("x", "image"))
        self.blocks = state["blocks"]


def _nystrom(operator: Operator, weights: torch.Tensor) -> torch.Tensor:
    """L (n, m) with L L^T = K_S K_SS^-1 K_S^T, for samples S that are drawn evenly among those with a weight."""
    generator = torch.Generator().manual_seed(0)
    used = weights.nonzero()[:, 0].cpu()
    chosen = used[torch.randperm(len(used), generator=generator)[: n_landmarks(len(weights))]].to(weights.device)
    columns = operator.kernel_columns(chosen)
    own = operator.own(torch.arange(len(weights), device=weights.device))
    # The chosen samples of this process, by their numbers among those that are chosen, and among its own.
    places = torch.full_like(weights, -1, dtype=torch.long)
    places[own] = torch.arange(len(own), device=own.device)
    places = places[chosen]
    core = torch.zeros(len(chosen), len(chosen), dtype=torch.float64, device=columns.device)
    core[places >= 0] = columns[places[places >= 0]].double()
    operator.summed(0.0, core)
    core = (core + core.T).div_(2)
    # Rounding of the columns is what limits the smallest eigenvalues.
    jitter = 10 * len(core) * torch.finfo(columns.dtype).eps * float(core.diagonal().mean())
    factor = cholesky(lambda system: system.mT.copy_(core), max(jitter, torch.finfo(core.dtype).tiny), core.clone().mT)
    lower = factor.to(columns.dtype)
    for rows in row_batches(len(columns), columns.shape[1] * columns.element_size()):
        columns[rows] = torch.linalg.solve_triangular(lower.mT, columns[rows], upper=True, left=False)
    return columns
