"""Squared loss with V and the intercept minimised out: a smooth problem in U alone (section 6 of the maths)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem
from cvxnn.solvers.burer_monteiro.curvatures import Curvature, Dense, MatrixFree
from cvxnn.solvers.burer_monteiro.grams import WhitenedGrams
from cvxnn.solvers.burer_monteiro.local import (
    CG_ACCURACY,
    CG_LIMIT,
    LocalProblem,
    absolute_blocks,
    selected_features,
    violated,
)

__all__ = ["Eliminated"]

#: Ratio of the system to beta from which on its solutions are refined once.
_REFINE = 1e2


class Eliminated(LocalProblem):
    """h(U) = min over V and b of (14), for F = 1/2 ||W^(1/2) (T - Y)||^2.

    With A = W^(1/2) Act(U) and targets W^(1/2) Y, both without their part along W^(1/2) 1 where there is an
    intercept, the best V is a ridge regression, V = (A^T A + beta I)^-1 A^T Y, and the gradient in u_kj is
    -X^T D_k W^(1/2) R v_kj + beta u_kj with R = Y - A V. Where there are more columns than samples,
    R = beta (A A^T + beta I)^-1 Y is solved for instead.
    """

    def __init__(
        self, problem: Problem, loss: FactoredLoss, columns: Columns, grams: Callable[[], WhitenedGrams]
    ) -> None:
        super().__init__(problem, loss, columns, grams)
        self.root = loss.weights.sqrt()
        self.Y = loss.Y * self.root.unsqueeze(1)
        self.along: torch.Tensor | None = None
        if problem.output_bias:
            self.along = self.root / torch.linalg.vector_norm(self.root)
            self.Y = self._centred(self.Y)
        #: Columns of A: every hidden output counts, and V is kept as their weights (r w, c).
        self.samples_side = len(columns) * self.op.width > self.op.n_samples
        self.batches = [slice(0, self.op.n_samples)] if self.samples_side else self.op.column_batches(len(columns))
        self._features: torch.Tensor | None = None

    @property
    def n_variables(self) -> int:
        return len(self.gate) * self.op.block_shape[1]

    def variables(self, columns: Columns, intercept: torch.Tensor) -> list[torch.Tensor]:
        return [columns.u]

    def point(self, parts: Sequence[torch.Tensor]) -> tuple[Columns, torch.Tensor]:
        self.evaluate(parts)
        columns = Columns(self.gate, parts[0], self.op.merge_right(self.V))
        b = self.loss.Y.new_zeros(self.loss.Y.shape[1])
        if self.along is not None:
            b = self.problem.best_intercept(self.op.apply_columns(columns))
        return columns, b

    def _centred(self, values: torch.Tensor) -> torch.Tensor:
        """Columns without their part along W^(1/2) 1."""
        return values if self.along is None else values - torch.outer(self.along, self.along @ values)

    def _activations(self, u: torch.Tensor, rows: slice) -> torch.Tensor:
        return self.op.hidden(self.gate, u, rows) * self.root[rows].unsqueeze(1)

    def evaluate(self, parts: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        u, beta = parts[0], self.beta
        if not self._solve(u):
            self.V, self.R = u.new_zeros(len(u) * self.op.width, self.Y.shape[1]), self.Y
            return math.inf, [torch.zeros_like(u)]
        slope = beta * u
        for rows in self.batches:
            weighted = (self.R[rows] @ self.V.T) * self.root[rows].unsqueeze(1)
            slope -= self.op.hidden_adjoint(self.gate, weighted, rows)
        value = (self.R.square().sum() + beta * self.V.square().sum() + beta * u.square().sum()) / 2
        return float(value), [slope]

    def _solve(self, u: torch.Tensor) -> bool:
        """The best V (r w, c), the residual R (n, c) and the Cholesky factor; False where rounding forbids it."""
        beta = self.beta
        if self.samples_side:
            A = self._centred(self._activations(u, self.batches[0]))
            system = A @ A.T
            system.diagonal().add_(beta)
            if not self._factor(system):
                return False
            self.R = beta * torch.cholesky_solve(self.Y, self.factor)
            if self._is_ill_conditioned(system):
                rest = self.Y - self.R - A @ (A.T @ self.R) / beta
                self.R += beta * torch.cholesky_solve(rest, self.factor)
            self.V = A.T @ self.R / beta
            self.A = A
            return True
        r = len(u) * self.op.width
        system, right = u.new_zeros(r, r), u.new_zeros(r, self.Y.shape[1])
        mean = u.new_zeros(r)
        parts = []
        for rows in self.batches:
            A = self._activations(u, rows)
            system.addmm_(A.T, A)
            right.addmm_(A.T, self.Y[rows])
            if self.along is not None:
                mean += A.T @ self.along[rows]
            if len(self.batches) == 1:
                parts.append(A)
        system.addr_(mean, mean, alpha=-1)
        system.diagonal().add_(beta)
        if not self._factor(system):
            return False
        self.V = torch.cholesky_solve(right, self.factor)
        self.raw = parts[0] if parts else None
        self.mean = mean
        self.R = self._residual(u)
        if self._is_ill_conditioned(system):
            rest = -beta * self.V
            for rows in self.batches:
                rest += self._kept_activations(u, rows).T @ self.R[rows]
            self.V += torch.cholesky_solve(rest, self.factor)
            self.R = self._residual(u)
        return True

    def _factor(self, system: torch.Tensor) -> bool:
        self.factor, failed = torch.linalg.cholesky_ex(system)
        return not bool(failed) and bool(torch.isfinite(self.factor.diagonal()).all())

    def _is_ill_conditioned(self, system: torch.Tensor) -> bool:
        """Whether the normal equations lose digits that count, so that their solution is to be refined."""
        return float(system.diagonal().max()) > _REFINE * self.beta

    def _residual(self, u: torch.Tensor) -> torch.Tensor:
        """R = Y - A V."""
        parts = [torch.addmm(self.Y[rows], self._kept_activations(u, rows), self.V, alpha=-1) for rows in self.batches]
        R = parts[0] if len(parts) == 1 else torch.cat(parts)
        return R if self.along is None else R + torch.outer(self.along, self.mean @ self.V)

    @property
    def features(self) -> torch.Tensor:
        """D_k X of every column with the weights, (n, r p); for one hidden output per column."""
        if self._features is None:
            flat = selected_features(self.loss, self.gate).flatten(1) * self.root.unsqueeze(1)
            self._features = self._centred(flat)
        return self._features

    def curvature(self, parts: Sequence[torch.Tensor], dense: bool) -> Curvature:
        """With M_k = U_k U_k^T the objective is convex in M; its Hessian in U is that in M, pulled back, plus
        the blocks beta I - G_k G_k^T / beta, which alone can be indefinite.
        """
        return self._dense(parts[0]) if dense else self._matrix_free(parts[0])

    def _matrix_free(self, u: torch.Tensor) -> MatrixFree:
        """With dA = Act(dU):  dV = (A^T A + beta I)^-1 (dA^T R - A^T dA V),  dR = -dA V - A dV."""
        beta, V, (r, p) = self.beta, self.V, u.shape
        gradient = -self.R * self.root.unsqueeze(1)
        place, w, _, values = violated(self.loss, self.gates, gradient, beta)
        lift = 2 * (values.square() / beta - beta)
        # All violated pairs of a gate meet all of its columns.
        column, pair = (self.place.unsqueeze(1) == place.unsqueeze(0)).nonzero().unbind(1)
        w, lift = w[pair], lift[pair].unsqueeze(1)

        def product(flat: torch.Tensor) -> torch.Tensor:
            du = flat.view(r, p)
            dR, dV = self._derivative(u, du)
            out = beta * du
            for rows in self.batches:
                weighted = (dR[rows] @ V.T + self.R[rows] @ dV.T) * self.root[rows].unsqueeze(1)
                out -= self.op.hidden_adjoint(self.gate, weighted, rows)
            if len(pair):
                inner = lift * (w * du[column]).sum(1, keepdim=True)
                out.index_add_(0, column, inner * w)
            return out.flatten()

        blocks = self.grams().columns(self.gate, V.square().sum(1).view(r, -1).sum(1))
        return MatrixFree(
            product,
            lambda x: blocks.power(x.view(r, p), beta, 1).flatten(),
            lambda x, damping: blocks.power(x.view(r, p), (1 + damping) * beta, -1, 1 + damping).flatten(),
            CG_LIMIT,
            CG_ACCURACY,
        )

    def _derivative(self, u: torch.Tensor, du: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Derivatives of R and V along dU."""
        V = self.V
        if self.samples_side:
            dA = self._centred(self._activations(du, self.batches[0]))
            change = dA.T @ self.R
            dR = -torch.cholesky_solve(self.beta * (dA @ V) + self.A @ change, self.factor)
            return dR, (change + self.A.T @ dR) / self.beta
        right, mean = torch.zeros_like(V), V.new_zeros(len(V))
        moved = []
        for rows in self.batches:
            dA = self._activations(du, rows)
            moved.append(dA @ V)
            right += dA.T @ self.R[rows] - self._kept_activations(u, rows).T @ moved[-1]
            if self.along is not None:
                mean += dA.T @ self.along[rows]
        if self.along is not None:
            right += torch.outer(self.mean, mean @ V)
        dV = torch.cholesky_solve(right, self.factor)
        dR = torch.cat(
            [
                -torch.addmm(part, self._kept_activations(u, rows), dV)
                for rows, part in zip(self.batches, moved, strict=True)
            ]
        )
        if self.along is not None:
            dR += torch.outer(self.along, mean @ V + self.mean @ dV)
        return dR, dV

    def _kept_activations(self, u: torch.Tensor, rows: slice) -> torch.Tensor:
        """Activations of the point, not centred."""
        return self._activations(u, rows) if self.raw is None else self.raw

    def _dense(self, u: torch.Tensor) -> Dense:
        beta, V = self.beta, self.V
        r, p = u.shape
        q = V.shape[1]
        Phi = self.features
        A = self.A if self.samples_side else self._centred(self._kept_activations(u, slice(0, len(Phi))))
        first = torch.zeros_like(self.gates).scatter_(0, self.place, torch.arange(r, device=u.device))
        chosen = Phi.view(-1, r, p)[:, first]
        G = -torch.einsum("nkp,nq->kpq", chosen, self.R)
        blocks = beta * torch.eye(p, dtype=u.dtype, device=u.device) - G @ G.mT / beta
        index = torch.arange(r, device=u.device)
        grams = torch.einsum("nkp,nks->kps", chosen, chosen)[self.place]
        metric = grams * V.square().sum(1).view(r, 1, 1) + beta * torch.eye(p, dtype=u.dtype, device=u.device)
        if self.samples_side:
            # K[:, (j, a), c] = act_j G_k[a, c] - beta Phi_ka v_j[c];  the convex part is K^T S^-1 K / beta.
            K = A.unsqueeze(2).unsqueeze(3) * G[self.place].unsqueeze(0)
            K -= beta * Phi.view(-1, r, p, 1) * V.view(1, r, 1, q)
            half = torch.linalg.solve_triangular(self.factor, K.reshape(len(Phi), -1), upper=False)
            half = half.view(len(Phi), r * p, q).permute(0, 2, 1).reshape(-1, r * p)
            H = half.T @ half / beta
            H.view(r, p, r, p)[index, :, index, :] += absolute_blocks(blocks)[self.place]
        else:
            H = (Phi.T @ Phi).view(r, p, r, p) * (V @ V.T).view(r, 1, r, 1)
            H = H.reshape(r * p, r * p)
            H.diagonal().add_(beta)
            cross = (Phi.T @ A).view(r, p, r, 1) * V.view(r, 1, 1, q)
            cross[index, :, index, :] += G[self.place]
            cross = cross.permute(0, 1, 3, 2).reshape(r * p * q, r)
            half = torch.linalg.solve_triangular(self.factor, cross.T, upper=False).T.reshape(r * p, q * r)
            H.addmm_(half, half.T, alpha=-1)
            H.view(r, p, r, p)[index, :, index, :] += (absolute_blocks(blocks) - blocks)[self.place]
        full = torch.zeros_like(H)
        full.view(r, p, r, p)[index, :, index, :] = metric
        return Dense(H, full)

    def products_are_cheap(self) -> bool:
        # Per sample and column, a product takes 6 q operations more, an evaluation the number of columns.
        return 6 * self.Y.shape[1] <= max(len(self.gate), 2 * self.op.n_gates)

    def curvature_cost(self) -> float:
        n, (r, N), q = self.op.n_samples, (len(self.gate), self.n_variables), self.Y.shape[1]
        if self.samples_side:
            return n**3 / 3 + n**2 * q * N + N**2 * n * q + N**3 / 3
        return n * N**2 + N**2 * r * q + N**3 / 3
