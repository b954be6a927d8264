"""State of a run on disk, from which it goes on to the same result."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cvxnn.distributed import Group
from cvxnn.errors import StorageError
from cvxnn.files import read_tensors, write_tensors
from cvxnn.problem import Problem
from cvxnn.solvers.base import Solver

__all__ = ["INTERVAL", "Checkpoint", "Saved", "read_of_first"]

#: Seconds between two checkpoints of a run.
INTERVAL = 30.0


@dataclass
class Saved:
    """What a checkpoint holds."""

    iteration: int
    seconds: float
    trace: list[dict[str, Any]]
    Z: torch.Tensor | None
    intercept: torch.Tensor
    dual: torch.Tensor | None
    solver_state: dict[str, Any]
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    next_check: int | None = None


def fingerprint(problem: Problem, solver: Solver) -> str:
    """Hash of everything that determines a run: data, gates, loss, norm, beta, solver and its options."""
    op = problem.operator
    digest = hashlib.sha256()
    facts = [op.describe(), problem.loss, problem.norm.name, problem.beta, problem.output_bias]
    facts += [solver.name, asdict(solver.options), str(problem.dtype), *solver.run_facts()]
    digest.update(repr(facts).encode())
    for tensor in chain((problem.Y, problem.weights), op.data_tensors()):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    if op.gates is not None:
        digest.update(np.ascontiguousarray(op.gates).data)
    return digest.hexdigest()


def read_of_first(path: Path, kind: str, group: Group | None) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Header and arrays of a file, None where there is none; the first of several processes sends it to the others.

    Raises
    ------
    StorageError
        The file is damaged or of another kind.
    """
    if group is None:
        return read_tensors(path, kind) if path.exists() else None
    data = group.bytes_of_first(path.read_bytes() if group.rank == 0 and path.exists() else None)
    if not data:
        return None
    if group.rank == 0:
        return read_tensors(path, kind)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(data)
        return read_tensors(copy, kind)


def _blocks(best: Any) -> list[tuple[str, torch.Tensor | None]]:
    """What of the best point has rows of gates."""
    U, V = best.factors or (None, None)
    return [("Z", best.Z), ("U", U), ("V", V)]


class Checkpoint:
    """Writes and reads the checkpoint file of one run; of several processes only the first does."""

    def __init__(self, path: str | Path, problem: Problem, solver: Solver) -> None:
        self.path = Path(path)
        self.problem = problem
        self.solver = solver
        self.fingerprint = fingerprint(problem, solver)
        self._last = time.monotonic()
        self.op = problem.operator
        self.group = problem.operator.group
        self._writes = self.group is None or self.group.rank == 0
        if not self._writes:
            return
        if not self.path.parent.is_dir():
            raise StorageError(f"cannot write {self.path}: its folder does not exist")
        if self.path.is_dir():
            raise StorageError(f"cannot write {self.path}: it is a folder; the name of a file is wanted")

    def save_if_due(self, iteration: int, seconds: float, best: Any, state: dict[str, Any], next_check: int) -> None:
        """Write when the interval has passed; where gates are shared out, on the clock of the first process."""
        due = time.monotonic() - self._last >= INTERVAL
        if self.op.shares_gates and self.group is not None:
            due = self.group.of_first(due) > 0
        if due:
            self.save(iteration, seconds, best, state, next_check)

    def save(self, iteration: int, seconds: float, best: Any, state: dict[str, Any], next_check: int) -> None:
        """Write the best point and the state of the solver in one step; all gates are put together first."""
        self._last = time.monotonic()
        whole = self.op.all_gates
        state = {k: whole(v) if k in self.solver.per_gate else v for k, v in state.items()}
        blocks = {name: whole(value) for name, value in _blocks(best) if value is not None}
        if not self._writes:
            return
        numbers = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        arrays = {f"state.{k}": v.cpu().numpy() for k, v in state.items() if isinstance(v, torch.Tensor)}
        for name in ("intercept", "dual"):
            value = getattr(best, name)
            if value is not None:
                arrays[name] = value.cpu().numpy()
        arrays |= {name: value.cpu().numpy() for name, value in blocks.items()}
        finite = [{k: (None if v in (np.inf, -np.inf) else v) for k, v in e.items()} for e in best.trace]
        header = {
            "fingerprint": self.fingerprint,
            "iteration": iteration,
            "seconds": seconds,
            "trace": finite,
            "state": numbers,
            "next_check": next_check,
        }
        write_tensors(self.path, "checkpoint", header, arrays)

    def load(self) -> Saved | None:
        """Read the file; None where there is none yet.

        Raises
        ------
        StorageError
            The file is damaged, or belongs to another problem, solver or set of options.
        """
        found = read_of_first(self.path, "checkpoint", self.group)
        if found is None:
            return None
        header, arrays = found
        if header["fingerprint"] != self.fingerprint:
            raise StorageError(
                f"{self.path} is the checkpoint of another run (other data, beta, solver or options); "
                "give another file, or resume=False to overwrite it"
            )
        device = self.problem.device
        prefix = "state."
        per_gate = {"Z", "U", "V", *(prefix + name for name in self.solver.per_gate)}
        tensors = {
            name: (self.op.own_gates(part) if name in per_gate else part).to(device)
            for name, part in ((name, torch.from_numpy(array)) for name, array in arrays.items())
        }
        state = dict(header["state"])
        state.update({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        trace = [{k: (np.inf if v is None else v) for k, v in e.items()} for e in header["trace"]]
        return Saved(
            iteration=header["iteration"],
            seconds=header["seconds"],
            trace=trace,
            Z=tensors.get("Z"),
            intercept=tensors["intercept"],
            dual=tensors.get("dual"),
            solver_state=state,
            factors=(tensors["U"], tensors["V"]) if "U" in tensors else None,
            next_check=header.get("next_check"),
        )
