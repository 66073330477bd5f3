"""Names of the plain layers of a compressed model, for tools that choose layers by name, such as PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import ArpHubError
from .low_rank import LowRankLayer
from .model import check_model, low_rank_layers


def factor_names(model: nn.Module, pattern: str | Sequence[str] = "*") -> list[str]:
    """Names of the ``nn.Linear`` and ``nn.Conv2d`` modules that do the work of some layers.

    A dense layer gives its own name, a low-rank layer the names of its factors. Grouped factors are left out, because
    adapters such as LoRA need modules without groups. Every low-rank layer has at least one other factor.

    Args:
        model: A dense or compressed model.
        pattern: Layers of the dense model: a name (``blocks.0.attn.qkv``), the end of names (``qkv`` or ``mlp.*``), a
            pattern (``blocks.*.mlp.*``), or several of them.

    Returns:
        Full dotted names, such as ``blocks.0.attn.qkv.factors.0``, in the order of the model.

    Raises:
        ArpHubError: If a pattern matches no layer.

    Example:
        >>> import timm, arp_hub
        >>> model = timm.create_model("test_vit")
        >>> plan = arp_hub.RankPlan({"blocks.0.attn.qkv": arp_hub.LayerPlan("channel", 8)})
        >>> factor_names(arp_hub.decompose(model, plan), "blocks.[01].attn.qkv")
        ['blocks.0.attn.qkv.factors.0', 'blocks.0.attn.qkv.factors.1', 'blocks.1.attn.qkv']
    """
    check_model(model)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    layers = dict(_layers(model))
    for one in patterns:
        if not any(_matches(name, one) for name in layers):
            some = ", ".join(f"'{name}'" for name in list(layers)[:3])
            raise ArpHubError(f"pattern {one!r} matches no layer of this {type(model).__name__}: it has {some}, ...")
    chosen = [name for name in layers if any(_matches(name, one) for one in patterns)]
    return [plain for name in chosen for plain in _plain(name, layers[name])]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Low-rank layers, and the plain layers outside of them."""
    inside = {id(part) for layer in low_rank_layers(model).values() for part in layer.modules() if part is not layer}
    for name, module in model.named_modules():
        if isinstance(module, (LowRankLayer, nn.Linear, nn.Conv2d)) and id(module) not in inside:
            yield name, module


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _plain(name: str, layer: nn.Module) -> Iterator[str]:
    """The name of a layer without groups, or those of the factors without groups."""
    if isinstance(layer, LowRankLayer):
        for number, factor in enumerate(layer.factors):
            yield from _plain(f"{name}.factors.{number}", factor)
    elif isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
        yield name
