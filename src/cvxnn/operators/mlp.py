"""Two-layer perceptrons: A_k(Z_k) = D_k X Z_k (equations (2), (3), (5), (17), (18), (19))."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.operators.base import BATCH_BYTES, Operator, row_batches
from cvxnn.operators.gated_norms import gated_frobenius_norms, gated_norms
from cvxnn.patterns import activation_patterns

__all__ = ["MLPOperator"]

#: Up to so many entries of a block its adjoint is cheapest as a product of patterns with x_i l_i^T.
_FEW_PRODUCTS = 64
#: Up to so many features spectral norms take no time.
_FEW_FEATURES = 128
#: Below it the squares of small entries may have underflowed.
_SMALLEST_SQUARE = 1e-200
#: From so many gates on predictions are formed without the blocks that are zero.
_MANY_GATES = 64
_EPS = 2.0**-53


class MLPOperator(Operator):
    """A(Z) = sum_k D_k X Z_k with D_k = diag(1{X g_k >= 0}); the linear network has P = 1 and D = I.

    For ReLU the map is that of gated ReLU; in the cone of its gate a column gives D_k X u = (X u)_+.

    Parameters
    ----------
    X : torch.Tensor of shape (n, d)
        Data, with the column of ones of the hidden bias where there is one.
    n_outputs : int
        Number of outputs c.
    gates : numpy.ndarray of shape (d, P) or None
        Gate vectors; None for the linear network.
    patterns : torch.Tensor of shape (n, P), dtype bool, or None
        Patterns of the gates on X, computed from `gates` in float64 where not given.
    activation : {"gated_relu", "relu"}
        Of a network with gates; without gates it is "linear".

    Notes
    -----
    Every product over the gates is one matrix product. Which side is masked, X (n x P d numbers) or the
    outputs (n x P c numbers), depends on which is smaller; both are formed in batches of rows only.
    """

    architecture = "mlp"
    has_kernel_columns = True

    def __init__(
        self,
        X: torch.Tensor,
        n_outputs: int,
        gates: np.ndarray | None = None,
        patterns: torch.Tensor | None = None,
        activation: str = "gated_relu",
    ) -> None:
        self.X = X
        self.dtype, self.device = X.dtype, X.device
        self.gates = gates
        self.activation = "linear" if gates is None else activation
        self.n_samples, d = X.shape
        self.n_outputs = n_outputs
        self.block_shape = (1 if gates is None else gates.shape[1], d, n_outputs)
        if gates is not None and patterns is None:
            bits = activation_patterns(X.to("cpu", torch.float64).numpy(), gates)
            patterns = torch.from_numpy(bits).to(self.device)
        self._patterns = patterns
        self._kept_gate: torch.Tensor | None = None
        self._kept_mask = X
        width = self.n_gates * min(d, n_outputs)
        self._batches = row_batches(self.n_samples, width * X.element_size())
        self._mask_inputs = d < n_outputs

    @property
    def patterns(self) -> torch.Tensor:
        if self._patterns is None:
            return torch.ones(self.n_samples, 1, dtype=torch.bool, device=self.device)
        return self._patterns

    @cached_property
    def _mask(self) -> torch.Tensor:
        """Patterns as numbers of the working type."""
        return self.patterns.to(self.dtype)

    @cached_property
    def _double(self) -> MLPOperator:
        return MLPOperator(self.X.double(), self.n_outputs, self.gates, self._patterns, self.activation)

    def double(self) -> MLPOperator:
        return self if self.dtype == torch.float64 else self._double

    def features(self, rows: slice) -> torch.Tensor:
        """Rows of [D_1 X, ..., D_P X], shape (rows, P d)."""
        X = self.X[rows]
        if self._patterns is None:
            return X
        return (self._mask[rows].unsqueeze(2) * X.unsqueeze(1)).flatten(1)

    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        if self._patterns is None:
            return self.X @ Z[0]
        if self.n_gates >= _MANY_GATES:
            # Blocks that are zero add nothing; those with NaN or infinities do.
            chosen = (Z != 0).any(2).any(1).nonzero()[:, 0]
            if len(chosen) == 0:
                return Z.new_zeros(self.n_samples, self.n_outputs)
            if 2 * len(chosen) <= self.n_gates:
                return self.select(chosen).apply(Z[chosen])
        if self._mask_inputs:
            flat = Z.reshape(self.n_features, self.n_outputs)
            return torch.cat([self.features(rows) @ flat for rows in self._batches])
        flat = Z.permute(1, 0, 2).reshape(self.block_shape[1], -1)
        out = [self._sum_active(self.X[rows] @ flat, rows) for rows in self._batches]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _sum_active(self, outputs: torch.Tensor, rows: slice) -> torch.Tensor:
        """Sum the outputs (rows, P c) of all gates over the active ones, giving (rows, c)."""
        per_gate = outputs.view(len(outputs), self.n_gates, -1)
        return torch.bmm(self._mask[rows].unsqueeze(1), per_gate).squeeze(1)

    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        if self._patterns is None:
            return (self.X.T @ L).unsqueeze(0)
        n_gates, d, c = self.block_shape
        if d * c <= _FEW_PRODUCTS:
            return self._dense_blocks(L, 0, n_gates)
        if self._mask_inputs:
            flat = L.new_zeros(n_gates * d, c)
            for rows in self._batches:
                flat.addmm_(self.features(rows).T, L[rows])
            return flat.view(n_gates, d, c)
        return self._masked_blocks(L, slice(0, n_gates))

    def _masked_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        """Blocks of some gates as one product of X with the masked outputs of all of them."""
        _, d, c = self.block_shape
        count = gates.stop - gates.start
        flat = L.new_zeros(d, count * c)
        for rows in self._batches:
            masked = self._mask[rows, gates].unsqueeze(2) * L[rows].unsqueeze(1)
            flat.addmm_(self.X[rows].T, masked.flatten(1))
        return flat.view(d, count, c).permute(1, 0, 2)

    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        n_gates, d, c = self.block_shape
        start, stop, _ = gates.indices(n_gates)
        if stop - start == n_gates:
            return self.adjoint(L)
        if d * c <= _FEW_PRODUCTS:
            return self._dense_blocks(L, start, stop)
        if not self._mask_inputs and stop > start:
            return self._masked_blocks(L, slice(start, stop))
        blocks = L.new_zeros(stop - start, d, c)
        for k in range(start, stop):
            active = self.patterns[:, k].nonzero()[:, 0]
            for rows in row_batches(len(active), (d + c) * L.element_size()):
                chosen = active[rows]
                blocks[k - start].addmm_(self.X[chosen].T, L[chosen])
        return blocks

    def _dense_blocks(self, L: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Blocks of gates start to stop as the products of their patterns with the outer products x_i l_i^T."""
        _, d, c = self.block_shape
        products = (self.X.unsqueeze(2) * L.unsqueeze(1)).flatten(1)
        blocks = L.new_empty(stop - start, d * c)
        for part in row_batches(stop - start, self.n_samples * L.element_size()):
            bits = self.patterns[:, start + part.start : start + part.stop]
            torch.mm(bits.T.to(self.dtype), products, out=blocks[part])
        return blocks.view(-1, d, c)

    def _column_mask(self, gate: torch.Tensor, rows: slice) -> torch.Tensor | None:
        """Patterns (rows, r) of the gates of r columns; kept from call to call where it is small."""
        if self._patterns is None:
            return None
        if len(gate) * self.n_samples * self.X.element_size() > BATCH_BYTES:
            return self._patterns[rows][:, gate].to(self.dtype)
        if self._kept_gate is not gate:
            self._kept_gate, self._kept_mask = gate, self._patterns[:, gate].to(self.dtype)
        return self._kept_mask[rows]

    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        activations = self.X[rows] @ u.T
        mask = self._column_mask(gate, rows)
        return activations if mask is None else activations.mul_(mask)

    def network_outputs(self, columns: Columns) -> torch.Tensor:
        if self.activation != "relu":
            return self.apply_columns(columns)
        used = columns.without_zeros()
        batches = self.column_batches(len(used))
        return torch.cat([(self.X[rows] @ used.u.T).clamp_min(0) @ used.v for rows in batches])

    def hidden_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        mask = self._column_mask(gate, rows)
        return (M if mask is None else M * mask).T @ self.X[rows]

    def subset(self, rows: torch.Tensor) -> MLPOperator:
        bits = None if self._patterns is None else self._patterns[rows]
        return MLPOperator(self.X[rows], self.n_outputs, self.gates, bits, self.activation)

    def select(self, gates: torch.Tensor) -> MLPOperator:
        if self.gates is None:
            return self
        chosen = self.gates[:, gates.cpu().numpy()]
        part = MLPOperator(self.X, self.n_outputs, chosen, self.patterns[:, gates], self.activation)
        if "_norm" in self.__dict__:
            part.__dict__["_norm"] = self._norm
        return part

    @cached_property
    def _norm(self) -> float:
        return _frobenius(self.X)

    def adjoint_rounding(self, L: torch.Tensor) -> float:
        eps = torch.finfo(self.dtype).eps / 2
        return 4 * self.n_samples * eps * self._norm * _frobenius(L)

    @cached_property
    def row_squares(self) -> torch.Tensor:
        return self.X.square().sum(1, keepdim=True)

    def hidden_norms(self, weights: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        largest = _largest(self.X)
        if not 0 < largest < math.inf:
            return super().hidden_norms(weights, centred)
        d = self.X.shape[1]
        if self._patterns is not None and d > _FEW_FEATURES and 2 * d > self.n_gates:
            # Spectral norms would take longer than the pass over the gates that they may save.
            rounding = torch.finfo(self.dtype)
            squares = self.row_squares.double()[:, 0] * (1 + 2 * (d + 4) * rounding.eps) + d * rounding.tiny
            most = float(squares.max())
            if _SMALLEST_SQUARE < most < math.inf:
                bound = gated_frobenius_norms(squares / most, self._patterns, weights.to(squares)) * math.sqrt(most)
                return (bound * (1 + 8 * _EPS),) * 2
        # Scaled, so that no square that counts underflows.
        X = self.X.double() / largest
        bounds = gated_norms(X, self._patterns, weights.to(X), centred)
        return bounds[0] * largest, bounds[1] * largest

    @property
    def cone_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.X, self.patterns

    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        return nu.norm(dim=1)

    @cached_property
    def prediction_norm(self) -> float:
        largest = _largest(self.X)
        if largest == 0:
            return 0.0
        norm = max(float(torch.linalg.vector_norm(part / largest, dim=1).max()) for part in _parts(self.X))
        return norm * largest * (1 + 4 * self.X.shape[1] * torch.finfo(self.dtype).eps)

    def apply_rounding(self, Z: torch.Tensor) -> float:
        eps = torch.finfo(self.dtype).eps / 2
        blocks = float(torch.linalg.vector_norm(Z, dim=(1, 2)).sum())
        return 4 * (self.block_shape[1] + self.n_gates) * eps * self._norm * blocks

    def kernel(self) -> torch.Tensor:
        return self.kernel_with((self.X,) if self._patterns is None else (self.X, self._mask))

    def kernel_samples(self, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.X[chosen],) if self._patterns is None else (self.X[chosen], self._mask[chosen])

    def kernel_with(self, others: tuple[torch.Tensor, ...]) -> torch.Tensor:
        X = others[0]
        K = torch.empty(self.n_samples, len(X), dtype=self.dtype, device=self.device)
        for rows in self._kernel_batches(len(X)):
            torch.mm(self.X[rows], X.T, out=K[rows])
            if len(others) > 1:
                K[rows] *= self._mask[rows] @ others[1].T
        return K

    def _kernel_batches(self, n_others: int) -> list[slice]:
        return row_batches(self.n_samples, n_others * self.X.element_size())

    def feature_batches(self) -> list[slice]:
        return row_batches(self.n_samples, self.n_features * self.X.element_size())

    def predict(self, Z: torch.Tensor, X: np.ndarray) -> torch.Tensor:
        data = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float64)).to(self.device, self.dtype)
        return MLPOperator(data, self.n_outputs, self.gates).apply(Z)

    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.X,)

    def describe(self) -> dict[str, Any]:
        return {"architecture": self.architecture, "activation": self.activation}


def _frobenius(matrix: torch.Tensor) -> float:
    """Frobenius norm, without over- or underflow of the squares."""
    largest = _largest(matrix)
    if not 0 < largest < math.inf:
        return largest
    return largest * math.hypot(*(float(torch.linalg.vector_norm(part / largest)) for part in _parts(matrix)))


def _largest(matrix: torch.Tensor) -> float:
    return max(float(part.abs().max()) for part in _parts(matrix))


def _parts(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows in parts, as they may be on disk."""
    return (matrix[rows] for rows in row_batches(len(matrix), matrix.shape[1] * matrix.element_size()))
