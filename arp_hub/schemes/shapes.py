"""Shapes and costs of dense layers and of the small convolutions that replace them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Pair = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class LayerShape:
    """Shape and geometry of a dense layer. ``in_channels`` and ``out_channels`` are totals over groups."""

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


def degrees_of_freedom(convs: Sequence[ConvSpec]) -> int:
    """Dimension of the set of weights that a chain can represent: its parameters less its invariances.

    Between two convolutions, any invertible r x r matrix can transform a group of r channels without effect.
    """
    freedom = chain_params(convs)
    for first, second in zip(convs[:-1], convs[1:], strict=True):
        freedom -= first.out_channels * (first.out_channels // max(first.groups, second.groups))
    return freedom


def chain_macs(convs: Sequence[ConvSpec], size: Pair) -> int:
    """Multiply-accumulates of a chain for one input map of ``size``."""
    macs = 0
    for conv in convs:
        size = conv.output_size(size)
        macs += conv.params * size[0] * size[1]
    return macs
