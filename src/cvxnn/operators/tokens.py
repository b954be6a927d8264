"""Sequences of tokens, and masks: which tokens are there, and which see which."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvxnn.errors import InvalidInputError
from cvxnn.validation import as_numbers

__all__ = ["TokenMask", "read_mask", "read_tokens"]


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of n sequences are valid, and which pairs of tokens count.

    Attributes
    ----------
    valid : torch.Tensor of shape (n, s), bool
        The others are padding: their numbers are zeros, and no row of the predictions belongs to them.
    pairs : torch.Tensor of shape (n, s, s) or (1, s, s), bool, or None
        Whether token t (second axis) sees token t' (third axis); None where all valid tokens see one another.
    """

    valid: torch.Tensor
    pairs: torch.Tensor | None = None

    def allowed(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Pairs of valid tokens that see one another in some sequences, bool (rows, s, s)."""
        valid = self.valid[rows]
        both = valid.unsqueeze(2) & valid.unsqueeze(1)
        if self.pairs is None:
            return both
        return both & (self.pairs if len(self.pairs) == 1 else self.pairs[rows])

    def of(self, rows: slice | torch.Tensor) -> TokenMask:
        """The mask of some sequences."""
        shared = self.pairs is None or len(self.pairs) == 1
        return TokenMask(self.valid[rows], self.pairs if shared or self.pairs is None else self.pairs[rows])

    def to(self, device: torch.device) -> TokenMask:
        """The same on a device."""
        return TokenMask(self.valid.to(device), None if self.pairs is None else self.pairs.to(device))


def read_tokens(tokens: Any, mask: Any, name: str = "tokens") -> tuple[np.ndarray, TokenMask]:
    """Tokens (n, s, d), float64, with zeros where there is padding, and the mask.

    Parameters
    ----------
    tokens : array-like of shape (n, s, d)
    mask : array-like of bool, TokenMask or None
        (n, s): valid tokens; (s, s) or (n, s, s): which token (a row) sees which (a column). A token that neither
        sees another nor is seen is padding.

    Raises
    ------
    InvalidInputError
        Wrong shapes, masks that are no bools or that leave a sequence empty, NaN or infinities in valid tokens.
    """
    array = as_numbers(tokens, name)
    if array.ndim != 3 or min(array.shape) == 0:
        raise InvalidInputError(f"{name} has shape {array.shape}; (n, tokens, features) is wanted")
    n, s, _ = array.shape
    found = mask if isinstance(mask, TokenMask) else read_mask(mask, n, s)
    valid = found.valid.numpy()
    empty = np.flatnonzero(~valid.any(1))
    if len(empty):
        raise InvalidInputError(f"mask leaves sequence {empty[0]} without a valid token; at least one is wanted")
    if not np.isfinite(array[valid]).all():
        kind = "NaN" if np.isnan(array[valid]).any() else "infinity"
        raise InvalidInputError(f"{name} contains {kind} in a valid token; finite numbers are wanted")
    return np.where(valid[:, :, None], array, 0.0), found


def read_mask(mask: Any, n: int, s: int) -> TokenMask:
    """The mask of n sequences of s tokens; shapes and errors as for :func:`read_tokens`."""
    if mask is None:
        return TokenMask(torch.ones(n, s, dtype=torch.bool))
    array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    wanted = f"({n}, {s}), ({s}, {s}) or ({n}, {s}, {s})"
    if array.dtype != np.bool_ and np.issubdtype(array.dtype, np.number) and np.isin(array, (0, 1)).all():
        array = array.astype(bool)
    if array.dtype != np.bool_:
        raise InvalidInputError(f"mask has type {array.dtype}; bool, True where a token counts, is wanted")
    if array.shape == (n, s) == (s, s) and array.diagonal().all() and not array.all():
        warnings.warn(
            f"mask has shape {array.shape}, and there are as many sequences as tokens; it is taken to say which tokens "
            f"are valid; for which tokens see which, give it the shape (1, {s}, {s})",
            stacklevel=4,
        )
    if array.shape == (n, s):
        return TokenMask(torch.from_numpy(array.copy()))
    if array.shape not in ((s, s), (1, s, s), (n, s, s)):
        raise InvalidInputError(f"mask has shape {array.shape}; {wanted} is wanted")
    pairs = torch.from_numpy(array.copy()).view(-1, s, s)
    valid = (pairs.any(1) | pairs.any(2)).expand(n, s).contiguous()
    # Where all valid tokens see one another, only the padding counts.
    full = valid.unsqueeze(2) & valid.unsqueeze(1)
    return TokenMask(valid, None if bool((full == pairs).all()) else pairs)
