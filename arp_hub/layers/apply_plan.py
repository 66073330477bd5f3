"""Check a plan against a model, give the model the plan's structure, and read the plan of a decomposed model."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..errors import ArpHubError
from ..plan import LayerPlan, PlannedModel, RankPlan
from ..schemes import Scheme, make_scheme
from .low_rank import LowRankLayer, layer_shape, low_rank_layer
from .model import low_rank_layers, refusals, replace_layers, weight_layers


def check_plan(model: nn.Module, plan: RankPlan) -> dict[str, Scheme]:
    """Check every entry of a plan against a dense model.

    Returns:
        The scheme of every planned layer, bound to the layer's shape, by name and in the plan's order.

    Raises:
        ArpHubError: If the plan was made for another model, if a layer is missing, cannot be decomposed, is decomposed
            already or planned twice under two names, or if groups or rank do not fit its shape.
    """
    if not isinstance(plan, RankPlan):
        way = "RankPlan.from_dict(plan)" if isinstance(plan, Mapping) else "make_plan, or RankPlan.load(path)"
        raise ArpHubError(f"plan must be a RankPlan, got {type(plan).__name__} {plan!r:.80}: use {way}")
    if plan.model is not None:
        _check_same_model(model, plan.model)
    reasons = refusals(model)
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
        if reason := reasons.get(module):
            raise ArpHubError(f"layer '{name}' cannot be decomposed: {reason} (or take the layer out of the plan)")
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


def made_for(model: nn.Module, plan: RankPlan) -> RankPlan:
    """The plan with a note of the model that it is for, which `check_plan` compares with the model that it is given."""
    shapes = {name: _shape(cast(Tensor, model.get_submodule(name).weight)) for name in plan.layers}
    return dataclasses.replace(plan, model=PlannedModel(_architecture(model), shapes))


def _architecture(model: nn.Module) -> str:
    """The model's timm name, or its class with the number of its layers where timm did not create it."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = (getattr(model, "_model_args", None) or {}).get("backbone") or config.get("architecture")
    if name:
        return str(name).partition(".")[0]
    return f"{type(model).__name__} with {sum(1 for _ in weight_layers(model))} layers"


def _check_same_model(model: nn.Module, planned: PlannedModel) -> None:
    way_out = "make a plan for this model with make_plan"
    if (found := _architecture(model)) != planned.architecture:
        raise ArpHubError(f"the plan was made for {planned.architecture:.100}, and this model is {found}: {way_out}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, shape in planned.shapes.items():
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and _shape(weight) != shape:
            raise ArpHubError(
                f"layer '{name}': the plan was made for a weight of {shape:.50}, and this {planned.architecture} has "
                f"one of {_shape(weight)}: {way_out}"
            )


def _shape(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape))


def apply_plan(model: nn.Module, plan: RankPlan) -> nn.Module:
    """Replace every planned layer by its low-rank form, in place. Factors are still to be loaded.

    Raises:
        ArpHubError: As `check_plan` does, before anything is replaced.
    """
    check_plan(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    replace_layers(model, {modules[name]: low_rank_layer(modules[name], layer) for name, layer in plan.layers.items()})
    return model


def plan_of(model: nn.Module) -> RankPlan:
    """The plan that the low-rank layers of a model follow. A model does not store why the others are dense."""
    return RankPlan({name: layer.layer_plan for name, layer in low_rank_layers(model).items()})
