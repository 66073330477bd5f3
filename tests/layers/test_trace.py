"""Layers and sizes found by a forward pass on the meta device."""

from torch import nn

from arp_hub.layers.model import count_params
from arp_hub.layers.trace import trace


def test_the_trace_counts_what_hand_counting_gives():
    strided = nn.Conv2d(8, 8, 3, stride=2, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), strided, nn.Flatten(2), nn.Linear(225, 7))
    traced = trace(model, (3, 32, 32))
    assert traced.sizes == {"0": ((32, 32),), "1": ((32, 32),), "3": ((8, 1),)}
    assert traced.macs == 32 * 32 * 8 * 27 + 15 * 15 * 8 * 18 + 8 * 225 * 7
    assert traced.params == count_params(model)
