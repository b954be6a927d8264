"""The columns of Burer-Monteiro factors as a list, and the same as padded factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvxnn.norms import VECTOR_NORMS

__all__ = ["Columns"]


@dataclass
class Columns:
    """Z_k = sum of u_j v_j^T over the columns j with gate_j = k.

    Attributes
    ----------
    gate : torch.Tensor of shape (r,), integers
    u : torch.Tensor of shape (r, p)
    v : torch.Tensor of shape (r, q)
    """

    gate: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.gate)

    @classmethod
    def from_factors(cls, U: torch.Tensor, V: torch.Tensor) -> Columns:
        """All columns of padded factors (P, p, m) and (P, q, m), zeros included."""
        n_gates, p, m = U.shape
        gate = torch.arange(n_gates, device=U.device).repeat_interleave(m)
        return cls(gate, U.mT.reshape(n_gates * m, p), V.mT.reshape(n_gates * m, V.shape[1]))

    @classmethod
    def from_blocks(cls, Z: torch.Tensor) -> Columns:
        """Balanced singular pairs of every block (P, p, q)."""
        left, values, right = torch.linalg.svd(Z, full_matrices=False)
        root = values.sqrt().unsqueeze(1)
        return cls.from_factors(left * root, right.mT * root).without_zeros()

    @classmethod
    def joined(cls, *parts: Columns) -> Columns:
        """One list of the columns of several."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("gate", "u", "v")))

    def __getitem__(self, chosen: torch.Tensor) -> Columns:
        return Columns(self.gate[chosen], self.u[chosen], self.v[chosen])

    def to(self, like: torch.Tensor) -> Columns:
        """The columns in the type and on the device of a tensor."""
        return Columns(self.gate.to(like.device), self.u.to(like), self.v.to(like))

    def clone(self) -> Columns:
        """A copy of the numbers."""
        return Columns(self.gate, self.u.clone(), self.v.clone())

    def sizes(self, norms: tuple[str, str] = ("l2", "l2")) -> torch.Tensor:
        """||u_j||_C ||v_j||_R, (r,)."""
        return _sizes(self.u, norms[0]) * _sizes(self.v, norms[1])

    def without_zeros(self, tolerance: float = 0.0, norms: tuple[str, str] = ("l2", "l2")) -> Columns:
        """The columns of more than `tolerance` times the largest size."""
        sizes = self.sizes(norms)
        if len(sizes) == 0:
            return self
        return self[sizes > tolerance * sizes.max()]

    def counts(self, n_gates: int) -> torch.Tensor:
        """Number of columns of each gate, (P,)."""
        return torch.bincount(self.gate, minlength=n_gates)

    def factors(self, n_gates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded factors U (P, p, m) and V (P, q, m), m the most columns of a gate and at least 1."""
        order = torch.argsort(self.gate, stable=True)
        gate = self.gate[order]
        counts = self.counts(n_gates)
        m = max(1, int(counts.max()))
        place = torch.arange(len(gate), device=gate.device) - (counts.cumsum(0) - counts)[gate]
        padded = []
        for part in (self.u, self.v):
            full = part.new_zeros(n_gates, m, part.shape[1])
            full[gate, place] = part[order]
            padded.append(full.mT.contiguous())
        return padded[0], padded[1]

    def balanced(self, norms: tuple[str, str] = ("l2", "l2")) -> Columns:
        """The same u_j v_j^T with ||u_j||_C = ||v_j||_R; columns where one side is zero are zero on both."""
        sizes = [_sizes(part, norm) for part, norm in zip((self.u, self.v), norms, strict=True)]
        zero = (sizes[0] == 0) | (sizes[1] == 0)
        left, right = (torch.where(zero, 1.0, size).sqrt() for size in sizes)
        scale = torch.where(zero, 0.0, right / left).unsqueeze(1)
        back = torch.where(zero, 0.0, left / right).unsqueeze(1)
        return Columns(self.gate, self.u * scale, self.v * back)

    def compressed(self, n_gates: int, tolerance: float = 0.0, most: int | None = None) -> Columns:
        """Balanced singular pairs of the same blocks, from the factors alone.

        With l2 norms their penalty is the nuclear norm, the least that any factors of these blocks have.

        Parameters
        ----------
        n_gates : int
        tolerance : float
            Pairs with a singular value of at most `tolerance` times the largest of all are left out.
        most : int, optional
            At most so many pairs per gate are kept, the largest.
        """
        if len(self) == 0:
            return self
        U, V = self.balanced().factors(n_gates)
        QU, RU = torch.linalg.qr(U)
        QV, RV = torch.linalg.qr(V)
        left, values, right = torch.linalg.svd(RU @ RV.mT, full_matrices=False)
        root = values[:, :most].sqrt().unsqueeze(1)
        pairs = Columns.from_factors((QU @ left[:, :, :most]) * root, (QV @ right.mT[:, :, :most]) * root)
        return pairs.without_zeros(tolerance)


def _sizes(columns: torch.Tensor, norm: str) -> torch.Tensor:
    """Norms of rows; squares neither under- nor overflow."""
    largest = columns.abs().amax(1)
    safe = torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    return VECTOR_NORMS[norm].value(columns / safe) * largest
