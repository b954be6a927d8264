"""The quadratic model of (19) at a point, and its minimiser over the cones by an active-set method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvxnn.columns import Columns
from cvxnn.cones import Cones, Projection
from cvxnn.factored import FactoredLoss, Slopes
from cvxnn.solvers.burer_monteiro.local import block_slopes, jacobian, selected_features

__all__ = ["ConeModel", "ModelStep", "model_numbers", "model_operations"]

#: Most guesses of the faces for one minimiser of the model.
_GUESSES = 12
#: An entry of the face bases belongs to the face where its eigenvalue is above this; they are 0 or 1.
_IN_FACE = 0.5


@dataclass
class ModelStep:
    """A feasible target of a step, what the model promises for it, and whether the model is at its minimum there."""

    u: torch.Tensor
    v: torch.Tensor
    b: torch.Tensor
    promised: float
    exact: bool


def model_numbers(columns: Columns, loss: FactoredLoss) -> int:
    """Numbers that a model keeps."""
    N = _n_variables(columns, loss)
    return N * N + N * loss.Y.numel()


def model_operations(columns: Columns, loss: FactoredLoss) -> float:
    """Floating-point operations of a model and one factorisation, about."""
    N = _n_variables(columns, loss)
    return 2.0 * N**2 * loss.Y.numel() + N**3 / 3


def _n_variables(columns: Columns, loss: FactoredLoss) -> int:
    return columns.u.numel() + columns.v.numel() + (loss.Y.shape[1] if loss.problem.output_bias else 0)


class ConeModel:
    """J^T F'' J + [beta I, G_k; G_k^T, beta I] in the variables (u, v, b) at a point, and its gradient.

    Restricted to the faces on which columns lie, the second part, block-diagonal, has the negative part of its
    spectrum turned positive; the cones are polyhedral and have no curvature of their own.

    Parameters
    ----------
    loss : FactoredLoss
    cones : Cones
    columns : Columns
        Feasible.
    b : torch.Tensor of shape (c,)
    slopes : Slopes
        Of the loss at this point.
    """

    def __init__(self, loss: FactoredLoss, cones: Cones, columns: Columns, b: torch.Tensor, slopes: Slopes) -> None:
        self.cones, self.gate = cones, columns.gate
        self.beta = beta = loss.problem.beta
        self.u, self.v, self.b = columns.u, columns.v, b
        self.bias = loss.problem.output_bias
        (r, d), q = columns.u.shape, columns.v.shape[1]
        self.shape = r, d, q
        rows = slice(0, loss.op.n_samples)
        hidden = loss.op.hidden(columns.gate, columns.u, rows)
        outputs = torch.addmm(b, hidden, loss.op.split_right(columns.v))
        gradient = loss.problem.loss.gradient(outputs, loss.Y, loss.weights)
        Phi = selected_features(loss, columns.gate)
        self.cross = block_slopes(loss.op, Phi, gradient)
        self.gauss = self._gauss_newton(loss, Phi, hidden, outputs)
        diagonal = self.gauss.diagonal()
        largest = diagonal[: r * d].view(r, d).amax(1, keepdim=True).expand(r, d)
        #: In which steps are damped; the same in all directions of a u_j, so that faces do not matter.
        self.metric = torch.cat([largest.flatten(), diagonal[r * d :]]) + beta
        parts = [slopes.left + beta * self.u, slopes.right + beta * self.v]
        self.slope = torch.cat([part.flatten() for part in (*parts, slopes.intercept)])[: len(self.gauss)]

    def _gauss_newton(
        self, loss: FactoredLoss, Phi: torch.Tensor, hidden: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        J = jacobian(loss.op, Phi, hidden, self.v, self.bias)
        second = loss.problem.loss.hessian_product(outputs, loss.Y, loss.weights, J)
        H = J.flatten(1) @ second.flatten(1).T
        return (H + H.T) / 2

    def minimise(self, start: Projection, damping: float) -> ModelStep | None:
        """A target near the minimiser of the damped model over the cones; None where the model has none.

        The faces of a guess fix a linear system; projecting from its solution along the negative gradient of
        the model gives the next guess, until the faces stay the same. On the way the best feasible point seen
        is kept; where guesses come again, the next one is from there.
        """
        r, d, _ = self.shape
        M = self._damped(start, damping)
        lengths = 1 / M.diagonal()[: r * d].view(r, d).amax(1, keepdim=True)
        projection, best = start, torch.zeros_like(self.slope)
        exact, seen = False, [_faces(start)]
        for _ in range(_GUESSES):
            step = self._on_faces(M, projection)
            if step is None:
                break
            found = self._project(step, self.slope + M @ step, lengths, projection)
            exact = _equal(seen[-1], _faces(found))
            best = self._better(M, best, found, step)
            if exact:
                break
            if any(_equal(_faces(found), old) for old in seen):
                found = self._project(best, self.slope + M @ best, lengths, found)
                best = self._better(M, best, found, best)
                if any(_equal(_faces(found), old) for old in seen):
                    break
            projection = found
            seen.append(_faces(found))
        return self._target(M, best, exact)

    def _damped(self, start: Projection, damping: float) -> torch.Tensor:
        """The model as a matrix: what is indefinite in the second part is turned positive on the faces of a guess."""
        r, d, q = self.shape
        M = self.gauss.clone()
        M.diagonal().add_(damping * self.metric)
        projector = self.cones.tangent(start, self.gate)
        G = torch.einsum("rab,rbc->rac", projector, self.cross)
        blocks = self.beta * torch.eye(d + q, dtype=G.dtype, device=G.device).repeat(r, 1, 1)
        blocks[:, :d, d:], blocks[:, d:, :d] = G, G.mT
        values, vectors = torch.linalg.eigh(blocks)
        positive = (vectors * values.abs().unsqueeze(1)) @ vectors.mT
        rest = self.cross - G
        positive[:, :d, d:] += rest
        positive[:, d:, :d] += rest.mT
        index = torch.arange(r, device=M.device)[:, None]
        of_u = index * d + torch.arange(d, device=M.device)
        where = torch.cat([of_u, r * d + index * q + torch.arange(q, device=M.device)], 1)
        M[where.unsqueeze(2), where.unsqueeze(1)] += positive
        return M

    def _project(self, step: torch.Tensor, slope: torch.Tensor, lengths: torch.Tensor, start: Projection) -> Projection:
        """A projected gradient step on the model, in u."""
        r, d, _ = self.shape
        u = self.u + step[: r * d].view(r, d) - lengths * slope[: r * d].view(r, d)
        return self.cones.project(self.gate, u, start)

    def _better(self, M: torch.Tensor, best: torch.Tensor, found: Projection, step: torch.Tensor) -> torch.Tensor:
        """The least point of the model between the best one and u of a projection with v and b of a step."""
        head = self.shape[0] * self.shape[1]
        move = torch.cat([(found.point - self.u).flatten(), step[head:]]) - best
        bent = M @ move
        slope, bend = float(self.slope @ move + best @ bent), float(move @ bent)
        if not slope < 0:
            return best
        length = min(1.0, -slope / bend) if bend > 0 else 1.0
        return best + length * move

    def _target(self, M: torch.Tensor, step: torch.Tensor, exact: bool) -> ModelStep | None:
        r, d, q = self.shape
        promised = -float(self.slope @ step + step @ (M @ step) / 2)
        if not promised > 0:
            return None
        v = self.v + step[r * d : r * (d + q)].view(r, q)
        b = self.b + step[r * (d + q) :] if self.bias else self.b
        return ModelStep(self.u + step[: r * d].view(r, d), v, b, promised, exact)

    def _on_faces(self, M: torch.Tensor, projection: Projection) -> torch.Tensor | None:
        """The step to the minimiser of the model with every u_j in the span of its face."""
        r, d, _ = self.shape
        projector = self.cones.tangent(projection, self.gate)
        values, Q = torch.linalg.eigh(projector)
        kept = torch.ones(len(self.slope), dtype=torch.bool, device=self.slope.device)
        kept[: r * d] = (values > _IN_FACE).flatten()
        inside = kept.nonzero()[:, 0]
        offset = torch.zeros_like(self.slope)
        offset[: r * d] = (torch.einsum("rab,rb->ra", projector, self.u) - self.u).flatten()
        right = self._rotate(self.slope + M @ offset, Q)[inside]
        half = self._rotate(M, Q)[inside]
        factor, failed = torch.linalg.cholesky_ex(self._rotate(half.T, Q)[inside])
        if bool(failed):
            return None
        inner = torch.zeros_like(self.slope)
        inner[inside] = torch.cholesky_solve(-right[:, None], factor)[:, 0]
        return offset + self._rotate(inner, Q.mT)

    def _rotate(self, x: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        """x (N, ...) with its entries of u_j in the basis Q_j."""
        r, d, _ = self.shape
        head = torch.bmm(Q.mT, x[: r * d].reshape(r, d, -1)).reshape(r * d, *x.shape[1:])
        return torch.cat([head, x[r * d :]])


def _faces(projection: Projection) -> torch.Tensor:
    """The active rows with positive multipliers, sorted, (r, a); vertices have the entry -2 first."""
    rows = torch.where(projection.multiplier > 0, projection.index, -1).sort(dim=1, descending=True).values
    vertex = (projection.point.abs().amax(1) == 0) & (projection.multiplier.amax(1) > 0)
    return torch.where(vertex[:, None], -2, rows)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
