"""The losses that the allocation sums: from shapes, from weights, or from calibration images.

========================  ===================================================================================
known of the model        loss of a layer at a rank
========================  ===================================================================================
shapes                    ``e^2``, with ``e`` the share of degrees of freedom that the rank gives up
weights                   ``e^2``, with ``e`` the relative error of the weight
weights and images        ``(e + 10 e^2) s^(3/4)``, with ``e`` the relative error of the output and ``s`` the
                          sensitivity
========================  ===================================================================================

Errors of weights say little about the network's output, so they are squared: that evens them out among layers. With
images, the sum of ``e s`` is the divergence of the network's predictions to second order. That holds for small errors
only: a layer that hardly matters while its error is small may ruin the network at a low rank. The square of the error
and the power of the sensitivity, 3/4, guard against it; both numbers were measured (docs/research/experiments.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .._utils.progress import counted, stage
from .._utils.torch_utils import evaluating
from ..calibration.images import Images
from ..effort import Effort
from ..layers.low_rank import effective_weight
from ..layers.model import layers_called
from ..processes import Processes
from ..schemes import Scheme
from ..schemes.linalg import factorising, solving_device
from ..schemes.shapes import LayerShape
from .allocation import Losses
from .costs import Floats
from .error_curves import shape_candidates, weight_candidates
from .output_errors import OutputErrors


def shape_losses(layers: Mapping[str, Sequence[Scheme]]) -> Losses:
    """Losses of layers without weights. Layers of one shape share them: large models have many such layers."""
    known: dict[LayerShape, list[tuple[Scheme, Floats]]] = {}
    for schemes in layers.values():
        shape = schemes[0].shape
        if shape not in known:
            known[shape] = [(found.scheme, found.errors**2) for found in shape_candidates(schemes)]
    return {name: known[schemes[0].shape] for name, schemes in layers.items()}


def weight_losses(model: nn.Module, layers: Mapping[str, Sequence[Scheme]], progress: bool) -> Losses:
    """Losses of layers by their weights."""
    losses = {}
    for name, schemes in counted(layers.items(), "measure layers", progress):
        with factorising(name):
            weight = effective_weight(model.get_submodule(name))
            curves = weight_candidates(weight.to(solving_device(weight), torch.float32), schemes)
        losses[name] = [(one.scheme, one.errors**2) for one in curves]
    return losses


def output_losses(
    model: nn.Module,
    layers: Mapping[str, Sequence[Scheme]],
    images: Images,
    macs: float,
    effort: Effort,
    processes: Processes,
    progress: bool,
) -> Losses:
    """Losses of layers by calibration images.

    Args:
        model: The dense model.
        layers: The schemes to choose from, by layer.
        images: Calibration images.
        macs: Multiply-accumulates of one image through the model.
        effort: Bounds on the work.
        processes: The processes that share the work.
        progress: Show progress bars.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    with evaluating(model), layers_called(model):
        errors = OutputErrors(model, modules, images, macs, effort, processes)
        with stage("measure layers", len(layers), progress) as advance:
            curves = {}
            for name, found in errors.candidates(layers):
                curves[name] = found
                advance()
        with stage("measure sensitivities", shown=progress):
            sensitivities = errors.sensitivities()
    return {
        name: [(one.scheme, output_loss(one.errors, sensitivities[name])) for one in curves[name]] for name in layers
    }


def output_loss(errors: Floats, sensitivity: float) -> Floats:
    """Losses of a layer by the relative errors of its output and its sensitivity, ``(e + 10 e^2) s^(3/4)``."""
    return (errors + 10 * errors**2) * sensitivity**0.75
