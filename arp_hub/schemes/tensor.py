"""The schemes of three-way tensors ``O x I x (kh kw)``: their nearest point is found by alternating least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Factors, Scheme
from .linalg import als, even_norms, leading_vectors, orthonormal, slice_triplets, tail_shares
from .shapes import ConvSpec, LayerShape, Pair

_SWEEPS, _SWEEP_WORK = 60, 5e9
"""Sweeps of a cold start of CP, and the multiply-accumulates that bound them; a warm start needs one sweep."""
_LEAST_SWEEPS, _MOST_SWEEP_WORK = 5, 3e11
"""To no fewer than so many are they bound, but for the multiply-accumulates that bound these: to none if need be."""
_SINGLE_WORK = 2e8
"""Sweeps that take more multiply-accumulates than this are made in single precision, which costs no accuracy."""
_TUCKER_SWEEPS = 4
"""Sweeps of a cold start of Tucker-2, which settles in a few."""


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
        work = 2 * rank * weight.numel()
        dtype = torch.float32 if work > _SINGLE_WORK and rank < self.max_rank else weight.dtype
        if start is None:
            cold, _ = self.cold_start(weight.to(dtype), rank)
            if rank >= self.max_rank:  # it is exact
                return tuple(factor.to(weight.dtype) for factor in cold)
            start = self.basis(cold)
            least = min(_LEAST_SWEEPS, int(_MOST_SWEEP_WORK / work))
            sweeps = min(_SWEEPS if sweeps is None else sweeps, max(least, int(_SWEEP_WORK / work)))
            if sweeps == 0:
                return tuple(factor.to(weight.dtype) for factor in cold)
        outputs, taps = (mode.to(dtype) for mode in start)
        modes = als(tensor.to(dtype), outputs, taps, 1 if sweeps is None else sweeps)
        return self._factors([mode.to(weight.dtype) for mode in modes])

    def basis(self, factors: Sequence[Tensor]) -> Factors:
        outputs, _, taps = self._all_modes(factors)
        return outputs, taps

    def cold_start(self, weight: Tensor, rank: int) -> tuple[Factors, Tensor]:
        """The singular triplets of the slices, which are orthogonal to each other."""
        s = self.shape
        modes, energies = slice_triplets(weight.reshape(s.groups, s.group_out, s.group_in, s.taps), rank)
        return self._factors(modes), tail_shares(energies.sum(0))

    def balance(self, factors: Factors) -> Factors:
        """Even out the norms of every component's three vectors, which leaves the weight as it is."""
        return self._factors(even_norms(self._all_modes(factors)))

    def _factors(self, modes: Sequence[Tensor]) -> Factors:
        """Convolution weights of the output, input and kernel mode, each ``(G, r, n)``."""
        s = self.shape
        outputs, inputs, taps = modes
        return (
            inputs.reshape(-1, s.group_in, 1, 1),
            taps.reshape(-1, 1, *s.kernel_size),
            outputs.mT.reshape(s.out_channels, -1, 1, 1),
        )

    def _all_modes(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The output, input and kernel mode, each ``(G, r, n)``."""
        outputs = factors[-1].reshape(self.shape.groups, self.shape.group_out, -1).mT
        return [outputs, *self._modes(factors)]

    def _modes(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The input and the kernel mode, each ``(G, r, n)``."""
        s = self.shape
        return factors[0].reshape(s.groups, -1, s.group_in), factors[1].reshape(s.groups, -1, s.taps)


class Tucker2(Scheme):
    """1x1 to r channels, a full ``kh x kw`` convolution on them, 1x1 out (Kim et al. 2016).

    One rank serves both sides, ``r_out = min(r, O)`` and ``r_in = min(r, I)``: the equal-rank rule of HALOC (2023).
    """

    name = "tucker2"
    rough_sweeps = 0  # sweeps take off 2 to 7 % of the error, at any rank

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
            inputs = leading_vectors(tensor.transpose(1, 2).flatten(2), r_in)
            for _ in range(min(sweeps or _TUCKER_SWEEPS, _TUCKER_SWEEPS)):
                # higher-order orthogonal iteration (De Lathauwer et al. 2000)
                outputs = leading_vectors(_seen_through(tensor, inputs), r_out)
                inputs = leading_vectors(_seen_through(tensor.transpose(1, 2), outputs), r_in)
            return self.balance(self._factors(_core(tensor, outputs, inputs), outputs, inputs))
        outputs, inputs = start
        inputs = orthonormal(inputs)
        for _ in range(sweeps or 1):  # one multiplication for each basis in place of its eigenvectors
            matrix = _seen_through(tensor, inputs)
            outputs = orthonormal(matrix @ (matrix.mT @ outputs))
            matrix = _seen_through(tensor.transpose(1, 2), outputs)
            inputs = orthonormal(matrix @ (matrix.mT @ inputs))
        return self.balance(self._factors(_core(tensor, outputs, inputs), outputs, inputs))

    def basis(self, factors: Sequence[Tensor]) -> Factors:
        s = self.shape
        return factors[-1].reshape(s.groups, s.group_out, -1), factors[0].reshape(s.groups, -1, s.group_in).mT

    def cold_start(self, weight: Tensor, rank: int) -> tuple[Factors, Tensor]:
        """The higher-order SVD (De Lathauwer et al. 2000)."""
        s, (r_out, r_in) = self.shape, self._ranks(rank)
        tensor = weight.reshape(s.groups, s.group_out, s.group_in, s.taps)
        outputs = leading_vectors(tensor.flatten(2), s.group_out).flip(-1)
        inputs = leading_vectors(tensor.transpose(1, 2).flatten(2), s.group_in).flip(-1)
        core = _core(tensor, outputs, inputs)
        kept = core.square().sum((0, 3)).cumsum(0).cumsum(1)
        ranks = torch.arange(self.max_rank, device=kept.device)
        kept = kept[ranks.clamp_max(s.group_out - 1), ranks.clamp_max(s.group_in - 1)]
        factors = self._factors(core[:, :r_out, :r_in], outputs[..., :r_out], inputs[..., :r_in])
        return factors, 1 - kept / kept[-1].clamp_min(torch.finfo(kept.dtype).tiny)

    def _factors(self, core: Tensor, outputs: Tensor, inputs: Tensor) -> Factors:
        """Convolution weights of a core ``(G, r_out, r_in, S)`` and bases ``(G, O, r_out)`` and ``(G, I, r_in)``."""
        s = self.shape
        return (
            inputs.mT.reshape(-1, s.group_in, 1, 1),
            core.reshape(-1, inputs.shape[-1], *s.kernel_size),
            outputs.reshape(s.out_channels, -1, 1, 1),
        )


def _seen_through(tensor: Tensor, inputs: Tensor) -> Tensor:
    """The tensor ``(G, O, I, S)`` with its third mode on a basis ``(G, I, r)``, as a matrix ``(G, O, r S)``."""
    return torch.einsum("gois,gir->gors", tensor, inputs).flatten(2)


def _core(tensor: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The best core between orthonormal bases, ``(G, r_out, r_in, S)``."""
    return torch.einsum("gois,gop,gir->gprs", tensor, outputs, inputs)
