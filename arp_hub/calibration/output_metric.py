"""What errors of a layer's output do to the network's predictions: the second moment of gradients.

With ``g`` the gradient of ``log p(c | image)`` with respect to one position of a layer's output ``(O,)``, for a class
``c`` drawn from the network's own predictions, errors ``e`` of that output change the predictions by::

    KL(p || p')  ~  1/2 sum over positions of  e^T F e,    F = mean of g g^T    (G, O, O)

``F`` is the layer's block of the Fisher matrix (Martens and Grosse 2015). It needs back-propagation, but no labels. A
network without classes is treated as the mean of a normal distribution of its output. ``F`` is shrunk like the moments
of inputs (see `arp_hub.calibration.moments`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers.low_rank import layer_shape
from ..schemes.shapes import LayerShape
from .images import Images, Place, batches
from .moments import Moments


@dataclass(frozen=True)
class OutputMetric:
    """A norm of errors ``e (O,)`` of a layer's outputs, ``e^T F e``, group by group.

    Attributes:
        moment: ``F (G, O, O)``, positive definite.
    """

    moment: Tensor

    @cached_property
    def root(self) -> Tensor:
        """``S (G, O, O)``, upper triangular, with ``S^T S = F``."""
        return torch.linalg.cholesky(self.moment).mT

    def in_blocks(self, blocks: int) -> OutputMetric:
        """The same metric without what joins ``blocks`` equal parts of the outputs, each of consecutive channels."""
        parts = blocks // len(self.moment)
        if parts == 1:
            return self
        split = self.moment.unflatten(2, (parts, -1)).unflatten(1, (parts, -1))  # (G, parts, o, parts, o)
        return OutputMetric(split.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1))

    def apply(self, weight: Tensor) -> Tensor:
        """``S W`` of a weight ``(G * O, ..)``, whose plain norm is the metric of ``W``."""
        return (self.root @ self._rows(weight)).reshape(weight.shape)

    def undo(self, weight: Tensor) -> Tensor:
        """``S^-1 W`` of a weight ``(G * O, ..)``."""
        return torch.linalg.solve_triangular(self.root, self._rows(weight), upper=True).reshape(weight.shape)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(len(self.moment), self.moment.shape[-1], -1)


def gradient_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Images, positions_macs: float, most: int
) -> dict[str, Moments]:
    """Second moments of the gradients at the outputs of layers. Layers that no gradient reaches are left out.

    Args:
        model: The dense model, in evaluation mode.
        layers: The layers by name.
        images: Calibration images.
        positions_macs: Multiply-accumulates that one image may add to a layer's moment.
        most: Images to use at most.
    """
    place = Place.of(model, images)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Moments] = {}
    size = 0

    def count(name: str, module: nn.Module, gradient: Tensor) -> None:
        if name not in found:
            found[name] = Moments(_outputs(layer_shape(module)), place.device, positions_macs, paired=False)
        found[name].update(gradient, gradient, images=size)

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(count, name, module))

    hooks = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    try:
        for batch in batches(images, place, most=most):
            for part in batch.split(max(1, _PIXELS // math.prod(batch.shape[2:]))):
                size = len(part)
                try:
                    _back_propagate(model, part, generator)
                except RuntimeError as error:
                    warnings.warn(
                        f"the model cannot be differentiated, so errors of its layers' outputs are weighed without "
                        f"gradients: {error}",
                        stacklevel=2,
                    )
                    return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found


_PIXELS = 2**18
"""Pixels of images whose activations are kept for gradients together, 5 images of 224 x 224: 0.6 GB of ResNet-50."""


def _back_propagate(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    with torch.enable_grad(), _constant_parameters(model):
        start = images.clone().requires_grad_()
        score = _score(model, model(start.clone()), len(images), generator)  # a copy: some models work in place
        if score.requires_grad:
            torch.autograd.grad(score, start, allow_unused=True)


def classifies(model: nn.Module, output: object, images: int) -> bool:
    """Whether an output for a number of images consists of logits of the model's classes."""
    classes = getattr(model, "num_classes", 0)
    return isinstance(output, Tensor) and isinstance(classes, int) and classes > 1 and output.shape == (images, classes)


def _score(model: nn.Module, output: Any, images: int, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient at the output is one sample: its second moment is the output's Fisher matrix."""
    if classifies(model, output, images):
        chances = output.detach().double().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).to(output.device)
        return output.float().log_softmax(-1).gather(1, drawn).sum()
    scores = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            scores.append((leaf * noise).sum())
    return torch.stack(scores).sum() if scores else torch.zeros(())


@contextmanager
def _constant_parameters(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters, which would cost half of the backward pass."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _outputs(shape: LayerShape) -> LayerShape:
    """The shape whose input patches are the output positions of a layer."""
    return LayerShape(shape.out_channels, shape.out_channels, groups=shape.groups, kind=shape.kind)
