"""Calibration images, and passes over them: what goes into layers, and what should come out of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ._memory import give_back_memory
from .dense import padder
from .errors import ArpHubError
from .layers import layer_shape
from .moments import LARGE, Moments, PatchMoments, StationaryMoments

Images = Tensor | Iterable[Any]
"""Calibration images: one normalised tensor ``(N, C, H, W)``, or batches of them that can be gone through repeatedly
(a list or a DataLoader; of a batch that is a tuple, the first item counts)."""

LEAST_PIXELS = 64 * 224**2
"""Pixels of all images together that second moments are taken of in any case, if there are so many."""
_BATCH_SIZE, _CPU_PIXELS, _PIXELS = 128, 5 * 2**16, 2**21
"""Images, and their pixels on a CPU and elsewhere, that bound a batch, unless told. On a CPU maps of more
would not stay in a cache, nor in memory that the process holds already: with more than six images of 224 pixels, up
to a third of the time goes on memory taken from the system and given back."""


def batches(
    images: Images,
    device: torch.device | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    pixels: int | None = None,
    most: int | None = None,
) -> Iterator[Tensor]:
    """Go through calibration images in batches.

    Args:
        images: The images.
        device: Where to put them; by default they stay where they are.
        layout: Memory layout to put them in, as `fast_layout` finds it.
        pixels: Pixels that bound a batch of a tensor, such that statistics can be taken of it; by default as many as
            passes are fast with.
        most: Images to stop at; by default all.

    Raises:
        ArpHubError: If they are not images, or there are none.
    """
    if not isinstance(images, Tensor) and isinstance(images, Iterator):
        raise ArpHubError(
            "calibration must be a tensor or something that can be gone through repeatedly (a list, a DataLoader), "
            f"got a one-pass {type(images).__name__}: wrap it in list(...)"
        )
    count = 0
    for item in _split(images, device, pixels) if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            found = f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ArpHubError(f"calibration images must be normalised float tensors (N, C, H, W), got {found}")
        batch = batch if most is None else batch[: most - count]
        count += len(batch)
        yield batch if device is None else batch.to(device, memory_format=layout)
        if count == most:
            return
    if not count:
        raise ArpHubError("there are no calibration images: pass at least one batch")


def _split(images: Tensor, device: torch.device | None, pixels: int | None) -> Iterable[Tensor]:
    most = pixels or (_CPU_PIXELS if (device or images.device).type == "cpu" else _PIXELS)
    return images.split(max(1, min(_BATCH_SIZE, most // max(1, math.prod(images.shape[2:])))))


@torch.no_grad()
def fast_layout(model: nn.Module, images: Images) -> torch.memory_format:
    """Channels last, which convolutions on a CPU are about twice as fast with, unless the model cannot take it."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        try:
            model(next(batches(images, device, torch.channels_last))[:1])
            return torch.channels_last
        except RuntimeError:  # such as a .view() of a map
            pass
    return torch.contiguous_format


class _Halt(Exception):  # not an error: it ends a forward pass early
    """Raised by a hook once a forward pass has given what it was run for."""


@torch.no_grad()
def _visit(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Tensor,
    visit: Callable[[str, nn.Module, Tensor, Tensor], None],
) -> None:
    """Show input and output of the first call of each layer, in a forward pass that ends when all are seen.

    What follows a layer may work in place: what ``visit`` keeps of its tensors it has to clone.
    """
    left = set(layers)

    def show(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name in left:
            left.remove(name)
            visit(name, module, args[0], output)
        if not left:
            raise _Halt

    hooks = [layer.register_forward_hook(partial(show, name)) for name, layer in layers.items()]
    try:
        model(images)
    except _Halt:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if left:
        raise ArpHubError(f"the model never calls the planned layer '{min(left)}': take it out of the plan")


def paired_moments(
    student: nn.Module,
    student_layers: Mapping[str, nn.Module],
    teacher: nn.Module,
    teacher_layers: Mapping[str, nn.Module],
    images: Images,
    most: int,
) -> dict[str, PatchMoments]:
    """Moments of the student's inputs to some layers against the teacher's outputs of them, in one pass.

    Args:
        student: The model that is being decomposed.
        student_layers: Its layers in question by name.
        teacher: The dense model.
        teacher_layers: The same layers of it.
        images: Calibration images.
        most: How many of them to look at, at most.

    Raises:
        ArpHubError: If a model never calls one of its layers.
    """
    device, layout = next(teacher.parameters()).device, fast_layout(teacher, images)
    found = {name: PatchMoments(layer_shape(layer), device, images=most) for name, layer in teacher_layers.items()}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        inputs[name] = x.clone()

    def count(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        found[name].update(inputs.pop(name, x), _without_bias(layer, y), padder(layer))

    for batch in batches(images, device, layout, most=most):
        if student is not teacher:
            _visit(student, student_layers, batch, keep)
        _visit(teacher, teacher_layers, batch, count)
    give_back_memory()
    return found


@torch.no_grad()
def all_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Images, roughly: bool = False, most: int | None = None
) -> dict[str, Moments]:
    """Moments of many layers of one model in a single pass over the images, layers never called left out.

    Args:
        model: The model, in evaluation mode.
        layers: The layers by name.
        images: Calibration images.
        roughly: Hold those of large kernels as `StationaryMoments`, in a sixth of the memory, and look at fewer
            positions of large maps.
        most: Images to look at, at most; by default all.
    """
    device, layout = next(model.parameters()).device, fast_layout(model, images)
    found: dict[str, Moments] = {}

    def new(module: nn.Module) -> Moments:
        shape = layer_shape(module)
        if roughly and shape.taps > 1 and shape.group_in * shape.taps > LARGE:
            return StationaryMoments(shape, device)
        return PatchMoments(shape, device, paired=False, roughly=roughly)

    def catch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name not in found:
            found[name] = new(module)
        found[name].update(args[0], _without_bias(module, output), padder(module))

    hooks = [layer.register_forward_hook(partial(catch, name)) for name, layer in layers.items()]
    try:
        for batch in batches(images, device, layout, most=most):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    give_back_memory()
    return found


@torch.no_grad()
def following_norms(model: nn.Module, layers: Mapping[str, nn.Module], images: Images) -> dict[str, BatchNorm]:
    """The BatchNorm that each layer's output goes straight into, for the layers that have one."""
    found: dict[str, BatchNorm] = {}
    outputs: dict[str, Tensor] = {}

    def remember(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs[name] = output

    def recognise(module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, output in outputs.items():
            if args[0] is output:
                found[name] = cast(BatchNorm, module)

    hooks = [layer.register_forward_hook(partial(remember, name)) for name, layer in layers.items()]
    hooks += [
        module.register_forward_pre_hook(recognise)
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None and module.affine
    ]
    try:
        model(next(batches(images, next(model.parameters()).device))[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _without_bias(layer: nn.Module, output: Tensor) -> Tensor:
    bias = cast("Tensor | None", layer.bias)
    if bias is None:
        return output
    return output - (bias if isinstance(layer, nn.Linear) else bias[:, None, None])
