"""The convex program by an interior-point method, through CVXPY: slow on large problems, and a reference."""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch

from cvxnn.certificates import evaluate
from cvxnn.columns import Columns
from cvxnn.errors import CvxnnError, DependencyError, InvalidInputError
from cvxnn.losses import CrossEntropy, Huber, Logistic, Squared
from cvxnn.operators import Operator
from cvxnn.problem import Problem
from cvxnn.solvers.base import Iterate, Solver
from cvxnn.validation import check_choice

__all__ = ["BACKENDS", "InteriorPoint", "operator_matrix"]

#: Names of the backends, and what installs them.
BACKENDS = {
    "clarabel": "pip install 'cvxnn[reference]'",
    "mosek": "pip install mosek (and a licence)",
    "scs": "pip install 'cvxnn[reference]'",
}
_ORDERS: dict[str, int | str] = {"l1": 1, "l2": 2, "linf": "inf"}
_TIGHTEST = 1e-12
_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class InteriorPointOptions:
    """Options of ``interior_point``.

    Attributes
    ----------
    backend : {"clarabel", "mosek", "scs"}
        The conic solver. Clarabel is free; MOSEK needs its package and a licence; SCS is a first-order
        method, of use only where the others run out of memory.
    settings : dict or None
        Settings of the backend, passed on to ``cvxpy.Problem.solve``.
    """

    backend: str = "clarabel"
    settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice(self.backend, "backend", tuple(BACKENDS))
        if self.settings is not None and not isinstance(self.settings, dict):
            raise InvalidInputError(f"settings is a {type(self.settings).__name__}; a dict or None is wanted")


class InteriorPoint(Solver):
    """The convex program in conic form, solved at once (section 4 of the maths).

    The loss is taken of variables T tied to A(Z) + 1 b^T by an equality; its multiplier is the dual
    candidate. Nuclear norms become semidefinite constraints, norms of rows or columns second-order cones or
    linear inequalities. A warm start is ignored.

    The tolerances of the backends are absolute for objectives below 1. The first solve divides the objective
    by its value at Z = 0; where its certificate is not good enough, a second one divides by the value that
    the first has found, with the tightest tolerances.
    """

    name = "interior_point"
    Options = InteriorPointOptions
    check_every: int = 1
    cones: ClassVar[bool] = True

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.cones is not None and (q := problem.operator.block_shape[2]) > 1:
            return f"the ReLU program is convex in vectors for one output (and pooling cell) only, and there are {q}"
        if not problem.norm.exact and min(problem.operator.block_shape[1:]) > 1:
            return f"it needs a norm with a closed form, and {problem.norm.name} has none; use 'frank_wolfe'"
        if importlib.util.find_spec("cvxpy") is None:
            return "it needs cvxpy, which is not installed: pip install 'cvxnn[reference]'"
        return None

    def __init__(self, problem: Problem, *arguments: Any) -> None:
        super().__init__(problem, *arguments)
        _require_backend(self.options.backend)

    def start(self, point: Iterate | None) -> None:
        self.begin = time.perf_counter()
        self.point = self.zero()
        self.scale = self._objective()
        self.tolerance = max(_TIGHTEST, min(1e-8, 1e-6 * self.tol))
        self.last = False

    def step(self) -> None:
        """Solve the program, the second time with another scale.

        Raises
        ------
        CvxnnError
            The backend failed without a point.
        InvalidInputError
            The backend refused a setting.
        """
        program = (_Program if self.problem.cones is None else _ConeProgram)(self.problem, self.scale)
        self._solve(program)
        point = program.point()
        self.finished = self.last or point is None
        if point is not None:
            self.point = point
            self.scale = self._objective()
            self.tolerance, self.last = _TIGHTEST, True

    def _objective(self) -> float:
        return evaluate(self.problem, self.point.Z, factors=self.point.factors).primal

    def _solve(self, program: _Program) -> None:
        backend = self.options.backend
        left = None
        if self.time_limit is not None:
            left = max(1e-3, self.time_limit - (time.perf_counter() - self.begin))
        settings = _settings(backend, self.tolerance, left) | (self.options.settings or {})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program.problem.solve(solver=backend.upper(), **settings)
        except TypeError as error:
            raise InvalidInputError(f"settings: {backend!r} refused one of {sorted(settings)}: {error}") from error
        except Exception as error:
            raise CvxnnError(f"the interior-point backend {backend!r} failed: {error}; use solver='admm'") from error

    def iterate(self) -> Iterate:
        return self.point

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to load: a run that is resumed solves the program again."""


def _require_backend(backend: str) -> None:
    import cvxpy as cp

    if backend.upper() not in cp.installed_solvers():
        raise DependencyError(f"backend {backend!r} of 'interior_point' is not installed: {BACKENDS[backend]}")


def _settings(backend: str, tolerance: float, time_limit: float | None) -> dict[str, Any]:
    """Settings of a backend for a tolerance and a limit in seconds."""
    if backend == "clarabel":
        settings: dict[str, Any] = {
            "tol_gap_abs": tolerance,
            "tol_gap_rel": tolerance,
            "tol_feas": tolerance,
            "accept_unknown": True,
        }
        return settings if time_limit is None else settings | {"time_limit": time_limit}
    if backend == "scs":
        settings = {"eps_abs": tolerance, "eps_rel": tolerance, "max_iters": 100_000}
        return settings if time_limit is None else settings | {"time_limit_secs": time_limit}
    names = ("REL_GAP", "PFEAS", "DFEAS")
    parameters = {f"MSK_DPAR_INTPNT_CO_TOL_{name}": tolerance for name in names}
    if time_limit is not None:
        parameters["MSK_DPAR_OPTIMIZER_MAX_TIME"] = time_limit
    return {"mosek_params": parameters, "accept_unknown": True}


def _dense_bytes(op: Operator) -> int:
    """Memory of the map as a dense float64 matrix from vec(Z) to vec(predictions)."""
    n_gates, p, q = op.block_shape
    return 8 * n_gates * p * q * op.n_samples * op.n_outputs


def operator_matrix(op: Operator) -> sp.csr_array:
    """The map as a sparse matrix (n c, P p q), both sides flattened in row-major order."""
    n_gates, p, q = op.block_shape
    size = n_gates * p * q
    like = torch.zeros((), dtype=op.dtype, device=op.device)
    left, right = torch.eye(p).to(like), torch.eye(q).to(like)
    step = max(1, _CHUNK_BYTES * size // max(1, _dense_bytes(op)))
    parts = []
    for start in range(0, size, step):
        index = torch.arange(start, min(start + step, size), device=op.device)
        gate, row, column = index // (p * q), index // q % p, index % q
        responses = op.apply_atoms(gate, left[row], right[column]).flatten(1)
        parts.append(sp.csr_array(responses.cpu().numpy()))
    return sp.csr_array(sp.vstack(parts).T)


class _Program:
    """The convex program of a problem in CVXPY, its objective divided by `scale`."""

    def __init__(self, problem: Problem, scale: float) -> None:
        import cvxpy as cp

        self.source = problem
        self.scale = scale if 0 < scale < math.inf else 1.0
        self.T = cp.Variable(tuple(problem.Y.shape))
        self.b = cp.Variable((1, problem.Y.shape[1])) if problem.output_bias else None
        self.blocks, penalty = self._make_blocks()
        outputs = cp.reshape(operator_matrix(problem.operator.double()) @ self._flatten(), self.T.shape, order="C")
        if self.b is not None:
            outputs = outputs + np.ones((problem.n_samples, 1)) @ self.b
        self.tie = outputs - self.T == 0
        total = (_loss(problem, self.T) + problem.beta * penalty) / self.scale
        self.problem = cp.Problem(cp.Minimize(total), [self.tie, *self._constraints()])

    def _constraints(self) -> list[Any]:
        """Further constraints on the variables."""
        return []

    def _make_blocks(self) -> tuple[Any, Any]:
        """Variables and their penalty: matrices (P of them), or one with a row per vector whose norm counts."""
        import cvxpy as cp

        norm = self.source.norm
        n_gates, p, q = self.source.operator.block_shape
        self.layout, order = _vector_layout(norm.left, norm.right, p, q)
        if self.layout == "matrices":
            blocks = [cp.Variable((p, q)) for _ in range(n_gates)]
            return blocks, cp.sum([cp.normNuc(Z) for Z in blocks])
        shape = (n_gates * p, q) if self.layout == "rows" else (n_gates * q, p)
        vectors = cp.Variable(shape)
        return vectors, cp.sum(cp.norm(vectors, _ORDERS[order], axis=1))

    def _flatten(self) -> Any:
        """vec(Z) in row-major order."""
        import cvxpy as cp

        if self.layout == "matrices":
            return cp.hstack([cp.vec(Z, order="C") for Z in self.blocks])
        flat = cp.vec(self.blocks, order="C")
        if self.layout == "rows":
            return flat
        n_gates, p, q = self.source.operator.block_shape
        return flat[np.arange(n_gates * p * q).reshape(n_gates, q, p).transpose(0, 2, 1).ravel()]

    def point(self) -> Iterate | None:
        """The solution, or None where the backend returned none."""
        values = [Z.value for Z in self.blocks] if self.layout == "matrices" else self.blocks.value
        if values is None or any(part is None for part in values) or not np.isfinite(values).all():
            return None
        like = self.source.Y
        n_gates, p, q = self.source.operator.block_shape
        Z = np.asarray(values)
        Z = Z.reshape(n_gates, q, p).transpose(0, 2, 1) if self.layout == "columns" else Z.reshape(n_gates, p, q)
        return Iterate(torch.from_numpy(np.ascontiguousarray(Z)).to(like), dual=self._dual())

    def _dual(self) -> torch.Tensor | None:
        """The multiplier of the equality, (n, c)."""
        multiplier = self.tie.dual_value
        if multiplier is None or not np.isfinite(multiplier).all():
            return None
        return torch.from_numpy(self.scale * np.asarray(multiplier)).to(self.source.Y.device)


class _ConeProgram(_Program):
    """The convex ReLU program with one output: Z_k = u_k - w_k at the cost ||u_k|| + ||w_k||, both in the cone."""

    def _make_blocks(self) -> tuple[Any, Any]:
        import cvxpy as cp

        n_gates, p, _ = self.source.operator.block_shape
        self.layout = "columns"
        vectors = cp.Variable((2 * n_gates, p))
        return vectors, cp.sum(cp.norm(vectors, 2, axis=1))

    def _flatten(self) -> Any:
        import cvxpy as cp

        n_gates = self.source.n_gates
        return cp.vec(self.blocks[:n_gates] - self.blocks[n_gates:], order="C")

    def _constraints(self) -> list[Any]:
        import cvxpy as cp

        X, patterns = (part.cpu().numpy() for part in self.source.operator.double().cone_rows)
        signs = 2.0 * patterns - 1
        rows = sp.block_diag([sp.csr_array(signs[:, k : k + 1] * X) for k in range(signs.shape[1])], format="csr")
        return [sp.block_diag([rows, rows], format="csr") @ cp.vec(self.blocks, order="C") >= 0]

    def point(self) -> Iterate | None:
        values = self.blocks.value
        if values is None or not np.isfinite(values).all():
            return None
        n_gates, cones = self.source.n_gates, self.source.cones
        assert cones is not None
        u = torch.from_numpy(np.asarray(values)).to(self.source.Y64)
        gate = torch.arange(n_gates, device=u.device).repeat(2)
        signs = torch.ones(2 * n_gates, 1).to(u)
        signs[n_gates:] = -1
        # The backend respects the cones up to its tolerance.
        columns = Columns(gate, cones.project(gate, u).point, signs).without_zeros(1e-12).balanced()
        return Iterate(None, dual=self._dual(), factors=columns.factors(n_gates))


def _vector_layout(left: str, right: str, p: int, q: int) -> tuple[str, str]:
    """How a norm splits: "rows" or "columns" with the vector norm of each, or "matrices"."""
    if q == 1:
        return "columns", left
    if p == 1 or left == "l1":
        return "rows", right
    if right == "l1":
        return "columns", left
    return "matrices", ""


def _loss(problem: Problem, T: Any) -> Any:
    """The loss of the predictions as a CVXPY expression."""
    import cvxpy as cp

    Y, w = problem.Y64.cpu().numpy(), problem.weights.cpu().numpy()[:, None]
    loss = problem.loss
    if isinstance(loss, Squared):
        return 0.5 * cp.sum_squares(cp.multiply(np.sqrt(w) * np.ones_like(Y), T - Y))
    if isinstance(loss, Huber):
        delta: Any = loss.delta
        return 0.5 * cp.sum(cp.multiply(w * np.ones_like(Y), cp.huber(T - Y, delta)))
    linear = cp.sum(cp.multiply(w * Y, T))
    if isinstance(loss, Logistic):
        return cp.sum(cp.multiply(w * np.ones_like(Y), cp.logistic(T))) - linear
    if isinstance(loss, CrossEntropy):
        mass = w[:, 0] * Y.sum(1)
        return cp.sum(cp.multiply(mass, cp.log_sum_exp(T, axis=1))) - linear
    raise CvxnnError(f"'interior_point' does not know the loss {loss.name!r}")
