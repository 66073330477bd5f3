"""Calibration images, and passes over them: what goes into layers, and what should come out of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .._utils.torch_utils import give_back_memory
from ..layers.model import low_rank_layers
from .images import Images, batches, fast_layout


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


_MOST_CHANGE = 16.0
"""Factor by which a channel's variance is believed to have changed at most."""
_PIXELS = 2**20
"""Pixels that bound a batch: statistics of few images mislead the BatchNorms behind, and many take much memory."""


class InputStatistics:
    """Mean and biased variance of each channel ``(C,)``, of all inputs so far of one BatchNorm, in double precision.

    Attributes:
        count: Values of each channel so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = torch.zeros(1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count an input ``(N, C, ..)``."""
        count = x.numel() // x.shape[1]
        mean, variance = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
        if count > 1:  # by the kernel of BatchNorm itself, ten times as fast as var_mean on a map with channels last
            F.batch_norm(x.float(), mean, variance, training=True, momentum=1.0)
        else:
            mean = x.flatten().float()
        self.count += count
        self._sum = self._sum.to(x.device) + count * mean.double()
        squares = (count - 1) * variance.double() + count * mean.double().square()
        self._squares = self._squares.to(x.device) + squares

    @property
    def mean(self) -> Tensor:
        """The means."""
        return self._sum / self.count

    @property
    def variance(self) -> Tensor:
        """The variances."""
        return (self._squares / self.count - self.mean.square()).clamp_min(0)


def norms_with_statistics(model: nn.Module) -> dict[str, BatchNorm]:
    """The BatchNorms of a model that normalise by stored statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def renormalise(
    student: nn.Module, teacher: nn.Module, images: Images, fitted: Collection[nn.Module], most: int | None = None
) -> None:
    """Let the BatchNorms of a decomposed model follow its inputs; those that nothing disturbs stay exactly as they are.

    Args:
        student: The decomposed model, in evaluation mode.
        teacher: The dense model that it was, in evaluation mode.
        images: Calibration images; one pass is made over them.
        fitted: BatchNorms of the student that are right already: those behind fitted layers.
        most: Images that suffice; by default all are looked at.
    """
    originals = norms_with_statistics(teacher)
    norms = {name: norm for name, norm in norms_with_statistics(student).items() if norm not in fitted}
    if not norms:
        return
    device, layout = next(teacher.parameters()).device, fast_layout(teacher, images)
    exact = {name: InputStatistics() for name in norms}
    found = {name: InputStatistics() for name in norms}
    # each batch goes by what the ones before it have set
    for batch in batches(images, device, layout, pixels=_PIXELS, most=most):
        with observed({originals[name]: statistics for name, statistics in exact.items()}):
            teacher(batch)
        followers = [(norms[name], originals[name], exact[name], found[name]) for name in norms]
        with following(followers, low_rank_layers(student).values()):
            student(batch)
    give_back_memory()


@contextmanager
def observed(statistics: Mapping[BatchNorm, InputStatistics]) -> Iterator[None]:
    """Count what goes into some BatchNorms."""

    def count(into: InputStatistics, module: nn.Module, args: tuple[Any, ...]) -> None:
        into.add(args[0])

    hooks = [norm.register_forward_pre_hook(partial(count, into)) for norm, into in statistics.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def following(
    norms: Sequence[tuple[BatchNorm, BatchNorm, InputStatistics, InputStatistics]], changed: Iterable[nn.Module]
) -> Iterator[None]:
    """Set some BatchNorms anew just before each is used, so that the next one sees what that one makes of its input.

    For one forward pass.

    Args:
        norms: Of each the one to set, the one that it was, what went into that on the same images, and where to count
            what goes into this one.
        changed: The changed layers; before the first of them is used, nothing is disturbed.
    """
    disturbed = False

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal disturbed
        disturbed = True

    def follow(
        original: BatchNorm, exact: InputStatistics, found: InputStatistics, module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        if disturbed and exact.count:
            found.add(args[0])
            _set_statistics(cast(BatchNorm, module), original, exact, found)

    hooks = [
        norm.register_forward_pre_hook(partial(follow, original, exact, found))
        for norm, original, exact, found in norms
    ]
    hooks += [layer.register_forward_hook(disturb) for layer in changed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _set_statistics(norm: BatchNorm, original: BatchNorm, exact: InputStatistics, found: InputStatistics) -> None:
    """Scale and move the original's statistics, which are of more images than these, as the input's have moved."""
    mean, variance = cast(Tensor, original.running_mean), cast(Tensor, original.running_var)
    ratio = (found.variance + norm.eps) / (exact.variance + norm.eps)
    ratio = ratio.clamp(1 / _MOST_CHANGE, _MOST_CHANGE)
    scale = ratio.sqrt()
    cast(Tensor, norm.running_mean).copy_(scale * mean + (found.mean - scale * exact.mean))
    cast(Tensor, norm.running_var).copy_(ratio * variance)
