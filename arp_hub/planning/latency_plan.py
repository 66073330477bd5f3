"""Plans that keep a latency budget: layers are timed alone, whole networks decide.

Times of single layers do not quite add up to the time of a network. So a plan is made for an *aim*, the share that its
layers, timed alone, add up to. Its latency ``L``, measured end to end, corrects the aim for the next plan::

    aim  <-  budget * (sum of the plan's layer times) / L

until a plan takes between 97.5 and 100 % of the budget. Both are timed in the runtime of the workload.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from .._utils.progress import counted
from ..errors import ArpHubError
from ..layers.apply_plan import apply_plan
from ..layers.model import layers_called, low_rank_layers
from ..layers.trace import InputSize
from ..plan import RankPlan
from ..runtimes.timed import Call, model_call
from ..schemes import Scheme
from ..schemes.shapes import Pair
from ..timing import LEAST_ROUNDS, Workload, layer_shares, paired_ratio, take_turns
from .allocation import Losses, allocate, chosen_plan, layer_options
from .costs import Floats
from .latency_table import LatencyTable, spread_out


class Stopwatch:
    """Times a model end to end against its own decomposed forms.

    Args:
        model: The dense model, on the device to time it on; other runtimes than PyTorch run on the CPU.
        workload: What is timed.
        input_size: ``(channels, height, width)`` of an image.
        seconds: How long one comparison measures.
    """

    def __init__(self, model: nn.Module, workload: Workload, input_size: InputSize, seconds: float = 4.0) -> None:
        self.workload, self.device = workload, workload.device(next(model.parameters()).device)
        self._model, self._seconds = model, seconds
        self._images = torch.randn(workload.batch_size, *input_size, device=self.device)
        self._last: tuple[RankPlan, Call] | None = None

    def shares(
        self, layers: Mapping[str, Sequence[Scheme]], sizes: Mapping[str, Sequence[Pair]], table: LatencyTable
    ) -> dict[str, float]:
        """Shares of the dense model's latency that layers take.

        PyTorch times the layers inside of the model. Other runtimes fuse layers, so there they are timed alone.

        Args:
            layers: The schemes of every layer.
            sizes: Input maps of every layer, one for each call.
            table: Times of single layers.
        """
        if self.workload.in_torch:
            with layers_called(self._model):
                return layer_shares(self._model, list(layers), self._images, self.workload, self._seconds)
        seconds = {
            name: sum(table.dense_seconds(schemes[0], size) for size in sizes[name]) for name, schemes in layers.items()
        }
        whole = min(take_turns({"dense": self._dense}, self.device, self._seconds)["dense"])
        # alone, a layer also reads and writes its maps, so all together may take longer than the model
        whole = max(whole, sum(seconds.values()))
        return {name: taken / whole for name, taken in seconds.items()}

    @cached_property
    def _dense(self) -> Call:
        return model_call(self._model, self._images, self.workload)

    def _small(self, plan: RankPlan) -> Call:
        """The model decomposed by a plan; the last one is kept, because it is often measured twice."""
        if self._last is None or self._last[0] != plan:
            small = apply_plan(copy.deepcopy(self._model), plan)
            for layer in low_rank_layers(small).values():
                spread_out(layer)
            self._last = plan, model_call(small, self._images, self.workload)
        return self._last[1]

    def ratio(self, plan: RankPlan, closely: bool = False) -> float:
        """Latency of the model decomposed by ``plan`` over that of the dense model; weights do not matter.

        Args:
            plan: The plan.
            closely: Measure four times as long: among several plans, one may seem to meet a budget by luck.
        """
        calls = {"dense": self._dense, "small": self._small(plan)}
        with torch.inference_mode():
            if closely:
                samples = take_turns(calls, self.device, 4 * self._seconds, 2 * LEAST_ROUNDS)
            else:
                samples = take_turns(calls, self.device, self._seconds)
        return paired_ratio(samples["small"], samples["dense"]).median


class _LayerTimes(Protocol):
    """Plans by the times of single layers."""

    def plan(self, losses: Losses, aim: float) -> RankPlan:
        """The plan whose layers add up to ``aim``, or the fastest plan if none is that fast."""

    def sum_of(self, plan: RankPlan) -> float:
        """What a plan's layers add up to, timed at their own ranks, which later plans then know."""


class _Ratios(Protocol):
    def ratio(self, plan: RankPlan, closely: bool = False) -> float:
        """Latency of a plan over that of the dense model, end to end."""


@dataclass(frozen=True)
class LayerTimes:
    """Plans by the times of single layers.

    Attributes:
        table: Times of decomposed layers over those of dense layers.
        sizes: Input maps of every layer, one for each call.
        schemes: The schemes of every layer that are faster than the dense layer at some rank.
        shares: Shares of the dense model's latency that these layers take.
        rank_multiple: Ranks are multiples of this.
        dense: The layers that stay dense in any case, with their reasons.
    """

    table: LatencyTable
    sizes: Mapping[str, Sequence[Pair]]
    schemes: Mapping[str, Sequence[Scheme]]
    shares: Mapping[str, float]
    rank_multiple: int
    dense: Mapping[str, str]

    def plan(self, losses: Losses, aim: float) -> RankPlan:
        """The plan whose layers add up to ``aim``, or the fastest plan if none is that fast."""
        options = layer_options(losses, self._costs, self.rank_multiple)
        saved = sum(layer.costs[0] - layer.costs.min() for layer in options)
        fixed = 1 - sum(layer.costs[0] for layer in options)  # of what is no choice, as a share of the latency
        budget = max(aim, 1 - saved + 1e-9) - fixed
        return chosen_plan(options, allocate(options, budget), self.dense)

    def sum_of(self, plan: RankPlan) -> float:
        """What a plan's layers add up to, timed at their own ranks, which later plans then know."""
        saved = 0.0
        for name, layer in plan.layers.items():
            scheme = next(s for s in self.schemes[name] if (s.name, s.groups) == (layer.scheme, layer.groups))
            saved += self.shares[name] * (1 - self.table.timed(scheme, layer.rank, self.sizes[name]))
        self.table.save()
        return 1 - saved

    def _costs(self, name: str, scheme: Scheme) -> Floats:
        return self.table.costs(scheme, self.sizes[name], self.shares[name])


@dataclass
class LatencyBudget:
    """A budget in measured latency.

    Attributes:
        share: Share of the dense model's latency to keep.
        layers: Plans by the times of single layers.
        watch: Times whole networks.
        where: Where it is measured, for messages.
        aim: What the next plan's layers are to add up to; known once the first plan has been timed.
        tolerance: Share by which a plan may exceed the budget: measurements of one network differ by 1 to 3 %.
    """

    share: float
    layers: _LayerTimes
    watch: _Ratios
    where: str = "on this device"
    aim: float | None = None
    tolerance: float = 0.05
    _ratios: dict[RankPlan, float] = field(default_factory=dict)
    _confirmed: set[RankPlan] = field(default_factory=set)

    def plan(self, losses: Losses, rounds: int = 8) -> RankPlan:
        """The plan whose latency, measured end to end, keeps the budget.

        Args:
            losses: Losses of all layers.
            rounds: Corrections of the aim at most; they settle after two or three.

        Raises:
            ArpHubError: If no plan comes within 5 % of the budget.
        """
        least = 0.975 * self.share  # what a plan leaves unused is lost accuracy
        for _ in range(rounds):
            plan = self.layers.plan(losses, self.share if self.aim is None else self.aim)
            if plan in self._ratios:
                break
            self._ratios[plan] = self.watch.ratio(plan)
            if least <= self._ratios[plan] <= self.share and least <= self._confirm(plan) <= self.share:
                return plan
            self._correct_aim(plan, self._ratios[plan])
        return self._best_tried()

    def _best_tried(self) -> RankPlan:
        """The slowest plan within the budget, or else the fastest one within its tolerance and faster than dense."""
        for limit, slowest_first in ((self.share, True), (min(1.0, self.share * (1 + self.tolerance)), False)):
            for plan in sorted(self._ratios, key=self._ratios.__getitem__, reverse=slowest_first):
                if self._ratios[plan] <= limit and self._confirm(plan) <= limit:
                    return plan
        fastest = min(self._ratios.values())
        way = "Ask for more, allow more schemes, or time a larger batch_size"
        if fastest > 1 - self.tolerance:
            way = "Keep the model dense here: low rank makes it no faster"
        raise ArpHubError(
            f"keep_latency={self.share:g} cannot be met: measured end to end, the fastest plan that was tried takes "
            f"{fastest:.3f} of the dense latency {self.where}. {way}"
        )

    def _confirm(self, plan: RankPlan) -> float:
        if plan not in self._confirmed:
            self._confirmed.add(plan)
            self._ratios[plan] = self.watch.ratio(plan, closely=True)
        return self._ratios[plan]

    def _correct_aim(self, plan: RankPlan, ratio: float) -> None:
        self.aim = 0.985 * self.share * self.layers.sum_of(plan) / ratio  # the middle of 97.5 to 100 % is safest


def faster_schemes(
    layers: Mapping[str, Sequence[Scheme]], sizes: Mapping[str, Sequence[Pair]], table: LatencyTable, progress: bool
) -> dict[str, list[Scheme]]:
    """The layers with those of their schemes that are faster than the dense layer, as measured."""
    found = {}
    for name, schemes in counted(layers.items(), "time layers", progress):
        found[name] = table.faster(schemes, sizes[name])
        table.save()  # after each layer: a large layer takes minutes, which an interruption must not lose
    return {name: schemes for name, schemes in found.items() if schemes}
