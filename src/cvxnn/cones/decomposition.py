"""Cone decompositions z = u - w with u, w in one cone: from gated ReLU to ReLU networks.

Mishkin, Sahiner, Pilanci (2022), "Fast convex optimization for two-layer ReLU networks". On the training data the
gated neuron D_k X z equals the difference (X u)_+ - (X w)_+, so a gated solution becomes a ReLU network that predicts
the same, at the price of a larger penalty. With w = u - z the decompositions are the polyhedron {u : K u >= (K z)_+}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvxnn.cones.cones import Cones
from cvxnn.cones.projection import SOLVED, Constraints, solve
from cvxnn.errors import InvalidInputError
from cvxnn.validation import check_choice

__all__ = ["decompose"]

_TRIVIAL = 1e-12  # z (or -z) is in the cone to this: (z, 0), or (0, -z)
_GAP = 1e-10  # relative gap at which the iteration stops
_MAX_ITER = 100


def decompose(cones: Cones, gate: Tensor, z: Tensor, method: str = "exact") -> tuple[Tensor, Tensor]:
    """Write each z as u - w with u and w in the cone of its gate.

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (r,), long
    z : Tensor of shape (r, d)
        Finite.
    method : {"exact", "approximate"}
        "exact": ||u|| + ||w|| is the least possible, to 1e-8: the penalty of the ReLU program for c = 1.
        "approximate": ||u||^2 + ||w||^2 is; then ||u|| + ||w|| is at most sqrt(2) times the least.

    Returns
    -------
    u, w : Tensor of shape (r, d)
        Feasible to 1e-10 relative to their norms; u - w = z to rounding.

    Raises
    ------
    InvalidInputError
        `z` is not finite, or the cone of a gate has no decomposition of its z (cones without interior only).
    """
    check_choice(method, "method", ("exact", "approximate"))
    if not bool(z.isfinite().all()):
        raise InvalidInputError("z has NaN or infinite entries; finite numbers are wanted.")
    _, exponent = torch.frexp(z.double().abs().amax(1, keepdim=True))
    scaled = torch.ldexp(z.double(), -exponent)
    u, w = scaled.clone(), torch.zeros_like(scaled)
    outside = cones.violation(gate, scaled) > _TRIVIAL
    negative = (outside & (cones.violation(gate, -scaled) <= _TRIVIAL))[:, None]
    u, w = torch.where(negative, w, u), torch.where(negative, -scaled, w)
    left = (outside & ~negative[:, 0]).nonzero()[:, 0]
    for part in cones.blocks(len(left)):
        pairs = left[part]
        u[pairs], w[pairs] = _decompose(cones, gate[pairs], scaled[pairs], method == "exact")
    return torch.ldexp(u, exponent), torch.ldexp(w, exponent)


def _decompose(cones: Cones, gate: Tensor, z: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    signs = cones.signs(gate)
    rhs = (z @ cones.rows.T).mul_(signs).clamp_min_(0)
    constraints = Constraints(cones.rows, signs, rhs)
    found, status = solve(constraints, 0.5 * z)
    hard = (status != SOLVED).nonzero()[:, 0]
    if len(hard):
        found.point[hard] = _along_interior(cones, gate[hard], z[hard])
    u = _shortest(constraints, z, found.point, found.index) if exact else found.point
    return _feasible(cones, gate, z, u)


def _along_interior(cones: Cones, gate: Tensor, z: Tensor) -> Tensor:
    """u = z + t g, w = t g with interior points g, where the cones have one."""
    flat = (cones.interior(gate)[1] <= 0).nonzero()[:, 0]
    if len(flat):
        raise InvalidInputError(
            f"the cone of gate {int(gate[flat[0]])} has no interior, and z is not a difference of two of its points;"
            " a gate with an interior point, or z in the span of the cone, is wanted."
        )
    return cones.repair(gate, z)


def _shortest(constraints: Constraints, z: Tensor, u: Tensor, index: Tensor) -> Tensor:
    """Minimise ||u|| + ||u - z|| over polyhedra by sequential quadratic programming from feasible points."""
    best = u.clone()
    pairs = torch.arange(len(z), device=z.device)
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    for _ in range(_MAX_ITER):
        gradient, hessian, value = _derivatives(u, z, eye)
        factor = torch.linalg.cholesky(hessian)
        basis = torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True)
        target = _times(factor.mT, u) - _times(basis.mT, gradient)
        metric = Constraints(constraints.rows, constraints.signs, constraints.rhs, basis)
        found, _ = solve(metric, target, index)
        step = _times(basis, found.point) - u
        gap = value - _lower_bound(constraints, u, z, found.index, found.multiplier)
        slope = (gradient * step).sum(1)
        u, moved = _line_search(u, z, step, value, slope)
        best[pairs], index = u, found.index
        going = ((gap > _GAP * value) & moved).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(pairs):
            pairs, u, z, index = pairs[going], u[going], z[going], index[going]
            constraints = constraints.select(going)
    return best


def _derivatives(u: Tensor, z: Tensor, eye: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian (made definite) and value of ||u|| + ||u - z||."""
    w = u - z
    hessian, gradient, value = torch.zeros_like(u)[:, :, None] * eye, torch.zeros_like(u), torch.zeros_like(u[:, 0])
    for vector in (u, w):
        length = vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(u.dtype).eps)
        unit = vector / length
        hessian = hessian + (eye - unit[:, :, None] * unit[:, None, :]) / length[:, :, None]
        gradient, value = gradient + unit, value + length[:, 0]
    scale = hessian.diagonal(dim1=1, dim2=2).sum(1)
    return gradient, hessian + (1e-13 * scale)[:, None, None] * eye, value


def _lower_bound(constraints: Constraints, u: Tensor, z: Tensor, index: Tensor, multiplier: Tensor) -> Tensor:
    """z . v / max(||Proj(v)||, ||Proj(-v)||) from above, for v = u/||u|| - K^T lambda of the rows K u >= 0."""
    pairs = torch.arange(len(u), device=u.device)
    row = index.clamp_min(0)
    normals = constraints.normals(pairs, row)
    of_u = (normals @ z[:, :, None])[:, :, 0] <= 0
    unit = u / u.norm(dim=1, keepdim=True).clamp_min(torch.finfo(u.dtype).eps)
    first = _times(normals.mT, torch.where(of_u, multiplier, 0.0))
    second = _times(normals.mT, torch.where(of_u, 0.0, multiplier))
    dual = unit - first
    return (z * dual).sum(1) / (second - dual).norm(dim=1).clamp_min(1)


def _line_search(u: Tensor, z: Tensor, step: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Backtracking; also returns where a descent was found."""
    length = torch.ones_like(value)
    accepted = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(40):
        trial = u + length[:, None] * step
        reached = trial.norm(dim=1) + (trial - z).norm(dim=1)
        accepted = reached <= value + 1e-4 * length * slope
        if bool(accepted.all()):
            break
        length = torch.where(accepted, length, 0.5 * length)
    return torch.where(accepted[:, None], u + length[:, None] * step, u), accepted


def _feasible(cones: Cones, gate: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts in the cone, relative to their own lengths: the shorter one is projected, the other follows."""
    w = u - z
    first = (u.norm(dim=1) < w.norm(dim=1))[:, None]
    short = cones.project(gate, torch.where(first, u, w)).point
    return torch.where(first, short, z + short), torch.where(first, short - z, short)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]
