"""What int8 does to the predictions, by low-rank layer, to second order.

Each layer alone is quantised as runtimes do it: the input of each factor to 256 levels between its smallest and its
largest value, and each output channel of its weight to 255 levels. With ``e`` the error of the layer's output and ``g``
the gradient there, the harm is ``1/2 E (g . e)^2`` (see `arp_hub.calibration.gradients`): 16 times the divergence of
predictions that are softened at a temperature of 4. These also show errors that do not overturn a confident prediction
yet, but may do so together. One pass shows all layers.
"""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn

from ..calibration.gradients import predicted_divergences
from ..layers.low_rank import LowRankLayer
from ..layers.model import low_rank_layers


def int8_divergences(model: nn.Module, images: Tensor, classes: int) -> dict[str, float]:
    """The harm that int8 does to each low-rank layer alone. Layers that no gradient reaches are left out.

    Args:
        model: A model in evaluation mode.
        images: Calibration images.
        classes: Number of outputs: logits of so many classes.
    """
    layers = low_rank_layers(model)
    quantised = {name: _quantised(layer) for name, layer in layers.items()}
    return predicted_divergences(model, layers, quantised, images, len(images), classes=classes)


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
