"""Better primal and dual points for the nuclear norm from rough ones, by small systems in the singular pairs in use.

What :mod:`cvxnn.solvers.radial` does for vectors, where a block has a size and a direction, for matrices: a block
U_k S_k V_k^T has a symmetric matrix S_k between its singular vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cvxnn.certificates import relative_gap
from cvxnn.problem import Problem
from cvxnn.solvers.iterative_ridge import IterativeRidge
from cvxnn.solvers.ridge import Ridge
from cvxnn.solvers.sides import step_cost
from cvxnn.solvers.singular_pairs import Frames, PairProducts

__all__ = ["Found", "SpectralPoints"]

#: Singular values below this times the largest one are zero, in either precision.
_ZERO = {torch.float32: 1e-5, torch.float64: 1e-8}
#: Unknowns of a small system, and hidden outputs (512 MiB), at most; and so many steps of ADMM may a look cost about.
_MOST_UNKNOWNS = 1500
_MOST_NUMBERS = 2**26
_STEPS_PER_LOOK = 4
#: An entry of the matrix of a small system takes as long as so many operations.
_GATHERED = 40
#: Newton steps for the dual point, which end where the dual norm is above beta by less than this times the gap.
_CORRECTIONS = 2
_CLOSE = 0.1
#: Rounds in which pairs are dropped.
_ROUNDS = 2
#: Added to the diagonals of small systems, relative to their mean.
_RIDGE = 1e-11
#: Eigenvalues below this times the largest one are zero.
_TINY = 1e-12


@dataclass
class Found:
    """Objective and blocks, bound and residual of better points, and the mean of the singular values in use."""

    primal: float
    Z: torch.Tensor
    lower: float
    residual: torch.Tensor
    mean_size: float


@dataclass
class _Slopes:
    """Singular value decompositions of A_k*(r), and the largest value of all gates."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    largest: float


class SpectralPoints:
    """Looks for better points of a problem with the nuclear norm and the squared loss.

    The error of the primal objective is the square of that of the iterates, the error of a dual bound is that itself.
    So the dual point is moved until its active singular values are beta to second order, by a step that is small in
    the metric of the quadratic step; and S_k is the best for the singular vectors of the primal point.

    Where samples or gates are shared out, all processes have the singular pairs in use, and solve the same systems.

    Parameters
    ----------
    problem : Problem
        See :meth:`serves`.
    ridge : Ridge
        Factored; it may be factored anew between two looks.
    """

    def __init__(self, problem: Problem, ridge: Ridge) -> None:
        self.problem, self.ridge = problem, ridge
        self.op = problem.operator.double()
        #: Of the samples of this process, and of all.
        self.weights = self.op.own(problem.weights.double()).unsqueeze(1)
        self.total = float(problem.weights.sum(dtype=torch.float64))
        self.target = self._centred(self.op.own(problem.Y64))

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Whether it has them, and blocks u v^T have predictions h v^T with one h per sample."""
        op = problem.operator
        has_them = problem.loss.name == "squared" and problem.norm.name == "nuclear"
        return has_them and op.width == 1 and not op.passes_are_dear

    def look(self, W: torch.Tensor, residual: torch.Tensor, tol: float) -> Found | None:
        """The best of the points W and residual = a o (Y - predictions), and better ones; None if that is too dear."""
        W, residual = W.double(), residual.double()
        left, values, right = torch.linalg.svd(W, full_matrices=False)
        largest = self.op.largest_over_gates(float(values.max()))
        used = values > _ZERO[self.problem.dtype] * largest
        sizes = self._sizes(used, values)
        if self.op.agreed(not largest > 0 or self._is_dear(sizes > 0)):
            return None
        frames, sizes = Frames.of(self.op, left, right, sizes > 0), sizes[sizes > 0]
        hidden = self._hidden(frames)
        outputs = hidden @ (sizes.unsqueeze(1) * frames.columns().v)
        primal = self._objective(outputs, float(sizes.sum()))
        slopes = self._slopes(residual)
        lower = self._bound(residual, slopes.largest)
        mean = float(sizes.mean())
        if self.op.agreed(relative_gap(primal, lower) <= tol):
            return self._found(primal, W, lower, residual, mean)
        primal, Z, ranks = self._better_blocks(frames, hidden, primal, W)
        lower, dual = self._better_residual(residual, slopes, lower, ranks, tol, primal)
        return self._found(primal, Z, lower, dual, mean)

    def _found(self, primal: float, Z: torch.Tensor, lower: float, dual: torch.Tensor, mean: float) -> Found:
        """With the numbers of process 0, on which the next steps depend."""
        group = self.op.group
        if group is not None:
            primal, lower, mean = (group.of_first(number) for number in (primal, lower, mean))
        return Found(primal, Z, lower, dual, mean)

    def _sizes(self, used: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Singular values (P, r) in use of all gates, the others 0."""
        sizes = self.op.all_gates(torch.where(used, values, 0.0))
        self.op.common(sizes)
        return sizes

    def _is_dear(self, used: torch.Tensor) -> bool:
        """Whether the work with so many singular pairs, (P, r) of all gates, takes long beside the steps."""
        op, counts = self.op, used.sum(1)
        pairs, unknowns = int(counts.sum()), float((counts * (counts + 1)).sum()) / 2
        n, c = self.problem.Y.shape
        p, features = op.block_shape[1], op.total_gates * op.block_shape[1]
        if isinstance(self.ridge, IterativeRidge):
            step = step_cost(n, c, features, "iterative", constant_target=True)
            metric = 4.0 * n * self.ridge.order * pairs
        else:
            # That of the cheaper side, whichever is factored: several processes find the points that one does.
            step = min(step_cost(n, c, features, side, constant_target=True) for side in ("samples", "features"))
            metric = 2.0 * min(n, features) ** 2 * pairs
        systems = unknowns**3 + _GATHERED * unknowns**2
        passes = 6.0 * n * features * c + n * pairs * (6 * p + 3 * pairs)
        too_large = unknowns > _MOST_UNKNOWNS or n * pairs > _MOST_NUMBERS
        return too_large or systems + passes + metric > _STEPS_PER_LOOK * step

    def _centred(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the samples of this process less their weighted mean over all, where there is an intercept."""
        if not self.problem.output_bias:
            return values
        sums = (self.weights * values).sum(0)
        self.op.summed(0.0, sums)
        return values - sums / self.total

    def _objective(self, outputs: torch.Tensor, penalty: float) -> float:
        loss = 0.5 * float((self.weights * (self.target - outputs).square()).sum())
        return self.op.summed(loss) + self.problem.beta * penalty

    def _hidden(self, frames: Frames) -> torch.Tensor:
        """Centred hidden outputs of the columns of frames."""
        return self._centred(frames.hidden(self.op, frames.columns()))

    def _better_blocks(
        self, frames: Frames, hidden: torch.Tensor, primal: float, W: torch.Tensor
    ) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Objective and blocks with the best S_k, or those given where these are better; and the ranks of gates, (P,).

        Of gates in which S_k has negative eigenvalues as many pairs are dropped, the smallest ones of W, as S_k is to
        be positive semidefinite.
        """
        beta, op = self.problem.beta, self.op
        best = primal, W
        for last in (False,) * _ROUNDS + (True,):
            columns = frames.columns()
            pairs = PairProducts(columns)
            metric = hidden.T @ (self.weights * hidden)
            products = hidden.T @ (self.weights * self.target) @ columns.v.T
            op.summed(0.0, metric, products)
            found = _solve(pairs.gram(metric), pairs.coordinates(products) - beta * pairs.diagonal.double())
            if op.agreed(found is None):
                break
            assert found is not None
            S = pairs.matrix(found)
            blocks = frames.blocks(S)
            inner = torch.linalg.eigvalsh(blocks)
            value = self._objective(hidden @ (S @ columns.v), float(inner.abs().sum()))
            if op.agreed(value < best[0]):
                best = value, frames.product(op, blocks)
            tiny = _TINY * float(inner.abs().max())
            positive = (inner > tiny).sum(1)
            op.common(positive)
            if op.agreed(last or not bool((inner < -tiny).any() and positive.any())):
                break
            frames = frames.leading(positive)
            hidden = self._hidden(frames)
        return *best, frames.ranks(op)

    def _slopes(self, residual: torch.Tensor) -> _Slopes:
        left, values, right = torch.linalg.svd(self.op.adjoint(residual), full_matrices=False)
        return _Slopes(left, values, right, self.op.largest_over_gates(float(values.max())))

    def _better_residual(
        self, residual: torch.Tensor, slopes: _Slopes, lower: float, ranks: torch.Tensor, tol: float, primal: float
    ) -> tuple[float, torch.Tensor]:
        """About the largest bound and its residual, of Newton's method for ||A_k*(residual)|| <= beta.

        It starts with a residual, its A_k* and its bound, for given ranks of the gates of this process.
        """
        beta, op = self.problem.beta, self.op
        best = lower, residual
        for step in range(_CORRECTIONS):
            gap = relative_gap(primal, lower)
            if op.agreed(gap <= tol or (step > 0 and slopes.largest <= beta * (1 + _CLOSE * gap))):
                break
            # Singular values come in decreasing order.
            first = torch.arange(slopes.values.shape[1], device=ranks.device) < ranks.unsqueeze(1)
            sizes = self._sizes(first | (slopes.values > beta), slopes.values)
            if op.agreed(self._is_dear(sizes > 0)):
                break
            frames = Frames.of(op, slopes.left, slopes.right, sizes > 0)
            columns = frames.columns()
            pairs = PairProducts(columns)
            excess = torch.where(pairs.diagonal, sizes[sizes > 0][pairs.i] - beta, 0.0)
            metric, move = self.ridge.metric(columns, frames.hidden(op, columns))
            weights = _solve(pairs.gram(metric), excess)
            if op.agreed(weights is None):
                break
            assert weights is not None
            residual = residual - move(pairs.matrix(weights) @ columns.v)
            slopes = self._slopes(residual)
            lower = self._bound(residual, slopes.largest)
            if op.agreed(lower > best[0]):
                best = lower, residual
        return best

    def _bound(self, residual: torch.Tensor, q: float) -> float:
        """Dual value of the best multiple of the residual of all samples, where q is its dual norm."""
        weights = self.problem.weights.double().unsqueeze(1)
        inner = float((residual * self.problem.Y64).sum())
        square = float(torch.where(weights > 0, residual.square() / weights, 0.0).sum())
        if not (inner > 0 and square > 0):
            return 0.0
        s = min(inner / square, self.problem.beta / q if q > 0 else math.inf)
        return s * inner - s * s / 2 * square


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """gram^-1 right, slightly regularised; None where that fails."""
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(right[:, None], factor)[:, 0] if int(info) == 0 else None
