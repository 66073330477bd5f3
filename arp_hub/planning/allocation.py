"""Pick scheme and rank of every layer: the least sum of losses within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import ArpHubError
from ..plan import LayerPlan, RankPlan
from ..schemes import Scheme
from .costs import Floats

Losses = dict[str, list[tuple[Scheme, Floats]]]
"""Of every layer the schemes to choose from, with the loss at rank 1, 2, .."""


@dataclass(frozen=True)
class LayerOptions:
    """What can become of one layer: scheme, rank, cost and loss of all options, the dense one first."""

    name: str
    schemes: Sequence[Scheme | None]
    ranks: Sequence[int]
    costs: Floats
    losses: Floats

    def plan(self, option: int) -> LayerPlan | None:
        """What the layer's plan is by an option, None if it stays dense."""
        scheme = self.schemes[option]
        return None if scheme is None else LayerPlan(scheme.name, self.ranks[option], scheme.groups)


def plan_within(
    choices: Sequence[LayerOptions], share: float, total: float, cost: str, dense: Mapping[str, str]
) -> RankPlan:
    """The plan that spends ``share`` of the ``total``, of which the choices are only a part."""
    fixed = total - sum(layer.costs[0] for layer in choices)
    picked = _allocate(choices, share * total - fixed, total, share, cost, dense)
    plans: dict[str, LayerPlan] = {}
    reasons = dict(dense)
    for layer, option in zip(choices, picked, strict=True):
        plan = layer.plan(option)
        if plan is None:
            reasons[layer.name] = "the budget is better spent with this layer dense"
        else:
            plans[layer.name] = plan
    return RankPlan(plans, reasons)


def layer_options(losses: Losses, costs: Callable[[str, Scheme], Floats], multiple: int) -> list[LayerOptions]:
    """What can become of every layer, at ranks that are multiples of ``multiple``."""
    return [_layer_choices(name, found, partial(costs, name), multiple) for name, found in losses.items()]


def _layer_choices(
    name: str, losses: Sequence[tuple[Scheme, Floats]], costs: Callable[[Scheme], Floats], multiple: int
) -> LayerOptions:
    dense = costs(losses[0][0])[0]
    schemes: list[Scheme | None] = [None]
    ranks, prices, values = [0], [np.array([dense])], [np.zeros(1)]
    for scheme, loss in losses:
        held = np.arange(multiple, len(loss) + 1, multiple)
        price = costs(scheme)[held]
        cheaper = price < dense
        schemes += [scheme] * int(cheaper.sum())
        ranks += held[cheaper].tolist()
        prices.append(price[cheaper])
        values.append(loss[held[cheaper] - 1])
    return LayerOptions(name, schemes, ranks, np.concatenate(prices), np.concatenate(values))


def _allocate(
    choices: Sequence[LayerOptions], budget: float, total: float, share: float, cost: str, dense: Mapping[str, str]
) -> list[int]:
    """Pick one option for every layer: the least sum of losses whose cost stays within the budget."""
    least = sum(layer.costs.min() for layer in choices)
    if least > budget:
        _refuse_budget(choices, budget, total, share, cost, dense)

    def pick(price: float) -> list[int]:
        return [int(np.argmin(layer.losses + price * layer.costs)) for layer in choices]

    def spent(options: Sequence[int]) -> float:
        return float(sum(layer.costs[option] for layer, option in zip(choices, options, strict=True)))

    low, high = 1e-18, 1e12  # a high price spends little
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(pick(middle)) > budget else (low, middle)
    options = pick(high)
    if spent(options) > budget:
        options = [int(np.argmin(layer.costs)) for layer in choices]
    return _spend_rest(choices, options, budget - spent(options))


def _spend_rest(choices: Sequence[LayerOptions], options: list[int], rest: float) -> list[int]:
    """Upgrade single layers, best gain per cost first, while anything fits into what the budget leaves."""
    while True:
        best, best_rate = None, 0.0
        for k, layer in enumerate(choices):
            extra = layer.costs - layer.costs[options[k]]
            gain = layer.losses[options[k]] - layer.losses
            fits = (extra > 0) & (extra <= rest) & (gain > 0)
            if fits.any():
                rates = np.where(fits, gain / np.where(fits, extra, 1), 0.0)
                option = int(np.argmax(rates))
                if rates[option] > best_rate:
                    best, best_rate = (k, option), float(rates[option])
        if best is None:
            return options
        k, option = best
        rest -= float(choices[k].costs[option] - choices[k].costs[options[k]])
        options[k] = option


def _refuse_budget(
    choices: Sequence[LayerOptions], budget: float, total: float, share: float, cost: str, dense: Mapping[str, str]
) -> None:
    least = sum(float(layer.costs.min()) for layer in choices)
    lowest = share + (least - budget) / total
    reasons = sorted({reason for reason in dense.values()})
    names = ", ".join(f"'{name}'" for name in list(dense)[:5]) + (", ..." if len(dense) > 5 else "")
    way_out = f"; dense are {names} ({'; '.join(reasons[:3])})" if dense else ""
    raise ArpHubError(
        f"keep_{cost}={share:g} cannot be met: with every other layer at its lowest rank {lowest:.4f} of the {cost} "
        f"remain{way_out}. Ask for more, exclude fewer layers, or allow more schemes or a smaller rank_multiple"
    )
