"""Second moments of a layer's input patches, streamed batch by batch, and the regression that they pose.

Memory is half a matrix of ``I kh kw`` columns for each large layer under way, or less where patches are taken to be
stationary, however many images there are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schemes.shapes import LayerShape
from .regression import Regression

_PATCH_BYTES = 64 * 2**20
"""Unfolded patches are made in chunks of at most this size."""
_LEAST_POSITIONS = 32
"""Patches of an image that are used in any case."""
_ENOUGH_WORK, SAMPLES = 2.5e7, 16
"""Multiply-accumulates that an image may take in any case, and positions for every column of a moment that suffice, of
all images together."""
LARGE = 1024
"""Moments with more columns than this are held in single precision, and so are the fits by them."""
_PARTS, _LEAST_PART, _SMALL, _LEAST_SMALL_PART = 8, 6, 256, 3
"""Parts that a batch of images is counted in, at least, if it has as many, and the least images of one with a large
moment, to which a part is added at a cost of its own; and of one that has more than so few columns."""
_BLOCKS, _LEAST_ROWS = 8, 256
"""Blocks of rows that the upper triangle of a large moment is held in, and the least rows of one."""
_MIN_SHRINKAGE = 1e-4
"""Least weight of the identity, which keeps every moment well conditioned."""
_ROUNDING = 2.0**-22
"""Times the columns: the same, where single precision has rounded the moment."""


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


class Moments(ABC):
    """Streamed second moments of one layer's patches ``x``, and the means of these and of the outputs ``y``.

    Images are counted in small parts, so that the sampling error of the moments can be told from the differences of the
    parts. Per group of the dense layer, with ``D = I * kh * kw``.

    Args:
        shape: The layer.
        device: Where the moments are held.
    """

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        self.shape = shape
        self.columns = shape.group_in * shape.taps
        self.x = torch.zeros(shape.groups, self.columns, dtype=torch.float64, device=device)
        self.y = torch.zeros(shape.groups, shape.group_out, dtype=torch.float64, device=device)
        self.count = self.count_squares = 0
        self.squares = self.x.new_zeros(shape.groups)

    @abstractmethod
    def update(self, x: Tensor, y: Tensor, pad: Callable[[Tensor], Tensor] | None = None) -> None:
        """Count the input ``x`` of the layer, as it comes, and its wished-for output ``y`` (without bias)."""

    def regression(self, weight: Tensor, centred: bool = False) -> Regression:
        """The least-squares problem that these moments pose, shrunk towards ``weight`` where the images are few.

        Args:
            weight: The dense weight ``(G * O, I, kh, kw)``; its precision is that of the problem.
            centred: Take the means out, as is right where the layer's bias can follow them.
        """
        moment, mean = self._moment(weight)
        variance = self._variance(moment)
        if centred:
            for rows in _row_blocks(self.columns, LARGE):
                moment[:, rows] -= mean[:, rows, None] * mean[:, None, :]
        scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        share = self._shrinkage(moment, scale, variance)
        moment.mul_(1 - share).diagonal(dim1=-2, dim2=-1).add_((share * scale)[..., 0])
        return self._posed(weight, moment, share, scale, centred)

    @abstractmethod
    def _moment(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean second moment ``(G, D, D)`` and the mean ``(G, D)`` that belongs to it, in the precision of one."""

    @abstractmethod
    def _posed(self, weight: Tensor, moment: Tensor, share: Tensor, scale: Tensor, centred: bool) -> Regression:
        """The problem by the shrunk moment, a ``share`` of which is the identity times ``scale``."""

    def _step(self, images: int) -> int:
        """Images of one part of a batch of so many; the first batch, which may be all there is, has two at least."""
        least = _LEAST_PART if self.columns > LARGE else _LEAST_SMALL_PART if self.columns > _SMALL else 1
        return max(1, images // _PARTS, min(images if self.count else images // 2, least))

    def _variance(self, xx: Tensor) -> Tensor:
        """Expected squared error of the moment ``xx`` as an estimate, from the scatter of the parts, ``(G,)``.

        It is right for correlated patches too, because the parts are of different images.
        """
        spread = self.count**2 - self.count_squares
        if spread <= 0:  # one part alone tells nothing
            return torch.full_like(self.squares, torch.inf)
        return (self.squares - self.count_squares * _energy(xx)).clamp_min(0) / spread

    @staticmethod
    def _shrinkage(xx: Tensor, scale: Tensor, variance: Tensor) -> Tensor:
        """Weight of the scaled identity that minimises the moment's expected squared error (Ledoit and Wolf 2004)."""
        side = xx.shape[-1]
        distance = _energy(xx) - side * scale[:, 0, 0].double().square()
        share = variance / distance.clamp_min(torch.finfo(xx.dtype).tiny)
        least = _MIN_SHRINKAGE if side <= LARGE else max(_MIN_SHRINKAGE, side * _ROUNDING)
        return share.clamp(least, 1.0).to(xx)[:, None, None]


class PatchMoments(Moments):
    """Second moments of the patches themselves, at all positions or some.

    Args:
        shape: The layer.
        device: Where the moments are held.
        positions_macs: Multiply-accumulates that one image may add. If they do not suffice for all positions of a large
            map, a random choice of positions stands for them.
        paired: Count outputs too. Without them the outputs are those of the layer itself.
        images: Number of images that will be counted, if it is known: of many images, fewer positions suffice.
    """

    def __init__(
        self,
        shape: LayerShape,
        device: torch.device,
        positions_macs: float,
        paired: bool = True,
        images: int | None = None,
    ) -> None:
        super().__init__(shape, device)
        square = shape.groups * self.columns**2
        affordable = positions_macs / square
        enough = math.inf if images is None else max(_ENOUGH_WORK / square, SAMPLES * self.columns / images)
        self._positions = max(_LEAST_POSITIONS, int(min(affordable, enough)))
        large = self.columns > LARGE
        zeros = partial(torch.zeros, dtype=torch.float32 if large else torch.float64, device=device)
        self._rows = _row_blocks(self.columns, max(_LEAST_ROWS, -(-self.columns // _BLOCKS)) if large else LARGE)
        self._blocks = [zeros(shape.groups, rows.stop - rows.start, self.columns - rows.start) for rows in self._rows]
        self.yx = zeros(shape.groups, shape.group_out, self.columns) if paired else None
        self._generator = torch.Generator().manual_seed(0)

    @property
    def xx(self) -> Tensor:
        """Sum of the patches' second moments so far, ``(G, D, D)``."""
        return self._moment(self.x)[0] * max(self.count, 1)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, pad: Callable[[Tensor], Tensor] | None = None) -> None:
        """Count an input and an output, at all positions or at some."""
        shape = self.shape
        y = y.reshape(y.shape[0], 1, -1, y.shape[-1]).mT if shape.kind == "linear" else y.flatten(2)
        y = y.reshape(y.shape[0], shape.groups, shape.group_out, -1)
        length = y.shape[-1]
        per_image = min(length, self._positions) * shape.in_channels * shape.taps * x.element_size()
        step = max(1, min(_PATCH_BYTES // per_image, self._step(len(x))))
        for x_part, y_part in zip(x.split(step), y.split(step), strict=True):
            positions = None
            if length > self._positions:
                positions = torch.randperm(length, generator=self._generator)[: self._positions].to(x.device)
                y_part = y_part[..., positions]
            self._add(patches(x_part, shape, pad, positions), y_part)

    def _add(self, columns: Tensor, y: Tensor) -> None:
        """Add patches ``(n, G, D, L)`` and outputs ``(n, G, O, L)`` of one part."""
        columns = columns.permute(1, 2, 0, 3).flatten(2)
        y = y.permute(1, 2, 0, 3).flatten(2)
        for rows, block in zip(self._rows, self._blocks, strict=True):
            part = columns[:, rows] @ columns[:, rows.start :].mT
            block += part
            self.squares += 2 * part.square().sum((1, 2)) - part[..., : block.shape[1]].square().sum((1, 2))
        if self.yx is not None:
            self.yx += y @ columns.mT
        self.x += columns.sum(-1)
        self.y += y.sum(-1)
        self.count += columns.shape[-1]
        self.count_squares += columns.shape[-1] ** 2

    def _moment(self, like: Tensor) -> tuple[Tensor, Tensor]:
        count = max(self.count, 1)
        xx = like.new_empty(self.shape.groups, self.columns, self.columns)
        for rows, block in zip(self._rows, self._blocks, strict=True):
            part = block.to(like) / count
            here, rest = part[..., : block.shape[1]].triu(), part[..., block.shape[1] :]
            xx[:, rows, rows] = here + here.triu(1).mT
            xx[:, rows, rows.stop :] = rest
            xx[:, rows.stop :, rows] = rest.mT
        return xx, (self.x / count).to(like)

    def _posed(self, weight: Tensor, moment: Tensor, share: Tensor, scale: Tensor, centred: bool) -> Regression:
        count = max(self.count, 1)
        x, y = (self.x / count).to(weight), (self.y / count).to(weight)
        if self.yx is None:  # the outputs are the layer's own, so that its weight solves the problem
            return Regression(weight, moment, x, y)
        yx = self.yx.to(weight) / count
        if centred:
            yx -= y[:, :, None] * x[:, None, :]
        rows = weight.reshape(self.shape.groups, self.shape.group_out, -1)
        cross = (1 - share) * yx + share * scale * rows
        target = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(moment)).mT
        return Regression(target.reshape(weight.shape), moment, x, y)


class StationaryMoments(Moments):
    """Second moments as if patches lay everywhere, beyond a map's edges too, where it is zero.

    Then what two taps of a kernel see depends on their distance alone: a 3x3 kernel needs the 13 products of an input
    map with its shifts by up to two pixels, not those of 9 taps with 9: a sixth of the memory and a third of the work.
    The moment stays positive semi-definite. A stride is passed over, and patches at edges count more than they should,
    which is good enough to compare ranks by. The outputs are those of the layer itself.
    """

    def __init__(self, shape: LayerShape, device: torch.device, positions_macs: float) -> None:
        super().__init__(shape, device)
        self._macs = positions_macs
        (height, width), side = shape.kernel_size, shape.group_in
        shifts = [(down, right) for down in range(height) for right in range(1 - width, width)]
        self._products = {
            shift: torch.zeros(shape.groups, side, side, device=device) for shift in shifts if shift >= (0, 0)
        }
        self._sum = torch.zeros(shape.groups, side, dtype=torch.float64, device=device)
        self._positions = 0

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, pad: Callable[[Tensor], Tensor] | None = None) -> None:
        """Count an input and an output, all positions of all images or of some."""
        x = x if pad is None else pad(x)
        most = self._macs / (len(self._products) * self.shape.groups * self.shape.group_in**2)
        seen = max(1, min(len(x), round(len(x) * most / (x.shape[-2] * x.shape[-1]))))  # whole maps, of fewer images
        x, y = x[:seen], y[:seen]
        for part in x.split(self._step(seen)):
            self._add(part)
        columns = patches(x.sum(0, keepdim=True), self.shape)
        self.x += columns.sum((0, -1))
        self.y += y.sum((0, 2, 3)).view_as(self.y)
        self._positions += seen * columns.shape[-1]

    def _add(self, x: Tensor) -> None:
        """Add the maps ``(n, C, H, W)`` of one part."""
        (height, width), (reach_down, reach_right) = x.shape[-2:], self._reach
        shifted = F.pad(x, (reach_right, reach_right, 0, reach_down))
        x = self._by_group(x)
        for (down, right), product in self._products.items():
            top, left = down * self.shape.dilation[0], reach_right + right * self.shape.dilation[1]
            part = x @ self._by_group(shifted[..., top : top + height, left : left + width]).mT
            product += part
            self.squares += self._pairs(down, right) * part.square().sum((1, 2))
        self._sum += x.sum(-1)
        count = x.shape[-1] // (height * width) * (height + reach_down) * (width + reach_right)
        self.count += count
        self.count_squares += count**2

    @property
    def _reach(self) -> tuple[int, int]:
        """Pixels by which patches reach beyond a map's edges, at both together."""
        (height, width), (down, right) = self.shape.kernel_size, self.shape.dilation
        return (height - 1) * down, (width - 1) * right

    def _by_group(self, x: Tensor) -> Tensor:
        """Maps as one matrix a group, ``(G, I, n * H * W)``."""
        return x.transpose(0, 1).reshape(self.shape.groups, self.shape.group_in, -1)

    def _pairs(self, down: int, right: int) -> int:
        """How many pairs of taps are so far apart, in either direction."""
        height, width = self.shape.kernel_size
        return (height - down) * (width - abs(right)) * (1 if (down, right) == (0, 0) else 2)

    def _moment(self, like: Tensor) -> tuple[Tensor, Tensor]:
        count, (groups, side), taps = max(self.count, 1), self._sum.shape, self.shape.taps
        xx = like.new_empty(groups, side, taps, side, taps)
        places = [(y, x) for y in range(self.shape.kernel_size[0]) for x in range(self.shape.kernel_size[1])]
        for i, (y, x) in enumerate(places):
            for j, (other_y, other_x) in enumerate(places):
                shift = (other_y - y, other_x - x)
                product = self._products[shift] if shift >= (0, 0) else self._products[-shift[0], -shift[1]].mT
                xx[:, :, i, :, j] = product / count
        mean = (self._sum / count).to(like)
        return xx.view(groups, side * taps, -1), mean.repeat_interleave(taps, dim=1)

    def _posed(self, weight: Tensor, moment: Tensor, share: Tensor, scale: Tensor, centred: bool) -> Regression:
        count = max(self._positions, 1)
        return Regression(weight, moment, (self.x / count).to(weight), (self.y / count).to(weight))


def _row_blocks(columns: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, columns)) for start in range(0, columns, rows)]


def _energy(xx: Tensor) -> Tensor:
    """Squared norm of every matrix, summed in double precision."""
    blocks = (xx[:, rows].square().sum((-2, -1), dtype=torch.float64) for rows in _row_blocks(xx.shape[-2], LARGE))
    return torch.stack(list(blocks)).sum(0)
