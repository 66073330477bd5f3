"""L-BFGS over stacks of problems: minima, independence, limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arp_hub.schemes.lbfgs import minimise


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
    for iterations in (1, 7, 30):
        together = minimise(rosenbrock, start, iterations)
        alone = torch.cat([minimise(rosenbrock, point[None], iterations) for point in start])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("iterations", [0, 1, 5, 40])
def test_evaluations_are_bounded(iterations):
    calls = 0

    def counted(points):
        nonlocal calls
        calls += 1
        return rosenbrock(points)

    minimise(counted, torch.tensor([[-1.2, 1.0], [5.0, 5.0]]).double(), iterations)
    assert calls <= 2 * iterations + 1


def test_solved_problems_end_the_search():
    calls = 0

    def counted(points):
        nonlocal calls
        calls += 1
        return rosenbrock(points)

    start = torch.ones(3, 4).double()
    torch.testing.assert_close(minimise(counted, start, 1000), start)
    assert calls == 1


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 30), st.integers(0, 1000))
def test_no_value_rises(count, size, iterations, seed):
    start = 3 * torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before, after = rosenbrock(start)[0], rosenbrock(minimise(rosenbrock, start, iterations))[0]
    assert (after <= before + 1e-12).all()
