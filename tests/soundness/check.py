"""Certificates of one random problem, held against the interval around its optimum."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import cvxnn
from cvxnn.losses import Huber
from cvxnn.solvers import SOLVERS
from cvxnn.solvers.base import make_options
from tests.soundness.problems import Instance, random_instance
from tests.soundness.reference import Reference
from tests.soundness.tamper import tampered

__all__ = ["Checker", "Report", "Violation", "check_problem", "random_direction"]

#: Relative tolerance for the evaluation in double precision.
TOLERANCE = 1e-9
_MAX_ITER = 200
_FEW_ITER = 10
_EVERY = 10


@dataclass(frozen=True)
class Violation:
    """A statement of the package that the interval contradicts, and by how much (relative)."""

    index: int
    point: str
    statement: str
    excess: float


@dataclass
class Report:
    """What was found on one problem; the margins are relative, and positive where a certificate is wrong."""

    index: int
    loss: str
    reduction: str
    output_bias: bool
    norms: tuple[str, str]
    relative_width: float = 0.0
    n_certificates: int = 0
    lower_margin: float = -np.inf
    primal_margin: float = -np.inf
    seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)


def check_problem(seed: int, index: int, tamper: str | None = None, small: bool = False) -> Report:
    """Check problem number `index` of a seed: at solutions, iterates, random points and near the optimum.

    `tamper` names a deliberate mistake of `tests.soundness.tamper`, made in the certificates only.
    """
    begin = time.perf_counter()
    instance = random_instance(seed, index, small)
    report = Report(index, instance.loss, instance.reduction, instance.output_bias, instance.norms)
    checker = Checker(instance, report)
    with tampered(tamper):
        checker.check_all(np.random.default_rng([seed, index, 1]))
    report.relative_width = checker.interval.relative_width
    report.seconds = time.perf_counter() - begin
    return report


class Checker:
    """Checks of the problem of one instance; those of other architectures override the first two methods."""

    def __init__(self, instance: Any, report: Report) -> None:
        self.instance, self.report = instance, report
        self.reference = self.make_reference()
        self.interval = self.reference.interval
        self.problem = self.make_problem(
            beta=self.reference.beta,
            loss=Huber(instance.delta) if instance.loss == "huber" else instance.loss,
            reduction=instance.reduction,
            output_bias=instance.output_bias,
            norms=instance.norms,
            sample_weight=instance.sample_weight,
            dtype=instance.dtype,
        )

    def make_reference(self) -> Reference:
        """The problem in NumPy."""
        return Reference(self.instance)

    def make_problem(self, **options: Any) -> cvxnn.Problem:
        """The problem of the package."""
        instance: Instance = self.instance
        activation = "linear" if instance.gates is None else "gated_relu"
        return cvxnn.mlp_problem(instance.X, instance.Y, activation=activation, gates=instance.gates, **options)

    def check_all(self, rng: np.random.Generator) -> None:
        if not self.patterns_are_right():
            self.violated("problem", "patterns are those of the gates", 1.0)
        self.check_beta_max()
        self.check_solution()
        for points in (self.iterates(), self.points(rng), self.dual_points(rng), self.factors(rng)):
            for name, arguments in points:
                self.check(name, cvxnn.certify(self.problem, **arguments), arguments)

    def patterns_are_right(self) -> bool:
        """Whether patterns are X g >= 0."""
        return np.array_equal(self.problem.patterns.numpy(), self.instance.patterns)

    def violated(self, point: str, statement: str, excess: float) -> None:
        self.report.violations.append(Violation(self.report.index, point, statement, excess))

    def expect(self, point: str, statement: str, excess: float) -> None:
        """Note a violation unless the relative `excess` is within the tolerance."""
        if not excess <= TOLERANCE:
            self.violated(point, statement, excess)

    def check(self, point: str, certificate: cvxnn.Certificate, arguments: dict[str, Any]) -> None:
        """Hold one certificate against the interval."""
        size, report = self.interval.size, self.report
        below = (certificate.lower_bound - self.interval.upper) / size
        above = (self.interval.lower - certificate.primal) / size
        report.n_certificates += 1
        report.lower_margin = max(report.lower_margin, below)
        report.primal_margin = max(report.primal_margin, above)
        self.expect(point, "lower_bound <= p*", below)
        self.expect(point, "primal >= p*", above)
        ratios = certificate.dual_norm_ratio_lower - certificate.dual_norm_ratio
        self.expect(point, "dual_norm_ratio_lower <= dual_norm_ratio", ratios)
        if certificate.theorem_bound is not None:
            suboptimality = (certificate.primal - self.interval.upper) / size
            self.expect(point, "theorem_bound holds", suboptimality - certificate.theorem_bound)
        if "Z" in arguments:
            self.check_primal(point, certificate.primal, **arguments)

    def check_primal(self, point: str, primal: float, Z: Any, intercept: Any = None, dual: Any = None) -> None:
        """The objective must be that of the definition, with the best intercept where none is given."""
        blocks = np.asarray(Z, dtype=float)
        found = self.reference.best_intercept(blocks) if intercept is None else np.asarray(intercept)
        value = self.reference.objective(blocks, found)
        scale = max(abs(value), 1e-6 * self.reference.plain_loss)
        self.expect(point, "primal <= objective of the point", (primal - value) / scale)
        if intercept is not None or not self.instance.output_bias:
            self.expect(point, "primal >= objective of the point", (value - primal) / scale)

    def check_beta_max(self) -> None:
        expected, seen = self.reference.beta_max, self.problem.beta_max
        scale = max(expected, np.finfo(float).tiny)
        if self.reference.beta_max > 0:
            self.expect("beta_max", "beta_max is large enough", (expected - seen) / scale)

    def check_solution(self) -> None:
        """What `solve` returns: its certificate, and that "certified" means what it says."""
        name, tol = self.solver_name(), 1e-6
        max_iter = 2 * (_MAX_ITER if SOLVERS[name].check_every == _EVERY else _FEW_ITER)
        result = cvxnn.solve(self.problem, solver=name, tol=tol, max_iter=max_iter)
        point = f"solution of {name}"
        self.check(point, result.certificate, {})
        if result.status == "certified":
            suboptimality = (result.objective - self.interval.upper) / self.interval.size
            self.expect(point, "certified to the tolerance", suboptimality - tol)

    def solver_name(self) -> str:
        rota = ("admm", "admm", "fista", "admm", "frank_wolfe", "admm", "fista", "admm", "interior_point")
        name = rota[self.report.index // 4 % len(rota)]
        return name if SOLVERS[name].unsupported(self.problem) is None else "admm"

    def iterates(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every tenth iterate (every one of methods with few), with and without the solver's dual point."""
        kind = SOLVERS[self.solver_name()]
        every = min(_EVERY, kind.check_every)
        solver = kind(self.problem, make_options(kind, None), 1e-6, None)
        solver.start(None)
        for iteration in range(1, 1 + (_MAX_ITER if every == _EVERY else _FEW_ITER)):
            solver.step()
            if iteration % every == 0:
                it = solver.iterate()
                point: dict[str, Any] = {"Z": it.Z} if it.factors is None else {"factors": it.factors}
                yield f"iterate {iteration} of {kind.name}", point | {"dual": it.dual}
            if solver.finished:
                break

    def points(self, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
        """Zero, random points, and points 1e-8 from the best one known, with and without intercept."""
        optimum, shape = self.interval.Z, self.interval.Z.shape
        size = np.linalg.norm(optimum) or 1.0
        yield "zero", {"Z": np.zeros(shape)}
        for scale in (1e-2, 1.0, 1e2):
            yield f"random, scale {scale:g}", {"Z": scale * size * random_direction(rng, shape)}
        yield "half the optimum", {"Z": 0.5 * optimum}
        yield "reference", {"Z": optimum, "intercept": self.interval.intercept}
        for _ in range(2):
            yield "1e-8 from the optimum", {"Z": optimum + 1e-8 * size * random_direction(rng, shape)}
        if self.instance.output_bias:
            shifted = self.interval.intercept + rng.normal(size=self.problem.Y.shape[1])
            yield "random intercept", {"Z": optimum, "intercept": shifted}
            yield "no intercept", {"Z": optimum, "intercept": np.zeros(self.problem.Y.shape[1])}

    def dual_points(self, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
        """Dual candidates: the optimal one, a random one, and the optimum of the problem without intercept."""
        Z = self.interval.Z
        nu = self.full(self.interval.nu)
        yield "reference dual", {"Z": Z, "dual": nu}
        yield "1e-8 from the dual", {"Z": Z, "dual": nu + 1e-8 * np.linalg.norm(nu) * random_direction(rng, nu.shape)}
        yield "random dual", {"Z": Z, "dual": random_direction(rng, nu.shape)}
        if self.instance.output_bias:
            yield "dual without intercept", {"Z": Z, "dual": self.full(self.reference.dual_without_intercept())}

    def factors(self, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
        """Random factors, and balanced ones of the best point known, exact and 1e-8 away."""
        P, d, c = self.interval.Z.shape
        left, values, right = np.linalg.svd(self.interval.Z, full_matrices=False)
        root = np.sqrt(values)[:, None, :]
        U, V = left * root, right.transpose(0, 2, 1) * root
        size = np.sqrt(values.sum()) or 1.0
        m = int(rng.integers(1, 4))
        random = (size * random_direction(rng, (P, d, m)), size * random_direction(rng, (P, c, m)))
        yield "random factors", {"factors": random}
        yield "balanced factors", {"factors": (U, V)}
        moved = [part + 1e-8 * size * random_direction(rng, part.shape) for part in (U, V)]
        yield "1e-8 from balanced factors", {"factors": tuple(moved)}

    def full(self, nu: np.ndarray) -> np.ndarray:
        """A dual point in double precision, with zeros for the samples of weight 0."""
        rows = np.zeros(self.problem.Y.shape)
        rows[self.reference.used] = nu.astype(float)
        return rows


def random_direction(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A random array of Frobenius norm 1."""
    array = rng.normal(size=shape)
    return array / np.linalg.norm(array)


def set_threads() -> None:
    """One thread: problems are checked side by side."""
    torch.set_num_threads(1)
