"""Any architecture on samples that are shared out to several processes."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.distributed import Group
from cvxnn.errors import UnsupportedError
from cvxnn.operators.base import Operator, row_batches

__all__ = ["ShardedOperator"]

#: Bytes of what the kernel needs to know of samples that are sent around at once.
_SENT_BYTES = 2**27


class ShardedOperator(Operator):
    """A map whose samples are shared out: each process applies it to its own, and sums are sent around.

    Predictions (n, c), targets and weights are whole in every process, and so are blocks; only what is large, the
    data with their patterns, is shared out. As every process gets the same predictions and gradients, solvers and
    certificates run unchanged, and alike, in all of them.

    Parameters
    ----------
    local : Operator
        The map of the samples of this process.
    group : Group
    n_samples : int
        Number of samples of all processes.
    own : torch.Tensor of indices, optional
        Where the samples of this process are among all; by default they are its share.
    """

    has_rows = False

    def __init__(self, local: Operator, group: Group, n_samples: int, own: torch.Tensor | None = None) -> None:
        self._local, self.group = local, group
        self.n_samples = n_samples
        self._own: slice | torch.Tensor = group.share(n_samples) if own is None else own
        self.architecture, self.activation = local.architecture, local.activation
        self.n_outputs, self.block_shape, self.width = local.n_outputs, local.block_shape, local.width
        self.gates, self.dtype, self.device = local.gates, local.dtype, local.device
        self.passes_are_dear = group.any(local.passes_are_dear)
        self.has_kernel_columns = local.has_kernel_columns

    @property
    def local(self) -> Operator:
        return self._local

    @property
    def plain(self) -> Operator:
        return self._local

    def own(self, values: torch.Tensor) -> torch.Tensor:
        return values[self._own]

    def summed(self, value: float, *tensors: torch.Tensor) -> float:
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        self._group.add_up(total, *tensors)
        return float(total)

    @property
    def _group(self) -> Group:
        assert self.group is not None
        return self.group

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        if isinstance(self._own, slice):
            return self._group.gather_rows(part, self.n_samples)
        whole = part.new_zeros(self.n_samples, *part.shape[1:])
        whole[self._own] = part
        self._group.add_up(whole)
        return whole

    def flatten(self, Z: torch.Tensor) -> torch.Tensor:
        return self._local.flatten(Z)

    def unflatten(self, weights: torch.Tensor) -> torch.Tensor:
        return self._local.unflatten(weights)

    @property
    def patterns(self) -> torch.Tensor:
        return self.whole(self._local.patterns.to(torch.uint8)).bool()

    @cached_property
    def _double(self) -> ShardedOperator:
        own = None if isinstance(self._own, slice) else self._own
        return ShardedOperator(self._local.double(), self._group, self.n_samples, own)

    def double(self) -> ShardedOperator:
        return self if self.dtype == torch.float64 else self._double

    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        return self.whole(self._local.apply(Z))

    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        blocks = self._local.adjoint(self.own(L)).contiguous()
        self._group.add_up(blocks)
        return blocks

    def gate_batches(self) -> list[slice]:
        return self._local.gate_batches()

    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        blocks = self._local.adjoint_blocks(self.own(L), gates).contiguous()
        self._group.add_up(blocks)
        return blocks

    def adjoint_rounding(self, L: torch.Tensor) -> float:
        """The errors of all processes, and that of adding up their blocks.

        The bound of a process is at least 4 eps times a bound of the norm of its blocks, which the sums round once
        per process.
        """
        (errors,) = self._group.sums(self._local.adjoint_rounding(self.own(L)))
        return (1 + self._group.size) * errors

    @cached_property
    def row_squares(self) -> torch.Tensor:
        return self.whole(self._local.row_squares)

    @property
    def cone_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedError("cones need the samples of all processes in one; ReLU problems are not shared out")

    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        return self._local.row_sizes(nu)

    @cached_property
    def prediction_norm(self) -> float:
        return self._group.largest(self._local.prediction_norm)

    def apply_rounding(self, Z: torch.Tensor) -> float:
        (squares,) = self._group.sums(self._local.apply_rounding(Z) ** 2)
        return math.sqrt(squares) * (1 + 8 * torch.finfo(torch.float64).eps)

    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        raise self._no_rows()

    def hidden_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        raise self._no_rows()

    def features(self, rows: slice) -> torch.Tensor:
        raise self._no_rows()

    def feature_batches(self) -> list[slice]:
        raise self._no_rows()

    def kernel(self) -> torch.Tensor:
        raise self._no_rows()

    def kernel_columns(self, chosen: torch.Tensor) -> torch.Tensor:
        own = self.own(torch.arange(self.n_samples, device=self.device))
        places = torch.full((self.n_samples,), -1, device=self.device)
        places[own] = torch.arange(len(own), device=self.device)
        places = places[chosen]
        known = self.block_shape[1] + self.n_gates
        batches = row_batches(len(chosen), known * self.dtype.itemsize, _SENT_BYTES)
        if len(batches) == 1:
            return self._local.kernel_with(self._samples_everywhere(places))
        columns = torch.empty(len(own), len(chosen), dtype=self.dtype, device=self.device)
        for some in batches:
            columns[:, some] = self._local.kernel_with(self._samples_everywhere(places[some]))
        return columns

    def _samples_everywhere(self, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the kernel needs to know of some samples, given where they are in this process, or -1."""
        mine = places >= 0
        samples = []
        for part in self._local.kernel_samples(places[mine]):
            samples.append(part.new_zeros(len(mine), *part.shape[1:]))
            samples[-1][mine] = part
        self._group.add_up(*samples)
        return tuple(samples)

    def _no_rows(self) -> UnsupportedError:
        return UnsupportedError("the samples are shared out to several processes, and this needs all of them in one")

    def adjoint_columns(self, columns: Columns, L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = self._local.adjoint_columns(columns, self.own(L))
        left, right = left.contiguous(), right.contiguous()
        self._group.add_up(left, right)
        return left, right

    def apply_columns(self, columns: Columns) -> torch.Tensor:
        return self.whole(self._local.apply_columns(columns))

    def network_outputs(self, columns: Columns) -> torch.Tensor:
        return self.whole(self._local.network_outputs(columns))

    def apply_atoms(self, gate: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.whole(self._local.apply_atoms(gate, u, v).transpose(0, 1).contiguous()).transpose(0, 1)

    def moments(self, weights: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        G, products = self._local.moments(self.own(weights), self.own(targets))
        self._group.add_up(G, products)
        return G, products

    def subset(self, rows: torch.Tensor) -> ShardedOperator:
        if not isinstance(self._own, slice):
            raise self._no_rows()
        mine = ((rows >= self._own.start) & (rows < self._own.stop)).nonzero()[:, 0]
        local = self._local.subset(rows[mine] - self._own.start)
        return ShardedOperator(local, self._group, len(rows), mine)

    def select(self, gates: torch.Tensor) -> ShardedOperator:
        own = None if isinstance(self._own, slice) else self._own
        return ShardedOperator(self._local.select(gates), self._group, self.n_samples, own)

    def predict(self, Z: torch.Tensor, X: np.ndarray) -> torch.Tensor:
        return self._local.predict(Z, X)

    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        """Sums over the samples of all processes, which do not depend on how these are shared out."""
        assert isinstance(self._own, slice)
        sums = torch.zeros(2, dtype=torch.int64, device=self.device)
        rest: list[torch.Tensor] = []
        seen = 0
        for tensor in self._local.data_tensors():
            if seen < self._local.n_samples:
                sums += _checksums(tensor.flatten(1), self._own.start + seen)
                seen += len(tensor)
            else:
                rest.append(tensor)
        self._group.add_up(sums)
        return (sums, *rest)

    def describe(self) -> dict[str, Any]:
        return self._local.describe()


def _checksums(rows: torch.Tensor, first: int) -> torch.Tensor:
    """Two sums over the rows of hashes of their bits and of their numbers, modulo 2^64."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[rows.element_size()]
    bits = rows.contiguous().view(kind).to(torch.int64)
    number = torch.arange(first, first + len(rows), device=rows.device)
    return torch.stack([_hash_rows(bits, number, seed) for seed in (0, 1)])


def _hash_rows(bits: torch.Tensor, number: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randint(2**62, (bits.shape[1] + 2,), generator=generator).to(bits.device) * 2 + 1
    mixed = ((bits ^ (bits >> 29)) * factors[2:]).sum(1)
    mixed = (mixed ^ (mixed >> 31)) * factors[0]
    return ((mixed ^ (mixed >> 27)) * (number * 2 + 1) * factors[1]).sum()
