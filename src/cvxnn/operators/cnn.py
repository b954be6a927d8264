"""Two-layer CNNs with linear pooling: A_k(Z_k) from pooled gated patches (equations (23), (24), (125) to (130))."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.operators.base import Operator, row_batches
from cvxnn.operators.gate_groups import GateGroups
from cvxnn.operators.passes import batches_of
from cvxnn.operators.patches import PatchGeometry
from cvxnn.operators.pooling import Support
from cvxnn.operators.sources import ImageSource
from cvxnn.operators.symmetric import add_product
from cvxnn.patterns import PatchBits, patch_bits

__all__ = ["FEATURES", "CNNOperator"]

FEATURES = ("auto", "cached", "recomputed")

#: Bytes of pooled patches that are kept with features="auto".
_CACHE_BYTES = 2**30
#: Bytes of the patches and patterns of one batch of samples. On a CPU larger ones are slower, as memory is mapped anew
#: for each; a GPU wants them large.
_PATCH_BYTES = {"cpu": 2**25, "cuda": 2**29}
#: Bytes of the features of one batch of samples that a Gram matrix takes in: smaller ones are bound by its memory.
_FEATURE_BYTES = 2**28
#: Bytes of blocks that are formed at once: each time all patches are looked at again.
_BLOCK_BYTES = 2**27


class CNNOperator(Operator):
    """Output c' of sample i is sum_k <Phi_ik^T, Z_k^(c')> with Phi_ik = P_a D_k^(i) X_i (a x h).

    X_i (K x h) holds the patches of image i and D_k^(i) = diag(1{X_i g_k >= 0}); the linear network has P = 1
    and D = I. Blocks are h x (c a), column index output * a + cell. For ReLU the map is that of gated ReLU.

    Parameters
    ----------
    images : torch.Tensor or ImageSource of shape (n, channels, H, W)
    n_outputs : int
        Number of outputs c.
    geometry : PatchGeometry
        Filter, stride, padding and bias.
    pooling : torch.Tensor of shape (a, K), float64
    gates : numpy.ndarray of shape (h, P) or None
        Gate vectors; None for the linear network.
    bits : PatchBits or None
        Their patterns, computed in float64 where not given.
    activation : {"gated_relu", "relu"}
        Of a network with gates; without gates it is "linear".
    features : {"auto", "cached", "recomputed"}
        Whether the pooled gated patches Phi, n P a h numbers, are kept in memory. Otherwise they are formed in
        batches of samples where all gates are wanted, and a few columns are convolved, gated and pooled.

    Notes
    -----
    Phi does not depend on the weights. Forming it costs about one convolution with P filters; from then on a
    pass takes a h numbers per gate in place of K h (math section 2).
    """

    architecture = "cnn"

    def __init__(
        self,
        images: torch.Tensor | ImageSource,
        n_outputs: int,
        geometry: PatchGeometry,
        pooling: torch.Tensor,
        gates: np.ndarray | None = None,
        bits: PatchBits | None = None,
        activation: str = "gated_relu",
        features: str = "auto",
    ) -> None:
        self.images = images
        self.dtype, self.device = images.dtype, images.device
        self.n_samples, self.n_outputs = len(images), n_outputs
        self.geometry, self.storage = geometry, features
        self.gates = gates
        self.activation = "linear" if gates is None else activation
        self.pooling = pooling.to(self.device)
        self.width, self.n_patches = pooling.shape
        n_gates = 1 if gates is None else gates.shape[1]
        self.block_shape = (n_gates, geometry.length(images.shape[1]), n_outputs * self.width)
        self._support = Support(self.pooling)
        self._pool = self.pooling.to(self.dtype)
        self._batches = row_batches(self.n_samples, self._sample_bytes(n_gates), self._patch_bytes)
        if gates is not None and bits is None:
            bits = patch_bits(
                self.n_samples,
                lambda rows: self.geometry(self.images[rows].double()),
                torch.from_numpy(gates).to(self.device),
                self._batches[0].stop,
            )
        self.bits = bits
        self._kept: torch.Tensor | None = None
        self._norms: torch.Tensor | None = None
        self._last: tuple[slice, torch.Tensor] | None = None
        self._groups: GateGroups | None = None

    def _sample_bytes(self, n_gates: int) -> int:
        """Bytes of the patches, the patterns and the pooled patches of a sample."""
        h = self.block_shape[1]
        return 8 * (self.n_patches * (2 * h + 2 * n_gates) + self.width * n_gates * h)

    @property
    def _patch_bytes(self) -> int:
        return _PATCH_BYTES.get(self.device.type, _PATCH_BYTES["cuda"])

    @property
    def patterns(self) -> torch.Tensor:
        """Patterns (n, K, P), bool; formed in full."""
        if self.bits is None:
            return torch.ones(self.n_samples, self.n_patches, 1, dtype=torch.bool, device=self.device)
        return self.bits.rows(slice(None))

    @cached_property
    def _double(self) -> CNNOperator:
        return self._with(self.images.double(), self.gates, self.bits)

    def double(self) -> CNNOperator:
        return self if self.dtype == torch.float64 else self._double

    def _with(
        self, images: torch.Tensor | ImageSource, gates: np.ndarray | None, bits: PatchBits | None
    ) -> CNNOperator:
        return CNNOperator(
            images, self.n_outputs, self.geometry, self.pooling, gates, bits, self.activation, self.storage
        )

    def flatten(self, Z: torch.Tensor) -> torch.Tensor:
        n_gates, h, _ = self.block_shape
        blocks = Z.reshape(n_gates, h, self.n_outputs, self.width)
        return blocks.permute(3, 0, 1, 2).reshape(self.n_features, self.n_outputs)

    def unflatten(self, weights: torch.Tensor) -> torch.Tensor:
        n_gates, h, _ = self.block_shape
        blocks = weights.view(self.width, n_gates, h, self.n_outputs)
        return blocks.permute(1, 2, 3, 0).reshape(self.block_shape)

    @cached_property
    def cached(self) -> bool:
        """Whether the pooled patches are kept."""
        size = self.n_samples * self.n_features * self.images.element_size()
        return self.storage == "cached" or (self.storage == "auto" and size <= _CACHE_BYTES)

    @property
    def passes_are_dear(self) -> bool:  # type: ignore[override]
        return not self.cached

    def pooled(self, rows: slice) -> torch.Tensor:
        """Phi of some samples, (rows, a, P, h)."""
        if not self.cached:
            return self._pooled(rows)
        if self._kept is None:
            if self.dtype == torch.float64:
                # The patches are at hand; images can take long to read.
                self._norms = self.pooling.new_empty(self.n_samples, self.width)
            self._kept = self._pooled(slice(0, self.n_samples), self._norms)
        return self._kept[rows]

    def _pooled_of(self, groups: GateGroups, rows: slice) -> torch.Tensor:
        """Phi of some gates; that of the last batch is remembered, as `hidden` and `hidden_adjoint` take turns."""
        if self.cached:
            Phi = self.pooled(rows)
        else:
            if self._last is None or self._last[0] != rows:
                self._last = (rows, self._pooled(rows))
            Phi = self._last[1]
        return Phi[:, :, groups.gates] if groups.some_of(self.n_gates) else Phi

    def _pooled(self, rows: slice, norms: torch.Tensor | None = None) -> torch.Tensor:
        """Phi, formed a batch at a time; `norms` (n, a) takes in what :attr:`_cell_norms` begins with."""
        start, stop, _ = rows.indices(self.n_samples)
        size = self._batches[0].stop
        parts = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
        if len(parts) == 1:
            return self._pooled_at_once(rows, norms)
        Phi = self.pooling.new_empty(stop - start, self.width, self.n_gates, self.block_shape[1], dtype=self.dtype)
        for part in parts:
            Phi[part.start - start : part.stop - start] = self._pooled_at_once(part, norms)
        return Phi

    def _pooled_at_once(self, rows: slice, norms: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.geometry(self.images[rows])
        if norms is not None:
            norms[rows] = patches.norm(dim=2) @ self.pooling.abs().T
        weights = self._support.weights.to(self.dtype).unsqueeze(2)
        weighted = patches[:, self._support.index].mul_(weights)
        if self.bits is None:
            return weighted.sum(2).unsqueeze(2)
        active = self.bits.rows(rows)[:, self._support.index].to(self.dtype)
        return torch.matmul(active.mT, weighted)

    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        weights = self.flatten(Z)
        if not bool(weights.any()):
            return weights.new_zeros(self.n_samples, self.n_outputs)
        outputs = weights.new_empty(self.n_samples, self.n_outputs)
        for rows in batches_of(self._batches, "predictions"):
            outputs[rows] = self.features(rows) @ weights
        return outputs

    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        weights = L.new_zeros(self.n_features, self.n_outputs)
        for rows in batches_of(self._batches, "gradient"):
            weights.addmm_(self.features(rows).T, L[rows])
        return self.unflatten(weights)

    def gate_batches(self) -> list[slice]:
        n_gates, p, q = self.block_shape
        return row_batches(n_gates, 8 * p * q, _BLOCK_BYTES)

    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        chosen = torch.arange(self.n_gates, device=self.device)[gates]
        return self.adjoint(L) if len(chosen) == self.n_gates else self.select(chosen).adjoint(L)

    def column_batches(self, n_columns: int) -> list[slice]:
        if self._from_pooled(n_columns):
            return self._batches if not self.cached else super().column_batches(n_columns)
        numbers = self.n_patches * (2 * self.block_shape[1] + 3 * n_columns + self.n_gates)
        return row_batches(self.n_samples, 8 * numbers, self._patch_bytes)

    def _from_pooled(self, n_columns: int) -> bool:
        """Whether so many columns are cheaper from pooled patches than by convolution."""
        return self.cached or n_columns > self.n_gates

    def _grouped(self, gate: torch.Tensor) -> GateGroups:
        if self._groups is None or self._groups.gate is not gate:
            self._groups = GateGroups(gate)
        return self._groups

    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        if not self._from_pooled(len(u)):
            return self._convolved(gate, u, rows)
        groups = self._grouped(gate)
        Phi = self._pooled_of(groups, rows)
        n = len(Phi)
        # One product per cell and gate: (rows, h) times (h, columns of the gate).
        factors = groups.spread(u).mT.repeat(self.width, 1, 1)
        products = torch.bmm(Phi.view(n, -1, Phi.shape[3]).transpose(0, 1), factors)
        products = products.view(self.width, len(groups.gates), n, groups.slots)
        return groups.gather(products.permute(1, 3, 2, 0)).transpose(0, 1).flatten(1)

    def hidden_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        r = len(gate)
        if not self._from_pooled(r):
            return self._convolved_adjoint(gate, M, rows)
        groups = self._grouped(gate)
        Phi = self._pooled_of(groups, rows)
        n = len(Phi)
        slots = groups.spread(M.view(n, r, self.width).permute(1, 0, 2))
        factors = slots.permute(3, 0, 1, 2).flatten(0, 1)
        products = torch.bmm(factors, Phi.view(n, -1, Phi.shape[3]).transpose(0, 1))
        return groups.gather(products.view(self.width, len(groups.gates), groups.slots, Phi.shape[3]).sum(0))

    def _convolved(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        """Convolution with the filters u_j, gate, pooling."""
        maps = self.geometry(self.images[rows]) @ u.T
        if self.bits is not None:
            maps.mul_(self.bits.rows(rows)[:, :, gate])
        return torch.matmul(self._pool, maps).mT.flatten(1)

    def _convolved_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        maps = torch.matmul(self._pool.T, M.view(len(M), len(gate), self.width).mT)
        if self.bits is not None:
            maps.mul_(self.bits.rows(rows)[:, :, gate])
        return maps.flatten(0, 1).T @ self.geometry(self.images[rows]).flatten(0, 1)

    def network_outputs(self, columns: Columns) -> torch.Tensor:
        if self.activation != "relu":
            return self.apply_columns(columns)
        used = columns.without_zeros()
        weights = self.split_right(used.v)
        size = 8 * self.n_patches * (2 * self.block_shape[1] + 2 * max(1, len(used)))
        outputs = weights.new_empty(self.n_samples, self.n_outputs)
        for rows in row_batches(self.n_samples, size, self._patch_bytes):
            maps = (self.geometry(self.images[rows]) @ used.u.T).clamp_min_(0)
            outputs[rows] = torch.matmul(self._pool, maps).mT.flatten(1) @ weights
        return outputs

    def subset(self, rows: torch.Tensor) -> CNNOperator:
        part = self._with(self.images[rows], self.gates, None if self.bits is None else self.bits.subset(rows))
        if self.cached:
            self.pooled(slice(0, 1))
            assert self._kept is not None
            part.cached, part._kept = True, self._kept[rows]
        return part

    def select(self, gates: torch.Tensor) -> CNNOperator:
        if self.gates is None or self.bits is None:
            return self
        chosen = np.ascontiguousarray(self.gates[:, gates.cpu().numpy()])
        part = self._with(self.images, chosen, self.bits.select(gates))
        if self._kept is not None:
            part.cached, part._kept = True, self._kept[:, :, gates]
        return part

    @cached_property
    def _cell_norms(self) -> torch.Tensor:
        """|P_a| times the norms of the patches, (n, a) in float64: bounds of the rows of every Phi_ik."""
        if self.cached and self.dtype == torch.float64:
            self.pooled(slice(0))
        norms = self._norms
        if norms is None:
            pool = self.pooling.abs()
            norms = pool.new_empty(self.n_samples, self.width)
            for rows in self._batches:
                norms[rows] = self.geometry(self.images[rows].double()).norm(dim=2) @ pool.T
        return norms * (1 + 4 * self.n_patches * torch.finfo(torch.float64).eps)

    @property
    def _norm(self) -> float:
        return float(torch.linalg.vector_norm(self._cell_norms))

    @property
    def _source_rounding(self) -> float:
        """What two readings of the images can differ by."""
        return self.images.rounding if isinstance(self.images, ImageSource) else 0.0

    @property
    def _terms(self) -> int:
        """Roundings on the way to an entry of Phi."""
        return self._support.length + 2

    def adjoint_rounding(self, L: torch.Tensor) -> float:
        eps = torch.finfo(self.dtype).eps / 2
        relative = 4 * (self.n_samples + self._terms) * eps + self._source_rounding
        return relative * self._norm * float(torch.linalg.vector_norm(L))

    @cached_property
    def row_squares(self) -> torch.Tensor:
        return self._cell_norms.square().to(self.dtype)

    @property
    def cone_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        patches = torch.cat([self.geometry(self.images[rows]) for rows in self._batches])
        return patches.flatten(0, 1), self.patterns.flatten(0, 1)

    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        return torch.outer(nu.norm(dim=1), self.pooling.norm(dim=0)).flatten()

    @cached_property
    def prediction_norm(self) -> float:
        h = self.block_shape[1]
        largest = float(torch.linalg.vector_norm(self._cell_norms, dim=1).max())
        return largest * (1 + 4 * (h + self._terms) * torch.finfo(self.dtype).eps)

    def apply_rounding(self, Z: torch.Tensor) -> float:
        eps = torch.finfo(self.dtype).eps / 2
        blocks = float(torch.linalg.vector_norm(Z, dim=(1, 2)).sum())
        return (4 * (self.n_features + self._terms) * eps + self._source_rounding) * self._norm * blocks

    def kernel(self) -> torch.Tensor:
        K = self.images.new_zeros(self.n_samples, self.n_samples)
        # All samples of some gates at a time.
        size = self.n_samples * self.width * self.block_shape[1] * self.images.element_size()
        for gates in row_batches(self.n_gates, size, 2 * _FEATURE_BYTES):
            chosen = torch.arange(self.n_gates, device=self.device)[gates]
            part = self if len(chosen) == self.n_gates else self.select(chosen)
            add_product(K, part.features(slice(0, self.n_samples)).T)
        return K

    def features(self, rows: slice) -> torch.Tensor:
        return self.pooled(rows).flatten(1)

    def feature_batches(self) -> list[slice]:
        return row_batches(self.n_samples, self.n_features * self.images.dtype.itemsize, _FEATURE_BYTES)

    def predict(self, Z: torch.Tensor, X: np.ndarray) -> torch.Tensor:
        images = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float64)).to(self.device, self.dtype)
        return self._with(images, self.gates, None).apply(Z)

    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        images = self.images.tensors() if isinstance(self.images, ImageSource) else (self.images,)
        return (*images, self.pooling)

    def describe(self) -> dict[str, Any]:
        facts = {"architecture": self.architecture, "activation": self.activation}
        return facts | self.geometry.to_dict()
