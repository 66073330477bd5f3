"""One forward pass on the meta device: the layers in order of use, the sizes of their inputs, and the MACs.

Nothing is computed and no weight is copied, so that the largest models take seconds. A model whose forward pass needs
values, or makes tensors on the CPU, computes one image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .._utils.torch_utils import kept_activations
from ..errors import ArpHubError
from ..schemes.shapes import Pair
from .dense import padder
from .low_rank import LowRankLayer
from .model import count_params, layers_called, weight_layers

InputSize = tuple[int, int, int]


@dataclass(frozen=True)
class Trace:
    """One forward pass of one image.

    Attributes:
        sizes: For every layer that was called, in order of its first call: the height and width of its input map, with
            the padding that the layer adds before its convolution (tokens x 1 for a linear layer), once per call, or
            once per map where the model cuts the image into several.
        macs: Multiply-accumulates of the whole model.
        params: Parameters of the whole model.
    """

    sizes: Mapping[str, tuple[Pair, ...]]
    macs: int
    params: int


def input_size_of(model: nn.Module, input_size: InputSize | None = None) -> InputSize:
    """``input_size`` if given, else that of the model's config.

    Raises:
        ArpHubError: If neither is known, or the given one is not three positive numbers.
    """
    if input_size is None:
        config: Any = getattr(model, "pretrained_cfg", None) or {}
        if not config.get("input_size"):
            raise ArpHubError("the model has no input size in its config: pass input_size=(channels, height, width)")
        input_size = cast(InputSize, get_model_input_config(model)["input_size"])  # with img_size= and in_chans= in it
    sizes = input_size if isinstance(input_size, Sequence) else ()
    if len(sizes) != 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ArpHubError(f"input_size must be (channels, height, width), got {input_size!r}")
    channels, height, width = input_size
    return channels, height, width


def trace(model: nn.Module, input_size: InputSize | None = None) -> Trace:
    """Follow one image through a copy of the model, on the meta device if it can run there.

    Args:
        model: Any timm model, dense or decomposed.
        input_size: ``(channels, height, width)``; by default the model's own.

    Raises:
        ArpHubError: If the model cannot run on an input of this size.
    """
    size = input_size_of(model, input_size)
    twin = meta_copy(model)
    try:
        try:
            return _traced(twin, size)
        except Exception as error:
            if found := [name for name, part in model.named_modules() if ".quantized." in type(part).__module__]:
                raise ArpHubError(f"layer '{found[0]}' is quantised: plan the model before you quantise it") from error
            if any(parameter.is_meta for parameter in model.parameters()):
                raise
            return _traced(copy.deepcopy(model, kept_activations(model)), size)
    except ArpHubError:
        raise
    except Exception as error:
        raise ArpHubError(f"the model cannot run on an input of size {size}: {error}") from error


def _traced(twin: nn.Module, size: InputSize) -> Trace:
    """Follow one image through a copy of a model."""
    twin.eval().requires_grad_(False)  # the counter fails on gradients of views
    names = {id(module): name for name, module in weight_layers(twin)}
    names.update({id(m): name for name, m in twin.named_modules() if isinstance(m, LowRankLayer)})
    sizes: dict[str, list[Pair]] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            x = args[0]
            calls = len(x) if x.dim() == 4 and not _is_linear(module) else 1  # a model may cut an image into several
            sizes.setdefault(names[id(module)], []).extend([_map_size(module, x)] * calls)

    for module in twin.modules():
        if id(module) in names:
            module.register_forward_pre_hook(record)
    with layers_called(twin):
        macs = _macs(twin, size)
    return Trace({name: tuple(calls) for name, calls in sizes.items()}, macs, count_params(twin))


def count_macs(model: nn.Module, input_size: InputSize | None = None) -> int:
    """Multiply-accumulates of one image, attention included."""
    return trace(model, input_size).macs


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device: the same structure, shared modules included, without weights."""
    attributes = tree_leaves([list(vars(module).values()) for module in model.modules()])
    tensors = [*model.parameters(), *model.buffers(), *(value for value in attributes if isinstance(value, Tensor))]
    return copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})


def _on_meta(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _map_size(module: nn.Module, x: Tensor) -> Pair:
    if x.dim() == 4 and (pad := padder(module)):
        x = pad(x)
    return (x.numel() // x.shape[-1], 1) if _is_linear(module) or x.dim() != 4 else (x.shape[-2], x.shape[-1])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "in_features")


@torch.no_grad()
def _macs(model: nn.Module, size: InputSize) -> int:
    first = next((t for t in model.parameters() if t.is_floating_point()), torch.empty(0, device="meta"))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size, dtype=first.dtype, device=first.device))
    return counter.get_total_flops() // 2
