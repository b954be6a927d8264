"""Gates that no optimum uses, known before it is reached: gap-safe screening (Ndiaye, Fercoq, Gramfort, Salmon 2017).

Reference: E. Ndiaye, O. Fercoq, A. Gramfort, J. Salmon, "Gap safe screening rules for sparsity enforcing penalties",
JMLR 18 (128), 2017.

Derivation. Let nu be feasible for the dual, maximise D(nu) = -F*(nu) subject to ||A_k*(nu)||_D* <= beta for all k (and
1^T nu = 0 with an intercept), and nu* the solution.

1. f_i is L-smooth, so F* is strongly convex: its curvature along row i is at least 1 / (L w_i), w_i the weight of the
   sample. D is at its maximum over a convex set in nu*, hence

       sum_i ||nu_i - nu*_i||^2 / (2 L w_i)  <=  D(nu*) - D(nu)  <=  primal - D(nu) =: gap,

   that is nu* = nu + diag(sqrt w) e with ||e||_F <= r = sqrt(2 L gap).
2. For an atom u v^T, ||u||_C <= 1 and ||v||_R <= 1, <u v^T, A_k*(diag(sqrt w) e)> is at most
   ||e||_F ||diag(sqrt w) A_k(u v^T)||_F. So ||A_k*(nu*)||_D* <= ||A_k*(nu)||_D* + r s_k, with s_k the largest
   ||diag(sqrt w) A_k(u v^T)||_F.
   With h_i(u) the hidden outputs of u, s_k <= R_R(q) max_u sqrt(sum_i w_i |h_i(u)|^2), R_R(q) the largest l2 norm
   where ||v||_R <= 1: a spectral norm for C = l2, a largest column for C = l1, sqrt(p) spectral norms for l-infinity.
3. With an intercept 1^T nu = 1^T nu* = 0: e is orthogonal to sqrt w, and the part of diag(sqrt w) h(u) along it
   drops out of s_k.
4. Z_k = 0 in every optimum, if ||A_k*(nu*)||_D* < beta: as -A_k*(nu*) is a subgradient of beta ||.||_D at Z_k.

For cones (ReLU) the same holds, as a maximum over a part of the atoms is no larger; points of factors are not screened
from so far. Everything is rounded upwards; a certificate does not rest on it, as its dual norms are those of all gates.
"""

from __future__ import annotations

import math

import torch

from cvxnn.bounds import DualBound
from cvxnn.evaluation import Evaluation
from cvxnn.problem import Problem

__all__ = ["gate_sizes", "inactive_gates", "safe_radius"]

_EPS = 2.0**-53
#: Targets of the cross entropy may sum to 1 within 1e-6, and its smoothness is relative to this sum.
_SMOOTHNESS_SLACK = 1e-5


def gate_sizes(problem: Problem) -> torch.Tensor:
    """Upper bounds (P,) of s_k, the largest ||diag(sqrt w) A_k(u v^T)||_F where ||u||_C <= 1 and ||v||_R <= 1.

    They do not depend on beta.
    """
    op, norm = problem.operator.double(), problem.norm
    _, p, q = op.block_shape
    in_ball, on_axes = op.hidden_norms(problem.weights, problem.output_bias)
    left = on_axes if norm.left == "l1" else in_ball * norm.radius(p, 1)
    return left * (norm.radius(1, q) * (1 + 16 * _EPS))


def safe_radius(problem: Problem, point: Evaluation, lower_bound: float) -> float:
    """r with ||e||_F <= r for the dual solution nu* = nu + diag(sqrt w) e, nu having this bound; may be infinite.

    Parameters
    ----------
    problem : Problem
    point : Evaluation
        A point with blocks; what rounding may have taken from its objective is added. For factors this is not known,
        and the radius is infinite.
    lower_bound : float
        :attr:`DualBound.lower_bound` of nu.
    """
    if point.Z is None or not (math.isfinite(point.primal) and math.isfinite(lower_bound)):
        return math.inf
    Y, w = problem.Y64, problem.weights
    # That of adding the intercept, and that of the map.
    error = 2 * _EPS * float(torch.linalg.vector_norm(point.predictions))
    error += problem.operator.double().apply_rounding(point.Z)
    slope = float(torch.linalg.vector_norm(problem.loss.gradient(point.predictions, Y, w)))
    smoothness = problem.loss.smoothness * (1 + _SMOOTHNESS_SLACK)
    rounding = 4 * (Y.numel() + sum(problem.operator.block_shape)) * _EPS * abs(point.primal)
    slack = error * (slope + smoothness * float(w.max()) * error / 2) + rounding
    return math.sqrt(2 * smoothness * max(0.0, point.primal - lower_bound + slack)) * (1 + 8 * _EPS)


def inactive_gates(beta: float, bound: DualBound, radius: float, sizes: torch.Tensor) -> torch.Tensor:
    """Which gates are zero in every optimum, (P,) bool.

    Parameters
    ----------
    beta : float
    bound : DualBound
        Of a dual point.
    radius : float
        :func:`safe_radius` of its lower bound.
    sizes : torch.Tensor of shape (P,)
        :func:`gate_sizes`.
    """
    # 0 times infinity is no bound.
    reach = torch.nan_to_num(radius * sizes, nan=math.inf, posinf=math.inf)
    return (bound.feasible_norms + reach) * (1 + 8 * _EPS) < beta
