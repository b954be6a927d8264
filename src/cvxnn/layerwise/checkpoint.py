"""The folder of a layerwise run: a file per finished stage, and one of the stage in training."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cvxnn.distributed import Group
from cvxnn.errors import InvalidInputError, StorageError
from cvxnn.files import write_tensors
from cvxnn.layerwise.network import TrainedStage
from cvxnn.layerwise.packing import pack_stage, unpack_stage
from cvxnn.layerwise.results import StageResult
from cvxnn.solvers.checkpoint import read_of_first

__all__ = ["RunFolder", "run_fingerprint"]


def run_fingerprint(arrays: list[np.ndarray], facts: list[Any]) -> str:
    """Hash of the data and of what all stages share."""
    digest = hashlib.sha256(repr(facts).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class RunFolder:
    """Writes and reads the files of one run; every file is written whole or not at all.

    Of several processes only the first writes and reads; it sends the others what it has read.

    Parameters
    ----------
    path : path
        A folder that exists, or whose parent does.
    fingerprints : list of str
        What determines stage 1, stages 1 and 2, ...: a run with more stages goes on from one with fewer.
    group : Group, optional
        The processes of the run.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprints: list[str], group: Group | None = None) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fsdecode(path) or "\0" in os.fsdecode(path):
            raise InvalidInputError(f"checkpoint is {path!r}; the path of a folder is wanted")
        self.path = Path(os.fsdecode(path))
        self.fingerprints = fingerprints
        self.group = group
        self._writes = group is None or group.rank == 0
        if not self._writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise StorageError(f"cannot write into {self.path}: it is a file; the name of a folder is wanted")
        try:
            self.path.mkdir(exist_ok=True)
            # Told now, and not after the first epoch.
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def stage_file(self, number: int) -> Path:
        """File of a finished stage."""
        return self.path / f"stage-{number}.safetensors"

    def solver_file(self, number: int) -> Path:
        """File of the convex solver of a stage."""
        return self.path / f"solver-{number}.safetensors"

    @property
    def training_file(self) -> Path:
        """File of the stage in training by SGD."""
        return self.path / "training.safetensors"

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        if not self._writes:
            return
        for pattern in ("stage-*.safetensors", "solver-*.safetensors", "training.safetensors"):
            for file in self.path.glob(pattern):
                file.unlink()

    def save_stage(self, result: StageResult, stage: TrainedStage, seed: int) -> None:
        """Write a finished stage; what was kept of its training is removed."""
        if not self._writes:
            return
        arrays: dict[str, np.ndarray] = {}
        header = {"stage": pack_stage(stage, arrays, "stage"), "result": result.to_dict()}
        self._write(self.stage_file(result.number), result.number, seed, header, arrays)
        self.training_file.unlink(missing_ok=True)
        self.solver_file(result.number).unlink(missing_ok=True)

    def load_stage(self, number: int) -> tuple[StageResult, TrainedStage, int] | None:
        """A finished stage and the seed of its run; None where it is not there.

        Raises
        ------
        StorageError
            The file is damaged, or belongs to another run.
        """
        loaded = self._read(self.stage_file(number), number)
        if loaded is None:
            return None
        header, arrays = loaded
        try:
            stage = unpack_stage(header["stage"], arrays, "stage")
            return StageResult.from_dict(header["result"]), stage, int(header["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.stage_file(number)} holds no stage that can be restored: {error}") from error

    def save_training(self, number: int, seed: int, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Write the state of a stage after an epoch."""
        self._write(self.training_file, number, seed, header | {"number": number}, arrays)

    def load_training(self, number: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """The state of a stage after an epoch; None where it is not there.

        Raises
        ------
        StorageError
            The file is damaged, or belongs to another run.
        """
        found = read_of_first(self.training_file, "layerwise", self.group)
        if found is None:
            return None
        header, arrays = found
        held = header.get("number")
        if isinstance(held, int) and 1 <= held < number and header.get("fingerprint") == self.fingerprints[held - 1]:
            # Left behind when the run was killed just after that stage was finished.
            return None
        self._check(self.training_file, header, number)
        return header, arrays

    def seed(self) -> int | None:
        """The seed that a run was begun with; None where there is no run."""
        for file in (self.stage_file(1), self.training_file):
            loaded = self._read(file, 1)
            if loaded is not None:
                return int(loaded[0]["seed"])
        return None

    def _write(self, file: Path, number: int, seed: int, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        if not self._writes:
            return
        facts = {"fingerprint": self.fingerprints[number - 1], "seed": seed}
        write_tensors(file, "layerwise", header | facts, arrays)

    def _read(self, file: Path, number: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        found = read_of_first(file, "layerwise", self.group)
        if found is not None:
            self._check(file, found[0], number)
        return found

    def _check(self, file: Path, header: dict[str, Any], number: int) -> None:
        if header.get("fingerprint") != self.fingerprints[number - 1]:
            raise StorageError(
                f"{file} is the checkpoint of another run (other data or options); give another folder, or "
                "resume=False to overwrite it"
            )
