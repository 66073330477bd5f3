"""The decomposed layers, and the layers of a model: found, measured, replaced.

A decomposed layer is a chain of plain ``nn.Conv2d`` or ``nn.Linear`` modules that sits at the dense layer's dotted name
and answers to the dense layer's attributes, because timm models read them (``conv_head.in_channels``,
``patch_embed.proj.weight.device`` and the like).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn

from ..errors import ArpHubError
from ..plan import LayerPlan
from ..schemes import Factors, Scheme, make_scheme
from ..schemes.shapes import ConvSpec, LayerShape
from .dense import dense_shape, dense_weight, is_same_padded, numeric_padding, pad_mode

_pad_same = cast("Callable[..., Tensor]", pad_same)  # timm's annotations ask for lists, it takes pairs


def layer_shape(module: nn.Module) -> LayerShape:
    """The shape of a dense or decomposed layer, with padding as numbers.

    Raises:
        ArpHubError: If the module is not of a kind that can be decomposed.
    """
    if isinstance(module, LowRankLayer):
        return module.scheme.shape
    return dense_shape(module)


def effective_weight(module: nn.Module) -> Tensor:
    """The weight that really multiplies the input, ``(O, I, kh, kw)``.

    For a weight-standardised convolution that is the standardised weight.
    """
    if isinstance(module, LowRankLayer):
        return module.scheme.compose(module.factor_weights())
    return dense_weight(module)


class GroupedLinear(nn.Module):
    """A linear layer whose weight is block-diagonal, as a convolution with ``groups`` is.

    Maps ``(..., in_features)`` to ``(..., out_features)``; ``weight`` is ``(out_features, in_features / groups)``.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks side by side."""
        blocks = self.weight.unflatten(0, (self.groups, -1)).mT
        rows = x.unflatten(-1, (self.groups, -1)).movedim(-2, 0).flatten(1, -2)
        y = torch.bmm(rows, blocks).unflatten(1, x.shape[:-1]).movedim(0, -2).flatten(-2)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"


class LowRankLayer(nn.Module):
    """What the decomposed layers share: the plan's entry, the chain of factors, the way back to a dense layer.

    ``factors`` is the chain; its last module carries the dense layer's bias.
    """

    __jit_unused_properties__ = ("layer_plan", "bias", "weight")

    def __init__(self, scheme: Scheme, rank: int, factors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.scheme = scheme
        self.rank = rank
        self.factors = nn.Sequential(*factors)

    @property
    def layer_plan(self) -> LayerPlan:
        """The entry of a plan that describes this layer."""
        return LayerPlan(self.scheme.name, self.rank, self.scheme.groups)

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's bias, held by the last factor."""
        return cast("Tensor | None", self.factors[-1].bias)

    def factor_weights(self) -> Factors:
        """The factors in convolution layout."""
        weights = [cast(Tensor, factor.weight) for factor in self.factors]
        return tuple(w if w.dim() == 4 else w[..., None, None] for w in weights)

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        """Copy factors in convolution layout, and the dense layer's bias, into the chain."""
        for module, factor in zip(self.factors, factors, strict=True):
            weight = cast(Tensor, module.weight)
            weight.copy_(factor.reshape(weight.shape))
        if bias is not None:
            cast(Tensor, self.bias).copy_(bias)

    def dense_layer(self) -> nn.Module:
        """A dense layer that computes the same, with the factors merged."""
        raise ArpHubError(f"{type(self).__name__} has no dense form")

    def extra_repr(self) -> str:
        """The layer's plan, for printing."""
        groups = f", groups={self.scheme.groups}" if self.scheme.groups > 1 else ""
        return f"scheme={self.scheme.name}, rank={self.rank}{groups}"

    @torch.no_grad()
    def _merged(self) -> Tensor:
        """The merged weight in float64, in convolution layout."""
        return self.scheme.compose([factor.detach().double() for factor in self.factor_weights()])


class LowRankConv2d(LowRankLayer):
    """A convolution as a chain of smaller ones.

    Args:
        dense: The layer that it stands for; its attributes, device, dtype and mode are taken over, its weight is not.
        scheme: The scheme, bound to the layer's shape.
        rank: Rank per block.
    """

    def __init__(self, dense: nn.Conv2d, scheme: Scheme, rank: int) -> None:
        convs = scheme.convs(rank)
        like = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        last = len(convs) - 1
        factors = [_conv2d(spec, bias=k == last and dense.bias is not None, **like) for k, spec in enumerate(convs)]
        super().__init__(scheme, rank, factors)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.groups, self.padding_mode = dense.padding, dense.groups, dense.padding_mode
        self.same_pad = is_same_padded(dense)
        self.pads = not self.same_pad and numeric_padding(dense) is None
        self.pad_before = list(dense._reversed_padding_repeated_twice)
        self.pad_mode = pad_mode(dense)
        self.train(dense.training)

    @property
    def weight(self) -> Tensor:
        """The merged weight ``(O, I, kh, kw)``, computed on every access. To change the layer, change its factors."""
        return self.scheme.compose(self.factor_weights())

    def forward(self, x: Tensor) -> Tensor:
        """Pad as the dense layer would, then apply the chain."""
        if self.same_pad:  # tuples go in as they are: TorchScript has no list(tuple)
            x = _pad_same(x, self.kernel_size, self.stride, self.dilation)
        elif self.pads:
            x = F.pad(x, self.pad_before, mode=self.pad_mode)
        return self.factors(x)

    def dense_layer(self) -> nn.Conv2d:
        """The plain convolution that computes the same."""
        first = cast(nn.Conv2d, self.factors[0])
        return _dense_conv(self, first.weight, self._merged(), self.bias)


class LowRankLinear(LowRankLayer):
    """A linear layer as a chain of smaller ones; arguments as for `LowRankConv2d`."""

    def __init__(self, dense: nn.Linear, scheme: Scheme, rank: int) -> None:
        convs = scheme.convs(rank)
        like = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        last = len(convs) - 1
        factors = [_linear(spec, bias=k == last and dense.bias is not None, **like) for k, spec in enumerate(convs)]
        super().__init__(scheme, rank, factors)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.train(dense.training)

    @property
    def weight(self) -> Tensor:
        """The merged weight ``(out, in)``, computed on every access. To change the layer, change its factors."""
        return self.scheme.compose(self.factor_weights())[..., 0, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the chain to the last dimension."""
        return self.factors(x)

    def dense_layer(self) -> nn.Linear:
        """The plain linear layer that computes the same."""
        first = cast(Tensor, self.factors[0].weight)
        dense = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device=first.device, dtype=first.dtype
        )
        _fill(dense, self._merged()[..., 0, 0], self.bias)
        return dense.train(self.training)


def low_rank_layer(dense: nn.Module, plan: LayerPlan) -> LowRankConv2d | LowRankLinear:
    """The decomposed form of ``dense``, structure only: load its factors afterwards.

    Raises:
        ArpHubError: If the plan does not fit the layer.
    """
    scheme = make_scheme(plan.scheme, layer_shape(dense), plan.groups)
    if isinstance(dense, nn.Linear):
        return LowRankLinear(dense, scheme, plan.rank)
    return LowRankConv2d(cast(nn.Conv2d, dense), scheme, plan.rank)


def _conv2d(spec: ConvSpec, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.groups,
        **options,
    )


def _linear(spec: ConvSpec, bias: bool, **like: Any) -> nn.Module:
    if spec.groups == 1:
        return nn.Linear(spec.in_channels, spec.out_channels, bias=bias, **like)
    return GroupedLinear(spec.in_channels, spec.out_channels, spec.groups, bias=bias).to(**like)


def plain_layer(module: nn.Module) -> nn.Module:
    """A plain convolution or linear layer that computes what ``module`` does, for a layer that can be decomposed."""
    weight = effective_weight(module)
    if isinstance(module, nn.Linear):
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, weight.device, weight.dtype)
        _fill(dense, weight[..., 0, 0], module.bias)
        return dense.train(module.training)
    return _dense_conv(cast(nn.Conv2d, module), weight, weight, cast(nn.Conv2d, module).bias)


def _dense_conv(like: nn.Conv2d | LowRankConv2d, sample: Tensor, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution with the attributes of ``like`` and the device and dtype of ``sample``."""
    options: dict[str, Any] = {
        "kernel_size": like.kernel_size,
        "stride": like.stride,
        "dilation": like.dilation,
        "groups": like.groups,
        "bias": bias is not None,
        "device": sample.device,
        "dtype": sample.dtype,
    }
    dense: nn.Conv2d
    if is_same_padded(like):
        dense = timm.layers.Conv2dSame(like.in_channels, like.out_channels, **options)
    else:
        padding: Any = like.padding
        dense = nn.Conv2d(
            like.in_channels, like.out_channels, padding=padding, padding_mode=like.padding_mode, **options
        )
    _fill(dense, weight, bias)
    return dense.train(like.training)


@torch.no_grad()
def _fill(dense: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    dense.weight.copy_(weight)
    if bias is not None:
        cast(Tensor, dense.bias).copy_(bias)
