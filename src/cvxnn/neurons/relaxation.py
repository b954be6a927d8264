"""Upper bounds of the values of ReLU neurons on simplicial cones of hidden weights.

A cone is spanned by unit vectors u_1 .. u_r, all in one orthant: u = sum_j t_j u_j, t >= 0. On it a sample
whose sign does not change is linear. For any other, and any slope s in [0, 1],

    s x.u <= (x.u)_+ <= sum_j t_j (x.u_j)_+ ,

so that the value is at most a.t for some a (r,), and for any p in R^r

    max { a.t : ||u|| <= 1 } <= ||p|| + sqrt(r) max_j (a_j - p.u_j)_+ ,

because u_j.u_k >= 0 gives sum_j t_j <= sqrt(r) ||u||. With several outputs, v the direction at the centre and
s(u) = sum_i (x_i.u)_+ nu_i: |v.s(u)| and the norm of the rest of s(u) are both at most linear in t, and the norm
of two such bounds is convex, hence at most the interpolation of its values at the u_j.
"""

import copy
import math

import torch
from torch import Tensor

from cvxnn.norms.nuclear import spectral_bounds

__all__ = ["Relaxation", "cap_bound", "halved", "orthants"]

SLOPE_STEPS = (8, 40)  # where many and where few samples are of unsettled sign


class Relaxation:
    """Linear bounds a.t of the values in a batch of cones.

    Parameters
    ----------
    vertices : Tensor of shape (B, r, r)
        Unit vectors in rows, those of one cone in one orthant.
    values : Tensor of shape (B, A, r)
        x_i . u_j of the samples of unsettled sign; `rows` (B, A, r) and `nu` (B, A, c) are their x_i and nu_i.
    linear : Tensor of shape (B, r, c)
        sum of x_i nu_i^T over the samples that are active on the whole cone.
    side : Tensor of shape (B,)
        The sign of the value that is bounded where c = 1.
    best : float
        A value that is attained.
    margin : float
        Bound of the rounding errors of the linear bounds.
    """

    def __init__(
        self,
        vertices: Tensor,
        values: Tensor,
        rows: Tensor,
        nu: Tensor,
        linear: Tensor,
        side: Tensor,
        best: float,
        margin: float,
    ) -> None:
        self.vertices, self.values, self.rows, self.nu, self.side = vertices, values, rows, nu, side
        self.best, self.margin = best, margin
        self.positive = values.clamp_min(0)
        self.slope = self.positive.sum(-1) / values.abs().sum(-1).clamp_min(1e-300)
        self.ends = vertices @ linear  # (B, r, c), the settled part at the vertices
        self.direction = self._direction()
        self.w = (self.nu @ self.direction[:, :, None])[:, :, 0]
        self.concave = self.w < 0

    def _direction(self) -> Tensor:
        """Signs where c = 1, else the direction of s(u) at the centre."""
        if self.nu.shape[2] == 1:
            return self.side[:, None]
        centre = self.ends.sum(1) + (self.values.sum(-1).clamp_min(0)[:, None, :] @ self.nu)[:, 0]
        length = torch.linalg.vector_norm(centre, dim=1, keepdim=True)
        basis = torch.zeros_like(centre)
        basis[:, 0] = 1.0
        return torch.where(length > 0, centre / torch.where(length > 0, length, 1.0), basis)

    def subset(self, chosen: Tensor) -> "Relaxation":
        """The same for some of the cones."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[chosen])
        return part

    def bound(self) -> tuple[Tensor, Tensor, Tensor]:
        """Upper bounds (B,), their points p (B, r) and faces (B, r)."""
        along = self._upper_along()
        if self.nu.shape[2] == 1:
            return cap_bound(along, self.vertices)
        low, half = self._low_and_half()
        magnitude = torch.maximum(along, -self._lower_along()).clamp_min(0)
        middle = self.ends + (low + half).mT @ self.nu
        across_nu = self.nu - self.w[:, :, None] * self.direction[:, None, :]
        across = middle - (middle @ self.direction[:, :, None]) * self.direction[:, None, :]
        rest = torch.linalg.vector_norm(across, dim=2) + _sums(half, torch.linalg.vector_norm(across_nu, dim=2))
        split = cap_bound((magnitude.square() + rest.square()).sqrt(), self.vertices)
        plain = torch.linalg.vector_norm(middle, dim=2) + _sums(half, torch.linalg.vector_norm(self.nu, dim=2))
        other = cap_bound(plain, self.vertices)
        whole = self._spectral(rest.amax(1), half, torch.linalg.vector_norm(across_nu, dim=2))
        return torch.minimum(torch.minimum(split[0], other[0]), whole), split[1], split[2]

    def _spectral(self, rest: Tensor, half: Tensor, across: Tensor) -> Tensor:
        """Bounds (B,) by the spectral norm of one linear map M for the whole cone, at least the best value.

        Points whose value is larger than the best have directions within an angle of sine `sine` of v, for which
        most weights nu_i.v keep their signs, and with them the side on which x_i.u is to be replaced; the others
        cost `mixed`. With m_j the bound of s(u_j): ||s(u)|| <= ||M|| + sqrt(r) max_j ||m_j - M^T u_j||.
        """
        vertices, r = self.vertices, self.rows.shape[2]
        sine = ((math.sqrt(r) * rest + 2 * self.margin) / max(self.best, 1e-300)).clamp(max=1.0)[:, None]
        known = (1 - sine.square()).clamp_min(0).sqrt() * self.w.abs()
        mixed = _sums(2 * half, (sine * across - known).clamp_min(0)).amax(1)
        linear = torch.where(self.concave[:, :, None], self.slope[:, :, None] * self.values, self.positive)
        ends = self.ends + linear.mT @ self.nu
        M = torch.linalg.solve_ex(vertices, ends)[0].nan_to_num(0.0, 0.0, 0.0)
        residual = torch.linalg.vector_norm(ends - vertices @ M, dim=2).amax(1)
        bound = spectral_bounds(M)[1] + math.sqrt(r) * (mixed + residual)
        usable = (sine[:, 0] < 1) & (self._lower_along().amin(1) > self.margin)
        return torch.where(usable, bound.clamp_min(self.best), math.inf)

    def _low_and_half(self) -> tuple[Tensor, Tensor]:
        """(x.u)_+ at the vertices is low, its interpolation low + 2 half; (B, A, r)."""
        low = self.slope[:, :, None] * self.values
        return low, (self.positive - low) / 2

    def _upper_along(self) -> Tensor:
        """Upper bound of v.s(u) at the vertices (B, r)."""
        convex, concave = self.w.clamp_min(0), self.w.clamp_max(0) * self.slope
        settled = (self.ends @ self.direction[:, :, None])[:, :, 0]
        return settled + _sums(self.positive, convex) + _sums(self.values, concave)

    def _lower_along(self) -> Tensor:
        convex, concave = self.w.clamp_min(0) * self.slope, self.w.clamp_max(0)
        settled = (self.ends @ self.direction[:, :, None])[:, :, 0]
        return settled + _sums(self.values, convex) + _sums(self.positive, concave)

    def with_best_slopes(self, face: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The bound with slopes of the concave samples that make p short: accelerated projected gradient.

        Every step makes one pivot of the face of the maximiser.
        """
        w = self.w.clamp_max(0)
        start = self._upper_along() - _sums(self.values, w * self.slope)
        A = self.rows * w[:, :, None]
        lipschitz = torch.linalg.matrix_norm(A.mT @ A).clamp_min(1e-300)[:, None]
        gram = self.vertices @ self.vertices.mT
        slope, ahead, momentum = self.slope, self.slope, 1.0
        for _ in range(SLOPE_STEPS[0] if self.rows.shape[1] > 8 * self.rows.shape[2] else SLOPE_STEPS[1]):
            a = start + _sums(self.values, w * ahead)
            t = _face_solution(gram, a, face)
            face = _pivot(face, t, a - (gram @ t[:, :, None])[:, :, 0])
            new = (ahead - w * (self.values @ t[:, :, None])[:, :, 0] / lipschitz).clamp(0, 1)
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / following * (new - slope)
            slope, momentum = new, following
        self.slope = torch.where(self.concave, slope, self.slope).nan_to_num(0.5).clamp(0, 1)
        return self.bound()


def _sums(values: Tensor, weights: Tensor) -> Tensor:
    """sum_i values[b, i, :] weights[b, i]."""
    return (weights[:, None, :] @ values)[:, 0]


def cap_bound(a: Tensor, vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper bounds (B,) of max { a.t : ||sum_j t_j u_j|| <= 1, t >= 0 }, their p (B, r) and faces (B, r).

    Block pivoting on the face of the maximiser; the bound holds for every p, the least one is taken.
    """
    r = a.shape[1]
    gram = vertices @ vertices.mT
    face = best_face = torch.ones_like(a, dtype=torch.bool)
    bound = math.sqrt(r) * a.amax(1).clamp_min(0)
    best_p = vertices.sum(1)
    for _ in range(r + 2):
        t = _face_solution(gram, a, face)
        p = _sums(vertices, t)
        excess = a - (vertices @ p[:, :, None])[:, :, 0]
        value = torch.linalg.vector_norm(p, dim=1) + math.sqrt(r) * excess.amax(1).clamp_min(0)
        better = value < bound
        bound = torch.where(better, value, bound)
        best_p, best_face = torch.where(better[:, None], p, best_p), torch.where(better[:, None], face, best_face)
        new = _pivot(face, t, excess)
        if bool((new == face).all()):
            break
        face = new
    return bound, best_p, best_face


def _face_solution(gram: Tensor, a: Tensor, face: Tensor) -> Tensor:
    """t (B, r) on the face, zero elsewhere, with (gram t)_j = a_j on the face."""
    on = face.to(a.dtype)
    masked = gram * on[:, :, None] * on[:, None, :] + torch.diag_embed(1 - on)
    return torch.linalg.solve_ex(masked, (a * on)[:, :, None])[0][:, :, 0].nan_to_num(0.0, 0.0, 0.0)


def _pivot(face: Tensor, t: Tensor, excess: Tensor) -> Tensor:
    return (face & (t > 0)) | (~face & (excess > 0))


def orthants(r: int, like: Tensor) -> Tensor:
    """Vertices (2^r, r, r) of the orthants of R^r."""
    bits = torch.arange(2**r, device=like.device)[:, None] >> torch.arange(r, device=like.device)
    return torch.diag_embed(1.0 - 2.0 * (bits & 1).to(like))


def halved(vertices: Tensor) -> Tensor:
    """Both halves (2 B, r, r) of cones (B, r, r), cut at the middle of their longest edges: first all first halves."""
    B, r = vertices.shape[:2]
    if r == 1:
        return torch.cat([vertices, vertices])
    gram = vertices @ vertices.mT
    pairs = torch.triu_indices(r, r, 1, device=gram.device)
    longest = gram[:, pairs[0], pairs[1]].argmin(1)
    a, b = pairs[0][longest], pairs[1][longest]
    every = torch.arange(B, device=gram.device)
    middle = vertices[every, a] + vertices[every, b]
    middle = middle / torch.linalg.vector_norm(middle, dim=1, keepdim=True)
    first, second = vertices.clone(), vertices.clone()
    first[every, a] = middle
    second[every, b] = middle
    return torch.cat([first, second])
