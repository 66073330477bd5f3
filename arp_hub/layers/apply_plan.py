"""A plan and a model: does the one fit the other, build the structure, read the plan back."""

from __future__ import annotations

import difflib

from torch import nn

from ..errors import ArpHubError
from ..plan import LayerPlan, RankPlan
from ..schemes import Scheme, make_scheme
from .dense import refusal
from .low_rank import LowRankLayer, layer_shape, low_rank_layer
from .model import low_rank_layers, replace_layers


def check_plan(model: nn.Module, plan: RankPlan) -> dict[str, Scheme]:
    """Check every entry of a plan against a dense model.

    Returns:
        The scheme of every planned layer, bound to the layer's shape, by name and in the plan's order.

    Raises:
        ArpHubError: If a layer is missing, of a kind that stays dense, decomposed already, planned twice under two
            names, or if groups or rank do not fit its shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[int, str] = {}
    schemes = {}
    for name, layer in plan.layers.items():
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ArpHubError(
                f"the plan names the layer {name!r}, which this {type(model).__name__} lacks{hint} "
                "(a plan belongs to the model it was made for: make a new one with make_plan)"
            )
        module = modules[name]
        if isinstance(module, LowRankLayer):
            raise ArpHubError(f"layer '{name}' is decomposed already: call to_dense(model) first")
        if reason := refusal(module):
            raise ArpHubError(f"layer '{name}' cannot be decomposed ({reason}): take it out of the plan")
        if id(module) in seen:
            raise ArpHubError(f"layers '{seen[id(module)]}' and '{name}' are one shared module: plan it once")
        seen[id(module)] = name
        schemes[name] = _bind(name, layer, module)
    return schemes


def _bind(name: str, layer: LayerPlan, module: nn.Module) -> Scheme:
    try:
        scheme = make_scheme(layer.scheme, layer_shape(module), layer.groups)
    except ArpHubError as error:
        raise ArpHubError(f"layer '{name}': {error}") from None
    if layer.rank > scheme.max_rank:
        raise ArpHubError(
            f"layer '{name}': rank {layer.rank} is beyond {scheme.max_rank}, the full rank of scheme "
            f"'{layer.scheme}' with groups={layer.groups} on a weight of "
            f"{scheme.shape.out_channels}x{scheme.shape.group_in}x{scheme.shape.taps}"
        )
    return scheme


def apply_plan(model: nn.Module, plan: RankPlan) -> nn.Module:
    """Replace every planned layer by its decomposed form, in place; factors are left to be loaded.

    Raises:
        ArpHubError: As `check_plan` does, before anything is replaced.
    """
    check_plan(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    replace_layers(model, {modules[name]: low_rank_layer(modules[name], layer) for name, layer in plan.layers.items()})
    return model


def plan_of(model: nn.Module) -> RankPlan:
    """The plan that a decomposed model embodies, read off its layers (reasons for dense layers are not in a model)."""
    return RankPlan({name: layer.layer_plan for name, layer in low_rank_layers(model).items()})
