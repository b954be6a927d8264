"""The lengths of columns with fixed directions: a convex problem over non-negative masses."""

from __future__ import annotations

import torch

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss

__all__ = ["MOST_NUMBERS", "best_masses"]

#: Predictions of unit columns are formed where they have at most so many numbers.
MOST_NUMBERS = 2e7
_RIDGE = 1e-13
_ARMIJO = 1e-4
_HALVINGS = 40
_ROUNDING = 1e-15


def best_masses(
    loss: FactoredLoss, columns: Columns, b: torch.Tensor, limit: int = 50, tolerance: float = 1e-10
) -> tuple[Columns, torch.Tensor]:
    """Columns of the same directions with the masses m_j = ||u_j|| ||v_j|| that minimise the objective.

    F(sum_j m_j h_j v_j^T + 1 b^T) + beta sum_j m_j over m >= 0 and b, h and v of unit columns, by projected
    Newton steps (Bertsekas 1982): masses at zero that want to be negative stay there.

    Parameters
    ----------
    columns : Columns
        None of them zero.
    limit : int
        Limit of Newton steps.
    tolerance : float
        Residual at which to end, relative to beta and the masses.

    Returns
    -------
    Columns (balanced, empty ones left out) and intercept
    """
    solver = _Masses(loss, columns)
    mass, b = solver.run(columns.sizes(), b, limit, tolerance)
    root = mass.sqrt().unsqueeze(1)
    kept = mass > 0
    return Columns(columns.gate, solver.u * root, solver.v * root)[kept], b


class _Masses:
    def __init__(self, loss: FactoredLoss, columns: Columns) -> None:
        problem = loss.problem
        self.loss, self.beta, self.bias = loss, problem.beta, problem.output_bias
        self.u = columns.u / columns.u.norm(dim=1, keepdim=True)
        self.v = columns.v / columns.v.norm(dim=1, keepdim=True)
        self.r = len(columns)
        atoms = loss.op.apply_atoms(columns.gate, self.u, self.v)
        if self.bias:
            units = torch.eye(atoms.shape[2], dtype=atoms.dtype, device=atoms.device)
            atoms = torch.cat([atoms, units[:, None, :].expand(-1, atoms.shape[1], -1)])
        self.atoms = atoms
        self.cost = torch.zeros_like(atoms[:, 0, 0])
        self.cost[: self.r] = self.beta

    def value(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Objective and predictions; x holds the masses and, with an output bias, b."""
        outputs = torch.einsum("r,rnc->nc", x, self.atoms)
        value = self.loss.problem.loss.value(outputs, self.loss.Y, self.loss.weights)
        return float(value + self.cost @ x), outputs

    def run(
        self, mass: torch.Tensor, b: torch.Tensor, limit: int, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        problem, loss = self.loss.problem, self.loss
        x = torch.cat([mass, b]) if self.bias else mass
        value, outputs = self.value(x)
        flat = self.atoms.flatten(1)
        for _ in range(limit):
            gradient = problem.loss.gradient(outputs, loss.Y, loss.weights)
            slope = flat @ gradient.flatten() + self.cost
            bound = x <= 0
            bound[self.r :] = False
            free = ~(bound & (slope >= 0))
            if float((slope * free).abs().max()) <= tolerance * self.beta:
                break
            second = problem.loss.hessian_product(outputs, loss.Y, loss.weights, self.atoms[free])
            H = flat[free] @ second.flatten(1).T
            H.diagonal().add_(_RIDGE * H.diagonal().max() + 1e-300)
            factor, failed = torch.linalg.cholesky_ex(H)
            if bool(failed):
                H.diagonal().add_(1e-8 * H.diagonal().max())
                factor = torch.linalg.cholesky_ex(H)[0]
            direction = torch.zeros_like(x)
            direction[free] = torch.cholesky_solve(-slope[free, None], factor)[:, 0]
            moved = self._search(x, value, slope, direction)
            if moved is None:
                break
            x, value, outputs = moved
        return x[: self.r], x[self.r :] if self.bias else b

    def _search(
        self, x: torch.Tensor, value: float, slope: torch.Tensor, direction: torch.Tensor
    ) -> tuple[torch.Tensor, float, torch.Tensor] | None:
        step = 1.0
        for _ in range(_HALVINGS):
            trial = x + step * direction
            trial[: self.r].clamp_min_(0)
            new, outputs = self.value(trial)
            promised = float(slope @ (x - trial))
            if promised > 0 and new <= value - _ARMIJO * promised and value - new > _ROUNDING * abs(value):
                return trial, new, outputs
            step /= 2
        return None
