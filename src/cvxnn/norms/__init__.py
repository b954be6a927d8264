"""Matrix norms induced by two vector norms: value, dual norm, proximal operator and atoms.

For a vector norm C of the left factors and R of the right factors (Lemma 3.1 and equation 15 of the paper)

    ||Z||_D = max { tr(R^T Z) : u^T R v <= 1 for all ||u||_C <= 1, ||v||_R <= 1 }
            = min { sum_j ||u_j||_C ||v_j||_R : Z = sum_j u_j v_j^T },
    ||G||_D* = max { u^T G v : ||u||_C <= 1, ||v||_R <= 1 }.
"""

from collections.abc import Sequence

from cvxnn.errors import InvalidInputError
from cvxnn.norms.base import MatrixNorm
from cvxnn.norms.nuclear import NuclearNorm
from cvxnn.norms.separable import ColumnSumNorm, RowSumNorm
from cvxnn.norms.signs import SignNorm
from cvxnn.norms.vector import VECTOR_NORMS, VectorNorm

__all__ = [
    "VECTOR_NORMS",
    "ColumnSumNorm",
    "MatrixNorm",
    "NuclearNorm",
    "RowSumNorm",
    "SignNorm",
    "VectorNorm",
    "get_norm",
]


def get_norm(norms: Sequence[str] = ("l2", "l2")) -> MatrixNorm:
    """The matrix norm of a pair of vector norms.

    Parameters
    ----------
    norms : pair of str
        Names of the norms of the left factors (columns of U) and of the right factors (columns of V), each
        one of "l1", "l2", "linf". ("l2", "l2") is the nuclear norm.

    Returns
    -------
    MatrixNorm

    Raises
    ------
    InvalidInputError
        If `norms` is not a pair of known names.
    """
    known = ", ".join(repr(name) for name in VECTOR_NORMS)
    if isinstance(norms, str) or not isinstance(norms, Sequence) or len(norms) != 2:
        raise InvalidInputError(f"norms must be a pair of names from {known}, got {norms!r}.")
    for name in norms:
        if not isinstance(name, str) or name not in VECTOR_NORMS:
            raise InvalidInputError(f"norms contains the unknown name {name!r}; the known names are {known}.")
    left, right = norms
    if left == "l1":
        return RowSumNorm(left, right)
    if right == "l1":
        return ColumnSumNorm(left, right)
    if (left, right) == ("l2", "l2"):
        return NuclearNorm(left, right)
    return SignNorm(left, right)
