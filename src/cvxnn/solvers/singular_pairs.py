"""Singular pairs of the blocks of all gates as bases of small systems (:mod:`cvxnn.solvers.spectral`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cvxnn.columns import Columns
from cvxnn.operators import Operator

__all__ = ["Frames", "PairProducts"]


@dataclass
class Frames:
    """Orthonormal bases of the blocks of some gates, the same in all processes: U_k (p, r) and V_k^T (r, q).

    Attributes
    ----------
    gates : torch.Tensor of shape (K,)
        Their numbers among all.
    left : torch.Tensor of shape (K, p, r)
    right : torch.Tensor of shape (K, r, q)
    used : torch.Tensor of shape (K, r), bool
        The pairs that count.
    """

    gates: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    used: torch.Tensor

    @classmethod
    def of(cls, op: Operator, left: torch.Tensor, right: torch.Tensor, used: torch.Tensor) -> Frames:
        """From the singular vectors of the gates of this process, and the pairs (P, r) in use of all gates."""
        gates = used.any(1).nonzero()[:, 0]
        places, mine = _own(op, gates)
        parts = []
        for part in (left, right):
            parts.append(part.new_zeros(len(gates), *part.shape[1:]))
            parts[-1][mine] = part[places]
        if op.shares_gates:
            op.add_outputs(*parts)
        else:
            op.common(*parts)
        return cls(gates, parts[0], parts[1], used[gates])

    def columns(self) -> Columns:
        """The pairs in use, in the order of the gates."""
        frame, slot = self.used.nonzero().unbind(1)
        return Columns(self.gates[frame], self.left[frame, :, slot], self.right[frame, slot])

    def hidden(self, op: Operator, columns: Columns) -> torch.Tensor:
        """Hidden outputs (n, s) of the columns for the samples of this process."""
        places, mine = _own(op, columns.gate)
        found = op.local.hidden(places, columns.u[mine], slice(None))
        if len(places) < len(columns):
            hidden = found.new_zeros(len(found), len(columns))
            hidden[:, mine] = found
            found = hidden
        op.add_outputs(found)
        return found

    def blocks(self, S: torch.Tensor) -> torch.Tensor:
        """The blocks (K, r, r) of a matrix (s, s) between the columns; zero where pairs do not count."""
        frame, slot = self.used.nonzero().unbind(1)
        i, j = (frame[:, None] == frame[None, :]).nonzero().unbind(1)
        blocks = S.new_zeros(len(self.used), self.used.shape[1], self.used.shape[1])
        blocks[frame[i], slot[i], slot[j]] = S[i, j]
        return blocks

    def product(self, op: Operator, blocks: torch.Tensor) -> torch.Tensor:
        """U_k S_k V_k^T for the gates of this process, (P, p, q); zero where there is no frame."""
        places, mine = _own(op, self.gates)
        Z = blocks.new_zeros(op.block_shape)
        Z[places] = self.left[mine] @ blocks[mine] @ self.right[mine]
        return Z

    def leading(self, counts: torch.Tensor) -> Frames:
        """With only the first so many (K,) of the pairs of each gate."""
        first = torch.arange(self.used.shape[1], device=counts.device) < counts.unsqueeze(1)
        return Frames(self.gates, self.left, self.right, self.used & first)

    def ranks(self, op: Operator) -> torch.Tensor:
        """Number of pairs in use of every gate of this process, (P,)."""
        places, mine = _own(op, self.gates)
        ranks = places.new_zeros(op.n_gates)
        ranks[places] = self.used.sum(1)[mine]
        return ranks


def _own(op: Operator, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of those of some gates that this process has among its own, and which these are."""
    places = gates - op.first_gate
    mine = (places >= 0) & (places < op.n_gates)
    return places[mine], mine


class PairProducts:
    """The matrices E_ij = h_i v_j^T + h_j v_i^T of pairs i >= j of columns of one gate, with hidden outputs h (n, s).

    They are scaled such that weights of E_ij are coordinates of symmetric matrices in an orthonormal basis.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns, gate = columns, columns.gate
        self.i, self.j = (gate[:, None] == gate[None, :]).tril().nonzero().unbind(1)
        self.diagonal = self.i == self.j
        self.scale = torch.full_like(columns.u[self.i, 0], math.sqrt(0.5))
        self.scale[self.diagonal] = 0.5

    def gram(self, metric: torch.Tensor) -> torch.Tensor:
        """<E, M E> for all pairs, where metric (s, s) is <h, M h>."""
        i, j = self.i, self.j
        right = self.columns.v @ self.columns.v.T
        # Whole rows are gathered: entries of rows take several times as long.
        of_i, of_j = metric[:, i], metric[:, j]
        right_i, right_j = right[:, i], right[:, j]
        total = of_i[i].mul_(right_j[j])
        total.addcmul_(of_i[j], right_j[i]).addcmul_(of_j[i], right_i[j]).addcmul_(of_j[j], right_i[i])
        return total.mul_(self.scale).mul_(self.scale[:, None])

    def coordinates(self, products: torch.Tensor) -> torch.Tensor:
        """<E_ij, L> for all pairs, from the products <h_i v_j^T, L> (s, s)."""
        return (products[self.i, self.j] + products[self.j, self.i]) * self.scale

    def matrix(self, weights: torch.Tensor) -> torch.Tensor:
        """The symmetric matrix (s, s) between all columns that has these coordinates."""
        S = weights.new_zeros(len(self.columns), len(self.columns))
        S[self.i, self.j] += weights * self.scale
        S[self.j, self.i] += weights * self.scale
        return S
