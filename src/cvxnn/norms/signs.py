"""Norms with an l-infinity side and no l1 side, whose dual norms are NP-hard to compute."""

import torch
from torch import Tensor

from cvxnn.norms.base import EPS, MatrixNorm
from cvxnn.norms.nuclear import spectral_bounds
from cvxnn.norms.vector import VectorNorm, signs

__all__ = ["MAX_ENUMERATED", "SignNorm"]

MAX_ENUMERATED = 12  # all 2^11 sign vectors (up to a common sign) are tried up to this dimension
_N_RELAXATION_STEPS = 40
_N_ALTERNATIONS = 30
_N_STARTS = 8
_CHUNK = 2**22  # numbers held at a time by the enumeration


class SignNorm(MatrixNorm):
    """The pairs (l2, linf), (linf, l2) and (linf, linf): bounds, not values.

    The dual norm is the largest ||G v||_C* over sign vectors v (or ||G^T u||_R* over sign vectors u), which
    is NP-hard. Where the dimension of the sign vectors is at most `MAX_ENUMERATED` (for (linf, linf) the
    smaller one) all are tried, and `dual` and `atom` are exact up to rounding. Elsewhere `dual` returns a
    lower bound from alternating maximisation and an upper bound from the dual of the semidefinite relaxation.
    They differ by a few per cent up to some 15% on random matrices; the relaxation exceeds the dual norm by a
    factor of at most sqrt(pi/2) with one l-infinity side and 1.783 (Grothendieck's constant) with two.

    `value` returns bounds in every case, enumerated or not: the cheapest of a few explicit factorisations
    from above, a few test matrices of the definition from below. They can differ by a factor of two or more.
    The norm of a matrix known through its factors is often bounded better by sum_j ||u_j||_C ||v_j||_R.
    """

    exact = False
    has_prox = False

    def _value(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
        factorisations = [
            self._right.value(Z).sum(-1),
            self._left.value(Z.mT).sum(-1),
            (s * self._left.value(U.mT) * self._right.value(Vh)).sum(-1),
        ]
        tests = []
        if self.right == "linf":
            factorisations += [_frame_bound(Z, self._left, flips) for flips in (None, signs(Vh[:, 0]))]
            tests.append(self._left.value(Z.mT).amax(-1))
        if self.left == "linf":
            factorisations += [_frame_bound(Z.mT, self._right, flips) for flips in (None, signs(U[:, :, 0]))]
            tests.append(self._right.value(Z).amax(-1))
        for R in (Z, signs(Z), U @ Vh):
            size = self.dual(R)[1]
            tests.append((R * Z).sum((-2, -1)) / torch.where(size > 0, size, 1.0))
        upper = torch.stack(factorisations).amin(0)
        return torch.minimum(torch.stack(tests).amax(0), upper), upper

    def _dual_bounds(self, G: Tensor) -> tuple[Tensor, Tensor]:
        G, outer, _ = self._orient(G)
        if G.shape[2] <= MAX_ENUMERATED:
            return _widen_image(_enumerate(G, outer)[0], G, outer)
        row_scale, column_scale, y = _relaxation(G, outer)
        lower, _ = _widen_image(_alternate(G, outer, y)[0], G, outer)
        return lower, _upper_bound(G, outer, row_scale, column_scale)

    def _dual_estimate(self, G: Tensor) -> Tensor:
        G, outer, _ = self._orient(G)
        return _best_signs(G, outer)[0]

    def _atom(self, G: Tensor) -> tuple[Tensor, Tensor]:
        G, outer, transposed = self._orient(G)
        _, v = _best_signs(G, outer)
        u = outer.maximiser((G @ v[:, :, None])[:, :, 0])
        return (v, u) if transposed else (u, v)

    def _orient(self, G: Tensor) -> tuple[Tensor, VectorNorm, bool]:
        """G or its transpose, so that columns take the signs; the other side's norm; whether transposed."""
        both = self.left == self.right
        if self.right != "linf" or (both and G.shape[2] > G.shape[1]):
            return G.mT.contiguous(), self._right, True
        return G, self._left, False


def _best_signs(G: Tensor, outer: VectorNorm) -> tuple[Tensor, Tensor]:
    """Largest dual norm of G v found over sign vectors v: values (P,) and maximisers (P, q)."""
    if G.shape[2] <= MAX_ENUMERATED:
        return _enumerate(G, outer)
    return _alternate(G, outer, _relaxation(G, outer)[2])


def _frame_bound(Z: Tensor, outer: VectorNorm, flips: Tensor | None) -> Tensor:
    """Norm of Z = sum_j (Z h_j / m) h_j^T, the h_j being the columns of a q x m tight frame of signs.

    The frame is the first q rows of a Hadamard matrix of order m, its rows multiplied by `flips` (P, q).
    """
    q = Z.shape[2]
    H = Z.new_ones(1, 1)
    while H.shape[0] < q:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    Z = Z if flips is None else Z * flips[:, None, :]
    return outer.value((Z @ H[:q]).mT).mean(-1)


def _enumerate(G: Tensor, outer: VectorNorm) -> tuple[Tensor, Tensor]:
    """Largest dual norm of G v over all sign vectors v: values (P,) and maximisers (P, q)."""
    P, p, q = G.shape
    best = G.new_full((P,), -1.0)
    best_v = G.new_ones((P, q))
    bits = torch.arange(q, device=G.device)
    step = max(1, _CHUNK // max(1, P * p))
    for start in range(0, 2 ** (q - 1), step):
        index = torch.arange(start, min(start + step, 2 ** (q - 1)), device=G.device)
        candidates = 1 - 2 * ((index[:, None] >> bits) & 1).to(G.dtype)
        value, where = outer.dual((G @ candidates.T).mT).max(-1)
        better = value > best
        best = torch.where(better, value, best)
        best_v = torch.where(better[:, None], candidates[where], best_v)
    return best, best_v


def _start_vectors(G: Tensor) -> Tensor:
    """Directions (P, r, q) with Gram matrix that of the columns of G, r = min(p, q)."""
    return torch.linalg.qr(G, mode="r").R if G.shape[1] > G.shape[2] else G


def _normalise(A: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of A (P, r, n) divided by their norms (zero columns stay zero), and the norms (P, n)."""
    norms = torch.linalg.vector_norm(A, dim=-2)
    return A / torch.where(norms > 0, norms, 1.0)[:, None, :], norms


def _relaxation(G: Tensor, outer: VectorNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate dual solution of the semidefinite relaxation of max u^T G v by alternating maximisation.

    The relaxation replaces signs by unit vectors: max sum_ij G_ij <x_i, y_j>. Its multipliers at the optimum
    are a_i = ||sum_j G_ij y_j|| and b_j = ||sum_i G_ij x_i||. For an l2 left side the x_i share one ball.

    Returns
    -------
    a : Tensor of shape (P, p)
    b : Tensor of shape (P, q)
    y : Tensor of shape (P, r, q)
    """
    y, b = _normalise(_start_vectors(G))
    a = b
    for _ in range(_N_RELAXATION_STEPS):
        x, a = _normalise(y @ G.mT)
        if outer.name == "l2":
            total = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
            x = x * (a / torch.where(total > 0, total, 1.0))[:, None, :]
        y, b = _normalise(x @ G)
    return a, b, y


def _upper_bound(G: Tensor, outer: VectorNorm, a: Tensor, b: Tensor) -> Tensor:
    """Rigorous upper bound of the dual norm from multipliers a (P, p) and b (P, q), whatever they are.

    max u^T G v <= sqrt(sum a sum b) || diag(a)^(-1/2) G diag(b)^(-1/2) ||_2 over sign vectors u and v; for an
    l2 left side without a. Uniform multipliers and the largest ||G v|| entry by entry are tried as well.
    """
    bounds = [_image_bound(G, outer) * (1 + (sum(G.shape[1:]) + 16) * EPS)]
    for rows, columns in ((a, b), (torch.ones_like(a), torch.ones_like(b))):
        alpha = _inverse_root(rows) if outer.name == "linf" else torch.ones_like(rows)
        gamma = _inverse_root(columns)
        scaled = alpha[:, :, None] * G * gamma[:, None, :]
        total = gamma.pow(-2).sum(-1)
        if outer.name == "linf":
            total = total * alpha.pow(-2).sum(-1)
        size = spectral_bounds(scaled)[1] + 4 * EPS * torch.linalg.vector_norm(scaled, dim=(-2, -1))
        bounds.append(total.sqrt() * size * (1 + (sum(G.shape[1:]) + 16) * EPS))
    return torch.stack(bounds).amin(0)


def _inverse_root(a: Tensor) -> Tensor:
    """a^(-1/2) for multipliers relative to their largest, floored away from zero."""
    largest = a.amax(-1, keepdim=True)
    relative = torch.where(largest > 0, a / largest, 1.0)
    return relative.clamp_min(1e-12).rsqrt()


def _image_bound(G: Tensor, outer: VectorNorm) -> Tensor:
    """Dual norm of the row sums of |G|: no ||G v|| over sign vectors v is larger."""
    return outer.dual(G.abs().sum(-1))


def _widen_image(values: Tensor, G: Tensor, outer: VectorNorm) -> tuple[Tensor, Tensor]:
    """Bounds of dual norms of G v, v sign vectors, computed in float64 as `values` (P,)."""
    allowance = (sum(G.shape[1:]) + 16) * EPS * _image_bound(G, outer)
    return (values - allowance).clamp_min(0), values + allowance


def _alternate(G: Tensor, outer: VectorNorm, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Alternating maximisation over signs from several starts: best values (P,) and sign vectors (P, q).

    Starts: the signs of `directions` (P, r, q), of the longest rows of G, of its correlations with the
    longest columns, and of its leading right singular vector.
    """
    longest_rows = torch.linalg.vector_norm(G, dim=-1).topk(min(_N_STARTS, G.shape[1])).indices
    longest_columns = torch.linalg.vector_norm(G, dim=-2).topk(min(_N_STARTS, G.shape[2])).indices
    rows = G.gather(1, longest_rows[:, :, None].expand(-1, -1, G.shape[2]))
    columns = G.gather(2, longest_columns[:, None, :].expand(-1, G.shape[1], -1))
    leading = torch.linalg.svd(G, full_matrices=False).Vh[:, :1]
    v = signs(torch.cat([leading, rows, columns.mT @ G, directions[:, : 2 * _N_STARTS]], dim=1))
    for _ in range(_N_ALTERNATIONS):
        u = outer.maximiser(v @ G.mT)
        previous, v = v, signs(u @ G)
        if torch.equal(v, previous):
            break
    best, where = outer.dual(v @ G.mT).max(-1)
    return best, v.gather(1, where[:, None, None].expand(-1, 1, G.shape[2]))[:, 0]
