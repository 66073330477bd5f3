"""The layers of a model: found, counted, replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from torch import nn

from ..errors import ArpHubError
from .low_rank import LowRankLayer

_SEPARATE = "qkv_bias_separate"
_MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which ``timm.utils.reparameterize_model`` lets a module merge its layers."""


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules that own a weight of two or more dimensions, each once, decomposed ones not looked into."""

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, LowRankLayer):
            return
        if any(p is not None and p.dim() >= 2 for n, p in module._parameters.items() if n.startswith("weight")):
            yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{name}.{child_name}" if name else child_name, child)

    seen: set[int] = set()
    yield from visit("", model)


def other_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters of two or more dimensions that are no layer's weight, such as position embeddings, each once."""
    layers = {id(p) for _, module in weight_layers(model) for p in module._parameters.values()}
    layers |= {id(p) for layer in low_rank_layers(model).values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in layers and sum(side > 1 for side in parameter.shape) >= 2:
            yield name, parameter


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Let a model call all of its layers, with the same outputs, for as long as this lasts.

    Attention with separate biases of its own (BEiT, EVA, Swin V2) takes the weight of ``qkv`` and passes the layer by,
    unless it is told to add the biases afterwards.
    """
    attentions = [module for module in model.modules() if getattr(module, _SEPARATE, None) is False]
    for module in attentions:
        setattr(module, _SEPARATE, True)
    try:
        yield
    finally:
        for module in attentions:
            setattr(module, _SEPARATE, isinstance(getattr(module, "qkv", None), LowRankLayer))


def replace_layers(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the ``new`` layers at every path of ``model`` where the old ones sit, so that shared layers stay shared.

    What of the model deals with the layer's weight behind its back is told to call the layer instead, or not to.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
                if name == "qkv" and hasattr(parent, _SEPARATE):
                    setattr(parent, _SEPARATE, True)
    for module in model.modules():
        for method in _MERGING:
            if callable(getattr(type(module), method, None)):
                module.__dict__.pop(method, None)
                if any(isinstance(child, LowRankLayer) for child in module.modules()):
                    module.__dict__[method] = _refuse_to_merge


def _refuse_to_merge() -> NoReturn:
    """Stands in for ``fuse`` and the like, which would quietly merge factors back into a dense layer."""
    raise ArpHubError(
        "this module's layers are decomposed, and to reparameterize it would make them dense: call "
        "reparameterize_model on the dense model, then plan and decompose (to_dense(model) leads back)"
    )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The decomposed layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def count_params(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())
