"""Convex losses F(T) = sum_i w_i f(t_i, y_i): value, gradient, conjugate, proximal operator, dual points."""

from cvxnn.errors import InvalidInputError
from cvxnn.losses.base import Loss
from cvxnn.losses.cross_entropy import CrossEntropy
from cvxnn.losses.logistic import Logistic
from cvxnn.losses.residual import Huber, Squared

__all__ = ["LOSSES", "CrossEntropy", "Huber", "Logistic", "Loss", "Squared", "get_loss"]

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (Squared, CrossEntropy, Huber, Logistic)}


def get_loss(loss: str | Loss) -> Loss:
    """Loss of a given name, or the loss itself.

    Parameters
    ----------
    loss : str or Loss
        One of the names in ``LOSSES`` (with its default parameters), or a `Loss`, returned as it is.

    Raises
    ------
    InvalidInputError
        Where ``loss`` is neither.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    raise InvalidInputError(f"loss is {loss!r}; wanted one of {', '.join(map(repr, LOSSES))}, or a Loss object.")
