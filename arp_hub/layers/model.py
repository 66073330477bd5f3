"""Find, check, count and replace the layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArpHubError
from .carry_over import carry_over
from .cfg_names import name_factors
from .dense import refusal
from .low_rank import LowRankLayer
from .sharding import check_unsharded

_SEPARATE = "qkv_bias_separate"
"""Attribute of timm's attention modules that says whether they call ``qkv`` or read its weight."""
_MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that ``timm.utils.reparameterize_model`` calls to merge a module's layers."""
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRAPPERS = (
    *("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"),
    *("ModelEmaV2", "ModelEmaV3", "AveragedModel"),  # moving averages of timm and torch
)
"""Classes that hold a model as ``module``."""


def check_bare(model: object) -> nn.Module:
    """The model, if it is a module that is neither compiled nor wrapped for several devices or for averaging.

    Raises:
        ArpHubError: The message says what to pass.
    """
    if not isinstance(model, nn.Module):
        shown = f"{type(model).__name__} {model!r}" if isinstance(model, str) else type(model).__name__
        raise ArpHubError(f"model must be a torch.nn.Module, as timm.create_model returns it, got {shown:.100}")
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "_orig_mod" in model._modules:
        raise ArpHubError("the model is compiled: pass model._orig_mod, and call torch.compile on the result")
    if wrapper := kinds.intersection(_WRAPPERS):
        raise ArpHubError(f"the model is wrapped in {min(wrapper)}: pass it unwrapped, as model.module")
    return model


def check_model(model: object, *, mergeable: bool = False, sharded: bool = False) -> None:
    """Check that a model is a bare, uncompiled module.

    Args:
        model: What the user passed as a model.
        mergeable: Check the factors of low-rank layers, too: they must be plain layers.
        sharded: Accept parameters that FSDP2 shards.

    Raises:
        ArpHubError: If it is something else, or wrapped: the message says what to pass.
    """
    model = check_bare(model)
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        raise ArpHubError("the model is wrapped by PEFT: pass model.merge_and_unload()")
    if "ScriptModule" in {kind.__name__ for kind in type(model).__mro__}:
        raise ArpHubError("the model is a TorchScript module: pass the Python model that it was made from")
    if not sharded:
        check_unsharded(model)
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise ArpHubError(f"the model's part '{name}' is compiled: call torch.compile after decomposing")
        for key, value in vars(module).items():
            computed = {f"{key}_orig", f"{key}_v"} & module._parameters.keys()
            if computed and isinstance(value, Tensor) and not value.is_leaf:
                raise ArpHubError(
                    f"layer '{name}' computes its {key} from '{min(computed)}' before every forward pass and cannot be "
                    "copied: make it permanent first, with torch.nn.utils.remove_weight_norm, remove_spectral_norm or "
                    "prune.remove"
                )
        if mergeable and isinstance(module, LowRankLayer) and (reason := module.refusal()):
            raise ArpHubError(f"layer '{name}' cannot be merged: {reason}")


@torch.no_grad()
def check_weights(model: nn.Module, *, trainable: bool = True) -> None:
    """Check that weights are finite, on a device that has float64. Buffers may hold infinity, as attention masks do.

    Args:
        model: The model. Weights on the meta device are not checked.
        trainable: Refuse weights that were made in inference mode, too: they cannot be changed or trained.

    Raises:
        ArpHubError: Naming the layer.
    """
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        raise ArpHubError("the model is on an Apple GPU (mps), which has no float64: move it to the CPU, model.cpu()")
    buffers = dict(model.named_buffers())
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        if trainable and tensor.is_inference():
            raise ArpHubError(
                "the model was made in inference mode, so its weights cannot be changed or trained: make it outside, "
                "or pass copy.deepcopy(model), copied outside"
            )
        if tensor.is_meta or tensor.dtype not in _CHECKED:
            continue
        if bool(tensor.isnan().any() if name in buffers else not tensor.isfinite().all()):
            layer, _, key = name.rpartition(".")
            raise ArpHubError(f"layer '{layer}': its {key} holds NaN or infinite values")


def refusals(model: nn.Module) -> dict[nn.Module, str]:
    """Why modules of a model must stay dense; a module without an entry can be decomposed."""
    owners: dict[int, dict[nn.Module, str]] = {}
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[module] = name
        if _is_adapter(module):
            reason = f"part of the adapter '{name}': merge it first (model.merge_and_unload() in PEFT)"
            reasons |= dict.fromkeys(module.modules(), reason)
        if isinstance(module, LowRankLayer):
            reasons |= dict.fromkeys(module.modules(), f"part of the low-rank layer '{name}'")
    for module in model.modules():
        for key, held in _held_plainly(module):
            reasons.setdefault(held, f"the attribute '{key}' also holds it, where it stays as it is: use nn.ModuleList")
        if found := refusal(module):
            reasons.setdefault(module, found)
        for parameter in module.parameters(recurse=False):
            others = [name for owner, name in owners[id(parameter)].items() if owner is not module]
            if others:
                reasons.setdefault(module, f"it shares a parameter with '{others[0]}', and factors cannot be shared")
    if not model._modules:
        reasons.setdefault(model, "it is the whole model and cannot be replaced in place: wrap it in nn.Sequential")
    return reasons


def _held_plainly(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that an attribute holds beside those registered, such as a list that ``forward`` goes through."""
    for key, value in vars(module).items():
        if key not in ("_modules", "_parameters", "_buffers") and isinstance(value, (list, tuple, dict, nn.Module)):
            yield from ((key, held) for held in tree_leaves(value) if isinstance(held, nn.Module))


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module wraps a layer as PEFT's adapters do. A DLA, too, has a part named ``base_layer``: a stage."""
    base = module._modules.get("base_layer")
    if base is not None:
        return not base._modules or any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
    return "original_module" in module._modules


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with a weight of two or more dimensions, each once; low-rank layers are left out."""

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, LowRankLayer):
            return
        weights = [p for key, p in module._parameters.items() if key.startswith("weight") and p is not None]
        if any(weight.dim() >= 2 for weight in weights) or "weight" in _parametrizations(module):
            yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{name}.{child_name}" if name else child_name, child)

    seen: set[int] = set()
    yield from visit("", model)


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    """What ``torch.nn.utils.parametrize`` registered on a module, by the names of its parameters."""
    return cast(nn.ModuleDict, module._modules.get("parametrizations") or nn.ModuleDict())


def other_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters of two or more dimensions that are no layer's weight, such as position embeddings, each once."""
    layers = {id(p) for _, module in weight_layers(model) for p in module._parameters.values()}
    layers |= {id(p) for module in model.modules() for p in _parametrizations(module).parameters()}
    layers |= {id(p) for layer in low_rank_layers(model).values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in layers and sum(side > 1 for side in parameter.shape) >= 2:
            yield name, parameter


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Make a model call all of its layers within the context, with the same outputs.

    Attention with separate biases (BEiT, EVA, Swin V2) reads the weight of ``qkv`` without calling the layer, unless
    ``qkv_bias_separate`` is set.
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
    """Put ``new`` layers in place of old ones, at all their paths, with the old ones' hooks and attributes.

    Modules that read ``layer.weight`` directly, bypassing ``forward``, are set to call the layer. Modules that would
    merge their layers refuse to. A pretrained_cfg names the factors of a decomposed classifier.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                carry_over(child, new[child])
                parent._modules[name] = new[child]
                if name == "qkv" and hasattr(parent, _SEPARATE):
                    setattr(parent, _SEPARATE, True)
    for module in model.modules():
        for method in _MERGING:
            if callable(getattr(type(module), method, None)):
                module.__dict__.pop(method, None)
                if any(isinstance(child, LowRankLayer) for child in module.modules()):
                    module.__dict__[method] = _refuse_to_merge
    name_factors(model)


def _refuse_to_merge() -> NoReturn:
    """Replaces ``fuse`` and the like, which would silently merge factors into a dense layer."""
    raise ArpHubError(
        "reparameterizing this module would make its decomposed layers dense: call reparameterize_model on the dense "
        "model (to_dense(model) restores it), then plan and decompose"
    )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The low-rank layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def count_params(model: nn.Module) -> int:
    """Number of parameters, without buffers; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
