"""Defects that were found in review, each with the case that showed it."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.bounds import dual_bound
from cvxnn.errors import InvalidInputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = RNG.normal(size=(40, 2))


def small(**options):
    return cvxnn.mlp_problem(X, Y, n_gates=8, **{"beta": 1e-2, **options})


def test_path_writes_a_checkpoint_per_beta_and_resumes(tmp_path):
    file = tmp_path / "path.ckpt"
    betas = [0.1, 0.01]
    first = cvxnn.path(small(), betas, tol=1e-6, checkpoint=file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["path-0.ckpt", "path-1.ckpt"]
    again = cvxnn.path(small(), betas, tol=1e-6, checkpoint=file, resume=True)
    for one, other in zip(first, again, strict=True):
        assert other.n_iter == one.n_iter
        assert torch.equal(one.Z, other.Z)


def test_a_certified_run_that_is_resumed_does_nothing(tmp_path):
    file = tmp_path / "run.ckpt"
    done = cvxnn.solve(small(), "admm", tol=1e-6, checkpoint=file)
    again = cvxnn.solve(small(), "admm", tol=1e-6, checkpoint=file, resume=True)
    assert (again.status, again.n_iter) == ("certified", done.n_iter)
    assert torch.equal(again.Z, done.Z)


def test_floats_as_objects_are_regression_targets():
    problem = cvxnn.mlp_problem(X, Y[:, 0].astype(object), n_gates=5)
    assert problem.classes is None
    assert problem.Y.shape == (40, 1)
    labels = cvxnn.mlp_problem(X, np.array([0, 1] * 20, dtype=object), n_gates=5)
    assert labels.classes.tolist() == [0, 1]


def test_a_row_of_zeros_tells_no_gates_apart():
    with_zero = np.vstack([X[:6], np.zeros((1, 3))])
    plain = cvxnn.mlp_problem(X[:6], Y[:6], gates="enumerate")
    assert cvxnn.mlp_problem(with_zero, Y[:7], gates="enumerate").n_gates == plain.n_gates
    assert cvxnn.mlp_problem(np.zeros((3, 2)), Y[:3], n_gates=4).n_gates == 1


def test_single_precision_ends_as_stationary_at_its_limit():
    result = cvxnn.solve(small(dtype="float32", beta=1e-3), "admm", tol=1e-12)
    assert result.status == "stationary"
    assert result.n_iter < 5000
    assert result.certificate.relative_gap < 1e-2


def test_the_lower_bound_at_zero_does_not_pass_the_infimum():
    soft = RNG.dirichlet(np.ones(3), size=40)
    problem = cvxnn.mlp_problem(X, soft, loss="cross_entropy", n_gates=5)
    problem = problem.with_beta(2 * problem.beta_max)
    infimum = -float((soft * np.log(soft)).sum().astype(np.longdouble)) / 40
    certificate = cvxnn.certify(problem, np.zeros(problem.operator.block_shape), dual=np.zeros((40, 3)))
    zero_bound = dual_bound(problem, torch.zeros(40, 3, dtype=torch.float64))
    assert infimum - 1e-12 <= zero_bound.lower_bound < infimum
    assert certificate.lower_bound <= certificate.primal


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: cvxnn.certify(3, Z=0), "problem"),
        (lambda: cvxnn.path(3), "problem"),
        (lambda: cvxnn.path(small(), 0.1), "betas"),
        (lambda: cvxnn.solve(small(), checkpoint=3), "checkpoint"),
        (lambda: cvxnn.solve(small(), verbose="x"), "verbose"),
        (lambda: cvxnn.certify(small(), factors=3), "factors"),
        (lambda: cvxnn.certify(small(), factors=(Y,)), "factors"),
        (lambda: small(hidden_bias="no"), "hidden_bias"),
        (lambda: small(output_bias="x"), "output_bias"),
        (lambda: small().objective(np.zeros((8, 3, 2)), np.ones(2)), "intercept"),
    ],
)
def test_wrong_arguments_get_a_sentence(call, named):
    with pytest.raises(InvalidInputError, match=named):
        call()


def test_labels_of_several_types_are_refused_by_the_estimator():
    with pytest.raises(ValueError, match="y mixes labels"):
        cvxnn.ConvexMLPClassifier().fit(X, np.array(["a", None] * 20, dtype=object))


@pytest.mark.parametrize("options", [{"gate_quantile": 0.5}, {"gate_quantile": 2.0, "hidden_bias": True}])
def test_quantiles_are_named_as_the_user_knows_them(options):
    with pytest.raises(InvalidInputError, match="gate_quantile"):
        small(**options)


def test_read_only_data_are_taken_without_a_warning(recwarn):
    frozen = X.copy()
    frozen.flags.writeable = False
    cvxnn.mlp_problem(frozen, Y, n_gates=5)
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("loss", ["squared", "huber", "cross_entropy", "logistic"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_column_sums_of_a_dual_are_paid_for(loss, reduction):
    """A bound holds for a dual point whose columns do not sum to zero, though the best intercept is large."""
    targets = 20 + Y if loss in {"squared", "huber"} else np.eye(2)[(X[:, 0] > 0.3).astype(int)]
    problem = cvxnn.mlp_problem(
        X + 50.0, targets, n_gates=8, loss=loss, reduction=reduction, output_bias=True, beta=1e-2
    )
    best = cvxnn.solve(problem, "admm", tol=1e-7)
    assert best.status == "certified"
    generator = torch.Generator().manual_seed(0)
    for size in (1e-12, 1e-6, 1e-3, 1e-1):
        nu = best.dual + size * best.dual.abs().max() * torch.randn(best.dual.shape, generator=generator).double()
        bound = dual_bound(problem, nu)
        assert bound.lower_bound <= best.objective
    assert dual_bound(problem, best.dual).lower_bound == pytest.approx(best.objective, rel=1e-6)


def test_intercepts_are_within_the_bound_of_the_loss():
    for loss in ("squared", "huber", "cross_entropy", "logistic"):
        targets = 20 + Y if loss in {"squared", "huber"} else np.eye(2)[(X[:, 0] > 0.3).astype(int)]
        problem = cvxnn.mlp_problem(X + 50.0, targets, n_gates=8, loss=loss, output_bias=True, beta=1e-2)
        best = cvxnn.solve(problem, "admm", tol=1e-7)
        value = float(problem.loss.value(torch.zeros_like(problem.Y), problem.Y, problem.weights))
        sizes = problem.loss.intercept_bound(value, problem.Y, problem.weights)
        reach = 2 * problem.operator.prediction_norm * best.certificate.penalty
        assert bool((best.intercept.abs() <= sizes + reach).all())
