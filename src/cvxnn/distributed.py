"""Samples shared out to processes: who this process is, and sums over all of them (torch.distributed)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cvxnn.errors import DistributedError, InvalidInputError, UnsupportedError

__all__ = ["SHARDS", "TIMEOUT", "Group", "alone", "common_seed", "current_group", "sample_group", "start"]

#: Seconds that a process waits for the others by default.
TIMEOUT = 45.0

#: Bytes up to which tensors are put together to be sent.
_SMALL = 2**20

#: Where the first error of a process is kept for the others, and how many processes have ended after it.
_ERROR, _REPORTS, _ENDED = "cvxnn.error", "cvxnn.reports", "cvxnn.ended"
#: Seconds that the first process, which may keep this, stays for the others after an error.
_FAREWELL = 3.0

#: What can be shared out.
SHARDS = ("samples", "gates")

_group: ContextVar[Group | None] = ContextVar("group", default=None)


class Group:
    """The processes of a run; all of them call the same methods in the same order.

    Attributes
    ----------
    rank : int
        Number of this process, from 0.
    size : int
        Number of processes.
    size_here : int
        Number of processes on this machine.
    shard : {"samples", "gates"}
        What of a problem is shared out.
    device : torch.device
        Where tensors must be to be sent.
    seconds : float
        Time spent in communication so far, waiting for the others included.
    sent : int
        Bytes given to communication so far.
    """

    def __init__(self, device: torch.device, shard: str = "samples", store: dist.Store | None = None) -> None:
        self.shard = shard
        self._store = store
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # torchrun says how many are here; processes that are started otherwise are taken to be on one machine.
        self.size_here = min(self.size, max(1, int(os.environ.get("LOCAL_WORLD_SIZE", self.size))))
        self.device = device
        self.seconds, self.sent = 0.0, 0

    @contextmanager
    def _exchange(self, n_bytes: int) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            # What gloo says, without its line of code and its advice.
            reason = _first_line(error).split(". ")[0].split("] ", 1)[-1]
            cause = self.first_error() or f"one of them has ended or hangs ({reason})"
            raise DistributedError(
                f"process {self.rank} of {self.size} has lost the others after {time.perf_counter() - begin:.0f} s: "
                f"{cause}; {_AGAIN}"
            ) from error
        finally:
            self.seconds += time.perf_counter() - begin
            self.sent += n_bytes

    def report(self, error: BaseException) -> None:
        """Have the others know of an error that ends this process, where none has reported one before."""
        if self._store is None:
            return
        with suppress(RuntimeError):
            if self._store.add(_REPORTS, 1) == 1:
                text = f"process {self.rank} has failed with {_in_words(error)}"
                self._store.set(_ERROR, text)
                # The answer says that it has arrived.
                self._store.get(_ERROR)

    def first_error(self) -> str | None:
        """The first error that a process has reported, in words."""
        with suppress(RuntimeError):
            if self._store is not None and self._store.check([_ERROR]):
                return str(self._store.get(_ERROR).decode())
        return None

    def failed(self, error: Exception) -> DistributedError:
        """The error to raise in place of one that ends this process only; the others are told."""
        self.report(error)
        return DistributedError(f"process {self.rank} of {self.size} has failed with {_in_words(error)}; {_AGAIN}")

    def end(self) -> None:
        """Leave after an error; the first process stays until the others have read of it, as it may keep it."""
        if self._store is None or self.first_error() is None:
            return
        with suppress(RuntimeError):
            ended, last = self._store.add(_ENDED, 1), time.monotonic() + _FAREWELL
            while self.rank == 0 and ended < self.size and time.monotonic() < last:
                time.sleep(0.01)
                ended = self._store.add(_ENDED, 0)

    def share(self, n: int, name: str = "X") -> slice:
        """The samples of this process, of n in all: a range, as long as those of the others or one shorter."""
        if n < self.size:
            raise InvalidInputError(
                f"{name} has {n} rows; at least one for each of the {self.size} processes is wanted"
            )
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def add_up(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over the processes, which is the same in all of them to the last bit."""
        few: list[torch.Tensor] = []
        for tensor in tensors:
            # Large ones are sent as they are, without a copy.
            alone = tensor.numel() * tensor.element_size() > _SMALL and tensor.device == self.device
            if alone and tensor.is_contiguous():
                with self._exchange(tensor.numel() * tensor.element_size()):
                    dist.all_reduce(tensor)
            else:
                few.append(tensor)
        for dtype in {tensor.dtype: None for tensor in few}:
            some = [tensor for tensor in few if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in some]).to(self.device)
            with self._exchange(flat.numel() * flat.element_size()):
                dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def sums(self, *values: float) -> list[float]:
        """Sums of numbers over the processes."""
        total = torch.tensor(values, dtype=torch.float64)
        self.add_up(total)
        return total.tolist()

    def largest(self, value: float) -> float:
        """The largest of the numbers of all processes."""
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        with self._exchange(8):
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.largest(float(flag)) > 0

    def gather_rows(self, part: torch.Tensor, n: int) -> torch.Tensor:
        """The rows (n, ...) of all processes, in order, of which this one has its share."""
        longest = -(-n // self.size)
        padded = part.new_zeros(longest, *part.shape[1:], device=self.device)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._exchange(padded.numel() * padded.element_size()):
            dist.all_gather(parts, padded)
        lengths = [n * (rank + 1) // self.size - n * rank // self.size for rank in range(self.size)]
        return torch.cat([rows[:length] for rows, length in zip(parts, lengths, strict=True)]).to(part.device)

    def gather_bytes(self, keys: list[bytes]) -> list[list[bytes]]:
        """The keys, all of one length and as many in each process, of every process."""
        length = len(keys[0])
        flat = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        with self._exchange(flat.numel()):
            dist.all_gather(parts, flat)
        whole = [part.cpu().numpy().tobytes() for part in parts]
        return [[data[i : i + length] for i in range(0, len(data), length)] for data in whole]

    def of_first(self, number: float) -> float:
        """A number of process 0."""
        value = torch.tensor([float(number)], dtype=torch.float64, device=self.device)
        with self._exchange(8):
            dist.broadcast(value, 0)
        return float(value)

    def bytes_of_first(self, data: bytes | None) -> bytes:
        """Bytes that process 0 has; the others give None."""
        size = int(self.of_first(0 if data is None else len(data)))
        flat = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if data:
            flat.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if size:
            with self._exchange(size):
                dist.broadcast(flat, 0)
        return flat.cpu().numpy().tobytes()

    def check_agreement(self, *values: float) -> None:
        """Refuse to go on where numbers that must be the same in all processes are not.

        Raises
        ------
        DistributedError
            They differ in a bit.
        """
        bits = torch.tensor(values, dtype=torch.float64).view(torch.int64).to(self.device)
        first = bits.clone()
        with self._exchange(8 * len(values)):
            dist.broadcast(first, 0)
        if self.any(not torch.equal(first, bits)):
            raise DistributedError(
                f"the processes disagree about the run: {list(values)} in process {self.rank}, "
                f"{first.view(torch.float64).tolist()} in process 0; the same program, data, options and kind of "
                "machine are wanted in all of them"
            )


#: What to do after an error.
_AGAIN = "start all of them again, with resume=True where there is a checkpoint"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _in_words(error: BaseException) -> str:
    # torch.linalg.LinAlgError calls itself _LinAlgError.
    return f"{type(error).__name__.lstrip('_')}: {_first_line(error)}"


def current_group() -> Group | None:
    """The processes that new problems are shared out to; None outside of :func:`start`."""
    return _group.get()


def sample_group() -> Group | None:
    """The processes that the samples of new problems are shared out to; None where each has all samples."""
    group = _group.get()
    return group if group is not None and group.shard == "samples" else None


def common_seed(random_state: Any) -> Any:
    """The seed given, or one of process 0 where several processes are to draw the same and none is given."""
    group = current_group()
    if group is None or random_state is not None:
        return random_state
    return int(group.of_first(np.random.randint(2**31)))  # noqa: NPY002


@contextmanager
def alone() -> Iterator[None]:
    """Within, problems are not shared out: every process has all of the samples."""
    token = _group.set(None)
    try:
        yield
    finally:
        _group.reset(token)


@contextmanager
def start(
    *,
    shard: str = "samples",
    device: Any = "cpu",
    timeout: float = TIMEOUT,
    init_method: str | None = None,
    rank: int | None = None,
    size: int | None = None,
) -> Iterator[Group]:
    """Share the samples, or the gates, of all problems made within out to the processes that ``torchrun`` has started.

    Every process runs the same program on the same data, keeps what is its share, and gets the same results. Sums
    over samples or gates are sent by gloo on the CPU and by NCCL between GPUs.

    Parameters
    ----------
    shard : {"samples", "gates"}
        "samples" for many samples: a process keeps a range of the rows. "gates" for many gates: a process keeps all
        samples, and the patterns, blocks and factors of a range of the gates.
    device : {"cpu", "cuda"}
        Of the problems; with "cuda" the process uses GPU ``LOCAL_RANK``.
    timeout : float
        Seconds after which a process that does not answer is given up. Passes over the samples of two processes
        must not differ by more.
    init_method, rank, size : optional
        How processes that ``torchrun`` has not started find each other, as in
        ``torch.distributed.init_process_group``; by default from the environment.

    Yields
    ------
    Group
        `rank`, `size`, and the `seconds` spent in communication.

    Raises
    ------
    DistributedError
        The processes do not find each other.
    InvalidInputError
        An unknown `shard`.
    UnsupportedError
        A group within a group, or a torch without torch.distributed.
    """
    if current_group() is not None:
        raise UnsupportedError("the samples are shared out already; one group of processes at a time is wanted")
    if shard not in SHARDS:
        raise InvalidInputError(f"shard is {shard!r}; one of {', '.join(map(repr, SHARDS))} is wanted")
    if not dist.is_available():
        raise UnsupportedError("this build of torch has no torch.distributed")
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    place = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    ours = not dist.is_initialized()
    store = None
    if ours:
        store = _initialise("nccl" if kind == "cuda" else "gloo", timeout, init_method, rank, size)
    group = Group(place, shard, store)
    token = _group.set(group)
    previous = _end_on_sigterm()
    try:
        yield group
    except Exception as error:
        if not isinstance(error, DistributedError):
            group.report(error)
        raise
    finally:
        _group.reset(token)
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
        if ours and dist.is_initialized():
            # This is when the others see that the process has gone.
            dist.destroy_process_group()
            group.end()


def _initialise(
    backend: str, timeout: float, init_method: str | None, rank: int | None, size: int | None
) -> dist.Store:
    """Find the other processes; what they can leave words in for one another."""
    if init_method is None and "RANK" not in os.environ:
        raise InvalidInputError(
            "this process was not started as one of several: 'torchrun --nproc-per-node=N ...' is wanted, "
            "or init_method, rank and size"
        )
    patience = timedelta(seconds=timeout)
    place = (init_method or "env://", -1 if rank is None else rank, -1 if size is None else size)
    try:
        store, rank, size = next(iter(dist.rendezvous(*place, timeout=patience)))
        store.set_timeout(patience)
        # As init_process_group does, which does not tell of its store.
        inner = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=inner, timeout=patience, rank=rank, world_size=size)
        return store
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"the processes have not found each other within {timeout:g} s: {error}") from error


def _end_on_sigterm() -> Any:
    """Have SIGTERM, which torchrun sends when another process has ended, end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, interrupt)
