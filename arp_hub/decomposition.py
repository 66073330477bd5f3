"""Decompose a model by a plan, and merge it back: least squares, no training."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ._utils.progress import counted, stage
from ._utils.torch_utils import ambient_modes_off, digest_of, evaluating, kept_activations
from .calibration.batchnorm import following_norms, norms_with_statistics, renormalise
from .calibration.gradients import gradient_moments
from .calibration.images import LEAST_PIXELS, Images, batches, check_normalised, check_outputs, image_count, limited
from .calibration.layer_problem import LayerProblem, can_shift, fitted_together
from .calibration.moments import Moments, images_needed
from .calibration.passes import paired_moments
from .calibration.resumption import ResumedPasses
from .effort import Effort
from .errors import ArpHubError
from .layers.apply_plan import check_plan
from .layers.carry_over import loses_hooks
from .layers.dense import computes_weight
from .layers.low_rank import LowRankLayer, effective_weight, layer_shape, low_rank_layer
from .layers.model import check_model, check_weights, layers_called, low_rank_layers, refusals, replace_layers
from .layers.trace import InputSize, Trace, trace
from .plan import BETTER_DENSE, LayerPlan, RankPlan
from .processes import Processes
from .schemes import Factors, Scheme, relative_error
from .schemes.linalg import factorising, solving_device

_EXACT = 1e-8
"""Relative squared error up to which given factors reproduce a weight: the rounding of a penalty in float32. In a dtype
with larger rounding errors, the bound is the square of the dtype's machine epsilon."""


@ambient_modes_off()
def decompose(
    model: nn.Module,
    plan: RankPlan,
    calibration: Images | None = None,
    *,
    factors: Mapping[str, Factors] | None = None,
    effort: Effort | str = "balanced",
    progress: bool = False,
) -> nn.Module:
    """Replace the planned layers by their low-rank factors, in place. No labels, no training.

    Without ``calibration``, every weight becomes its nearest point in the scheme's set. With it, layers are fitted one
    by one, in the order of their use: to the dense layer's output, from the input that the decomposed model so far
    gives. Errors are weighed by what they do to the model's predictions, which takes back-propagation, but no labels.
    Biases, or the means of a BatchNorm that follows, keep every layer's mean output.

    Dense layers behind decomposed ones get inputs with errors. Where a BatchNorm follows, its statistics are corrected
    at the end. A classifier that the plan left dense for its budget is fitted to its new input at full rank. This needs
    4 samples of the input for each column of the weight. Excluded layers keep their weights.

    Hooks, attributes, mode, dtype, device and ``requires_grad`` of every layer are kept, and the factors of a frozen
    layer are frozen. Gradient hooks on weights are lost, with a warning.

    Where ``torch.distributed`` is initialised, the processes share the work on calibration images. Every process then
    calls this with the same arguments.

    Args:
        model: A model with dense layers, on the device to work on, neither compiled nor wrapped.
        plan: A plan made for this model.
        calibration: Unlabelled images, normalised as for the model: a tensor ``(N, C, H, W)`` or batches, in random
            order. Of large networks the first images decide most, since work is bounded.
        factors: Factors by layer that are used unchanged, such as those of `AdaptiveRankPenalty.factors` after the
            hold. They must reproduce the weights up to rounding. Frozen layers without factors get their nearest ones.
        effort: ``"fast"``, ``"balanced"``, ``"thorough"``, or an `arp_hub.effort.Effort`: how much time the fit takes.
        progress: Show a progress bar.

    Returns:
        ``model`` itself. On an error it is unchanged.

    Raises:
        ArpHubError: If the plan does not fit the model, the model is wrapped or compiled, a weight is not finite, or
            ``factors`` do not reproduce the weights.

    Example:
        >>> model = timm.create_model("resnet18")
        >>> plan = make_plan(model, keep_params=0.5)
        >>> decompose(model, plan)
    """
    check_model(model)
    schemes, settings = check_plan(model, plan), Effort.of(effort)
    if factors is not None and calibration is not None:
        raise ArpHubError("pass either calibration images or factors, not both: given factors are not fitted again")
    check_weights(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    _warn_of_lost_hooks([name for name in plan.layers if loses_hooks(modules[name])])
    for name in plan.layers:
        if effective_weight(modules[name]).is_meta:
            raise ArpHubError(f"layer '{name}' has no weight (meta device): load the model's weights first")
        if not torch.isfinite(effective_weight(modules[name])).all():
            raise ArpHubError(f"layer '{name}': its weight holds NaN or infinite values")
    if calibration is not None:
        with layers_called(model):
            check_normalised(calibration, model)
            images = limited(calibration, settings.images)
            processes = Processes.meeting(
                "decompose",
                lambda: {
                    "plan": plan.to_json(),
                    "effort": settings,
                    "calibration": (image_count(images), digest_of([next(batches(images))])),
                    "the weights": digest_of(model.parameters()),
                },
            )
            return _decompose_by_data(model, plan, schemes, images, settings, processes, progress)
    new = {}
    for name, layer_plan in counted(plan.layers.items(), "decompose", progress):
        weight = effective_weight(modules[name])
        if factors is None or (name not in factors and not modules[name].weight.requires_grad):
            with factorising(name):
                found = schemes[name].nearest(weight.to(solving_device(weight), torch.float64), layer_plan.rank)
        else:
            found = _given_factors(name, schemes[name], layer_plan.rank, weight, factors)
        new[name] = low_rank_layer(modules[name], layer_plan)
        new[name].load_factors(found, modules[name].bias)
    replace_layers(model, {modules[name]: layer for name, layer in new.items()})
    return model


@ambient_modes_off()
def to_dense(model: nn.Module) -> nn.Module:
    """Merge the factors of every low-rank layer into one dense layer, in place: same outputs, plain modules.

    Hooks, attributes, mode, dtype, device and ``requires_grad`` of every layer are kept. Hooks on single factors are
    lost, with a warning. A weight-standardised convolution becomes a plain one with the standardised weight.

    Returns:
        ``model`` itself. On an error it is unchanged.

    Raises:
        ArpHubError: If the model is wrapped or compiled, or a factor is: an adapter, a quantised or pruned layer.
    """
    check_model(model, mergeable=True)
    layers = low_rank_layers(model)
    _warn_of_lost_hooks([name for name, layer in layers.items() if loses_hooks(layer)])
    replace_layers(model, {layer: layer.dense_layer() for layer in layers.values()})
    return model


def _warn_of_lost_hooks(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"gradient hooks on parameters and hooks on single factors are not carried over: {len(names)} layers lose "
            f"theirs, such as '{names[0]}'. Register them again on the new layers",
            stacklevel=3,
        )


def _given_factors(name: str, scheme: Scheme, rank: int, weight: Tensor, factors: Mapping[str, Factors]) -> Factors:
    """The factors of one layer, which must reproduce its weight up to the rounding of their dtypes."""
    if name not in factors:
        raise ArpHubError(f"layer '{name}' is planned, but there are no factors for it")
    found = tuple(factor.detach() for factor in factors[name])
    if [factor.shape for factor in found] != [torch.Size(conv.weight_shape) for conv in scheme.convs(rank)]:
        shapes = [tuple(factor.shape) for factor in found]
        raise ArpHubError(f"layer '{name}': the given factors have shapes {shapes}, which are not those of its plan")
    error = relative_error(weight.double(), scheme.compose([factor.double() for factor in found]))
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (weight, *found))
    if not error <= max(_EXACT, rounding**2):
        raise ArpHubError(
            f"layer '{name}': the given factors miss its weight by a relative squared error of {float(error):.1e}; "
            "they are exact only after the penalty's hold phase: train to its end, or leave factors out"
        )
    return found


def _decompose_by_data(
    model: nn.Module,
    plan: RankPlan,
    schemes: Mapping[str, Scheme],
    images: Images,
    effort: Effort,
    processes: Processes,
    progress: bool,
) -> nn.Module:
    """Fit layer after layer on a copy, then put all new layers into ``model`` at once."""
    with processes.agreed():
        shapes = [cast(InputSize, tuple(batch.shape[1:])) for batch in batches(images) for _ in batch]
        traced = trace(model, shapes[0])
        check_outputs(model, images)
    with evaluating(model):
        # with weights in common: only buffers are changed in place, and whole layers exchanged
        student = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()} | kept_activations(model))
        dense = layers_to_refit(student, plan, traced, images, len(shapes))
        teachers = {name: model.get_submodule(name) for name in [*plan.layers, *dense]}
        norms = following_norms(student, {name: student.get_submodule(name) for name in plan.layers}, images)
        least = math.ceil(LEAST_PIXELS / math.prod(shapes[0][1:]))
        most = max(least, int(effort.gradient_macs / (3 * max(traced.macs, 1))))  # a backward pass costs two forward
        replaced = {name: teachers[name] for name in plan.layers}
        gradients = gradient_moments(model, replaced, images, effort.positions_macs, most, processes)
        passes = ResumedPasses([student, model], images, len(shapes), processes)
        steps = _passes(model, teachers, traced, shapes, effort, passes.blocks)
        with stage("decompose", len(teachers), progress and processes.index == 0) as advance:
            for k, (names, most) in enumerate(steps):
                passes.advance(names[0])
                old = {name: student.get_submodule(name) for name in names}
                # before the first pass nothing is decomposed yet: one model is both
                pupils = (student, old) if k else (model, {name: teachers[name] for name in names})
                found = paired_moments(*pupils, model, passes, partial(_no_moments, norms, passes, effort, most), most)

                def fit(found: dict[str, Moments], name: str) -> _Fit:
                    norm = norms.get(name)
                    with factorising(name):  # popped, so that the memory of a layer's moments is free when it is fitted
                        problem = LayerProblem.of(teachers[name], found.pop(name), gradients.pop(name, None), norm)
                        return _fitted(problem, schemes.get(name), plan.layers.get(name), effort)

                costs = {name: _fit_cost(teachers[name], plan.layers.get(name)) for name in names}
                for name, fitted in processes.shared_out(costs, partial(fit, found)):
                    if name in plan.layers:
                        new = _new_layer(teachers[name], plan.layers[name], norms.get(name), fitted)
                        replace_layers(student, {old[name]: new})
                    else:
                        _refit(old[name], fitted)
                    advance()
        most = max(64, int(effort.norm_macs / (2 * max(traced.macs, 1))))  # 64: every position of an image counts
        renormalise(student, model, images, set(norms.values()), most, processes)
    student_modules = dict(student.named_modules(remove_duplicate=False))  # a plan may name a second path
    replace_layers(model, {old: student_modules[name].train(old.training) for name, old in replaced.items()})
    for name in dense:
        for parameter, refit in zip(teachers[name].parameters(), student_modules[name].parameters(), strict=True):
            parameter.data.copy_(refit.data)
    for name, norm in norms_with_statistics(model).items():
        corrected = cast(BatchNorm, student_modules[name])
        cast(Tensor, norm.running_mean).copy_(cast(Tensor, corrected.running_mean))
        cast(Tensor, norm.running_var).copy_(cast(Tensor, corrected.running_var))
    return model


def layers_to_refit(model: nn.Module, plan: RankPlan, traced: Trace, images: Images, count: int) -> list[str]:
    """The dense layers behind the last planned one that are fitted to their new inputs at full rank, as a classifier.

    No later fit makes up for the errors in these inputs. Left out are layers whose output a BatchNorm alone reads,
    which corrects it, and layers of whose inputs the images have too few samples. A quarter of what a low-rank fit
    needs suffices: 4 for each column (docs/research/experiments.md).
    """
    planned, refused = {id(model.get_submodule(name)) for name in plan.layers}, refusals(model)
    behind: dict[str, nn.Module] | None = None
    for name, sizes in traced.sizes.items():
        layer = model.get_submodule(name)
        if id(layer) in planned:
            behind = {}
        elif behind is not None and plan.dense.get(name) == BETTER_DENSE:
            free = layer not in refused and not computes_weight(layer)
            if free and images_needed(layer_shape(layer), sizes[0]) <= 4 * count:
                behind[name] = layer
    followed = following_norms(model, behind or {}, images)
    return [name for name in behind or {} if name not in followed]


_Fit = tuple[Factors, "Tensor | None"]
"""The factors of a layer, or the weight of one that stays dense, and the change of its bias if one can follow. On the
CPU, as processes exchange it."""


def _no_moments(
    norms: Mapping[str, BatchNorm], passes: ResumedPasses, effort: Effort, images: int, name: str, layer: nn.Module
) -> Moments:
    centred = can_shift(layer, norms.get(name))
    return Moments(layer_shape(layer), passes.place.device, effort.positions_macs, centred, images=images)


def _fit_cost(layer: nn.Module, plan: LayerPlan | None) -> int:
    return effective_weight(layer).numel() * (plan.rank if plan else 1)


def _fitted(problem: LayerProblem, scheme: Scheme | None, plan: LayerPlan | None, effort: Effort) -> _Fit:
    factors: Factors = (problem.regression.target,)
    if scheme is None or plan is None:
        weight = problem.regression.target
    else:
        bounds = effort.fit_iterations, effort.fit_macs, 5, effort.start_sweeps
        (factors,) = fitted_together([problem], scheme, plan.rank, *bounds)
        weight = scheme.compose(factors)
    bias = problem.bias(weight).cpu() if problem.can_shift else None
    return tuple(factor.cpu() for factor in factors), bias


def _new_layer(layer: nn.Module, plan: LayerPlan, norm: BatchNorm | None, fitted: _Fit) -> LowRankLayer:
    """The decomposed form of one layer; the mean of ``norm``, the BatchNorm behind it, takes up its change of mean."""
    factors, bias = fitted
    new = low_rank_layer(layer, plan)
    new.load_factors(factors, cast("Tensor | None", layer.bias))
    if bias is not None:
        _shift_mean(new, norm, bias)
    return new


def _refit(layer: nn.Module, fitted: _Fit) -> None:
    """Give a dense layer of the student another weight and bias; those that it has are the dense model's too."""
    factors, bias = fitted
    dense = cast(nn.Linear, layer)  # a convolution has the same two parameters
    dense.weight = nn.Parameter(factors[0].to(dense.weight).view_as(dense.weight), dense.weight.requires_grad)
    if bias is not None:
        dense.bias = nn.Parameter(dense.bias.detach() + bias.to(dense.bias), dense.bias.requires_grad)


@torch.no_grad()
def _shift_mean(layer: LowRankLayer, norm: BatchNorm | None, bias: Tensor) -> None:
    """Let the layer's bias, or the mean of the BatchNorm behind it, take up the ``bias`` of a fit."""
    if layer.bias is not None:
        layer.bias.add_(bias.to(layer.bias))
    else:
        mean = cast(Tensor, cast(BatchNorm, norm).running_mean)
        mean.sub_(bias.to(mean))


def _passes(
    model: nn.Module, names: Collection[str], traced: Trace, images: Sequence[InputSize], effort: Effort, blocks: int
) -> list[tuple[list[str], int]]:
    """Some layers in the order of their use, in groups that share a pass; with the images of each pass."""
    by_module = {id(model.get_submodule(name)): name for name in traced.sizes}
    modules = {name: model.get_submodule(name) for name in names}
    if silent := [name for name, module in modules.items() if id(module) not in by_module]:
        raise ArpHubError(f"the model never calls '{silent[0]}' (it may use its weight alone): take it out of the plan")
    places = {module: place for place, module in enumerate(by_module)}
    ordered = sorted(names, key=lambda name: places[id(modules[name])])
    calls = {name: traced.sizes[by_module[id(module)]] for name, module in modules.items()}
    least = math.ceil(LEAST_PIXELS / math.prod(images[0][1:]))
    needs = {name: max(least, images_needed(layer_shape(modules[name]), calls[name][0])) for name in ordered}
    macs = min(effort.forward_macs, 8e9 * len(images))
    # on average a pass runs half of a block in both models
    return passes_within(macs * blocks / max(traced.macs, 1), needs, len(images))


def passes_within(affordable: float, needs: Mapping[str, int], images: int) -> list[tuple[list[str], int]]:
    """Share a number of forward passes of single images out among layers.

    Args:
        affordable: Forward passes of single images, all layers together. One pass over all layers is made in any case.
        needs: The images that each layer needs, in the order of the layers' use.
        images: Number of calibration images.

    Returns:
        The layers of each pass, with the number of its images. Each layer has a pass of its own if that is affordable:
        over all images, or over the images it needs times a power of two. Otherwise neighbouring layers share a pass.
    """
    times, shared = 2 ** max(0, math.ceil(math.log2(images))), 1
    while True:
        counts = [min(images, times * need) for need in needs.values()]
        groups = [slice(k, k + shared) for k in range(0, len(counts), shared)]
        passes = [(list(needs)[group], max(counts[group])) for group in groups]
        if sum(count for _, count in passes) <= affordable or len(passes) == 1:
            return passes
        times, shared = (times // 2, 1) if times > 1 else (1, shared + 1)
