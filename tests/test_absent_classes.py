"""Cross-entropy with an output bias and a class that no sample with weight has: its intercept has no best value."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.bounds import dual_bound
from tests.soundness.check import check_problem
from tests.soundness.problems import random_instance

N, CLASSES = 30, 4


def problems(kind, *, n_absent=1, reduction="mean", share=0.1):
    """A problem with absent classes, and the one without them, of the same optimum."""
    rng = np.random.default_rng(3)
    X, gates = rng.standard_normal((N, 4)), rng.standard_normal((4, 8))
    present = CLASSES - n_absent
    labels, weights = np.arange(N) % present, np.ones(N)
    if kind == "weightless":
        # The first samples have all absent classes, but do not count.
        labels[:4] = present + np.arange(4) % n_absent
        weights[:4] = 0.0
    options = {"gates": gates, "loss": "cross_entropy", "output_bias": True, "reduction": reduction}
    Y, used = np.eye(CLASSES)[labels], weights > 0
    full = cvxnn.mlp_problem(X, Y, sample_weight=weights, **options)
    part = cvxnn.mlp_problem(X[used], Y[used][:, :present], **options)
    beta = share * part.beta_max
    assert full.beta_max == pytest.approx(part.beta_max, rel=1e-9)
    return full.with_beta(beta), part.with_beta(beta)


@pytest.mark.parametrize("kind", ["absent", "weightless"])
@pytest.mark.parametrize(("n_absent", "reduction", "share"), [(1, "mean", 0.5), (1, "sum", 0.01), (2, "mean", 0.1)])
def test_problems_with_an_absent_class_are_certified(kind, n_absent, reduction, share):
    full, part = problems(kind, n_absent=n_absent, reduction=reduction, share=share)
    best = cvxnn.solve(part, "interior_point", tol=1e-7)
    assert best.status == "certified"
    found = cvxnn.solve(full, max_iter=1000)
    assert found.status == "certified"
    assert found.objective == pytest.approx(best.objective, rel=1e-4)
    assert found.certificate.lower_bound <= best.objective
    assert torch.isfinite(found.intercept).all()
    for intercept in (None, found.intercept):
        again = cvxnn.certify(full, Z=found.Z, intercept=intercept, dual=found.dual)
        assert again.relative_gap <= 1e-4
        assert again.primal == pytest.approx(found.objective, rel=1e-12)


@pytest.mark.parametrize("solver", ["fista", "frank_wolfe", "interior_point", "bm_lbfgs"])
def test_every_kind_of_solver_certifies_it(solver):
    full, part = problems("absent")
    found = cvxnn.solve(full, solver, random_state=0, max_iter=1000)
    assert found.status == "certified"
    assert found.objective == pytest.approx(cvxnn.solve(part).objective, rel=2e-4)


@pytest.mark.parametrize("kind", ["absent", "weightless"])
def test_no_dual_proves_more_than_the_optimum(kind):
    full, part = problems(kind)
    best = cvxnn.solve(part, "interior_point", tol=1e-8)
    dual = cvxnn.solve(full, tol=1e-6).dual
    upper = best.objective * (1 + 1e-11)
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-15, 1e-12, 1e-6, 1e-3, 1.0):
        noise = size * dual.abs().max() * torch.randn(dual.shape, generator=generator).double()
        noise[:, CLASSES - 1] *= float(size > 1e-4)
        nu = dual + noise
        # Whether or not it is centred; what an absent class holds cannot be paid for.
        assert dual_bound(full, nu).lower_bound <= upper
        assert dual_bound(full, full.centred(nu)).lower_bound <= upper
    assert dual_bound(full, nu).lower_bound == 0.0
    assert dual_bound(full, full.centred(dual)).lower_bound >= best.objective * (1 - 1e-5)


def test_intercepts_of_the_other_classes_are_within_the_bound_of_the_loss():
    full, _ = problems("absent", share=0.01)
    best = cvxnn.solve(full)
    value = float(full.loss.value(torch.zeros_like(full.Y), full.Y, full.weights))
    sizes = full.loss.intercept_bound(value, full.Y, full.weights)
    assert sizes.isinf().tolist() == [False, False, False, True]
    apart = best.intercept[:-1].max() - best.intercept[:-1]
    reach = 2 * full.operator.prediction_norm * best.certificate.penalty
    assert bool((apart <= sizes[:-1] + reach).all())


@pytest.mark.parametrize("index", [2265, 3213])
def test_certificates_hold_against_independent_bounds(index):
    """Random problems of the soundness harness that have an absent class, one in float32."""
    instance = random_instance(3, index, small=True)
    used = slice(None) if instance.sample_weight is None else instance.sample_weight > 0
    assert instance.loss == "cross_entropy" and instance.output_bias
    assert (instance.Y[used].sum(0) == 0).any()
    report = check_problem(3, index, small=True)
    assert report.violations == []
    assert report.n_certificates >= 20
