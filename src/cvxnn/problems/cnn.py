"""Two-layer CNNs with linear pooling as training problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cvxnn.distributed import common_seed
from cvxnn.losses import Loss
from cvxnn.operators import FEATURES, CNNOperator, Operator, PatchGeometry, ShardedOperator, pooling_matrix
from cvxnn.operators.shared_images import SharedImages
from cvxnn.operators.sources import ImageSource
from cvxnn.problem import Problem
from cvxnn.problems.patch_gates import PatchGates, choose_patch_gates
from cvxnn.problems.task import read_task
from cvxnn.validation import as_images, check_choice, check_pair, check_range

__all__ = ["cnn_problem"]


def cnn_problem(
    images: Any,
    Y: Any,
    *,
    activation: str = "gated_relu",
    filter_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    pooling: Any = (2, 2),
    gates: Any = None,
    n_gates: int = 100,
    beta: float = 1e-2,
    loss: str | Loss = "squared",
    reduction: str = "mean",
    hidden_bias: bool = False,
    output_bias: bool = False,
    norms: tuple[str, str] = ("l2", "l2"),
    sample_weight: Any = None,
    gate_sampling: str = "gaussian",
    gate_quantile: float | Sequence[float] | None = None,
    max_cells: int | None = None,
    features: str = "auto",
    random_state: Any = 0,
    dtype: Any = "float64",
    device: Any = "cpu",
) -> Problem:
    """The training problem of a two-layer CNN in convex form (equations (23), (127) and (130)).

    The network convolves with filters u_j, gates, pools linearly and ends in a fully connected layer:
    ``f(X_i) = sum_j V_j P_a D^(i) X_i u_j``, X_i the patches of image i (Lemmas 3.7 and B.2).

    Parameters
    ----------
    images : array-like of shape (n, channels, H, W) or ImageSource
        Numbers as they are to be used: nothing is scaled. A source, read in batches, has its own type and device,
        which count in place of `dtype` and `device`; it may hold a share of the images.
    Y : array-like of shape (n,) or (n, c)
        As for :func:`cvxnn.mlp_problem`.
    activation : {"linear", "gated_relu", "relu"}
        "linear" has one block and no gates. With "relu" the filters of gate k are constrained to the cone
        (2 D_k^(i) - I) X_i u >= 0 for all i (24), and solutions are plain ReLU networks.
    filter_size, stride, padding : int or pair of int
        Of the convolution: height and width. Padding is by zeros.
    pooling : int, pair of int, or array-like of shape (a, K)
        An output grid, as in adaptive average pooling ((1, 1) is global average pooling), or any matrix P_a over
        the K positions of the map in row-major order.
    gates : array-like of shape (h, P), PatchGates, "enumerate" or None
        Gate vectors over patches of length h = channels * height * width of the filter (channel by channel, as in
        ``torch.nn.functional.unfold``), plus 1 with `hidden_bias`; kept in order and number. "enumerate" takes one
        for every open cell of the arrangement of all patches (small rank only); None draws `n_gates`. PatchGates, of
        :func:`cvxnn.problems.patch_gates.choose_patch_gates`, hold the patterns on these images as well.
    n_gates : int
        Number of draws; equal patterns are merged and patterns without an active patch dropped.
    beta, loss, reduction, norms, sample_weight
        As for :func:`cvxnn.mlp_problem`.
    hidden_bias : bool
        Append a one to every patch, seen by the gates and penalised.
    output_bias : bool
        An intercept per output, unpenalised and minimised out.
    gate_sampling : {"gaussian", "differences", "whitened", "kmeans"}
        How gates are drawn: normal vectors, differences of pairs of patches, whitened patches, or the centres of
        their clusters.
    gate_quantile : float in (0, 1), or several, optional
        Threshold of drawn gates: each is active on a fraction 1 - quantile of the patches; several are taken in
        turn. Needs `hidden_bias`.
    max_cells : int, optional
        Limit of "enumerate"; more cells are refused.
    features : {"auto", "cached", "recomputed"}
        Whether the pooled gated patches, n P a h numbers that do not depend on the weights, are kept in memory, or
        formed in batches again in every pass; both agree to rounding. "auto" keeps them up to 1 GiB.
    random_state : int, RandomState or None
    dtype : {"float64", "float32"}
        Working type of the solvers. The images are rounded to it once; gates and certificates are computed in
        float64 for exactly the rounded images.
    device : str
        "cpu", "cuda" or "auto".

    Returns
    -------
    Problem
        Its blocks Z_k are h x (c a), column index output * a + cell; ``patterns`` are (n, K, P).

    Raises
    ------
    InvalidInputError
        Wrong shapes or values, NaN or infinities, only one class, a filter or a grid larger than the images.
    UnsupportedError
        Too many cells to enumerate, or norms that ReLU is not available for.

    Examples
    --------
    >>> import cvxnn
    >>> from sklearn.datasets import load_digits
    >>> data = load_digits()
    >>> images = data.images[:200, None] / 16
    >>> problem = cvxnn.cnn_problem(images, data.target[:200], n_gates=10, beta=1e-2)
    >>> cvxnn.solve(problem, tol=1e-4).status
    'certified'
    """
    if isinstance(images, ImageSource):
        dtype, device = images.dtype, images.device
    random_state = common_seed(random_state)
    task = read_task(
        Y, activation, beta, loss, reduction, norms, sample_weight, hidden_bias, output_bias, dtype, device
    )
    check_choice(features, "features", FEATURES)
    geometry = PatchGeometry(
        check_pair(filter_size, "filter_size", 1),
        check_pair(stride, "stride", 1),
        check_pair(padding, "padding", 0),
        task.hidden_bias,
    )
    data = images if isinstance(images, ImageSource) else as_images(images, "images")
    task.check_samples(len(data))
    grid = geometry.grid(*data.shape[2:])
    pool = pooling_matrix(pooling, grid)
    tensor = data if isinstance(data, ImageSource) else torch.tensor(data, dtype=task.dtype).to(task.device)
    if isinstance(tensor, torch.Tensor):
        # Patches with a one are not small.
        check_range(tensor, "images", least=0.0 if task.hidden_bias else None)

    held = tensor.local if isinstance(tensor, SharedImages) else tensor
    arguments = held, task.n_outputs, geometry, pool
    if not task.gated(gates):
        return task.problem(_shared(CNNOperator(*arguments, features=features), tensor), "linear_network")
    found = gates
    if not isinstance(found, PatchGates):
        found = choose_patch_gates(
            tensor, geometry, gates, n_gates, gate_sampling, gate_quantile, max_cells, random_state, activation
        )
    operator = CNNOperator(*arguments, found.gates, found.bits, activation, features)
    return task.problem(_shared(operator, tensor), found.scope, found.coverage)


def _shared(operator: CNNOperator, images: torch.Tensor | ImageSource) -> Operator:
    """The operator of the images of all processes, where they are shared out already."""
    return ShardedOperator(operator, images.group, len(images)) if isinstance(images, SharedImages) else operator
