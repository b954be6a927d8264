"""What every architecture provides: a linear map from blocks to predictions, and its adjoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.operators.passes import batches_of
from cvxnn.operators.sharing import Sharing
from cvxnn.operators.symmetric import add_product

__all__ = ["Operator", "row_batches"]

#: Bytes that the temporary of one batch may take; of the order of a last-level cache.
BATCH_BYTES = 16 * 2**20
#: Bytes of blocks that are formed at once where they need not be there together; one block may take more.
BLOCK_BYTES = 2 * 2**20


def row_batches(n_rows: int, bytes_per_row: int, limit: int | None = None) -> list[slice]:
    """Split rows into slices whose temporaries stay within a limit in bytes, by default `BATCH_BYTES`."""
    limit = BATCH_BYTES if limit is None else limit
    size = max(1, min(n_rows, limit // max(1, bytes_per_row)))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


class Operator(Sharing, ABC):
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
    #: Hidden outputs w of a column: 1 for the MLP, the pooling cells of a CNN.
    width: int = 1
    #: Whether a pass over the samples takes long, as features are formed again each time.
    passes_are_dear: bool = False
    #: Whether hidden outputs and features of any samples can be had here.
    has_rows: bool = True
    #: Whether :meth:`kernel_columns` is there, at a cost far below that of the kernel.
    has_kernel_columns: bool = False
    dtype: torch.dtype
    device: torch.device

    @property
    def n_gates(self) -> int:
        """Number of gates P."""
        return self.block_shape[0]

    @property
    def total_gates(self) -> int:
        """Number of gates of all processes."""
        return self.n_gates

    @property
    def plain(self) -> Operator:
        """The map of the samples and gates of this process by themselves."""
        return self

    @property
    def gate_vectors(self) -> np.ndarray | None:
        """The gates as vectors like the columns u, (p, P) float64; None where there are none."""
        return self.gates

    @property
    def n_features(self) -> int:
        """Number of features of one output: P p w."""
        return self.block_shape[0] * self.block_shape[1] * self.width

    def flatten(self, Z: torch.Tensor) -> torch.Tensor:
        """Blocks (P, p, q) as the weights (P p w, c) of the features of :meth:`gram`."""
        return Z.reshape(self.n_features, -1)

    def unflatten(self, weights: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`flatten`, which is also its adjoint."""
        return weights.view(self.block_shape)

    @property
    def local(self) -> Operator:
        """The map of the samples that are in this process, as a rule all."""
        return self

    def part(self, rows: slice) -> Operator:
        """The same map for a range of the samples."""
        return self.subset(torch.arange(self.n_samples, device=self.device)[rows])

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

    def gate_batches(self) -> list[slice]:
        """Slices of gates whose blocks take at most `BLOCK_BYTES`, or one gate each where a block takes more."""
        n_gates, p, q = self.block_shape
        size = max(1, min(n_gates, BLOCK_BYTES // (8 * p * q)))
        return [slice(start, min(start + size, n_gates)) for start in range(0, n_gates, size)]

    @abstractmethod
    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        """The blocks of `adjoint(L)` that belong to a slice of the gates."""

    @property
    def streams_blocks(self) -> bool:
        """Whether blocks are so large that dual norms are to be computed from :meth:`adjoint_parts`."""
        return False

    def adjoint_parts(self, L: torch.Tensor, gate: int) -> Iterator[torch.Tensor]:
        """The block of `adjoint(L)` of one gate as parts of its rows, (rows, q), one in memory at a time."""
        yield self.adjoint_blocks(L, slice(gate, gate + 1))[0]

    def adjoint_size(self, L: torch.Tensor) -> float:
        """An upper bound of the Frobenius norm of each block of `adjoint(L)`, wanted where blocks are streamed."""
        raise NotImplementedError

    @abstractmethod
    def adjoint_rounding(self, L: torch.Tensor) -> float:
        """Bound on the Frobenius norm of the rounding error in each block of `adjoint(L)`."""

    @property
    @abstractmethod
    def row_squares(self) -> torch.Tensor:
        """For every sample (n, w): a bound of |h|^2 over the unit u, for each of the w hidden outputs."""

    def hidden_norms(self, weights: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bounds (P,), one per gate, of the root of sum_i w_i |h_i|^2 for columns u.

        Parameters
        ----------
        weights : torch.Tensor of shape (n,), float64
            The w_i >= 0.
        centred : bool
            Whether the part of sqrt(w_i) h_i along sqrt(w_i) may be left out.

        Returns
        -------
        in_ball, on_axes : torch.Tensor of shape (P,), float64
            Where ||u||_2 <= 1, and where ||u||_1 <= 1.
        """
        squares = self.row_squares.double()
        largest = float(squares.max())
        if not 0 < largest < math.inf:
            bound = weights.new_full((self.n_gates,), largest)
            return bound, bound
        total = float((weights.to(squares).unsqueeze(1) * (squares / largest)).sum())
        total = math.sqrt(total) * math.sqrt(largest) * (1 + 4 * (squares.numel() + self.block_shape[1] + 8) * 2.0**-53)
        bound = weights.new_full((self.n_gates,), total)
        return bound, bound

    @property
    @abstractmethod
    def cone_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N, p) and patterns (N, P) of the cones {u : (2 D_k - I) X u >= 0} of a ReLU problem."""

    @abstractmethod
    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        """Norms (N,) of the vectors that the rows of the cones are weighed with in A*(nu)."""

    @property
    @abstractmethod
    def prediction_norm(self) -> float:
        """The largest Frobenius norm of a block of A*(e_i) for one sample i and one output, rounded up."""

    @abstractmethod
    def apply_rounding(self, Z: torch.Tensor) -> float:
        """Bound on the Frobenius norm of the rounding error in `apply(Z)`."""

    def apply_factors(self, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Predictions of Z_k = U_k V_k^T from the factors, U (P, p, m) and V (P, q, m)."""
        return self.apply_columns(Columns.from_factors(U, V))

    @abstractmethod
    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        """Hidden outputs h of columns u_j (r, p) in gate_j for some samples, (rows, r w).

        The w outputs of a column are side by side; the predictions of the columns are
        ``h @ split_right(v)``.
        """

    @abstractmethod
    def hidden_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        """The adjoint of `hidden` in u, (r, p), at M of shape (rows, r w)."""

    def unit_energies(self, gate: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum_i w_i |h_i|^2 / w, (p,), for the hidden outputs h (w) of every unit vector as a column of one gate."""
        p = self.block_shape[1]
        energies = weights.new_zeros(p)
        for chosen in row_batches(p, 8 * (p + self.n_samples * self.width)):
            units = self._units(chosen)
            for rows in self.column_batches(len(units)):
                squares = self.hidden(gate.repeat(len(units)), units, rows).square()
                energies[chosen] += (weights[rows] @ squares).view(len(units), self.width).sum(1)
        return energies / self.width

    def _units(self, chosen: slice) -> torch.Tensor:
        """Some of the unit vectors, (r, p)."""
        index = torch.arange(chosen.start, chosen.stop, device=self.device)
        units = torch.zeros(len(index), self.block_shape[1], dtype=self.dtype, device=self.device)
        units[torch.arange(len(index), device=self.device), index] = 1
        return units

    def split_right(self, v: torch.Tensor) -> torch.Tensor:
        """Right factors v (r, q) as the weights (r w, c) of the hidden outputs."""
        if self.width == 1:
            return v
        return v.reshape(len(v), self.n_outputs, self.width).mT.reshape(-1, self.n_outputs)

    def merge_right(self, weights: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`split_right`, which is also its adjoint."""
        if self.width == 1:
            return weights
        return weights.view(-1, self.width, self.n_outputs).mT.flatten(1)

    def adjoint_columns(self, columns: Columns, L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """G_k v_j (r, p) and G_k^T u_j (r, q) for every column j of gate k, with G = A*(L), without forming G."""
        weights = self.split_right(columns.v)
        left, right = torch.zeros_like(columns.u), torch.zeros_like(weights)
        for rows in self.column_batches(len(columns)):
            left += self.hidden_adjoint(columns.gate, L[rows] @ weights.T, rows)
            right += self.hidden(columns.gate, columns.u, rows).T @ L[rows]
        return left, self.merge_right(right)

    def apply_columns(self, columns: Columns) -> torch.Tensor:
        """Predictions (n, c) of the columns."""
        weights = self.split_right(columns.v)
        batches = self.column_batches(len(columns))
        if len(batches) == 1:
            return self.hidden(columns.gate, columns.u, batches[0]) @ weights
        # Written in place: small results kept among large temporaries would scatter the heap.
        outputs = weights.new_empty(self.n_samples, self.n_outputs)
        for rows in batches:
            outputs[rows] = self.hidden(columns.gate, columns.u, rows) @ weights
        return outputs

    def network_outputs(self, columns: Columns) -> torch.Tensor:
        """Predictions (n, c) of the columns as neurons of the network: for ReLU (X u)_+ in place of D_k X u."""
        return self.apply_columns(columns)

    def column_batches(self, n_columns: int) -> list[slice]:
        """Slices of samples whose activations for so many columns take at most `BATCH_BYTES`."""
        return row_batches(self.n_samples, max(1, n_columns) * self.width * 8)

    @abstractmethod
    def subset(self, rows: torch.Tensor) -> Operator:
        """The same map for some of the samples."""

    @abstractmethod
    def select(self, gates: torch.Tensor) -> Operator:
        """The same map for some of the gates."""

    def apply_atoms(self, gate: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Predictions (r, n, c) of each of r atoms u_j v_j^T in block gate_j; u (r, p), v (r, q)."""
        r, w = len(gate), self.width
        hidden = torch.cat([self.hidden(gate, u, rows) for rows in self.column_batches(r)])
        weights = self.split_right(v).reshape(r, w, self.n_outputs)
        return torch.einsum("nrw,rwc->rnc", hidden.view(self.n_samples, r, w), weights)

    @abstractmethod
    def kernel(self) -> torch.Tensor:
        """The n x n matrix of A A* for one output (math section 5)."""

    def kernel_columns(self, chosen: torch.Tensor) -> torch.Tensor:
        """The columns of :meth:`kernel` of some samples, where `has_kernel_columns`.

        Parameters
        ----------
        chosen : torch.Tensor of indices, (m,)
            Among all samples.

        Returns
        -------
        torch.Tensor of shape (n, m)
            With the rows of the samples of `local`.
        """
        return self.kernel_with(self.kernel_samples(chosen))

    def kernel_samples(self, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the kernel needs to know of some samples of this process: tensors of m rows, in the working type."""
        raise NotImplementedError

    def kernel_with(self, others: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Entries (n, m) of the kernel for the samples of this process with m others, of :meth:`kernel_samples`."""
        raise NotImplementedError

    @abstractmethod
    def features(self, rows: slice) -> torch.Tensor:
        """The features (rows, P p w) of one output, in the order of :meth:`flatten`."""

    @abstractmethod
    def feature_batches(self) -> list[slice]:
        """Slices of samples whose features are formed at once."""

    def moments(self, weights: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A* diag(weights) A for one output, (F, F), and A* diag(weights) targets, (F, t), in one pass.

        Parameters
        ----------
        weights : torch.Tensor of shape (n,)
            Non-negative.
        targets : torch.Tensor of shape (n, t)
            Any number of columns.
        """
        G = targets.new_zeros(self.n_features, self.n_features)
        products = targets.new_zeros(self.n_features, targets.shape[1])
        root = weights.sqrt().unsqueeze(1)
        for rows in batches_of(self.feature_batches(), "Gram matrix"):
            features = self.features(rows) * root[rows]
            add_product(G, features)
            products.addmm_(features.T, root[rows] * targets[rows])
        return G, products

    def gram(self) -> torch.Tensor:
        """The (F, F) matrix of A* A for one output."""
        ones = torch.ones(self.n_samples, dtype=self.dtype, device=self.device)
        return self.moments(ones, ones.new_zeros(self.n_samples, 0))[0]

    @abstractmethod
    def predict(self, Z: torch.Tensor, X: np.ndarray) -> torch.Tensor:
        """Predictions of blocks Z for new data X."""

    @abstractmethod
    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        """The data that define the map, for fingerprints."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able facts that rebuild the map for new data (without the gates)."""
