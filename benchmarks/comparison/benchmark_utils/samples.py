"""What all data sets need: targets from classes, and a part held out."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["one_hot", "signs", "with_test"]


def one_hot(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets (n, c) of classes 0, ..., c - 1, and the classes."""
    return np.eye(int(labels.max()) + 1)[labels], labels


def signs(positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets (n, 1) of +-1, and the same as labels."""
    labels = np.where(positive, 1, -1)
    return labels[:, None].astype(np.float64), labels


def with_test(X: np.ndarray, targets: tuple[np.ndarray, np.ndarray], n_train: int) -> dict[str, Any]:
    """What an objective takes: the first samples to train with, the others to test with."""
    Y, labels = targets
    data = {"X": np.ascontiguousarray(X[:n_train], dtype=np.float64), "Y": Y[:n_train], "labels": labels[:n_train]}
    if n_train < len(X):
        data |= {"test_X": np.ascontiguousarray(X[n_train:], dtype=np.float64), "test_labels": labels[n_train:]}
    return data
