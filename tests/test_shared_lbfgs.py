"""L-BFGS over inner products: the steps of SciPy's."""

import math

import pytest
import torch

from cvxnn.solvers.lbfgs import minimise
from cvxnn.solvers.line_search import LineSearch
from cvxnn.solvers.shared_lbfgs import minimise_shared
from tests.helpers import make_problem


def rosenbrock(u, v):
    x = torch.cat([u.flatten(), v])
    valley, wall = 1 - x[:-1], x[1:] - x[:-1] ** 2
    slope = torch.zeros_like(x)
    slope[:-1] = -2 * valley - 400 * wall * x[:-1]
    slope[1:] += 200 * wall
    return float((100 * wall**2 + valley**2).sum()), [slope[:6].view(2, 3), slope[6:]]


def runs(limit, history, gtol=1e-9, function=rosenbrock):
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (4,))]
    options = {"gtol": gtol, "history": history}
    shared = minimise_shared(function, start, limit, operator=make_problem().operator, n_common=1, **options)
    return shared, minimise(function, start, limit, ftol=0.0, **options)


@pytest.mark.parametrize("limit", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("history", [1, 3, 20])
def test_steps_are_those_of_scipy(limit, history):
    shared, wanted = runs(limit, history)
    assert (shared.n_iter, shared.at_limit) == (wanted.n_iter, wanted.at_limit) == (limit, True)
    assert shared.value == pytest.approx(wanted.value, rel=1e-9)
    torch.testing.assert_close(shared.parts, wanted.parts, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("history", [3, 20])
def test_it_ends_at_the_minimum(history):
    shared, wanted = runs(500, history)
    assert not shared.at_limit
    assert max(float(part.abs().max()) for part in rosenbrock(*shared.parts)[1]) <= 1e-9
    torch.testing.assert_close(shared.parts, wanted.parts, rtol=1e-9, atol=1e-9)


def test_a_start_at_the_minimum_stays():
    shared, _ = runs(10, 5, gtol=1e9)
    assert (shared.n_iter, shared.at_limit) == (0, False)


def test_a_wrong_gradient_ends_it():
    """No step lowers the value."""
    shared, _ = runs(10, 5, function=lambda u, v: (rosenbrock(u, v)[0], [-part for part in rosenbrock(u, v)[1]]))
    assert not shared.at_limit
    assert shared.n_iter == 0


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize(
    ("value", "slope"),
    [
        (lambda a: -a / (a * a + 2), lambda a: (a * a - 2) / (a * a + 2) ** 2),
        (
            lambda a: math.hypot(1, a - 3) + math.sin(4 * a) / 8,
            lambda a: (a - 3) / math.hypot(1, a - 3) + math.cos(4 * a) / 2,
        ),
    ],
    ids=["one minimum", "waves"],
)
def test_a_line_search_ends_lower_and_flatter(value, slope, first):
    search = LineSearch(value(0), slope(0), first)
    for _ in range(20):
        if search.done:
            break
        search.tell(value(search.step), slope(search.step))
    assert search.done
    assert value(search.step) <= value(0) + 1e-3 * search.step * slope(0)
    assert abs(slope(search.step)) <= 0.9 * abs(slope(0))
