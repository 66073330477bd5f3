"""Low-rank layers: a chain of plain ``nn.Conv2d`` or linear modules in place of one dense layer.

A low-rank layer sits at the dense layer's dotted name and has its attributes, because timm models read them
(``conv_head.in_channels``, ``patch_embed.proj.weight.device`` and the like).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArpHubError
from ..plan import LayerPlan
from ..schemes import Factors, Scheme, make_scheme
from ..schemes.shapes import ConvSpec, LayerShape
from .dense import alteration, dense_shape, dense_weight, is_same_padded, numeric_padding, pad_mode

_pad_same = cast("Callable[..., Tensor]", pad_same)  # timm's annotations say lists, but pairs work as well
torch.fx.wrap("_pad_same")  # it computes with the input's size, which torch.fx cannot follow
_WRITES = frozenset(
    {"__setitem__", "__set__"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
)
"""Functions that write to a tensor, besides those whose name ends with an underscore. ``__set__`` is that of ``data``
and ``requires_grad``."""


def layer_shape(module: nn.Module) -> LayerShape:
    """The shape of a dense or low-rank layer, with padding as numbers.

    Raises:
        ArpHubError: If the module is not of a kind that can be decomposed.
    """
    if isinstance(module, LowRankLayer):
        return module.scheme.shape
    return dense_shape(module)


def effective_weight(module: nn.Module) -> Tensor:
    """The weight that multiplies the input, ``(O, I, kh, kw)``: merged factors, or the standardised weight."""
    if isinstance(module, LowRankLayer):
        return module.scheme.compose(module.factor_weights())
    return dense_weight(module)


class GroupedLinear(nn.Module):
    """A linear layer with ``groups``, as ``nn.Conv2d`` has them: its full weight is block-diagonal.

    Maps ``(..., in_features)`` to ``(..., out_features)``; ``weight`` is ``(out_features, in_features / groups)``.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        """Multiply every group of features by its block."""
        group_in, group_out = self.in_features // self.groups, self.out_features // self.groups
        blocks = self.weight.view(self.groups, group_out, group_in).transpose(1, 2)
        rows = x.reshape(-1, self.groups, group_in).transpose(0, 1)
        y = torch.bmm(rows, blocks).transpose(0, 1).flatten(1)
        y = y.reshape(x.shape[:-1] + y.shape[1:])  # sums of shapes, which torch.fx and TorchScript can follow
        return y if self.bias is None else y + self.bias.to(y.dtype)  # under autocast, the dtype of the product

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"


_FACTORS = (nn.Conv2d, nn.Linear, GroupedLinear)


class ComputedWeight(Tensor):
    """The merged weight of a low-rank layer. To write to it is an error, because the layer would not change.

    Results of all other functions are plain tensors, except views of the weight.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse in-place functions; call all others on plain tensors."""
        kwargs, name = kwargs or {}, func.__name__.partition(".")[0]  # without the overload, as in "mul_.Scalar"
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        written = (args[:1] if writes else (), kwargs.get("out"))  # the first may be a list, as for _foreach_mul_
        if any(isinstance(leaf, cls) for leaf in tree_leaves(written)):
            raise _read_only()
        weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            before = _versions(weights)
            found = func(*args, **kwargs)
            if _versions(weights) != before:  # a function that writes and whose name does not say so
                raise _read_only()
            if type(found) in (list, tuple):
                return type(found)(_still_computed(one, weights, cls) for one in found)
            return _still_computed(found, weights, cls)

    def __iter__(self) -> Iterator[Tensor]:
        """The rows, which are views of the weight."""
        return iter(self.unbind())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain copy, which may be written to."""
        return self.detach().as_subclass(Tensor).clone()


def _read_only() -> ArpHubError:
    return ArpHubError(
        "the weight of a low-rank layer is computed from its factors, and writing to it changes nothing: "
        "change layer.factors, or call to_dense(model) first"
    )


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written to. Tensors of inference mode do not count it."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _still_computed(found: Any, weights: Sequence[Tensor], kind: type[ComputedWeight]) -> Any:
    """A result of a function, which stays read-only if it is a view of a computed weight."""
    if type(found) is Tensor and any(_share_memory(found, weight) for weight in weights):
        return found.as_subclass(kind)
    return found


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class LowRankLayer(nn.Module):
    """The base of all low-rank layers.

    Attributes:
        scheme: The scheme, bound to the dense layer's shape.
        rank: Rank of every block.
        factors: The chain of factors. The last one has the dense layer's bias.
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

    def refusal(self) -> str | None:
        """Why the factors cannot be merged, or None if they can."""
        for added in (self._parameters, self._buffers, self._modules.keys() - {"factors"}):
            if added:
                return f"it holds '{min(added)}' besides its factors: merge that into the factors or remove it first"
        for part in (self, self.factors):
            if replaced := [name for name in vars(part) if callable(getattr(type(part), name, None))]:
                return f"its method '{replaced[0]}' was replaced on this one layer: restore it first"
        for number, factor in enumerate(self.factors):
            kind = type(factor)
            if "parametrizations" in factor._modules:
                return f"factor {number} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
            if kind not in _FACTORS:
                return (
                    f"factor {number} is a {kind.__module__}.{kind.__name__}: merge adapters into their base layers "
                    "first, and quantise only the merged model"
                )
            if reason := alteration(factor):
                return f"factor {number}: {reason}"
        expected = [conv.weight_shape for conv in self.scheme.convs(self.rank)]
        found = [tuple(weight.shape) for weight in self._factor_weights()]
        if found != expected:
            return f"its factors have shapes {found}, and those of its plan are {expected}: restore them"
        if biased := [number for number, factor in enumerate(self.factors[:-1]) if factor.bias is not None]:
            return f"factor {biased[0]} has a bias, which only the last one may have: set it to None"
        return None

    def factor_weights(self) -> Factors:
        """The factors in convolution layout.

        Raises:
            ArpHubError: If a factor is wrapped, quantised or otherwise altered, so that its weight is not all of it.
        """
        if reason := self.refusal():
            raise ArpHubError(f"this {type(self).__name__} cannot be merged: {reason}")
        return self._factor_weights()

    def _factor_weights(self) -> Factors:
        weights = [cast(Tensor, factor.weight) for factor in self.factors]
        return tuple(w if w.dim() == 4 else w[..., None, None] for w in weights)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace the weight and the bias, which are the factors'."""
        if name in ("weight", "bias"):
            raise ArpHubError(
                f"the {name} of a low-rank layer comes from its factors: change layer.factors, or call to_dense(model) "
                "first"
            )
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse what `torch.nn.utils.prune` adds: the layer's own weight is computed from its factors."""
        if name.startswith(("weight", "bias")):
            raise ArpHubError(
                f"'{name}' cannot be added to a low-rank layer, whose weight and bias come from its factors: prune or "
                "reparametrize layer.factors, or call to_dense(model) first"
            )
        super().register_parameter(name, param)

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        """Copy factors in convolution layout and the dense layer's bias into the chain."""
        for module, factor in zip(self.factors, factors, strict=True):
            weight = cast(Tensor, module.weight)
            weight.copy_(factor.reshape(weight.shape))
        if bias is not None:
            cast(Tensor, self.bias).copy_(bias)

    def dense_layer(self) -> nn.Module:
        """The dense layer with the merged weight: same outputs, dtype, device, mode and ``requires_grad``."""
        raise ArpHubError(f"{type(self).__name__} has no dense form")

    def extra_repr(self) -> str:
        """The layer's plan, for printing."""
        groups = f", groups={self.scheme.groups}" if self.scheme.groups > 1 else ""
        return f"scheme={self.scheme.name}, rank={self.rank}{groups}"

    @torch.no_grad()
    def _merged(self) -> Tensor:
        """The merged weight in float64, in convolution layout."""
        return self.scheme.compose([factor.detach().double() for factor in self.factor_weights()])

    def _computed_weight(self) -> Tensor:
        if torch.compiler.is_compiling():  # the checks do not compile
            return self.scheme.compose(self._factor_weights())
        return self.scheme.compose(self.factor_weights()).as_subclass(ComputedWeight)

    def _freeze_like(self, dense: nn.Conv2d | nn.Linear) -> None:
        for factor in self.factors:
            cast(nn.Parameter, factor.weight).requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            cast(Tensor, self.bias).requires_grad_(dense.bias.requires_grad)

    def _freeze(self, dense: nn.Conv2d | nn.Linear) -> None:
        """Freeze a dense weight if all factors are frozen, and its bias if this layer's is."""
        dense.weight.requires_grad_(any(cast(Tensor, factor.weight).requires_grad for factor in self.factors))
        if self.bias is not None:
            cast(Tensor, dense.bias).requires_grad_(self.bias.requires_grad)


class LowRankConv2d(LowRankLayer):
    """A convolution as a chain of smaller ones.

    Args:
        dense: The layer to replace. Its geometry, device, dtype, mode and ``requires_grad`` are copied, its weight
            is not.
        scheme: The scheme, bound to the layer's shape.
        rank: Rank of every block.
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
        self._freeze_like(dense)
        self.train(dense.training)

    @property
    def weight(self) -> Tensor:
        """The merged weight ``(O, I, kh, kw)``, computed on every access and read-only."""
        return self._computed_weight()

    def forward(self, x: Tensor) -> Tensor:
        """Pad as the dense layer would, then apply the chain."""
        if self.same_pad:  # with pairs, because TorchScript has no list(tuple)
            x = _pad_same(x, self.kernel_size, self.stride, self.dilation)
        elif self.pads:
            x = F.pad(x, self.pad_before, mode=self.pad_mode)
        return self.factors(x)

    def dense_layer(self) -> nn.Conv2d:
        """The plain convolution with the merged weight.

        Outputs, dtype, device, mode, memory layout and ``requires_grad`` are the same.
        """
        merged, first = self._merged(), cast(nn.Conv2d, self.factors[0])
        dense = _dense_conv(self, first.weight, merged, self.bias)
        self._freeze(dense)
        if any(_is_channels_last(factor) for factor in self.factors):
            dense.to(memory_format=torch.channels_last)
        return dense


class LowRankLinear(LowRankLayer):
    """A linear layer as a chain of smaller ones. Arguments are those of `LowRankConv2d`."""

    def __init__(self, dense: nn.Linear, scheme: Scheme, rank: int) -> None:
        convs = scheme.convs(rank)
        like = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        last = len(convs) - 1
        factors = [_linear(spec, bias=k == last and dense.bias is not None, **like) for k, spec in enumerate(convs)]
        super().__init__(scheme, rank, factors)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self._freeze_like(dense)
        self.train(dense.training)

    @property
    def weight(self) -> Tensor:
        """The merged weight ``(out, in)``, computed on every access and read-only."""
        return self._computed_weight()[..., 0, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the chain to the last dimension."""
        return self.factors(x)

    def dense_layer(self) -> nn.Linear:
        """The plain linear layer with the merged weight: same outputs, dtype, device, mode and ``requires_grad``."""
        merged, first = self._merged(), cast(Tensor, self.factors[0].weight)
        dense = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device=first.device, dtype=first.dtype
        )
        _fill(dense, merged[..., 0, 0], self.bias)
        self._freeze(dense)
        return dense.train(self.training)


def low_rank_layer(dense: nn.Module, plan: LayerPlan) -> LowRankConv2d | LowRankLinear:
    """The low-rank form of ``dense``, with its dtype, device, mode, memory layout and ``requires_grad``.

    Load its factors afterwards.

    Raises:
        ArpHubError: If the plan does not fit the layer.
    """
    scheme = make_scheme(plan.scheme, layer_shape(dense), plan.groups)
    if isinstance(dense, nn.Linear):
        return LowRankLinear(dense, scheme, plan.rank)
    layer = LowRankConv2d(cast(nn.Conv2d, dense), scheme, plan.rank)
    return layer.to(memory_format=torch.channels_last) if _is_channels_last(dense) else layer


def _is_channels_last(module: nn.Module) -> bool:
    """Whether a weight lies in memory as channels last, and not in the default layout as well, as 1x1 kernels may."""
    weight = cast(Tensor, module.weight)
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


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


def _dense_conv(like: nn.Conv2d | LowRankConv2d, sample: Tensor, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution with the geometry of ``like`` and the device and dtype of ``sample``."""
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
