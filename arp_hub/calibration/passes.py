"""Passes over calibration images: what goes into layers, and what should come out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._utils.torch_utils import give_back_memory
from ..errors import ArpHubError
from ..layers.dense import padder
from ..layers.low_rank import layer_shape
from .images import Images, batches, fast_layout
from .moments import LARGE, Moments, PatchMoments, StationaryMoments


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
    positions_macs: float,
) -> dict[str, PatchMoments]:
    """Moments of the student's inputs to some layers against the teacher's outputs of them, in one pass.

    Args:
        student: The model that is being decomposed.
        student_layers: Its layers in question by name.
        teacher: The dense model.
        teacher_layers: The same layers of it.
        images: Calibration images.
        most: Images to use at most.
        positions_macs: Multiply-accumulates that one image may add to a layer's moment.

    Raises:
        ArpHubError: If a model never calls one of its layers.
    """
    device, layout = next(teacher.parameters()).device, fast_layout(teacher, images)
    found = {
        name: PatchMoments(layer_shape(layer), device, positions_macs, images=most)
        for name, layer in teacher_layers.items()
    }
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
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Images,
    positions_macs: float,
    most: int | None = None,
    stationary: bool = False,
) -> dict[str, Moments]:
    """Moments of many layers of one model in a single pass over the images, layers never called left out.

    Args:
        model: The model, in evaluation mode.
        layers: The layers by name.
        images: Calibration images.
        positions_macs: Multiply-accumulates that one image may add to a layer's moment.
        most: Images to use at most; by default all.
        stationary: Hold moments of large kernels as `StationaryMoments`, in a sixth of the memory.
    """
    device, layout = next(model.parameters()).device, fast_layout(model, images)
    found: dict[str, Moments] = {}

    def new(module: nn.Module) -> Moments:
        shape = layer_shape(module)
        if stationary and shape.taps > 1 and shape.group_in * shape.taps > LARGE:
            return StationaryMoments(shape, device, positions_macs)
        return PatchMoments(shape, device, positions_macs, paired=False)

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


def _without_bias(layer: nn.Module, output: Tensor) -> Tensor:
    bias = cast("Tensor | None", layer.bias)
    if bias is None:
        return output
    return output - (bias if isinstance(layer, nn.Linear) else bias[:, None, None])
