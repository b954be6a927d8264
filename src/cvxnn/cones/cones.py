"""The cones {u : (2 D_k - I) X u >= 0} of the columns of ReLU networks, one per activation pattern."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from cvxnn.cones.caps import Caps, bounding_caps
from cvxnn.cones.faces import MOST_DIMENSIONS, FaceTable
from cvxnn.cones.interior import deep_points
from cvxnn.cones.planar import Plane, find_plane
from cvxnn.cones.polygons import Polygons
from cvxnn.cones.projection import Projection, project_cones, tangent
from cvxnn.errors import InvalidInputError

__all__ = ["FEASIBILITY", "Cones"]

FEASIBILITY = 1e-10  # violation, relative to the norms of the row and of u, up to which a point is in its cone
_ROUNDING = 1e-14  # violation that normalising u may show where its slacks are not negative
_BLOCK_ENTRIES = 1 << 20
_MANY_GATES = 1_000  # from here on caps are worth their time
_TABLE_ENTRIES = 1 << 21


class Cones:
    """Cones C_k = {u in R^d : (2 D_k - I) X u >= 0}, D_k the diagonal of a pattern (equation 19).

    Methods take pairs: a gate index and a vector each, in batches of r. Slacks are measured with rows of norm 1.

    Parameters
    ----------
    X : Tensor of shape (n, d)
        Rows of zeros constrain nothing and are left out.
    patterns : Tensor of shape (n, P), bool
    gates : Tensor of shape (d, P), optional
        Gate vectors, used as guesses of interior points.

    Attributes
    ----------
    rows : Tensor of shape (n', d)
        The rows of X that are not zero, in float64 and to unit length.
    kept : Tensor of shape (n',), long
        Which rows of X these are.
    patterns : Tensor of shape (P, n'), bool
        Their activation, gate by gate.
    gates : Tensor of shape (d, P) or None
    n_gates, n_features : int

    Raises
    ------
    InvalidInputError
        Wrong shapes or types, or entries of X that are not finite.
    """

    def __init__(self, X: Tensor, patterns: Tensor, gates: Tensor | None = None) -> None:
        if X.ndim != 2 or not X.is_floating_point() or 0 in X.shape:
            raise InvalidInputError(
                f"X is a {X.dtype} tensor of shape {tuple(X.shape)}; real numbers (n, d) are wanted."
            )
        if patterns.ndim != 2 or patterns.dtype != torch.bool or len(patterns) != len(X):
            raise InvalidInputError(
                f"patterns is a {patterns.dtype} tensor of shape {tuple(patterns.shape)}; bool (n, P) with n = {len(X)}"
                " is wanted."
            )
        self.n_features, self.n_gates = X.shape[1], patterns.shape[1]
        if gates is not None and gates.shape != (self.n_features, self.n_gates):
            raise InvalidInputError(
                f"gates has shape {tuple(gates.shape)}; (d, P) = {(self.n_features, self.n_gates)} is wanted."
            )
        X = X.double()
        largest = X.abs().amax(1)
        if not bool(largest.isfinite().all()):
            raise InvalidInputError("X has NaN or infinite entries; finite numbers are wanted.")
        self.kept = largest.nonzero()[:, 0]
        rows = X[self.kept] / largest[self.kept, None]
        self.rows = rows / rows.norm(dim=1, keepdim=True)
        self.gates = gates
        patterns = patterns.to(X.device)
        whole = len(self.kept) == len(X)
        self.patterns = (patterns if whole else patterns[self.kept]).T.contiguous()
        self._table: Tensor | None = None
        self._interior: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def caps(self) -> Caps | None:
        """Spherical caps around the cones, where there are many gates and the rows have rank 2 or 3."""
        if self.gates is None or self.n_gates < _MANY_GATES:
            return None
        return bounding_caps(self.rows, self.patterns, self.gates)

    @cached_property
    def polygons(self) -> Polygons | None:
        """The facets and rays of the cones, where they are pointed, in the plane or in space."""
        if self.gates is None or not Polygons.suit(self.rows):
            return None
        return Polygons(self.rows, self.patterns, self.gates.T.to(self.rows))

    @cached_property
    def plane(self) -> Plane | None:
        """The plane of the rows, where they lie in one."""
        return find_plane(self.rows)

    def signs(self, gate: Tensor) -> Tensor:
        """The diagonals of 2 D_k - I: +1 and -1, (r, n') in float64."""
        if self.patterns.numel() > _TABLE_ENTRIES:
            return self.patterns[gate].to(self.rows.dtype).mul_(2).sub_(1)
        if self._table is None:
            self._table = self.patterns.to(self.rows.dtype).mul_(2).sub_(1)
        return self._table[gate]

    def slack(self, gate: Tensor, u: Tensor) -> Tensor:
        """(2 D_k - I) X u with unit rows, (r, n')."""
        return (u @ self.rows.T).mul_(self.signs(gate))

    def violation(self, gate: Tensor, u: Tensor) -> Tensor:
        """Largest violation of a row, relative to the norms of the row and of u.

        Parameters
        ----------
        gate : Tensor of shape (r,), long
        u : Tensor of shape (r, d)

        Returns
        -------
        Tensor of shape (r,)
            0 for u = 0, NaN where u is not finite.
        """
        scale = u.abs().amax(1, keepdim=True)
        unit = u.double() / torch.where(scale == 0, 1.0, scale.double())
        unit = unit / torch.where(scale == 0, 1.0, unit.norm(dim=1, keepdim=True))
        if len(self.rows) == 0:
            return unit.sum(1) * 0
        least = [self.slack(gate[part], unit[part]).amin(1) for part in self.blocks(len(gate))]
        return torch.cat(least).neg_().clamp_min_(0) if least else unit.new_zeros(0)

    def contains(self, gate: Tensor, u: Tensor, tolerance: float = FEASIBILITY) -> Tensor:
        """Whether u is in the cone of its gate up to a relative `tolerance`, (r,) bool; never for NaN."""
        return self.violation(gate, u) <= tolerance

    def project(self, gate: Tensor, z: Tensor, start: Projection | None = None) -> Projection:
        """Euclidean projections onto the cones, exact to rounding.

        Parameters
        ----------
        gate : Tensor of shape (r,), long
        z : Tensor of shape (r, d)
            Finite.
        start : Projection, optional
            Projections of other points onto the same cones: their active rows are tried first.

        Returns
        -------
        Projection
            With at most a = min(d, n') active rows.

        Raises
        ------
        InvalidInputError
            `z` has entries that are not finite.
        """
        if not bool(z.isfinite().all()):
            raise InvalidInputError("z has NaN or infinite entries; finite numbers are wanted.")
        parts = []
        for part in self.blocks(len(gate)):
            rows = None if start is None else start.index[part]
            parts.append(self._project(gate[part], z[part].double(), rows))
        return Projection.stack(parts)

    def _project(self, gate: Tensor, z: Tensor, start: Tensor | None) -> Projection:
        """In closed form in low dimensions, by active sets otherwise."""
        if self.n_gates < _MANY_GATES and self.polygons is not None:
            found, failed = self.polygons.project(gate, z)
        elif self._faces is not None:
            found, failed = self._faces.project(gate, self.signs(gate), z)
        else:
            return project_cones(self.rows, self.signs(gate), z, start)
        pairs = failed.nonzero()[:, 0]
        if len(pairs):
            found.put(pairs, project_cones(self.rows, self.signs(gate[pairs]), z[pairs]))
        return found

    @cached_property
    def _faces(self) -> FaceTable | None:
        if self.n_features > MOST_DIMENSIONS or len(self.rows) < self.n_features:
            return None
        return FaceTable(self.rows, self.patterns)

    def tangent(self, projection: Projection, gate: Tensor) -> Tensor:
        """Derivatives of the projections: orthogonal projectors (r, d, d), elements of the generalised Jacobian."""
        return tangent(projection, self.normals(gate, projection.index))

    def normals(self, gate: Tensor, index: Tensor) -> Tensor:
        """Rows (r, a, d) of (2 D_k - I) X with unit length; zeros where `index` (r, a) is -1."""
        row = index.clamp_min(0)
        signs = self.patterns[gate[:, None], row].to(self.rows.dtype).mul_(2).sub_(1)
        return self.rows[row] * signs.masked_fill(index < 0, 0.0)[:, :, None]

    def interior(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """A deep point of each cone: of all unit vectors, that with the largest least slack.

        Parameters
        ----------
        gate : Tensor of shape (r,), long

        Returns
        -------
        point : Tensor of shape (r, d)
            Unit vectors.
        margin : Tensor of shape (r,)
            Their least slack; not positive where the cone has no interior (or none that float64 can tell),
            infinite where nothing constrains it. Kept per gate, so asking again costs nothing.
        """
        if self._interior is None:
            known = torch.zeros(self.n_gates, dtype=torch.bool, device=self.rows.device)
            point = self.rows.new_zeros(self.n_gates, self.n_features)
            self._interior = known, point, self.rows.new_zeros(self.n_gates)
        known, point, margin = self._interior
        missing = gate[~known[gate]].unique()
        for part in self.blocks(len(missing)) if len(missing) else ():
            some = missing[part]
            guess = None if self.gates is None else self.gates[:, some].T.to(point)
            point[some], margin[some] = deep_points(self.rows, self.signs(some), guess)
            known[some] = True
        return point[gate], margin[gate]

    def repair(self, gate: Tensor, u: Tensor) -> Tensor:
        """Feasible points u + t g, with interior points g and the smallest t that does (section 3 of the maths).

        Parameters
        ----------
        gate : Tensor of shape (r,), long
        u : Tensor of shape (r, d)
            Finite.

        Returns
        -------
        Tensor of shape (r, d)
            No row is violated in float64. Where a cone has no interior, the projection of u.
        """
        u = u.double()
        deep, margin = self.interior(gate)
        repaired = u.clone()
        for part in self.blocks(len(gate)):
            repaired[part] = self._push(gate[part], u[part], deep[part], margin[part])
        flat = (margin <= 0) | (self.violation(gate, repaired) > _ROUNDING)
        flat = flat.nonzero()[:, 0]
        if len(flat):
            repaired[flat] = self.project(gate[flat], u[flat]).point
        return repaired

    def _push(self, gate: Tensor, u: Tensor, deep: Tensor, margin: Tensor) -> Tensor:
        """u + t deep, t the smallest that makes it feasible, rounding included, where deep has a positive margin."""
        if len(self.rows) == 0:
            return u
        inside = self.slack(gate, deep)
        safe, shift, moved = inside.amin(1) > 0, torch.zeros_like(margin), u
        for attempt in range(8):
            slack = self.slack(gate, moved)
            wrong = safe & (slack.amin(1) < 0)
            if not bool(wrong.any()):
                break
            rounding = 4.0**attempt * torch.finfo(u.dtype).eps * moved.abs().sum(1, keepdim=True)
            missing = ((rounding - slack) / inside).amax(1)
            shift = torch.where(wrong, shift + missing, shift)
            moved = torch.where(wrong[:, None], u + shift[:, None] * deep, moved)
        return moved

    def blocks(self, length: int) -> Iterator[slice]:
        """Slices of `length` pairs, such that temporaries of one float64 per pair and row stay small."""
        size = max(1, _BLOCK_ENTRIES // max(1, len(self.rows), self.n_features**2))
        return (slice(i, i + size) for i in range(0, max(length, 1), size))
