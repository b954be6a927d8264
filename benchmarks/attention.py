"""Self-attention: `python -m benchmarks.attention {digits,denoise,patches,scale} [--repeats R] [--out MD]`.

digits:  8 tokens of 8 pixels, pooled linear block, n = 1437, squared loss on one-hot labels, beta = 1e-2, 1e-3 and
         1e-4 of beta_max: admm, bm_global and fista to a certified 1e-4, beside torch's Adam on the original network
         at the objective that Adam reaches, and MultiheadAttention of equal size; accuracy on the other 360.
denoise: the same digits with noise of 0.3, a token per row with a one and its place, outputs per token; linear and
         gated, beside MultiheadAttention of equal size on the same time and ten times that (a minute more at most), and
         beside doing nothing.
patches: digits as 4 tokens of 4 x 4 or 16 of 2 x 2 pixels, with a one and their place; gated, pooled; beside the same.
scale:   one gradient in factors (20 columns) and one certificate, pooled linear, c = 10, n = 2,000: time and peak
         memory against d and s, each in a process of its own.

One thread; repeats are interleaved, and times are medians. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.attention_peers import n_weights, train_block, train_multihead
from benchmarks.machine import describe, matrix_rate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import cvxnn
from cvxnn.columns import Columns
from cvxnn.experiments.pages import markdown_table
from cvxnn.factored import FactoredLoss
from cvxnn.plotting import panels, write_figure

TOL = 1e-4
#: Learning rates that Adam is given; the best counts.
RATES = (1e-3, 1e-2, 1e-1)
NOISE = 0.3
SCALES = ((32, 64), (64, 64), (128, 64), (128, 32), (128, 16))
Row = dict[str, Any]


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images (n, 8, 8) in [0, 1], and their labels; 1,437 and 360."""
    data = load_digits()
    return train_test_split(data.images / 16, data.target, test_size=360, stratify=data.target, random_state=0)


def one_hot(labels: np.ndarray) -> np.ndarray:
    """A column per class."""
    return np.eye(10)[labels]


def with_place(tokens: np.ndarray, *places: np.ndarray) -> np.ndarray:
    """Tokens (n, s, d) with a one and coordinates (s,) appended."""
    n, s, _ = tokens.shape
    extra = np.stack([np.ones(s), *places], axis=1)
    return np.concatenate([tokens, np.broadcast_to(extra, (n, s, extra.shape[1]))], axis=2)


def accuracy(outputs: torch.Tensor, labels: np.ndarray) -> float:
    """Share of the largest outputs that are at the label."""
    return float((outputs.argmax(1).numpy() == labels).mean())


def predictions(problem: cvxnn.Problem, result: cvxnn.Result, tokens: np.ndarray) -> torch.Tensor:
    """Outputs for new tokens, from Z or from the factors."""
    Z = result.Z
    if Z is None:
        assert result.factors is not None
        U, V = result.factors
        Z = U @ V.mT
    outputs = problem.operator.predict(Z, tokens)
    return outputs if result.intercept is None else outputs + result.intercept


def warm_up() -> None:
    """Import and run everything once: the first optimiser of torch in a process alone takes two seconds."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((10, 3, 2)), rng.standard_normal((10, 2))
    problem = cvxnn.attention_problem(X, Y, activation="linear", beta=1e-2)
    for solver in ("admm", "bm_global", "fista"):
        cvxnn.solve(problem, solver, tol=1e-2, random_state=0, max_iter=50)
    for _ in train_block(X, Y, 2, 1e-2, 1e-2, 0.05):
        pass
    for _ in train_multihead(X, Y, size=100, seconds=(0.05,)):
        pass


def fresh_problem(X: np.ndarray, Y: np.ndarray, fraction: float, **options: Any) -> Callable[[], cvxnn.Problem]:
    """Makes a problem at a fraction of beta_max, anew for every run: operators remember what was computed of them."""
    beta = fraction * cvxnn.attention_problem(X, Y, beta=1.0, **options).beta_max
    return lambda: cvxnn.attention_problem(X, Y, beta=beta, **options)


def peer_times(seconds: float) -> tuple[float, float]:
    """When a peer is looked at: after the time of ours, and after ten times that (a minute more at most)."""
    return seconds, min(10 * seconds, seconds + 60.0)


def n_heads(result: cvxnn.Result) -> int:
    """The rank of a solution: how many heads it is, all gates together."""
    if result.factors is not None:
        return int((result.factors[0].abs().amax(1) > 0).sum())
    sizes = torch.linalg.svdvals(result.Z)
    return int((sizes > 1e-6 * sizes.max()).sum())


def seconds_to(trace: list[tuple[float, float]], objective: float) -> float | None:
    """When a run was first at an objective."""
    return next((seconds for seconds, value in trace if value <= objective), None)


def median(values: list[float | None]) -> str:
    """The median in three digits; "not reached" where half of the runs did not."""
    found = statistics.median(float("inf") if value is None else value for value in values)
    return "not reached" if found == float("inf") else f"{found:.3g}"


def digits_rows(repeats: int, limit: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Solvers and Adam on the same problem."""
    X, X_test, y, y_test = digits()
    unit = cvxnn.attention_problem(X, y, activation="linear", beta=1.0)
    header = ("beta / beta_max", "method", "seconds", "objective", "proven gap", "seconds to Adam's best", "heads",
              "test accuracy")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for fraction in (1e-2, 1e-3, 1e-4):
        problem = unit.with_beta(fraction * unit.beta_max)
        found: dict[str, list[Any]] = {"admm": [], "bm_global": [], "fista": []}
        traces: dict[str, list[list[tuple[float, float]]]] = {}
        for repeat in range(repeats):
            for solver, results in found.items():
                if solver == "fista" and repeat:
                    continue
                # Operators remember what solvers computed of them; every run starts from a new one.
                fresh = cvxnn.attention_problem(X, y, activation="linear", beta=problem.beta)
                results.append(cvxnn.solve(fresh, solver, tol=TOL, time_limit=limit, random_state=repeat))
        heads = n_heads(found["bm_global"][0])
        budget = max(10.0, 5 * max(result.seconds for result in found["admm"]))
        adam = [list(train_block(X, one_hot(y), heads, problem.beta, rate, budget)) for rate in RATES]
        best = min(adam, key=lambda trace: min(value for _, value, _ in trace))
        _, target, weights = min(best, key=lambda look: look[1])
        for solver, results in found.items():
            traces[solver] = [[(entry["seconds"], entry["primal"]) for entry in result.trace] for result in results]
            result = results[0]
            rows.append(
                (
                    f"{fraction:g}",
                    f"`{solver}`",
                    median([result.seconds for result in results]),
                    f"{result.objective:.7g}",
                    f"{result.certificate.relative_gap:.1e}",
                    median([seconds_to(trace, target) for trace in traces[solver]]),
                    str(n_heads(result)),
                    f"{accuracy(predictions(problem, result, X_test), y_test):.1%}",
                )
            )
        reached = next(seconds for seconds, value, _ in best if value <= target)
        lower = max(results[0].certificate.lower_bound for results in found.values())
        gap = f"{target / lower - 1:.1e} (against our bound)"
        score = accuracy(problem.operator.predict(weights, X_test), y_test)
        rate = RATES[next(k for k, trace in enumerate(adam) if trace is best)]
        rows.append((f"{fraction:g}", f"torch Adam, lr {rate:g}, {heads} heads", f"{budget:.3g}", f"{target:.7g}", gap,
                     f"{reached:.3g}", str(heads), f"{score:.1%}"))  # fmt: skip
        size = heads * (64 + 80)
        base = statistics.median(result.seconds for result in found["admm"])
        for seconds, network in train_multihead(X, one_hot(y), size=size, seconds=(*peer_times(base), 30.0)):
            with torch.no_grad():
                score = accuracy(network(torch.from_numpy(X_test).float()), y_test)
            name = f"MultiheadAttention, {n_weights(network)} weights (ours {size})"
            rows.append((f"{fraction:g}", name, f"{seconds:.3g}", "another", "none", "", "4", f"{score:.1%}"))
    return header, rows


def denoise_rows(repeats: int, limit: float, picture: Path | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Noisy rows of pixels to clean ones."""
    clean, clean_test, _, _ = digits()
    rng = np.random.default_rng(0)
    noisy, noisy_test = (part + NOISE * rng.standard_normal(part.shape) for part in (clean, clean_test))
    place = np.linspace(-1, 1, 8)
    X, X_test = with_place(noisy, place), with_place(noisy_test, place)

    def error(outputs: np.ndarray) -> str:
        return f"{np.square(outputs.reshape(clean_test.shape) - clean_test).mean():.5f}"

    header = ("method", "beta / beta_max", "seconds", "proven gap", "heads", "weights", "test MSE")
    rows: list[tuple[str, ...]] = [
        ("nothing (the noisy digit)", "", "", "", "", "", error(noisy_test)),
        ("the mean training digit", "", "", "", "", "", error(np.broadcast_to(clean.mean(0), clean_test.shape))),
    ]
    shown = {"clean": clean_test, "noisy": noisy_test}
    for activation, fractions in (("linear", (1e-2, 1e-3)), ("gated_relu", (1e-2, 1e-3))):
        for fraction in fractions:
            make = fresh_problem(
                X, clean, fraction, activation=activation, output="tokens", n_gates=4, output_bias=True
            )
            results = [cvxnn.solve(make(), tol=1e-3, time_limit=limit) for _ in range(repeats)]
            result, problem = results[0], make()
            outputs = predictions(problem, result, X_test).numpy()
            base = statistics.median(entry.seconds for entry in results)
            size = n_heads(result) * (X.shape[2] ** 2 + X.shape[2] * 8)
            rows.append((f"cvxnn, {activation}, `{result.solver}`", f"{fraction:g}", f"{base:.3g}",
                         f"{result.certificate.relative_gap:.1e}", str(n_heads(result)), str(size),
                         error(outputs)))  # fmt: skip
            shown[activation] = outputs.reshape(clean_test.shape)
            for seconds, network in train_multihead(X, clean, size=size, seconds=peer_times(base)):
                with torch.no_grad():
                    found = network(torch.from_numpy(X_test).float()).numpy()
                rows.append(("MultiheadAttention of equal size", "", f"{seconds:.3g}", "none", "4",
                             str(n_weights(network)), error(found)))  # fmt: skip
                shown["MultiheadAttention"] = found
    if picture is not None:
        draw_digits(shown, picture)
    return header, rows


def draw_digits(shown: dict[str, np.ndarray], path: Path) -> None:
    """Some test digits, a row per method."""
    names = [name for name in ("noisy", "linear", "gated_relu", "MultiheadAttention", "clean") if name in shown]
    figure, grid = panels(len(names), 10, 0.75, 0.8)
    for axes_row, name in zip(grid, names, strict=True):
        for k, axes in enumerate(axes_row):
            axes.imshow(shown[name][k], cmap="gray_r", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        axes_row[0].set_ylabel(name.replace("_", " ").replace("Attention", "\nAttention"), fontsize=6)
    write_figure(figure, path)


def patch_tokens(images: np.ndarray, side: int) -> np.ndarray:
    """Images (n, 8, 8) as patches side x side, with a one and the place of each."""
    n, k = len(images), 8 // side
    patches = images.reshape(n, k, side, k, side).transpose(0, 1, 3, 2, 4).reshape(n, k * k, side * side)
    down, across = np.divmod(np.arange(k * k), k)
    return with_place(patches, 2 * down / (k - 1) - 1, 2 * across / (k - 1) - 1)


def patches_rows(repeats: int, limit: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Classification of patches."""
    images, images_test, y, y_test = digits()
    header = ("patches", "method", "beta / beta_max", "seconds", "proven gap", "heads", "weights", "test accuracy")
    rows: list[tuple[str, ...]] = []
    for side in (4, 2):
        X, X_test = patch_tokens(images, side), patch_tokens(images_test, side)
        d = X.shape[2]
        for fraction in (1e-2, 1e-3):
            make = fresh_problem(X, y, fraction, n_gates=10, output_bias=True)
            results = [cvxnn.solve(make(), tol=1e-3, time_limit=limit) for _ in range(repeats)]
            result, problem = results[0], make()
            base = statistics.median(entry.seconds for entry in results)
            size = n_heads(result) * (d * d + d * 10)
            score = accuracy(predictions(problem, result, X_test), y_test)
            kind = f"{(8 // side) ** 2} of {side} x {side}"
            rows.append((kind, f"cvxnn, gated, `{result.solver}`", f"{fraction:g}", f"{base:.3g}",
                         f"{result.certificate.relative_gap:.1e}", str(n_heads(result)), str(size),
                         f"{score:.1%}"))  # fmt: skip
            for seconds, network in train_multihead(X, one_hot(y), size=size, seconds=peer_times(base)):
                with torch.no_grad():
                    score = accuracy(network(torch.from_numpy(X_test).float()), y_test)
                rows.append((kind, "MultiheadAttention of equal size", "", f"{seconds:.3g}", "none", "4",
                             str(n_weights(network)), f"{score:.1%}"))  # fmt: skip
    return header, rows


def measure(d: int, s: int, what: str) -> Row:
    """One gradient or certificate of 20 columns, in this process."""
    rng = np.random.default_rng(0)
    n, c, m = 2000, 10, 20
    tokens = rng.standard_normal((n, s, d)) / np.sqrt(d)
    problem = cvxnn.attention_problem(tokens, rng.standard_normal((n, c)), activation="linear", beta=1e-2)
    U, V = (torch.from_numpy(0.1 * rng.standard_normal((1, size, m))) for size in (d * d, d * c))
    columns = Columns.from_factors(U, V)

    def work() -> None:
        if what == "certificate":
            cvxnn.certify(problem, factors=(U, V))
        else:
            FactoredLoss(problem).slopes(columns, torch.zeros(c, dtype=torch.float64))

    before = reset_peak()
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    peak = peak_memory()
    if what == "gradient":  # the first call also forms what later ones find
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "mebibytes": (peak - before) / 1024}


def reset_peak() -> int:
    """Let the peak memory of this process start from now; KiB in use (where Linux cannot do that, the peak so far)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def peak_memory() -> int:
    """Peak memory of this process, in KiB."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def scale_rows(repeats: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Growth with d and s."""
    header = ("d, s", "block", "block, MiB", "tokens, MiB", "gradient s", "more MiB", "certificate s", "more MiB")
    rows = []
    for d, s in SCALES:
        cells: list[str] = []
        for what in ("gradient", "certificate"):
            command = [sys.executable, "-m", "benchmarks.attention", "scale", "--one", str(d), str(s), what]
            found = [
                json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for _ in range(repeats)
            ]
            cells.append(f"{statistics.median(entry['seconds'] for entry in found):.2g}")
            cells.append(f"{max(entry['mebibytes'] for entry in found):.0f}")
        block, memory = f"{d * d:,} x {d * 10:,}", 8 * d**3 * 10 / 2**20
        rows.append((f"{d}, {s}", block, f"{memory:.0f}", f"{8 * 2000 * s * d / 2**20:.0f}", *cells))
    return header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["digits", "denoise", "patches", "scale"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per solver and problem")
    parser.add_argument("--picture", type=Path, help="PNG of denoised digits to write")
    parser.add_argument("--out", type=Path, help="file for the table, beside standard output")
    parser.add_argument("--one", nargs=3, metavar=("D", "S", "WHAT"), help="measure one point of scale, print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(int(options.one[0]), int(options.one[1]), options.one[2])))
        return
    tables: dict[str, Callable[[], tuple[tuple[str, ...], list[tuple[str, ...]]]]] = {
        "digits": lambda: digits_rows(options.repeats, options.limit),
        "denoise": lambda: denoise_rows(options.repeats, options.limit, options.picture),
        "patches": lambda: patches_rows(options.repeats, options.limit),
        "scale": lambda: scale_rows(options.repeats),
    }
    warm_up()
    header, rows = tables[options.table]()
    text = f"{describe()}; {matrix_rate():.0f} GFLOP/s float64\n\n{markdown_table(header, rows)}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
