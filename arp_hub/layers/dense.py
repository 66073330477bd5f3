"""Dense layers: which can be decomposed, their shape, the weight that multiplies the input, and their padding."""

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
_BUILT: dict[type[nn.Module], nn.Module] = {}


def refusal(module: nn.Module) -> str | None:
    """Why a layer must stay dense, or None if it can be decomposed.

    This looks at the layer alone. `arp_hub.layers.model.refusals` also knows the layer's place in its model.
    """
    kind = type(module)
    if kind not in _LINEARS + _PLAIN_CONVS + _STANDARDISED_CONVS:
        if "parametrizations" in module._modules:
            return (
                "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') "
                "first"
            )
        return f"layers of type {kind.__name__} are not decomposed"
    if reason := alteration(module):
        return reason
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.groups > 1:
        return "depthwise: each channel's kernel is already a single small filter"
    return None


def alteration(module: nn.Module) -> str | None:
    """What was added to a layer so that its weight alone does not say what it computes, or None.

    The layer is compared with a new one of its own type, which must take three numbers to construct.
    """
    built = as_built(type(module))
    if "weight" not in module._parameters:
        return (
            "its weight is computed before every forward pass (weight_norm, spectral_norm or prune): make it permanent "
            "first, with torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove"
        )
    for added in (
        module._parameters.keys() - built._parameters.keys(),
        module._buffers.keys() - built._buffers.keys(),
        module._modules.keys() - built._modules.keys(),
    ):
        if added:
            return f"it holds '{min(added)}' besides its weight and bias: merge that into the weight or remove it first"
    if replaced := [name for name in vars(module) if callable(getattr(type(module), name, None))]:
        return f"its method '{replaced[0]}' was replaced on this one layer: restore it first"
    return None


def as_built(kind: type[nn.Module]) -> nn.Module:
    """A layer as its constructor makes it, on the meta device. What another layer has beyond it was added later."""
    if kind not in _BUILT:
        with torch.device("meta"):
            _BUILT[kind] = kind(1, 1, 1)  # the third is a kernel size, whether there is a bias, or groups
    return _BUILT[kind]


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


def computes_weight(module: nn.Module) -> bool:
    """Whether a dense layer multiplies its input by another tensor than its parameter ``weight``."""
    return isinstance(module, _STANDARDISED_CONVS)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a dense layer that multiplies the input, ``(O, I, kh, kw)``.

    A weight-standardised convolution computes it on every call: it is captured where it enters ``conv2d``.
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
    """Keeps the weight of the last ``conv2d`` call."""

    weight: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            self.weight = (args[1] if len(args) > 1 else kwargs["weight"]).detach().clone()
        return func(*args, **kwargs)


def is_same_padded(module: nn.Module) -> bool:
    """Whether the layer pads its input by an amount that depends on the input's size."""
    same = (timm.layers.Conv2dSame, timm.layers.StdConv2dSame)
    return isinstance(module, same) or bool(getattr(module, "same_pad", False))


def numeric_padding(conv: nn.Conv2d) -> Pair | None:
    """Symmetric zero padding as numbers, or None if the input must be padded before the convolution."""
    if is_same_padded(conv) or conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)
    return cast(Pair, tuple(conv.padding))


def padder(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The padding that a layer applies before its convolution, or None where the convolution itself pads with zeros."""
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
    """The padding mode by its name in ``F.pad``."""
    return "constant" if conv.padding_mode == "zeros" else conv.padding_mode
