"""Two-sided bounds of the cone-constrained dual norm q(G, K) = max { ||G^T u|| : ||u|| <= 1, K u >= 0 }."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxnn.cones.alternating import alternate, direction_starts, support
from cvxnn.cones.branching import MAX_OUTPUTS, branch_and_bound
from cvxnn.cones.cones import FEASIBILITY, Cones
from cvxnn.cones.copositive import copositive_bounds, sdp_bounds
from cvxnn.cones.planar import Plane, planar_bounds
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.norms.base import EPS
from cvxnn.norms.nuclear import spectral_bounds
from cvxnn.validation import check_choice

__all__ = ["METHODS", "ConeDual", "cone_dual_norms"]

METHODS = ("auto", "spectral", "copositive", "sdp", "branching")
_RANK = 1e-14  # singular values below this, relative to the largest, go into the error
_CHUNK = 2**21  # entries of signs formed at once
_TINY = 1e-290  # below this, rounding is not relative


@dataclass
class ConeDual:
    """Bounds of max { ||G_k^T u|| : ||u|| <= 1, K_k u >= 0 } with witnesses.

    Attributes
    ----------
    lower, upper : Tensor of shape (B,)
        lower <= the dual norm of every matrix within `error` of G_k <= upper, rounding included. `upper` holds for
        the exact cone; `lower` is what the witness attains, never more than `upper`.
    u : Tensor of shape (B, d)
        Witnesses: of norm 1 and in their cones to a relative 1e-10, or zero.
    v : Tensor of shape (B, c)
        G_k^T u_k / ||G_k^T u_k||, or zero.
    """

    lower: Tensor
    upper: Tensor
    u: Tensor
    v: Tensor


def cone_dual_norms(
    cones: Cones,
    gate: Tensor,
    G: Tensor,
    error: float | Tensor = 0.0,
    *,
    method: str = "auto",
    starts: int = 16,
    init: Tensor | None = None,
    tolerance: float = 1e-6,
    max_evaluations: int = 4000,
    random_state: int = 0,
    deadline: float = math.inf,
) -> ConeDual:
    """Bounds of the dual norm of the ReLU program for matrices G_k in the cones of gates (section 3 of the maths).

    Parameters
    ----------
    cones : Cones
    gate : Tensor of shape (B,), long
        The gate of each matrix; a gate may come more than once.
    G : Tensor of shape (B, d, c)
    error : float or Tensor of shape (B,)
        Bound on the Frobenius norm of the perturbation of each G_k, such as the rounding of forming it.
    method : {"auto", "spectral", "copositive", "sdp", "branching"}
        How to bound from above. "auto" is exact for matrices of rank one (c = 1) and for rows X of rank two or
        less, branches for matrices of rank two and three, and otherwise uses "copositive". "sdp" needs CVXPY.
    starts : int
        Random starts of the alternating maximisation, beside the structured ones.
    init : Tensor of shape (B, s, c), optional
        More directions v to start from, such as those of an earlier call.
    tolerance : float
        Upper bounds are not improved further when within this relative distance of the lower ones.
    max_evaluations : int
        Most projections per matrix for "branching"; bounds are sound however early it stops.
    random_state : int
        Seed of the random starts.
    deadline : float
        Value of ``time.perf_counter()`` at which to stop searching, for matrices of rank above one.

    Returns
    -------
    ConeDual
        Matrices with NaN or infinite entries get 0 and infinity.

    Raises
    ------
    InvalidInputError
        If shapes do not fit or `error` is negative.
    UnsupportedError
        If method="branching" and a matrix has a rank above 3.
    """
    check_choice(method, "method", METHODS)
    gate, G, error = _check(cones, gate, G, error)
    if len(gate) == 0:
        return ConeDual(G[:, 0, 0], G[:, 0, 0], G[:, :, 0], G[:, 0])
    scaled, exponent, finite = _normalise(G)
    search = _Search(cones, method, starts, tolerance, max_evaluations, random_state, deadline)
    upper, u = search.bounds(gate, scaled, init)
    upper = torch.minimum(upper, spectral_bounds(scaled)[1])
    u, v, lower = _witness(cones, gate, scaled, u)
    upper = (_ldexp(upper, exponent) + error) * (1 + 8 * EPS) + torch.where(upper > 0, _TINY, 0.0)
    lower = (_ldexp(lower, exponent) - error) * (1 - 8 * EPS) - _TINY
    upper = torch.where(finite & ~upper.isnan(), upper, math.inf)
    lower = torch.where(finite, torch.minimum(lower.clamp_min(0), upper), 0.0)
    return ConeDual(lower, upper, u, v)


@dataclass
class _Search:
    """Upper bounds and candidates for the witness, by the method asked for; G has largest entries near 1."""

    cones: Cones
    method: str
    starts: int
    tolerance: float
    max_evaluations: int
    random_state: int
    deadline: float

    def bounds(self, gate: Tensor, G: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor]:
        """Upper bounds (B,) and directions u (B, d)."""
        plane = self.cones.plane if self.method == "auto" else None
        upper, u = G.new_zeros(len(gate)), G.new_zeros(G.shape[:2])
        for part in torch.arange(len(gate), device=G.device).split(max(64, _CHUNK // max(1, len(self.cones.rows)))):
            some = None if init is None else init[part]
            if plane is None:
                upper[part], u[part] = self._general(gate[part], G[part], some)
            else:
                upper[part], u[part] = self._planar(plane, gate[part], G[part], some)
        return upper, u

    def _planar(self, plane: Plane, gate: Tensor, G: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor]:
        """The exact bounds; matrices with a part outside the plane, which are unusual, are searched."""
        upper, u = planar_bounds(self.cones, plane, gate, G)
        value = torch.einsum("bdc,bd->bc", G, u).norm(dim=1)
        norms = G.flatten(1).norm(dim=1)
        off = G - plane.basis @ (plane.basis.T @ G)
        rest = (off.flatten(1).norm(dim=1) > self.tolerance * norms).nonzero()[:, 0]
        if len(rest):
            other, found = self._general(gate[rest], G[rest], None if init is None else init[rest])
            reached = torch.einsum("bdc,bd->bc", G[rest], found).norm(dim=1)
            upper[rest] = torch.minimum(upper[rest], other)
            u[rest] = torch.where((reached > value[rest])[:, None], found, u[rest])
        return upper, u

    def _general(self, gate: Tensor, G: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor]:
        basis, reduced, lost, inflation = _compress(G)
        init = None if init is None else init.to(G) @ basis
        if reduced.shape[2] == 1 and self.method in ("auto", "branching"):
            upper, u = _scalar(self.cones, gate, reduced[:, :, 0])
        else:
            upper, u = self._matrix(gate, reduced, init)
        return upper * inflation + lost, u

    def _matrix(self, gate: Tensor, G: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor]:
        """Alternating maximisation from below and one of the bounds from above."""
        v = direction_starts(self.cones, gate, G, self.starts, self.random_state)
        if init is not None:
            v = torch.cat([v, init / init.norm(dim=2, keepdim=True).clamp_min(1e-300)], 1)
        u, v, value = alternate(self.cones, gate, G, v, deadline=self.deadline)
        method = self.method
        if method == "auto":
            method = "branching" if G.shape[2] <= MAX_OUTPUTS else "copositive"
        if method == "branching":
            if G.shape[2] > MAX_OUTPUTS:
                raise UnsupportedError(
                    f"method='branching' serves matrices of rank at most {MAX_OUTPUTS}, got rank {G.shape[2]};"
                    " use method='copositive'."
                )
            return branch_and_bound(self.cones, gate, G, u, value, self.tolerance, self.max_evaluations, self.deadline)
        if method == "copositive":
            return copositive_bounds(self.cones, gate, G, value, tolerance=self.tolerance, deadline=self.deadline), u
        if method == "sdp":
            return sdp_bounds(self.cones, gate, G), u
        return spectral_bounds(G)[1], u


def _scalar(cones: Cones, gate: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """c = 1: the larger projection of z and of -z; ||z + K^T lambda|| is a bound for all multipliers."""
    both = support(cones, gate.repeat(2), torch.cat([z, -z]))
    first, second = both.upper.split(len(z))
    values = both.value.split(len(z))
    one, other = both.u.split(len(z))
    return torch.maximum(first, second), torch.where((values[0] >= values[1])[:, None], one, other)


def _compress(G: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Matrices G R (B, d, r) with the same dual norms, r the largest rank of the batch.

    Returns
    -------
    R : Tensor of shape (B, c, r)
        Right singular vectors.
    reduced : Tensor of shape (B, d, r)
    lost : Tensor of shape (B,)
        Bound on ||G - G R R^T||_F.
    inflation : float
        Bound on ||R||_2.
    """
    c = G.shape[2]
    if c == 1:
        return torch.ones_like(G[:, :1]), G, G.new_zeros(len(G)), 1.0
    _, s, Vh = torch.linalg.svd(G, full_matrices=False)
    rank = max(1, int((s > _RANK * s[:, :1]).sum(1).max()))
    R = Vh[:, :rank].mT
    reduced = G @ R
    norms = G.flatten(1).norm(dim=1)
    lost = (G - reduced @ R.mT).flatten(1).norm(dim=1) + 8 * (c + 4) * EPS * norms
    defect = float((R.mT @ R - torch.eye(rank, dtype=G.dtype, device=G.device)).flatten(1).norm(dim=1).amax())
    return R, reduced, lost, 1 + defect + 8 * (c + 4) * EPS


def _witness(cones: Cones, gate: Tensor, G: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit directions checked against their cones (else zero), v, and the values attained, rounding subtracted."""
    norms = u.norm(dim=1)
    u = u / torch.where(norms > 0, norms, 1.0)[:, None]
    feasible = (cones.violation(gate, u) <= FEASIBILITY) & (norms > 0) & norms.isfinite()
    image = torch.einsum("bdc,bd->bc", G, u)
    value = torch.where(feasible, image.norm(dim=1), 0.0)
    allowance = 4 * (G.shape[1] + G.shape[2] + 4) * EPS * G.flatten(1).norm(dim=1)
    attained = value > 0
    v = torch.where(attained[:, None], image / torch.where(attained, value, 1.0)[:, None], 0.0)
    return torch.where(feasible[:, None], u, 0.0), v, (value - allowance).clamp_min(0)


def _normalise(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices divided by powers of two to largest entries in [1/2, 1), the exponents, and which are finite."""
    largest = G.abs().amax((1, 2))
    finite = largest.isfinite()
    G = torch.where(finite[:, None, None], G, 0.0)
    exponent = torch.frexp(torch.where(finite, largest, 0.0)).exponent
    return _ldexp(G, -exponent[:, None, None]), exponent, finite


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent in two exact steps, so that neither power overflows."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    one = torch.ones_like(x)
    return x * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


def _check(cones: Cones, gate: Tensor, G: Tensor, error: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if G.ndim != 3 or G.shape[1] != cones.n_features or G.shape[2] == 0:
        raise InvalidInputError(f"G must have shape (B, {cones.n_features}, c) with c >= 1, got {tuple(G.shape)}.")
    gate = torch.as_tensor(gate, dtype=torch.long, device=cones.rows.device)
    if gate.shape != G.shape[:1]:
        raise InvalidInputError(f"gate must have shape ({G.shape[0]},) as G has, got {tuple(gate.shape)}.")
    if len(gate) and not 0 <= int(gate.min()) <= int(gate.max()) < cones.n_gates:
        raise InvalidInputError(
            f"gate must lie in 0 .. {cones.n_gates - 1}, got values from {int(gate.min())} to {int(gate.max())}."
        )
    bound = torch.as_tensor(error, dtype=torch.float64, device=cones.rows.device)
    if bound.ndim > 0 and bound.shape != G.shape[:1]:
        raise InvalidInputError(f"error must be a number or have shape ({G.shape[0]},), got {tuple(bound.shape)}.")
    if not bool((bound >= 0).all()):
        raise InvalidInputError(f"error must not be negative or NaN, got a minimum of {float(bound.min())}.")
    return gate, G.to(device=cones.rows.device, dtype=torch.float64), bound
