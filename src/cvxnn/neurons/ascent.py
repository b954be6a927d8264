"""Local ascent on the sphere of all ReLU neurons: lower bounds of their dual norm, each with its neuron."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from cvxnn.errors import InvalidInputError

__all__ = ["LocalMaxima", "check_arguments", "distinct_neurons", "neuron_ascent", "neuron_values", "polish"]

MAX_ELEMENTS = 2**22  # of a temporary of the batched evaluation
MAX_KINKS = 48  # nearest hyperplanes whose slopes the polish chooses


@dataclass(frozen=True)
class LocalMaxima:
    """Neurons at different local maxima, best first.

    Attributes
    ----------
    u : Tensor of shape (k, d)
        Unit input weights.
    v : Tensor of shape (k, c)
        Unit output weights, the direction of sum_i (x_i . u)_+ nu_i (zero where that is zero).
    value : Tensor of shape (k,)
        ||sum_i (x_i . u)_+ nu_i||_2 in floating point.
    """

    u: Tensor
    v: Tensor
    value: Tensor


def neuron_ascent(
    X: Tensor, nu: Tensor, *, starts: int = 256, random_state: int = 0, init: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best neuron found by local ascent: max over ||u||_2 = 1 of ||sum_i (x_i . u)_+ nu_i||_2.

    Parameters
    ----------
    X : Tensor of shape (n, d), float64
        Samples in rows; a hidden bias is a column of ones.
    nu : Tensor of shape (n, c), float64
        Dual candidate.
    starts : int
        Number of random starts; samples, singular vectors and `init` come on top.
    random_state : int
        Seed of the random starts.
    init : Tensor of shape (m, d), optional
        Further starts, such as the neurons of a network.

    Returns
    -------
    u : Tensor of shape (d,)
        Unit vector.
    v : Tensor of shape (c,)
        Unit vector, or zero where the value is.
    value : float
        The value at exactly this u.

    Raises
    ------
    InvalidInputError
        Where X and nu are not finite float64 matrices with as many rows, or `init` does not fit them.
    """
    best = distinct_neurons(X, nu, 1, starts=starts, random_state=random_state, init=init)
    return best.u[0], best.v[0], float(best.value[0])


def distinct_neurons(
    X: Tensor, nu: Tensor, count: int, *, starts: int = 256, random_state: int = 0, init: Tensor | None = None
) -> LocalMaxima:
    """At most `count` different local maxima, best first; arguments as in `neuron_ascent`."""
    check_arguments(X, nu, init)
    U = _starts(X, nu, starts, random_state, init)
    scale = (X.abs().amax().clamp_min(1e-300), nu.abs().amax().clamp_min(1e-300)) if X.numel() else (1.0, 1.0)
    Z, W = X / scale[0], nu / scale[1]
    for keep, steps, apart in ((max(48, count), 12, 0.05), (max(8, count), 60, 0.01)):
        U, value = _climb(Z, W, U, steps)
        U = _distinct(U, value, keep, apart)
    U = torch.stack([polish(Z, W, u) for u in U])
    U = _distinct(U, neuron_values(Z, W, U)[0], count, 1e-3)
    value, v = neuron_values(X, nu, U)
    return LocalMaxima(U, v, value)


def check_arguments(X: Tensor, nu: Tensor, init: Tensor | None = None) -> None:
    """Refuse what is no pair of finite float64 matrices over the same samples."""
    for name, matrix in (("X", X), ("nu", nu), ("init", init)):
        if name == "init" and matrix is None:
            continue
        if not isinstance(matrix, Tensor) or matrix.dtype != torch.float64 or matrix.ndim != 2:
            seen = f"{matrix.dtype} of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix)
            raise InvalidInputError(f"{name} must be a float64 matrix, got {seen}.")
        if not bool(matrix.isfinite().all()):
            raise InvalidInputError(f"{name} must be finite; it has NaN or infinite entries.")
    if X.shape[0] != nu.shape[0] or min(X.shape[1], nu.shape[1]) == 0:
        raise InvalidInputError(f"X (n, d) and nu (n, c) do not fit: {tuple(X.shape)} and {tuple(nu.shape)}.")
    if init is not None and init.shape[1] != X.shape[1]:
        raise InvalidInputError(f"init must have shape (m, {X.shape[1]}), got {tuple(init.shape)}.")


def neuron_values(X: Tensor, nu: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """||sum_i (x_i . u)_+ nu_i||_2 for each row of U (m, d), and the directions (m, c)."""
    chunks = U.split(max(1, MAX_ELEMENTS // max(1, X.shape[0])))
    S = torch.cat([(chunk @ X.mT).clamp_min_(0) @ nu for chunk in chunks])
    value = torch.linalg.vector_norm(S, dim=1)
    return value, S / torch.where(value > 0, value, 1.0)[:, None]


def _normalised(U: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(U, dim=1, keepdim=True)
    return U / torch.where(norm > 0, norm, 1.0)


def _starts(X: Tensor, nu: Tensor, starts: int, random_state: int, init: Tensor | None) -> Tensor:
    """Unit starts: `init`, singular vectors, the heaviest samples with both signs, random directions."""
    generator = torch.Generator().manual_seed(random_state)
    random = torch.randn(max(1, starts), X.shape[1], generator=generator, dtype=torch.float64).to(X)
    X = X / X.abs().amax().clamp_min(1e-300) if X.numel() else X
    nu = nu / nu.abs().amax().clamp_min(1e-300) if nu.numel() else nu
    parts = [random]
    if X.shape[0]:
        weight = torch.linalg.vector_norm(X, dim=1) * torch.linalg.vector_norm(nu, dim=1)
        heavy = X[weight.topk(min(X.shape[0], max(8, starts // 4))).indices]
        singular = [torch.linalg.svd(M, full_matrices=False).U.mT for M in (X.mT @ nu, X.mT @ nu.abs(), X.mT @ X)]
        directions = torch.cat([heavy, *singular])
        parts += [directions, -directions]
    U = torch.cat(parts if init is None else [init / init.abs().amax(1, keepdim=True).clamp_min(1e-300), *parts])
    U = _normalised(U)
    return U[torch.linalg.vector_norm(U, dim=1) > 0.5]


def _gradient(X: Tensor, nu: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients at the rows of U."""
    Y = U @ X.mT
    S = Y.clamp_min(0) @ nu
    value = torch.linalg.vector_norm(S, dim=1)
    V = S / torch.where(value > 0, value, 1.0)[:, None]
    return value, ((Y > 0) * (V @ nu.mT)) @ X


def _climb(X: Tensor, nu: Tensor, U: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ascent on the sphere with a step length for each start; step 1 is the fixed point u <- grad / ||grad||."""
    done = [_climb_chunk(X, nu, chunk, steps) for chunk in U.split(max(1, MAX_ELEMENTS // max(1, X.shape[0])))]
    return torch.cat([u for u, _ in done]), torch.cat([value for _, value in done])


def _climb_chunk(X: Tensor, nu: Tensor, U: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    value, gradient = _gradient(X, nu, U)
    step = torch.ones_like(value)
    for _ in range(steps):
        safe = torch.where(value > 0, value, 1.0)[:, None]
        trial = _normalised(U + step[:, None] * (gradient / safe - U * (value > 0)[:, None]))
        trial_value, trial_gradient = _gradient(X, nu, trial)
        better = trial_value > value
        if not bool(((trial_value - value).abs() > 1e-12 * value).any()):
            break
        U, gradient = (torch.where(better[:, None], a, b) for a, b in ((trial, U), (trial_gradient, gradient)))
        value = torch.where(better, trial_value, value)
        step = torch.where(better, step * 1.6, step / 3).clamp(1e-8, 8.0)
    return U, value


def _distinct(U: Tensor, value: Tensor, keep: int, apart: float) -> Tensor:
    """The best rows, no two within `apart` of each other (at least one row)."""
    kept: list[Tensor] = []
    for index in value.argsort(descending=True).tolist():
        if len(kept) == keep:
            break
        if not kept or float((torch.stack(kept) - U[index]).norm(dim=1).amin()) > apart:
            kept.append(U[index])
    return torch.stack(kept)


def polish(X: Tensor, nu: Tensor, u: Tensor, rounds: int = 40) -> Tensor:
    """A local maximiser near the unit vector u (d,), at kinks too: never worse than u.

    With v fixed, the samples with nu_i . v < 0 nearest to the hyperplane x_i . u = 0 get the slopes in [0, 1]
    of least norm of the whole gradient (the steepest ascent of a concave kink), all others those of u.
    """
    rows, weights, point = (t.detach().cpu().numpy() for t in (X, nu, u))
    norms = np.linalg.norm(rows, axis=1)
    value, v = _evaluate(rows, weights, point)
    kinks = min(MAX_KINKS, 6 * rows.shape[1])
    for _ in range(rounds):
        if value == 0:
            break
        candidates = _ascent_points(rows, weights @ v, norms, point, kinks)
        tried = [(*_evaluate(rows, weights, w), w) for w in candidates]
        best, best_v, w = max(tried, key=lambda t: t[0], default=(0.0, v, point))
        if best > value * (1 + 1e-15):
            small = best < value * (1 + 1e-13)
            value, v, point = best, best_v, w
            if small:
                break
        elif kinks <= rows.shape[1] // 2:
            break
        else:
            kinks = kinks // 2
    return torch.as_tensor(point).to(u)


def _evaluate(rows: np.ndarray, weights: np.ndarray, u: np.ndarray) -> tuple[float, np.ndarray]:
    s = np.maximum(rows @ u, 0) @ weights
    value = float(np.linalg.norm(s))
    return value, s / value if value > 0 else s


def _ascent_points(rows: np.ndarray, w: np.ndarray, norms: np.ndarray, u: np.ndarray, kinks: int) -> list[np.ndarray]:
    """Unit vectors of the ascent direction with the best slopes at near kinks, and of its face."""
    y = rows @ u
    concave = np.flatnonzero((w < 0) & (norms > 0))
    near = concave[np.argsort(np.abs(y[concave]) / norms[concave])[:kinks]]
    active = y > 0
    active[near] = False
    fixed = rows[active].T @ w[active]
    points = [fixed + rows[near].T @ (w[near] * (y[near] > 0))]
    if len(near):
        A = rows[near].T * w[near]
        slopes = lsq_linear(A, -fixed, (0, 1), tol=1e-14, max_iter=100).x
        face = (slopes > 1e-7) & (slopes < 1 - 1e-7)
        points.append(fixed + A @ slopes)
        if 0 < face.sum() < rows.shape[1]:
            basis = np.linalg.qr(A[:, face])[0]
            rest = fixed + A[:, ~face] @ (slopes[~face] > 0.5)
            points.append(rest - basis @ (basis.T @ rest))
    lengths = [float(np.linalg.norm(p)) for p in points]
    return [p / length for p, length in zip(points, lengths, strict=True) if length > 0]
