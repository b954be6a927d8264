"""Every solver on small attention problems, against interior point and a program written in CVXPY."""

import numpy as np
import pytest
import torch

import cvxnn
from cvxnn.operators import pooled_products
from tests.attention_reference import Attention, small

TOL = 1e-6
CASES = pytest.mark.parametrize(
    ("activation", "output", "loss"),
    [(a, o, f) for a in ("linear", "gated_relu") for o in ("mean", "tokens") for f in ("squared", "cross_entropy")],
)
SMALL = (8, 3, 2, 2)
#: Solvers, their options, and the fraction of beta_max that they reach the tolerance at within seconds.
FAST = {"admm": 0.02, "fista": 0.05, "frank_wolfe": 0.02, "bm_lbfgs": 0.02, "bm_global": 0.02}
SLOW = {
    ("bm_gd", "linear", "mean"): 0.2,
    ("bm_gd", "gated_relu", "tokens"): 0.2,
    ("bm_noisy_gd", "linear", "mean"): 0.2,
    ("bm_noisy_gd", "gated_relu", "tokens"): 0.2,
    ("bm_precgd", "linear", "mean"): 0.2,
    ("bm_precgd", "gated_relu", "mean"): 0.5,
    ("bm_precgd", "gated_relu", "tokens"): 0.2,
}


@CASES
def test_solvers_agree_with_interior_point(activation, output, loss):
    problem, _ = small(activation, output, loss)
    for name, fraction in FAST.items():
        problem = problem.with_beta(fraction * problem.beta_max)
        best = cvxnn.solve(problem, "interior_point", tol=1e-8)
        assert best.status == "certified"
        result = cvxnn.solve(problem, name, tol=TOL)
        assert result.status == "certified"
        assert best.objective * (1 - 1e-8) <= result.objective <= best.objective * (1 + TOL)
        assert result.certificate.lower_bound <= best.objective


@pytest.mark.parametrize(("name", "activation", "output"), SLOW)
def test_descent_on_the_factors_is_certified(name, activation, output):
    problem, _ = small(activation, output, fraction=SLOW[name, activation, output])
    best = cvxnn.solve(problem, "interior_point", tol=1e-8).objective
    # The preconditioned method needs some hundred steps, the others a few thousand.
    limit = 600 if name == "bm_precgd" else None
    result = cvxnn.solve(problem, name, tol=TOL, max_iter=limit, random_state=0)
    assert result.status == "certified"
    assert best * (1 - 1e-8) <= result.objective <= best * (1 + TOL)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("local", ["newton", "newton_cg", "lbfgs"])
def test_every_local_method_of_bm_global(local, loss):
    problem, _ = small("gated_relu", "mean", loss)
    best = cvxnn.solve(problem, "interior_point", tol=1e-8).objective
    result = cvxnn.solve(problem, "bm_global", tol=TOL, solver_options={"local": local})
    assert result.status == "certified"
    assert result.objective <= best * (1 + TOL)


@pytest.mark.parametrize("output", ["mean", "tokens"])
def test_stochastic_descent_on_rows(output):
    problem, _ = small("gated_relu", output)
    options = {"batch_size": 5, "step": 0.05, "decay_every": 30, "decay": 0.5, "init_scale": 0.3}
    result = cvxnn.solve(problem, "bm_sgd", tol=1e-9, max_iter=150, random_state=0, solver_options=options)
    best = cvxnn.solve(problem, "interior_point", tol=1e-8).objective
    assert result.certificate.lower_bound <= best <= result.objective <= 1.05 * best


@CASES
@pytest.mark.parametrize("side", ["samples", "features"])
def test_admm_on_both_sides(activation, output, loss, side):
    problem, _ = small(activation, output, loss, mask="causal", output_bias=True)
    best = cvxnn.solve(problem, "interior_point", tol=1e-8).objective
    result = cvxnn.solve(problem, "admm", tol=TOL, solver_options={"side": side})
    assert result.status == "certified"
    assert result.objective <= best * (1 + TOL)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_admm_is_the_same_without_features_in_memory(loss, monkeypatch):
    """Pooled gated features kept, formed again in batches, or never formed: the same iterations to rounding."""
    results = []
    for cache, batch in ((2**30, 2**26), (0, 2**12), (0, 0)):
        monkeypatch.setattr(pooled_products, "_CACHE_BYTES", cache)
        monkeypatch.setattr(pooled_products, "_BATCH_BYTES", batch)
        problem, _ = small("gated_relu", "mean", loss, mask="padding", output_bias=True)
        options = {"side": "samples"}
        results.append(cvxnn.solve(problem, "admm", tol=0, max_iter=30, solver_options=options))
    for other in results[1:]:
        assert other.objective == pytest.approx(results[0].objective, rel=1e-12)
        np.testing.assert_allclose(other.Z, results[0].Z, atol=1e-10)
        assert other.certificate.lower_bound == pytest.approx(results[0].certificate.lower_bound, rel=1e-11)


def as_program(problem, reference: Attention):
    """The convex program in CVXPY, from the definition of the map in NumPy and from the targets of the problem."""
    cp = pytest.importorskip("cvxpy")
    P, p, q = problem.operator.block_shape
    columns = []
    for k in range(P * p * q):
        Z = np.zeros(P * p * q)
        Z[k] = 1
        columns.append(reference.of_blocks(Z.reshape(P, p, q)).ravel())
    blocks = [cp.Variable((p, q)) for _ in range(P)]
    flat = cp.hstack([cp.vec(Z, order="C") for Z in blocks])
    Y, w = problem.Y.numpy(), problem.weights.numpy()
    T = cp.reshape(np.array(columns).T @ flat, Y.shape, order="C")
    if problem.output_bias:
        T = T + np.ones((len(Y), 1)) @ cp.Variable((1, Y.shape[1]))
    if problem.loss.name == "squared":
        loss = 0.5 * cp.sum(cp.multiply(w[:, None], cp.square(T - Y)))
    else:
        loss = w @ (cp.log_sum_exp(T, axis=1) - cp.sum(cp.multiply(Y, T), axis=1))
    program = cp.Problem(cp.Minimize(loss + problem.beta * cp.sum([cp.normNuc(Z) for Z in blocks])))
    return program.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)


@CASES
def test_certificates_hold_against_cvxpy(activation, output, loss):
    for mask, bias in (("padding", True), ("pairs", False)):
        problem, reference = small(activation, output, loss, mask=mask, output_bias=bias)
        optimum = as_program(problem, reference)
        result = cvxnn.solve(problem, "admm", tol=TOL)
        assert result.certificate.lower_bound <= optimum * (1 + 1e-8)
        assert optimum * (1 - 1e-8) <= result.objective <= optimum * (1 + 2 * TOL)
        rng = np.random.default_rng(0)
        for scale in (0.01, 0.1, 1.0):
            Z = result.Z + scale * torch.from_numpy(rng.standard_normal(result.Z.shape))
            seen = cvxnn.certify(problem, Z=Z)
            assert seen.lower_bound <= optimum * (1 + 1e-8) <= seen.primal * (1 + 2e-8)


def test_the_block_is_the_network_of_its_heads():
    """(8): outputs of factors are those of heads U_j, V_j, and the penalty is that of their squares."""
    problem, reference = small("linear", "mean", fraction=0.05)
    U, V = cvxnn.solve(problem, "bm_lbfgs", tol=TOL).factors
    d, c = 2, 2
    outputs = sum(
        reference.of_heads(0, U[0, :, j].reshape(d, d).T.numpy(), V[0, :, j].reshape(d, c).numpy())
        for j in range(U.shape[2])
    )
    value = ((problem.Y.numpy() - outputs) ** 2).sum() / 2 / len(outputs)
    value += problem.beta / 2 * float((U**2).sum() + (V**2).sum())
    assert cvxnn.certify(problem, factors=(U, V)).primal == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("output", "mask", "gates"),
    [("mean", "causal", "enumerate"), ("tokens", "padding", "enumerate"), ("mean", "none", None)],
)
def test_relu_with_one_feature_and_one_output(output, mask, gates):
    problem, _ = small("relu", output, mask=mask, shape=(8, 4, 1, 1), gates=gates)
    assert problem.scope == ("relu_network" if gates else "sampled_gates")
    best = cvxnn.solve(problem, "interior_point", tol=1e-8)
    assert best.status == "certified"
    for name in ("bm_global", "frank_wolfe", "bm_projected_gd"):
        result = cvxnn.solve(problem, name, tol=TOL)
        assert result.status == "certified"
        assert best.certificate.lower_bound <= result.objective <= best.objective * (1 + TOL)


@pytest.mark.parametrize("output", ["mean", "tokens"])
def test_relu_with_two_features_is_certified(output):
    """d = 2 and one output: columns v of two entries, so that dual norms are maxima over cones of several outputs."""
    problem, _ = small("relu", output, mask="none", shape=(4, 2, 2, 1), fraction=0.1)
    assert cvxnn.solvers.SOLVERS["interior_point"].unsupported(problem) is not None
    results = [cvxnn.solve(problem, name, tol=TOL) for name in ("bm_global", "frank_wolfe")]
    assert [result.status for result in results] == ["certified"] * 2
    assert results[0].objective == pytest.approx(results[1].objective, rel=2 * TOL)
