"""What every architecture provides: a linear map from blocks to predictions, and its adjoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

__all__ = ["Operator", "row_batches"]

#: Bytes that the temporary of one batch may take; of the order of a last-level cache.
BATCH_BYTES = 16 * 2**20


def row_batches(n_rows: int, bytes_per_row: int) -> list[slice]:
    """Split rows into slices whose temporaries stay within `BATCH_BYTES`."""
    size = max(1, min(n_rows, BATCH_BYTES // max(1, bytes_per_row)))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


class Operator(ABC):
    """The linear map A(Z) = sum_k A_k(Z_k) of one architecture on one data set (math section 1).

    Blocks are stored as one tensor Z of shape (P, p, q), predictions as (n, c).
    """

    architecture: str
    activation: str
    n_samples: int
    n_outputs: int
    block_shape: tuple[int, int, int]
    #: Gate vectors in the shape of the public contract, float64, or None where there are none.
    gates: np.ndarray | None
    dtype: torch.dtype
    device: torch.device

    @property
    def n_gates(self) -> int:
        """Number of gates P."""
        return self.block_shape[0]

    @property
    def n_features(self) -> int:
        """Number of rows of the flattened map: P times p."""
        return self.block_shape[0] * self.block_shape[1]

    @property
    @abstractmethod
    def patterns(self) -> torch.Tensor:
        """Activation patterns of the training samples."""

    @abstractmethod
    def double(self) -> Operator:
        """The same map in float64, on exactly the same data; certificates are computed with it."""

    @abstractmethod
    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        """Predictions A(Z), shape (n, c), of blocks Z of shape (P, p, q)."""

    @abstractmethod
    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        """Blocks A*(L), shape (P, p, q), of predictions L of shape (n, c)."""

    @abstractmethod
    def adjoint_rounding(self, L: torch.Tensor) -> float:
        """Bound on the Frobenius norm of the rounding error in each block of `adjoint(L)`."""

    @property
    @abstractmethod
    def prediction_norm(self) -> float:
        """The largest Frobenius norm of a block of A*(e_i) for one sample i and one output, rounded up."""

    @abstractmethod
    def apply_rounding(self, Z: torch.Tensor) -> float:
        """Bound on the Frobenius norm of the rounding error in `apply(Z)`."""

    @abstractmethod
    def apply_factors(self, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Predictions of Z_k = U_k V_k^T from the factors, U (P, p, m) and V (P, q, m)."""

    @abstractmethod
    def apply_atoms(self, gate: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Predictions (r, n, c) of each of r atoms u_j v_j^T in block gate_j; u (r, p), v (r, q)."""

    @abstractmethod
    def kernel(self) -> torch.Tensor:
        """The n x n matrix of A A* for one output (math section 5)."""

    @abstractmethod
    def gram(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The (P p) x (P p) matrix of A* diag(weights) A for one output."""

    @abstractmethod
    def predict(self, Z: torch.Tensor, X: np.ndarray) -> torch.Tensor:
        """Predictions of blocks Z for new data X."""

    @abstractmethod
    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        """The data that define the map, for fingerprints."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able facts that rebuild the map for new data (without the gates)."""
