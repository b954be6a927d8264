"""A gated perceptron on all of Fashion-MNIST, and two networks trained for as long: `python benchmarks/fashion_mlp.py`.

784 pixels in [0, 1], 10 classes one-hot, squared loss, 100 gates drawn, beta = beta_max / 100, no bias: solved to a
certified relative gap in float32, with the certificate in float64. Then scikit-learn's MLPClassifier (default
settings, an epoch at a time) and the small CNN of the layerwise study (Adam), each until its training has taken as
long. A pass is one application of the operator or one adjoint; the fraction of the matrix rate is that of their
operations alone over all of the seconds, next to a large product in the same type.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import cvxnn
from cvxnn.experiments.layerwise_end_to_end import train_small_cnn
from cvxnn.images import ImageData, load_images
from cvxnn.layerwise.memory import PeakMemory
from cvxnn.operators import Operator
from machine import describe, matrix_rate


class CountedPasses:
    """How often an operator is applied, in float32 and in float64, in whole passes over all gates.

    Parameters
    ----------
    operator : Operator
        Its methods are replaced by ones that count.
    """

    def __init__(self, operator: Operator) -> None:
        self.applications, self.adjoints, self.in_double = 0.0, 0.0, 0.0
        self.flops = 2.0 * operator.n_samples * operator.n_features * operator.n_outputs
        self._count(operator, "apply", lambda _: self.add(applications=1.0))
        self._count(operator, "adjoint", lambda _: self.add(adjoints=1.0))
        double, gates = operator.double(), operator.n_gates
        if double is not operator:
            self._count(double, "apply", lambda _: self.add(in_double=1.0))
            self._count(double, "adjoint_blocks", lambda given: self.add(in_double=_length(given[1], gates) / gates))

    def add(self, **numbers: float) -> None:
        """Add to the counts."""
        for name, number in numbers.items():
            setattr(self, name, getattr(self, name) + number)

    def _count(self, operator: Operator, name: str, told: Callable[[tuple[Any, ...]], None]) -> None:
        method = getattr(operator, name)

        def counted(*arguments: Any) -> torch.Tensor:
            told(arguments)
            return method(*arguments)

        setattr(operator, name, counted)


def _length(chosen: slice, n: int) -> int:
    return len(range(*chosen.indices(n)))


def rows_of(data: ImageData) -> np.ndarray:
    """Pixels in [0, 1], a row per image."""
    return data.images.reshape(len(data), -1).astype(np.float32) / 255


def solve(train: ImageData, test: ImageData, arguments: argparse.Namespace) -> dict[str, Any]:
    """The convex problem, to the tolerance; what it took."""
    begin = time.perf_counter()
    peak = PeakMemory(torch.device("cpu"))
    problem = cvxnn.mlp_problem(rows_of(train), train.labels, n_gates=arguments.gates, dtype="float32", random_state=0)
    problem = problem.with_beta(arguments.fraction * problem.beta_max)
    setup = time.perf_counter() - begin
    passes = CountedPasses(problem.operator)
    result = cvxnn.solve(
        problem,
        arguments.solver,
        tol=arguments.tol,
        time_limit=arguments.time_limit,
        solver_options=json.loads(arguments.options),
        verbose=arguments.verbose,
    )
    certificate = result.certificate
    outputs = torch.cat([result.network()(part) for part in torch.from_numpy(rows_of(test)).double().split(1000)])
    blocks = result.Z if result.Z is not None else result.factors[0] @ result.factors[1].mT
    values = torch.linalg.svdvals(blocks.double())
    return {
        "n": len(train),
        "beta": problem.beta,
        "solver": result.solver,
        "status": result.status,
        "iterations": result.n_iter,
        "setup_seconds": setup,
        "solve_seconds": result.seconds,
        "seconds": time.perf_counter() - begin,
        "peak_gib": peak.bytes / 2**30,
        "applications": passes.applications,
        "adjoints": passes.adjoints,
        "passes_in_double": passes.in_double,
        "gflop_per_pass": passes.flops / 1e9,
        "gflops": passes.flops * (passes.applications + passes.adjoints + passes.in_double) / result.seconds / 1e9,
        "objective": certificate.primal,
        "lower_bound": certificate.lower_bound,
        "relative_gap": certificate.relative_gap,
        "dual_norm_ratio": certificate.dual_norm_ratio,
        "scope": certificate.scope,
        "rank": int((values > 1e-5 * values.max()).sum()),
        "test_accuracy": float((outputs.argmax(1).numpy() == test.labels).mean()),
        "trace": result.trace,
    }


def train_mlp(train: ImageData, test: ImageData, limit: float) -> dict[str, Any]:
    """MLPClassifier with default settings, epoch after epoch until the time is over."""
    X, seen = rows_of(train), rows_of(test)
    network = MLPClassifier(random_state=0)
    classes, seconds, epochs = np.unique(train.labels), 0.0, 0
    while seconds < limit:
        begin = time.perf_counter()
        network.partial_fit(X, train.labels, classes=classes)
        seconds, epochs = seconds + time.perf_counter() - begin, epochs + 1
    return {"seconds": seconds, "epochs": epochs, "test_accuracy": float(network.score(seen, test.labels))}


def train_cnn(train: ImageData, test: ImageData, limit: float) -> dict[str, Any]:
    """The small CNN with Adam, epoch after epoch until the time is over."""
    rows = train_small_cnn(
        train.images,
        train.labels,
        test.images,
        test.labels,
        seed=0,
        device="cpu",
        report=lambda row: None,
        epochs=10**6,
        limit=limit,
    )
    return {name: rows[-1][name] for name in ("seconds", "epochs", "test_accuracy")}


def subset(data: ImageData, n: int | None) -> ImageData:
    """Some of the images, in the same order for all n."""
    chosen = np.random.default_rng(0).permutation(len(data))[:n]
    return ImageData(data.images[chosen], data.labels[chosen], data.classes, data.name, data.split, data.note)


def show(found: dict[str, Any]) -> None:
    """The figures for people."""
    row = found["cvxnn"]
    gap = "none" if row["relative_gap"] is None else f"{row['relative_gap']:.2e}"
    print(f"{found['machine']}, {found['rate_float32']:.0f} GFLOP/s float32, {found['rate_float64']:.0f} float64")
    print(f"cvxnn ({row['solver']}, {row['status']}), n = {row['n']}, beta = {row['beta']:.4g}, scope {row['scope']}")
    print(f"  {row['seconds']:.1f} s in all: {row['setup_seconds']:.1f} s problem, {row['solve_seconds']:.1f} s solver")
    print(f"  peak {row['peak_gib']:.2f} GiB, {row['iterations']} iterations, rank {row['rank']}")
    print(f"  {row['applications']:.0f} applications and {row['adjoints']:.0f} adjoints in float32,", end=" ")
    print(f"{row['passes_in_double']:.1f} passes in float64, {row['gflop_per_pass']:.1f} GFLOP each:", end=" ")
    print(f"{row['gflops']:.0f} GFLOP/s, {row['gflops'] / found['rate_float32']:.0%} of the float32 rate")
    print(f"  objective {row['objective']:.6f}, bound {row['lower_bound']:.6f}, gap {gap}")
    for name in ("cvxnn", "MLPClassifier", "small CNN"):
        if name in found:
            epochs = f", {found[name]['epochs']} epochs" if "epochs" in found[name] else ""
            print(f"test accuracy {found[name]['test_accuracy']:.2%}  {name}, {found[name]['seconds']:.1f} s{epochs}")


def main() -> None:
    """Solve, train the others for as long, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, help="training images; all where not given")
    parser.add_argument("--gates", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=1e-2, help="beta over beta_max")
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--options", default='{"side": "iterative"}', help="options of the solver as JSON")
    parser.add_argument("--time-limit", type=float, default=1800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-seconds", type=float, help="time for each of the others; that of the solver by default")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--verbose", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train = subset(load_images("fashion_mnist", "train", arguments.data_dir), arguments.n)
    test = load_images("fashion_mnist", "test", arguments.data_dir)
    found: dict[str, Any] = {"machine": describe(), "threads": arguments.threads}
    found |= {"rate_float32": matrix_rate(torch.float32), "rate_float64": matrix_rate()}
    found["cvxnn"] = solve(train, test, arguments)
    if not math.isfinite(found["cvxnn"]["relative_gap"]):
        found["cvxnn"]["relative_gap"] = None
    if not arguments.without_peers:
        limit = arguments.peer_seconds or found["cvxnn"]["seconds"]
        with threadpool_limits(arguments.threads):
            found["MLPClassifier"] = train_mlp(train, test, limit)
        found["small CNN"] = train_cnn(train, test, limit)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
