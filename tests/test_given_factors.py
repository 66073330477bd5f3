"""Given factors in any dtype, and layers of zeros: exact, finite, or refused with the reason."""

import pytest
import torch
from torch import nn

from arp_hub import AdaptiveRankPenalty, ArpHubError, LayerPlan, RankPlan, decompose, to_dense
from arp_hub.schemes import SCHEMES

PLANS = {
    scheme: RankPlan({"0": LayerPlan(scheme, rank, 2 if SCHEMES[scheme].grouped else 1)})
    for scheme, rank in {"channel": 3, "spatial": 5, "group_in": 2, "group_out": 2, "cp": 9, "tucker2": 4}.items()
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", PLANS)
def test_factors_of_the_penalty_are_taken_in_any_dtype(scheme, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(dtype)
    penalty = AdaptiveRankPenalty(model, PLANS[scheme], total_steps=2, ramp=0)
    for _ in range(2):
        penalty.step()
    weight = model[0].weight.detach().double()
    decompose(model, PLANS[scheme], factors=penalty.factors())
    assert model[0].factors[0].weight.dtype == dtype
    assert (model[0].weight.double() - weight).norm() / weight.norm() < 4 * max(torch.finfo(dtype).eps, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_that_miss_the_weight_are_refused_in_any_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(dtype)
    penalty = AdaptiveRankPenalty(model, PLANS["channel"], total_steps=2, ramp=0)
    penalty.step()
    factors = penalty.factors()
    with torch.no_grad():
        model[0].weight.mul_(1 + 4 * torch.finfo(dtype).eps + 1e-3)
    with pytest.raises(ArpHubError, match="layer '0': the given factors miss its weight"):
        decompose(model, PLANS["channel"], factors=factors)
    with pytest.raises(ArpHubError, match="layer '0': the given factors have shapes"):
        decompose(model, PLANS["cp"], factors=factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("scheme", PLANS)
def test_a_dead_layer_fits_at_any_rank(scheme, full, dtype):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).to(dtype).eval()
    nn.init.zeros_(model[0].weight)
    layer = PLANS[scheme].layers["0"]
    rank = {"channel": 8, "spatial": 24, "group_in": 8, "group_out": 4, "cp": 64, "tucker2": 8}[scheme]
    plan = RankPlan({"0": LayerPlan(scheme, rank if full else 1, layer.groups)})
    decompose(model, plan)
    assert all(factor.weight.isfinite().all() for factor in model[0].factors)
    assert not model[0].weight.any()
    penalty = AdaptiveRankPenalty(to_dense(model), plan, total_steps=2, ramp=0)
    for _ in range(2):
        penalty.step()
    assert not decompose(model, plan, factors=penalty.factors())[0].weight.any()
