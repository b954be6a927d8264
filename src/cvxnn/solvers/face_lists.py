"""Long projections onto cones in NumPy, for methods that project again and again onto few of them.

On the few numbers of a small working set, a call of torch costs many times its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cvxnn.cones import Cones, LongProjections
from cvxnn.cones.polygons import ConeFaces

__all__ = ["ArrayProjections", "FaceList", "Long"]

Array = NDArray[np.float64]
#: Rows of chosen vectors, their projections, and projectors on the spans of their faces.
Found = tuple[NDArray[np.int64], Array, Array]


@dataclass
class Long:
    """Projections that are longer than a threshold.

    `lengths` (s,) are theirs up to rounding errors relative to what is projected, in some order. `find` gives

    chosen : array of shape (s,), int
        Rows of z.reshape(2 B, d), in the same order.
    point : array of shape (s, d)
    projectors : array of shape (s, d, d)
        Onto the spans of their faces.
    """

    lengths: Array
    find: Callable[[], Found]


class ArrayProjections:
    """:class:`cvxnn.cones.LongProjections` on arrays.

    Parameters
    ----------
    cones : Cones
    gates : torch.Tensor of shape (B,), long
        The same in every call.
    """

    def __init__(self, cones: Cones, gates: torch.Tensor) -> None:
        plan = LongProjections(cones, gates)
        self.memory, self.device = plan.memory, gates.device
        self.known, self.others = plan.known.cpu().numpy(), plan.others
        self.faces = FaceList(plan.faces) if plan.faces is not None and len(self.known) else None

    def measure(self, z: Array, threshold: float) -> Long:
        """Which projections of z (2, B, d) are longer than a threshold, and how long; they themselves on demand."""
        if self.memory is None:
            assert self.faces is not None
            return self.faces.measure(z, threshold)
        flat = torch.from_numpy(z.reshape(-1, z.shape[2])).to(self.device)
        chosen, *rest = self.memory.project_long(flat[self.others], threshold)
        point, projectors = (part.cpu().numpy() for part in rest)
        slow = self.others[chosen].cpu().numpy(), point, projectors
        lengths = np.sqrt(np.einsum("sd,sd->s", point, point))
        if self.faces is None:
            return Long(lengths, lambda: slow)
        fast = self.faces.measure(z[:, self.known], threshold)
        return Long(np.concatenate([fast.lengths, lengths]), partial(self._joined, fast, slow, z.shape[1]))

    def _joined(self, fast: Long, slow: Found, count: int) -> Found:
        rows, *rest = fast.find()
        sign, place = np.divmod(rows, len(self.known))
        one, two, three = (
            np.concatenate(pair) for pair in zip((sign * count + self.known[place], *rest), slow, strict=True)
        )
        return one, two, three


class FaceList:
    """The faces of B cones of the plane or of space in one list without padding: rays, each with a facet.

    A projection is on the longest of the rays and facets that it can be on, or everywhere, inside the cone.

    Parameters
    ----------
    faces : ConeFaces
    """

    def __init__(self, faces: ConeFaces) -> None:
        rows = faces.rows[:, :, 0].cpu().numpy()
        real = rows != rows[:, :1]
        real[:, 0] = True
        self.owner: NDArray[np.int64] = real.nonzero()[0]
        counts = real.sum(1)
        self.first = np.cumsum(counts) - counts
        slot = np.arange(rows.shape[1])
        self.slots = self.first[:, None] + np.where(slot < counts[:, None], slot, 0)
        #: Coordinates (d, 4, M) of the unit vectors ConeFaces.tests.
        self.tests: Array = np.ascontiguousarray(faces.tests.permute(3, 1, 0, 2).cpu().numpy()[:, :, real])

    def measure(self, z: Array, threshold: float) -> Long:
        """As :meth:`ArrayProjections.measure`."""
        squares, on_facet, inside = self._squares(z)
        lengths = np.maximum.reduceat(squares, self.first, axis=1)
        lengths[inside] = np.inf
        lengths = np.minimum(lengths, np.einsum("sbd,sbd->sb", z, z))
        chosen = (lengths > threshold**2).nonzero()
        return Long(np.sqrt(lengths[chosen]), partial(self._find, z, squares, on_facet, inside, *chosen))

    def _find(
        self,
        z: Array,
        squares: Array,
        on_facet: NDArray[Any],
        inside: NDArray[Any],
        sign: NDArray[np.int64],
        place: NDArray[np.int64],
    ) -> Found:
        slots = self.slots[place]
        best = slots[np.arange(len(place)), squares[sign[:, None], slots].argmax(1)]
        across, ray = self.tests[:, 2:, best].transpose(1, 2, 0)
        across = across * on_facet[sign, best, None]
        projectors = ray[:, :, None] * ray[:, None] + across[:, :, None] * across[:, None]
        projectors[inside[sign, place]] = np.eye(z.shape[2])
        # Twice, as the first product has rounding errors relative to z.
        point = projectors @ (projectors @ z[sign, place, :, None])
        return sign * z.shape[1] + place, point[:, :, 0], projectors

    def _squares(self, z: Array) -> tuple[Array, NDArray[Any], NDArray[Any]]:
        """Squared lengths (2, M) of what z is on the rays or facets, which of them it is, and cones z is in (2, B)."""
        # Taken so, they are contiguous.
        coordinates = np.take(z.transpose(2, 0, 1), self.owner, axis=2)
        products = np.einsum("dfm,dsm->fsm", self.tests, coordinates)
        outside, last, across, along = products
        on_facet = np.minimum(np.minimum(outside, across), last) > 0
        squares = along * np.abs(along)
        np.copyto(squares, along * along + across * across, where=on_facet)
        return squares, on_facet, np.maximum.reduceat(outside, self.first, axis=1) <= 0
