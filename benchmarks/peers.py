"""Measures the table of peers in the README: OMP_NUM_THREADS=1 python benchmarks/peers.py [--repeats 3]

Spiral: one convex problem (150 samples, 100 gates drawn, hidden bias, beta = 1e-3 for the mean squared loss), and
the seconds until the relative gap to its optimum is at most 1e-4. Digits: 1,347 training and 450 test samples,
default settings, seconds of training and test accuracy. Scalar: 1,437 digits with labels +-1 (digit >= 5), 100 gates
drawn, squared loss (sum), beta = 1, one convex program for cvxnn and for R-FISTA of scnn, the same gates, float64
(where pyscnn is installed); the gap of scnn is to the optimum that cvxnn has certified. Medians over the
repeats.
"""

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import cvxnn
from cvxnn.datasets import spiral

TOL = 1e-4


def timed(task: Callable[[], object], repeats: int) -> tuple[float, object]:
    """Median of the seconds, and the last value."""
    seconds, value = [], None
    for _ in range(repeats):
        begin = time.perf_counter()
        value = task()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), value


def train_by_adam(problem: cvxnn.Problem, optimum: float, limit: float = 30.0) -> tuple[float, float]:
    """Seconds and relative gap of Adam on factors of rank 2 per gate, with gradients from torch."""
    torch.manual_seed(0)
    n_gates, p, q = problem.operator.block_shape
    U = (0.1 * torch.randn(n_gates, p, 2, dtype=torch.float64)).requires_grad_()
    V = (0.1 * torch.randn(n_gates, q, 2, dtype=torch.float64)).requires_grad_()
    adam = torch.optim.Adam([U, V], lr=1e-2)
    begin = time.perf_counter()
    best = float("inf")
    while True:
        adam.zero_grad()
        residual = problem.operator.apply_factors(U, V) - problem.Y
        penalty = (U.square().sum() + V.square().sum()) / 2
        objective = residual.square().sum() / (2 * problem.n_samples) + problem.beta * penalty
        objective.backward()
        best = min(best, float(objective.detach()))
        seconds, gap = time.perf_counter() - begin, best / optimum - 1
        if gap <= TOL or seconds > limit:
            return seconds, gap
        adam.step()


def spiral_rows(repeats: int) -> None:
    """Seconds on one convex problem."""
    X, y = spiral(150)
    problem = cvxnn.mlp_problem(X, y, n_gates=100, beta=1e-3, hidden_bias=True, random_state=0)
    optimum = cvxnn.solve(problem, "interior_point", tol=1e-8).certificate.lower_bound
    for solver in ("admm", "interior_point"):
        seconds, result = timed(partial(cvxnn.solve, problem, solver, tol=TOL), repeats)
        print(f"spiral  {solver:16s} {seconds:8.3f} s  {result}")
    seconds, gap = train_by_adam(problem, optimum)
    print(f"spiral  {'adam':16s} {seconds:8.3f} s  relative gap {gap:.1e}, known from interior point")


def digits_rows(repeats: int) -> None:
    """Seconds and accuracy with the default settings."""
    X, y = load_digits(return_X_y=True)
    split = train_test_split(X / 16, y, test_size=0.25, stratify=y, random_state=0)
    train_X, test_X, train_y, test_y = split
    models = {
        "cvxnn": cvxnn.ConvexMLPClassifier(random_state=0),
        "MLPClassifier": MLPClassifier(random_state=0),
    }
    for name, model in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds, _ = timed(partial(model.fit, train_X, train_y), repeats)
        accuracy = float(np.mean(model.predict(test_X) == test_y))
        proven = getattr(model, "certificate_", None)
        gap = "no certificate" if proven is None else f"relative gap {proven.relative_gap:.1e}"
        print(f"digits  {name:16s} {seconds:8.3f} s  test accuracy {accuracy:.1%}, {gap}")


def scalar_rows(repeats: int) -> None:
    """Seconds and gaps on a convex program with one output."""
    X, y = load_digits(return_X_y=True)
    X, y = X[:1437] / 16, np.where(y[:1437] >= 5, 1.0, -1.0)
    problem = cvxnn.mlp_problem(X, y, n_gates=100, beta=1.0, reduction="sum", random_state=0)
    optimum = cvxnn.solve(problem, tol=1e-9).certificate.lower_bound
    for tol in (1e-4, 1e-6):
        seconds, result = timed(partial(cvxnn.solve, problem, "admm", tol=tol), repeats)
        print(f"scalar  {'admm':16s} {seconds:8.3f} s  {result}")
    if importlib.util.find_spec("scnn") is None:
        print("scalar  scnn             not installed")
        return
    for iterations in (100, 1000, 5000):
        begin = time.perf_counter()
        weights = train_by_scnn(X, y, problem, iterations)
        seconds = time.perf_counter() - begin
        gap = problem.objective(weights) / optimum - 1
        print(f"scalar  {'scnn R-FISTA':16s} {seconds:8.3f} s  {iterations} iterations, relative gap {gap:.1e}")


def train_by_scnn(X: np.ndarray, y: np.ndarray, problem: cvxnn.Problem, iterations: int) -> torch.Tensor:
    """Blocks (P, d, 1) after so many iterations of R-FISTA; its loss is divided by n, so lambda = beta / n."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    assert problem.gates is not None
    model = ConvexGatedReLU(problem.gates.numpy(), c=1)
    trained, _ = optimize_model(
        model,
        RFISTA(model, max_iters=iterations, tol=0.0),
        Metrics(),
        X,
        y,
        regularizer=NeuronGL1(problem.beta / len(X)),
        return_convex=True,
        unitize_data=False,
        dtype="float64",
    )
    # The trained model lists its gates in an order of its own, without those of weight zero.
    gates, weights = np.asarray(trained.G), np.asarray(trained.parameters[0]).reshape(-1, X.shape[1])
    place = {column.tobytes(): k for k, column in enumerate(problem.gates.numpy().T.copy())}
    blocks = torch.zeros(problem.operator.block_shape, dtype=torch.float64)
    for column, weight in zip(gates.T.copy(), weights, strict=True):
        blocks[place[column.tobytes()], :, 0] = torch.from_numpy(weight)
    return blocks


def main() -> None:
    """Print a line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    spiral_rows(repeats)
    digits_rows(repeats)
    scalar_rows(repeats)


if __name__ == "__main__":
    main()
