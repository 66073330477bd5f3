"""Passes over calibration images: what goes into layers, and what should come out of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArpHubError
from ..layers.dense import padder
from ..layers.low_rank import layer_shape
from ..processes import ALONE, Processes
from .images import Images, Place, batches, image_count
from .moments import Moments, shared_batches
from .resumption import Halt, ResumedPasses


@torch.no_grad()
def _visit(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Tensor,
    visit: Callable[[str, nn.Module, Tensor, Tensor], None],
) -> None:
    """Show input and output of the first call of each layer, in a forward pass that ends when all are seen.

    Modules behind a layer may work in place: ``visit`` clones the tensors that it keeps. Hooks of the user, which stay
    on the new layer, run behind it.
    """
    left = set(layers)

    def show(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name in left:
            left.remove(name)
            visit(name, module, args[0], output)
        if not left:
            raise Halt

    hooks = [layer.register_forward_hook(partial(show, name), prepend=True) for name, layer in layers.items()]
    try:
        model(images)
    except Halt:
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
    passes: ResumedPasses,
    new: Callable[[str, nn.Module], Moments],
    most: int,
) -> dict[str, Moments]:
    """Moments of the student's inputs to some layers against the teacher's outputs of them, in one pass.

    The processes that share the passes get the moments of all their images.

    Args:
        student: The model that is being decomposed.
        student_layers: Some of its layers that are still dense, by name.
        teacher: The dense model.
        passes: Passes of calibration images through both models.
        new: Makes empty moments of a layer, by its name and the dense layer.
        most: Images to use at most.

    Raises:
        ArpHubError: If a model never calls one of its layers.
    """
    teacher_layers = {name: teacher.get_submodule(name) for name in student_layers}
    found = {name: new(name, layer) for name, layer in teacher_layers.items()}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        inputs[name] = x.clone()

    with passes.processes.agreed():
        for number, batch, counted in passes.batches(most):
            one = (len(batch), number, counted)

            def count(name: str, layer: nn.Module, x: Tensor, y: Tensor, one: tuple[int, int, bool] = one) -> None:
                found[name].update(inputs.pop(name, x), _without_bias(layer, y), padder(layer), *one)

            if student is not teacher:
                with passes.resumed(student, number, len(batch)):
                    _visit(student, student_layers, batch, keep)
            with passes.resumed(teacher, number, len(batch)):
                _visit(teacher, teacher_layers, batch, count)
    for moments in found.values():
        moments.add_up(passes.processes)
    return found


@torch.no_grad()
def all_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Images,
    positions_macs: float,
    centred: Collection[str] = (),
    most: int | None = None,
    processes: Processes = ALONE,
) -> dict[str, Moments]:
    """Moments of many layers of one model in a single pass over the images; layers never called are left out.

    Args:
        model: The model, in evaluation mode.
        layers: The layers by name.
        images: Calibration images.
        positions_macs: Multiply-accumulates that one image may add to a layer's moment.
        centred: Names of the layers whose means are taken out.
        most: Images to use at most; by default all.
        processes: The processes that share the pass; each gets the moments of all images.
    """
    with processes.agreed():
        place, count = Place.of(model, images), image_count(images)
    count = count if most is None else min(most, count)
    found: dict[str, Moments] = {}
    one = (0, 0, True)

    def catch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name not in found:
            shape, centre = layer_shape(module), name in centred
            found[name] = Moments(shape, place.device, positions_macs, centre, paired=False, images=count)
        found[name].update(args[0], _without_bias(module, output), padder(module), *one)

    hooks = [layer.register_forward_hook(partial(catch, name), prepend=True) for name, layer in layers.items()]
    try:
        with processes.agreed():
            for number, batch, counted in shared_batches(batches(images, place, most=most), processes):
                one = (len(batch), number, counted)
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name in found:  # in one process or in all of them: each has seen a part of batch 0
            found[name].add_up(processes)
    return found


def _without_bias(layer: nn.Module, output: Tensor) -> Tensor:
    bias = cast("Tensor | None", layer.bias)
    if bias is None:
        return output
    return output - (bias if isinstance(layer, nn.Linear) else bias[:, None, None])
