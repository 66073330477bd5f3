"""Dense layers as the maths sees them: which can be decomposed, their shape, the weight that counts, their padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ArpHubError
from ..schemes.shapes import LayerShape, Pair

_PLAIN_CONVS = (nn.Conv2d, timm.layers.Conv2dSame)
_STANDARDISED_CONVS = (
    timm.layers.StdConv2d,
    timm.layers.StdConv2dSame,
    timm.layers.ScaledStdConv2d,
    timm.layers.ScaledStdConv2dSame,
)
_LINEARS = (nn.Linear, timm.layers.Linear)


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` must stay dense, or None if it can be decomposed."""
    kind = type(module)
    if kind in _LINEARS:
        return None
    if kind not in _PLAIN_CONVS + _STANDARDISED_CONVS:
        return f"layers of type {kind.__name__} are not decomposed"
    conv = cast(nn.Conv2d, module)
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "depthwise: each channel's kernel is already a single small filter"
    return None


def dense_shape(module: nn.Module) -> LayerShape:
    """The shape of a dense layer, with padding as numbers.

    Raises:
        ArpHubError: If the module is not of a kind that can be decomposed.
    """
    if reason := refusal(module):
        raise ArpHubError(reason)
    if isinstance(module, nn.Linear):
        return LayerShape(module.out_features, module.in_features, kind="linear")
    conv = cast(nn.Conv2d, module)
    return LayerShape(
        conv.out_channels,
        conv.in_channels,
        cast(Pair, conv.kernel_size),
        cast(Pair, conv.stride),
        numeric_padding(conv) or (0, 0),
        cast(Pair, conv.dilation),
        conv.groups,
    )


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense layer that really multiplies the input, ``(O, I, kh, kw)``.

    For a weight-standardised convolution that is the standardised weight; it is caught on its way into ``conv2d``.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()[..., None, None]
    conv = cast(nn.Conv2d, module)
    if type(conv) in _PLAIN_CONVS:
        return conv.weight.detach()
    size = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    with torch.no_grad(), _WeightCapture() as capture:
        conv(conv.weight.new_zeros(1, conv.in_channels, *size))
    return capture.weight


class _WeightCapture(TorchFunctionMode):
    """Remembers the weight of the last ``conv2d`` call."""

    weight: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            self.weight = (args[1] if len(args) > 1 else kwargs["weight"]).detach().clone()
        return func(*args, **kwargs)


def is_same_padded(module: nn.Module) -> bool:
    """Whether the layer pads its input itself, by an amount that depends on the input's size."""
    same = (timm.layers.Conv2dSame, timm.layers.StdConv2dSame)
    return isinstance(module, same) or bool(getattr(module, "same_pad", False))


def numeric_padding(conv: nn.Conv2d) -> Pair | None:
    """Symmetric zero padding as numbers, or None if the layer must pad its input beforehand."""
    if is_same_padded(conv) or conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)
    return cast(Pair, tuple(conv.padding))


def padder(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a layer does to its input before it convolves it, or None if it only pads with zeros, symmetrically."""
    if not isinstance(module, nn.Conv2d):
        return None
    size, stride, dilation = list(module.kernel_size), list(module.stride), list(module.dilation)
    if is_same_padded(module):
        return lambda x: pad_same(x, size, stride, dilation)
    if numeric_padding(module) is None:
        mode = pad_mode(module)
        return lambda x: F.pad(x, list(module._reversed_padding_repeated_twice), mode=mode)
    return None


def pad_mode(conv: nn.Conv2d) -> str:
    """The padding mode in the words of ``F.pad``."""
    return "constant" if conv.padding_mode == "zeros" else conv.padding_mode
