"""What calibration images tell of a layer: second moments of its input patches, streamed batch by batch.

Memory is one ``(I kh kw)^2`` matrix for each layer under way, however many images there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .dense import padder
from .errors import ArpHubError
from .layers import layer_shape
from .shapes import LayerShape

Images = Tensor | Iterable[Any]
"""Calibration images: one normalised tensor ``(N, C, H, W)``, or batches of them that can be gone through repeatedly
(a list or a DataLoader; of a batch that is a tuple, the first item counts)."""

_BATCH_SIZE, _BATCH_PIXELS = 128, 2**21
"""Images, and their pixels, that bound a batch: maps of more would not stay in a cache, nor in little memory."""
_PATCH_BYTES = 64 * 2**20
"""Unfolded patches are made in chunks of at most this size."""
_IMAGE_WORK, _LEAST_POSITIONS = 2.5e8, 32
"""Multiply-accumulates that bound one image's share of a second moment. Where they do not suffice for all positions of
a large map, a random choice of at least so many stands for them: neighbouring patches tell much the same."""
LARGE = 1024
"""Moments with more columns than this are held in single precision, and so are the fits by them."""


def batches(
    images: Images, device: torch.device | None = None, layout: torch.memory_format = torch.contiguous_format
) -> Iterator[Tensor]:
    """Go through calibration images in batches.

    Args:
        images: The images.
        device: Where to put them; by default they stay where they are.
        layout: Memory layout to put them in, as `fast_layout` finds it.

    Raises:
        ArpHubError: If they are not images, or there are none.
    """
    if not isinstance(images, Tensor) and isinstance(images, Iterator):
        raise ArpHubError(
            "calibration must be a tensor or something that can be gone through repeatedly (a list, a DataLoader), "
            f"got a one-pass {type(images).__name__}: wrap it in list(...)"
        )
    count = 0
    for item in _split(images) if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            found = f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ArpHubError(f"calibration images must be normalised float tensors (N, C, H, W), got {found}")
        count += len(batch)
        yield batch if device is None else batch.to(device, memory_format=layout)
    if not count:
        raise ArpHubError("there are no calibration images: pass at least one batch")


def _split(images: Tensor) -> Iterable[Tensor]:
    pixels = max(1, math.prod(images.shape[2:]))
    return images.split(max(1, min(_BATCH_SIZE, _BATCH_PIXELS // pixels)))


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


def patches(
    x: Tensor, shape: LayerShape, pad: Callable[[Tensor], Tensor] | None = None, positions: Tensor | None = None
) -> Tensor:
    """The input patches that a layer multiplies, ``(N, G, I * kh * kw, positions)``.

    Args:
        x: The layer's input.
        shape: The layer.
        pad: What it does to its input first.
        positions: Indices of output positions, row by row; by default all.
    """
    if shape.kind == "linear":
        columns = x.reshape(x.shape[0], 1, -1, x.shape[-1]).mT
        return columns if positions is None else columns[..., positions]
    if pad is not None:
        x = pad(x)
    if shape.taps == 1 and shape.stride == (1, 1) and shape.padding == (0, 0):
        columns = x.flatten(2) if positions is None else x.flatten(2)[..., positions]
    elif positions is None:
        columns = F.unfold(x, shape.kernel_size, shape.dilation, shape.padding, shape.stride)
    else:
        columns = _some_patches(x, shape, positions)
    return columns.unflatten(1, (shape.groups, -1))


def _some_patches(x: Tensor, shape: LayerShape, positions: Tensor) -> Tensor:
    """What ``unfold`` gives at some positions, ``(N, C * kh * kw, positions)``, with no unfolding of the rest."""
    (top, left), (down, right), (dy, dx) = shape.padding, shape.stride, shape.dilation
    width_out = shape.as_conv().output_size((x.shape[-2], x.shape[-1]))[1]
    x = F.pad(x, (left, left, top, top))
    rows, columns = positions // width_out * down, positions % width_out * right
    y = rows + dy * torch.arange(shape.kernel_size[0], device=x.device)[:, None, None]
    z = columns + dx * torch.arange(shape.kernel_size[1], device=x.device)[None, :, None]
    places = (y * x.shape[-1] + z).flatten()
    return x.flatten(2).index_select(2, places).view(len(x), -1, len(positions))


class Moments:
    """Streamed second moments of one layer's patches ``x``, and with the outputs ``y`` that it should give.

    Images are counted in small parts, so that the sampling error of the moments can be told from the differences of the
    parts. Per group of the dense layer, with ``D = I * kh * kw``.

    Args:
        shape: The layer.
        device: Where the moments are held.
        paired: Count outputs too. Without them the outputs are those of the layer itself.
    """

    def __init__(self, shape: LayerShape, device: torch.device, paired: bool = True) -> None:
        columns = shape.group_in * shape.taps
        zeros = partial(torch.zeros, dtype=torch.float32 if columns > LARGE else torch.float64, device=device)
        self.shape = shape
        self.xx = zeros(shape.groups, columns, columns)
        """Second moment of the patches; only the upper triangle is counted."""
        self.yx = zeros(shape.groups, shape.group_out, columns) if paired else None
        self.x = zeros(shape.groups, columns).double()
        self.y = zeros(shape.groups, shape.group_out).double()
        self.count = self.count_squares = 0
        self.squares = self.x.new_zeros(shape.groups)
        self._generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, pad: Callable[[Tensor], Tensor] | None = None) -> None:
        """Count the input ``x`` of the layer, as it comes, and its wished-for output ``y`` (without bias)."""
        shape = self.shape
        y = y.reshape(y.shape[0], 1, -1, y.shape[-1]).mT if shape.kind == "linear" else y.flatten(2)
        y = y.reshape(y.shape[0], shape.groups, shape.group_out, -1)
        length, columns = y.shape[-1], shape.group_in * shape.taps
        most = max(_LEAST_POSITIONS, int(_IMAGE_WORK / (shape.groups * columns**2)))
        per_image = min(length, most) * shape.in_channels * shape.taps * x.element_size()
        step = max(1, min(_PATCH_BYTES // per_image, len(x) // _PARTS))
        for x_part, y_part in zip(x.split(step), y.split(step), strict=True):
            positions = None
            if length > most:
                positions = torch.randperm(length, generator=self._generator)[:most].to(x.device)
                y_part = y_part[..., positions]
            self._add(patches(x_part, shape, pad, positions), y_part)

    def _add(self, columns: Tensor, y: Tensor) -> None:
        """Add patches ``(n, G, D, L)`` and outputs ``(n, G, O, L)`` of one part."""
        columns = columns.permute(1, 2, 0, 3).flatten(2)
        y = y.permute(1, 2, 0, 3).flatten(2)
        for rows in torch.arange(columns.shape[1]).split(max(LARGE, -(-columns.shape[1] // 4))):
            here, rest = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(rows[0]), None)
            part = columns[:, here] @ columns[:, rest].mT
            self.xx[:, here, rest] += part
            self.squares += 2 * part.square().sum((1, 2)) - part[..., : len(rows)].square().sum((1, 2))
        if self.yx is not None:
            self.yx += y @ columns.mT
        self.x += columns.sum(-1)
        self.y += y.sum(-1)
        self.count += columns.shape[-1]
        self.count_squares += columns.shape[-1] ** 2

    def regression(self, weight: Tensor, centred: bool = False) -> Regression:
        """The least-squares problem that these moments pose, shrunk towards ``weight`` where the images are few.

        Args:
            weight: The dense weight ``(G * O, I, kh, kw)``; its precision is that of the problem.
            centred: Take the means out, as is right where the layer's bias can follow them.
        """
        shape, count = self.shape, max(self.count, 1)
        xx = (self.xx.to(weight) / count).triu_()
        xx += xx.triu(1).mT
        x, y = (self.x / count).to(weight), (self.y / count).to(weight)
        variance = self._variance(xx)
        if centred:
            xx -= x[:, :, None] * x[:, None, :]
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        share = self._shrinkage(xx, scale, variance)
        moment = xx.mul_(1 - share)
        moment.diagonal(dim1=-2, dim2=-1).add_((share * scale)[..., 0])
        if self.yx is None:  # the outputs are the layer's own, so that its weight solves the problem
            return Regression(weight, moment, x, y)
        yx = self.yx.to(weight) / count
        if centred:
            yx -= y[:, :, None] * x[:, None, :]
        rows = weight.reshape(shape.groups, shape.group_out, -1)
        cross = (1 - share) * yx + share * scale * rows
        target = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(moment)).mT
        return Regression(target.reshape(weight.shape), moment, x, y)

    def _variance(self, xx: Tensor) -> Tensor:
        """Expected squared error of the moment ``xx`` as an estimate, from the scatter of the parts, ``(G,)``.

        It is right for correlated patches too, because the parts are of different images.
        """
        spread = self.count**2 - self.count_squares
        if spread <= 0:  # one part alone tells nothing
            return torch.full_like(self.squares, torch.inf)
        energy = xx.square().sum((-2, -1), dtype=torch.float64)
        return (self.squares - self.count_squares * energy).clamp_min(0) / spread

    @staticmethod
    def _shrinkage(xx: Tensor, scale: Tensor, variance: Tensor) -> Tensor:
        """Weight of the scaled identity that minimises the moment's expected squared error (Ledoit and Wolf 2004)."""
        side = xx.shape[-1]
        distance = xx.square().sum((-2, -1), dtype=torch.float64) - side * scale[:, 0, 0].double().square()
        share = variance / distance.clamp_min(torch.finfo(xx.dtype).tiny)
        least = _MIN_SHRINKAGE if side <= LARGE else max(_MIN_SHRINKAGE, side * _ROUNDING)
        return share.clamp(least, 1.0).to(xx)[:, None, None]


_PARTS = 8
"""Parts that a batch of images is counted in, at least, if it has as many."""
_MIN_SHRINKAGE = 1e-4
"""Least weight of the identity, which keeps every moment well conditioned."""
_ROUNDING = 2.0**-22
"""Times the columns: the same, where single precision has rounded the moment."""


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
) -> dict[str, Moments]:
    """Moments of the student's inputs to some layers against the teacher's outputs of them, in one pass.

    Raises:
        ArpHubError: If a model never calls one of its layers.
    """
    device, layout = next(teacher.parameters()).device, fast_layout(teacher, images)
    found = {name: Moments(layer_shape(layer), device) for name, layer in teacher_layers.items()}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        inputs[name] = x.clone()

    def count(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        found[name].update(inputs.pop(name, x), _without_bias(layer, y), padder(layer))

    for batch in batches(images, device, layout):
        if student is not teacher:
            _visit(student, student_layers, batch, keep)
        _visit(teacher, teacher_layers, batch, count)
    return found


@torch.no_grad()
def all_moments(model: nn.Module, layers: Mapping[str, nn.Module], images: Images) -> dict[str, Moments]:
    """Moments of many layers of one model in a single pass over the images, layers never called left out."""
    device, layout = next(model.parameters()).device, fast_layout(model, images)
    found: dict[str, Moments] = {}

    def catch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        moments = found.setdefault(name, Moments(layer_shape(module), device, paired=False))
        moments.update(args[0], _without_bias(module, output), padder(module))

    hooks = [layer.register_forward_hook(partial(catch, name)) for name, layer in layers.items()]
    try:
        for batch in batches(images, device, layout):
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
