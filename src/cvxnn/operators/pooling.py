"""Linear pooling of a feature map: average pooling to a grid, or any matrix P_a (math section 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cvxnn.errors import InvalidInputError
from cvxnn.validation import as_matrix

__all__ = ["Support", "grid_pooling", "pooling_matrix"]


def pooling_matrix(pooling: Any, grid: tuple[int, int]) -> torch.Tensor:
    """The matrix P_a (a, K) of a pooling of maps of `grid` = (rows, columns), K positions in row-major order.

    Parameters
    ----------
    pooling : int, pair of int, or array-like of shape (a, K)
        An output grid, as in adaptive average pooling, or the matrix itself.
    grid : pair of int

    Raises
    ------
    InvalidInputError
        A grid larger than the map, or a matrix with another number of columns.
    """
    n_positions = grid[0] * grid[1]
    array = np.asarray(pooling) if not isinstance(pooling, torch.Tensor) else pooling
    if array.ndim == 2:
        matrix = as_matrix(pooling, "pooling")
        if matrix.shape[1] != n_positions:
            raise InvalidInputError(
                f"pooling has {matrix.shape[1]} columns; {n_positions}, one per position of the {grid[0]} x {grid[1]} "
                "map, are wanted"
            )
        return torch.from_numpy(matrix.copy())
    cells = (pooling, pooling) if array.ndim == 0 else tuple(pooling)
    whole = all(isinstance(cell, (int, np.integer)) and not isinstance(cell, bool) and cell >= 1 for cell in cells)
    if len(cells) != 2 or not whole:
        raise InvalidInputError(f"pooling is {pooling!r}; a grid such as (2, 2), or a matrix, is wanted")
    if cells[0] > grid[0] or cells[1] > grid[1]:
        raise InvalidInputError(
            f"pooling is {cells[0]} x {cells[1]}; at most {grid[0]} x {grid[1]}, the size of the map, is wanted"
        )
    return grid_pooling((int(cells[0]), int(cells[1])), grid)


def grid_pooling(cells: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Adaptive average pooling as a matrix: cell i covers floor(i H / a) to ceil((i + 1) H / a)."""
    sides = []
    for n_cells, size in zip(cells, grid, strict=True):
        side = torch.zeros(n_cells, size, dtype=torch.float64)
        for i in range(n_cells):
            start, stop = i * size // n_cells, -(-(i + 1) * size // n_cells)
            side[i, start:stop] = 1 / (stop - start)
        sides.append(side)
    return torch.kron(sides[0], sides[1])


class Support:
    """The non-zero entries of a pooling matrix, row by row, padded to the longest.

    Attributes
    ----------
    index : torch.Tensor of shape (a, s)
        Positions that each cell pools.
    weights : torch.Tensor of shape (a, s)
        Their weights, 0 behind the last.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        used = matrix != 0
        length = max(1, int(used.sum(1).max()))
        order = torch.argsort(used.to(torch.int8), dim=1, descending=True, stable=True)[:, :length]
        self.index = order
        self.weights = matrix.gather(1, order)

    @property
    def length(self) -> int:
        """The most positions s of a cell."""
        return self.index.shape[1]
