"""The smallest eigenvalue of the Hessian of the Burer-Monteiro objective (14), from Hessian-vector products alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

from cvxnn.columns import Columns
from cvxnn.factored import FactoredLoss
from cvxnn.problem import Problem

__all__ = ["ColumnHessian", "Curvature", "FactorHessian", "Pair", "smallest_curvature", "smallest_pair"]

#: Up to so many variables the Hessian is formed, by products with unit vectors.
DENSE_SIZE = 200
#: Rotated columns of at most this size, relative to the largest, are zero: their block decouples up to rounding.
_ZERO_COLUMN = 1e-14
#: Lanczos vectors between two restarts, fewer where they would take more than so many numbers.
_N_LANCZOS, _LANCZOS_NUMBERS = 40, 2**25
_EPS = 2.0**-53


@dataclass(frozen=True)
class Curvature:
    """The smallest eigenvalue that was found, with its eigenvector.

    Attributes
    ----------
    value : float
        A Rayleigh quotient of the Hessian, so an upper bound of the smallest eigenvalue, whatever `converged`.
    residual : float
        ||H x - value x|| for the unit vector x it belongs to.
    converged : bool
        Whether the Lanczos method reached its tolerance, so that no smaller eigenvalue is expected.
    gate : int
        Gate with the largest share of ||x||^2.
    share : float
        That share.
    method : {"dense", "lanczos", "free column"}
        "free column": the eigenvalue beta - ||G_k||_2 of a gate with a zero column (after a rotation of the factors).
    n_products : int
        Number of Hessian-vector products.
    scale : float
        Estimate of the norm of the Hessian.
    direction : pair of torch.Tensor, shapes (P, p, m) and (P, q, m)
        x as a change of (U, V). Where `value` is negative, the objective falls along it or along its negative.
    """

    value: float
    residual: float
    converged: bool
    gate: int
    share: float
    method: str
    n_products: int
    scale: float
    direction: tuple[torch.Tensor, torch.Tensor] = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, without the direction."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "direction"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Pair:
    """A unit vector, its Rayleigh quotient, and how far it is from an eigenvector."""

    value: float
    residual: float
    vector: np.ndarray


class ColumnHessian:
    """The Hessian of (14) in a list of columns, float64, with an intercept minimised out (its Schur complement).

    An unpenalised intercept b has the positive semidefinite Hessian H_bb, whose null space is in that of
    H_xb. So the whole Hessian has a negative eigenvalue exactly where H_xx - H_xb H_bb^+ H_bx has one.

    Parameters
    ----------
    problem : Problem
        With the norms ("l2", "l2").
    columns : Columns
        In float64.
    intercept : torch.Tensor of shape (c,), float64
    """

    def __init__(self, problem: Problem, columns: Columns, intercept: torch.Tensor) -> None:
        self.beta = problem.beta
        self.loss = FactoredLoss(problem, double=True)
        self.columns = columns
        self.intercept = intercept
        self.n_products = 0
        self._coupling: np.ndarray | None = None
        if problem.output_bias and len(columns) > 0:
            self._eliminate_intercept()

    @property
    def size(self) -> int:
        """Number of variables."""
        return self.columns.u.numel() + self.columns.v.numel()

    def _eliminate_intercept(self) -> None:
        """H_xb (N, c) and the pseudo-inverse of H_bb (c, c)."""
        columns, c = self.columns, len(self.intercept)
        zero_u, zero_v = torch.zeros_like(columns.u), torch.zeros_like(columns.v)
        parts, own = [], []
        for unit in torch.eye(c, dtype=torch.float64, device=self.intercept.device):
            slopes = self.loss.hessian_product(columns, self.intercept, zero_u, zero_v, unit)
            parts.append(self.join(slopes.left, slopes.right))
            own.append(slopes.intercept.cpu().numpy())
        H = np.array(own)
        self._coupling = np.array(parts).T
        self._inverse = np.linalg.pinv((H + H.T) / 2, rcond=1e-13, hermitian=True)

    def join(self, u: torch.Tensor, v: torch.Tensor) -> np.ndarray:
        """Slopes (r, p) and (r, q) of the columns as one vector."""
        return torch.cat([u.reshape(-1), v.reshape(-1)]).cpu().numpy()

    def split(self, x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """A vector as the changes (r, p) and (r, q) of the columns."""
        u, v = self.columns.u, self.columns.v
        tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).to(u.device)
        return tensor[: u.numel()].view(u.shape), tensor[u.numel() :].view(v.shape)

    def product(self, x: np.ndarray) -> np.ndarray:
        """H x for x of shape (N,)."""
        self.n_products += 1
        x = np.asarray(x).reshape(-1)
        du, dv = self.split(x)
        slopes = self.loss.hessian_product(self.columns, self.intercept, du, dv)
        out = self.join(slopes.left + self.beta * du, slopes.right + self.beta * dv)
        if self._coupling is not None:
            out -= self._coupling @ (self._inverse @ (self._coupling.T @ x))
        return out

    def rayleigh(self, x: np.ndarray) -> Pair:
        """The Rayleigh quotient of a vector that is not zero."""
        x = x / np.linalg.norm(x)
        image = self.product(x)
        value = float(x @ image)
        return Pair(value, float(np.linalg.norm(image - value * x)), x)

    def shares(self, x: np.ndarray) -> torch.Tensor:
        """What each gate has of ||x||^2."""
        du, dv = self.split(x)
        weights = (du.square().sum(1) + dv.square().sum(1)).cpu()
        return torch.bincount(self.columns.gate.cpu(), weights=weights)


class FactorHessian(ColumnHessian):
    """The Hessian of (14) in (U, V) without constraints.

    The objective is unchanged by U_k W, V_k W with an orthogonal W, so the spectrum is that at the factors
    rotated to orthogonal columns. Of these the zero ones decouple: each has the Hessian
    [[beta I, G_k], [G_k^T, beta I]], whose smallest eigenvalue is beta - ||G_k||_2. Only the others are
    variables here.

    Parameters
    ----------
    problem : Problem
        With the norms ("l2", "l2").
    U, V : torch.Tensor of shapes (P, p, m) and (P, q, m), float64
    intercept : torch.Tensor of shape (c,), float64
    """

    def __init__(self, problem: Problem, U: torch.Tensor, V: torch.Tensor, intercept: torch.Tensor) -> None:
        stacked = torch.cat([U, V], dim=1)
        triangle = torch.linalg.qr(stacked, mode="r")[1]
        #: Rotations (P, m, m): the columns of [U_k; V_k] rotation_k are orthogonal, the largest first.
        self.rotation = torch.linalg.svd(triangle, full_matrices=True)[2].mT
        rotated = stacked @ self.rotation
        sizes = torch.linalg.vector_norm(rotated, dim=1)
        #: Which rotated columns are not zero, (P, m).
        self.kept = sizes > _ZERO_COLUMN * sizes.max()
        rows = rotated.mT[self.kept]
        gate, self.place = self.kept.nonzero(as_tuple=True)
        self.sizes = sizes[self.kept]
        columns = Columns(gate, rows[:, : U.shape[1]].contiguous(), rows[:, U.shape[1] :].contiguous())
        super().__init__(problem, columns, intercept)

    def to_factors(self, x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """A vector as changes of (U, V), rotated back."""
        du, dv = self.split(x)
        n_gates, m = self.kept.shape
        changes = []
        for part in (du, dv):
            full = part.new_zeros(n_gates, m, part.shape[1])
            full[self.columns.gate, self.place] = part
            changes.append(full.mT @ self.rotation.mT)
        return changes[0], changes[1]

    def towards(self, gate: int, u: torch.Tensor, v: torch.Tensor) -> np.ndarray:
        """The vector that changes the smallest column of a gate by (u, -v)."""
        columns = self.columns
        inside = (columns.gate == gate).nonzero()[:, 0]
        chosen = inside[self.sizes[inside].argmin()]
        du, dv = torch.zeros_like(columns.u), torch.zeros_like(columns.v)
        du[chosen], dv[chosen] = u, -v
        return self.join(du, dv)


def smallest_curvature(
    problem: Problem,
    U: torch.Tensor,
    V: torch.Tensor,
    intercept: torch.Tensor,
    nu: torch.Tensor,
    dual_norms: torch.Tensor,
    *,
    tolerance: float,
    max_products: int = 5000,
) -> Curvature:
    """The smallest eigenvalue of the Hessian of (14), an intercept minimised out.

    It is the smaller one of that of the columns that are not zero (dense, or by the Lanczos method of ARPACK) and
    of beta - ||G_k||_2 over the gates with a zero column (math section 3).

    Parameters
    ----------
    problem : Problem
        With the norms ("l2", "l2").
    U, V : torch.Tensor of shapes (P, p, m) and (P, q, m), float64
    intercept : torch.Tensor of shape (c,)
    nu : torch.Tensor of shape (n, c)
        The gradient of the loss at the predictions.
    dual_norms : torch.Tensor of shape (P,)
        ||G_k||_2 with G = A*(nu).
    tolerance : float
        Residual at which the Lanczos method ends. It ends earlier at a clearly negative eigenvalue.
    max_products : int
        About so many Hessian-vector products are done at most.
    """
    hessian = FactorHessian(problem, U, V, intercept)
    free = _free_column(hessian, nu, dual_norms)
    if hessian.size == 0:
        assert free is not None
        return free
    used = torch.where(hessian.kept.any(1), dual_norms, -1.0)
    gate = int(used.argmax())
    seed = hessian.towards(gate, *_top_pair(hessian, nu, gate)[1:])
    found, converged, scale, method = smallest_pair(hessian, seed, tolerance, max_products)
    if free is not None and free.value <= found.value:
        scale = max(scale, free.scale)
        return dataclasses.replace(free, converged=converged, scale=scale, n_products=hessian.n_products)
    shares = hessian.shares(found.vector)
    return Curvature(
        value=found.value,
        residual=found.residual,
        converged=converged,
        gate=int(shares.argmax()),
        share=float(shares.max()),
        method=method,
        n_products=hessian.n_products,
        scale=scale,
        direction=hessian.to_factors(found.vector),
    )


def _top_pair(hessian: FactorHessian, nu: torch.Tensor, gate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block G_k and its top singular vectors."""
    G = hessian.loss.op.adjoint_blocks(nu, slice(gate, gate + 1))[0]
    left, _, right = torch.linalg.svd(G, full_matrices=False)
    return G, left[:, 0], right[0]


def _free_column(hessian: FactorHessian, nu: torch.Tensor, dual_norms: torch.Tensor) -> Curvature | None:
    """beta - ||G_k||_2 of the worst gate that has a zero column."""
    free = ~hessian.kept.all(1)
    if not bool(free.any()):
        return None
    gate = int(torch.where(free, dual_norms, -1.0).argmax())
    G, u, v = _top_pair(hessian, nu, gate)
    a, b = u / math.sqrt(2), -v / math.sqrt(2)
    left, right = hessian.beta * a + G @ b, hessian.beta * b + G.T @ a
    value = float(a @ left + b @ right)
    residual = math.hypot(float((left - value * a).norm()), float((right - value * b).norm()))
    column = hessian.rotation[gate][:, int((~hessian.kept[gate]).nonzero()[0, 0])]
    n_gates, m = hessian.kept.shape
    direction = a.new_zeros(n_gates, len(a), m), b.new_zeros(n_gates, len(b), m)
    direction[0][gate], direction[1][gate] = torch.outer(a, column), torch.outer(b, column)
    scale = hessian.beta + float(dual_norms[gate])
    return Curvature(value, residual, True, gate, 1.0, "free column", 0, scale, direction)


def smallest_pair(
    hessian: ColumnHessian, seed: np.ndarray, tolerance: float, max_products: int
) -> tuple[Pair, bool, float, str]:
    """The pair, whether it converged, the scale of the Hessian, and the method.

    Parameters
    ----------
    seed : array of shape (N,)
        Where the Lanczos method starts; not zero.
    """
    N = hessian.size
    if N <= DENSE_SIZE:
        H = np.array([hessian.product(unit) for unit in np.eye(N)])
        values, vectors = np.linalg.eigh((H + H.T) / 2)
        return hessian.rayleigh(vectors[:, 0]), True, float(np.abs(values).max()), "dense"
    noise = np.random.default_rng(0).standard_normal(N)
    scale = _norm_estimate(hessian.product, noise)
    found, converged = _lanczos(
        hessian, hessian.rayleigh(seed), noise, scale, max(tolerance, 4 * _EPS * scale), max_products
    )
    return found, converged, scale, "lanczos"


def _norm_estimate(product: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> float:
    """A few power steps: a lower bound of the norm, good enough as a scale."""
    size = 0.0
    for _ in range(8):
        x = product(x / np.linalg.norm(x))
        size = float(np.linalg.norm(x))
        if size == 0:
            break
    return size


def _lanczos(
    hessian: ColumnHessian, seed: Pair, noise: np.ndarray, scale: float, tolerance: float, max_products: int
) -> tuple[Pair, bool]:
    """ARPACK on H - scale I, where its relative tolerance is one of the residual even for eigenvalues near zero.

    A first stage has a loose tolerance: a clearly negative eigenvalue needs no more digits, and where the second one
    runs out of products the vector of the first is there.
    """
    N, beta = hessian.size, hessian.beta
    shift = scale + beta
    operator = LinearOperator((N, N), matvec=lambda x: hessian.product(x) - shift * np.ravel(x), dtype=np.float64)
    ncv = min(N - 1, max(20, min(_N_LANCZOS, _LANCZOS_NUMBERS // N)))
    best, small = seed, 0.1 * noise / np.linalg.norm(noise)
    for target in sorted({max(tolerance, 1e-4 * shift), tolerance}, reverse=True):
        left = max_products - hessian.n_products
        if left < ncv:
            return best, False
        try:
            start = best.vector + small
            _, vectors = eigsh(
                operator, k=1, which="SA", v0=start, ncv=ncv, tol=0.5 * target / shift, maxiter=max(1, left // ncv)
            )
        except ArpackNoConvergence as unfinished:
            vectors = unfinished.eigenvectors
        except ArpackError:
            return best, False
        if vectors.shape[1] == 0:
            return best, False
        pair = hessian.rayleigh(vectors[:, 0])
        best = pair if pair.value <= best.value + tolerance else best
        if best.value < 0 and best.residual <= 1e-3 * abs(best.value):
            return best, True
        small = 1e-3 * small
    return best, best.residual <= 2 * tolerance
