"""The cells of an arrangement of hyperplanes through 0 in up to three dimensions, from its vertices."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np

__all__ = ["cell_patterns", "low_rank"]

#: A unit normal this close to orthogonal to a direction contains it in its plane.
_INCIDENT = 1e-10
_RANK = 1e-10


def low_rank(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates Z (n, r) of the rows in an orthonormal basis Q (d, r) of what they span, up to rounding."""
    rank = _scaled_coordinates(X).shape[1]
    if rank == X.shape[1]:
        return X, np.eye(rank)
    # Rows of large norm must not drown the others.
    size = np.linalg.norm(X, axis=1)
    unit = X[size > 0] / size[size > 0][:, None]
    Q = np.linalg.svd(unit, full_matrices=False)[2][:rank].T if rank else np.zeros((X.shape[1], 0))
    return X @ Q, Q


def _scaled_coordinates(X: np.ndarray) -> np.ndarray:
    """Coordinates (n, r) of unit rows, after columns are scaled to about 1 (which moves no cell to another pattern)."""
    scale = np.abs(X).max(0)
    scaled = X / np.where(scale > 0, scale, 1)
    size = np.linalg.norm(scaled, axis=1, keepdims=True)
    scaled = scaled / np.where(size > 0, size, 1)
    left, values, _ = np.linalg.svd(scaled, full_matrices=False)
    rank = int((values > _RANK * values[0]).sum()) if values[0] > 0 else 0
    return left[:, :rank] * values[:rank]


def cell_patterns(X: np.ndarray) -> np.ndarray:
    """Patterns 1{X u > 0} of the open cells, (P, n) bool; rows of zeros are True everywhere.

    Every cell of an arrangement whose normals span the space touches a vertex (a ray): the cells around it are those
    of the hyperplanes through it, in one dimension less.
    """
    used = np.flatnonzero(X.any(1))
    Z = _scaled_coordinates(X)[used]
    signs = _signs(Z / np.linalg.norm(Z, axis=1, keepdims=True))
    patterns = np.ones((len(signs), len(X)), dtype=bool)
    patterns[:, used] = signs > 0
    return np.unique(patterns, axis=0)


def _signs(rows: np.ndarray) -> np.ndarray:
    """Signs +-1 (P, n) of the cells of unit rows (n, r) that span R^r."""
    n, r = rows.shape
    if r == 0 or n == 0:
        return np.ones((1, n))
    if r == 1:
        return np.stack([np.sign(rows[:, 0]), -np.sign(rows[:, 0])])
    found: set[bytes] = set()
    for ray in _rays(rows):
        values = rows @ ray
        through = np.abs(values) <= _INCIDENT
        # Complement of the ray, in which the hyperplanes through it form a smaller arrangement.
        basis = np.linalg.svd(ray[None], full_matrices=True)[2][1:].T
        local = rows[through] @ basis
        local /= np.linalg.norm(local, axis=1, keepdims=True)
        base = np.sign(values)
        for around in _signs(local):
            base[through] = around
            found.add(base.astype(np.int8).tobytes())
    return np.array([np.frombuffer(key, dtype=np.int8) for key in sorted(found)], dtype=float)


def _rays(rows: np.ndarray) -> list[np.ndarray]:
    """Unit vectors on r - 1 hyperplanes that are independent."""
    r = rows.shape[1]
    rays = []
    for chosen, sign in product(combinations(range(len(rows)), r - 1), (1.0, -1.0)):
        some = rows[list(chosen)]
        ray = np.array([-some[0, 1], some[0, 0]]) if r == 2 else np.cross(some[0], some[1])
        length = np.linalg.norm(ray)
        if length > _INCIDENT:
            rays.append(sign * ray / length)
    return rays
