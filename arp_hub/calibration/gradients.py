"""Gradients at the outputs of layers: what errors there do to the network's predictions, to second order.

For one image with logits ``z`` and softened predictions ``p = softmax(z / t)``, and for noise ``n`` of independent
standard normal numbers, the back-propagated vector is::

    v = diag(p)^(1/2) (I - p^(1/2) p^(1/2)^T) n,    E v v^T = diag(p) - p p^T

the Fisher matrix of the predictions. With ``g`` the gradient of ``v . z`` at a layer's output, summed over its
positions, errors ``e`` of that output change the softened predictions by::

    KL(p || p')  ~  1/(2 t^2) E (g . e)^2

This needs no labels (Martens and Grosse 2015). For a network without classes ``v = n``, which gives the squared change
of its output. Planning has ``t = 4``, without the constant: confident predictions hardly respond to small errors,
yet large ones overturn them. At ``t = 1`` a quarter of ResNet-20 loses 36 points of agreement with the dense network
(docs/research/experiments.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers.low_rank import layer_shape
from ..processes import ALONE, Processes
from ..schemes.shapes import LayerShape
from .images import Images, Place, batches
from .moments import Moments

Substitute = Callable[[Tensor], Tensor]
"""A function that computes a layer's output from its input, in the layer's place."""
_Kept = TypeVar("_Kept")
_TEMPERATURE = 4.0
"""Divisor of the logits, see above; of 1, 2 and 4 the best on ResNet-20 (docs/research/experiments.md)."""
_PIXELS = 2**18
"""Pixels of images whose activations are kept for gradients together, 5 images of 224 x 224: 0.6 GB of ResNet-50."""


def gradient_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Images,
    positions_macs: float,
    most: int,
    processes: Processes = ALONE,
) -> dict[str, Moments]:
    """Second moments of the gradients at the outputs of layers. Layers that no gradient reaches are left out.

    Args:
        model: The dense model, in evaluation mode.
        layers: The layers by name.
        images: Calibration images.
        positions_macs: Multiply-accumulates that one image may add to a layer's moment.
        most: Images to use at most.
        processes: The processes that share the pass; each gets the moments of all images.
    """
    device = Place.of(model, images).device
    found: dict[str, Moments] = {}

    def moments(name: str) -> Moments:
        if name not in found:
            found[name] = Moments(_outputs(layer_shape(layers[name])), device, positions_macs, paired=False)
        return found[name]

    def nothing(name: str, x: Tensor, output: Tensor) -> None:
        return None

    def count(name: str, _: None, gradient: Tensor, size: int, part: int) -> None:
        moments(name).update(gradient, gradient, images=size, number=part)

    score = partial(_score, model, None)
    if not _visit_gradients(model, layers, images, most, processes, score, nothing, count):
        return {}
    reached = set().union(*processes.gather(set(found)))
    for name in layers:
        if name in reached:
            moments(name).add_up(processes)
    return found


def predicted_divergences(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    substitutes: Mapping[str, Substitute],
    images: Images,
    most: int,
    processes: Processes = ALONE,
    classes: int | None = None,
) -> dict[str, float]:
    """Divergence of the network's predictions with each layer alone replaced, ``1/2 mean (g . e)^2`` over the images.

    It is ``t^2`` times the divergence of the softened predictions. All layers are seen in one pass. Layers that no
    gradient reaches are left out.

    Args:
        model: The dense model, in evaluation mode.
        layers: The layers by name.
        substitutes: What replaces them.
        images: Calibration images.
        most: Images to use at most.
        processes: The processes that share the pass.
        classes: Number of classes; by default the model's own.
    """
    sums: dict[str, float] = {}
    seen: dict[str, int] = {}

    def error(name: str, x: Tensor, output: Tensor) -> Tensor:
        return substitutes[name](x) - output

    def add(name: str, error: Tensor, gradient: Tensor, size: int, part: int) -> None:
        # attention in windows splits an image into several entries, which follow each other
        products = (gradient * error).reshape(size, -1).sum(1, dtype=torch.float64)
        sums[name] = sums.get(name, 0.0) + float(products.square().sum())
        seen[name] = seen.get(name, 0) + size

    score = partial(_score, model, classes)
    if not _visit_gradients(model, layers, images, most, processes, score, error, add):
        return {}
    found = processes.gather((sums, seen))
    total = {name: sum(one.get(name, 0.0) for one, _ in found) for name in layers}
    count = {name: sum(one.get(name, 0) for _, one in found) for name in layers}
    return {name: total[name] / (2 * count[name]) for name in layers if count[name]}


def _visit_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Images,
    most: int,
    processes: Processes,
    score: Callable[[Any, int, torch.Generator], Tensor],
    forward: Callable[[str, Tensor, Tensor], _Kept],
    backward: Callable[[str, _Kept, Tensor, int, int], None],
) -> bool:
    """Visit every call of some layers twice: as it runs forward, and when the gradient at its output is known.

    Args:
        model: The dense model, in evaluation mode.
        layers: The layers by name.
        images: Calibration images.
        most: Images to use at most.
        processes: The processes that share the images.
        score: Gets the model's output, the number of images and a generator, and returns what is differentiated.
        forward: Gets the layer's name, input and output, and returns what is kept for ``backward``.
        backward: Gets the layer's name, what was kept, the gradient, the number of images in this part of the images,
            and the number of the part.

    Returns:
        Whether the model can be differentiated. If not, a warning has said so.
    """
    size = part = 0

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            with torch.no_grad():
                output.register_hook(partial(learn, name, forward(name, args[0], output)))

    def learn(name: str, kept: _Kept, gradient: Tensor) -> None:
        backward(name, kept, gradient, size, part)

    hooks = [layer.register_forward_hook(partial(watch, name), prepend=True) for name, layer in layers.items()]
    done = True
    try:
        with processes.agreed():
            for part, some in _shared_parts(batches(images, Place.of(model, images), most=most), processes):
                size = len(some)
                try:
                    _back_propagate(model, some, part, score)
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    warnings.warn(
                        f"the model cannot be differentiated, so errors of its layers' outputs are weighed without "
                        f"gradients: {error}",
                        stacklevel=2,
                    )
                    done = False
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return all(processes.gather(done))


def _shared_parts(found: Iterable[Tensor], processes: Processes) -> Iterator[tuple[int, Tensor]]:
    """One process's parts of the batches, as memory can keep their activations, each with its number among all parts.

    Each part goes to the process with the fewest images so far: parts of five and one take turns in batches of six.
    """
    images = [0] * processes.count
    parts = (some for batch in found for some in batch.split(max(1, _PIXELS // math.prod(batch.shape[2:]))))
    for number, some in enumerate(parts):
        owner = images.index(min(images))
        images[owner] += len(some)
        if owner == processes.index:
            yield number, some


def _back_propagate(
    model: nn.Module, images: Tensor, number: int, score: Callable[[Any, int, torch.Generator], Tensor]
) -> None:
    """Visit some images; their ``number`` is the seed of the noise."""
    generator = torch.Generator().manual_seed(number)
    with torch.enable_grad(), _constant_parameters(model):
        start = images.clone().requires_grad_()
        found = score(model(start.clone()), len(images), generator)  # a copy: some models work in place
        if found.requires_grad:
            torch.autograd.grad(found, start, allow_unused=True)


def classifies(model: nn.Module, output: object, images: int, classes: int | None = None) -> bool:
    """Whether an output for a number of images consists of logits of some classes, by default of the model's."""
    classes = getattr(model, "num_classes", 0) if classes is None else classes
    return isinstance(output, Tensor) and isinstance(classes, int) and classes > 1 and output.shape == (images, classes)


def _score(model: nn.Module, classes: int | None, output: Any, images: int, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient at the output is one sample: its second moment is the output's Fisher matrix."""
    scores = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, torch.float32)
            if classifies(model, output, images, classes):
                root = (leaf.detach().float() / _TEMPERATURE).softmax(-1).sqrt()
                noise = root * (noise - root * (root * noise).sum(-1, keepdim=True))
            scores.append((leaf.float() * noise).sum())
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
