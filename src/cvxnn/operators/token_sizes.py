"""How large the features of attention are: bounds of norms and of rounding, from the norms of tokens."""

from __future__ import annotations

from functools import cached_property

import torch

from cvxnn.operators.queries import Queries
from cvxnn.patterns import PatchBits

__all__ = ["TokenSizes"]

_EPS = torch.finfo(torch.float64).eps


class TokenSizes:
    """Bounds for the features sum_t w_t x_t[a] sum_t' x_t'[k] x_t'[l] of every row, t' the tokens that t sees.

    They hold for all gates, as each sees some of these tokens.

    Parameters
    ----------
    tokens : torch.Tensor of shape (n, s, d)
    rows : Queries
    allowed : PatchBits or None
        M, (n, m s, 1); None where all valid tokens see one another.
    """

    def __init__(self, tokens: torch.Tensor, rows: Queries, allowed: PatchBits | None) -> None:
        self.tokens, self.rows, self.allowed = tokens, rows, allowed

    def allowed_pairs(self, sequences: slice) -> torch.Tensor:
        """M of some sequences, (n, m, s) bool."""
        assert self.allowed is not None
        return self.allowed.rows(sequences).view(-1, self.rows.shape[1], self.tokens.shape[1])

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pairs of tokens that count: the sequence, the query and the key of each."""
        allowed = self.allowed_pairs(slice(0, len(self.tokens)))
        used = self.rows.used()
        sequence, query, key = (allowed if used is None else allowed & used.unsqueeze(2)).nonzero().T
        return sequence, query, key

    def _row_sums(self, of_keys: torch.Tensor) -> torch.Tensor:
        """sum_t w_t ||x_t|| times the sum over the tokens that t sees of (n, s, j), as (rows, j), rounded up."""
        queries = self.rows.of(self.tokens).double().norm(dim=2)
        everything = slice(0, len(self.tokens))
        if self.allowed is None:
            sums = of_keys.sum(1).unsqueeze(1).expand(-1, queries.shape[1], -1)
        else:
            sums = self.allowed_pairs(everything).double() @ of_keys
        rows = self.rows.collect(
            queries.unsqueeze(2) * sums, everything, None if self.rows.pooled else self.rows.places
        )
        return rows * (1 + 4 * (sum(self.tokens.shape[1:]) + queries.shape[1] + 8) * _EPS)

    @cached_property
    def features(self) -> torch.Tensor:
        """sum_t w_t ||x_t|| sum_t' ||x_t'||^2 of every row, (rows,): not less than the norm of its features."""
        return self._row_sums(self.tokens.double().square().sum(2, keepdim=True))[:, 0]

    @cached_property
    def row_squares(self) -> torch.Tensor:
        """Squares of hidden outputs at unit vectors u, at most, (rows, d)."""
        keys = self.tokens.double()
        return self._row_sums(keys.norm(dim=2, keepdim=True) * keys.abs()).square()

    def row_sizes(self, nu: torch.Tensor) -> torch.Tensor:
        """Norms of what the pairs that count are weighed with in A*(nu)."""
        sequence, query, key = self.pairs()
        everything = slice(0, len(self.tokens))
        norms = self.rows.spread(nu.norm(dim=1), everything, None if self.rows.pooled else self.rows.places)
        return norms[sequence, query] * self.tokens.norm(dim=2)[sequence, key]

    @property
    def _terms(self) -> int:
        """Roundings on the way to an entry of the features, and to a sum over the rows of a sequence."""
        return 2 * self.tokens.shape[1] + self.rows.shape[1] + 8

    @cached_property
    def _underflow(self) -> float:
        """More than underflow can take from a product of three tokens."""
        largest = float(self.tokens.abs().max())
        _, s, d = self.tokens.shape
        return 8 * s**2 * d**3 * torch.finfo(self.tokens.dtype).tiny * (1 + largest)

    def of_adjoint(self, L: torch.Tensor) -> float:
        """Not less than the Frobenius norm of any block of A*(L)."""
        norms = torch.linalg.vector_norm(L.double(), dim=1)
        return float((self.features * norms).sum()) * (1 + 4 * (len(norms) + L.shape[1]) * _EPS)

    def adjoint_rounding(self, L: torch.Tensor) -> float:
        """Bound of the Frobenius norm of the rounding error in any block of A*(L).

        What rounding does to the rows x_t x_t'^T of the cones of ReLU is in it as well: a part of 2^-53 of each term.
        """
        eps = torch.finfo(self.tokens.dtype).eps / 2
        relative = 4 * (self.rows.n_rows + self._terms) * eps
        return relative * self.of_adjoint(L) + self._underflow * float(L.double().abs().sum())

    def apply_rounding(self, n_features: int) -> float:
        """Bound of the Frobenius norm of the rounding error in A(Z) per unit of the norms of the blocks."""
        eps = torch.finfo(self.tokens.dtype).eps / 2
        size = float(torch.linalg.vector_norm(self.features))
        return 4 * (n_features + self._terms) * eps * size + self._underflow
