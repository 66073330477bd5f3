"""BatchNorms around decomposed layers: which one reads a layer alone, and how the others follow a disturbed input.

Approximation errors shrink activations layer by layer. A fitted layer makes up for it; a dense layer is left to the
BatchNorm behind it, whose statistics are those of another input. With ``m, v`` the mean and variance of a channel of
that input on calibration images, ``*`` for the dense model, and ``M, V`` the stored statistics::

    r = (v + eps) / (v* + eps),    V  <-  r V,    M  <-  sqrt(r) (M - m*) + m

Stored statistics come from far more images than the calibration set, so they are corrected rather than replaced. No
gradients are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from ..layers.model import low_rank_layers
from ..processes import ALONE, Processes
from .images import Images, Place, batches

STATISTICS_PIXELS = 2**20
"""Pixels of a batch that BatchNorm statistics are taken of, 20 images of 224 x 224. Batches of 3 images cost 2 points
on lite0, and larger batches only take memory (docs/research/experiments.md)."""


class _Readers(TorchDispatchMode):
    """Counts the operations that read some tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}  # the tensors are kept, so that no other one gets their id
        self.reads: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads.update(id(leaf) for leaf in tree_leaves((args, kwargs or {})) if id(leaf) in self.watched)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def following_norms(model: nn.Module, layers: Mapping[str, nn.Module], images: Images) -> dict[str, BatchNorm]:
    """The BatchNorm that reads each layer's output, for the layers whose output nothing else reads.

    Its mean can take up a change of the layer's mean output. If the output had another reader, that one would get it
    without the correction: another operation, or a user's hook, as in timm's models of feature maps. A layer that is
    called several times has no such BatchNorm.
    """
    image = next(batches(images, Place.of(model, images)))[:1]
    candidates: dict[str, BatchNorm] = {}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    readers = _Readers()

    def remember(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs[name].append(output)
        readers.watched[id(output)] = output

    calls: Counter[nn.Module] = Counter()

    def recognise(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        for name, found in outputs.items():
            if not found or not args or args[0] is not found[-1]:
                continue
            if found[-1].dim() == 2 or not hasattr(layers[name], "in_features"):  # else it normalises tokens
                candidates[name] = cast(BatchNorm, module)

    def show(module: nn.Module, *seen: Any) -> None:
        shown.extend(tree_leaves(seen))

    shown: list[Any] = []  # what hooks of users see
    modules = list(model.modules())
    after = [module for module in modules if module._forward_hooks]
    before = [module for module in modules if module._forward_pre_hooks]
    hooks = [layer.register_forward_hook(partial(remember, name)) for name, layer in layers.items()]
    hooks += [module.register_forward_hook(show) for module in after]
    hooks += [module.register_forward_pre_hook(show) for module in before]
    hooks += [
        module.register_forward_pre_hook(recognise)
        for module in modules
        if _has_statistics(module) and getattr(module, "affine", True)
    ]
    try:
        with readers:
            returned = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    readers.reads.update(id(leaf) for leaf in tree_leaves((returned, shown)) if id(leaf) in readers.watched)
    return {
        name: norm
        for name, norm in candidates.items()
        if calls[norm] == len(outputs[name]) == 1 and readers.reads[id(outputs[name][0])] == 1
    }


class InputStatistics:
    """Mean and biased variance of each channel ``(C,)`` of all inputs of one BatchNorm so far, in double precision.

    Attributes:
        count: Values of each channel so far.
        processes: The processes that each count a part of the next input; all get the statistics of the whole.
    """

    def __init__(self) -> None:
        self.count = 0
        self.processes = ALONE
        self._sum = self._squares = torch.zeros(1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count an input ``(N, C, ..)``."""
        count = x.numel() // x.shape[1]
        mean, variance = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
        if count > 1:  # the kernel of BatchNorm is ten times as fast as var_mean on maps in channels last
            F.batch_norm(x.float(), mean, variance, training=True, momentum=1.0)
        else:
            mean = x.flatten().float()
        squares = (count - 1) * variance.double() + count * mean.double().square()
        sums = torch.stack([count * mean.double(), squares, torch.full_like(squares, count)])
        self.processes.add([sums])
        self._sum = self._sum.to(x.device) + sums[0]
        self._squares = self._squares.to(x.device) + sums[1]
        self.count += int(sums[2, 0])

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
    return {name: cast(BatchNorm, module) for name, module in model.named_modules() if _has_statistics(module)}


def _has_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with stored statistics. Frozen ones have them as well, with the same names."""
    frozen = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
    return isinstance(module, (BatchNorm, *frozen)) and module.running_mean is not None


@torch.no_grad()
def renormalise(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    fitted: Collection[nn.Module],
    most: int | None = None,
    processes: Processes = ALONE,
) -> None:
    """Correct the BatchNorms of a decomposed model; those before the first decomposed layer stay exactly the same.

    Args:
        student: The decomposed model, in evaluation mode.
        teacher: The dense model, in evaluation mode.
        images: Calibration images; one pass is made over them.
        fitted: BatchNorms of the student that fitted layers have corrected already.
        most: Images to use at most; by default all.
        processes: The processes that share the pass.
    """
    originals = norms_with_statistics(teacher)
    norms = {name: norm for name, norm in norms_with_statistics(student).items() if norm not in fitted}
    if not norms:
        return
    exact = {name: InputStatistics() for name in norms}
    found = {name: InputStatistics() for name in norms}
    # each batch passes BatchNorms that the batches before it have corrected, so processes share each batch
    place = Place.of(teacher, images)
    for batch in processes.together(batches(images, place, pixels=STATISTICS_PIXELS, most=most)):
        sharing = processes if len(batch) >= processes.count else ALONE
        for statistics in (*exact.values(), *found.values()):
            statistics.processes = sharing
        part = batch.tensor_split(sharing.count)[sharing.index]
        with observed({originals[name]: statistics for name, statistics in exact.items()}):
            teacher(part)
        followers = [(norms[name], originals[name], exact[name], found[name]) for name in norms]
        with following(followers, low_rank_layers(student).values()):
            student(part)


@contextmanager
def observed(statistics: Mapping[BatchNorm, InputStatistics]) -> Iterator[None]:
    """Count the inputs of some BatchNorms during the block."""

    def count(into: InputStatistics, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        into.add(_first(args, named))

    hooks = [
        norm.register_forward_pre_hook(partial(count, into), with_kwargs=True) for norm, into in statistics.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def following(
    norms: Sequence[tuple[BatchNorm, BatchNorm, InputStatistics, InputStatistics]], changed: Iterable[nn.Module]
) -> Iterator[None]:
    """During one forward pass, correct each BatchNorm just before it is used, so that the next one sees its output.

    Args:
        norms: For each BatchNorm: the one to correct, its original, the statistics of the original's input on the same
            images, and where to count the input of this one.
        changed: The decomposed layers. Before the first of them is used, inputs are those of the dense model.
    """
    disturbed = False

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal disturbed
        disturbed = True

    def follow(
        original: BatchNorm,
        exact: InputStatistics,
        found: InputStatistics,
        module: nn.Module,
        args: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> None:
        if disturbed and exact.count:
            found.add(_first(args, named))
            _set_statistics(cast(BatchNorm, module), original, exact, found)

    hooks = [
        norm.register_forward_pre_hook(partial(follow, original, exact, found), with_kwargs=True)
        for norm, original, exact, found in norms
    ]
    hooks += [layer.register_forward_hook(disturb) for layer in changed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The input of a BatchNorm, whether it is given by position or by name."""
    return cast(Tensor, next(iter((*args, *named.values()))))


@torch.no_grad()
def _set_statistics(
    norm: BatchNorm, original: BatchNorm, exact: InputStatistics, found: InputStatistics, most: float = 16.0
) -> None:
    """Correct the original's statistics by the change of the input; a variance changes ``most``-fold at most."""
    mean, variance = cast(Tensor, original.running_mean), cast(Tensor, original.running_var)
    ratio = (found.variance + norm.eps) / (exact.variance + norm.eps)
    ratio = ratio.clamp(1 / most, most)
    scale = ratio.sqrt()
    cast(Tensor, norm.running_mean).copy_(scale * mean + (found.mean - scale * exact.mean))
    cast(Tensor, norm.running_var).copy_(ratio * variance)
