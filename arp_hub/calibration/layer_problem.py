"""What there is to fit of one layer: its weight, its inputs' second moment, its outputs' scale.

With ``W`` the weight ``(O, D)``, ``C`` the second moment of the input patches ``(D, D)``, ``s`` the scale of the
output channels ``(O,)`` and ``T`` the target ``(O, D)`` of the regression, a fit minimises over the factors of ``W'``::

    tr(S (T - W') C (T - W')^T S),    S = diag(s),  D = I kh kw

The relative error of a layer is the same expression with ``W`` in the place of ``T``, over ``tr(S W C W^T S)``.
Planning and decomposition both build their problems here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..layers.low_rank import effective_weight
from ..schemes import Factors, Scheme, energy
from .moments import Moments
from .regression import Regression


@dataclass(frozen=True)
class LayerProblem:
    """What there is to fit of one layer.

    Attributes:
        layer: The dense layer.
        weight: The weight that multiplies its input, ``(G * O, I, kh, kw)``.
        regression: The regression that calibration images pose.
        scale: Weight of the error of each output channel, ``(G * O,)``.
        can_shift: Whether the layer's bias, or the mean of the BatchNorm behind it, can take up a change of mean.
    """

    layer: nn.Module
    weight: Tensor
    regression: Regression
    scale: Tensor
    can_shift: bool

    @classmethod
    def of(cls, layer: nn.Module, moments: Moments, norm: BatchNorm | None, dtype: torch.dtype) -> LayerProblem:
        """The problem of a dense layer.

        Args:
            layer: The layer.
            moments: Second moments of its inputs.
            norm: The BatchNorm that alone reads its output, if there is one.
            dtype: Precision of the problem.
        """
        weight = effective_weight(layer).to(dtype)
        return cls(layer, weight, moments.regression(weight), output_scale(norm, weight), moments.centred)

    def fit(
        self,
        scheme: Scheme,
        rank: int,
        iterations: int,
        macs: float,
        least: int = 0,
        sweeps: int | None = None,
    ) -> Factors:
        """The factors that solve the problem.

        Args:
            scheme: The scheme, bound to the layer.
            rank: Its rank.
            iterations: L-BFGS iterations at most.
            macs: Multiply-accumulates at most. A fit that they bound runs in single precision.
            least: Iterations that are made in any case. If ``macs`` allows none, the nearest point in the weight
                metric is returned.
            sweeps: Sweeps of alternating least squares for the starting point; by default until they settle.
        """
        weight, moment, rows = self.weight, self.regression.moment, self.scale.view(-1, 1, 1, 1)
        features = scheme.convs(rank)[-1].weight_shape[1] * scheme.blocks
        affordable = int(min(iterations, max(least, macs / (features * moment.shape[-1] ** 2))))
        if affordable:
            dtype = torch.float32 if affordable < iterations else weight.dtype
            start = [factor.to(dtype) for factor in scheme.fit_start(weight * rows, rank, sweeps)]
            fitted = scheme.fit((self.regression.target * rows).to(dtype), moment.to(dtype), start, affordable)
            factors = tuple(factor.to(weight.dtype) for factor in fitted)
        else:
            factors = scheme.nearest(weight * rows, rank, sweeps=sweeps)
        return scheme.balance((*factors[:-1], factors[-1] / rows))

    def error(self, composed: Tensor) -> float:
        """Relative error of an approximation of the weight, ``(G * O, I, kh, kw)``."""
        lost = energy((self.weight - composed) * self.scale.view(-1, 1, 1, 1), self.regression.moment)
        return float(lost / self._energy)

    def bias(self, composed: Tensor) -> Tensor:
        """The change of bias that keeps the mean output right for an approximation of the weight, ``(G * O,)``."""
        return self.regression.bias(composed)

    @cached_property
    def _energy(self) -> Tensor:
        scaled = self.weight * self.scale.view(-1, 1, 1, 1)
        return energy(scaled, self.regression.moment).clamp_min(torch.finfo(scaled.dtype).tiny)


def can_shift(layer: nn.Module, norm: BatchNorm | None) -> bool:
    """Whether a layer's bias, or the mean of the BatchNorm behind it, can take up a change of its mean output."""
    return norm is not None or layer.bias is not None


def output_scale(norm: BatchNorm | None, weight: Tensor, least: float = 1e-3) -> Tensor:
    """Weight of the error of each output channel ``(O,)``, at most 1: the factor by which a BatchNorm scales it.

    Args:
        norm: The BatchNorm behind the layer; without one all channels weigh the same.
        weight: The layer's weight.
        least: Weight of a channel that its BatchNorm all but switches off; 0 would leave its factors undetermined.
    """
    if norm is None:
        return torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    scale = (norm.weight.detach().abs() / (cast(Tensor, norm.running_var) + norm.eps).sqrt()).to(weight)
    return (scale / scale.max().clamp_min(torch.finfo(scale.dtype).tiny)).clamp_min(least)
