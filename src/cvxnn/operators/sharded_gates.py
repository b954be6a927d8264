"""Any architecture whose gates are shared out to several processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cvxnn.columns import Columns
from cvxnn.distributed import Group
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.operators.base import Operator

__all__ = ["GateShardedOperator"]


class GateShardedOperator(Operator):
    """A map whose gates are shared out: each process has all samples, and the patterns and blocks of its gates.

    Predictions (n, c) are added up and are whole in every process; blocks, factors and A*(L) are those of the gates of
    the process. Numbers that are sums or maxima over gates go through `over_gates` and `all_gates`, so that solvers
    and certificates take the same decisions in all processes.

    Parameters
    ----------
    local : Operator
        The map of the gates of this process.
    group : Group
    gates : numpy.ndarray
        The gates of all processes, in the shape of the public contract.
    total : int
        Number of gates of all processes.
    """

    has_rows = False
    shares_gates = True

    def __init__(self, local: Operator, group: Group, gates: np.ndarray, total: int) -> None:
        self._plain, self.group = local, group
        self._total = total
        self._own = group.share(total, "gates")
        self.first_gate = self._own.start
        self.architecture, self.activation = local.architecture, local.activation
        self.n_samples, self.n_outputs = local.n_samples, local.n_outputs
        self.block_shape, self.width = local.block_shape, local.width
        self.gates, self.dtype, self.device = gates, local.dtype, local.device
        self.passes_are_dear = local.passes_are_dear
        self.has_kernel_columns = local.has_kernel_columns
        self._sizes: dict[int, int] = {}

    @property
    def _group(self) -> Group:
        assert self.group is not None
        return self.group

    @property
    def plain(self) -> Operator:
        return self._plain

    @property
    def total_gates(self) -> int:
        return self._total

    def over_gates(self, *values: float) -> list[float]:
        return self._group.sums(*values)

    def largest_over_gates(self, value: float) -> float:
        return self._group.largest(value)

    @property
    def counts_common(self) -> bool:
        return self._group.rank == 0

    def all_gates(self, part: torch.Tensor) -> torch.Tensor:
        each = len(part) // self.n_gates
        whole = self._group.gather_rows(part.reshape(self.n_gates, each, *part.shape[1:]), self._total)
        return whole.flatten(0, 1)

    def own_gates(self, whole: torch.Tensor) -> torch.Tensor:
        if len(whole) == self.n_gates:
            return whole
        if len(whole) % self._total:
            raise InvalidInputError(f"there are blocks of {len(whole)} gates; of {self._total}, all gates, are wanted")
        each = len(whole) // self._total
        return whole[self._own.start * each : self._own.stop * each]

    def add_outputs(self, *outputs: torch.Tensor) -> None:
        self._group.add_up(*outputs)

    def once(self, offset: torch.Tensor) -> torch.Tensor:
        return offset if self.counts_common else torch.zeros_like(offset)

    def _added(self, outputs: torch.Tensor) -> torch.Tensor:
        outputs = outputs.contiguous()
        self._group.add_up(outputs)
        return outputs

    def flatten(self, Z: torch.Tensor) -> torch.Tensor:
        return self._plain.flatten(Z)

    def unflatten(self, weights: torch.Tensor) -> torch.Tensor:
        return self._plain.unflatten(weights)

    def split_right(self, v: torch.Tensor) -> torch.Tensor:
        return self._plain.split_right(v)

    def merge_right(self, weights: torch.Tensor) -> torch.Tensor:
        return self._plain.merge_right(weights)

    @property
    def patterns(self) -> torch.Tensor:
        bits = self._plain.patterns.to(torch.uint8).movedim(-1, 0).contiguous()
        return self.all_gates(bits).bool().movedim(0, -1)

    @cached_property
    def _double(self) -> GateShardedOperator:
        return self._with(self._plain.double())

    def double(self) -> GateShardedOperator:
        return self if self.dtype == torch.float64 else self._double

    def _with(self, local: Operator) -> GateShardedOperator:
        assert self.gates is not None
        return GateShardedOperator(local, self._group, self.gates, self._total)

    def apply(self, Z: torch.Tensor) -> torch.Tensor:
        return self._added(self._plain.apply(Z))

    def adjoint(self, L: torch.Tensor) -> torch.Tensor:
        return self._plain.adjoint(L)

    def gate_batches(self) -> list[slice]:
        return self._plain.gate_batches()

    def adjoint_blocks(self, L: torch.Tensor, gates: slice) -> torch.Tensor:
        return self._plain.adjoint_blocks(L, gates)

    @property
    def streams_blocks(self) -> bool:
        return self._plain.streams_blocks

    def adjoint_parts(self, L: torch.Tensor, gate: int) -> Iterator[torch.Tensor]:
        return self._plain.adjoint_parts(L, gate)

    def adjoint_size(self, L: torch.Tensor) -> float:
        return self._plain.adjoint_size(L)

    def adjoint_rounding(self, L: torch.Tensor) -> float:
        """That of the blocks of any process: the largest."""
        return self._group.largest(self._plain.adjoint_rounding(L))

    @property
    def row_squares(self) -> torch.Tensor:
        return self._plain.row_squares

    @property
    def cone_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedError("cones need the gates of all processes in one; ReLU problems are not shared out")

    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        return self._plain.row_sizes(nu)

    @property
    def prediction_norm(self) -> float:
        return self._plain.prediction_norm

    def apply_rounding(self, Z: torch.Tensor) -> float:
        """The errors of all processes, and that of adding up what they have.

        The bound of a process is at least 4 eps times a bound of the norm of its predictions, which the sums round
        once per process.
        """
        (errors,) = self._group.sums(self._plain.apply_rounding(Z))
        return (1 + self._group.size) * errors

    def column_batches(self, n_columns: int) -> list[slice]:
        """As for the process that takes the fewest samples at once, as their predictions are added up."""
        if n_columns not in self._sizes:
            self._sizes[n_columns] = -int(self._group.largest(-self._plain.column_batches(n_columns)[0].stop))
        size = self._sizes[n_columns]
        return [slice(i, min(i + size, self.n_samples)) for i in range(0, self.n_samples, size)]

    def hidden(self, gate: torch.Tensor, u: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._plain.hidden(gate, u, rows)

    def hidden_adjoint(self, gate: torch.Tensor, M: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._plain.hidden_adjoint(gate, M, rows)

    def adjoint_columns(self, columns: Columns, L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._plain.adjoint_columns(columns, L)

    def apply_columns(self, columns: Columns) -> torch.Tensor:
        return self._added(self._plain.apply_columns(columns))

    def network_outputs(self, columns: Columns) -> torch.Tensor:
        return self._added(self._plain.network_outputs(columns))

    def subset(self, rows: torch.Tensor) -> GateShardedOperator:
        return self._with(self._plain.subset(rows))

    def select(self, gates: torch.Tensor) -> Operator:
        raise self._all_needed()

    def kernel(self) -> torch.Tensor:
        """A sum over the gates, which every process has whole."""
        return self._added(self._plain.kernel())

    def kernel_columns(self, chosen: torch.Tensor) -> torch.Tensor:
        return self._added(self._plain.kernel_columns(chosen))

    def features(self, rows: slice) -> torch.Tensor:
        raise self._all_needed()

    def feature_batches(self) -> list[slice]:
        raise self._all_needed()

    def _all_needed(self) -> UnsupportedError:
        return UnsupportedError("the gates are shared out to several processes, and this needs all of them in one")

    def predict(self, Z: torch.Tensor, X: np.ndarray) -> torch.Tensor:
        return self._added(self._plain.predict(self.own_gates(Z), X))

    def data_tensors(self) -> tuple[torch.Tensor, ...]:
        return self._plain.data_tensors()

    def describe(self) -> dict[str, Any]:
        return self._plain.describe()
