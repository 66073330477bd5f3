"""What users and libraries attached to a layer moves to the layer that replaces it."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import nn

from ..plan import LayerPlan
from .dense import as_built
from .low_rank import LowRankConv2d, LowRankLayer, low_rank_layer

_HOOKS = tuple(key for key in vars(nn.Module()) if "hook" in key)
"""Where a module keeps its hooks of all kinds: forward, backward, and of its state dict."""
_BOUND_TO_THE_LAYER = frozenset({"_compiled_call_impl"})
"""Attributes that would make the replacement run the old layer: the result of ``layer.compile()``."""


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of a layer, and the attributes that were set on it and its parameters, to its replacement.

    Both layers then share their hooks, so that the handles that users hold still remove them.

    Args:
        old: A dense or a low-rank layer.
        new: The layer that takes its place.
    """
    for key in _HOOKS:
        vars(new)[key] = vars(old)[key]
    for hook in old._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # torch passes the layer itself to such a hook, by a weak reference
            cast(Any, hook).module = weakref.ref(new)
    for key in vars(old).keys() - _constructed(old) - _constructed(new) - _BOUND_TO_THE_LAYER:
        vars(new)[key] = vars(old)[key]
    for key in ("weight", "bias"):  # such as a mark that an optimiser is to leave out weight decay
        marks = {name: value for parameter in _held(old, key) for name, value in vars(parameter).items()}
        for parameter in _held(new, key):
            vars(parameter).update(marks)


def _held(layer: nn.Module, key: str) -> list[nn.Parameter]:
    """The parameters that make up the weight, or the bias, of a dense or low-rank layer."""
    parts = list(layer.factors) if isinstance(layer, LowRankLayer) else [layer]
    return [found for part in parts if (found := part._parameters.get(key)) is not None]


def loses_hooks(old: nn.Module) -> bool:
    """Whether a layer has hooks that `carry_over` cannot move: those of its parameters and of its factors."""
    parts = old.modules() if isinstance(old, LowRankLayer) else ()
    if any(vars(part)[key] for part in parts if part is not old for key in _HOOKS):
        return True
    return any(bool(p._backward_hooks or p._post_accumulate_grad_hooks) for p in old.parameters())


def _constructed(layer: nn.Module) -> set[str]:
    """The attributes that a layer of this type has by construction."""
    if not isinstance(layer, LowRankLayer):
        return set(vars(as_built(type(layer))))
    dense = as_built(nn.Conv2d if isinstance(layer, LowRankConv2d) else nn.Linear)
    return set(vars(low_rank_layer(dense, LayerPlan("channel", 1))))
