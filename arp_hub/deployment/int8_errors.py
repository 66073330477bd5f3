"""What int8 does to the predictions, by low-rank layer, to second order.

Each layer alone is quantised as runtimes do it: the input of each factor to 256 levels between its smallest and its
largest value, and each output channel of its weight to 255 levels. With ``e`` the error of the layer's output and ``g``
the gradient there, the predictions diverge by about ``1/2 E (g . e)^2`` (see `arp_hub.calibration.gradients`). One pass
shows all layers.
"""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn

from ..calibration.gradients import predicted_divergences
from ..layers.low_rank import LowRankLayer
from ..layers.model import low_rank_layers


def int8_divergences(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The divergence that int8 of each low-rank layer alone causes. Layers that no gradient reaches are left out.

    Args:
        model: A model in evaluation mode.
        images: Calibration images.
    """
    layers = low_rank_layers(model)
    quantised = {name: _quantised(layer) for name, layer in layers.items()}
    return predicted_divergences(model, layers, quantised, images, len(images))


def _quantised(layer: LowRankLayer) -> LowRankLayer:
    """A copy with rounded weights, whose factors round their inputs."""
    small = copy.deepcopy(layer)
    for factor in small.factors:
        weight = cast(Tensor, factor.weight)
        scale = weight.flatten(1).abs().amax(1).clamp_min(1e-30).view(-1, *[1] * (weight.dim() - 1)) / 127
        weight.data = (weight / scale).round() * scale
        factor.register_forward_pre_hook(_round_input)
    return small


def _round_input(factor: nn.Module, args: tuple[Tensor]) -> Tensor:
    low, high = args[0].amin().clamp_max(0), args[0].amax().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    return ((args[0] - low) / scale).round() * scale + low
