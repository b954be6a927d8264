"""The most memory that a piece of work takes."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """The highest memory since this was made: allocated on a GPU, otherwise resident in this process.

    Where the system cannot forget an earlier peak, it is that since the start of the process.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """Bytes, up to now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Not getrusage where this is there: what that says of a new process is the memory of its parent.
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
