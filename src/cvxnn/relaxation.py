"""The gated relaxation of ReLU problems, and ReLU networks from gated solutions by cone decomposition.

With u and w in the cone of gate k, D_k X (u - w) = (X u)_+ - (X w)_+: the gated ReLU problem is the ReLU problem (19)
without its cones. For the same gates its optimum is a lower bound of that of the ReLU problem, as the columns of a
ReLU point with blocks Z_k = sum_j u_kj v_kj^T cost at least ||Z_k||_*. In the other direction every block of a gated
solution is split into columns in the cone (Mishkin, Sahiner, Pilanci 2022, "Fast convex optimization for two-layer
ReLU networks"): the predictions on the training data stay, the penalty grows, and the objective bounds the ReLU
optimum from above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cvxnn.certificates import Certificate, certify, evaluate
from cvxnn.columns import Columns
from cvxnn.cones import Cones, decompose
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.networks import Network, build_network
from cvxnn.operators import MLPOperator
from cvxnn.problem import Problem
from cvxnn.solvers import Result
from cvxnn.validation import check_choice

__all__ = ["ReluDecomposition", "gated_relaxation", "to_relu"]

METHODS = ("exact", "approximate")
#: What the scope of one problem is called in the other; the rest keep their names.
_RELU_SCOPES = {"all_gates": "relu_network"}
_GATED_SCOPES = {relu: gated for gated, relu in _RELU_SCOPES.items()}
_NEGLIGIBLE = 1e-14  # singular values below this fraction of the largest are zero


@dataclass(frozen=True)
class ReluDecomposition:
    """A ReLU network that predicts what a gated network predicts on the training data.

    Attributes
    ----------
    problem : Problem
        The ReLU problem with the data and gates of the gated one.
    factors : pair of torch.Tensor
        (U, V) of shapes (P, d, m) and (P, c, m) in float64, balanced, every column of U in the cone of its gate;
        a warm start: ``solve(decomposition.problem, init=decomposition.factors)``.
    intercept : torch.Tensor of shape (c,)
    certificate : Certificate
        Of these factors, as a point of `problem`; its lower bound is no worse than that of the gated result.
    method : {"exact", "approximate"}
    gated_objective, gated_penalty : float
        Objective and penalty of the gated point.
    """

    problem: Problem
    factors: tuple[torch.Tensor, torch.Tensor]
    intercept: torch.Tensor
    certificate: Certificate
    method: str
    gated_objective: float
    gated_penalty: float

    @property
    def objective(self) -> float:
        """Objective of the ReLU network, an upper bound of the optimum of `problem`."""
        return self.certificate.primal

    @property
    def ratio(self) -> float:
        """Penalty of the ReLU network over that of the gated point: what the cones cost; 1 where both are zero."""
        return self.certificate.penalty / self.gated_penalty if self.gated_penalty > 0 else 1.0

    @property
    def n_neurons(self) -> int:
        """Number of neurons of the network."""
        return len(Columns.from_factors(*self.factors).without_zeros())

    def network(self, dtype: torch.dtype | None = None) -> Network:
        """The ReLU network as a module; `dtype` is the type of its weights, by default that of the problem."""
        return build_network(self.problem, None, self.intercept, factors=self.factors, dtype=dtype)

    def __repr__(self) -> str:
        return (
            f"ReluDecomposition(method={self.method!r}, objective={self.objective:.8g}, "
            f"gated_objective={self.gated_objective:.8g}, ratio={self.ratio:.4g}, n_neurons={self.n_neurons})"
        )


def gated_relaxation(problem: Problem) -> Problem:
    """The gated ReLU problem with the data, gates and beta of a ReLU problem: the same without cones.

    Its optimum, and so every lower bound of it, is at most the optimum of the ReLU problem.

    Parameters
    ----------
    problem : Problem
        With activation "relu".

    Returns
    -------
    Problem
        With activation "gated_relu"; the scope "relu_network" becomes "all_gates".

    Raises
    ------
    InvalidInputError
        `problem` is no ReLU problem.
    """
    if not isinstance(problem, Problem) or problem.cones is None:
        raise InvalidInputError(f"problem is {_name(problem)}; a ReLU problem is wanted")
    return _with_activation(problem, "gated_relu", _GATED_SCOPES)


def to_relu(
    point: Result | Problem,
    Z: Any = None,
    *,
    factors: tuple[Any, Any] | None = None,
    intercept: Any = None,
    method: str = "exact",
) -> ReluDecomposition:
    """A ReLU network with the predictions of a gated solution on the training data.

    The singular pairs sigma u v^T of each block, or its columns, whichever cost less, become neurons (a, v) and
    (b, -v) with sigma u = a - b, a and b in the cone of the gate.

    Parameters
    ----------
    point : Result or Problem
        A result for a gated ReLU problem, or the problem and one of its points in `Z` or `factors`.
    Z : array-like of shape (P, d, c), optional
    factors : pair (U, V), shapes (P, d, m) and (P, c, m), optional
    intercept : array-like of shape (c,), optional
        The output bias of the point; minimised out where none is given.
    method : {"exact", "approximate"}
        "exact" minimises ||a|| + ||b|| for each pair: with one output no network with these blocks is cheaper.
        "approximate" minimises ||a||^2 + ||b||^2, which is faster, and costs at most sqrt(2) times as much.

    Returns
    -------
    ReluDecomposition

    Raises
    ------
    InvalidInputError
        `point` is none of a gated ReLU problem; a block is not a difference of two points of its cone, as the cone
        of its gate has no interior (the gate is named).
    UnsupportedError
        Norms other than ("l2", "l2").

    Notes
    -----
    New samples may fall between the cells of the training data: there the ReLU network differs from the gated one.

    Examples
    --------
    >>> import cvxnn
    >>> from cvxnn.datasets import spiral
    >>> from cvxnn.relaxation import to_relu
    >>> X, y = spiral(60)
    >>> result = cvxnn.solve(cvxnn.mlp_problem(X, y, n_gates=20, beta=1e-3))
    >>> decomposition = to_relu(result)
    >>> decomposition.objective >= result.certificate.lower_bound
    True
    """
    check_choice(method, "method", METHODS)
    problem = point.problem if isinstance(point, Result) else point
    _check_problem(problem)
    dual = None
    if isinstance(point, Result):
        if Z is not None or factors is not None or intercept is not None:
            raise InvalidInputError("Z, factors or intercept is given beside a Result, which has its own")
        Z, factors, intercept, dual = point.Z, point.factors, point.intercept, point.dual
        Z = Z if factors is None else None
    gated = evaluate(problem, Z, factors=factors, intercept=intercept)
    relu = _with_activation(problem, "relu", _RELU_SCOPES)
    assert relu.cones is not None
    columns = _columns_in_cones(relu.cones, gated.Z, gated.factors, method)
    pair = columns.balanced().factors(relu.n_gates)
    return ReluDecomposition(
        problem=relu,
        factors=pair,
        intercept=gated.intercept,
        certificate=certify(relu, factors=pair, intercept=gated.intercept, dual=dual),
        method=method,
        gated_objective=gated.primal,
        gated_penalty=gated.penalty,
    )


def _check_problem(problem: Any) -> None:
    if not isinstance(problem, Problem) or problem.activation != "gated_relu":
        raise InvalidInputError(f"point is {_name(problem)}; a Result or Problem for gated ReLU is wanted")
    if problem.norm.name != "nuclear":
        norms = (problem.norm.left, problem.norm.right)
        raise UnsupportedError(f"the norms of the problem are {norms!r}; ReLU problems are there for ('l2', 'l2') only")


def _name(problem: Any) -> str:
    return f"a problem for {problem.activation!r}" if isinstance(problem, Problem) else f"a {type(problem).__name__}"


def _with_activation(problem: Problem, activation: str, scopes: dict[str, str]) -> Problem:
    """The same data, gates and beta with another activation."""
    op = problem.operator
    if not isinstance(op, MLPOperator):
        raise UnsupportedError(f"the architecture is {op.architecture!r}; cones are there for 'mlp' only")
    if not isinstance(op.X, torch.Tensor):
        raise UnsupportedError("the samples are read from a file in passes; cones need X in memory")
    return Problem(
        MLPOperator(op.X, op.n_outputs, op.gates, op.patterns, activation),
        problem.Y,
        loss=problem.loss,
        norm=problem.norm,
        beta=problem.beta,
        weights=problem.weights,
        reduction=problem.reduction,
        # A list that is complete for ReLU neurons up to a coverage need not be one of all patterns.
        scope=scopes.get(problem.scope, problem.scope) if problem.coverage is None else "given_gates",
        output_bias=problem.output_bias,
        hidden_bias=problem.hidden_bias,
        classes=problem.classes,
    )


def _columns_in_cones(
    cones: Cones, Z: torch.Tensor | None, factors: tuple[torch.Tensor, torch.Tensor] | None, method: str
) -> Columns:
    """Columns in the cones of their gates with the sum of a gated point in every gate, as cheap as was found."""
    gate, blocks = _used_blocks(Z, factors)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    kept = values > _NEGLIGIBLE * (values.max() if values.numel() else 0.0)
    owner = gate[:, None].expand_as(values)
    chosen = _split(cones, owner[kept], (left * values[:, None]).mT[kept], right[kept], method)
    d, c = blocks.shape[1:]
    if c == 1:
        return chosen
    unit = torch.eye(c).to(blocks).expand(len(gate), c, c).reshape(-1, c)
    by_output = _split(cones, gate.repeat_interleave(c), blocks.mT.reshape(-1, d), unit, method)
    cheaper = _costs(by_output, cones.n_gates) < _costs(chosen, cones.n_gates)
    return Columns.joined(chosen[~cheaper[chosen.gate]], by_output[cheaper[by_output.gate]])


def _used_blocks(
    Z: torch.Tensor | None, factors: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates (A,) whose blocks are not zero, and these (A, d, c)."""
    if factors is not None:
        U, V = factors
        used = ((U != 0).any(1) & (V != 0).any(1)).any(1).nonzero()[:, 0]
        return used, U[used] @ V[used].mT
    assert Z is not None
    used = Z.flatten(1).any(1).nonzero()[:, 0]
    return used, Z[used]


def _split(cones: Cones, gate: torch.Tensor, u: torch.Tensor, v: torch.Tensor, method: str) -> Columns:
    """Columns (a, v) and (b, -v) with u = a - b, for unit vectors v."""
    a, b = decompose(cones, gate, u, method)
    return Columns(torch.cat([gate, gate]), torch.cat([a, b]), torch.cat([v, -v])).without_zeros()


def _costs(columns: Columns, n_gates: int) -> torch.Tensor:
    """Penalty of the columns of every gate, (P,)."""
    return columns.u.new_zeros(n_gates).index_add_(0, columns.gate, columns.sizes())
