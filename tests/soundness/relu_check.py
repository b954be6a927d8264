"""Certificates of one random ReLU problem, held against the interval around its optimum."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import cvxnn
from cvxnn.columns import Columns
from cvxnn.cones import FEASIBILITY, cones
from cvxnn.patterns.activation import pack_columns
from cvxnn.solvers import SOLVERS
from cvxnn.solvers.base import make_options
from tests.soundness.check import TOLERANCE, Report, Violation
from tests.soundness.cnn_relu_problems import CNNReluInstance
from tests.soundness.relu_audit import check_audit
from tests.soundness.relu_bounds import check_bounds
from tests.soundness.relu_points import Points, PointSource
from tests.soundness.relu_problems import ReluInstance, random_relu_instance
from tests.soundness.relu_reference import Network, ReluReference
from tests.soundness.tamper import tampered

__all__ = ["ReluChecker", "check_relu_instance", "check_relu_problem"]

_SECONDS = {False: 0.5, True: 0.1}
_SOLVERS = ("ssnal", "bm_global", "frank_wolfe", "bm_projected_gd", "interior_point")
_STEPS = {"interior_point": 1, "bm_global": 6, "ssnal": 12, "frank_wolfe": 12, "bm_projected_gd": 60}


def check_relu_problem(
    seed: int, index: int, tamper: str | None = None, small: bool = False, outputs: str = "scalar"
) -> Report:
    """Check ReLU problem number `index` of a seed: solutions, iterates, random points, bounds and trained networks.

    `tamper` names a deliberate mistake of `tests.soundness.tamper`, made in the package only. For half of the problems
    the caps that only many gates need are used whatever the number of gates.
    """
    return check_relu_instance(random_relu_instance(seed, index, outputs, small), seed, tamper, small)


def check_relu_instance(
    instance: ReluInstance | CNNReluInstance, seed: int, tamper: str | None = None, small: bool = False
) -> Report:
    """Check one ReLU problem, of any architecture; bounds and trained networks are those of perceptrons only."""
    begin, index = time.perf_counter(), instance.index
    report = Report(index, instance.loss, instance.reduction, instance.output_bias, ("l2", "l2"))
    reference = ReluReference(instance)
    _ = reference.interval
    with ExitStack() as stack:
        stack.enter_context(tampered(tamper))
        if instance.caps or tamper == "caps":
            stack.enter_context(mock.patch.object(cones, "_MANY_GATES", 1))
        checker = ReluChecker(instance, reference, report, small)
        checker.check_all(np.random.default_rng([seed, index, 1]))
    report.relative_width = reference.interval.relative_width
    report.seconds = time.perf_counter() - begin
    return report


class ReluChecker:
    """One problem, its reference and what was found."""

    def __init__(
        self, instance: ReluInstance | CNNReluInstance, reference: ReluReference, report: Report, small: bool = False
    ) -> None:
        self.instance, self.reference, self.report, self.small = instance, reference, report, small
        self.seconds = _SECONDS[small]
        self.source = PointSource(instance, reference)
        self.problem = instance.problem(reference.beta)
        assert self.problem.cones is not None
        self.cones = self.problem.cones

    def check_all(self, rng: np.random.Generator) -> None:
        self.check_patterns()
        self.match_patterns()
        seen = self.reference.beta_max
        if seen > 0:
            self.expect("beta_max", "beta_max is large enough", (seen - self.problem.beta_max) / seen)
        results = []
        for name in self.solvers():
            with self.without_errors():
                results.append((name, self.solve(name)))
        for _, result in results:
            self.reference.offer(self.to_network(result.factors, result.intercept))
        for name, result in results:
            with self.without_errors():
                self.check_result(name, result)
        source = self.source
        for points in (self.iterates(), source.feasible(rng), source.infeasible(rng), source.with_duals(rng)):
            with self.without_errors():
                for name, network, options in points:
                    self.check_point(name, network, **options)
        if isinstance(self.instance, ReluInstance):
            with self.without_errors():
                check_bounds(self, rng)
            with self.without_errors():
                check_audit(self, rng)

    @contextmanager
    def without_errors(self) -> Iterator[None]:
        """An error is a violation, and ends a part of the checks only."""
        try:
            yield
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.violated(f"error in {where}", f"no error: {type(error).__name__}: {error}", 1.0)

    def violated(self, point: str, statement: str, excess: float) -> None:
        self.report.violations.append(Violation(self.report.index, point, statement, excess))

    def expect(self, point: str, statement: str, excess: float | np.floating, tolerance: float = TOLERANCE) -> None:
        """Note a violation unless the relative `excess` is within the tolerance."""
        if not excess <= tolerance:
            self.violated(point, statement, float(excess))

    def check_patterns(self) -> None:
        """Enumerated gates are the cells found here; given ones are active where X g >= 0."""
        seen = self.problem.patterns.flatten(0, -2).numpy()
        if self.instance.gates is not None:
            if not np.array_equal(seen, self.reference.patterns.T):
                self.violated("problem", "patterns are X g >= 0", 1.0)
            return
        rows = self.instance.X.any(1)
        if set(pack_columns(seen[rows])) != set(pack_columns(self.reference.patterns.T[rows])):
            self.violated("problem", "enumerated patterns are all cells", 1.0)
        if self.problem.scope != "relu_network":
            self.violated("problem", "scope is relu_network", 1.0)

    def match_patterns(self) -> None:
        """The reference's number of each gate of the problem."""
        if self.instance.gates is not None:
            self.numbers = np.arange(self.problem.n_gates)
            return
        rows = self.instance.X.any(1)
        numbers = {key: k for k, key in enumerate(pack_columns(self.reference.patterns.T[rows]))}
        keys = pack_columns(self.problem.patterns.flatten(0, -2).numpy()[rows])
        self.numbers = np.array([numbers.get(key, -1) for key in keys])

    def solvers(self) -> list[str]:
        """Two solvers in turn, "bm_global" among them where there are several outputs."""
        able = [name for name in _SOLVERS if SOLVERS[name].unsupported(self.problem) is None]
        turn = self.report.index // 3
        chosen = {able[0], able[1 + turn % (len(able) - 1)]}
        if self.problem.n_gates > 150 or self.small:
            chosen.discard("interior_point")
        return sorted(chosen)

    def solve(self, name: str) -> cvxnn.Result:
        return cvxnn.solve(self.problem, solver=name, tol=1e-6, time_limit=self.seconds, random_state=0)

    def to_network(self, factors: tuple[torch.Tensor, torch.Tensor], intercept: torch.Tensor | None) -> Network:
        """Factors as a network of the reference, zero columns left out."""
        columns = Columns.from_factors(*(part.double() for part in factors)).without_zeros()
        u, v = columns.u.numpy(), columns.v.numpy()
        found = self.reference.best_intercept(u, v) if intercept is None else intercept.double().numpy()
        return Network(u, v, self.numbers[columns.gate.numpy()], found)

    def check_result(self, name: str, result: cvxnn.Result) -> None:
        """What `solve` returns: certificate, cones, network and trace, and that "certified" means what it says."""
        point, size = f"solution of {name}", self.reference.interval.size
        network = self.to_network(result.factors, result.intercept)
        self.check_certificate(point, result.certificate, network)
        self.check_point(f"{point}, certified again", network, intercept=True, dual=result.dual)
        if not self.is_feasible(network):
            self.violated(point, "columns are in their cones", self.reference.violation(network.gate, network.u))
        if result.status == "certified":
            suboptimality = (result.objective - self.reference.interval.upper) / size
            self.expect(point, "certified to the tolerance", suboptimality - 1e-6)
        for entry in result.trace:
            below = (entry["lower_bound"] - self.reference.interval.upper) / size
            self.expect(f"trace of {name}", "lower_bound <= p*", below)
        outputs = result.network()(torch.from_numpy(self.instance.data).to(self.problem.dtype)).detach().double()
        expected = self.reference.outputs(network.u, network.v) + network.intercept
        parts = np.abs(expected).max() + np.abs(self.instance.X).max() * np.abs(network.u).sum() * np.abs(
            network.v
        ).max(initial=0)
        off = np.abs(outputs.numpy()[self.reference.used] - expected).max() / (parts or 1.0)
        self.expect(point, "network() is this network", float(off), 1e-9 if self.problem.dtype.itemsize == 8 else 1e-4)

    def is_feasible(self, network: Network) -> bool:
        """Whether the columns are in their cones up to the tolerance promised."""
        return self.reference.violation(network.gate, network.u) <= FEASIBILITY * (1 + 1e-3)

    def check_point(
        self, point: str, network: Network, intercept: bool = False, dual: torch.Tensor | np.ndarray | None = None
    ) -> None:
        """Certify a network: its factors, with its intercept or with the best one."""
        gate = np.array([int(np.flatnonzero(self.numbers == k)[0]) for k in network.gate], dtype=np.int64)
        columns = Columns(torch.from_numpy(gate), *(torch.from_numpy(np.asarray(p)) for p in (network.u, network.v)))
        given = network.intercept if intercept and self.instance.output_bias else None
        factors = columns.factors(self.problem.n_gates)
        found = cvxnn.certify(self.problem, factors=factors, intercept=given, dual=dual)
        self.check_certificate(point, found, network, given is not None or not self.instance.output_bias)

    def check_certificate(self, point: str, found: cvxnn.Certificate, network: Network, exact: bool = True) -> None:
        """Hold one certificate against the interval; `exact` where the intercept is that of the network."""
        interval, report = self.reference.interval, self.report
        violation = self.reference.violation(network.gate, network.u)
        valid = self.problem.scope == "relu_network" or violation <= FEASIBILITY
        below = (found.lower_bound - interval.upper) / interval.size
        report.n_certificates += 1
        report.lower_margin = max(report.lower_margin, below)
        self.expect(point, "lower_bound <= p*", below)
        if valid:
            above = (interval.lower - found.primal) / interval.size
            report.primal_margin = max(report.primal_margin, above)
            self.expect(point, "primal >= p*", above)
        value = self.reference.objective(network)
        scale = max(abs(value), 1e-6 * self.reference.plain_loss)
        self.expect(point, "primal <= objective of the true network", (found.primal - value) / scale)
        if exact:
            self.expect(point, "primal >= objective of the true network", (value - found.primal) / scale)
        self.check_feasibility(point, found, violation, valid)
        self.expect(
            point,
            "dual_norm_ratio_lower <= dual_norm_ratio",
            found.dual_norm_ratio_lower - found.dual_norm_ratio,
        )
        if exact:
            self.check_ratios(point, found, network)
        if found.theorem_bound is not None:
            suboptimality = (found.primal - interval.upper) / interval.size
            self.expect(point, "theorem_bound holds", suboptimality - found.theorem_bound)

    def check_feasibility(self, point: str, found: cvxnn.Certificate, violation: float, valid: bool) -> None:
        """Infeasible points are called so, and have no gap; feasible ones are not."""
        off = abs(found.infeasibility - violation)
        self.expect(point, "infeasibility is the largest violation", off / (1e-3 * violation + 1e-13), 1.0)
        clearly = abs(violation - FEASIBILITY) > 1e-3 * FEASIBILITY
        if clearly and (found.infeasibility > FEASIBILITY) != (violation > FEASIBILITY):
            self.violated(point, "infeasibility > 1e-10 where the point is infeasible, only", violation)
        if clearly and not valid and found.relative_gap != math.inf:
            self.violated(point, "an infeasible point has an infinite gap", violation)
        if clearly and valid and found.lower_bound > 0:
            gap = max(0.0, found.primal - found.lower_bound) / found.lower_bound
            if abs(found.relative_gap - gap) > 1e-12 * (1 + gap):
                self.violated(point, "gap is (primal - lower) / lower", abs(found.relative_gap - gap))

    def check_ratios(self, point: str, found: cvxnn.Certificate, network: Network) -> None:
        """Bounds of the dual norm of the gradient, over all gates and gate by gate."""
        centered = self.instance.output_bias
        nu = self.reference.gradient(network)
        if centered:
            predictions = torch.zeros_like(self.problem.Y64)
            outputs = self.reference.outputs(network.u, network.v) + network.intercept
            predictions[torch.from_numpy(self.reference.used)] = torch.from_numpy(outputs.astype(float))
            nu = self.problem.dual_candidate(predictions).numpy()[self.reference.used].astype(np.longdouble)
        size = float(np.abs(nu).sum() * np.linalg.norm(self.instance.X, axis=1).max()) / self.reference.beta
        slack = 1e-9 * (1 if not centered else 10) * size
        lower, upper, _ = self.reference.dual_norm(nu)
        beta = self.reference.beta
        self.expect(point, "dual_norm_ratio >= q / beta", (lower / beta - found.dual_norm_ratio - slack), TOLERANCE)
        self.expect(point, "dual_norm_ratio_lower <= q / beta", found.dual_norm_ratio_lower - upper / beta - slack)
        rows = self.reference.full(nu)
        for k in range(0, self.problem.n_gates, 1 + self.problem.n_gates // 12):
            number = int(self.numbers[k])
            least = self.reference.cones.bounds(number, self.reference.cones.block(number, rows))[0]
            self.expect(point, "gate_ratios >= q_k / beta", least / beta - found.gate_ratios[k] - slack)

    def iterates(self) -> Points:
        """Iterates of one solver, with its dual points."""
        able = [name for name in _SOLVERS[:-1] if SOLVERS[name].unsupported(self.problem) is None]
        kind = SOLVERS[able[self.report.index // 2 % len(able)]]
        solver = kind(self.problem, make_options(kind, None), 1e-6, self.seconds, None, 0)
        solver.start(None)
        steps, begin = _STEPS[kind.name], time.perf_counter()
        for step in range(1, steps + 1):
            solver.step()
            if step in {1, 2, 4, steps // 2, steps}:
                it = solver.iterate()
                network = self.to_network(it.factors, it.intercept)
                yield f"iterate {step} of {kind.name}", network, {"dual": it.dual, "intercept": True}
            if solver.finished or time.perf_counter() - begin > self.seconds:
                break
