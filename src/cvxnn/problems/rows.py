"""Two-layer perceptrons on samples that stay where they are: a scan, gates, and their patterns, in passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from cvxnn.distributed import sample_group
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.gates import draw_gates
from cvxnn.operators import MappedRows, Operator, Rows, RowSource, ShardedOperator, StreamedMLPOperator
from cvxnn.patterns import patch_bits
from cvxnn.problems.distinct import distinct_everywhere
from cvxnn.problems.task import Task
from cvxnn.validation import smallest_squared

__all__ = ["as_row_source", "streamed_operator"]

#: Gates other than Gaussian and given ones are drawn from so many samples, where there are more.
MOST_SAMPLES = 100_000


def as_row_source(X: Any) -> RowSource | None:
    """The source of samples that are not in memory; None for those that are."""
    if isinstance(X, RowSource):
        return X
    if isinstance(X, np.memmap) and X.ndim == 2 and X.dtype.kind in "biuf" and min(X.shape) > 0:
        return MappedRows(X)
    if isinstance(X, (torch.utils.data.DataLoader, torch.utils.data.Dataset)):
        raise InvalidInputError(
            f"X is a {type(X).__name__}, whose samples may differ from pass to pass; "
            "cvxnn.store_rows writes them to a file that can be used"
        )
    return None


def streamed_operator(source: RowSource, task: Task, gates: Any, **sampling: Any) -> tuple[Operator, str]:
    """The operator of samples that are read in passes, of this process' share of them, and its scope.

    Parameters
    ----------
    source : RowSource
    task : Task
        Its samples are checked.
    gates, **sampling
        As for :func:`cvxnn.gates.draw_gates`, but for "enumerate".
    """
    if task.activation == "relu":
        raise UnsupportedError("activation is 'relu', whose cones need X in memory; give an array in place of a file")
    if isinstance(gates, str):
        raise UnsupportedError(f"gates is {gates!r}, for which X must be in memory; give an array in place of a file")
    group = sample_group()
    rows = Rows(source, task.dtype, task.device, task.hidden_bias)
    own = rows if group is None else rows.part(group.share(len(rows)))
    informative = _scan(own, len(rows))
    if not task.gated(gates):
        operator: Operator = StreamedMLPOperator(own, task.n_outputs)
        return (operator if group is None else ShardedOperator(operator, group, len(rows))), "linear_network"

    found, scope = _draw(rows, gates, task.hidden_bias, sampling)
    vectors = torch.from_numpy(found).to(task.device)
    exact = own.double()
    batch = min(own.batches()[0].stop, max(1, 2**26 // (8 * found.shape[1])))
    bits = patch_bits(len(own), lambda part: exact[part].unsqueeze(1), vectors, batch)
    if gates is None:
        kept = _distinct(StreamedMLPOperator(own, task.n_outputs, found, bits), informative)
        if len(kept) < found.shape[1]:
            found, bits = np.ascontiguousarray(found[:, kept]), bits.select(torch.from_numpy(kept).to(task.device))
    operator = StreamedMLPOperator(own, task.n_outputs, found, bits)
    return (operator if group is None else ShardedOperator(operator, group, len(rows))), scope


def _scan(rows: Rows, total: int) -> torch.Tensor:
    """Look at all rows once: refuse what is no finite number of a size that can be used; which are not zero (n,)."""
    kind = str(rows.dtype).removeprefix("torch.")
    largest, informative = 0.0, torch.empty(len(rows), dtype=torch.bool)
    limit = float(np.sqrt(torch.finfo(rows.dtype).max / (total * rows.shape[1])))
    for batch in rows.batches():
        part = rows[batch]
        if not bool(torch.isfinite(part).all()):
            row = batch.start + int((~torch.isfinite(part)).any(1).nonzero()[0])
            raise InvalidInputError(
                f"X has NaN, infinity or a number too large for {kind} in row {row}; finite numbers are wanted"
            )
        largest = max(largest, float(part.abs().max()))
        informative[batch] = part.any(1).cpu()
    # A share of the samples may be small beside the others.
    underflow = len(rows) == total and 0 < largest < smallest_squared(rows.dtype)
    if largest > limit or underflow:
        way = "underflow" if underflow else "overflow"
        raise InvalidInputError(f"X has entries of up to {largest:g}, whose squares {way} in {kind}; rescale it")
    return informative


def _draw(rows: Rows, gates: Any, hidden_bias: bool, sampling: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Gate vectors; those that depend on samples, from a sample of the rows where there are many."""
    blind = gates is not None or (sampling["gate_sampling"] == "gaussian" and sampling["gate_quantile"] is None)
    if blind:
        chosen = torch.zeros(1, dtype=torch.long)
    elif len(rows) <= MOST_SAMPLES:
        chosen = torch.arange(len(rows))
    else:
        index = check_random_state(0).choice(len(rows), MOST_SAMPLES, replace=False)
        chosen = torch.from_numpy(np.sort(index))
    X = rows.double()[chosen].cpu().numpy()
    return draw_gates(X, gates, sampling["n_gates"], hidden_bias, *(sampling[name] for name in _DRAWN))


_DRAWN = ("gate_sampling", "gate_quantile", "random_state")


def _distinct(op: StreamedMLPOperator, informative: torch.Tensor) -> np.ndarray:
    """Gates to keep: the first of each pattern over the samples of all processes, without empty ones."""
    assert op.bits is not None
    group = sample_group()
    kept = distinct_everywhere(op.bits, lambda rows: informative[rows].unsqueeze(1).to(op.device), op.X.batches())
    some = bool(informative.any()) if group is None else group.any(bool(informative.any()))
    if not some:
        return np.arange(1)
    if len(kept) == 0:
        raise InvalidInputError(f"none of the {op.n_gates} gates is active on any sample; draw more gates")
    return kept
