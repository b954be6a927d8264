"""Two-layer perceptrons on samples that do not fit in memory: every product is summed over batches of rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from cvxnn.columns import Columns
from cvxnn.operators.base import Operator, row_batches
from cvxnn.operators.mlp import MLPOperator
from cvxnn.operators.passes import batches_of
from cvxnn.operators.rows import Rows
from cvxnn.operators.symmetric import add_product
from cvxnn.patterns import PatchBits

__all__ = ["StreamedMLPOperator"]

#: Bytes of one batch of samples with its masks and outputs.
_PASS_BYTES = 2**26
#: Bytes of blocks that are formed at once: each time all samples are read again.
_BLOCK_BYTES = 2**27


class _Masks:
    """Packed patterns, read as numbers of the working type a few samples at a time."""

    def __init__(self, bits: PatchBits, dtype: torch.dtype) -> None:
        self.bits, self.dtype = bits, dtype

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return self.bits.rows(rows)[:, 0].to(self.dtype)


class StreamedMLPOperator(MLPOperator):
    """The map of :class:`MLPOperator` for rows that are read in each pass.

    In memory are the patterns, a bit per sample and gate, and what has n c numbers. Gram matrices are summed in
    float64 whatever the type of the problem.

    Parameters
    ----------
    X : Rows of shape (n, d)
    n_outputs : int
    gates : numpy.ndarray of shape (d, P) or None
    bits : PatchBits of shape (n, 1, P) or None
        Patterns of the gates on X; None for the linear network.
    """

    passes_are_dear = True
    X: Rows  # type: ignore[assignment]

    def __init__(self, X: Rows, n_outputs: int, gates: object = None, bits: PatchBits | None = None) -> None:
        # The base class only stores the patterns where it is given some.
        super().__init__(X, n_outputs, gates, bits)  # type: ignore[arg-type]
        self.bits = bits
        per_row = 8 * (2 * X.shape[1] + self.n_gates * (2 * min(X.shape[1], n_outputs) + 1))
        self._batches = row_batches(self.n_samples, per_row, _PASS_BYTES)

    @property
    def patterns(self) -> torch.Tensor:
        """Patterns (n, P), bool; formed in full."""
        if self.bits is None:
            return torch.ones(self.n_samples, 1, dtype=torch.bool, device=self.device)
        return self.bits.rows(slice(None))[:, 0]

    @cached_property
    def _mask(self) -> _Masks:  # type: ignore[override]
        assert self.bits is not None
        return _Masks(self.bits, self.dtype)

    @cached_property
    def _double(self) -> StreamedMLPOperator:
        return StreamedMLPOperator(self.X.double(), self.n_outputs, self.gates, self.bits)

    def double(self) -> StreamedMLPOperator:
        return self if self.dtype == torch.float64 else self._double

    def gate_batches(self) -> list[slice]:
        n_gates, p, q = self.block_shape
        return row_batches(n_gates, 8 * p * q, _BLOCK_BYTES)

    def column_batches(self, n_columns: int) -> list[slice]:
        per_row = 8 * (2 * self.X.shape[1] + self.n_gates + 3 * max(1, n_columns))
        return row_batches(self.n_samples, per_row, _PASS_BYTES)

    def feature_batches(self) -> list[slice]:
        return row_batches(self.n_samples, 8 * (2 * self.X.shape[1] + 2 * self.n_features), _PASS_BYTES)

    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        if not bool(Z.any()):
            return Z.new_zeros(self.n_samples, self.n_outputs)
        # Outputs of batches that are kept among what is freed would leave holes in memory.
        outputs = Z.new_empty(self.n_samples, self.n_outputs)
        _, d, c = self.block_shape
        flat = Z.reshape(-1, c) if self._mask_inputs else Z.permute(1, 0, 2).reshape(d, -1)
        for rows in batches_of(self._batches, "predictions"):
            if self.bits is None:
                outputs[rows] = self.X[rows] @ Z[0]
            elif self._mask_inputs:
                outputs[rows] = self.features(rows) @ flat
            else:
                outputs[rows] = self._sum_active(self.X[rows] @ flat, rows)
        return outputs

    def apply_columns(self, columns: Columns) -> torch.Tensor:
        outputs = columns.v.new_empty(self.n_samples, self.n_outputs)
        for rows in self.column_batches(len(columns)):
            outputs[rows] = self.hidden(columns.gate, columns.u, rows) @ columns.v
        return outputs

    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        return self._summed_blocks(L, slice(0, self.n_gates))

    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        return self._summed_blocks(L, gates)

    def _summed_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        """Blocks of some gates, summed over the batches; the narrower side of a block is masked."""
        n_gates, d, c = self.block_shape
        start, stop, _ = gates.indices(n_gates)
        P = stop - start
        wide = L.new_zeros(P * d, c) if self._mask_inputs else L.new_zeros(d, P * c)
        for rows in batches_of(self._batches, "gradient"):
            X, part = self.X[rows], L[rows]
            if self.bits is None:
                wide.addmm_(X.T, part)
                continue
            mask = self._mask[rows][:, start:stop].unsqueeze(2)
            if self._mask_inputs:
                wide.addmm_((mask * X.unsqueeze(1)).flatten(1).T, part)
            else:
                wide.addmm_(X.T, (mask * part.unsqueeze(1)).flatten(1))
        return wide.view(P, d, c) if self._mask_inputs else wide.view(d, P, c).permute(1, 0, 2)

    def _column_mask(self, gate: torch.Tensor, rows: slice) -> torch.Tensor | None:
        return None if self.bits is None else self.bits.rows(rows)[:, 0, gate].to(self.dtype)

    def moments(self, weights: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        double = torch.float64
        G = torch.zeros(self.n_features, self.n_features, dtype=double, device=self.device)
        products = torch.zeros(self.n_features, targets.shape[1], dtype=double, device=self.device)
        root = weights.double().sqrt().unsqueeze(1)
        for rows in batches_of(self.feature_batches(), "Gram matrix"):
            features = self.features(rows).double() * root[rows]
            add_product(G, features)
            products.addmm_(features.T, root[rows] * targets[rows].double())
        return G.to(self.dtype), products.to(self.dtype)

    def kernel(self) -> torch.Tensor:
        n = self.n_samples
        K = self.X.new_zeros(n, n)
        for rows in self._batches:
            left = self.X[rows]
            for columns in self._batches:
                part = left @ self.X[columns].T
                if self.bits is not None:
                    part *= self._mask[rows] @ self._mask[columns].T
                K[rows, columns] = part
        return K

    def _kernel_batches(self, n_others: int) -> list[slice]:
        per_row = 8 * (self.X.shape[1] + self.n_gates + 2 * n_others)
        return row_batches(self.n_samples, per_row, _PASS_BYTES)

    @cached_property
    def row_squares(self) -> torch.Tensor:
        squares = self.X.new_zeros(self.n_samples, 1)
        for rows in self.X.batches():
            squares[rows] = self.X[rows].square().sum(1, keepdim=True)
        return squares

    def hidden_norms(self, weights: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        # Those of the rows; a product with the patterns would be one more pass.
        return Operator.hidden_norms(self, weights, centred)

    def subset(self, rows: torch.Tensor) -> MLPOperator:
        bits = None if self.bits is None else self.bits.rows(rows)[:, 0]
        return MLPOperator(self.X[rows], self.n_outputs, self.gates, bits, self.activation)

    def part(self, rows: slice) -> StreamedMLPOperator:
        """The map of a range of the samples, which are not read now."""
        bits = None if self.bits is None else PatchBits(self.bits.data[rows], self.bits.n_gates)
        return StreamedMLPOperator(self.X.part(rows), self.n_outputs, self.gates, bits)

    def select(self, gates: torch.Tensor) -> MLPOperator:
        if self.gates is None or self.bits is None:
            return self
        chosen = self.gates[:, gates.cpu().numpy()]
        return StreamedMLPOperator(self.X, self.n_outputs, chosen, self.bits.select(gates))

    def data_tensors(self) -> Iterable[torch.Tensor]:  # type: ignore[override]
        return self.X.tensors()
