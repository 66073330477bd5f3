"""Pick scheme and rank of every layer: minimise the sum of losses subject to the sum of costs.

With one option ``o_l`` for each layer ``l`` (dense, or a scheme at a rank)::

    minimise    sum_l loss_l(o_l)    subject to    sum_l cost_l(o_l) <= budget

At a price ``p`` the Lagrangian ``sum_l loss_l(o_l) + p cost_l(o_l)`` splits into one choice for each layer (Everett
1963; Shoham and Gersho 1988). Bisection finds the lowest price that stays within the budget; greedy upgrades of single
layers, best gain for each unit of cost first, then spend what remains.

Every layer has ``n`` options, the dense one first: ``costs (n,)`` and ``losses (n,)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from ..errors import ArpHubError
from ..plan import BETTER_DENSE, LayerPlan, RankPlan
from ..schemes import Scheme
from .costs import Floats

Losses = Mapping[str, Sequence[tuple[Scheme, Floats]]]
"""The schemes of every layer, each with the loss at rank 1, 2, and so on."""


class Budget(Protocol):
    """A budget for the whole network."""

    def plan(self, losses: Losses) -> RankPlan:
        """The plan with the least sum of losses within the budget."""


@dataclass(frozen=True)
class CountedBudget:
    """A budget in what can be counted without running the model.

    Attributes:
        cost: What is counted, for messages: ``"params"`` or ``"macs"``.
        share: Share of the total to keep.
        total: What the dense model costs in all.
        costs: What a layer costs by a scheme: dense, and at rank 1, 2, and so on.
        rank_multiple: Ranks are multiples of this.
        dense: The layers that stay dense in any case, with their reasons.
    """

    cost: str
    share: float
    total: float
    costs: Callable[[str, Scheme], Floats]
    rank_multiple: int
    dense: Mapping[str, str]

    def plan(self, losses: Losses) -> RankPlan:
        """The plan with the least sum of losses within the budget."""
        options = layer_options(losses, self.costs, self.rank_multiple)
        fixed = self.total - sum(layer.costs[0] for layer in options)  # of what is no choice: norms, biases, the rest
        budget = self.share * self.total - fixed
        lowest = sum(layer.costs.min() for layer in options)
        if lowest > budget:
            remain = self.share + (lowest - budget) / self.total
            self._refuse(math.ceil(remain * 1e4) / 1e4)  # rounded up, so that it can be asked for
        return chosen_plan(options, allocate(options, budget), self.dense)

    def kept(self, plan: RankPlan, schemes: Mapping[str, Sequence[Scheme]]) -> float:
        """The share of the total that a plan keeps.

        Args:
            plan: The plan.
            schemes: The schemes that each of its layers could take.
        """
        saved = 0.0
        for name, layer in plan.layers.items():
            scheme = next(one for one in schemes[name] if (one.name, one.groups) == (layer.scheme, layer.groups))
            costs = self.costs(name, scheme)
            saved += float(costs[0] - costs[layer.rank])
        return 1 - saved / self.total

    def _refuse(self, lowest: float) -> None:
        names = ", ".join(f"'{name}'" for name in list(self.dense)[:5]) + (", ..." if len(self.dense) > 5 else "")
        reasons = "; ".join(sorted(set(self.dense.values()))[:3])
        raise ArpHubError(
            f"keep_{self.cost}={self.share:g} cannot be met: with every other layer at its lowest rank {lowest:.4f} of "
            f"the {self.cost} remain{f'; dense are {names} ({reasons})' if self.dense else ''}. Ask for more, exclude "
            "fewer layers, or allow more schemes or a smaller rank_multiple"
        )


@dataclass(frozen=True)
class LayerOptions:
    """What one layer can become: scheme, rank, cost and loss of all options, the dense one first."""

    name: str
    schemes: Sequence[Scheme | None]
    ranks: Sequence[int]
    costs: Floats
    losses: Floats

    def plan(self, option: int) -> LayerPlan | None:
        """The layer's entry in a plan, None if it stays dense."""
        scheme = self.schemes[option]
        return None if scheme is None else LayerPlan(scheme.name, self.ranks[option], scheme.groups)


def layer_options(losses: Losses, costs: Callable[[str, Scheme], Floats], multiple: int) -> list[LayerOptions]:
    """The options of every layer that cost less than the dense layer, at ranks that are multiples of ``multiple``."""
    return [_options(name, found, partial(costs, name), multiple) for name, found in losses.items()]


def _options(
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


def chosen_plan(options: Sequence[LayerOptions], chosen: Sequence[int], dense: Mapping[str, str]) -> RankPlan:
    """The plan that the chosen options make, with a reason for every layer that stays dense."""
    plans = {layer.name: layer.plan(option) for layer, option in zip(options, chosen, strict=True)}
    reasons = {name: BETTER_DENSE for name, plan in plans.items() if plan is None}
    return RankPlan({name: plan for name, plan in plans.items() if plan is not None}, {**dense, **reasons})


def allocate(options: Sequence[LayerOptions], budget: float) -> list[int]:
    """One option for every layer: the least sum of losses whose costs stay within a budget that can be met."""

    def pick(price: float) -> list[int]:
        return [int(np.argmin(layer.losses + price * layer.costs)) for layer in options]

    def spent(chosen: Sequence[int]) -> float:
        return float(sum(layer.costs[option] for layer, option in zip(options, chosen, strict=True)))

    low, high = 1e-18, 1e12  # losses lie between 0 and 1e6, costs between 1e-6 and 1e12
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(pick(middle)) > budget else (low, middle)
    chosen = pick(high)
    if spent(chosen) > budget:
        chosen = [int(np.argmin(layer.costs)) for layer in options]
    return _spend_rest(options, chosen, budget - spent(chosen))


def _spend_rest(options: Sequence[LayerOptions], chosen: list[int], rest: float) -> list[int]:
    """Upgrade single layers, best gain for each unit of cost first, while an upgrade fits into the rest."""
    while True:
        best, best_rate = None, 0.0
        for k, layer in enumerate(options):
            extra = layer.costs - layer.costs[chosen[k]]
            gain = layer.losses[chosen[k]] - layer.losses
            fits = (extra > 0) & (extra <= rest) & (gain > 0)
            if fits.any():
                rates = np.where(fits, gain / np.where(fits, extra, 1), 0.0)
                option = int(np.argmax(rates))
                if rates[option] > best_rate:
                    best, best_rate = (k, option), float(rates[option])
        if best is None:
            return chosen
        k, option = best
        rest -= float(options[k].costs[option] - options[k].costs[chosen[k]])
        chosen[k] = option
