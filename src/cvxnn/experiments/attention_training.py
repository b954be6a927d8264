"""Blocks of linear self-attention trained from many starts at the same time, each as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cvxnn.curvature import Curvature
from cvxnn.diagnosis import Diagnosis, diagnose
from cvxnn.experiments.stationary import nearby_stationary_point
from cvxnn.problem import Problem
from cvxnn.solvers.lbfgs import minimise

__all__ = ["Heads", "Polished", "descend", "draw_factors", "draw_weights", "factors_of", "polish", "train_adam"]

Factors = tuple[torch.Tensor, torch.Tensor]

#: Share of the slope by which a step of gradient descent has to lower the objective.
_ARMIJO = 0.3
_GROWTH, _SHRINKING = 1.5, 0.5
_LBFGS_STEPS, _LBFGS_HISTORY = 5000, 50
#: Newton's method ends at this relative residual; time is no limit in practice, so that runs can be repeated.
_RESIDUAL, _NEWTON_STEPS, _NEWTON_SECONDS = 1e-10, 60, 600.0
#: The first step along a direction of negative curvature, relative to the size of the factors.
_FIRST_STEP = 1e-4
_DOUBLINGS = 30


class Heads:
    """The objective (26) of a small problem at many factors (U, V) together.

    Parameters
    ----------
    problem : Problem
        Linear attention with the squared loss, l2 norms and no intercept, small enough for its d^3 features.
    """

    def __init__(self, problem: Problem) -> None:
        op = problem.operator.double()
        self.features = op.features(slice(0, op.n_samples))
        self.Y = problem.Y64
        self.weights = problem.weights
        self.beta = problem.beta
        _, self.p, self.q = op.block_shape
        self.dim = round(self.p**0.5)

    def losses(self, U: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The losses (S,) of factors (S, p, m) and (S, q, m), and their gradients."""
        S, d, c = len(U), self.dim, self.q // self.dim
        blocks = (U @ V.mT).view(S, d, d, d, c).permute(3, 1, 2, 0, 4).reshape(d**3, S * c)
        residual = (self.features @ blocks).view(-1, S, c) - self.Y.unsqueeze(1)
        weighted = self.weights.view(-1, 1, 1) * residual
        slopes = (self.features.T @ weighted.view(len(weighted), S * c)).view(d, d, d, S, c)
        G = slopes.permute(3, 1, 2, 0, 4).reshape(S, self.p, self.q)
        return (weighted * residual).sum((0, 2)) / 2, G @ V, G.mT @ U

    def slopes(self, U: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The objectives (S,), weight decay included, and their gradients."""
        values, left, right = self.losses(U, V)
        decay = self.beta / 2 * (U.square().sum((1, 2)) + V.square().sum((1, 2)))
        return values + decay, left + self.beta * U, right + self.beta * V


def draw_factors(p: int, q: int, m: int, seeds: tuple[int, ...], scales: tuple[float, ...]) -> Factors:
    """Normal factors (S, p, m) and (S, q, m), the entries of each start times its scale."""
    parts = []
    for seed, scale in zip(seeds, scales, strict=True):
        generator = torch.Generator().manual_seed(seed)
        parts.append(scale * torch.randn(p + q, m, generator=generator, dtype=torch.float64))
    stacked = torch.stack(parts)
    return stacked[:, :p].contiguous(), stacked[:, p:].contiguous()


def draw_weights(d: int, c: int, m: int, seeds: tuple[int, ...]) -> Factors:
    """Weights W1 (S, m, d, d) and W2 (S, m, d, c) as torch draws those of linear layers."""
    first, second = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            first.append(torch.stack([nn.Linear(d, d, bias=False).weight.detach().T for _ in range(m)]))
            second.append(torch.stack([nn.Linear(d, c, bias=False).weight.detach().T for _ in range(m)]))
    return torch.stack(first).double(), torch.stack(second).double()


def factors_of(W1: torch.Tensor, W2: torch.Tensor) -> Factors:
    """The factors of networks: u_j holds W1_j column by column, v_j holds W2_j row by row."""
    return W1.mT.flatten(2).mT.contiguous(), W2.flatten(2).mT.contiguous()


def descend(heads: Heads, factors: Factors, steps: int) -> Factors:
    """Gradient descent, each start with a step of its own: longer after a success, half as long after a failure."""
    U, V = factors
    size = U.new_ones(len(U))
    value, left, right = heads.slopes(U, V)
    for _ in range(steps):
        step = size.view(-1, 1, 1)
        trial = U - step * left, V - step * right
        found, *slopes = heads.slopes(*trial)
        wanted = _ARMIJO * size * (left.square().sum((1, 2)) + right.square().sum((1, 2)))
        better = found <= value - wanted
        chosen = better.view(-1, 1, 1)
        U, V = (torch.where(chosen, new, old) for new, old in zip(trial, (U, V), strict=True))
        left, right = (torch.where(chosen, new, old) for new, old in zip(slopes, (left, right), strict=True))
        value = torch.where(better, found, value)
        size = torch.where(better, _GROWTH * size, _SHRINKING * size)
    return U, V


def train_adam(heads: Heads, weights: Factors, learning_rate: float, steps: int) -> Factors:
    """Networks sum_j X W1_j X^T X W2_j trained by torch's Adam with ``weight_decay=beta``, full batch.

    Adam changes each weight from its own gradients alone, so that networks which are trained together end where they
    would end separately. The learning rate falls to zero along a cosine.

    Parameters
    ----------
    weights : pair of torch.Tensor of shapes (S, m, d, d) and (S, m, d, c)

    Returns
    -------
    pair of torch.Tensor
        The factors of the trained networks.
    """
    U, V = (nn.Parameter(part) for part in factors_of(*weights))
    rule = torch.optim.Adam([U, V], lr=learning_rate, weight_decay=heads.beta)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule, steps)
    for _ in range(steps):
        _, U.grad, V.grad = heads.losses(U.detach(), V.detach())
        rule.step()
        schedule.step()
    return U.detach(), V.detach()


@dataclass(frozen=True)
class Polished:
    """A point that was followed to stationarity.

    Attributes
    ----------
    factors : pair (U, V) of shapes (1, p, m) and (1, q, m)
    diagnosis : Diagnosis
    n_escapes : int
        How often a saddle was left along its direction of negative curvature.
    """

    factors: Factors
    diagnosis: Diagnosis
    n_escapes: int


def polish(problem: Problem, heads: Heads, factors: Factors, max_escapes: int) -> Polished:
    """L-BFGS from a point, and Newton's method on the stationarity conditions; on from saddles, as from a start.

    Parameters
    ----------
    factors : pair of torch.Tensor of shapes (1, p, m) and (1, q, m)
    max_escapes : int
        A saddle is left along the eigenvector of the smallest eigenvalue at most so often.
    """
    for n_escapes in range(max_escapes + 1):
        factors = _stationary(problem, heads, factors)
        found = diagnose(problem, factors)
        curvature = found.curvature
        saddle = found.stationary and curvature is not None and curvature.value < -found.curvature_threshold
        if curvature is None or not saddle or n_escapes == max_escapes:
            break
        factors = _along(heads, factors, curvature)
    return Polished(factors, found, n_escapes)


def _stationary(problem: Problem, heads: Heads, factors: Factors) -> Factors:
    def objective(U: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        value, *slopes = heads.slopes(U, V)
        return value.sum(), slopes

    reached = minimise(
        objective, list(factors), _LBFGS_STEPS, gtol=1e-10 * heads.beta, ftol=0.0, history=_LBFGS_HISTORY
    )
    U, V = reached.parts
    return nearby_stationary_point(problem, (U, V), seconds=_NEWTON_SECONDS, tol=_RESIDUAL, max_iter=_NEWTON_STEPS)


def _along(heads: Heads, factors: Factors, curvature: Curvature) -> Factors:
    """The best of some points along a direction of negative curvature, both ways, at doubling distances."""
    size = max(float(sum(part.square().sum() for part in factors)) ** 0.5, 1.0)
    best, lowest = factors, float("inf")
    for k in range(_DOUBLINGS):
        trials = []
        for sign in (1.0, -1.0):
            step = sign * _FIRST_STEP * size * 2.0**k
            point = tuple(part + step * change for part, change in zip(factors, curvature.direction, strict=True))
            trials.append((float(heads.slopes(*point)[0]), (point[0], point[1])))
        value, point = min(trials, key=lambda trial: trial[0])
        if value >= lowest:
            break
        best, lowest = point, value
    return best
