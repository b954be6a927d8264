"""Certificates of blocks of linear attention that others trained."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import cvxnn
from cvxnn.errors import InvalidInputError, UnsupportedError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 4, 3))
TARGETS = {"mean": RNG.standard_normal((20, 2)), "tokens": RNG.standard_normal((20, 4, 2))}
Y = TARGETS["mean"]
VALID = RNG.random((20, 4)) < 0.7
VALID[:, 0] = True
CAUSAL = np.tril(np.ones((4, 4), dtype=bool))
BETA = 0.05
OUTPUTS = ("mean", "tokens")


def heads(m=2, seed=1, size=0.4):
    rng = np.random.default_rng(seed)
    return {"W1": size * rng.standard_normal((m, 3, 3)), "W2": size * rng.standard_normal((m, 3, 2))}


def objective(weights, output="mean", mask=None, bias=0.0):
    """F + beta/2 (||W1||^2 + ||W2||^2) by the formula."""
    M = np.ones((20, 4, 4)) if mask is None else mask
    valid = np.ones((20, 4), dtype=bool)
    if mask is VALID:
        valid, M = VALID, VALID[:, :, None] & VALID[:, None, :]
    outputs = sum((M * (X @ a @ X.mT)) @ X @ b for a, b in zip(weights["W1"], weights["W2"], strict=True))
    if output == "mean":
        outputs = (outputs * valid[:, :, None]).sum(1) / valid.sum(1, keepdims=True)
        loss = np.square(outputs + bias - TARGETS[output]).sum() / 2
    else:
        loss = np.square((outputs + bias - TARGETS[output])[valid]).sum() / 2
    return loss / 20 + BETA / 2 * sum(np.square(part).sum() for part in weights.values())


def certify(module, targets=Y, **options):
    settings = {"beta": BETA, "time_limit": 0} | options
    return cvxnn.certify_network(module, X, targets, **settings)


def optimum(output="mean", mask=None, **options):
    problem = cvxnn.attention_problem(
        X, TARGETS[output], activation="linear", output=output, mask=mask, beta=BETA, **options
    )
    return cvxnn.solve(problem, tol=1e-9)


def balanced(weights):
    """The same functions, each head with two sides of one size."""
    sizes = [np.linalg.norm(part.reshape(len(part), -1), axis=1)[:, None, None] for part in weights.values()]
    root = np.sqrt(sizes[1] / sizes[0])
    return {"W1": weights["W1"] * root, "W2": weights["W2"] / root}


@pytest.mark.parametrize("mask", [None, VALID, CAUSAL], ids=["none", "padding", "causal"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_report(output, mask):
    weights, targets = heads(), TARGETS[output]
    report = certify(weights, targets, output=output, mask=mask)
    assert report.objective == pytest.approx(objective(weights, output, mask), rel=1e-12)
    assert report.balanced_objective == pytest.approx(objective(balanced(weights), output, mask), rel=1e-12)
    assert (report.architecture, report.activation, report.n_neurons) == ("attention", "linear", 2)
    assert (report.n_samples, report.n_features, report.n_outputs) == (20, 3, 2)
    best = optimum(output, mask)
    found = report.certificate
    assert found.scope == "linear_network"
    assert 0 < found.lower_bound <= best.objective
    assert found.primal == report.balanced_objective
    assert report.stationarity > 1e-3

    witness = report.witness
    assert witness.u.shape == (3, 3)
    assert witness.v.shape == (3, 2)
    assert witness.ratio == pytest.approx(found.dual_norm_ratio, rel=1e-6)
    u, v = (part.numpy()[None] for part in witness.neuron)
    more = {
        name: np.concatenate([part, new]) for (name, part), new in zip(balanced(weights).items(), (u, v), strict=True)
    }
    after = objective(more, output, mask)
    assert report.balanced_objective - after == pytest.approx(witness.decrease, rel=1e-6)
    assert witness.decrease > 0

    better = report.improve(time_limit=20, tol=1e-7)
    assert better.certificate.relative_gap <= 1e-6
    assert better.objective == pytest.approx(best.objective, rel=1e-6)
    assert better.witness is None
    network = better.network()
    improved = {"W1": network.scores.detach().numpy(), "W2": network.values.detach().numpy()}
    assert objective(improved, output, mask) == pytest.approx(better.objective, rel=1e-10)
    again = certify(network, targets, mask=mask)
    assert again.objective == pytest.approx(better.objective, rel=1e-10)
    text = better.summary()
    assert "blocks of linear attention with any number of heads" in text
    assert "heads" in text
    assert "neuron" not in text


def test_the_optimum_is_certified():
    best = optimum()
    report = certify(best.network())
    # From the gradient of the network itself; the dual point of the solver is better.
    assert report.certificate.relative_gap <= 1e-5
    assert report.stationarity <= 1e-5
    assert report.witness is None
    assert not report.proven_suboptimal
    assert report.n_dead == 0


def test_the_search_proves_suboptimality():
    report = certify(heads(), time_limit=20)
    assert report.proven_suboptimal
    assert report.certificate.lower_bound == pytest.approx(optimum().objective, rel=1e-3)
    assert report.to_dict()["architecture"] == "attention"


def test_zero_heads_and_dead_heads():
    weights = heads()
    weights["W2"][1] = 0
    report = certify(weights)
    assert (report.n_neurons, report.n_dead) == (2, 1)
    nothing = certify({name: np.zeros_like(part) for name, part in heads().items()})
    assert nothing.n_dead == 2
    assert nothing.objective == pytest.approx(np.square(Y).sum() / 40)
    assert nothing.witness is not None
    assert nothing.improve(time_limit=10).objective == pytest.approx(optimum().objective, rel=1e-4)


@pytest.mark.parametrize("penalize_biases", [False, True])
def test_output_bias(penalize_biases):
    bias = np.array([0.3, -0.2])
    report = certify(heads() | {"bias": bias}, penalize_biases=penalize_biases)
    extra = BETA / 2 * np.square(bias).sum() if penalize_biases else 0.0
    assert report.objective == pytest.approx(objective(heads(), bias=bias) + extra, rel=1e-12)
    assert report.best_bias_objective < report.balanced_objective
    assert report.certificate.lower_bound <= optimum(output_bias=True).objective + extra
    assert report.improve(time_limit=10).network().bias.any()


def test_labels_and_losses():
    labels = np.where(Y[:, 0] > 0, "yes", "no")
    options = {"loss": "cross_entropy", "reduction": "sum"}
    report = certify(heads(), labels, **options)
    one_hot = np.stack([labels == "no", labels == "yes"], axis=1).astype(float)
    assert report.objective == pytest.approx(certify(heads(), one_hot, **options).objective, rel=1e-12)
    tokens = (TARGETS["tokens"][:, :, 0] > 0).astype(int)
    by_token = certify(heads(), tokens, output="tokens", mask=VALID)
    same = certify(heads(), np.eye(2)[tokens], mask=VALID)
    assert by_token.objective == pytest.approx(same.objective, rel=1e-12)
    assert by_token.certificate.lower_bound > 0


def test_estimators():
    model = cvxnn.ConvexAttentionRegressor("linear", beta=BETA, tol=1e-6).fit(X, Y)
    report = cvxnn.certify_network(model, X, Y, beta=BETA, time_limit=0)
    assert report.n_features == 3
    assert report.objective == pytest.approx(model.certificate_.primal, rel=1e-9)
    assert report.certificate.relative_gap <= 1e-3
    assert report.network()(torch.from_numpy(X)).shape == (20, 2)


class Tensors(nn.Module):
    def __init__(self, pooled=True):
        super().__init__()
        # Registered in the other order.
        self.second = nn.Parameter(torch.tensor(heads()["W2"]))
        self.first = nn.Parameter(torch.tensor(heads()["W1"]))
        self.pooled = pooled

    def forward(self, X):
        X = X.unsqueeze(1)
        outputs = (X @ self.first @ X.mT @ X @ self.second).sum(1)
        return outputs.mean(1) if self.pooled else outputs


class Projections(nn.Module):
    """Attention as usual, with heads side by side, but for the softmax."""

    def __init__(self, n_heads=2, scaled=True, bias=False, softmax=False, skip=False):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(3, 4, bias=bias), nn.Linear(3, 4, bias=bias)
        self.v_proj, self.out_proj = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)
        self.n_heads, self.scaled, self.softmax, self.skip = n_heads, scaled, softmax, skip

    def forward(self, X):
        q, k, v = (
            layer(X).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.mT * (q.shape[3] ** -0.5 if self.scaled else 1.0)
        scores = scores.softmax(3) if self.softmax else scores
        outputs = self.out_proj((scores @ v).transpose(1, 2).flatten(2))
        return outputs + X[:, :, :2] if self.skip else outputs


@pytest.mark.parametrize("pooled", [True, False])
def test_modules_of_two_tensors(pooled):
    module = Tensors(pooled)
    output = "mean" if pooled else "tokens"
    report = certify(module, TARGETS[output])
    assert report.objective == pytest.approx(objective(heads(), output), rel=1e-12)
    assert report.source == "torch Tensors"
    with pytest.raises(InvalidInputError, match="output is"):
        certify(module, TARGETS[output], output="tokens" if pooled else "mean")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_modules_of_projections(n_heads, scaled, dtype):
    """The decay is on the products of the projections, which the report says."""
    module = Projections(n_heads, scaled).to(dtype)
    report = certify(module, TARGETS["tokens"], mask=None)
    query, key, value = (
        layer.weight.detach().double().view(n_heads, -1, 3) for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = module.out_proj.weight.detach().double().T.view(n_heads, -1, 2)
    W1 = query.mT @ key * ((4 / n_heads) ** -0.5 if scaled else 1.0)
    weights = {"W1": W1.numpy(), "W2": (value.mT @ out).numpy()}
    bias = module.out_proj.bias.detach().double().numpy()
    assert report.objective == pytest.approx(objective(weights, "tokens", bias=bias), rel=1e-12)
    assert report.n_neurons == n_heads
    assert "decay on these products" in report.source
    projections = {
        "query": query.mT * W1.norm() / (query.mT @ key).norm(),
        "key": key.mT,
        "value": value.mT,
        "out": out,
    }
    again = certify(projections | {"bias": bias}, TARGETS["tokens"])
    assert again.objective == pytest.approx(report.objective, rel=1e-12)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Projections(softmax=True), "other outputs than linear attention"),
        (Projections(skip=True), "other outputs than linear attention"),
        (Projections(bias=True), "a bias in its query projection"),
        (nn.ModuleDict({"attention": nn.MultiheadAttention(3, 1)}), "MultiheadAttention, whose softmax"),
        (nn.ModuleDict({"block": Projections(), "head": nn.Linear(2, 2)}), "weights besides its query, key"),
        (cvxnn.solve(cvxnn.attention_problem(X, Y, n_gates=2), tol=1e-2).network(), "with a ReLU or with gates"),
    ],
)
def test_other_blocks_are_refused(module, message):
    with pytest.raises(UnsupportedError, match=message):
        certify(module, TARGETS["tokens"])


def test_weights_that_do_not_tell_what_they_are():
    problem = cvxnn.attention_problem(X, Y, activation="linear", beta=BETA)
    network = cvxnn.solve(problem, tol=1e-2).network()
    projections = {f"{name}.weight": np.ones((3, 3)) for name in ("query", "key", "value", "out")}
    wanted = r"of attention the module itself is wanted, or its heads as \{'W1': \(m, d, d\), 'W2': \(m, d, c\)\}$"
    for weights in (network.state_dict(), projections, tuple(network.state_dict().values())[:2]):
        with pytest.raises((InvalidInputError, UnsupportedError), match=wanted):
            certify(weights, Y)
        with pytest.raises(InvalidInputError, match=wanted):
            certify(weights, Y, mask=VALID)
    with pytest.raises(InvalidInputError, match=r"as in torch\.nn\.Linear, are wanted for these X and Y$"):
        cvxnn.certify_network((np.ones((2, 3)), np.ones((2, 3))), X[:, 0], Y, beta=BETA)


W = heads()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ({"W1": W["W1"], "W2": W["W2"][:1]}, {}, r"\(2, 3, 3\) and \(1, 3, 2\); \(m, 3, 3\) and \(m, 3, c\)"),
        ({"W1": W["W1"][:, :2], "W2": W["W2"]}, {}, r"W1 and W2 have shapes \(2, 2, 3\)"),
        (W | {"W3": 1.0}, {}, "module has 'W3'"),
        (W | {"bias": np.ones(3)}, {}, r"bias has shape \(3,\); \(2,\)"),
        (W | {"W1": W["W1"] * np.nan}, {}, "W1 contains NaN"),
        (W, {"activation": "relu"}, "activation is 'relu'; of attention, linear blocks"),
        (W, {"gates": 5}, "the network is linear"),
        (W, {"output": "max"}, "output is 'max'"),
        (W, {"beta": None}, "beta is not given"),
        (W, {"mask": VALID[:, :3]}, r"mask has shape \(20, 3\)"),
        (W, {"output": "tokens"}, r"Y has shape \(20, 2\); \(20, 4, 2\) or \(20, 4\)"),
        ((np.ones((3, 4)), np.ones((2, 3))), {"mask": VALID}, "mask is given, but the module is no attention"),
        ((np.ones((3, 4)), np.ones((2, 3))), {"output": "mean"}, "output is given, but the module is no attention"),
        (
            {"query": np.ones((2, 3, 4)), "key": np.ones((2, 3, 5)), "value": np.ones((2, 3, 1)), "out": W["W2"]},
            {},
            r"query, key, value and out have shapes",
        ),
    ],
)
def test_careless_input(module, options, message):
    with pytest.raises(ValueError, match=message):
        certify(module, **options)


def test_careless_data():
    with pytest.raises(InvalidInputError, match=r"X has shape \(20, 12\); \(n, tokens, features\)"):
        cvxnn.certify_network(W, X.reshape(20, -1), Y, beta=BETA)
    with pytest.raises(InvalidInputError, match="Y has 3 columns but the network has 2 outputs"):
        certify(W, np.ones((20, 3)))
    with pytest.raises(InvalidInputError, match="tokens of 4 features"):
        cvxnn.certify_network(W, np.ones((20, 4, 4)), Y, beta=BETA)
    with pytest.raises(InvalidInputError, match="NaN in a valid token"):
        cvxnn.certify_network(W, X * np.nan, Y, beta=BETA)


def test_a_block_trained_by_sgd():
    """Weight decay of SGD on both matrices is beta."""
    torch.manual_seed(0)
    module = Tensors()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, weight_decay=BETA)
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * (module(torch.from_numpy(X)) - torch.from_numpy(Y)).square().sum() / 20).backward()
        optimizer.step()
    before, report = objective(heads()), certify(module)
    assert report.objective < before
    assert math.isfinite(report.certificate.relative_gap)
    assert report.certificate.lower_bound <= optimum().objective <= report.balanced_objective
