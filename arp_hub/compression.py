"""Compress a model in one call: plan, decompose, refine."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from ._utils.torch_utils import ambient_modes_off, kept_activations
from .calibration.images import Images
from .decomposition import decompose
from .effort import Effort
from .errors import ArpHubError
from .layers.model import check_model
from .layers.trace import InputSize
from .planning.make_plan import check_plannable, make_plan
from .refinement.refine import check_amount, check_refinable, split_images
from .refinement.refine import refine as refine_model
from .timing import Workload


@ambient_modes_off()
def compress(
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
    refine: bool = False,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Compress a copy of a model: `make_plan`, `decompose` and, with ``refine=True``, `refine` in one call.

    Call the three functions yourself for the plan, for the figures of the refinement, or to decompose in place.
    Where ``torch.distributed`` is initialised, every process calls this with the same arguments and shares the work.

    Args:
        model: A dense model, on the device to work on. It is not changed.
        keep_params: Share of the model's parameters to keep, between 0 and 1.
        keep_macs: Share of its multiply-accumulates to keep.
        keep_latency: Share of the time of its forward pass to keep. Give exactly one of the three.
        workload: What ``keep_latency`` is for, see `make_plan`.
        schemes: Names of the schemes to choose from, see `make_plan`.
        rank_multiple: Ranks are multiples of this, see `make_plan`.
        exclude: Names or glob patterns of layers that stay dense, see `make_plan`.
        calibration: Unlabelled images, normalised as the model expects: a tensor ``(N, C, H, W)`` or batches, in random
            order. With ``refine``, a tenth of them, at most 256, is held out: no weight is fitted to them. They choose
            the learning rates, and a phase of the refinement that raises the divergence of their predictions is undone.
        input_size: ``(channels, height, width)``; by default that of the images, or the model's own.
        effort: ``"fast"``, ``"balanced"``, ``"thorough"``, or an `arp_hub.effort.Effort`.
        refine: Whether optimiser steps on the calibration images follow the fit. They need no labels, and at least 20
            images of one size; use 1,000 or more.
        minutes: Time to refine for. Give this or ``steps``; by default 10 minutes.
        steps: Optimiser steps to refine for.
        seed: Seed of the images that are held out, and of the order and the augmentation of the others.
        progress: Show progress bars.

    Returns:
        The compressed copy, in the mode and on the device of ``model``.

    Raises:
        ArpHubError: If an argument is out of range, the budget cannot be met, or ``refine`` lacks images.

    Example:
        >>> small = compress(model, keep_params=0.6, calibration=images, refine=True)  # doctest: +SKIP
    """
    held_out = None
    if refine:
        if calibration is None:
            raise ArpHubError("refine=True needs images: pass calibration=, unlabelled images of the model's data")
        check_amount(minutes, steps)
        check_model(model)
        check_plannable(model, exclude)
        check_refinable(model)
        calibration, held_out = split_images(calibration, None, seed)
    elif minutes is not None or steps is not None:
        raise ArpHubError("minutes and steps are for the refinement: pass refine=True, or leave them out")
    plan = make_plan(
        model,
        keep_params=keep_params,
        keep_macs=keep_macs,
        keep_latency=keep_latency,
        workload=workload,
        schemes=schemes,
        rank_multiple=rank_multiple,
        exclude=exclude,
        calibration=calibration,
        input_size=input_size,
        effort=effort,
        progress=progress,
    )
    small = copy.deepcopy(model, kept_activations(model))
    decompose(small, plan, calibration, effort=effort, progress=progress)
    if calibration is not None and held_out is not None:
        refine_model(
            small, model, calibration, held_out=held_out, minutes=minutes, steps=steps, seed=seed, progress=progress
        )
    return small
