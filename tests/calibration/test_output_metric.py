"""Errors of outputs weigh by what they do to the network's predictions."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from arp_hub import RankPlan, decompose
from arp_hub.calibration.gradients import gradient_moments
from arp_hub.calibration.output_metric import OutputMetric
from arp_hub.plan import LayerPlan


class Half(nn.Module):
    """A classifier whose second layer reads only half of the first one's outputs."""

    def __init__(self, detached: bool = False, unlike: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(48, 16), nn.Linear(16, 4)
        self.detached, self.num_classes = detached, 9 if unlike else 4
        with torch.no_grad():
            self.last.weight[:, 8:] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = x.relu_() if not self.detached else x.detach().relu()
        return self.last(x)


def images(count: int = 512) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))


PLAN = RankPlan({"first": LayerPlan("channel", 8)}, {"last": "small"})


def worst(model: nn.Module, x: Tensor) -> float:
    small = decompose(copy.deepcopy(model), PLAN, x)
    with torch.no_grad():
        return float((small(x) - model(x)).abs().max())


@pytest.mark.parametrize("unlike", [False, True], ids=["classifier", "other output"])
def test_channels_that_nothing_reads_cost_no_rank(unlike):
    model, x = Half(unlike=unlike), images()
    assert worst(model, x) < 0.02
    with torch.no_grad():
        by_weight = decompose(copy.deepcopy(model), PLAN)
        assert (by_weight(x) - model(x)).abs().max() > 0.2


def test_without_a_gradient_all_outputs_weigh_alike():
    assert worst(Half(detached=True), images()) > 0.05


class Undifferentiable(torch.autograd.Function):
    """A function without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


class NoBackward(Half):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(Undifferentiable.apply(self.first(x.flatten(1))))


def test_a_model_without_a_backward_pass_is_fitted_with_a_warning():
    with pytest.warns(UserWarning, match="cannot be differentiated"):
        assert worst(NoBackward(), images()) > 0.05


def test_parameters_keep_their_flags_and_get_no_gradient():
    model = Half()
    model.first.bias.requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient_moments(model.eval(), {"first": model.first}, images(), 1e9, 512)
    assert set(found) == {"first"}
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_the_moment_is_the_fisher_matrix_of_the_softened_predictions():
    model, x = Half().eval(), images(4096)
    found = gradient_moments(model, {"last": model.last}, x, 1e9, len(x))["last"].moment(torch.float64)
    with torch.no_grad():
        p = (model(x).double() / 4).softmax(-1)  # softened by the temperature
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert (found[0] - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (2, 2), (1, 4), (2, 4)])
def test_blocks_keep_what_they_hold(groups, blocks):
    factor = torch.randn(groups, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    metric = OutputMetric(factor @ factor.mT + torch.eye(8))
    weight = torch.randn(groups * 8, 5, 3, 1, dtype=torch.float64)
    block = metric.in_blocks(blocks)
    torch.testing.assert_close(block.undo(block.apply(weight)), weight)
    side = groups * 8 // blocks
    full = torch.block_diag(*metric.moment)
    rows = weight.flatten(1)
    wanted = sum(
        (part.mT @ full[at : at + side, at : at + side] @ part).trace()
        for at in range(0, len(rows), side)
        for part in [rows[at : at + side]]
    )
    torch.testing.assert_close(block.apply(weight).square().sum(), wanted)
