"""Which rows of the predictions belong to which tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvxnn.operators.tokens import TokenMask

__all__ = ["OUTPUTS", "Queries"]

OUTPUTS = ("mean", "tokens")


@dataclass(frozen=True)
class Queries:
    """m tokens of each of n sequences that the rows of the predictions are made of.

    Attributes
    ----------
    shape : pair of int
        n and m.
    index : torch.Tensor of shape (n, m), or None
        Places of these tokens in their sequences; None where they are all tokens, in order.
    weights : torch.Tensor of shape (n, m), float64, or None
        With weights a row is a weighted sum over the tokens of a sequence.
    places : torch.Tensor of shape (rows,), or None
        Without weights a row is one token: its place among the n m, increasing; None where all are rows.
    """

    shape: tuple[int, int]
    index: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @classmethod
    def of_mask(cls, mask: TokenMask, output: str) -> Queries:
        """A row per sequence, the mean over its valid tokens, or one per valid token."""
        n, s = mask.valid.shape
        if output == "mean":
            valid = mask.valid.double()
            return cls((n, s), weights=valid / valid.sum(1, keepdim=True))
        return cls((n, s), places=None if bool(mask.valid.all()) else mask.valid.flatten().nonzero()[:, 0])

    @property
    def n_rows(self) -> int:
        """Number of rows of the predictions."""
        if self.weights is not None:
            return self.shape[0]
        return self.shape[0] * self.shape[1] if self.places is None else len(self.places)

    @property
    def pooled(self) -> bool:
        """Whether a row is a sum over tokens."""
        return self.weights is not None

    def used(self) -> torch.Tensor | None:
        """Which of the n m tokens any row is made of, bool (n, m); None for all."""
        if self.weights is not None:
            return self.weights != 0
        if self.places is None:
            return None
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.places.device)
        flat[self.places] = True
        return flat.view(self.shape)

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The queries (n, m, d) among tokens (n, s, d)."""
        if self.index is None:
            return tokens
        return torch.gather(tokens, 1, self.index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))

    def sequences(self, rows: slice) -> tuple[slice, torch.Tensor | None]:
        """The sequences that some rows belong to, and the places of the rows among their queries (None: in order)."""
        start, stop, _ = rows.indices(self.n_rows)
        m = self.shape[1]
        if self.pooled or (m == 1 and self.places is None):
            return slice(start, stop), None
        if self.places is None:
            first, last = start // m, -(-stop // m)
            if first * m == start and last * m == stop:
                return slice(first, last), None
            return slice(first, last), torch.arange(start, stop) - first * m
        places = self.places[start:stop]
        first, last = int(places[0]) // m, int(places[-1]) // m + 1
        return slice(first, last), places - first * m

    def rows_of(self, sequences: slice) -> slice:
        """The rows that belong to some sequences."""
        if self.pooled:
            return sequences
        start, stop = sequences.start * self.shape[1], sequences.stop * self.shape[1]
        if self.places is None:
            return slice(start, stop)
        first, last = torch.searchsorted(self.places, torch.tensor([start, stop], device=self.places.device)).tolist()
        return slice(first, last)

    def collect(self, values: torch.Tensor, sequences: slice, places: torch.Tensor | None) -> torch.Tensor:
        """Rows (r, ...) of what belongs to the queries of some sequences, (n, m, ...)."""
        if self.weights is not None:
            weights = self.weights[sequences].to(values.dtype).unsqueeze(1)
            return torch.bmm(weights, values.flatten(2)).view(len(values), *values.shape[2:])
        flat = values.flatten(0, 1)
        return flat if places is None else flat[places]

    def spread(self, values: torch.Tensor, sequences: slice, places: torch.Tensor | None) -> torch.Tensor:
        """The adjoint of :meth:`collect`."""
        n, m = sequences.stop - sequences.start, self.shape[1]
        if self.weights is not None:
            weights = self.weights[sequences].to(values.dtype)
            return weights.view(n, m, *[1] * (values.ndim - 1)) * values.unsqueeze(1)
        if places is None:
            return values.reshape(n, m, *values.shape[1:])
        full = values.new_zeros(n * m, *values.shape[1:])
        full[places] = values
        return full.view(n, m, *values.shape[1:])

    def subset(self, rows: torch.Tensor) -> tuple[Queries, torch.Tensor, torch.Tensor | None]:
        """Some of the rows, the sequences (one per row where a row is a token), and which query each of them takes."""
        m = self.shape[1]
        if self.weights is not None:
            index = None if self.index is None else self.index[rows]
            return Queries((len(rows), m), index, self.weights[rows]), rows, None
        places = rows if self.places is None else self.places[rows]
        sequence, query = places // m, places % m
        index = query if self.index is None else self.index[sequence, query]
        return Queries((len(rows), 1), index.unsqueeze(1)), sequence, query
