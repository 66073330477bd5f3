"""The regression problem that calibration images pose for one layer, and its fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..schemes import Factors, Scheme


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


_WORK, _ITERATIONS = 1.5e10, 150
"""Multiply-accumulates and iterations that bound the fit of one layer; a small layer needs far less work. A fit that
work bounds is made in single precision, since it does not come near to its end."""
_LEAST_SCALE = 1e-3
"""A channel that its BatchNorm all but switches off still counts this much."""


def fit_layer(
    scheme: Scheme,
    rank: int,
    weight: Tensor,
    problem: Regression,
    scale: Tensor,
    iterations: int = _ITERATIONS,
    work: float = _WORK,
    least: int = 5,
    sweeps: int | None = None,
) -> Factors:
    """Factors of one layer for a regression problem.

    Args:
        scheme: The scheme, bound to the layer.
        rank: Its rank.
        weight: The dense weight, where the fit starts from.
        problem: The regression, from `Moments.regression`.
        scale: Weight of each output channel's error, ``(O,)``.
        iterations: Iterations of the fit at most.
        work: Multiply-accumulates that bound them.
        least: Iterations that are made in any case. With none the nearest point in the weight metric is returned.
        sweeps: Iterations of that nearest point; by default enough to settle.
    """
    columns = problem.moment.shape[-1]
    features = scheme.convs(rank)[-1].weight_shape[1] * scheme.blocks
    affordable = int(min(iterations, max(least, work / (features * columns**2))))
    rows = scale.view(-1, 1, 1, 1)
    if affordable:
        dtype = torch.float32 if affordable < iterations else weight.dtype
        start = [factor.to(dtype) for factor in scheme.fit_start(weight * rows, rank, sweeps)]
        fitted = scheme.fit((problem.target * rows).to(dtype), problem.moment.to(dtype), start, affordable)
        factors = tuple(factor.to(weight.dtype) for factor in fitted)
    else:
        factors = scheme.nearest(weight * rows, rank, sweeps=sweeps)
    return scheme.balance((*factors[:-1], factors[-1] / rows))


def output_scale(norm: BatchNorm | None, weight: Tensor) -> Tensor:
    """How much each output channel counts: as its BatchNorm scales it, or all alike without one. At most 1."""
    if norm is None:
        return torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    scale = (norm.weight.detach().abs() / (cast(Tensor, norm.running_var) + norm.eps).sqrt()).to(weight)
    return (scale / scale.max().clamp_min(torch.finfo(scale.dtype).tiny)).clamp_min(_LEAST_SCALE)
