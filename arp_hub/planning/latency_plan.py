"""Plans that meet a latency budget, measured end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import ArpHubError
from ..layers.apply_plan import apply_plan
from ..layers.model import low_rank_layers
from ..layers.trace import InputSize, Trace
from ..plan import RankPlan
from ..schemes import Scheme
from ..timing import LEAST_ROUNDS, Workload, forward_call, layer_shares, paired_ratio, take_turns
from .allocation import Losses, layer_options, plan_within
from .costs import Floats
from .latency_table import LatencyTable, spread_out


def plan_by_latency(
    layers: Mapping[str, list[Scheme]],
    dense: dict[str, str],
    traced: Trace,
    watch: Stopwatch,
    share: float,
    multiple: int,
    measure: Callable[..., Losses],
    progress: bool,
) -> RankPlan:
    """The plan whose measured latency meets a budget."""
    table = LatencyTable(watch.workload, watch.device)
    layers = _faster_layers(layers, dense, traced, table, progress)
    shares = watch.shares(layers)

    def costs(name: str, scheme: Scheme) -> Floats:
        return table.costs(scheme, traced.sizes[name], shares[name])

    def plan_by(losses: Losses, aim: float) -> RankPlan:
        choices = layer_options(losses, costs, multiple)
        lowest = 1 - sum(layer.costs[0] - layer.costs.min() for layer in choices) + 1e-9
        return plan_within(choices, max(aim, lowest), 1.0, "latency", dense)

    def learn(plan: RankPlan) -> float:
        saved = 0.0
        for name, layer in plan.layers.items():
            scheme = next(s for s in layers[name] if (s.name, s.groups) == (layer.scheme, layer.groups))
            saved += shares[name] * (1 - table.timed(scheme, layer.rank, traced.sizes[name]))
        table.save()
        return 1 - saved

    aim: float | None = None

    def try_out(losses: Losses) -> RankPlan:
        """From the first plan on it is known, roughly, what layers timed alone have to add up to."""
        nonlocal aim
        if aim is None:
            plan = plan_by(losses, share)
            aim = corrected_aim(share, learn(plan), watch.ratio(plan))
        return plan_by(losses, aim)

    losses = measure(layers=layers, plan_by=try_out)
    return meet(share, partial(plan_by, losses), watch.ratio, learn, aim)


def _faster_layers(
    layers: Mapping[str, list[Scheme]], dense: dict[str, str], traced: Trace, table: LatencyTable, progress: bool
) -> dict[str, list[Scheme]]:
    """The layers with the schemes that are measured to be faster on them; the others are noted as dense."""
    found = {}
    for name, schemes in tqdm(layers.items(), "time layers", disable=not progress, leave=False):
        if faster := table.faster(schemes, traced.sizes[name]):
            found[name] = faster
        else:
            dense[name] = "no scheme is faster than the dense layer, as measured"
        table.save()  # layer by layer: a large one takes minutes, which are lost otherwise if this is stopped
    return found


_MODEL_SECONDS, _CLOSELY = 4.0, 4
"""How long a model is timed, and how many times as long a plan that seems to keep the promise: of many, one may have
seemed to by luck."""
_TOLERANCE, _ROUNDS = 0.05, 8
_NEAR, _AIM = 0.975, 0.985
"""Share of the budget that a plan has to use before no slower one is looked for, and where a correction aims: what is
left unused is accuracy."""


class Stopwatch:
    """Times a model end to end against its own decomposed forms.

    Args:
        model: The dense model, on the device to time it on.
        workload: What is timed.
        input_size: ``(channels, height, width)`` of an image.
    """

    def __init__(self, model: nn.Module, workload: Workload, input_size: InputSize) -> None:
        self.workload, self.device = workload, next(model.parameters()).device
        self._model = model
        self._images = torch.randn(workload.batch_size, *input_size, device=self.device)

    def shares(self, names: Collection[str]) -> dict[str, float]:
        """Shares of the dense model's latency that layers take."""
        return layer_shares(self._model, names, self._images, self.workload, _MODEL_SECONDS)

    def ratio(self, plan: RankPlan, closely: bool = False) -> float:
        """Latency of the model decomposed by ``plan`` over that of the dense one; weights do not matter.

        Args:
            plan: The plan.
            closely: Look for longer.
        """
        small = apply_plan(copy.deepcopy(self._model), plan)
        for layer in low_rank_layers(small).values():
            spread_out(layer)
        models = {"dense": self._model, "small": small}
        calls = {name: forward_call(model, self._images, self.workload) for name, model in models.items()}
        with torch.inference_mode():
            if closely:
                samples = take_turns(calls, self.device, _CLOSELY * _MODEL_SECONDS, 2 * LEAST_ROUNDS)
            else:
                samples = take_turns(calls, self.device, _MODEL_SECONDS)
        return paired_ratio(samples["small"], samples["dense"]).median


def corrected_aim(share: float, by_layers: float, ratio: float) -> float:
    """What layers timed alone have to add up to for a budget, as one plan tells.

    Args:
        share: The budget.
        by_layers: What the layers of that plan add up to.
        ratio: What it takes end to end.
    """
    return _AIM * share * by_layers / ratio


def meet(
    share: float,
    plan_at: Callable[[float], RankPlan],
    ratio_of: Callable[[RankPlan, bool], float],
    learn: Callable[[RankPlan], float],
    aim: float | None = None,
) -> RankPlan:
    """The plan whose measured latency meets a budget, though layers timed alone do not quite add up.

    Args:
        share: Share of the dense latency to keep.
        plan_at: Makes a plan for a share, by layers timed alone, or the fastest if none is so fast.
        ratio_of: Measures a plan end to end, closely or not.
        learn: Times a plan's layers at their own ranks, which `plan_at` knows from then on, and gives their sum.
        aim: The share to make the first plan for; by default ``share``.

    Raises:
        ArpHubError: If no plan comes within 5 % of the budget.
    """
    aim, most = share if aim is None else aim, share * (1 + _TOLERANCE)
    tried, confirmed = dict[RankPlan, float](), set[RankPlan]()

    def confirm(plan: RankPlan) -> float:
        if plan not in confirmed:
            confirmed.add(plan)
            tried[plan] = ratio_of(plan, True)
        return tried[plan]

    for _ in range(_ROUNDS):
        plan = plan_at(aim)
        if plan in tried:
            break
        tried[plan] = ratio_of(plan, False)
        if _NEAR * share <= tried[plan] <= share and _NEAR * share <= confirm(plan) <= share:
            return plan
        aim = corrected_aim(share, learn(plan), tried[plan])
    for limit, slowest_first in ((share, True), (most, False)):  # what uses the budget up, or exceeds it least
        for plan in sorted(tried, key=tried.__getitem__, reverse=slowest_first):
            if tried[plan] <= limit and confirm(plan) <= limit:
                return plan
    raise ArpHubError(
        f"keep_latency={share:g} cannot be met: measured end to end, the fastest plan that was tried takes "
        f"{min(tried.values()):.3f} of the dense latency on this device. Ask for more, allow more schemes, or time a "
        "larger batch_size"
    )
