"""How much memory there is, and a word before work that needs more."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from cvxnn.errors import MemoryShortageError, MemoryWarning

__all__ = ["available_bytes", "check_memory", "in_words", "total_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device, within the limits of the process, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_meminfo("MemAvailable") or _pages("SC_AVPHYS_PAGES") or 2**34]
    used, most = _number(_CGROUP / "memory.current"), _number(_CGROUP / "memory.max")
    if used is not None and most is not None:
        # Cached files count as used, and make room when it is needed.
        limits.append(max(0, most - used) + _cached())
    most = _address_space()
    if most is not None:
        limits.append(max(0, most - _address_space_used()))
    return min(limits)


def total_bytes(device: torch.device) -> int | None:
    """Memory of the device, or the limit of the process if that is less; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    known = (_meminfo("MemTotal") or _pages("SC_PHYS_PAGES"), _number(_CGROUP / "memory.max"), _address_space())
    sizes = [size for size in known if size]
    return min(sizes) if sizes else None


def check_memory(needed: int, device: torch.device, what: str, advice: str = "") -> None:
    """Refuse work that certainly does not fit, and warn of work that may not.

    Parameters
    ----------
    needed : int
        Estimate in bytes.
    device : torch.device
    what : str
        The work, as the beginning of a sentence.
    advice : str
        What would need less, as the end of one.

    Raises
    ------
    MemoryShortageError
        More is needed than the device has.
    """
    most = total_bytes(device)
    end = f"; {advice}" if advice else ""
    if most is not None and needed > most:
        raise MemoryShortageError(f"{what} needs about {in_words(needed)}, and there are {in_words(most)} in all{end}")
    free = available_bytes(device)
    if needed > free:
        warnings.warn(
            f"{what} needs about {in_words(needed)}, and {in_words(free)} are free{end}", MemoryWarning, stacklevel=3
        )


def in_words(size: float) -> str:
    """A number of bytes for people."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.{0 if size >= 10 * 2**power else 1}f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cached() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    except (OSError, ValueError, IndexError):
        return 0


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _address_space_used() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
