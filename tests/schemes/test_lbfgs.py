"""L-BFGS over stacks of problems: minima, independence, limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arp_hub.schemes.lbfgs import _Curvature, minimise


def rosenbrock(points):
    """Minimum 0 at (1, 1, ..), at the end of a curved valley."""
    with torch.enable_grad():
        x = points.detach().requires_grad_()
        values = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)
        (gradients,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradients


def quadratics(conditions, size):
    """Values 1/2 (x - 1)^T A (x - 1) with eigenvalues from 1 down to 1 over the condition of each problem."""
    generator = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(len(conditions), size, size, generator=generator, dtype=torch.float64)).Q
    spectra = torch.stack([torch.logspace(0, -condition, size, dtype=torch.float64) for condition in conditions])
    matrices = bases @ torch.diag_embed(spectra) @ bases.mT

    def function(points):
        gradients = (matrices.to(points) @ (points - 1)[..., None])[..., 0]
        return 0.5 * (gradients * (points - 1)).sum(1), gradients

    return function


def logarithms(points):
    """The function x - log x: minimum at 1, not a number below 0, and steep beside it."""
    return (points - points.log()).sum(1), 1 - 1 / points


@pytest.mark.parametrize(
    ("function", "start", "tolerance"),
    [
        pytest.param(quadratics([0, 1, 2, 3], 12), torch.zeros(4, 12).double(), 1e-3, id="quadratics"),
        pytest.param(quadratics([0, 1, 2], 12), torch.zeros(3, 12), 1e-2, id="single precision"),
        pytest.param(rosenbrock, torch.tensor([[-1.2, 1], [0, 0], [3, -2], [1, 1]]).double(), 1e-3, id="rosenbrock"),
        pytest.param(rosenbrock, torch.linspace(-1, 2, 15).view(3, 5).double(), 1e-3, id="five unknowns"),
        pytest.param(logarithms, torch.tensor([[1e-3], [0.5], [50.0]]).double(), 2e-3, id="logarithms"),
    ],
)
def test_all_problems_of_a_stack_are_solved(function, start, tolerance):
    found = minimise(function, start, 200)
    torch.testing.assert_close(found, torch.ones_like(start), atol=tolerance, rtol=0)


def test_a_problem_does_not_depend_on_those_beside_it():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [3.0, -2.0]]).double()
    for iterations in (1, 4, 7):
        together = minimise(rosenbrock, start, iterations)
        alone = torch.cat([minimise(rosenbrock, point[None], iterations) for point in start])
        torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


def test_the_first_step_follows_the_gradient_and_meets_the_wolfe_conditions():
    start = torch.tensor([[-1.2, 1.0], [0.5, 0.0], [3.0, -2.0]]).double()
    value, gradient = rosenbrock(start)
    found = minimise(rosenbrock, start, 1)
    lengths = (start - found) / gradient
    torch.testing.assert_close(lengths[:, 0], lengths[:, 1])
    after, steepest = rosenbrock(found)[1], gradient.square().sum(1)
    assert (rosenbrock(found)[0] <= value - 1e-4 * lengths[:, 0] * steepest).all()
    assert ((after * gradient).sum(1) <= 0.9 * steepest).all()


def test_directions_are_those_of_the_two_loop_recursion():
    """Nocedal and Wright, algorithm 7.4: with steps that some problems do not take, and more than are remembered."""
    torch.manual_seed(0)
    count, size, remembered = 3, 8, 4
    roots = torch.randn(count, size, size).double()
    hessians = roots @ roots.mT + torch.eye(size)
    curvature, memories = _Curvature(torch.zeros(count, size).double(), remembered), [[] for _ in range(count)]
    for _ in range(12):
        steps = torch.randn(count, size).double()
        changes = (hessians @ steps[..., None])[..., 0]
        changes[0] = -changes[0] if torch.rand(()) < 0.3 else changes[0]  # negative curvature is not remembered
        taken = torch.rand(count) > 0.3
        curvature.add(taken, steps, changes)
        for memory, step, change, yes in zip(memories, steps, changes, taken, strict=True):
            if yes and step @ change > 0:
                memory[:] = [*memory, (step, change)][-remembered:]
        gradients = torch.randn(count, size).double()
        for found, gradient, memory in zip(curvature.direction(gradients), gradients, memories, strict=True):
            torch.testing.assert_close(found, two_loops(gradient, memory))


def two_loops(gradient, memory):
    left, shares = gradient.clone(), []
    for step, change in reversed(memory):
        shares.append((step @ left) / (step @ change))
        left = left - shares[-1] * change
    if memory:
        step, change = memory[-1]
        left = left * (step @ change) / (change @ change)
    for (step, change), share in zip(memory, reversed(shares), strict=True):
        left = left + (share - (change @ left) / (step @ change)) * step
    return -left


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_no_problem_makes_more_steps_than_asked_for(iterations):
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0]]).double()
    before = [minimise(rosenbrock, start, steps) for steps in range(iterations + 1)]
    assert torch.equal(before[0], start)
    for one, other in itertools.pairwise(before):
        assert not torch.equal(one, other)
        assert (rosenbrock(other)[0] < rosenbrock(one)[0]).all()


@pytest.mark.parametrize("iterations", [1, 5, 40])
def test_evaluations_are_bounded(iterations):
    calls = []
    minimise(lambda points: calls.append(1) or rosenbrock(points), torch.tensor([[-1.2, 1.0]]).double(), iterations)
    assert len(calls) <= 2 * iterations + 21


def test_solved_problems_end_the_search_and_stay_where_they_are():
    calls = []

    def counted(points):
        calls.append(points)
        return rosenbrock(points)

    start = torch.ones(3, 4).double()
    assert torch.equal(minimise(counted, start, 1000), start) and len(calls) == 1
    start[1] = -1
    minimise(counted, start, 200)
    assert all(torch.equal(points[[0, 2]], start[[0, 2]]) for points in calls)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 30), st.integers(0, 1000))
def test_values_fall(count, size, iterations, seed):
    start = 3 * torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before, after = rosenbrock(start)[0], rosenbrock(minimise(rosenbrock, start, iterations))[0]
    assert (after < before).all()
