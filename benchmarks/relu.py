"""ReLU networks: `python -m benchmarks.relu {gates,peers,network,all} [--json]`, from the root of the repository.

Data: the spiral of 150 points (class 0 against the rest), the same with a column of ones, and breast cancer
(standardised, first two principal components, a column of ones); targets +-1, squared loss (sum), one output, and
beta = 1e-2 and 1e-3 of beta_max.

gates:   200 gates drawn (Gaussian, those of equal patterns merged); seconds of ssnal to a certified 1e-4 and 1e-6,
         with the problem built anew each time, and of the same program by Clarabel through CVXPY where it is
         installed: by turns, so that what else the machine does meets all of them alike. Medians are shown.
peers:   the same by the augmented Lagrangian method (AL) of scnn (pyscnn), where it is installed. Gaps are relative
         to a lower bound from the residual of Clarabel, and are those of columns projected onto their cones. The true
         network of scnn's columns is shown beside it: it may use other patterns than those given, so its gap can be
         negative, and is no accuracy on this program.
network: all patterns, with the scope `relu_network`: seconds to enumerate and to solve, patterns, and patterns priced.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from benchmarks.machine import describe, matrix_rate
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

import cvxnn
from cvxnn.datasets import spiral
from cvxnn.patterns import activation_patterns, deduplicate_gates, sample_gates

Array = NDArray[np.float64]
Clock = Callable[[], float]
RATIOS = (1e-2, 1e-3)
#: Seconds after which a run is not repeated.
LONG = 20.0
TARGETS = (1e-4, 1e-6)
DATA = ("spiral", "spiral, bias", "breast cancer")
#: First penalty and tolerance of AL: its defaults, and what gets further.
SCNN_SETTINGS = ({"delta": 1000.0, "tol": 1e-6}, {"delta": 1000.0, "tol": 1e-12}, {"delta": 100.0, "tol": 1e-12})


def load_data(name: str) -> tuple[Array, Array]:
    """Samples and targets +-1."""
    if name == "breast cancer":
        X, labels = load_breast_cancer(return_X_y=True)
        X = PCA(n_components=2, random_state=0).fit_transform(StandardScaler().fit_transform(X))
        y = np.where(labels == 1, 1.0, -1.0)
    else:
        X, arms = spiral(150)
        y = np.where(arms == 0, 1.0, -1.0)
    return (X if name == "spiral" else np.column_stack([X, np.ones(len(X))])), y


@dataclass(frozen=True)
class Program:
    """min 1/2 ||sum_k D_k X (u_k - w_k) - y||^2 + beta sum_k (||u_k|| + ||w_k||), u_k and w_k in the cone of gate k.

    Columns are arrays (2, P, d): u first, then w. Seconds are read from the clock.
    """

    X: Array
    y: Array
    gates: Array
    clock: Clock = time.perf_counter

    @cached_property
    def patterns(self) -> NDArray[np.bool_]:
        """(n, P)."""
        return activation_patterns(self.X, self.gates)

    @cached_property
    def walls(self) -> Array:
        """(P, n, d): the rows of (2 D_k - I) X."""
        return np.where(self.patterns.T[:, :, None], self.X, -self.X)

    def dual_norm(self, residual: Array) -> float:
        """max |residual . D_k X u| over unit vectors of all cones; any multiplier gives an upper bound."""
        gradients = np.einsum("n,np,nd->pd", residual, self.patterns, self.X)
        return max(
            float(nnls(K.T, side * g)[1]) for K, g in zip(self.walls, gradients, strict=True) for side in (1, -1)
        )

    @cached_property
    def beta_max(self) -> float:
        """Columns are zero from there on."""
        return self.dual_norm(self.y)

    def penalised(self, columns: Array, output: Array, beta: float) -> float:
        """Squared loss of the outputs, and the penalty."""
        return 0.5 * float(np.sum((output - self.y) ** 2)) + beta * float(np.linalg.norm(columns, axis=2).sum())

    def objective(self, columns: Array, beta: float) -> float:
        """Of columns in their cones."""
        return self.penalised(columns, np.einsum("np,nd,pd->n", self.patterns, self.X, columns[0] - columns[1]), beta)

    def network_objective(self, columns: Array, beta: float) -> float:
        """Of the network with these neurons, in their cones or not."""
        hidden = np.maximum(np.einsum("nd,spd->spn", self.X, columns), 0.0).sum(axis=1)
        return self.penalised(columns, hidden[0] - hidden[1], beta)

    def feasible(self, columns: Array) -> Array:
        """Columns projected onto their cones, by non-negative least squares."""
        fixed = columns.copy()
        for side, gate in np.argwhere(np.linalg.norm(columns, axis=2) > 0):
            K = self.walls[gate]
            fixed[side, gate] += K.T @ nnls(K.T, -columns[side, gate])[0]
        return fixed

    def lower_bound(self, columns: Array, beta: float) -> float:
        """Of the program, from the residual at any columns, scaled to be dual feasible."""
        residual = np.einsum("np,nd,pd->n", self.patterns, self.X, columns[0] - columns[1]) - self.y
        square = float(residual @ residual)
        scale = min(beta / self.dual_norm(residual), -float(residual @ self.y) / square)
        return -scale * float(residual @ self.y) - 0.5 * scale**2 * square


def given_gates(X: Array, n_gates: int = 200) -> Array:
    """Gaussian gates; equal patterns merged and those without an active sample dropped."""
    gates = sample_gates(X, n_gates, random_state=0)
    patterns = activation_patterns(X, gates)
    kept = deduplicate_gates(patterns)
    return gates[:, kept[patterns[:, kept].any(axis=0)]]


def by_clarabel(program: Program, beta: float, tol: float) -> tuple[Array, dict[str, float]]:
    """Columns, the seconds of CVXPY and Clarabel together, and those that Clarabel reports (always wall-clock)."""
    import cvxpy as cp

    begin = program.clock()
    n_gates, _, d = program.walls.shape
    U, W = cp.Variable((n_gates, d)), cp.Variable((n_gates, d))
    features = np.hstack([program.patterns[:, [k]] * program.X for k in range(n_gates)])
    output = features @ cp.vec(U - W, order="C")
    loss = cp.sum_squares(output - program.y) / 2
    penalty = cp.sum(cp.norm(U, 2, axis=1)) + cp.sum(cp.norm(W, 2, axis=1))
    cones = [program.walls[k] @ side[k] >= 0 for side in (U, W) for k in range(n_gates)]
    model = cp.Problem(cp.Minimize(loss + beta * penalty), cones)
    settings = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tol)
    model.solve(solver="CLARABEL", **settings)
    seconds = program.clock() - begin
    return np.stack([np.asarray(U.value), np.asarray(W.value)]), {
        "clarabel": seconds,
        "clarabel alone": float(model.solver_stats.solve_time or 0.0),
    }


class OutOfTimeError(Exception):
    """Ends a run of scnn."""


def by_scnn(program: Program, beta: float, limit: float, delta: float, tol: float) -> Iterator[tuple[float, Array]]:
    """Seconds and columns, at times that grow by 10%, of AL; its loss is divided by n, so lambda = beta / n.

    The method is called below the public function, which takes no time limit and ignores the first penalty of `AL`.
    """
    from scnn.metrics import Metrics
    from scnn.models import ConvexReLU
    from scnn.private import interface
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import AL

    interface.set_device("cpu", "float64", 0)
    model, regularizer, n = ConvexReLU(program.gates, c=1), NeuronGL1(beta / len(program.X)), len(program.X)
    solver = AL(model, max_primal_iters=10**9, max_dual_iters=10**9, tol=tol, constraint_tol=tol)
    train, test, _ = interface.process_data(program.X, program.y, None, None, False, False)
    internal = interface.build_internal_model(model, regularizer, train[0])
    internal.delta = delta / n
    seen: list[tuple[float, Array]] = []
    begin = program.clock()

    def look(model: Any, X: Any, y: Any) -> Any:
        seconds = program.clock() - begin
        if not seen or seconds > min(1.1 * seen[-1][0], limit):
            seen.append((seconds, np.array(model.weights[:, 0])))
        if seconds > limit:
            raise OutOfTimeError
        return model

    try:
        optimizer = interface.build_optimizer(solver, regularizer, Metrics())
        log, metrics = interface.get_logger("scnn", False, False, None), interface.build_metrics_tuple(Metrics())
        _, internal, _ = optimizer(log, internal, lambda model: model, train, test, metrics, callback=look)
        seen.append((program.clock() - begin, np.array(internal.weights[:, 0])))
    except OutOfTimeError:
        pass  # the last look is at the limit
    place = {gate.tobytes(): k for k, gate in enumerate(program.gates.T.copy())}
    order = [place[gate.tobytes()] for gate in np.ascontiguousarray(np.asarray(internal.U).T)]
    for seconds, weights in seen:
        columns = np.zeros((2, program.gates.shape[1], program.X.shape[1]))
        columns[:, order] = weights
        yield seconds, columns


def import_failure(module: str) -> str | None:
    """Why a peer is left out."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} is left out: {error}"
    return None


def by_turns(runs: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, float]:
    """Medians of the seconds of several runs, one after the other, again and again; long ones are repeated less."""
    seen: dict[str, list[float]] = {}
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for name, run in runs.items():
            if spent[name] > LONG:
                continue
            begin = time.perf_counter()
            for key, seconds in run().items():
                seen.setdefault(key, []).append(seconds)
            spent[name] += time.perf_counter() - begin
    return {key: statistics.median(seconds) for key, seconds in seen.items()}


def gate_cells(program: Program, beta: float, repeats: int) -> dict[str, Any]:
    """Seconds of ssnal to the targets and the gaps certified, those of Clarabel, and how many times more they are."""
    gaps: dict[str, float] = {}

    def ours(target: float) -> dict[str, float]:
        begin = program.clock()
        problem = cvxnn.mlp_problem(
            program.X, program.y, activation="relu", gates=program.gates, reduction="sum", beta=beta
        )
        result = cvxnn.solve(problem, solver="ssnal", tol=target)
        gaps[f"gap {target:.0e}"] = result.certificate.relative_gap
        return {f"ssnal {target:.0e}": program.clock() - begin}

    runs: dict[str, Callable[[], dict[str, float]]] = {f"{target:.0e}": partial(ours, target) for target in TARGETS}
    if import_failure("cvxpy") is None:
        runs["clarabel"] = lambda: by_clarabel(program, beta, 1e-9)[1]
    by_turns(runs, 1)  # the first run of each loads what it needs
    cells = by_turns(runs, repeats)
    ratios = {
        f"ratio {target:.0e}": cells["clarabel"] / cells[f"ssnal {target:.0e}"]
        for target in TARGETS
        if "clarabel" in cells
    }
    return cells | gaps | ratios


def peer_cells(program: Program, beta: float, limit: float) -> dict[str, Any]:
    """Clarabel's gap, and scnn at the setting that gets closest: its gap, and the seconds that it takes to targets."""
    if import_failure("cvxpy") is not None:
        return {}
    columns, _ = by_clarabel(program, beta, 1e-9)
    lower = program.lower_bound(columns, beta)

    def gap(columns: Array) -> float:
        return program.objective(program.feasible(columns), beta) / lower - 1

    cells: dict[str, Any] = {"clarabel gap": gap(columns)}
    if import_failure("scnn") is not None:
        return cells
    runs = []
    for setting in SCNN_SETTINGS:
        seen = list(by_scnn(program, beta, limit, **setting))
        runs.append(([(s, gap(C)) for s, C in seen], setting, seen[-1]))
    run, setting, (end, last) = min(runs, key=lambda entry: entry[0][-1][1])
    cells["scnn"] = end
    cells["scnn gap"] = run[-1][1]
    cells["network gap"] = program.network_objective(last, beta) / lower - 1
    cells["scnn setting"] = " ".join(f"{key}={value:g}" for key, value in setting.items())
    for target in TARGETS:
        cells[f"scnn {target:.0e}"] = min((s for run, _, _ in runs for s, g in run if g <= target), default=None)
    return cells


def sampled_rows(ours: bool, peers: bool, repeats: int, limit: float, clock: Clock) -> Iterator[dict[str, Any]]:
    """A row per data set and beta, on the same gates for all."""
    for name in DATA:
        X, y = load_data(name)
        program = Program(X, y, given_gates(X), clock)
        for ratio in RATIOS:
            beta = ratio * program.beta_max
            row = {"data": name, "beta / beta_max": ratio, "gates": program.gates.shape[1]}
            if ours:
                row |= gate_cells(program, beta, repeats)
            if peers:
                row |= peer_cells(program, beta, limit)
            yield row


def network_rows(clock: Clock, tol: float = TARGETS[-1]) -> Iterator[dict[str, Any]]:
    """A row per data set and beta, over all neurons."""
    for name in DATA:
        X, y = load_data(name)
        begin = clock()
        problem = cvxnn.mlp_problem(X, y, activation="relu", gates="enumerate", reduction="sum", beta=1.0)
        enumeration = clock() - begin
        beta_max = problem.beta_max
        for ratio in RATIOS:
            begin = clock()
            result = cvxnn.solve(problem.with_beta(ratio * beta_max), solver="ssnal", tol=tol)
            yield {
                "data": name,
                "beta / beta_max": ratio,
                "patterns": problem.n_gates,
                "enumerate": enumeration,
                "solve": clock() - begin,
                "gap": result.certificate.relative_gap,
                "scope": result.certificate.scope,
                "priced": result.trace[-1].get("priced"),
                "objective": result.objective,
            }


def cell(key: str, value: Any) -> str:
    """Gaps with an exponent, other numbers with three digits."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if "gap" in key else f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"


def show(rows: list[dict[str, Any]], title: str) -> None:
    """An aligned table."""
    table = Table(title=title)
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(cell(key, value) for key, value in row.items()))
    Console(width=200).print(table)


def main() -> None:
    """Measure what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gates", "peers", "network", "all"))
    parser.add_argument("--repeats", type=int, default=5, help="of ssnal and Clarabel; medians are shown")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a run of scnn")
    parser.add_argument(
        "--cpu", action="store_true", help="processor seconds (of one thread), on a machine that is busy"
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    what, notes = arguments.what, Console(stderr=True)
    ours, peers = what in {"gates", "all"}, what in {"peers", "all"}
    for peer, wanted in (("cvxpy", ours or peers), ("scnn", peers)):
        if wanted and (reason := import_failure(peer)):
            notes.print(reason)
    rows: dict[str, list[dict[str, Any]]] = {}
    if ours or peers:
        rows["given gates"] = list(sampled_rows(ours, peers, arguments.repeats, arguments.limit, clock))
    if what in {"network", "all"}:
        rows["all neurons"] = list(network_rows(clock))
    if arguments.json:
        print(json.dumps(rows))
        return
    for title, table in rows.items():
        show(table, f"{title}, {'processor' if arguments.cpu else 'wall-clock'} seconds")
    Console().print(f"{describe()}, {matrix_rate():.0f} GFLOP/s in a float64 matrix product")


if __name__ == "__main__":
    main()
