"""What calibration images tell of a layer: second moments of its input patches, streamed batch by batch.

Memory is a few ``(I kh kw)^2`` matrices for the layers under way, however many images there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .errors import ArpHubError
from .layers import layer_shape, padder
from .shapes import LayerShape

Images = Tensor | Iterable[Any]
"""Calibration images: one normalised tensor ``(N, C, H, W)``, or batches of them that can be gone through repeatedly
(a list or a DataLoader; of a batch that is a tuple, the first item counts)."""

BATCH_SIZE = 128
_PATCH_BYTES = 64 * 2**20
"""Unfolded patches are made in chunks of at most this size."""


def batches(images: Images, device: torch.device | None = None) -> Iterator[Tensor]:
    """Go through calibration images in batches.

    Raises:
        ArpHubError: If they are not images, or there are none.
    """
    if not isinstance(images, Tensor) and isinstance(images, Iterator):
        raise ArpHubError(
            "calibration must be a tensor or something that can be gone through repeatedly (a list, a DataLoader), "
            f"got a one-pass {type(images).__name__}: wrap it in list(...)"
        )
    count = 0
    for item in images.split(BATCH_SIZE) if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            found = f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ArpHubError(f"calibration images must be normalised float tensors (N, C, H, W), got {found}")
        count += len(batch)
        yield batch if device is None else batch.to(device)
    if not count:
        raise ArpHubError("there are no calibration images: pass at least one batch")


def patches(x: Tensor, shape: LayerShape, pad: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The input patches that a layer multiplies, ``(N, G, I * kh * kw, positions)``."""
    if shape.kind == "linear":
        return x.reshape(x.shape[0], 1, -1, x.shape[-1]).mT
    if pad is not None:
        x = pad(x)
    if shape.taps == 1 and shape.stride == (1, 1) and shape.padding == (0, 0):
        columns = x.flatten(2)
    else:
        columns = F.unfold(x, shape.kernel_size, shape.dilation, shape.padding, shape.stride)
    return columns.unflatten(1, (shape.groups, -1))


class Moments:
    """Streamed second moments of one layer's patches ``x``, and with the outputs ``y`` that it should give.

    Images are counted in two halves, alternately, so that the sampling error of the moments can be told from the
    difference of the halves. Per group of the dense layer, with ``D = I * kh * kw``.
    """

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        columns = shape.group_in * shape.taps
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.shape = shape
        self.xx = zeros(2, shape.groups, columns, columns)
        self.yx = zeros(2, shape.groups, shape.group_out, columns)
        self.x = zeros(2, shape.groups, columns)
        self.y = zeros(2, shape.groups, shape.group_out)
        self.count = zeros(2)
        self._images = 0

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, pad: Callable[[Tensor], Tensor] | None = None) -> None:
        """Count the input ``x`` of the layer, as it comes, and its wished-for output ``y`` (without bias)."""
        shape = self.shape
        y = y.reshape(y.shape[0], 1, -1, y.shape[-1]).mT if shape.kind == "linear" else y.flatten(2)
        y = y.reshape(y.shape[0], shape.groups, shape.group_out, -1)
        per_image = y.shape[-1] * shape.in_channels * shape.taps * x.element_size()
        step = max(2, _PATCH_BYTES // per_image // 2 * 2)
        for x_part, y_part in zip(x.split(step), y.split(step), strict=True):
            columns = patches(x_part, shape, pad)
            for half in (0, 1):
                self._add(half, columns[(half + self._images) % 2 :: 2], y_part[(half + self._images) % 2 :: 2])
            self._images += len(x_part)

    def _add(self, half: int, columns: Tensor, y: Tensor) -> None:
        """Add patches ``(n, G, D, L)`` and outputs ``(n, G, O, L)`` to one half."""
        if not len(columns):
            return
        columns = columns.permute(1, 2, 0, 3).flatten(2)
        y = y.permute(1, 2, 0, 3).flatten(2)
        self.xx[half] += columns @ columns.mT
        self.yx[half] += y @ columns.mT
        self.x[half] += columns.sum(-1)
        self.y[half] += y.sum(-1)
        self.count[half] += columns.shape[-1]

    def regression(self, weight: Tensor, centred: bool = False) -> Regression:
        """The least-squares problem that these moments pose, shrunk towards ``weight`` where the images are few.

        Args:
            weight: The dense weight ``(G * O, I, kh, kw)``.
            centred: Take the means out, as is right where the layer's bias can follow them.
        """
        shape, count = self.shape, self.count.sum().clamp_min(1)
        xx, yx = self.xx.sum(0) / count, self.yx.sum(0) / count
        x, y = self.x.sum(0) / count, self.y.sum(0) / count
        if centred:
            xx = xx - x[:, :, None] * x[:, None, :]
            yx = yx - y[:, :, None] * x[:, None, :]
        identity = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        share = self._shrinkage(xx, scale * identity)
        moment = (1 - share) * xx + share * scale * identity
        rows = weight.to(xx).reshape(shape.groups, shape.group_out, -1)
        cross = (1 - share) * yx + share * scale * rows
        target = torch.linalg.solve(moment, cross.mT).mT
        return Regression(target.reshape(weight.shape), moment, x, y)

    def _shrinkage(self, xx: Tensor, goal: Tensor) -> Tensor:
        """Weight of ``goal`` that minimises the expected squared error of the moment (Ledoit and Wolf 2004).

        The sampling variance comes from the difference of the two halves, which is right for correlated patches too.
        """
        first, second = (self.xx[h] / self.count[h].clamp_min(1) for h in (0, 1))
        variance = (first - second).square().sum((-2, -1)) / 4
        share = variance / (xx - goal).square().sum((-2, -1)).clamp_min(torch.finfo(xx.dtype).tiny)
        return share.clamp(_MIN_SHRINKAGE, 1.0)[:, None, None]


_MIN_SHRINKAGE = 1e-4
"""Least weight of the identity, which keeps every moment well conditioned."""


@dataclass(frozen=True)
class Regression:
    """Find ``W`` near ``target`` in the metric of ``moment``; ``x_mean`` and ``y_mean`` then give the bias."""

    target: Tensor
    moment: Tensor
    x_mean: Tensor
    y_mean: Tensor

    def bias(self, weight: Tensor) -> Tensor:
        """The bias that makes the mean output right for ``weight``, ``(G * O,)``."""
        rows = weight.to(self.x_mean).reshape(*self.y_mean.shape, -1)
        return (self.y_mean - (rows @ self.x_mean[..., None])[..., 0]).flatten()


class _Halt(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Raised by a hook once a forward pass has given what it was run for."""


@torch.no_grad()
def _caught(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the first call of each layer, in a forward pass that ends when all are seen."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        caught.setdefault(name, (args[0].clone(), output.clone()))  # what follows may work in place
        if len(caught) == len(layers):
            raise _Halt

    hooks = [layer.register_forward_hook(partial(catch, name)) for name, layer in layers.items()]
    try:
        model(images)
    except _Halt:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if missing := layers.keys() - caught.keys():
        raise ArpHubError(f"the model never calls the planned layer '{min(missing)}': take it out of the plan")
    return caught


def paired_moments(
    student: nn.Module,
    student_layers: Mapping[str, nn.Module],
    teacher: nn.Module,
    teacher_layers: Mapping[str, nn.Module],
    images: Images,
) -> dict[str, Moments]:
    """Moments of the student's inputs to some layers against the teacher's outputs of them, in one pass.

    Raises:
        ArpHubError: If a model never calls one of its layers.
    """
    device = next(teacher.parameters()).device
    found = {name: Moments(layer_shape(layer), device) for name, layer in teacher_layers.items()}
    for batch in batches(images, device):
        inputs = _caught(student, student_layers, batch)
        outputs = _caught(teacher, teacher_layers, batch)
        for name, layer in teacher_layers.items():
            found[name].update(inputs[name][0], _without_bias(layer, outputs[name][1]), padder(layer))
    return found


@torch.no_grad()
def all_moments(model: nn.Module, layers: Mapping[str, nn.Module], images: Images) -> dict[str, Moments]:
    """Moments of many layers of one model in a single pass over the images, layers never called left out."""
    device = next(model.parameters()).device
    found: dict[str, Moments] = {}

    def catch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        moments = found.setdefault(name, Moments(layer_shape(module), device))
        moments.update(args[0], _without_bias(module, output), padder(module))

    hooks = [layer.register_forward_hook(partial(catch, name)) for name, layer in layers.items()]
    try:
        for batch in batches(images, device):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
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
