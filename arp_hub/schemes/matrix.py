"""Schemes of matrix blocks ``M``: minimise ``||M - L R||^2`` over ``L (m, r)`` and ``R (r, n)``, by a truncated SVD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Factors, Scheme
from .linalg import orthonormal, singular_values, truncated
from .shapes import ConvSpec, LayerShape


class MatrixScheme(Scheme):
    """A scheme whose blocks are matrices. The nearest point is their truncated SVD (Eckart and Young 1936)."""

    @abstractmethod
    def fold(self, weight: Tensor) -> Tensor:
        """The matrix blocks of a weight, ``(blocks, m, n)``, with input features along the columns."""

    @abstractmethod
    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        """Convolution weights of ``left (blocks, m, r)`` and ``right (blocks, r, n)``, whose product is the fold."""

    def spectrum(self, weight: Tensor, moment: Tensor | None = None) -> Tensor | None:
        return singular_values(self.fold(weight)) if moment is None else None

    @abstractmethod
    def left(self, factors: Sequence[Tensor]) -> Tensor:
        """The matrix ``L (blocks, m, r)`` of given factors."""

    @abstractmethod
    def right(self, factors: Sequence[Tensor]) -> Tensor:
        """The matrix ``R (blocks, r, n)`` of given factors."""

    def basis(self, factors: Sequence[Tensor]) -> Factors:
        left, right = self.left(factors), self.right(factors)
        return (left,) if left.shape[-2] <= right.shape[-1] else (right.mT,)

    def nearest(
        self, weight: Tensor, rank: int, start: Sequence[Tensor] | None = None, sweeps: int | None = None
    ) -> Factors:
        matrix = self.fold(weight)
        if start is None:
            left, right = truncated(matrix, rank)
            tiny = torch.finfo(matrix.dtype).tiny ** 0.25
            even = (right.norm(dim=-1).clamp_min(tiny) / left.norm(dim=-2).clamp_min(tiny)).sqrt()
            return self.unfold(left * even[:, None, :], right / even[..., None])
        (basis,) = start
        right = basis.mT @ matrix if matrix.shape[-2] <= matrix.shape[-1] else basis.mT
        for _ in range(sweeps or 1):  # orthogonal iteration: one multiplication by M M^T a sweep
            left = orthonormal(matrix @ right.mT)
            right = left.mT @ matrix
        return self.balance(self.unfold(left, right))


class Channel(MatrixScheme):
    """A ``kh x kw`` convolution ``I -> r`` with the layer's stride, then 1x1, ``r -> O`` (Zhang et al. 2015).

    ``W[o, (i, a, b)] = sum_r L[o, r] R[r, (i, a, b)]``: the SVD of the matrix ``O x (I kh kw)``, with
    ``r (I kh kw + O)`` parameters.
    """

    name = "channel"

    @property
    def max_rank(self) -> int:
        return min(self.shape.group_out // self.groups, self.shape.group_in * self.shape.taps)

    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        s = self.shape
        inner = s.groups * self.groups * rank
        return (
            ConvSpec(s.in_channels, inner, s.kernel_size, s.stride, s.padding, s.dilation, s.groups),
            ConvSpec(inner, s.out_channels, groups=s.groups * self.groups),
        )

    @property
    def blocks(self) -> int:
        return self.shape.groups * self.groups

    def design(self, factors: Sequence[Tensor]) -> Tensor:
        return factors[0].reshape(self.blocks, -1, self.shape.group_in * self.shape.taps)

    def fold(self, weight: Tensor) -> Tensor:
        return self._rows(weight)

    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        rank, s = left.shape[-1], self.shape
        first = right.reshape(self.blocks * rank, s.group_in, *s.kernel_size)
        return first, left.reshape(s.out_channels, rank, 1, 1)

    def left(self, factors: Sequence[Tensor]) -> Tensor:
        last = factors[-1]
        return last.reshape(self.blocks, -1, last.shape[1])

    def right(self, factors: Sequence[Tensor]) -> Tensor:
        return self.design(factors[:-1])

    def spectrum(self, weight: Tensor, moment: Tensor | None = None) -> Tensor | None:
        if moment is None:
            return super().spectrum(weight)
        return torch.linalg.eigvalsh(self._output_gram(weight, moment)).clamp_min(0).sqrt().flip(-1)

    def fit_start(self, weight: Tensor, rank: int, sweeps: int | None = None) -> Factors:
        return tuple(weight.new_zeros(conv.weight_shape) for conv in self.convs(rank))

    def fit(
        self, target: Tensor, moment: Tensor, start: Sequence[Tensor], iterations: int = 100, layers: int = 1
    ) -> Factors:
        """Reduced-rank regression (Izenman 1975), in closed form: ``start`` only says the rank.

        ``L`` has the leading eigenvectors of ``T moment T^T``, the second moment of the outputs, and ``R = L^T T``.
        """
        rank = start[-1].shape[1]
        left = torch.linalg.eigh(self._output_gram(target, moment)).eigenvectors[..., -rank:]
        return self.balance(self.unfold(left, left.mT @ self._rows(target)))

    def _output_gram(self, weight: Tensor, moment: Tensor) -> Tensor:
        """Second moment of the layer's outputs, block by block, ``(blocks, rows, rows)``."""
        rows = self._rows(weight)
        return self.design_moment(rows, moment) @ rows.mT


class GroupOut(Channel):
    """Row blocks: a ``kh x kw`` convolution ``I -> g r``, then a grouped 1x1, ``g r -> O``. For layers that expand.

    One SVD for each of the g blocks of ``O / g`` rows, ``(O / g) x (I kh kw)``, with ``r (g I kh kw + O)`` parameters.
    """

    name = "group_out"
    grouped = True

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        if reason := super().refusal(shape, groups):
            return reason
        if shape.group_out % groups:
            return f"its {shape.group_out} output channels cannot be split into {groups} groups"
        return None


class GroupIn(MatrixScheme):
    """Column blocks: a grouped ``kh x kw`` convolution ``I -> g r``, then 1x1, ``g r -> O``. For layers that squeeze.

    One SVD for each of the g blocks of ``I / g`` input channels, ``O x (I / g kh kw)``, with ``r (I kh kw + g O)``
    parameters.
    """

    name = "group_in"
    grouped = True

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        if reason := super().refusal(shape, groups):
            return reason
        if shape.group_in % groups:
            return f"its {shape.group_in} input channels cannot be split into {groups} groups"
        return None

    @property
    def max_rank(self) -> int:
        return min(self.shape.group_out, self.shape.group_in // self.groups * self.shape.taps)

    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        s = self.shape
        inner = s.groups * self.groups * rank
        return (
            ConvSpec(s.in_channels, inner, s.kernel_size, s.stride, s.padding, s.dilation, s.groups * self.groups),
            ConvSpec(inner, s.out_channels, groups=s.groups),
        )

    def design(self, factors: Sequence[Tensor]) -> Tensor:
        # Block-diagonal: feature (j, r) reads the input channels of block j only.
        right = self.right(factors).unflatten(0, (self.shape.groups, self.groups))
        apart = torch.eye(self.groups, dtype=right.dtype, device=right.device)
        return torch.einsum("gbrd,bc->gbrcd", right, apart).flatten(1, 2).flatten(2)

    def design_moment(self, design: Tensor, moment: Tensor) -> Tensor:
        g = self.groups
        blocks = design.unflatten(2, (g, -1)).unflatten(1, (g, -1)).diagonal(dim1=1, dim2=3)  # (G, r, D / g, g)
        return (blocks.permute(0, 3, 1, 2) @ moment.unflatten(1, (g, -1))).flatten(1, 2)

    def fold(self, weight: Tensor) -> Tensor:
        s = self.shape
        split = weight.reshape(s.groups, s.group_out, self.groups, -1).transpose(1, 2)
        return split.reshape(s.groups * self.groups, s.group_out, -1)

    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        rank, s = left.shape[-1], self.shape
        first = right.reshape(s.groups * self.groups * rank, s.group_in // self.groups, *s.kernel_size)
        last = left.unflatten(0, (s.groups, self.groups)).transpose(1, 2)
        return first, last.reshape(s.out_channels, self.groups * rank, 1, 1)

    def left(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.shape
        split = factors[-1].reshape(s.groups, s.group_out, self.groups, -1).transpose(1, 2)
        return split.reshape(s.groups * self.groups, s.group_out, -1)

    def right(self, factors: Sequence[Tensor]) -> Tensor:
        return factors[0].reshape(
            self.shape.groups * self.groups, -1, self.shape.group_in // self.groups * self.shape.taps
        )


class Spatial(MatrixScheme):
    """A ``kh x 1`` convolution ``I -> r``, then ``1 x kw``, ``r -> O`` (Jaderberg et al. 2014).

    ``W[o, i, a, b] = sum_r L[(o, b), r] R[r, (i, a)]``: the SVD of the matrix ``(O kw) x (I kh)``, with
    ``r (I kh + O kw)`` parameters.
    """

    name = "spatial"

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        if reason := super().refusal(shape, groups):
            return reason
        if min(shape.kernel_size) == 1:
            return f"its {shape.kernel_size[0]}x{shape.kernel_size[1]} kernel has one side of length 1"
        return None

    @property
    def max_rank(self) -> int:
        s = self.shape
        return min(s.group_in * s.kernel_size[0], s.group_out * s.kernel_size[1])

    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        s = self.shape
        inner = s.groups * rank
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = s.kernel_size, s.stride, s.padding, s.dilation
        return (
            ConvSpec(s.in_channels, inner, (kh, 1), (sh, 1), (ph, 0), (dh, 1), s.groups),
            ConvSpec(inner, s.out_channels, (1, kw), (1, sw), (0, pw), (1, dw), s.groups),
        )

    def design(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.shape
        first = factors[0].reshape(s.groups, -1, s.group_in, s.kernel_size[0])
        shift = torch.eye(s.kernel_size[1], dtype=first.dtype, device=first.device)
        spread = torch.einsum("gria,bc->grbiac", first, shift)  # feature (r, b) reads column b of the kernel
        return spread.reshape(s.groups, -1, s.group_in * s.taps)

    def design_moment(self, design: Tensor, moment: Tensor) -> Tensor:
        kw = self.shape.kernel_size[1]
        columns = design.unflatten(2, (-1, kw)).unflatten(1, (-1, kw)).diagonal(dim1=2, dim2=4)  # (G, r, I kh, kw)
        rows = moment.unflatten(1, (-1, kw)).transpose(1, 2)  # (G, kw, I kh, D)
        return (columns.permute(0, 3, 1, 2) @ rows).transpose(1, 2).flatten(1, 2)

    def fold(self, weight: Tensor) -> Tensor:
        s = self.shape
        split = weight.reshape(s.groups, s.group_out, s.group_in, *s.kernel_size)
        return split.permute(0, 1, 4, 2, 3).reshape(s.groups, s.group_out * s.kernel_size[1], -1)

    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        rank, s = left.shape[-1], self.shape
        first = right.reshape(s.groups * rank, s.group_in, s.kernel_size[0], 1)
        last = left.reshape(s.groups, s.group_out, s.kernel_size[1], rank).transpose(2, 3)
        return first, last.reshape(s.out_channels, rank, 1, s.kernel_size[1])

    def left(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.shape
        split = factors[-1].reshape(s.groups, s.group_out, -1, s.kernel_size[1]).transpose(2, 3)
        return split.reshape(s.groups, s.group_out * s.kernel_size[1], -1)

    def right(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.shape
        return factors[0].reshape(s.groups, -1, s.group_in * s.kernel_size[0])
