"""Balance the factors of low-rank layers, so that they lose less in int8.

Between two factors stands nothing, so channel k between them may be scaled by any s_k > 0:

    A[k] <- s_k A[k],    B[:, k] <- B[:, k] / s_k.

Int8 holds all channels between the factors with one scale, and each output channel of B with one scale. Let a_k be the
range of channel k on calibration images and b_k that of B[:, k]. Both ranges are equal for s_k = sqrt(b_k / a_k), as in
the cross-layer equalisation of Nagel et al. (ICCV 2019). A depthwise B has a scale for each k, so s_k = 1 / a_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers.low_rank import LowRankLayer
from ..layers.model import low_rank_layers


@torch.no_grad()
def balance_factors(model: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """Scale the channels between the factors of every low-rank layer, in place. Outputs change by rounding only.

    Args:
        model: A model in evaluation mode.
        images: Calibration images in batches.

    Returns:
        ``model`` itself.
    """
    pairs = list(_neighbours(low_rank_layers(model).values()))
    ranges: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        channels = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
        found = channels.abs().flatten(0, -2).amax(0)
        ranges[module] = torch.maximum(ranges[module], found) if module in ranges else found

    hooks = [first.register_forward_hook(note) for first, _ in pairs]
    try:
        for batch in images:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    scales = [(first, second, _scales(ranges[first], second)) for first, second in pairs if first in ranges]
    for first, second, scale in scales:
        cast(Tensor, first.weight).mul_(scale.view(-1, *[1] * (cast(Tensor, first.weight).dim() - 1)))
        if first.bias is not None:
            cast(Tensor, first.bias).mul_(scale)
        _columns(second).div_(_by_column(second, scale))
    return model


def _neighbours(layers: Iterable[LowRankLayer]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Factors with the factors that follow them."""
    for layer in layers:
        yield from pairwise(layer.factors)


def _columns(factor: nn.Module) -> Tensor:
    """A view of the weight as ``(groups, outputs of a group, inputs of a group, taps)``."""
    weight, groups = cast(Tensor, factor.weight), cast(int, getattr(factor, "groups", 1))
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _by_column(factor: nn.Module, channels: Tensor) -> Tensor:
    groups, _, inputs, _ = _columns(factor).shape
    return channels.view(groups, 1, inputs, 1)


def _scales(ranges: Tensor, second: nn.Module) -> Tensor:
    """The scale of every channel between two factors; 1 for a channel that is zero on one side."""
    columns = _columns(second)
    weights = columns.abs().amax((1, 3)).flatten()
    depthwise = columns.shape[2] == 1
    scale = 1 / ranges if depthwise else (weights / ranges).sqrt()
    usable = (ranges > 0) & (weights > 0)
    return torch.where(usable, scale, torch.ones_like(scale))
