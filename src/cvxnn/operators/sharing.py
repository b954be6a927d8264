"""What operators ask of the other processes, where samples or gates are shared out to several."""

from __future__ import annotations

import torch

from cvxnn.distributed import Group

__all__ = ["Sharing"]


class Sharing:
    """Sums, rows and decisions of all processes; here, of one alone.

    :class:`~cvxnn.operators.sharded.ShardedOperator` shares out samples,
    :class:`~cvxnn.operators.sharded_gates.GateShardedOperator` gates; the others are whole in one process.
    """

    #: The processes that the samples are shared out to; None where they are all in this one.
    group: Group | None = None
    #: Whether blocks are those of some gates only, the others being in other processes.
    shares_gates: bool = False
    #: Number of the first gate of this process.
    first_gate: int = 0

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of values (n, ...) that belong to the samples of `local`."""
        return values

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """Rows of all samples from those that belong to the samples of `local`."""
        return part

    def summed(self, value: float, *tensors: torch.Tensor) -> float:
        """Add up what every process has of a sum over the samples: the tensors in place, the value as the result."""
        return value

    def over_gates(self, *values: float) -> list[float]:
        """Add up what every process has of sums over the gates."""
        return list(values)

    def largest_over_gates(self, value: float) -> float:
        """The largest of what every process has of a maximum over the gates."""
        return value

    def agreed(self, flag: bool) -> bool:
        """What process 0 decides: rounding on another kind of machine, clocks and callbacks may say otherwise."""
        return flag if self.group is None else self.group.of_first(flag) > 0

    def common(self, *tensors: torch.Tensor) -> None:
        """Have tensors that all processes have formed alike be those of process 0, in place.

        For what rounding decides, as the singular vectors of values that are equal.
        """
        if self.group is not None:
            if self.group.rank > 0:
                for tensor in tensors:
                    tensor.zero_()
            self.group.add_up(*tensors)

    @property
    def counts_common(self) -> bool:
        """Whether this process adds what all of them have to sums that go over the gates of all."""
        return True

    def all_gates(self, part: torch.Tensor) -> torch.Tensor:
        """Rows of all gates, in order, from those of the gates of this process; as many for each gate."""
        return part

    def own_gates(self, whole: torch.Tensor) -> torch.Tensor:
        """The rows of the gates of this process; rows that are these already stay."""
        return whole

    def add_outputs(self, *outputs: torch.Tensor) -> None:
        """Add up predictions in place, of which every process has what its gates add."""

    def once(self, offset: torch.Tensor) -> torch.Tensor:
        """What a process is to add to predictions before they are added up, so that the offset is in them once."""
        return offset
