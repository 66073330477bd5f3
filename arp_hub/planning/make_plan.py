"""Choose scheme, groups and rank of every layer together, under one budget for the whole network.

`make_plan` reads from top to bottom: trace the model, find the layers to decompose, set up the budget, measure the
losses, allocate. The formula is in `arp_hub.planning.allocation`, the losses in `arp_hub.planning.losses`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from .._utils.torch_utils import ambient_modes_off, digest_of
from ..calibration.images import Images, batches, check_normalised, check_outputs, image_count, limited
from ..effort import Effort
from ..errors import ArpHubError
from ..layers.apply_plan import made_for
from ..layers.cfg_names import names_of
from ..layers.low_rank import layer_shape
from ..layers.model import check_model, check_weights, low_rank_layers, other_parameters, refusals, weight_layers
from ..layers.trace import InputSize, Trace, input_size_of, trace
from ..plan import RankPlan
from ..processes import ALONE, Processes
from ..runtimes.timed import check_installed
from ..schemes import SCHEMES, Scheme
from ..timing import Workload
from .allocation import Budget, CountedBudget
from .costs import CountedCosts
from .error_curves import candidate_schemes
from .latency_plan import LatencyBudget, LayerTimes, Stopwatch, faster_schemes
from .latency_table import RANK_MULTIPLE, LatencyTable
from .losses import output_losses, shape_losses, weight_losses


@ambient_modes_off()
def make_plan(
    model: nn.Module,
    *,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    keep_latency: float | None = None,
    workload: Workload | None = None,
    schemes: Sequence[str] | None = None,
    rank_multiple: int | None = None,
    exclude: Sequence[str] | None = None,
    calibration: Images | None = None,
    input_size: InputSize | None = None,
    effort: Effort | str = "balanced",
    progress: bool = False,
) -> RankPlan:
    """Plan the decomposition of a model: which layers, by which scheme, at which rank.

    The plan minimises the sum of the layers' losses under the budget, and lands within 1 % of it, from below. A layer's
    loss is the relative error of its weight or, with calibration images, of its output, weighted by the layer's
    sensitivity (see `arp_hub.planning.losses`).

    A latency is measured: single layers first, then whole networks, on the model's device or in another runtime. A plan
    exceeds the budget by at most 5 %, and a layer stays dense unless its factors are faster.

    Where ``torch.distributed`` is initialised, the processes share the work on calibration images, and one of them
    measures latencies. Every process then calls this with the same arguments, and gets the same plan.

    A model on the meta device is planned by the shapes of its layers alone, with a warning. That takes seconds and
    little memory, whatever its size.

    Args:
        model: A dense model.
        keep_params: Share of the model's parameters to keep, between 0 and 1.
        keep_macs: Share of its multiply-accumulates to keep.
        keep_latency: Share of the time of its forward pass to keep. Give exactly one of the three.
        workload: Batch size, dtype, memory layout, runtime and precision that ``keep_latency`` is for; by default one
            image in float32, in PyTorch.
        schemes: Names of the schemes to choose from. By default all, but no grouped ones for linear layers and 1x1
            convolutions.
        rank_multiple: Ranks are multiples of this, to suit the hardware; by default 1, or 8 under ``keep_latency``.
        exclude: Names or glob patterns of layers that stay dense. The default is the first convolution, which is small,
            sensitive, and rebuilt by timm when ``in_chans`` changes; of a model whose pretrained_cfg does not name it,
            no layer. ``()`` excludes nothing.
        calibration: Unlabelled images, normalised as the model expects: a tensor ``(N, C, H, W)`` or batches, in random
            order. Of large networks the first images decide most, since work is bounded.
        input_size: ``(channels, height, width)``; by default that of the images, or the model's own.
        effort: ``"fast"``, ``"balanced"``, ``"thorough"``, or an `arp_hub.effort.Effort`: how much time planning takes.
        progress: Show progress bars.

    Returns:
        The plan. Its ``dense`` gives the reason for every layer that stays dense.

    Raises:
        ArpHubError: If an argument is out of range, the packages of the workload's runtime are missing, or the budget
            cannot be met; the message says what can be met.

    Example:
        >>> make_plan(timm.create_model("resnet18"), keep_params=0.5, schemes=["channel", "group_out"])
    """
    check_model(model)
    check_weights(model, trainable=calibration is not None)
    cost, share = _budget(keep_params, keep_macs, keep_latency)
    settings = Effort.of(effort)
    if workload is not None and cost != "latency":
        raise ArpHubError("a workload is for keep_latency alone: leave it out, or give keep_latency")
    workload = workload or Workload()
    check_installed(workload)
    names = _scheme_names(schemes)
    multiple = (RANK_MULTIPLE if cost == "latency" else 1) if rank_multiple is None else rank_multiple
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ArpHubError(f"rank_multiple must be a whole number of at least 1, got {rank_multiple!r}")
    check_plannable(model, exclude)
    if without_weights := any(parameter.is_meta for parameter in model.parameters()):
        if calibration is not None or cost == "latency":
            what = "keep_latency" if calibration is None else "calibration"
            raise ArpHubError(f"{what} needs a model with weights, and this one is on the meta device: load them first")
        warnings.warn("the model has no weights (meta device): its ranks are chosen by shape alone", stacklevel=2)
    if calibration is not None:
        check_normalised(calibration, model)
        calibration = limited(calibration, settings.images)
        input_size = input_size or cast(InputSize, tuple(next(batches(calibration)).shape[1:]))
    traced = trace(model, input_size)
    if calibration is not None:
        check_outputs(model, calibration)
    layers, dense = _eligible(model, traced, names, exclude)
    processes = ALONE
    if calibration is not None or cost == "latency":
        processes = Processes.meeting(
            "make_plan",
            lambda: {
                "budget": (cost, share, multiple),
                "layers": {name: [scheme.name for scheme in found] for name, found in layers.items()},
                "effort": settings,
                "calibration": None
                if calibration is None
                else (image_count(calibration), digest_of([next(batches(calibration))])),
                "the weights": digest_of(model.parameters()),
            },
        )
        progress = progress and processes.index == 0
    budget: Budget
    if cost == "latency":
        watch = Stopwatch(model, workload, input_size_of(model, input_size))
        table = LatencyTable(watch.workload, watch.device)
        # one process measures: timings of several would disturb each other, and differ
        faster = processes.of_first(lambda: faster_schemes(layers, traced.sizes, table, progress))
        slower = [name for name in layers if name not in faster]
        dense |= dict.fromkeys(slower, "no scheme is faster than the dense layer, as measured")
        layers = faster
        shares = processes.of_first(lambda: watch.shares(layers, traced.sizes, table))
        by_layers = LayerTimes(table, traced.sizes, layers, shares, multiple, dense)
        where = "on this device" if workload.in_torch else f"in {workload.where}, on this device"
        budget = LatencyBudget(share, by_layers, watch, where)
    else:
        total = float(traced.params if cost == "params" else traced.macs)
        budget = CountedBudget(cost, share, total, CountedCosts(cost, traced.sizes), multiple, dense)
    if without_weights:
        losses = shape_losses(layers)
    elif calibration is None or not layers:
        losses = weight_losses(model, layers, progress)
    else:
        losses = output_losses(model, layers, calibration, traced.macs, settings, processes, progress)
    plan = processes.of_first(lambda: budget.plan(losses))
    if isinstance(budget, CountedBudget) and (kept := budget.kept(plan, layers)) < 0.9 * share:
        more = "" if calibration is None else ". More, or more varied, calibration images may change that"
        warnings.warn(
            f"keep_{cost}={share:g}, but the plan keeps {kept:.3f}: no larger rank that fits lowers the estimated "
            f"error{more}",
            stacklevel=2,
        )
    return made_for(model, plan)


def check_plannable(model: nn.Module, exclude: Sequence[str] | None) -> None:
    """Check a model and the layers to exclude, as `make_plan` takes them, before data is read.

    Raises:
        ArpHubError: If the model is decomposed already, or a name or pattern matches no layer with a weight.
    """
    if low_rank_layers(model):
        raise ArpHubError("the model is decomposed already: give the dense one, or call to_dense(model) first")
    known = [name for name, _ in weight_layers(model)]
    for pattern in () if exclude is None else _patterns(model, exclude):
        if not any(fnmatchcase(name, pattern) for name in known):
            inside = [f"{pattern}.*"] if any(name.startswith(f"{pattern}.") for name in known) else []
            near = inside or difflib.get_close_matches(pattern, known, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise ArpHubError(
                f"exclude={pattern!r} matches no layer of this {type(model).__name__}{hint}: give names of its layers, "
                "or patterns such as layer1.*"
            )


def _patterns(model: nn.Module, exclude: Sequence[str] | None) -> list[str]:
    """Names and patterns of the layers that stay dense."""
    if exclude is None:
        return _first_convs(model)
    return [exclude] if isinstance(exclude, str) else list(exclude)


def _budget(keep_params: float | None, keep_macs: float | None, keep_latency: float | None) -> tuple[str, float]:
    given = {"params": keep_params, "macs": keep_macs, "latency": keep_latency}
    chosen = {cost: share for cost, share in given.items() if share is not None}
    if len(chosen) != 1:
        raise ArpHubError(f"give exactly one of keep_params, keep_macs and keep_latency, got {len(chosen)} of them")
    cost, share = next(iter(chosen.items()))
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ArpHubError(f"keep_{cost} must lie between 0 and 1 (the share to keep, 0.5 for half), got {share!r}")
    return cost, float(share)


def _scheme_names(schemes: Sequence[str] | None) -> Sequence[str] | None:
    if schemes is None:
        return None
    names = [schemes] if isinstance(schemes, str) else list(schemes)
    if unknown := [name for name in names if name not in SCHEMES]:
        raise ArpHubError(f"unknown scheme {unknown[0]!r}: choose from {', '.join(SCHEMES)}")
    if not names:
        raise ArpHubError(f"schemes is empty: choose from {', '.join(SCHEMES)}")
    return names


def _eligible(
    model: nn.Module, traced: Trace, names: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[dict[str, list[Scheme]], dict[str, str]]:
    """The layers that can be decomposed with their schemes, and the others with their reasons."""
    patterns = _patterns(model, exclude)
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
    named = (name if name in known else name.replace(".", "_", 1) for name in names_of(first))  # of features_only
    return [name for name in named if name in known]
