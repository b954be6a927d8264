"""`certify_network`: reading networks, objectives, bounds that hold, witnesses that help, and improvement."""

import json
import math
import warnings

import cvxpy
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import nn

import cvxnn
from cvxnn.audit import certify_network, read_network
from cvxnn.errors import InvalidInputError, UnsupportedError
from cvxnn.networks import TwoLayerNetwork
from cvxnn.patterns import activation_patterns, enumerate_gates

BETA = 2e-2


def data(n=20, d=2, c=1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    Y = np.tanh(X @ rng.standard_normal((d, c))) + 0.3 * rng.standard_normal((n, c))
    return torch.from_numpy(X), torch.from_numpy(Y)


def relu_network(d=2, m=6, c=1, *, biases=(False, False), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, m, bias=biases[0]), nn.ReLU(), nn.Linear(m, c, bias=biases[1])).to(dtype)


def trained(network, X, Y, *, beta=BETA, steps=300, lr=0.2):
    """Gradient descent on our mean squared loss with weight decay on everything but the output bias."""
    decayed = [p for name, p in network.named_parameters() if name != "2.bias"]
    free = [p for name, p in network.named_parameters() if name == "2.bias"]
    groups = [{"params": decayed, "weight_decay": beta}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (network(X) - Y).square().sum() / len(X)).backward()
        optimizer.step()
    return network


class WithFunctional(nn.Module):
    def __init__(self, act=torch.relu, d=2, m=6, c=1):
        super().__init__()
        torch.manual_seed(1)
        self.second = nn.Linear(m, c)  # registered before the first on purpose
        self.first = nn.Linear(d, m, bias=False)
        self.act = act

    def forward(self, x):
        return self.second(self.act(self.first(x)))


# Reading.


def modules():
    torch.manual_seed(3)
    return {
        "sequential": relu_network(biases=(True, True)),
        "nested": nn.Sequential(nn.Sequential(nn.Linear(2, 6)), nn.Sequential(nn.ReLU(), nn.Linear(6, 1))),
        "around": nn.Sequential(
            nn.Flatten(), nn.Identity(), nn.Linear(2, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 1)
        ),
        "functional": WithFunctional(),
        "linear": nn.Sequential(nn.Linear(2, 6, bias=False), nn.Linear(6, 1)),
        "float16": relu_network(dtype=torch.float16),
        "frozen": relu_network().requires_grad_(False),
        "shared_relu": nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1), nn.Identity()),
    }


@pytest.mark.parametrize("name", list(modules()))
def test_modules_are_read(name):
    module = modules()[name].train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    X, _ = data()
    network, _, _ = read_network(module, X, 1)
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert network.activation == ("linear" if name == "linear" else "relu")
    expected = module.double().eval()(X).detach()
    assert torch.allclose(network.forward(X), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hidden", ["relu", "linear"])
def test_activation_is_found_where_all_neurons_are_active(hidden):
    """On these data (X w + b)_+ and X w + b are the same numbers."""
    X, _ = data()
    net = relu_network(biases=(True, True))
    net[0].bias.data += 100.0
    module = net if hidden == "relu" else nn.Sequential(net[0], net[2])
    assert read_network(module, X, 1)[0].activation == hidden


def test_images_are_flattened():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).float()
    images = torch.rand(7, 3, 2, 2)
    network, X, _ = read_network(module, images, 2)
    assert X.shape == (7, 12)
    assert torch.allclose(network.forward(X).float(), module(images), atol=1e-5)


def test_output_of_one_dimension():
    class Squeezed(WithFunctional):
        def forward(self, x):
            return super().forward(x).squeeze(1)

    X, _ = data()
    network, _, _ = read_network(Squeezed(), X, 1)
    assert network.forward(X).shape == (20, 1)


def weight_forms():
    net = relu_network(d=2, m=6, c=3, biases=(True, True))
    state = net.state_dict()
    W1, b1, W2, b2 = state.values()
    renamed = {"fc.weight": W1, "fc.bias": b1, "a_head.weight": W2, "a_head.bias": b2}
    return {
        "state_dict": state,
        "sorted": dict(sorted(renamed.items())),
        "reversed": dict(reversed(list(state.items()))),
        "plain_names": {"W1": W1.numpy(), "b1": b1.numpy(), "W2": W2.numpy(), "b2": b2.numpy()},
        "checkpoint": {"epoch": 3, "state_dict": state},
        "tuple": (W1, b1, W2, b2),
        "lists": (W1.tolist(), b1.tolist(), W2.tolist(), b2.tolist()),
        "transposed": (W1.numpy().T, b1.numpy(), W2.numpy().T, b2.numpy()),
    }


@pytest.mark.parametrize("name", list(weight_forms()))
def test_weights_are_read(name):
    net = relu_network(d=2, m=6, c=3, biases=(True, True))
    X, _ = data()
    network, _, _ = read_network(weight_forms()[name], X, 3)
    assert network.activation == "relu"
    assert torch.allclose(network.forward(X), net(X).detach(), atol=1e-14)
    assert ("read as (d, m) and (m, c)" in network.source) == (name == "transposed")


def test_square_weights_are_read_in_their_order():
    torch.manual_seed(0)
    W1, W2, b1 = torch.randn(3, 3).double(), torch.randn(3, 3).double(), torch.randn(3).double()
    X = torch.randn(5, 3).double()
    expected = (X @ W1.T).relu() @ W2.T
    for form in ((W1, W2), {"0.weight": W1, "2.weight": W2}, {"2.weight": W2, "0.weight": W1}, {"W1": W1, "W2": W2}):
        assert torch.allclose(read_network(form, X, 3)[0].forward(X), expected)
    with pytest.raises(InvalidInputError, match="fit in either order"):
        read_network({"one": W1, "other": W2}, X, 3)
    with pytest.raises(InvalidInputError, match="give a tuple"):
        read_network({"a1": W1, "a2": W2, "c": b1}, X, 3)


@pytest.mark.parametrize("activation", ["linear", "gated_relu", "relu"])
def test_own_networks_are_read(activation):
    X, Y = data(c=2)
    problem = cvxnn.mlp_problem(X, Y, activation="gated_relu" if activation == "gated_relu" else "linear", n_gates=6)
    module = cvxnn.solve(problem, tol=1e-3).network()
    if activation == "relu":
        torch.manual_seed(0)
        hidden, output = torch.randn(2, 4).double(), torch.randn(4, 2).double()
        module = TwoLayerNetwork(hidden, output, torch.ones(2).double(), relu=True)
    network, _, _ = read_network(module, X, 2)
    assert network.activation == activation
    assert torch.allclose(network.forward(X), module(X).detach(), atol=1e-14)
    if activation == "gated_relu":
        again, _, _ = read_network(module.state_dict(), X, 2)
        assert torch.allclose(again.forward(X), module(X).detach(), atol=1e-14)


def test_gated_weights_take_gates():
    X, Y = data(c=2)
    rng = np.random.default_rng(0)
    W1, W2, G = rng.standard_normal((5, 2)), rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    network, _, _ = read_network((W1, W2), X, 2, "gated_relu", G)
    expected = ((X.numpy() @ G >= 0) * (X.numpy() @ W1.T)) @ W2.T
    assert np.allclose(network.forward(X), expected)
    report = certify_network((W1, W2), X, Y, beta=BETA, activation="gated_relu", gates=G, time_limit=1)
    assert report.certificate.scope == "given_gates"
    with pytest.raises(InvalidInputError, match=r"gates has shape \(2, 4\); \(2, 5\)"):
        read_network((W1, W2), X, 2, "gated_relu", G[:, :4])
    with pytest.raises(InvalidInputError, match="gates is None"):
        read_network((W1, W2), X, 2, "gated_relu")


def bad_networks():
    lin = nn.Linear
    shared = WithFunctional(d=2, m=2, c=2)
    shared.second.weight = shared.first.weight
    poisoned = relu_network()
    poisoned[0].weight.data[0, 0] = math.nan
    raw = nn.Module()
    raw.W = nn.Parameter(torch.ones(2, 3))
    return {
        "three layers": (nn.Sequential(lin(2, 3), nn.ReLU(), lin(3, 3), nn.ReLU(), lin(3, 1)), "3 nn.Linear layers"),
        "one layer": (lin(2, 1), "1 nn.Linear layers"),
        "convolution": (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), lin(2, 3), nn.ReLU(), lin(3, 1)), "Conv1d"),
        "batch norm": (nn.Sequential(lin(2, 3), nn.BatchNorm1d(3), nn.ReLU(), lin(3, 1)), "BatchNorm1d"),
        "no affine": (nn.Sequential(lin(2, 3), nn.BatchNorm1d(3, affine=False), nn.ReLU(), lin(3, 1)), "BatchNorm1d"),
        "layer norm": (nn.Sequential(lin(2, 3), nn.LayerNorm(3), nn.ReLU(), lin(3, 1)), "LayerNorm"),
        "tanh": (nn.Sequential(lin(2, 3), nn.Tanh(), lin(3, 1)), "relu .* or linear"),
        "gelu": (WithFunctional(act=nn.functional.gelu), "other outputs than two linear layers"),
        "softmax": (nn.Sequential(lin(2, 3), nn.ReLU(), lin(3, 1), nn.Sigmoid()), "softmax or sigmoid"),
        "scaled": (WithFunctional(act=lambda h: 1.0001 * torch.relu(h)), "other outputs"),
        "parametrised": (
            nn.Sequential(nn.utils.parametrizations.weight_norm(lin(2, 3)), nn.ReLU(), lin(3, 1)),
            "parametrised weight",
        ),
        "shared": (shared, "shares weights"),
        "lazy": (nn.Sequential(nn.LazyLinear(3), nn.ReLU(), lin(3, 1)), "without values yet"),
        "nan": (poisoned, "contains NaN"),
        "inputs": (relu_network(d=5), r"shapes \(6, 5\) and \(1, 6\); \(m, 2\)"),
        "outputs": (relu_network(c=2), r"\(1, m\)"),
        "raw": (raw, "weights of its own"),
        "tuple": ((1, 2, 3), "tuple of 3"),
        "string": ("net.pt", "module is a str"),
        "matrices": ({"a": np.ones((2, 2)), "b": np.ones((2, 2)), "c": np.ones((2, 2))}, "two matrices"),
        "kernel": ({"a": np.ones((2, 2, 3, 3)), "b": np.ones((2, 2))}, "two matrices"),
        "text": ((np.array([["a", "b"]]), np.ones((1, 1))), "W1 cannot be read"),
        "complex": ((np.ones((3, 2), dtype=complex), np.ones((1, 3))), "W1 has type torch.complex128"),
        "bias": ((np.ones((3, 2)), np.ones(2), np.ones((1, 3)), None), r"hidden bias has shape \(2,\); \(3,\)"),
        "no matrix": ((None, np.ones((1, 3))), "only a bias may be None"),
    }


@pytest.mark.parametrize("name", list(bad_networks()))
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_networks_that_are_refused(name):
    module, message = bad_networks()[name]
    X, Y = data()
    with pytest.raises((InvalidInputError, UnsupportedError), match=message) as error:
        certify_network(module, X, Y, beta=BETA)
    assert "\n" not in str(error.value)


def test_arguments_that_are_refused():
    X, Y = data()
    net, constant = relu_network(), relu_network(biases=(True, False))
    for options, message in (
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": None}, "beta is not given"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"activation": "linear"}, "activation linear"),
        ({"penalize_biases": "yes"}, "penalize_biases is 'yes'"),
        ({"gates": "all"}, "gates is 'all'"),
        ({"gates": np.ones((3, 2))}, "gates has 3 rows"),
        ({"time_limit": -1.0}, "time_limit is -1.0"),
    ):
        with pytest.raises((InvalidInputError, UnsupportedError), match=message):
            certify_network(net, X, Y, **({"beta": BETA} | options))
    with pytest.raises(UnsupportedError, match="hidden bias and penalize_biases is False"):
        certify_network(constant, X, Y, beta=BETA)
    with pytest.raises(InvalidInputError, match="Y has 19 entries but X has 20 rows"):
        certify_network(net, X, Y[:19, 0], beta=BETA)
    with pytest.raises(InvalidInputError, match="Y has 3 classes but the network has 1 outputs"):
        certify_network(net, X, np.arange(20) % 3, beta=BETA)
    with pytest.raises(InvalidInputError, match="X contains NaN"):
        certify_network(net, X * math.nan, Y, beta=BETA)


def test_hidden_bias_of_zeros_is_none():
    X, Y = data()
    net = relu_network(biases=(True, False))
    net[0].bias.data.zero_()
    report = certify_network(net, X, Y, beta=BETA, time_limit=0)
    assert report.certificate.scope == "relu_network"


def test_labels():
    X, _ = data()
    net = relu_network(c=3)
    labels = np.arange(20) % 3
    expected = certify_network(net, X, np.eye(3)[labels], beta=BETA, loss="cross_entropy", time_limit=0).objective
    for Y in (labels, torch.from_numpy(labels), np.array(list("abc"))[labels], labels + 5):
        assert certify_network(net, X, Y, beta=BETA, loss="cross_entropy", time_limit=0).objective == expected
    two = certify_network(net, X, labels % 2, beta=BETA, loss="cross_entropy", time_limit=0)
    assert two.objective == pytest.approx(
        certify_network(net, X, np.eye(3)[labels % 2], beta=BETA, loss="cross_entropy", time_limit=0).objective
    )
    single = certify_network(relu_network(), X, labels % 2, beta=BETA, loss="logistic", time_limit=0)
    logits = relu_network()(X).detach()[:, 0]
    value = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels % 2).double())
    assert single.loss_value == pytest.approx(float(value), rel=1e-12)


# Objectives.


@pytest.mark.parametrize("penalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_objective_is_that_of_the_formula(loss, reduction, penalize):
    X, Y = data(c=3)
    Y = torch.eye(3).double()[Y.argmax(1)]
    net = relu_network(c=3, biases=(penalize, True))
    outputs = net(X).detach()
    value = 0.5 * (outputs - Y).square().sum() if loss == "squared" else -(Y * outputs.log_softmax(1)).sum()
    value = float(value) / (len(X) if reduction == "mean" else 1)
    decayed = [p for name, p in net.named_parameters() if penalize or name.endswith("weight")]
    penalty = BETA / 2 * sum(float(p.detach().square().sum()) for p in decayed)
    report = certify_network(
        net, X, Y, beta=BETA, loss=loss, reduction=reduction, penalize_biases=penalize, time_limit=0
    )
    assert report.loss_value == pytest.approx(value, rel=1e-12)
    assert report.objective == pytest.approx(value + penalty, rel=1e-12)
    primal = report.certificate.primal
    assert primal <= report.best_bias_objective * (1 + 1e-12)
    assert report.best_bias_objective <= report.balanced_objective <= report.objective


def test_balancing_and_dead_neurons():
    X, Y = data()
    net = relu_network()
    report = certify_network(net, X, Y, beta=BETA, time_limit=0)
    u, v = net[0].weight.detach(), net[2].weight.detach()[0]
    cost = BETA * float((u.norm(dim=1) * v.abs()).sum())
    assert report.balanced_objective == pytest.approx(report.loss_value + cost, rel=1e-12)
    other = relu_network(m=9)
    with torch.no_grad():
        scale = torch.tensor([7.0, 0.1, 1, 3, 1e-6, 1e6]).double()
        other[0].weight[:6], other[2].weight[:, :6] = u * scale[:, None], v / scale
        other[0].weight[6], other[2].weight[:, 7] = 0, 0
        other[0].weight[8] = -1e-3 * torch.ones(2)
    again = certify_network(other, X.abs(), Y, beta=BETA, time_limit=0)
    assert again.n_dead == 3 + int((~((X.abs() @ u.T) > 0).any(0)).sum())
    # The same function on the data, with another split of the norms: one balanced objective.
    other[2].weight.data[:, 6:] = 0
    again = certify_network(other, X, Y, beta=BETA, time_limit=0)
    assert again.objective > 2 * report.objective
    assert again.balanced_objective == pytest.approx(report.balanced_objective, rel=1e-9)
    assert again.certificate.lower_bound == pytest.approx(report.certificate.lower_bound, rel=1e-6)


def test_network_without_live_neurons():
    X, Y = data()
    net = relu_network()
    net[2].weight.data.zero_()
    report = certify_network(net, X, Y, beta=BETA, time_limit=0)
    assert (report.n_dead, report.n_patterns) == (6, 0)
    assert report.certificate.primal == pytest.approx(0.5 * float(Y.square().mean()))
    assert report.witness is not None
    assert report.improve(time_limit=10).certificate.relative_gap < 1e-4
    huge = certify_network(net, X, Y, beta=10.0, time_limit=0)
    assert huge.witness is None
    assert huge.certificate.relative_gap < 1e-12
    assert not huge.proven_suboptimal


# Bounds.


def optimum(X, Y, *, hidden_bias=False, output_bias=False, beta=BETA):
    """Of the ReLU network with one output and the mean squared loss: its convex program, by CVXPY."""
    X, y = X.numpy(), Y.numpy()[:, 0]
    X = np.hstack([X, np.ones((len(X), 1))]) if hidden_bias else X
    predictions = cvxpy.Variable() * float(output_bias)
    penalty, constraints = 0, []
    for bits in activation_patterns(X, enumerate_gates(X)).T:
        u, w = cvxpy.Variable(X.shape[1]), cvxpy.Variable(X.shape[1])
        predictions = predictions + (bits[:, None] * X) @ (u - w)
        penalty = penalty + cvxpy.norm(u) + cvxpy.norm(w)
        signed = np.where(bits, 1.0, -1.0)[:, None] * X
        constraints += [signed @ u >= 0, signed @ w >= 0]
    objective = cvxpy.sum_squares(predictions - y) / (2 * len(y)) + beta * penalty
    return float(cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(solver="CLARABEL"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("time_limit", [0.0, 2.0])
def test_bounds_hold(seed, time_limit):
    hidden_bias, output_bias = bool(seed % 2), seed % 3 == 0
    X, Y = data(n=12, seed=seed)
    net = trained(relu_network(biases=(hidden_bias, output_bias), seed=seed), X, Y, steps=30 * seed)
    best = optimum(X, Y, hidden_bias=hidden_bias, output_bias=output_bias)
    for gates in (None,) if time_limit else (None, 7, "enumerate"):
        # A penalised output bias only raises the optimum.
        report = certify_network(net, X, Y, beta=BETA, penalize_biases=hidden_bias, gates=gates, time_limit=time_limit)
        certificates = report.certificates
        assert certificates["relu_network"].lower_bound <= best * (1 + 1e-6)
        assert report.best_objective >= best * (1 - 1e-6)
        lowers = [found.lower_bound for found in certificates.values()]
        assert lowers == sorted(lowers, reverse=True)
        assert ("sampled_gates" in certificates) == (gates == 7)
        for name, found in certificates.items():
            assert found.scope == name
            assert found.lower_bound <= found.primal * (1 + 1e-12)
        if time_limit and not (hidden_bias and output_bias):
            assert certificates["relu_network"].lower_bound == pytest.approx(best, rel=1e-3)
            assert report.excess[1] >= report.certificate.primal / best - 1 - 1e-6


def test_bounds_of_cross_entropy_hold():
    X, Y = data(n=12, c=2)
    labels = Y.argmax(1).numpy()
    net = relu_network(c=2, biases=(False, True))
    report = certify_network(net, X, labels, beta=BETA, loss="cross_entropy", time_limit=3)
    better = report.improve(time_limit=10)
    assert 0 < report.certificate.lower_bound <= better.objective
    assert better.certificate.relative_gap < 1e-3


def test_penalised_output_bias():
    """The bound leaves its penalty out, the objective does not."""
    X, Y = data()
    net = trained(relu_network(biases=(True, True)), X, Y + 1)
    report = certify_network(net, X, Y + 1, beta=BETA, penalize_biases=True, time_limit=3)
    free = optimum(X, Y + 1, hidden_bias=True, output_bias=True)
    assert report.certificate.lower_bound <= free * (1 + 1e-6)
    better = report.improve(time_limit=3)
    assert better.objective <= report.best_bias_objective
    module = better.network()
    penalty = BETA / 2 * sum(float(p.detach().square().sum()) for p in module.parameters())
    value = 0.5 * float((module(X) - Y - 1).detach().square().sum()) / len(X)
    assert better.certificate.primal == pytest.approx(value + penalty, rel=1e-10)


def test_scope_is_given_by_gates():
    X, Y = data()
    net = relu_network()
    G = np.random.default_rng(0).standard_normal((2, 4))
    report = certify_network(net, X, Y, beta=BETA, gates=G, time_limit=0)
    assert list(report.certificates) == ["network_gates", "given_gates", "relu_network"]


def test_many_features():
    """Patterns that cannot be enumerated: bounds over all neurons, and growth."""
    X, Y = data(n=40, d=6)
    net = trained(relu_network(d=6, m=8), X, Y)
    report = certify_network(net, X, Y, beta=BETA, time_limit=4)
    assert list(report.certificates) == ["network_gates", "relu_network"]
    found = report.certificates["relu_network"]
    better = report.improve(time_limit=5)
    assert 0 < found.lower_bound <= better.objective <= report.balanced_objective
    assert better.certificates["network_gates"].relative_gap < 1e-3


# Witnesses and improvement.


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_witness_lowers_the_objective(biases):
    X, Y = data()
    net = relu_network(biases=biases)
    report = certify_network(net, X, Y, beta=BETA, penalize_biases=biases[0], time_limit=0)
    witness = report.witness
    module = report.network()
    u, v = witness.neuron
    assert math.isclose(float(u.norm()), math.sqrt(witness.step), rel_tol=1e-12)
    wide = nn.Sequential(
        nn.Linear(2, len(module[0].weight) + 1, bias=biases[0], dtype=torch.float64),
        nn.ReLU(),
        nn.Linear(len(module[0].weight) + 1, 1, bias=biases[1], dtype=torch.float64),
    )
    with torch.no_grad():
        wide[0].weight.copy_(torch.cat([module[0].weight, u[None, :2]]))
        wide[2].weight.copy_(torch.cat([module[2].weight, v[:, None]], dim=1))
        if biases[0]:
            wide[0].bias.copy_(torch.cat([module[0].bias, u[2:]]))
        if biases[1]:
            wide[2].bias.copy_(module[2].bias)
    after = certify_network(wide, X, Y, beta=BETA, penalize_biases=biases[0], time_limit=0).objective
    assert witness.decrease > 0
    assert report.certificate.primal - after == pytest.approx(witness.decrease, rel=1e-6)
    assert witness.ratio == pytest.approx(report.certificate.dual_norm_ratio_lower, rel=1e-9)


def test_counterexample():
    """Math section 3: ten columns ((a, 0), a) are a local minimum with value 2.875; the optimum is 1.75."""
    X, Y = torch.eye(2).double(), torch.tensor([2.0, -2.0]).double()
    a = math.sqrt(0.15)
    W1 = torch.tensor([[a, 0.0]] * 10).double()
    report = certify_network((W1, torch.full((1, 10), a)), X, Y, beta=0.5, reduction="sum", time_limit=0)
    assert report.objective == pytest.approx(2.875, rel=1e-6)
    assert report.stationarity < 1e-6
    assert report.witness.ratio == pytest.approx(4, rel=1e-6)
    assert report.witness.u.tolist() == pytest.approx([0, 1])
    assert report.witness.v.tolist() == pytest.approx([-1])
    better = report.improve(time_limit=10)
    assert better.objective == pytest.approx(1.75, rel=1e-6)
    assert better.witness is None
    assert report.certificates["relu_network"].lower_bound <= 1.75
    with_time = certify_network((W1, torch.full((1, 10), a)), X, Y, beta=0.5, reduction="sum", time_limit=5)
    assert with_time.proven_suboptimal
    assert with_time.excess[0] == pytest.approx(2.875 / 1.75 - 1, rel=1e-5)


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_improve_reaches_the_optimum(biases, c):
    X, Y = data(n=16, c=c, seed=2)
    net = trained(relu_network(biases=biases, c=c), X, Y, steps=20)
    report = certify_network(net, X, Y, beta=BETA, penalize_biases=biases[0], time_limit=0)
    better = report.improve(time_limit=20)
    assert better.certificate.scope == "relu_network"
    assert better.certificate.relative_gap < (1e-5 if c == 1 else 1e-3)
    assert better.objective <= report.best_objective
    module = better.network()
    assert [type(part) for part in module] == [nn.Linear, nn.ReLU, nn.Linear]
    again = certify_network(module, X, Y, beta=BETA, penalize_biases=biases[0], time_limit=0)
    assert again.objective == pytest.approx(better.certificate.primal, rel=1e-10)
    single = certify_network(better.network(torch.float32), X, Y, beta=BETA, penalize_biases=biases[0], time_limit=0)
    assert single.objective == pytest.approx(better.certificate.primal, rel=1e-5)


def test_improve_is_never_worse():
    X, Y = data()
    net = relu_network()
    report = certify_network(net, X, Y, beta=BETA, time_limit=0)
    better = report.improve(time_limit=1e-3)
    assert better.objective <= report.balanced_objective
    best = report.improve(time_limit=10)
    again = best.improve(time_limit=1)
    assert again.objective <= best.objective
    assert again.certificate.lower_bound <= best.objective


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_other_activations(activation):
    X, Y = data(c=2)
    if activation == "linear":
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2)).double()
        problem = cvxnn.mlp_problem(X, Y, activation="linear", beta=BETA, output_bias=True)
    else:
        problem = cvxnn.mlp_problem(X, Y, n_gates=6, beta=BETA, output_bias=True)
        net = cvxnn.solve(problem, tol=1e-1).network()
        net.bias.data += 0.1
    best = cvxnn.solve(problem, tol=1e-8).objective
    report = certify_network(net, X, Y, beta=BETA, time_limit=3)
    scope = "linear_network" if activation == "linear" else "given_gates"
    assert list(report.certificates) == [scope]
    assert report.certificate.lower_bound <= best * (1 + 1e-9)
    assert report.certificate.lower_bound == pytest.approx(best, rel=1e-3)
    quick = certify_network(net, X, Y, beta=BETA, time_limit=0)
    assert quick.witness.decrease > 0
    better = quick.improve(time_limit=10)
    assert better.certificate.relative_gap < 1e-5
    again = certify_network(better.network(), X, Y, beta=BETA, time_limit=0)
    assert again.objective == pytest.approx(better.certificate.primal, rel=1e-10)
    if activation == "gated_relu":
        more = certify_network(net, X, Y, beta=BETA, gates=5, time_limit=0)
        assert list(more.certificates) == ["network_gates", "sampled_gates"]


# scikit-learn.


def fit_sklearn(kind, X, y, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return kind(hidden_layer_sizes=(6,), alpha=0.3, max_iter=50, random_state=0, **options).fit(X, y)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("c", [1, 2])
def test_sklearn_regressor(activation, c):
    X, Y = (part.numpy() for part in data(c=c))
    model = fit_sklearn(MLPRegressor, X, Y if c > 1 else Y[:, 0], activation=activation)
    report = certify_network(model, X, Y if c > 1 else Y[:, 0], penalize_biases=True, time_limit=0)
    assert report.beta == pytest.approx(0.3 / len(X))
    assert report.loss == "squared"
    predicted = model.predict(X).reshape(len(X), c)
    assert report.loss_value == pytest.approx(0.5 * np.square(predicted - Y).sum() / len(X), rel=1e-12)
    total = certify_network(model, X, Y if c > 1 else Y[:, 0], penalize_biases=True, reduction="sum", time_limit=0)
    assert total.objective == pytest.approx(len(X) * report.objective)


def test_sklearn_classifiers():
    X, Y = (part.numpy() for part in data(c=3))
    for labels, loss in ((np.array(["no", "yes", "maybe"])[Y.argmax(1)], "cross_entropy"), (Y[:, 0] > 0, "logistic")):
        model = fit_sklearn(MLPClassifier, X, labels)
        report = certify_network(model, X, labels, penalize_biases=True, time_limit=0)
        assert report.loss == loss
        chosen = model.predict_proba(X)[np.arange(len(X)), np.searchsorted(model.classes_, labels)]
        assert report.loss_value == pytest.approx(-np.log(chosen).mean(), rel=1e-9)
        penalty = report.beta / 2 * sum(np.square(part).sum() for part in (*model.coefs_, *model.intercepts_))
        assert report.objective == pytest.approx(report.loss_value + penalty, rel=1e-9)
    with pytest.raises(InvalidInputError, match="none of the model's classes"):
        certify_network(model, X, np.array([2] * 20), penalize_biases=True)


def test_sklearn_models_that_are_refused():
    X, Y = (part.numpy() for part in data())
    y = Y[:, 0]
    with pytest.raises(UnsupportedError, match="activation 'tanh'"):
        certify_network(fit_sklearn(MLPRegressor, X, y, activation="tanh"), X, y)
    with pytest.raises(InvalidInputError, match="not fitted"):
        certify_network(MLPRegressor(), X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        deep = MLPRegressor(hidden_layer_sizes=(3, 3), max_iter=2).fit(X, y)
    with pytest.raises(UnsupportedError, match="2 hidden layers"):
        certify_network(deep, X, y)
    with pytest.raises(UnsupportedError, match="hidden bias and penalize_biases is False"):
        certify_network(fit_sklearn(MLPRegressor, X, y), X, y)


def test_estimators_of_this_package():
    X, Y = data()
    model = cvxnn.ConvexMLPRegressor(n_gates=10, beta=BETA, random_state=0).fit(X.numpy(), Y.numpy()[:, 0])
    report = certify_network(model, X, Y[:, 0], beta=BETA, time_limit=2)
    assert report.activation == "gated_relu"
    assert report.certificate.relative_gap < 1e-3


# The report.


def test_report_for_people_and_programs():
    X, Y = data()
    for net, limit in ((relu_network(m=300), 1), (trained(relu_network(), X, Y), 0)):
        report = certify_network(net, X, Y, beta=BETA, time_limit=limit, gates=5)
        text = str(report)
        assert text == report.summary()
        assert len(text.splitlines()) <= 30
        assert max(map(len, text.splitlines())) <= 120
        assert f"{report.objective:.8g}" in text
        assert "relu_network" in text
        document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert document["objective"] == report.objective
        assert set(document["certificates"]) == {"network_gates", "sampled_gates", "relu_network"}
    lower, upper = report.optimum_bracket
    assert lower <= upper <= report.certificate.primal


def test_certificate_is_the_widest_that_proves_something():
    X, Y = data(n=40, d=12, seed=5)
    net = trained(relu_network(d=12, m=30), X, Y, beta=1e-6, steps=3000, lr=0.05)
    report = certify_network(net, X, Y, beta=1e-6, time_limit=0)
    found = report.certificate
    wider = list(report.certificates.values())
    assert found.lower_bound > 0 or found is wider[0]
    assert all(other.lower_bound == 0 for other in wider[wider.index(found) + 1 :])
