"""How a weight is written as a chain of smaller convolutions: costs, nearest points and fits. Maths only, no models.

Shapes used throughout, for a dense layer with ``G`` groups of its own (``G = 1`` for an ordinary layer)::

    weight   (G * O, I, kh, kw)     O and I are channels *per group*; a linear layer is kh = kw = 1
    moment   (G, I * kh * kw, I * kh * kw)     second moment of the layer's input patches, one matrix per group
    factors  a tuple of convolution weights in the order in which the input meets them

Every scheme writes each output row as ``last @ design``: a linear map of a small number of features of the input
patch. ``design`` holds all factors but the last one, so that in any second-moment metric the last factor has a
closed form, and a fit only has to search over the others (variable projection, Golub and Pereyra 1973).

A new scheme is one subclass of `Scheme` and one entry of `SCHEMES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .errors import ArpHubError

Factors = tuple[Tensor, ...]
Pair = tuple[int, int]

ALS_SWEEPS = 60
"""Alternating-least-squares sweeps of a cold start; a warm start needs one."""
_RIDGE = 1e-9
"""Tikhonov term of every normal equation, relative to the mean of its diagonal."""


@dataclass(frozen=True)
class LayerShape:
    """What the maths needs to know of a dense layer. ``in_channels`` and ``out_channels`` are totals over groups."""

    out_channels: int
    in_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    kind: Literal["conv", "linear"] = "conv"

    @property
    def taps(self) -> int:
        """Number of kernel positions, ``kh * kw``."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def group_out(self) -> int:
        """Output channels per group of the dense layer."""
        return self.out_channels // self.groups

    @property
    def group_in(self) -> int:
        """Input channels per group of the dense layer."""
        return self.in_channels // self.groups

    @property
    def params(self) -> int:
        """Weights of the dense layer, without its bias."""
        return self.out_channels * self.group_in * self.taps

    def as_conv(self) -> ConvSpec:
        """The dense layer itself as one convolution, for counting."""
        return ConvSpec(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        )


@dataclass(frozen=True)
class ConvSpec:
    """One convolution of a chain (a linear layer is the 1x1 case)."""

    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the convolution's weight."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    def output_size(self, size: Pair) -> Pair:
        """Height and width of the output map for an input map of ``size``."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        )
        return height, width


def chain_params(convs: Sequence[ConvSpec]) -> int:
    """Weights of a chain of convolutions."""
    return sum(conv.params for conv in convs)


def chain_macs(convs: Sequence[ConvSpec], size: Pair) -> int:
    """Multiply-accumulates of a chain for one input map of ``size``."""
    macs = 0
    for conv in convs:
        size = conv.output_size(size)
        macs += conv.params * size[0] * size[1]
    return macs


class Scheme(ABC):
    """One way to factorise one layer: a scheme is bound to the layer's shape and to a number of groups.

    Args:
        shape: The dense layer.
        groups: Number of blocks the scheme itself makes (1 for the schemes that make none).

    Raises:
        ArpHubError: If the scheme does not apply to the shape.
    """

    name: ClassVar[str]
    grouped: ClassVar[bool] = False
    """Whether ``groups`` may exceed 1."""

    def __init__(self, shape: LayerShape, groups: int = 1) -> None:
        if reason := self.refusal(shape, groups):
            raise ArpHubError(f"scheme '{self.name}' with groups={groups} does not fit this layer: {reason}")
        self.shape = shape
        self.groups = groups

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        """Why the scheme cannot be used on ``shape``, or None if it can."""
        if groups < 1:
            return f"groups must be at least 1, got {groups}"
        if groups > 1 and not cls.grouped:
            return f"'{cls.name}' makes no groups, use groups=1"
        return None

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """The smallest rank at which every weight of this shape is represented exactly."""

    @abstractmethod
    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        """The chain of convolutions at ``rank``, first to last."""

    @abstractmethod
    def design(self, factors: Sequence[Tensor]) -> Tensor:
        """The features that the last factor combines, ``(blocks, features, I * kh * kw)``, differentiable.

        Args:
            factors: All factors but the last one.
        """

    @abstractmethod
    def nearest(
        self, weight: Tensor, rank: int, start: Sequence[Tensor] | None = None, sweeps: int | None = None
    ) -> Factors:
        """The factors of (approximately) the nearest point of the scheme's set, in the plain weight metric.

        Args:
            weight: Dense weight ``(G * O, I, kh, kw)``.
            rank: Rank per block.
            start: Factors to start from. Without it, the best cold start there is: exact for the matrix schemes.
            sweeps: Iterations; by default one with a ``start``, and enough to settle without.
        """

    def spectrum(self, weight: Tensor) -> Tensor | None:
        """Singular values of every block, ``(blocks, n)``, for the schemes whose nearest point is a truncated SVD."""
        return None

    @property
    def blocks(self) -> int:
        """Number of independent row blocks of the weight: the dense layer's own groups, or more."""
        return self.shape.groups

    def params(self, rank: int) -> int:
        """Weights of the chain at ``rank`` (biases not counted: the chain has the dense layer's own)."""
        return chain_params(self.convs(rank))

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        """The dense weight ``(G * O, I, kh, kw)`` that the factors stand for."""
        shape = self.shape
        design = self.design(factors[:-1])
        last = factors[-1].reshape(self.blocks, -1, design.shape[1])
        return (last @ design).reshape(shape.out_channels, shape.group_in, *shape.kernel_size)

    def fit(
        self, target: Tensor, moment: Tensor, start: Sequence[Tensor], iterations: int = 100
    ) -> Factors:
        """Minimise ``tr((target - W) moment (target - W)^T)`` over the factors of ``W``, from ``start``.

        The last factor is eliminated in closed form; L-BFGS searches over the others.

        Args:
            target: Dense weight to come near to, ``(G * O, I, kh, kw)``.
            moment: Second moment of the input patches, ``(G, I * kh * kw, I * kh * kw)``, positive definite.
            start: Factors to start from, as `nearest` gives them.
            iterations: L-BFGS iterations at most.
        """
        problem = _Projected(self, target, moment)
        rest = [f.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for f in start[:-1]]
        optimizer = torch.optim.LBFGS(
            rest,
            max_iter=iterations,
            max_eval=2 * iterations,
            history_size=20,
            tolerance_grad=1e-9,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            return problem.backward(self.design(rest), rest)

        optimizer.step(closure)
        rest_found = [factor.detach() for factor in rest]
        last = problem.last(self.design(rest_found)).reshape(start[-1].shape)
        return self.balance((*rest_found, last))

    def balance(self, factors: Factors) -> Factors:
        """The same weight with the factors' norms evened out, so that no half-precision cast overflows."""
        norms = [factor.norm().clamp_min(torch.finfo(factor.dtype).tiny) for factor in factors]
        even = torch.stack(norms).log().mean().exp()
        return tuple(factor * (even / norm) for factor, norm in zip(factors, norms, strict=True))

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight's row blocks, ``(blocks, rows, I * kh * kw)``."""
        return weight.reshape(self.blocks, -1, self.shape.group_in * self.shape.taps)


class _Projected:
    """The least-squares problem of `Scheme.fit` with the last factor eliminated."""

    def __init__(self, scheme: Scheme, target: Tensor, moment: Tensor) -> None:
        self.moment = moment.repeat_interleave(scheme.blocks // scheme.shape.groups, dim=0)
        self.target_moment = scheme._rows(target) @ self.moment
        self.energy = (self.target_moment * scheme._rows(target)).sum().clamp_min(torch.finfo(target.dtype).tiny)

    def _solve(self, design: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        design_moment = design @ self.moment
        cross = design @ self.target_moment.mT
        last = _solve_spd(design_moment @ design.mT, cross).mT
        return last, design_moment, cross

    def last(self, design: Tensor) -> Tensor:
        """The best last factor for ``design``."""
        return self._solve(design)[0]

    @torch.no_grad()
    def backward(self, design: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """Write the gradient of the relative error to ``rest``; return the relative error."""
        last, design_moment, cross = self._solve(design)
        # By the envelope theorem the gradient is the one at a fixed last factor.
        gradient = (-2 / self.energy) * (last.mT @ (self.target_moment - last @ design_moment))
        with torch.enable_grad():
            design.backward(gradient)
        return 1 - (last.mT * cross).sum() / self.energy


def relative_error(weight: Tensor, approximation: Tensor, moment: Tensor | None = None) -> Tensor:
    """Squared distance over squared norm, in the weight metric or in that of ``moment`` (between 0 and 1 at a fit)."""
    difference = weight - approximation
    if moment is None:
        return difference.square().sum() / weight.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)
    groups, columns = moment.shape[:2]
    rows, residual = weight.reshape(groups, -1, columns), difference.reshape(groups, -1, columns)
    energy = ((rows @ moment) * rows).sum().clamp_min(torch.finfo(weight.dtype).tiny)
    return ((residual @ moment) * residual).sum() / energy


class _MatrixScheme(Scheme):
    """A scheme whose blocks are plain matrices, so that the nearest point is a truncated SVD."""

    @abstractmethod
    def fold(self, weight: Tensor) -> Tensor:
        """The matrix blocks of a weight, ``(blocks, m, n)``: features on the columns' side."""

    @abstractmethod
    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        """Factors from ``left (blocks, m, r)`` and ``right (blocks, r, n)``, whose product is the fold."""

    def spectrum(self, weight: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.fold(weight))

    @abstractmethod
    def right(self, factors: Sequence[Tensor]) -> Tensor:
        """The right factor ``(blocks, r, n)`` of given factors."""

    def nearest(
        self, weight: Tensor, rank: int, start: Sequence[Tensor] | None = None, sweeps: int | None = None
    ) -> Factors:
        matrix = self.fold(weight)
        if start is None:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            root = values[:, :rank].sqrt()
            return self.unfold(left[..., :rank] * root[:, None, :], root[..., None] * right[:, :rank])
        right = self.right(start)
        for _ in range(sweeps or 1):  # orthogonal iteration: one multiplication by M M^T a sweep
            left = torch.linalg.qr(matrix @ right.mT).Q
            right = left.mT @ matrix
        return self.balance(self.unfold(left, right))


class Channel(_MatrixScheme):
    """A ``kh x kw`` convolution to r channels, then 1x1: the SVD of the ``O x (I kh kw)`` matrix."""

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

    def right(self, factors: Sequence[Tensor]) -> Tensor:
        return self.design(factors[:-1])

    def fit(self, target: Tensor, moment: Tensor, start: Sequence[Tensor], iterations: int = 100) -> Factors:
        """Reduced-rank regression, in closed form: a truncated SVD in the whitened metric; ``start`` gives the rank."""
        rank = start[-1].shape[1]
        root = torch.linalg.cholesky(moment.repeat_interleave(self.groups, dim=0))
        left = torch.linalg.svd(self._rows(target) @ root, full_matrices=False).U[..., :rank]
        return self.balance(self.unfold(left, left.mT @ self._rows(target)))


class GroupOut(Channel):
    """Row blocks: one convolution to g r channels, then a grouped 1x1. For layers that expand."""

    name = "group_out"
    grouped = True

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        if reason := super().refusal(shape, groups):
            return reason
        if shape.group_out % groups:
            return f"its {shape.group_out} output channels cannot be split into {groups} groups"
        return None


class GroupIn(_MatrixScheme):
    """Column blocks: a grouped convolution to g r channels, then 1x1. For layers that squeeze."""

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
        # Block-diagonal: feature (j, r) sees the input channels of block j alone.
        right = self.right(factors).unflatten(0, (self.shape.groups, self.groups))
        return torch.stack([torch.block_diag(*group) for group in right])

    def fold(self, weight: Tensor) -> Tensor:
        s = self.shape
        split = weight.reshape(s.groups, s.group_out, self.groups, -1).transpose(1, 2)
        return split.reshape(s.groups * self.groups, s.group_out, -1)

    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        rank, s = left.shape[-1], self.shape
        first = right.reshape(s.groups * self.groups * rank, s.group_in // self.groups, *s.kernel_size)
        last = left.unflatten(0, (s.groups, self.groups)).transpose(1, 2)
        return first, last.reshape(s.out_channels, self.groups * rank, 1, 1)

    def right(self, factors: Sequence[Tensor]) -> Tensor:
        return factors[0].reshape(
            self.shape.groups * self.groups, -1, self.shape.group_in // self.groups * self.shape.taps
        )


class Spatial(_MatrixScheme):
    """A ``kh x 1`` convolution to r channels, then ``1 x kw``: the SVD of the ``(I kh) x (O kw)`` matrix."""

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
        spread = torch.einsum("gria,bc->grbiac", first, shift)  # feature (r, b) sees column b of the kernel
        return spread.reshape(s.groups, -1, s.group_in * s.taps)

    def fold(self, weight: Tensor) -> Tensor:
        s = self.shape
        split = weight.reshape(s.groups, s.group_out, s.group_in, *s.kernel_size)
        return split.permute(0, 1, 4, 2, 3).reshape(s.groups, s.group_out * s.kernel_size[1], -1)

    def unfold(self, left: Tensor, right: Tensor) -> Factors:
        rank, s = left.shape[-1], self.shape
        first = right.reshape(s.groups * rank, s.group_in, s.kernel_size[0], 1)
        last = left.reshape(s.groups, s.group_out, s.kernel_size[1], rank).transpose(2, 3)
        return first, last.reshape(s.out_channels, rank, 1, s.kernel_size[1])

    def right(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.shape
        return factors[0].reshape(s.groups, -1, s.group_in * s.kernel_size[0])


class Cp(Scheme):
    """Canonical polyadic: 1x1 to r channels, a depthwise ``kh x kw`` on them, 1x1 out (Lebedev et al. 2015).

    The tensor is ``O x I x (kh kw)``; the depthwise kernel is not separated further.
    """

    name = "cp"

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        if reason := super().refusal(shape, groups):
            return reason
        return "its kernel is 1x1, where CP is the plain SVD: use 'channel'" if shape.taps == 1 else None

    @property
    def max_rank(self) -> int:
        s = self.shape
        return min(s.group_out, s.group_in) * min(s.taps, max(s.group_out, s.group_in))

    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        s = self.shape
        inner = s.groups * rank
        return (
            ConvSpec(s.in_channels, inner, groups=s.groups),
            ConvSpec(inner, inner, s.kernel_size, s.stride, s.padding, s.dilation, inner),
            ConvSpec(inner, s.out_channels, groups=s.groups),
        )

    def design(self, factors: Sequence[Tensor]) -> Tensor:
        inputs, taps = self._modes(factors)
        return (inputs[..., None] * taps[..., None, :]).flatten(2)

    def nearest(
        self, weight: Tensor, rank: int, start: Sequence[Tensor] | None = None, sweeps: int | None = None
    ) -> Factors:
        s = self.shape
        tensor = weight.reshape(s.groups, s.group_out, s.group_in, s.taps)
        if start is None:
            modes = _slice_start(tensor, rank)
            sweeps = ALS_SWEEPS if sweeps is None else sweeps
            sweeps = 0 if rank >= self.max_rank else sweeps  # the start is exact
        else:
            inputs, taps = self._modes(start)
            modes = [start[-1].reshape(s.groups, s.group_out, rank).mT, inputs, taps]
            sweeps = sweeps or 1
        for _ in range(sweeps):
            modes = _als_sweep(tensor, modes)
        outputs, inputs, taps = modes
        return (
            inputs.reshape(s.groups * rank, s.group_in, 1, 1),
            taps.reshape(s.groups * rank, 1, *s.kernel_size),
            outputs.mT.reshape(s.out_channels, rank, 1, 1),
        )

    def balance(self, factors: Factors) -> Factors:
        """Even out the norms of every component's three vectors, which leaves the weight as it is."""
        inputs, taps = self._modes(factors)
        outputs = factors[-1].reshape(self.shape.groups, self.shape.group_out, -1).mT
        outputs, inputs, taps = _even_norms([outputs, inputs, taps])
        return (
            inputs.reshape(factors[0].shape),
            taps.reshape(factors[1].shape),
            outputs.mT.reshape(factors[2].shape),
        )

    def _modes(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The input and the kernel mode, each ``(G, r, n)``."""
        s = self.shape
        return factors[0].reshape(s.groups, -1, s.group_in), factors[1].reshape(s.groups, -1, s.taps)

class Tucker2(Scheme):
    """1x1 to r channels, a full ``kh x kw`` convolution on them, 1x1 out (Kim et al. 2016).

    One rank serves both sides, ``r_out = min(r, O)`` and ``r_in = min(r, I)``: the equal-rank rule of HALOC (2023).
    """

    name = "tucker2"

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        if reason := super().refusal(shape, groups):
            return reason
        return "its kernel is 1x1, where Tucker-2 is the plain SVD: use 'channel'" if shape.taps == 1 else None

    @property
    def max_rank(self) -> int:
        return max(self.shape.group_out, self.shape.group_in)

    def _ranks(self, rank: int) -> Pair:
        return min(rank, self.shape.group_out), min(rank, self.shape.group_in)

    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        s = self.shape
        r_out, r_in = (s.groups * r for r in self._ranks(rank))
        return (
            ConvSpec(s.in_channels, r_in, groups=s.groups),
            ConvSpec(r_in, r_out, s.kernel_size, s.stride, s.padding, s.dilation, s.groups),
            ConvSpec(r_out, s.out_channels, groups=s.groups),
        )

    def design(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.shape
        inputs = factors[0].reshape(s.groups, -1, s.group_in)
        core = factors[1].reshape(s.groups, -1, inputs.shape[1], s.taps)
        return torch.einsum("gors,gri->gois", core, inputs).flatten(2)

    def nearest(
        self, weight: Tensor, rank: int, start: Sequence[Tensor] | None = None, sweeps: int | None = None
    ) -> Factors:
        s = self.shape
        r_out, r_in = self._ranks(rank)
        tensor = weight.reshape(s.groups, s.group_out, s.group_in, s.taps)
        if start is None:
            inputs = _leading(tensor.transpose(1, 2).flatten(2), r_in)
            sweeps = 10 if sweeps is None else sweeps
        else:
            inputs = torch.linalg.qr(start[0].reshape(s.groups, r_in, s.group_in).mT).Q
        for _ in range(sweeps or 1):  # higher-order orthogonal iteration (De Lathauwer et al. 2000)
            outputs = _leading(torch.einsum("gois,gir->gors", tensor, inputs).flatten(2), r_out)
            inputs = _leading(torch.einsum("gois,gor->girs", tensor, outputs).flatten(2), r_in)
        core = torch.einsum("gois,gop,gir->gprs", tensor, outputs, inputs)
        return self.balance(
            (
                inputs.mT.reshape(s.groups * r_in, s.group_in, 1, 1),
                core.reshape(s.groups * r_out, r_in, *s.kernel_size),
                outputs.reshape(s.out_channels, r_out, 1, 1),
            )
        )


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, from the Gram matrix (whose side is a channel count, so it is small)."""
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[..., -rank:]


def _solve_spd(gram: Tensor, right: Tensor) -> Tensor:
    """Solve ``gram x = right`` for a symmetric positive semi-definite ``gram``, with a tiny ridge."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(gram.dtype).eps * 100
    ridge = diagonal.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny) * max(_RIDGE, floor)
    damped = gram + torch.diag_embed(ridge.expand_as(diagonal))
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.any():  # numerically rank-deficient: damp until it factorises
        factor = torch.linalg.cholesky(damped + torch.diag_embed((ridge * 1e4).expand_as(diagonal)))
    return torch.cholesky_solve(right, factor)


def _slice_start(tensor: Tensor, rank: int) -> list[Tensor]:
    """A deterministic start for CP: the r largest singular triplets of the slices of the rotated tensor.

    The shortest mode is rotated to its principal axes; each slice along it is then a matrix, and its singular triplets
    are CP components. At full rank this is exact already.
    """
    short = min((3, 2, 1), key=lambda mode: tensor.shape[mode])
    others = [mode for mode in (1, 2, 3) if mode != short]
    turned = tensor.permute(0, *others, short)
    axes = torch.linalg.svd(turned.flatten(1, 2), full_matrices=False).Vh  # (G, axis, n)
    slices = torch.einsum("gabs,gts->gtab", turned, axes)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    order = values.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :rank]
    root = values.flatten(1).gather(1, order).clamp_min(torch.finfo(tensor.dtype).tiny).pow(1 / 3)[..., None]

    def pick(vectors: Tensor) -> Tensor:
        return vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1])) * root

    found = {
        others[0]: pick(left.mT.flatten(1, 2)),
        others[1]: pick(right.flatten(1, 2)),
        short: pick(axes.repeat_interleave(values.shape[-1], dim=1)),
    }
    return [found[mode] for mode in (1, 2, 3)]


def _als_sweep(tensor: Tensor, modes: list[Tensor]) -> list[Tensor]:
    """One sweep of alternating least squares over the three modes ``(G, r, n)`` of ``tensor (G, O, I, S)``."""
    modes = list(modes)
    equations = ("gois,gri,grs->gro", "gois,gro,grs->gri", "gois,gro,gri->grs")
    for k, equation in enumerate(equations):
        first, second = (modes[j] for j in range(3) if j != k)
        gram = (first @ first.mT) * (second @ second.mT)
        modes[k] = _solve_spd(gram, torch.einsum(equation, tensor, first, second))
    return _even_norms(modes)


def _even_norms(modes: list[Tensor]) -> list[Tensor]:
    """Scale each component's vectors to one common norm, keeping their product."""
    norms = [mode.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mode.dtype).tiny ** 0.25) for mode in modes]
    even = torch.stack(norms).log().mean(dim=0).exp()
    return [mode * (even / norm) for mode, norm in zip(modes, norms, strict=True)]


SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme for scheme in (Channel, Spatial, GroupIn, GroupOut, Cp, Tucker2)
}
"""All schemes by name."""


def make_scheme(name: str, shape: LayerShape, groups: int = 1) -> Scheme:
    """The scheme ``name`` for a layer.

    Raises:
        ArpHubError: If there is no such scheme, or it does not apply to the layer.

    Example:
        >>> make_scheme("cp", LayerShape(64, 64, (3, 3), padding=(1, 1))).params(rank=40)
        5480
    """
    if name not in SCHEMES:
        raise ArpHubError(f"unknown scheme '{name}': choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name](shape, groups)
