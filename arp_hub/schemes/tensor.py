"""Schemes of the three-way tensor ``W[o, i, s]``, with ``s`` over the ``kh kw`` positions of the kernel.

Their nearest point has no closed form. Alternating updates find it, one factor at a time with the others fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Factors, Scheme
from .linalg import als, even_norms, leading_vectors, orthonormal, slice_triplets, tail_shares
from .shapes import ConvSpec, LayerShape, Pair

_SINGLE_WORK = 2e8
"""Multiply-accumulates of a sweep of CP for one group, above which it is made in single precision, which costs no
accuracy."""


class Cp(Scheme):
    """Canonical polyadic: 1x1, ``I -> r``; depthwise ``kh x kw`` on r channels; 1x1, ``r -> O`` (Lebedev et al. 2015).

    ``W[o, i, s] = sum_r A[r, o] B[r, i] C[r, s]``, with ``r (I + O + kh kw)`` parameters. The depthwise kernel has the
    layer's stride and dilation. The rank may exceed both I and O.
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
        work = 2 * rank * tensor[0].numel()
        dtype = torch.float32 if work > _SINGLE_WORK and rank < self.max_rank else weight.dtype
        if start is None:
            cold, _ = self.cold_start(weight.to(dtype), rank)
            if rank >= self.max_rank:  # the cold start is exact
                return tuple(factor.to(weight.dtype) for factor in cold)
            start = self.basis(cold)
            sweeps = _sweeps_within(work) if sweeps is None else min(sweeps, _sweeps_within(work))
            if sweeps == 0:
                return tuple(factor.to(weight.dtype) for factor in cold)
        outputs, taps = (mode.to(dtype) for mode in start)
        modes = als(tensor.to(dtype), outputs, taps, 1 if sweeps is None else sweeps)
        return self._factors([mode.to(weight.dtype) for mode in modes])

    def basis(self, factors: Sequence[Tensor]) -> Factors:
        outputs, _, taps = self._all_modes(factors)
        return outputs, taps

    def cold_start(self, weight: Tensor, rank: int) -> tuple[Factors, Tensor]:
        """The largest singular triplets of the tensor's slices, which are orthogonal to each other."""
        s = self.shape
        modes, energies = slice_triplets(weight.reshape(s.groups, s.group_out, s.group_in, s.taps), rank)
        return self._factors(modes), tail_shares(energies.sum(0))

    def balance(self, factors: Factors) -> Factors:
        """Scale the three vectors of every component to a common norm. The weight does not change."""
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


def _sweeps_within(work: float) -> int:
    """Sweeps of a cold start of CP, by the multiply-accumulates of one: 60, or those that fit 5e9, but at least 5.

    Within 3e11 multiply-accumulates even 5 may not fit. Then there are fewer, or none for the largest layers.
    """
    least = min(5, int(3e11 / work))
    return min(60, max(least, int(5e9 / work)))


class Tucker2(Scheme):
    """Tucker-2: 1x1, ``I -> r_in``; ``kh x kw``, ``r_in -> r_out``; 1x1, ``r_out -> O`` (Kim et al. 2016).

    ``W[o, i, s] = sum_pq A[o, p] K[p, q, s] B[i, q]``, with ``I r_in + r_in r_out kh kw + r_out O`` parameters. One
    rank sets both, ``r_out = min(r, O)`` and ``r_in = min(r, I)``: the equal-rank rule of HALOC (Xiao et al. 2023).
    """

    name = "tucker2"
    rough_sweeps = 0  # more sweeps lower the error by 2 to 7 % at any rank, so the order of ranks is right without

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
            for _ in range(min(sweeps or 4, 4)):  # the iteration converges within 4 sweeps
                # higher-order orthogonal iteration (De Lathauwer et al. 2000)
                outputs = leading_vectors(_projected(tensor, inputs), r_out)
                inputs = leading_vectors(_projected(tensor.transpose(1, 2), outputs), r_in)
            return self.balance(self._factors(_core(tensor, outputs, inputs), outputs, inputs))
        outputs, inputs = start
        inputs = orthonormal(inputs)
        for _ in range(sweeps or 1):  # one power step for each basis, cheaper than its eigenvectors
            matrix = _projected(tensor, inputs)
            outputs = orthonormal(matrix @ (matrix.mT @ outputs))
            matrix = _projected(tensor.transpose(1, 2), outputs)
            inputs = orthonormal(matrix @ (matrix.mT @ inputs))
        return self.balance(self._factors(_core(tensor, outputs, inputs), outputs, inputs))

    def basis(self, factors: Sequence[Tensor]) -> Factors:
        s = self.shape
        return factors[-1].reshape(s.groups, s.group_out, -1), factors[0].reshape(s.groups, -1, s.group_in).mT

    def cold_start(self, weight: Tensor, rank: int) -> tuple[Factors, Tensor]:
        """The truncated higher-order SVD (De Lathauwer et al. 2000)."""
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


def _projected(tensor: Tensor, inputs: Tensor) -> Tensor:
    """The tensor ``(G, O, I, S)`` projected on a basis ``(G, I, r)`` of its third mode, as a matrix ``(G, O, r S)``."""
    return torch.einsum("gois,gir->gors", tensor, inputs).flatten(2)


def _core(tensor: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The best core between orthonormal bases, ``(G, r_out, r_in, S)``."""
    return torch.einsum("gois,gop,gir->gprs", tensor, outputs, inputs)
