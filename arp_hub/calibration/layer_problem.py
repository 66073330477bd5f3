"""What there is to fit of one layer: its weight, its inputs' second moment, the metric of its outputs.

With ``W`` the weight ``(O, D)``, ``C`` the second moment of the input patches ``(D, D)``, ``F`` the second moment of
the gradients at the output ``(O, O)`` and ``T`` the target ``(O, D)`` of the regression, a fit minimises over the
factors of ``W'``::

    tr(F (T - W') C (T - W')^T) = ||S (T - W') C^(1/2)||^2,    S^T S = F,    D = I kh kw

The relative error of a layer is the same expression with ``W`` in the place of ``T``, over ``tr(F W C W^T)``.
Planning and decomposition both build their problems here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..layers.low_rank import effective_weight
from ..schemes import Factors, Scheme, energy
from ..schemes.linalg import solving_device, unit
from .moments import Moments
from .output_metric import OutputMetric
from .regression import Regression


@dataclass(frozen=True)
class LayerProblem:
    """What there is to fit of one layer.

    Attributes:
        layer: The dense layer.
        weight: The weight that multiplies its input, ``(G * O, I, kh, kw)``.
        regression: The regression that calibration images pose.
        metric: What errors of the output do to the network's predictions.
        can_shift: Whether the layer's bias, or the mean of the BatchNorm behind it, can take up a change of mean.
    """

    layer: nn.Module
    weight: Tensor
    regression: Regression
    metric: OutputMetric
    can_shift: bool

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        moments: Moments,
        gradients: Moments | None,
        norm: BatchNorm | None,
        dtype: torch.dtype = torch.float64,
        layers: int = 1,
    ) -> LayerProblem:
        """The problem of a dense layer.

        Args:
            layer: The layer.
            moments: Second moments of its inputs.
            gradients: Second moments of the gradients at its outputs, if any reach it.
            norm: The BatchNorm that alone reads its output, if there is one.
            dtype: Precision of the problem.
            layers: Number of like problems that are fitted together.
        """
        weight = effective_weight(layer)
        weight = weight.to(solving_device(weight, layers), dtype)
        moments.to(weight.device)
        if gradients is not None:
            gradients.to(weight.device)
        metric = _metric(moments, gradients, norm, weight)
        return cls(layer, weight, moments.regression(weight), metric, moments.centred)

    def error(self, composed: Tensor) -> float:
        """Relative error of an approximation of the weight, ``(G * O, I, kh, kw)``."""
        lost = energy(self.metric.apply((self.weight - composed) / self.unit), self.regression.moment)
        return float(lost / self._energy)

    def bias(self, composed: Tensor) -> Tensor:
        """The change of bias that keeps the mean output right for an approximation of the weight, ``(G * O,)``."""
        return self.regression.bias(composed)

    @cached_property
    def unit(self) -> float:
        """What weights are divided by, so that fits of very large and very small ones neither overflow nor vanish."""
        return unit(self.weight)

    @cached_property
    def _energy(self) -> Tensor:
        scaled = self.metric.apply(self.weight / self.unit)
        return energy(scaled, self.regression.moment).clamp_min(torch.finfo(scaled.dtype).tiny)


def fitted_together(
    problems: Sequence[LayerProblem],
    scheme: Scheme,
    rank: int,
    iterations: int,
    macs: float,
    least: int = 0,
    sweeps: int | None = None,
) -> list[Factors]:
    """The factors that solve the problems of like layers. Each is solved by itself, in calls for all of them.

    Args:
        problems: Problems of layers of one shape.
        scheme: The scheme, bound to that shape.
        rank: Its rank.
        iterations: L-BFGS iterations at most.
        macs: Multiply-accumulates of each layer at most. A fit that they bound runs in single precision.
        least: Iterations that are made in any case. If ``macs`` allows none, the nearest point in the weight
            metric is returned.
        sweeps: Sweeps of alternating least squares for the starting point; by default until they settle.
    """
    metrics = [problem.metric.in_blocks(scheme.blocks) for problem in problems]
    pairs, count = list(zip(problems, metrics, strict=True)), len(problems)
    scaled = _joined([metric.apply(problem.weight / problem.unit) for problem, metric in pairs])
    columns, dtype, solver = problems[0].regression.moment.shape[-1], scaled.dtype, scheme.stacked(count)
    features = scheme.convs(rank)[-1].weight_shape[1] * scheme.blocks
    affordable = int(min(iterations, max(least, macs / (features * columns**2))))
    if affordable:
        working = torch.float32 if affordable < iterations else dtype
        start = [factor.to(working) for factor in solver.fit_start(scaled, rank, sweeps)]
        target = _joined(
            [metric.apply(problem.regression.target / problem.unit).to(working) for problem, metric in pairs]
        )
        moment = _joined([problem.regression.moment.to(working) for problem in problems])
        fit = tuple(factor.to(dtype) for factor in solver.fit(target, moment, start, affordable, count))
    else:
        fit = solver.nearest(scaled, rank, sweeps=sweeps)
    found = []
    for (problem, metric), factors in zip(pairs, zip(*(one.chunk(count) for one in fit), strict=True), strict=True):
        even = problem.unit ** (1 / len(factors))
        found.append(scheme.balance(tuple(one * even for one in (*factors[:-1], metric.undo(factors[-1])))))
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one below the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def can_shift(layer: nn.Module, norm: BatchNorm | None) -> bool:
    """Whether a layer's bias, or the mean of the BatchNorm behind it, can take up a change of its mean output."""
    return norm is not None or layer.bias is not None


def _metric(moments: Moments, gradients: Moments | None, norm: BatchNorm | None, weight: Tensor) -> OutputMetric:
    """The metric by gradients; where none reach the layer, that of the scale which a BatchNorm gives each channel."""
    if gradients is not None:
        moment = gradients.moment(weight.dtype)
        mean = moment.diagonal(dim1=-2, dim2=-1).mean()
        if mean > 0:  # False for NaN too
            return OutputMetric(moment / mean)
    return OutputMetric(torch.diag_embed(output_scale(norm, weight).square().view(moments.shape.groups, -1)))


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
