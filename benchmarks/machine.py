"""What the machine does at best: the rate of a large matrix product."""

from __future__ import annotations

import platform
import statistics
import time

import torch

__all__ = ["describe", "matrix_rate"]


def matrix_rate(dtype: torch.dtype = torch.float64, size: int = 2000, repeats: int = 7) -> float:
    """Median rate of a size x size matrix product, in GFLOP/s."""
    A, B = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    A @ B
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        A @ B
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def describe() -> str:
    """One line on hardware and versions."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
