"""Choose scheme, groups and rank of every layer together, under one budget for the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from .calibration import Images
from .curves import Candidate, Floats, OutputErrors, candidate_schemes, weight_candidates
from .errors import ArpHubError
from .layers import effective_weight, layer_shape, low_rank_layers, refusal, weight_layers
from .plan import LayerPlan, RankPlan
from .schemes import SCHEMES, Scheme
from .shapes import Pair, chain_macs
from .tracing import InputSize, Trace, trace

_WEIGHT_POWER, _OUTPUT_POWER = 2.0, 1.0
"""A layer's loss is its relative squared error to this power. Errors in the weight metric say little of the network's
output, and are best kept even among layers (a higher power); errors in the output metric add up."""


@dataclass(frozen=True)
class _Choices:
    """What can become of one layer: costs and penalties of all options, the dense one first."""

    name: str
    plans: Sequence[LayerPlan | None]
    costs: Floats
    losses: Floats


def make_plan(
    model: nn.Module,
    *,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    schemes: Sequence[str] | None = None,
    rank_multiple: int = 1,
    exclude: Sequence[str] | None = None,
    calibration: Images | None = None,
    input_size: InputSize | None = None,
    progress: bool = False,
) -> RankPlan:
    """Plan the decomposition of a model: which layers, by which scheme, at which rank.

    Every layer's relative error is measured over its rank for the schemes that apply: in the metric of its weights,
    or, with calibration images, in that of its outputs as the BatchNorm behind it scales them. The plan minimises the
    sum over layers under the budget (a Lagrangian relaxation, then greedy steps), and lands within 1 % of it, from
    below.

    Args:
        model: A dense model.
        keep_params: Share of the model's parameters to keep, between 0 and 1, or
        keep_macs: share of its multiply-accumulates to keep. Give exactly one of the two.
        schemes: Names of the schemes to choose from; by default all.
        rank_multiple: Hold every rank to multiples of this, for the hardware's sake.
        exclude: Names or glob patterns of layers to leave dense; by default the first convolution, which is small,
            sensitive, and rebuilt by timm when ``in_chans`` changes. ``()`` excludes nothing.
        calibration: Unlabelled images, normalised as for the model: a tensor ``(N, C, H, W)`` or batches.
        input_size: ``(channels, height, width)``; by default that of the images, or the model's own.
        progress: Show a progress bar.

    Returns:
        The plan; its ``dense`` says for every other layer why it stays as it is.

    Raises:
        ArpHubError: If an argument is out of range, or the budget cannot be met: the message says what can.

    Example:
        >>> make_plan(timm.create_model("resnet18"), keep_params=0.5, schemes=["channel", "group_out"])
    """
    cost, share = _budget(keep_params, keep_macs)
    names = _scheme_names(schemes)
    if isinstance(rank_multiple, bool) or not isinstance(rank_multiple, int) or rank_multiple < 1:
        raise ArpHubError(f"rank_multiple must be a whole number of at least 1, got {rank_multiple!r}")
    if low_rank_layers(model):
        raise ArpHubError("the model is decomposed already: call to_dense(model) first, then plan it anew")
    traced = trace(model, input_size)
    layers, dense = _eligible(model, traced, names, exclude)
    total = float(traced.params if cost == "params" else traced.macs)
    choices = _measure(model, layers, traced, cost, names, rank_multiple, calibration, progress)
    fixed = total - sum(layer.costs[0] for layer in choices)
    picked = _allocate(choices, share * total - fixed, total, share, cost, dense)
    plans: dict[str, LayerPlan] = {}
    for layer, option in zip(choices, picked, strict=True):
        plan = layer.plans[option]
        if plan is None:
            dense[layer.name] = "the budget is better spent with this layer dense"
        else:
            plans[layer.name] = plan
    return RankPlan(plans, dense)


def _budget(keep_params: float | None, keep_macs: float | None) -> tuple[str, float]:
    given = {"params": keep_params, "macs": keep_macs}
    chosen = {cost: share for cost, share in given.items() if share is not None}
    if len(chosen) != 1:
        raise ArpHubError(f"give exactly one of keep_params and keep_macs, got {len(chosen)} of them")
    cost, share = next(iter(chosen.items()))
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ArpHubError(f"keep_{cost} must lie between 0 and 1 (the share to keep, 0.5 for half), got {share!r}")
    return cost, float(share)


def _scheme_names(schemes: Sequence[str] | None) -> Sequence[str]:
    if schemes is None:
        return list(SCHEMES)
    names = [schemes] if isinstance(schemes, str) else list(schemes)
    if unknown := [name for name in names if name not in SCHEMES]:
        raise ArpHubError(f"unknown scheme {unknown[0]!r}: choose from {', '.join(SCHEMES)}")
    if not names:
        raise ArpHubError(f"schemes is empty: choose from {', '.join(SCHEMES)}")
    return names


def _eligible(
    model: nn.Module, traced: Trace, names: Sequence[str], exclude: Sequence[str] | None
) -> tuple[dict[str, list[Scheme]], dict[str, str]]:
    """The layers that can be decomposed with their schemes, and the others with their reasons."""
    patterns = _first_convs(model) if exclude is None else [exclude] if isinstance(exclude, str) else list(exclude)
    known = dict(model.named_modules(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ArpHubError(f"exclude names {pattern!r}, which matches no layer of this {type(model).__name__}")
    layers, dense = {}, {}
    for name, module in weight_layers(model):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            dense[name] = "first convolution" if exclude is None else "excluded by the user"
        elif reason := refusal(module):
            dense[name] = reason
        elif name not in traced.sizes:
            dense[name] = "the model uses its weight without calling the layer"
        elif found := candidate_schemes(layer_shape(module), names, SCHEMES):
            layers[name] = found
        else:
            dense[name] = "too thin: no scheme makes it smaller"
    return layers, dense


def _first_convs(model: nn.Module) -> list[str]:
    config = getattr(model, "pretrained_cfg", None) or {}
    first = config.get("first_conv") if isinstance(config, Mapping) else getattr(config, "first_conv", None)
    known = dict(model.named_modules(remove_duplicate=False))
    return [name for name in ([first] if isinstance(first, str) else first or []) if name in known]


def _measure(
    model: nn.Module,
    layers: Mapping[str, list[Scheme]],
    traced: Trace,
    cost: str,
    names: Sequence[str],
    multiple: int,
    images: Images | None,
    progress: bool,
) -> list[_Choices]:
    by_output = None if images is None or not layers else _output_errors(model, layers, images)
    found = []
    for name, schemes in tqdm(layers.items(), "measure layers", disable=not progress, leave=False):
        if by_output is None:
            weight = effective_weight(model.get_submodule(name)).float()
            candidates, power = weight_candidates(weight, schemes), _WEIGHT_POWER
        else:
            candidates, power = by_output.candidates(name, schemes), _OUTPUT_POWER
        losses = [candidate.errors**power for candidate in candidates]
        found.append(_choices(name, candidates, losses, _cost_of(cost, traced.sizes[name]), multiple))
    return found


def _output_errors(model: nn.Module, layers: Mapping[str, object], images: Images) -> OutputErrors:
    modes = {module: module.training for module in model.modules()}
    try:
        return OutputErrors(model.eval(), {name: model.get_submodule(name) for name in layers}, images)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _cost_of(cost: str, sizes: Sequence[Pair]) -> Callable[[Scheme, int | None], int]:
    """What a layer costs at a rank, or dense (rank None)."""

    def params(scheme: Scheme, rank: int | None) -> int:
        return scheme.shape.params if rank is None else scheme.params(rank)

    def macs(scheme: Scheme, rank: int | None) -> int:
        convs = (scheme.shape.as_conv(),) if rank is None else scheme.convs(rank)
        return sum(chain_macs(convs, size) for size in sizes)

    return params if cost == "params" else macs


def _choices(
    name: str,
    candidates: Sequence[Candidate],
    losses: Sequence[Floats],
    cost: Callable[[Scheme, int | None], int],
    multiple: int,
) -> _Choices:
    plans: list[LayerPlan | None] = [None]
    costs, values = [float(cost(candidates[0].scheme, None))], [0.0]
    for candidate, loss in zip(candidates, losses, strict=True):
        scheme = candidate.scheme
        for rank in range(multiple, len(loss) + 1, multiple):
            price = float(cost(scheme, rank))
            if price < costs[0]:
                plans.append(LayerPlan(scheme.name, rank, scheme.groups))
                costs.append(price)
                values.append(float(loss[rank - 1]))
    return _Choices(name, plans, np.array(costs), np.array(values))


def _allocate(
    choices: Sequence[_Choices], budget: float, total: float, share: float, cost: str, dense: Mapping[str, str]
) -> list[int]:
    """Pick one option for every layer: the least sum of losses whose cost stays within the budget."""
    least = sum(layer.costs.min() for layer in choices)
    if least > budget:
        _refuse_budget(choices, budget, total, share, cost, dense)

    def pick(price: float) -> list[int]:
        return [int(np.argmin(layer.losses + price * layer.costs)) for layer in choices]

    def spent(options: Sequence[int]) -> float:
        return float(sum(layer.costs[option] for layer, option in zip(choices, options, strict=True)))

    low, high = 1e-18, 1e6  # a high price spends little
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(pick(middle)) > budget else (low, middle)
    options = pick(high)
    if spent(options) > budget:
        options = [int(np.argmin(layer.costs)) for layer in choices]
    return _spend_rest(choices, options, budget - spent(options))


def _spend_rest(choices: Sequence[_Choices], options: list[int], rest: float) -> list[int]:
    """Upgrade single layers, best gain per cost first, while anything fits into what the budget leaves."""
    while True:
        best, best_rate = None, 0.0
        for k, layer in enumerate(choices):
            extra = layer.costs - layer.costs[options[k]]
            gain = layer.losses[options[k]] - layer.losses
            fits = (extra > 0) & (extra <= rest) & (gain > 0)
            if fits.any():
                rates = np.where(fits, gain / np.maximum(extra, 1), 0.0)
                option = int(np.argmax(rates))
                if rates[option] > best_rate:
                    best, best_rate = (k, option), float(rates[option])
        if best is None:
            return options
        k, option = best
        rest -= float(choices[k].costs[option] - choices[k].costs[options[k]])
        options[k] = option


def _refuse_budget(
    choices: Sequence[_Choices], budget: float, total: float, share: float, cost: str, dense: Mapping[str, str]
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
