"""Layers and sizes found by a forward pass on the meta device."""

import copy

import pytest
import torch
from torch import nn

from arp_hub import ArpHubError, decompose, make_plan
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import trace


def test_the_trace_counts_what_hand_counting_gives():
    strided = nn.Conv2d(8, 8, 3, stride=2, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), strided, nn.Flatten(2), nn.Linear(225, 7))
    traced = trace(model, (3, 32, 32))
    assert traced.sizes == {"0": ((32, 32),), "1": ((32, 32),), "3": ((8, 1),)}
    assert traced.macs == 32 * 32 * 8 * 27 + 15 * 15 * 8 * 18 + 8 * 225 * 7
    assert traced.params == count_params(model)


class NeedsValues(nn.Module):
    """A network that cannot run on the meta device."""

    def __init__(self, tail):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.head, self.num_classes, self.tail = nn.Linear(32, 10), 10, tail
        self.scales = [torch.ones(32), torch.full((32,), 2.0)]

    def forward(self, x):
        return self.head(self.tail(self, self.body(x)).mean((2, 3)))


TAILS = {
    "a tensor on the CPU": lambda model, x: x * torch.linspace(0, 1, x.shape[-1]),
    "tensors in a list": lambda model, x: x * model.scales[1][:, None, None],
    "control flow by values": lambda model, x: x / 2 if x.abs().max() > 100 else x,
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_networks_that_need_values_are_planned_and_decomposed(tail):
    torch.manual_seed(0)
    model, images = NeedsValues(tail).eval(), torch.randn(24, 3, 8, 8)
    assert trace(model, (3, 8, 8)).macs == 64 * 27 * 32 + 64 * 288 * 32 + 320
    small = decompose(copy.deepcopy(model), make_plan(model, keep_params=0.6, calibration=images), images)
    assert count_params(small) < 0.65 * count_params(model)


def test_a_network_that_runs_nowhere_is_refused_with_its_own_error():
    def wrong(model, x):
        raise ValueError("odd maps only")

    with pytest.raises(ArpHubError, match=r"input of size \(3, 8, 8\): odd maps only"):
        trace(NeedsValues(wrong), (3, 8, 8))
