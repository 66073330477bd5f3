"""Refine a decomposed model on unlabelled images: first block by block, then as a whole.

Both phases minimise the errors of `arp_hub.refinement.losses` with Adam. Within a phase the learning rate rises, then
falls to zero; short trials find its height. Some images are held out: a phase that raises the divergence of their
predictions is undone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.progress import stage
from .._utils.torch_utils import ambient_modes_off, digest_of, evaluating
from ..calibration.images import Images, batches, check_normalised
from ..errors import ArpHubError, check_writable, checked_path
from ..layers.low_rank import layer_shape
from ..layers.model import check_model, low_rank_layers, weight_layers
from ..processes import Processes
from .clock import Clock
from .state import Progress, StateFile, moments_of, restore_moments
from .steps import Steps, learning, not_checkpointing

LEAST_IMAGES = 20
"""Images that a refinement needs, so that a tenth of them can be held out."""
_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
"""Learning rates that are tried, the lowest first; on the ViT 1e-5 to 3e-5 were best, and 3e-4 did harm.

Where the time is too short for trials, the second one is taken.
"""
_TRIAL = 0.02
"""Share of the work that each trial of a learning rate takes, and of the time that a measurement takes at most."""


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Attributes:
        images: Unlabelled images that were learnt from.
        held_out: Images that only measured.
        steps: Optimiser steps, trials of learning rates included.
        seconds: Time that it took.
        before: Divergence of the predictions from the dense model's on the held-out images, before.
        after: The same afterwards; never higher.
    """

    images: int
    held_out: int
    steps: int
    seconds: float
    before: float
    after: float


@ambient_modes_off()
def refine(
    model: nn.Module,
    dense: nn.Module,
    images: Images,
    *,
    held_out: Images | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    state: str | Path | None = None,
    keep_state: bool = False,
    progress: bool = False,
) -> Refinement:
    """Refine a decomposed model in place, without labels, to the predictions of its dense form.

    Factors, biases and norms learn; dense weights, statistics of BatchNorms and frozen parameters stay. In the first
    fifth of the time each block learns to give the dense block's output from the inputs that it gets. In the rest the
    whole model learns the dense model's predictions, or its features if it has no classifier. Images are cropped and
    mirrored at random. On a GPU that supports bfloat16, forward passes compute in it. Where ``torch.distributed``
    is initialised, every process calls this with the same arguments and works on its share of each batch.

    Args:
        model: The decomposed model, on the device to work on.
        dense: The dense model that it was made from, on the same device.
        images: Unlabelled images, normalised as for the model: a tensor ``(N, C, H, W)`` or batches of one size, at
            least 20 together with ``held_out``. They are held in memory.
        held_out: Unlabelled images that only measure; by default a tenth of ``images``, at most 256, chosen at random.
            In a short time on a large model only some of them do.
            Pass images that the fit has not seen: on its own calibration images it errs less than on all others.
        minutes: Time to work for. Give this or ``steps``; by default 10 minutes.
        steps: Optimiser steps to make. With the same seed, they give the same model on the same machine.
        batch_size: Images of a step, over all processes.
        seed: Seed of the split, the order and the augmentation.
        state: A file that keeps the state once a minute. If it exists, the refinement goes on from there; it is deleted
            at the end. A file of other images, ranks, dense weights or settings is refused. Of several processes the
            first one reads and writes it.
        keep_state: Leave that file at the end, until the model is saved elsewhere: the same call then returns the
            finished model at once.
        progress: Show a progress bar.

    Returns:
        What was done, with the divergence before and after. ``model`` is never worse than before by that measure.

    Raises:
        ArpHubError: If the models do not belong together, images are too few, or ``state`` is of another refinement.

    Example:
        >>> small = decompose(copy.deepcopy(dense), plan, images)  # doctest: +SKIP
        >>> refine(small, dense, images, minutes=10)  # doctest: +SKIP
    """
    check_model(model)
    check_model(dense)
    check_amount(minutes, steps, batch_size)
    check_refinable(model)
    _check_pair(model, dense)
    for given in (images, held_out):
        if given is not None:
            check_normalised(given, dense)
    learnt, measured = split_images(images, held_out, seed)
    processes = Processes.meeting(
        "refine",
        lambda: {
            "images": (len(learnt), len(measured), digest_of((learnt, measured))),
            "the weights": digest_of(dense.parameters()),
            "minutes": minutes,
            "steps": steps,
            "batch_size": batch_size,
            "seed": seed,
        },
    )
    with evaluating(model), evaluating(dense), not_checkpointing(model), learning(model, dense) as parameters:
        work = Steps(model, dense, parameters, learnt, measured, batch_size, seed, processes)
        minutes = 10.0 if minutes is None and steps is None else minutes
        made = {"minutes": minutes, "steps": steps, "batch_size": batch_size, "seed": seed, "images": len(learnt)}
        made["parameters"] = sum(parameter.numel() for parameter in parameters)
        first = processes.index == 0
        with processes.agreed():
            file = _state_file(state if first else None, made, model, dense, (learnt, measured))
        with stage("refine", 100, progress and first) as advance:
            shown = 0

            def show(share: float) -> None:
                nonlocal shown
                advance(int(100 * share) - shown)
                shown = int(100 * share)

            result = _run(work, processes.of_first(file.load), file, minutes, steps, show)
            if not keep_state:
                file.remove()
    return Refinement(len(learnt), work.held_out, *result)


def check_amount(minutes: float | None, steps: int | None, batch_size: int = 1) -> None:
    """Check how long a refinement is to work for.

    Raises:
        ArpHubError: If both are given, or one is no number above 0.
    """
    if minutes is not None and steps is not None:
        raise ArpHubError("give minutes or steps, not both")
    for name, value in {"steps": steps, "batch_size": batch_size}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ArpHubError(f"{name} must be a whole number above 0, got {value!r}")
    if minutes is not None and not (isinstance(minutes, (int, float)) and minutes > 0 and math.isfinite(minutes)):
        raise ArpHubError(f"minutes must be a number above 0, got {minutes!r}")


def check_refinable(model: nn.Module) -> None:
    """Check that a refinement can change a model, or what it will be decomposed to.

    Raises:
        ArpHubError: If it is not in float32, or all of its parameters are frozen.
    """
    if (dtype := next(model.parameters()).dtype) != torch.float32:
        raise ArpHubError(f"refinement needs weights in float32, got {dtype}: call .float()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArpHubError("all parameters are frozen, so that nothing can be refined: call model.requires_grad_(True)")


def _check_pair(model: nn.Module, dense: nn.Module) -> None:
    if not low_rank_layers(model):
        raise ArpHubError("the model has no low-rank layer to refine: decompose it first")
    if low_rank_layers(dense):
        raise ArpHubError("`dense` is decomposed itself: pass the dense model that the decomposed one was made from")
    if (dtype := next(dense.parameters()).dtype) != torch.float32:
        raise ArpHubError(f"refinement needs a dense model in float32, got {dtype}: call .float()")
    ours, theirs = next(model.parameters()), next(dense.parameters())
    if ours.device != theirs.device:
        raise ArpHubError(f"the model is on {ours.device}, the dense model on {theirs.device}: move them together")
    known = dict(weight_layers(dense))
    for name, layer in low_rank_layers(model).items():
        if name not in known or layer_shape(known[name]) != layer_shape(layer):
            raise ArpHubError(f"`dense` has no layer '{name}' of the model's shape: pass the model it was made from")


def held_out_count(images: int) -> int:
    """Images that a refinement holds out by default: a tenth, at least 2 and at most 256.

    They are measured after every trial of a learning rate: a larger set would take a large part of the time.
    """
    return min(max(2, images // 10), 256)


def split_images(images: Images, held_out: Images | None, seed: int) -> tuple[Tensor, Tensor]:
    """The images to learn from, and those that only measure: ``held_out``, or else some at random.

    Raises:
        ArpHubError: If they are too few, of several shapes, or a pixel is NaN or infinite.
    """
    learnt = _tensor(images)
    if held_out is not None:
        measured = _tensor(held_out)
        if len(measured) < 2:
            raise ArpHubError(f"held_out needs at least 2 images to measure on, got {len(measured)}: pass more")
        if learnt.shape[1:] != measured.shape[1:]:
            shapes = f"{tuple(learnt.shape[1:])} and {tuple(measured.shape[1:])}"
            raise ArpHubError(f"images and held_out have images of shapes {shapes}: pass images of one shape")
    else:
        order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(seed % 2**63))
        count = held_out_count(len(learnt))
        learnt, measured = learnt[order[count:]], learnt[order[:count]]
    if len(learnt) + len(measured) < LEAST_IMAGES:
        raise ArpHubError(
            f"refinement needs at least {LEAST_IMAGES} images, got {len(learnt) + len(measured)}: pass more"
        )
    return learnt, measured


def _tensor(images: Images) -> Tensor:
    if isinstance(images, Tensor):
        for _ in batches(images):  # NaN pixels are refused before any work
            pass
        return images
    found = [batch.cpu() for batch in batches(images)]
    if len(shapes := {tuple(batch.shape[1:]) for batch in found}) > 1:
        raise ArpHubError(f"refinement needs images of one shape, got {sorted(shapes)}: resize them")
    return torch.cat(found)


def _state_file(
    path: str | Path | None, made: Mapping[str, Any], model: nn.Module, dense: nn.Module, images: tuple[Tensor, Tensor]
) -> StateFile:
    """The file of a refinement's state. It belongs to these settings, dense weights, ranks and images."""
    if path is None:
        return StateFile(None, made)
    path = checked_path(path, "state")
    check_writable(path.parent.absolute(), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    digests = {
        "dense weights": digest_of(dense.state_dict().values()),
        "ranks": hashlib.sha256(str(ranks).encode()).hexdigest(),
        "images": digest_of(images),
    }
    return StateFile(path, made, digests)


def _run(
    work: Steps,
    start: tuple[Progress, dict[str, Tensor]] | None,
    file: StateFile,
    minutes: float | None,
    steps: int | None,
    advance: Callable[..., object],
) -> tuple[int, float, float, float]:
    """All phases, from a stored state if there is one. Returns steps, seconds, and the divergence before and after."""
    progress, tensors = start or (Progress(), {})
    clock = Clock(minutes, steps, progress.seconds, progress.steps)
    if tensors:
        work.load(tensors["parameters"])
        work.hold_out(progress.held_out)
    else:
        if minutes is not None:
            work.hold_out(_images_to_measure(work, clock))
        progress.held_out = work.held_out
        progress.before = progress.least = work.divergence()
        if not math.isfinite(progress.before):
            raise ArpHubError(
                f"the divergence of the predictions is {progress.before}, so nothing can be learnt: an output is "
                "infinite or not a number, as logits of masked classes are: take the mask off"
            )
    best = tensors.get("best", work.vector())
    # longer phases of blocks leave a ViT and mobile networks further from the dense network
    phases = [(True, 0.2), (False, 1.0)] if work.blocks else [(False, 1.0)]
    try:
        for number, (by_blocks, end) in list(enumerate(phases))[progress.phase :]:
            if clock.share() >= end:
                continue
            if not progress.rate:
                progress.rate = _best_rate(work, clock, by_blocks, steps)
                progress.begin = clock.share()
            optimizer = work.optimizer()
            restore_moments(optimizer, work.parameters, tensors)
            try:
                while (share := clock.share()) < end:
                    done = (share - progress.begin) / (end - progress.begin)
                    work.step(optimizer, progress.rate * _schedule(done), clock.steps, by_blocks)
                    clock.steps += 1
                    advance(share)
                    if file.due():
                        _save(file, progress, clock, work, best, optimizer)
            except BaseException:  # what is done is not lost, whatever stops it
                _save(file, progress, clock, work, best, optimizer)
                raise
            if (divergence := work.divergence()) < progress.least:
                progress.least, best = divergence, work.vector()
            else:
                work.load(best)
            progress.phase, progress.rate, tensors = number + 1, 0.0, {}
            _save(file, progress, clock, work, best, None)
    except BaseException:
        work.load(best)  # the model is not left in the middle of a phase, where it may be worse than before
        raise
    return clock.steps, clock.seconds, progress.before, progress.least


def _save(
    file: StateFile, progress: Progress, clock: Clock, work: Steps, best: Tensor, optimizer: torch.optim.Adam | None
) -> None:
    progress.steps, progress.seconds = clock.steps, clock.seconds
    moments = moments_of(optimizer, work.parameters) if optimizer else {}
    file.save(progress, {"parameters": work.vector(), "best": best, **moments})


def _schedule(done: float) -> float:
    """The learning rate over its height: a rise over a twentieth of the phase, then a line down to zero."""
    return min(1.0, (done + 0.005) / 0.05) * (1 - done)


def _images_to_measure(work: Steps, clock: Clock, least: int = 32) -> int:
    """The held-out images whose measurement takes a share of `_TRIAL` of the time, at least 32."""
    if work.held_out <= least:
        return work.held_out
    begin = clock.share()
    work.divergence(least)
    return max(least, int(least * _TRIAL / max(clock.share() - begin, 1e-9)))


def _best_rate(work: Steps, clock: Clock, by_blocks: bool, steps: int | None, least: int = 5) -> float:
    """The learning rate whose short run ends with the lowest loss on the held-out images, from low to high.

    A run of fewer than ``least`` steps tells nothing.
    """
    if steps is not None and _TRIAL * steps < least:
        return _RATES[1]
    start, best, lowest = work.vector(), _RATES[0], math.inf
    for rate in _RATES:
        optimizer, begin, before = work.optimizer(), clock.share(), clock.steps
        while (share := clock.share()) < min(begin + _TRIAL, 1.0):
            done = (share - begin) / _TRIAL
            work.step(optimizer, rate * _schedule(done), clock.steps, by_blocks)
            clock.steps += 1
        if clock.steps - before < least:
            work.load(start)
            return _RATES[1]
        loss = work.loss(by_blocks)
        work.load(start)
        if not loss < lowest:
            break
        best, lowest = rate, loss
    return best
