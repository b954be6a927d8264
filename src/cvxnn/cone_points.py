"""What a stationary point of the ReLU problem (19) is: local minimum, saddle, or not decided (math section 3)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxnn.certificates import Evaluation
from cvxnn.columns import Columns
from cvxnn.cone_curvature import face_curvature, free_curvature
from cvxnn.cone_stationarity import (
    ConeResiduals,
    Faces,
    column_sizes,
    cone_residuals,
    counted_zeros,
    neighbours,
    zero_columns,
)
from cvxnn.cone_witness import DescentNeuron, descent_neuron
from cvxnn.curvature import Curvature
from cvxnn.dual_norms import ConePrices
from cvxnn.problem import Problem

__all__ = ["ConeColumns", "ConePoint", "FaceFacts", "examine_point"]

_EPS = 2.0**-53
#: Norms above beta by this many times tol, relative, are above it.
SLACK = 10


@dataclass(frozen=True)
class FaceFacts:
    """How the columns of a ReLU point lie in their cones.

    Attributes
    ----------
    n_columns : int
        Columns that are not zero.
    n_zero, n_padding : int
        Columns that are zero: those that can move, and those that only fill the factors.
    n_on_faces : int
        Columns with an active row of their cone.
    n_weak : int
        Active rows without a clearly positive multiplier: strict complementarity fails there.
    least_multiplier : float or None
        The smallest clear multiplier, relative to beta times the size of its column; None where there is none.
    ratio : float
        The largest ||P_S G_k||_2 / beta, S the span of the face of a column; at most 1 at a proven local minimum.
    radius : float
        No feasible point with ||v - v_j|| <= radius ||v_j|| for all columns is better, whatever the u are (at an
        exactly proven local minimum; infinite where no multiplier is positive).
    crossing : float or None
        The largest relative residual of a neuron taken as a column of another cell that has it on its boundary;
        None where the gates are a sample.
    n_crossings : int
        Number of pairs of a neuron and another cell.
    proven : bool
        Whether a local minimum is proven, rather than one as far as second order tells.
    """

    n_columns: int
    n_zero: int
    n_padding: int
    n_on_faces: int
    n_weak: int
    least_multiplier: float | None
    ratio: float
    radius: float
    crossing: float | None
    n_crossings: int
    proven: bool


@dataclass(frozen=True)
class ConeColumns:
    """The columns of a point that are not exactly zero, with their places in the factors, and what the others are."""

    residuals: ConeResiduals
    places: Tensor
    every: Columns
    zero: Tensor
    counted: Tensor

    @classmethod
    def of(cls, problem: Problem, point: Evaluation, nu: Tensor, tol: float, padding: bool) -> ConeColumns:
        """Residuals of (69) and (72) at all columns of a point with finite gradients."""
        assert point.factors is not None
        every = Columns.from_factors(*point.factors)
        places = (column_sizes(every) > 0).nonzero()[:, 0]
        zero = zero_columns(every, tol)
        return cls(
            residuals=cone_residuals(problem, every[places], nu),
            places=places,
            every=every,
            zero=zero,
            counted=counted_zeros(problem, every, zero, padding),
        )

    def free_gates(self, problem: Problem) -> Tensor:
        """Gates with a column of zeros that can become any neuron of their cones, (P,) bool.

        A zero neuron of a network can go to any cell, where there is padding for it; a zero column of (19) only
        into its own cone.
        """
        network = problem.scope == "relu_network" and bool(self.counted.any())
        return self.gates_with(self.zero if network else self.counted, problem.n_gates)

    def gates_with(self, mask: Tensor, n_gates: int) -> Tensor:
        """Which gates have a column of a mask, (P,) bool."""
        out = torch.zeros(n_gates, dtype=torch.bool, device=mask.device)
        out[self.every.gate[mask]] = True
        return out


@dataclass(frozen=True)
class ConePoint:
    """The conclusion about a stationary point, and what it rests on.

    `conclusion` is one of "minimum" (proven), "second order", "saddle", "free column", "crossing", "weak",
    "unconverged", "open" and "not looked at".
    """

    conclusion: str
    faces: FaceFacts
    witness: DescentNeuron | None
    curvature: Curvature | None
    threshold: float


def examine_point(
    problem: Problem,
    point: Evaluation,
    nu: Tensor,
    columns: ConeColumns,
    prices: ConePrices,
    *,
    tol: float,
    threshold: float,
    second_order: bool,
    max_products: int,
) -> ConePoint:
    """What a stationary point is.

    Parameters
    ----------
    prices : ConePrices
        Of nu, all gates with a norm above beta looked at.
    tol : float
        Relative tolerance of stationarity and of norms.
    threshold : float
        Eigenvalues below minus this are negative.
    """
    network = problem.scope == "relu_network"
    level = problem.beta * (1 + SLACK * tol)
    kept = ~columns.zero[columns.places]
    faces = Faces.of(problem, columns.residuals[kept], nu, tol)
    harmless = prices.upper <= level
    settled = bool((faces.passes | harmless[faces.residuals.columns.gate]).all())
    crossing, n_crossings, elsewhere = None, 0, True
    if network and problem.cones is not None and len(faces):
        crossing, n_crossings, elsewhere = _crossings(problem, faces, nu, harmless, tol)
    facts = _facts(columns, faces, crossing, n_crossings)
    witness = descent_neuron(problem, point, nu, prices, columns.free_gates(problem))
    found = ConePoint("", facts, witness, None, threshold)
    if crossing is not None and crossing > tol:
        return dataclasses.replace(found, conclusion="crossing")

    counted = columns.gates_with(columns.counted, problem.n_gates)
    reached = torch.ones_like(counted) if network and bool(counted.any()) else counted
    if bool((reached & (prices.lower > level)).any()):
        return _free_column(problem, point, nu, columns, prices, found)
    closed = bool((harmless | ~reached).all())
    if settled and elsewhere and closed:
        facts = dataclasses.replace(facts, proven=True)
        return dataclasses.replace(found, conclusion="minimum", faces=facts)
    if not second_order or len(faces) == 0:
        return dataclasses.replace(found, conclusion="open" if second_order else "not looked at")
    curvature, threshold, conclusion = _second_order(
        problem, point, faces, columns.places[kept], threshold, max_products
    )
    if conclusion == "second order" and not (elsewhere and closed):
        conclusion = "open"
    return dataclasses.replace(found, conclusion=conclusion, curvature=curvature, threshold=threshold)


def _crossings(problem: Problem, faces: Faces, nu: Tensor, harmless: Tensor, tol: float) -> tuple[float, int, bool]:
    """The largest residual in neighbouring cells, how many pairs there are, and whether all pass there."""
    assert problem.cones is not None
    own = faces.residuals
    others = neighbours(problem.cones, own.columns)
    if len(others) == 0:
        return 0.0, 0, True
    residuals = cone_residuals(problem, others, nu)
    worst = float((residuals.own * residuals.sizes).max() / torch.linalg.vector_norm(own.sizes))
    if worst > tol:
        return worst, len(others), False
    there = Faces.of(problem, residuals, nu, tol)
    return worst, len(others), bool((there.passes | harmless[others.gate]).all())


def _facts(columns: ConeColumns, faces: Faces, crossing: float | None, n_crossings: int) -> FaceFacts:
    n_zero = int(columns.counted.sum())
    multipliers = faces.residuals.multiplier / faces.residuals.sizes[:, None]
    clear = faces.normals.abs().amax(2) > 0 if faces.normals.numel() else torch.zeros_like(multipliers) > 0
    return FaceFacts(
        n_columns=len(faces),
        n_zero=n_zero,
        n_padding=int(columns.zero.sum()) - n_zero,
        n_on_faces=int(faces.active.any(1).sum()),
        n_weak=int(faces.weak.sum()),
        least_multiplier=float(multipliers[clear].min()) if bool(clear.any()) else None,
        ratio=float(faces.ratio.max()) if len(faces) else 0.0,
        radius=float(faces.radius.min()) if len(faces) else math.inf,
        crossing=crossing,
        n_crossings=n_crossings,
        proven=False,
    )


def _free_column(
    problem: Problem, point: Evaluation, nu: Tensor, columns: ConeColumns, prices: ConePrices, found: ConePoint
) -> ConePoint:
    """A zero column leads down: the steepest neuron of a gate that has a place for it."""
    witness = descent_neuron(problem, point, nu, prices, columns.free_gates(problem), only_free=True)
    if witness is None:
        return dataclasses.replace(found, conclusion="free column")
    zero = columns.zero if problem.scope == "relu_network" else columns.counted
    place = int((zero & (columns.every.gate == witness.gate)).nonzero()[0, 0])
    curvature = free_curvature(problem, point, place, witness)
    return dataclasses.replace(found, conclusion="free column", witness=witness, curvature=curvature)


def _second_order(
    problem: Problem, point: Evaluation, faces: Faces, places: Tensor, threshold: float, max_products: int
) -> tuple[Curvature, float, str]:
    """The curvature on the faces, its threshold, and what follows."""
    conclusion = "second order"
    for spans in ("clear", "tight"):
        if spans == "tight":
            faces = faces.tight()
        curvature = face_curvature(problem, point, faces, places, tolerance=10 * threshold, max_products=max_products)
        limit = threshold + 64 * _EPS * curvature.scale
        if curvature.value >= -limit:
            if conclusion == "second order" and not curvature.converged:
                conclusion = "unconverged"
            return curvature, limit, conclusion
        down = _feasible(faces, curvature, places)
        if down is not None:
            return down, limit, "saddle"
        conclusion = "weak"
    return curvature, limit, conclusion


def _feasible(faces: Faces, curvature: Curvature, places: Tensor) -> Curvature | None:
    """The curvature with its direction or the negative of it, whichever stays in the cones."""
    dU, dV = curvature.direction
    du = dU.mT.reshape(-1, dU.shape[1])[places]
    if faces.admits(du):
        return curvature
    if faces.admits(-du):
        return dataclasses.replace(curvature, direction=(-dU, -dV))
    return None
