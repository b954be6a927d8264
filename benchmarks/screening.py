"""Many gates: `working_set` beside ADMM on all of them, and paths: `python benchmarks/screening.py CASE [--repeats 3]`

Seconds of processor time on one thread (medians), solvers alternately, problems built before. CASE: "digits"
(n = 1,437, labels +-1, squared loss, sum; P = 100, 1,000 and 10,000 drawn gates), "classes" (the same, ten one-hot
outputs, P = 100 and 1,000), "cross_entropy" (P = 1,000), "cancer" (standardised, P = 1,000), "spiral" (90 samples,
P = 1,000), and "paths" (20 values of beta down to beta_max / 1,000, tolerance 1e-4, one and ten outputs). "all" is all
of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits

import cvxnn
from cvxnn.datasets import spiral
from cvxnn.problem import Problem
from cvxnn.solvers.api import choose_solver

Case = tuple[str, Problem, str, Sequence[float], Sequence[float]]
BETAS, TOLERANCES = (0.1, 0.01, 0.001), (1e-4, 1e-6)
#: From so many gates on ADMM on all of them takes minutes.
_MOST_GATES = 5_000


def digits(n_outputs: int, n_gates: int, **options: str) -> Problem:
    """The first 1,437 digits, pixels in [0, 1]; classes, or +-1 for digit >= 5."""
    X, y = load_digits(return_X_y=True)
    X, y = X[:1437] / 16, y[:1437]
    targets = y if n_outputs == 10 else np.where(y >= 5, 1.0, -1.0)
    return cvxnn.mlp_problem(X, targets, n_gates=n_gates, reduction="sum", random_state=0, **options)


def cancer() -> Problem:
    """Breast cancer, standardised, labels +-1."""
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return cvxnn.mlp_problem(X, np.where(y > 0, 1.0, -1.0), n_gates=1000, reduction="sum", random_state=0)


def spirals() -> Problem:
    """90 samples of the spiral with a hidden bias; many of the gates have equal patterns."""
    X, y = spiral(90)
    return cvxnn.mlp_problem(X, y, n_gates=1000, hidden_bias=True, reduction="sum", random_state=0)


def cases(wanted: str) -> Iterator[Case]:
    """Name, problem, solver on all gates, betas relative to beta_max, tolerances."""
    if wanted in ("digits", "all"):
        for n_gates in (100, 1_000, 10_000):
            yield "digits", digits(1, n_gates), "vector_admm", BETAS, TOLERANCES
    if wanted in ("classes", "all"):
        for n_gates in (100, 1_000):
            yield "classes", digits(10, n_gates), "admm", BETAS, TOLERANCES
    if wanted in ("cross_entropy", "all"):
        yield "cross entropy", digits(10, 1_000, loss="cross_entropy"), "admm", BETAS[:2], TOLERANCES[:1]
    if wanted in ("cancer", "all"):
        yield "cancer", cancer(), "vector_admm", BETAS, TOLERANCES
    if wanted in ("spiral", "all"):
        yield "spiral", spirals(), "admm", BETAS, TOLERANCES


def timed(task: Callable[[], object]) -> tuple[float, object]:
    """Seconds of processor time, and the value."""
    begin = time.process_time()
    value = task()
    return time.process_time() - begin, value


def compare(case: Case, repeats: int) -> None:
    """A line of a table per beta and tolerance."""
    name, problem, other, betas, tolerances = case
    solvers = ["working_set"] if problem.n_gates > _MOST_GATES else [other, "working_set"]
    for relative in betas:
        for tol in tolerances:
            scaled = problem.with_beta(relative * problem.beta_max)
            seconds: dict[str, list[float]] = {solver: [] for solver in solvers}
            for _ in range(repeats):
                for solver in solvers:
                    taken, result = timed(
                        lambda scaled=scaled, solver=solver, tol=tol: cvxnn.solve(scaled, solver, tol=tol)
                    )
                    assert isinstance(result, cvxnn.Result) and result.status == "certified"
                    seconds[solver].append(taken)
            last = result.trace[-1]
            used = int((result.Z != 0).any(2).any(1).sum())
            shown = [f"{solver} {statistics.median(taken):.3f}" for solver, taken in seconds.items()]
            print(
                f"{name}, P = {problem.n_gates}, beta = {relative:g} beta_max, tol = {tol:g}: {', '.join(shown)};",
                f"{used} in use, {last['gates']} in the set, {last['screened']} screened;",
                f"auto: {choose_solver(scaled)}",
                flush=True,
            )


def paths(repeats: int) -> None:
    """Twenty values of beta: in one path, and each started from the last by hand, as without what a path keeps."""
    for n_outputs, n_gates in ((1, 100), (1, 1_000), (10, 100)):
        problem = digits(n_outputs, n_gates)
        betas = np.geomspace(problem.beta_max, 1e-3 * problem.beta_max, 20)

        def by_hand(problem: Problem = problem, betas: np.ndarray = betas) -> None:
            start = None
            for beta in betas:
                start = cvxnn.solve(problem.with_beta(float(beta)), init=start)

        rows = [(timed(lambda p=problem, b=betas: cvxnn.path(p, b))[0], timed(by_hand)[0]) for _ in range(repeats)]
        kept, alone = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"path, c = {n_outputs}, P = {problem.n_gates}: {kept:.2f}; one by one: {alone:.2f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["digits", "classes", "cross_entropy", "cancer", "spiral", "paths", "all"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in cases(arguments.case):
        compare(case, arguments.repeats)
    if arguments.case in ("paths", "all"):
        paths(arguments.repeats)


if __name__ == "__main__":
    main()
