"""Choose scheme, groups and rank of every layer together, under one budget for the whole network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import cast

from torch import nn
from tqdm.auto import tqdm

from .._utils.torch_utils import evaluating
from ..calibration.images import Images, batches
from ..errors import ArpHubError
from ..layers.low_rank import effective_weight, layer_shape
from ..layers.model import check_model, layers_called, low_rank_layers, other_parameters, refusals, weight_layers
from ..layers.trace import InputSize, Trace, input_size_of, trace
from ..plan import RankPlan
from ..schemes import SCHEMES, Scheme
from ..schemes.shapes import LayerShape
from ..timing import Workload
from .allocation import Losses, layer_options, plan_within
from .costs import CountedCosts, Floats
from .error_curves import Candidate, candidate_schemes, shape_candidates, weight_candidates
from .latency_plan import Stopwatch, plan_by_latency
from .latency_table import RANK_MULTIPLE
from .output_errors import OutputErrors

_WEIGHT_POWER = 2.0
"""A layer's loss in the weight metric is its relative squared error to this power: such errors say little of the
network's output, and are best kept even among layers. Errors in the output metric add up."""
_POWERS = (0.25, 0.5, 0.75, 1.0, 1.25)
"""A layer's loss in the output metric is its error alone, or that times its importance to one of these powers: the one
whose plan, as a whole, does the least to the network's output. At 0 it does not count how much a layer matters, at 1
it is trusted that no other changes. Which is best depends on the network and the budget."""
_CLEARLY, _PATIENCE = 0.05, 2
"""Share by which a later one has to be better, since no plan tells from another where nothing is left of the network,
and trials in a row that are not, after which no more are made."""


def make_plan(
    model: nn.Module,
    *,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    keep_latency: float | None = None,
    workload: Workload | None = None,
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
    below. A latency is measured, layer by layer and then end to end, on the model's device as it is now, and kept
    within 5 %: a layer stays dense unless its factors are faster.

    With images there are several such plans, which count more or less what each layer, decomposed alone, does to the
    output of the network. All are tried on a few images, and the one that changes the output least is taken.

    A model on the meta device is planned by the shapes of its layers alone, with a warning: in seconds and with little
    memory, whatever its size.

    Args:
        model: A dense model.
        keep_params: Share of the model's parameters to keep, between 0 and 1, or
        keep_macs: share of its multiply-accumulates to keep, or
        keep_latency: share of the time of its forward pass to keep. Give exactly one of the three.
        workload: Batch size, numbers and memory layout that ``keep_latency`` is for; by default one image, float32.
        schemes: Names of the schemes to choose from; by default all.
        rank_multiple: Hold every rank to multiples of this, for the hardware's sake; under ``keep_latency`` to
            multiples of 8 unless told more.
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
    check_model(model)
    cost, share = _budget(keep_params, keep_macs, keep_latency)
    if workload is not None and cost != "latency":
        raise ArpHubError("a workload is for keep_latency alone: leave it out, or give keep_latency")
    names = _scheme_names(schemes)
    if isinstance(rank_multiple, bool) or not isinstance(rank_multiple, int) or rank_multiple < 1:
        raise ArpHubError(f"rank_multiple must be a whole number of at least 1, got {rank_multiple!r}")
    if low_rank_layers(model):
        raise ArpHubError("the model is decomposed already: call to_dense(model) first, then plan it anew")
    if without_weights := any(parameter.is_meta for parameter in model.parameters()):
        if calibration is not None or cost == "latency":
            what = "keep_latency" if calibration is None else "calibration"
            raise ArpHubError(f"{what} needs a model with weights, and this one is on the meta device: load them first")
        warnings.warn("the model has no weights (meta device): its ranks are chosen by shape alone", stacklevel=2)
    if input_size is None and calibration is not None:
        input_size = cast(InputSize, tuple(next(batches(calibration)).shape[1:]))
    traced = trace(model, input_size)
    layers, dense = _eligible(model, traced, names, exclude)
    total = float(traced.params if cost == "params" else traced.macs)
    if cost == "latency":
        measure = partial(_measure, model, traced=traced, images=calibration, progress=progress)
        watch = Stopwatch(model, workload or Workload(), input_size_of(model, input_size))
        multiple = rank_multiple if rank_multiple > 1 else RANK_MULTIPLE
        return plan_by_latency(layers, dense, traced, watch, share, multiple, measure, progress)

    def plan_by(losses: Losses) -> RankPlan:
        return plan_within(
            layer_options(losses, CountedCosts(cost, traced.sizes), rank_multiple), share, total, cost, dense
        )

    if without_weights:
        return plan_by(_measure_shapes(layers))
    return plan_by(_measure(model, layers, traced, calibration, progress, plan_by))


def _budget(keep_params: float | None, keep_macs: float | None, keep_latency: float | None) -> tuple[str, float]:
    given = {"params": keep_params, "macs": keep_macs, "latency": keep_latency}
    chosen = {cost: share for cost, share in given.items() if share is not None}
    if len(chosen) != 1:
        raise ArpHubError(f"give exactly one of keep_params, keep_macs and keep_latency, got {len(chosen)} of them")
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
    layers, dense, reasons = {}, {}, refusals(model)
    for name, module in weight_layers(model):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            dense[name] = "first convolution" if exclude is None else "excluded by the user"
        elif reason := reasons.get(module):
            dense[name] = reason
        elif name not in traced.sizes:
            dense[name] = "the model uses its weight without calling the layer"
        elif found := candidate_schemes(layer_shape(module), names, SCHEMES):
            layers[name] = found
        else:
            dense[name] = "too thin: no scheme makes it smaller"
    dense |= {name: "a parameter of the model itself, no layer's weight" for name, _ in other_parameters(model)}
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
    images: Images | None,
    progress: bool,
    plan_by: Callable[[Losses], RankPlan],
) -> Losses:
    """The losses of every layer, by its weights or by what images show; ``plan_by`` makes the plans that are tried."""
    bar = tqdm(layers.items(), "measure layers", disable=not progress, leave=False)
    if images is None or not layers:
        weights = ((name, effective_weight(model.get_submodule(name)).float(), schemes) for name, schemes in bar)
        found = {name: weight_candidates(weight, schemes) for name, weight, schemes in weights}
        return {name: [(one.scheme, one.errors**_WEIGHT_POWER) for one in curves] for name, curves in found.items()}
    modules = {name: model.get_submodule(name) for name in layers}
    with evaluating(model), layers_called(model):
        errors = OutputErrors(model, modules, images, traced.macs)
        found = {name: errors.candidates(name, schemes) for name, schemes in bar}
        return _losses_of_best_plan(errors, found, plan_by, progress)


def _losses_of_best_plan(
    errors: OutputErrors, found: Mapping[str, list[Candidate]], plan_by: Callable[[Losses], RankPlan], progress: bool
) -> Losses:
    """The losses by that power of the layers' importance whose plan clearly does the least to the output."""
    best = _losses_by(found, dict.fromkeys(found, 1.0))
    plans = [plan_by(best)]
    least = errors.divergence(plans[0])
    names = tqdm(found, "see what layers matter", disable=not progress, leave=False)
    importance = {name: errors.importance(name, plans[0]) for name in names}
    in_vain = 0
    for power in _POWERS:
        losses = _losses_by(found, {name: value**power for name, value in importance.items()})
        if (plan := plan_by(losses)) in plans:
            continue
        plans.append(plan)
        divergence = errors.divergence(plan)
        if divergence < (1 - _CLEARLY) * least:
            least, best, in_vain = divergence, losses, 0
        elif (in_vain := in_vain + 1) == _PATIENCE:
            break
    return best


def _losses_by(found: Mapping[str, list[Candidate]], factors: Mapping[str, float]) -> Losses:
    return {name: [(one.scheme, one.errors * factors[name]) for one in curves] for name, curves in found.items()}


def _measure_shapes(layers: Mapping[str, list[Scheme]]) -> Losses:
    """The losses where weights are absent; layers of one shape share them, of which large models have many."""
    known: dict[LayerShape, list[tuple[Scheme, Floats]]] = {}
    losses: Losses = {}
    for name, schemes in layers.items():
        shape = schemes[0].shape
        if shape not in known:
            known[shape] = [(found.scheme, found.errors**_WEIGHT_POWER) for found in shape_candidates(schemes)]
        losses[name] = known[shape]
    return losses
