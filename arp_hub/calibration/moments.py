"""Second moments of a layer's input patches, streamed batch by batch.

With ``x`` a patch ``(D,)`` of one group of the dense layer, ``D = I kh kw``, and ``y`` the wished-for output ``(O,)``::

    C  = mean of (x - m)(x - m)^T     (G, D, D), with m = 0 where no bias can follow a change of mean
    T  = (cov(y, x) C^-1 + W) / 2     (G, O, D), halfway between the best weight for these outputs and the dense one

``T`` minimises ``||y - T x||^2 + ||W x - T x||^2``. The first term makes up for the errors of earlier layers, but it
shrinks the outputs, as every regression on disturbed inputs does. The second term limits that.

Few images give a noisy ``C``. It is shrunk towards a multiple of the identity ``v I`` with ``v = trace(C) / D``::

    C  <-  (1 - a) C + a v I,    a = E||C - E C||^2 / ||C - v I||^2     (Ledoit and Wolf 2004)

The numerator is estimated from the scatter of parts, each of whole images: patches of one image are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..processes import Processes
from ..schemes.shapes import LayerShape, Pair
from .regression import Regression
from .symmetric_sum import SymmetricSum

SAMPLES = 16
"""Patches for each column of a moment, over all images: more patches do not improve the fit."""
LEAST_POSITIONS = 16
"""Patches of each image at least. With 32, planning and fitting ResNet-20 on 1,024 images takes 10 % longer, with
all patches 90 % more; accuracy is the same within the scatter of seeds (docs/research/experiments.md)."""


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
    """The columns of ``unfold`` at some positions, ``(N, C * kh * kw, positions)``, without unfolding the others."""
    (top, left), (down, right), (dy, dx) = shape.padding, shape.stride, shape.dilation
    width_out = shape.as_conv().output_size((x.shape[-2], x.shape[-1]))[1]
    x = F.pad(x, (left, left, top, top))
    rows, columns = positions // width_out * down, positions % width_out * right
    y = rows + dy * torch.arange(shape.kernel_size[0], device=x.device)[:, None, None]
    z = columns + dx * torch.arange(shape.kernel_size[1], device=x.device)[None, :, None]
    places = (y * x.shape[-1] + z).flatten()
    return x.flatten(2).index_select(2, places).view(len(x), -1, len(positions))


def images_needed(shape: LayerShape, size: Pair) -> int:
    """The number of images whose patches suffice for a layer's second moment, by the size of its input map."""
    sides = (size[0],) if shape.kind == "linear" else shape.as_conv().output_size(size)
    return math.ceil(SAMPLES * shape.group_in * shape.taps / math.prod(sides))


def images_of_a_part(images: int, number: int) -> int:
    """Images of one part of a batch, which has about eight. Batch 0, which may be the only one, has two at least."""
    return max(1, images // 8 if number else min(images // 2, max(1, images // 8)))


def shared_batches(found: Iterable[Tensor], processes: Processes) -> Iterator[tuple[int, Tensor, bool]]:
    """The batches that one process counts moments of, each with its number and whether it is counted.

    Every process sees the first part of batch 0 before all others, alone and not counted. Its mean is the shift of the
    data, so the shift is the same in all processes to the last digit.
    """
    for number, batch in enumerate(found):
        if number == 0:
            yield number, batch[: images_of_a_part(len(batch), number)], False
        if number % processes.count == processes.index:
            yield number, batch, True


class Moments:
    """Streamed second moments of one layer's patches ``x``, with the wished-for outputs ``y``.

    Args:
        shape: The layer.
        device: Where the moments are held.
        positions_macs: Multiply-accumulates that one image may add. If they do not suffice for all positions of a large
            map, a random choice of positions stands for them.
        centred: Whether means are taken out, because the layer's bias can follow a change of mean. The data are then
            shifted by the mean of the first batch, so that the scatter of the parts is that of centred moments.
        paired: Whether outputs are counted too. Without them they are the outputs of the layer itself.
        images: Number of images that will be counted, over all processes, if it is known: of many images, fewer
            positions suffice.
    """

    def __init__(
        self,
        shape: LayerShape,
        device: torch.device,
        positions_macs: float,
        centred: bool = False,
        paired: bool = True,
        images: int | None = None,
    ) -> None:
        self.shape, self.centred = shape, centred
        self.columns = shape.group_in * shape.taps
        square = shape.groups * self.columns**2
        enough = math.inf if images is None else SAMPLES * self.columns / images
        self._positions = max(LEAST_POSITIONS, int(min(positions_macs / square, enough)))
        self._xx = SymmetricSum(shape.groups, self.columns, device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._yx = zeros(shape.groups, shape.group_out, self.columns) if paired else None
        self._x, self._y = zeros(shape.groups, self.columns), zeros(shape.groups, shape.group_out)
        self._squares = zeros(shape.groups)
        self._count = self._count_squares = 0
        self._shift: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        y: Tensor,
        pad: Callable[[Tensor], Tensor] | None = None,
        images: int = 0,
        number: int = 0,
        counted: bool = True,
    ) -> None:
        """Count one batch.

        Args:
            x: The layer's input, before its padding.
            y: The wished-for output without bias.
            pad: How the layer pads its input.
            images: Images in the batch; by default the length of ``x``. Attention in windows splits each image into
                several entries of ``x``, which follow each other.
            number: Number of the batch, which decides the positions that are used.
            counted: False for images by whose mean the data are shifted, and which are not counted.
        """
        shape = self.shape
        x, y = (part.float() if part.dtype in (torch.float16, torch.bfloat16) else part for part in (x, y))
        y = y.reshape(y.shape[0], 1, -1, y.shape[-1]).mT if shape.kind == "linear" else y.flatten(2)
        y = y.reshape(y.shape[0], shape.groups, shape.group_out, -1)
        length = y.shape[-1]
        entries = len(x) // images if images and len(x) % images == 0 else 1
        step = entries * images_of_a_part(len(x) // entries, number) if counted else len(x)
        generator, parts = torch.Generator().manual_seed(number), []
        for x_part, y_part in zip(x.split(step), y.split(step), strict=True):
            positions = None
            if length > self._positions:
                positions = torch.randperm(length, generator=generator)[: self._positions].to(x.device)
                y_part = y_part[..., positions]
            columns = patches(x_part, shape, pad, positions).permute(1, 2, 0, 3).flatten(2)
            if self.centred and self._shift is None:
                self._shift = columns.mean(-1, keepdim=True)
            if counted:
                shifted = columns if self._shift is None else columns - self._shift
                parts.append((shifted, y_part.permute(1, 2, 0, 3).flatten(2)))
                if shifted.shape[-1] >= self.columns:
                    self._add(parts)
                    parts.clear()
        if parts:
            self._add(parts)

    def add_up(self, processes: Processes) -> None:
        """Sum over processes, each of which has counted its share of the batches."""
        counts = torch.tensor([self._count, self._count_squares], dtype=torch.float64, device=self._x.device)
        sums = (self._x, self._y, self._squares, counts, *(() if self._yx is None else (self._yx,)))
        processes.add((*self._xx.blocks, *sums))
        self._count, self._count_squares = (int(count) for count in counts)

    def _add(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add parts, each of patches ``(G, D, n)`` and outputs ``(G, O, n)``, by one product of all of them.

        For ``n < D`` writing ``D x D`` sums takes longer than computing them, so parts are not summed one by one.
        """
        columns, y = (torch.cat(tensors, -1) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
        squares = self._xx.add(columns, norm=len(parts) == 1)
        if squares is not None:
            self._squares += squares
        else:
            for part, _ in parts:  # X X^T and X^T X have one norm
                self._squares += (part.mT @ part).square().sum((1, 2))
        if self._yx is not None:
            self._yx += y @ columns.mT
        self._x += columns.sum(-1)
        self._y += y.sum(-1)
        self._count += columns.shape[-1]
        self._count_squares += sum(part.shape[-1] ** 2 for part, _ in parts)

    def to(self, device: torch.device) -> None:
        """Move the sums to a device."""
        self._xx.to(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    @property
    def count(self) -> int:
        """Patches so far."""
        return self._count

    def moment(self, dtype: torch.dtype) -> Tensor:
        """The shrunk second moment ``(G, D, D)``, positive definite."""
        return self._shrunk(self._xx.matrix(dtype))[0]

    def regression(self, weight: Tensor) -> Regression:
        """The least-squares problem that these moments pose, shrunk towards ``weight`` if the images are few.

        Args:
            weight: The dense weight ``(G * O, I, kh, kw)``; its precision is that of the problem.
        """
        count = max(self._count, 1)
        x, y = (self._x / count).to(weight), (self._y / count).to(weight)
        moment, ridge, share = self._shrunk(self._xx.matrix(weight.dtype))
        x_mean = x if self._shift is None else x + self._shift[..., 0].to(x)
        if self._yx is None:  # the outputs are the layer's own, so its weight solves the problem
            return Regression(weight, moment, x_mean, y)
        yx = self._yx.to(weight) / count
        if self.centred:
            yx = yx - y[:, :, None] * x[:, None, :]
        factor, info = torch.linalg.cholesky_ex(moment)
        if info.any():  # inputs that hardly vary: the rounding errors of single precision exceed their variance
            more = 2 * torch.linalg.eigvalsh(moment)[:, :1].abs().clamp_min(torch.finfo(torch.float32).tiny)
            moment.diagonal(dim1=-2, dim2=-1).add_(more)
            factor, ridge = torch.linalg.cholesky(moment), ridge + more[..., None]
        rows = weight.reshape(self.shape.groups, self.shape.group_out, -1)
        cross = (1 - share) * yx + ridge * rows
        target = torch.cholesky_solve(cross.mT, factor).mT
        return Regression((target.reshape(weight.shape) + weight) / 2, moment, x_mean, y)

    def _shrunk(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn the sum over patches into the shrunk moment, in place; with the ridge, and the identity's share."""
        count = max(self._count, 1)
        moment, x = total.div_(count), (self._x / count).to(total)
        variance = self._variance(moment)
        level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        if self._shift is not None:
            level = level + self._shift.square().mean((1, 2)).to(level)
        if self.centred:
            moment.addcmul_(x[:, :, None], x[:, None, :], value=-1)
        # inputs that are zero, or vary by no more than the rounding of single precision, leave the weight to decide
        single = torch.finfo(torch.float32)
        tiny = (single.eps * level).clamp_min(max(torch.finfo(moment.dtype).tiny ** 0.5, single.tiny))
        scale = torch.maximum(moment.diagonal(dim1=-2, dim2=-1).mean(-1), tiny)[:, None, None]
        share = self._shrinkage(moment, scale, variance)
        moment.mul_(1 - share).diagonal(dim1=-2, dim2=-1).add_((share * scale)[..., 0])
        return moment, share * scale, share

    def _variance(self, moment: Tensor) -> Tensor:
        """Expected squared error of the moment as an estimate, from the scatter of the parts, ``(G,)``."""
        spread = self._count**2 - self._count_squares
        if spread <= 0:  # a single part says nothing about the scatter
            return torch.full_like(self._squares, torch.inf)
        return (self._squares - self._count_squares * _energy(moment)).clamp_min(0) / spread

    @staticmethod
    def _shrinkage(moment: Tensor, scale: Tensor, variance: Tensor) -> Tensor:
        """Share of the scaled identity that minimises the moment's expected squared error, ``(G, 1, 1)``."""
        side = moment.shape[-1]
        distance = _energy(moment) - side * scale[:, 0, 0].double().square()
        share = variance / distance.clamp_min(torch.finfo(moment.dtype).tiny)
        rounding = side * torch.finfo(torch.float32).eps if moment.dtype == torch.float32 else 0.0
        return share.clamp(max(1e-4, rounding), 1.0).to(moment)[:, None, None]  # at least 1e-4: well conditioned


def _energy(moment: Tensor) -> Tensor:
    """Squared norm of every matrix: norms of rows in its own precision, their sum in double."""
    return torch.linalg.vector_norm(moment, dim=-1).square().sum(-1, dtype=torch.float64)
