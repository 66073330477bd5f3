"""How much error each way to decompose a layer makes, over its rank: what a budget is spent by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .calibration import Images, all_moments, following_norms
from .fitting import fit_layer, output_scale
from .layers import effective_weight
from .schemes import Scheme, relative_error
from .shapes import LayerShape

Floats = NDArray[np.float64]

_SHARES = (0.08, 0.18, 0.35, 0.6)
"""Parameter shares at which the error of a scheme without closed-form spectrum is measured."""
_SHORTLIST_SHARE = 0.3
_SWEEPS, _ITERATIONS, _WORK = 12, 25, 1e10
_GROUP_CHOICES = (2, 4, 8)
_TINY = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One scheme for one layer with its error at every rank from 1 to ``len(errors)``.

    Attributes:
        scheme: The scheme, bound to the layer and its groups.
        errors: Relative squared error, falling with the rank.
    """

    scheme: Scheme
    errors: Floats


def candidate_schemes(shape: LayerShape, names: Sequence[str], schemes: Mapping[str, type[Scheme]]) -> list[Scheme]:
    """All schemes, with all choices of groups, that apply to a layer and can make it smaller."""
    found = []
    for name in names:
        kind = schemes[name]
        for groups in _GROUP_CHOICES if kind.grouped else (1,):
            if kind.refusal(shape, groups) is None:
                scheme = kind(shape, groups)
                if scheme.params(1) < shape.params:
                    found.append(scheme)
    return found


def useful_rank(scheme: Scheme) -> int:
    """The largest rank at which the chain is smaller than the dense layer."""
    low, high = 1, scheme.max_rank
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if scheme.params(middle) < scheme.shape.params else (low, middle - 1)
    return low


def rank_at(scheme: Scheme, share: float) -> int:
    """The largest rank whose chain holds at most ``share`` of the dense weights, at least 1."""
    low, high = 1, useful_rank(scheme)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if scheme.params(middle) <= share * scheme.shape.params else (low, middle - 1)
    return low


def interpolate(ranks: Sequence[int], values: Sequence[float], last: int) -> Floats:
    """A falling curve through measured points, for every rank from 1 to ``last``: straight in log-log, and beyond."""
    points = dict(sorted(zip(ranks, values, strict=True)))
    log_rank = np.log(list(points))
    log_value = np.log(np.maximum(np.minimum.accumulate(list(points.values())), _TINY))
    query = np.log(np.arange(1, last + 1))
    curve = np.interp(query, log_rank, log_value)
    if len(points) > 1:
        slopes = np.minimum(np.diff(log_value) / np.diff(log_rank), 0)
        curve = np.where(query < log_rank[0], log_value[0] + slopes[0] * (query - log_rank[0]), curve)
        curve = np.where(query > log_rank[-1], log_value[-1] + slopes[-1] * (query - log_rank[-1]), curve)
    return cast(Floats, np.exp(np.minimum(curve, 0)))


def weight_candidates(weight: Tensor, schemes: Sequence[Scheme]) -> list[Candidate]:
    """The error curves of a layer in the metric of its weights."""
    return [Candidate(scheme, _weight_curve(scheme, weight)) for scheme in schemes]


def _weight_curve(scheme: Scheme, weight: Tensor) -> Floats:
    last = useful_rank(scheme)
    spectrum = scheme.spectrum(weight)
    if spectrum is not None:
        energy = spectrum.square().sum(0)
        tail = energy.flip(0).cumsum(0).flip(0)[1:] / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
        errors = np.append(tail.double().cpu().numpy(), 0.0)
        return np.maximum(errors[:last], 0.0)
    ranks = sorted({rank_at(scheme, share) for share in _SHARES})
    values = [
        float(relative_error(weight, scheme.compose(scheme.nearest(weight, rank, sweeps=_SWEEPS)))) for rank in ranks
    ]
    return interpolate(ranks, values, last)


class OutputErrors:
    """Error curves of many layers in the metric of their outputs.

    Args:
        model: The dense model, in evaluation mode for as long as this takes.
        layers: The layers in question by name.
        images: Calibration images; one pass is made over them.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], images: Images) -> None:
        self._layers = layers
        self._moments = all_moments(model, layers, images)
        self._norms = following_norms(model, layers, images)

    def candidates(self, name: str, schemes: Sequence[Scheme], keep: int = 2) -> list[Candidate]:
        """Error curves of the most promising schemes of a layer.

        Args:
            name: The layer.
            schemes: The schemes to choose from.
            keep: How many to measure; they are shortlisted by their error in the weight metric at equal cost.
        """
        layer, norm = self._layers[name], self._norms.get(name)
        weight = effective_weight(layer).double()
        problem = self._moments[name].regression(weight, centred=norm is not None or layer.bias is not None)
        scale = output_scale(norm, weight)
        rows = scale.view(-1, 1, 1, 1)
        found = []
        for scheme in _shortlist(weight.float(), schemes, keep):
            ranks = sorted({rank_at(scheme, share) for share in _SHARES})
            fits = [fit_layer(scheme, rank, weight, problem, scale, _ITERATIONS, _WORK, least=0) for rank in ranks]
            errors = [
                float(relative_error(problem.target * rows, scheme.compose(fitted) * rows, problem.moment))
                for fitted in fits
            ]
            found.append(Candidate(scheme, interpolate(ranks, errors, useful_rank(scheme))))
        return found


def _shortlist(weight: Tensor, schemes: Sequence[Scheme], keep: int) -> list[Scheme]:
    """The schemes with the least error in the weight metric, at one common cost."""

    def error(scheme: Scheme) -> float:
        found = scheme.nearest(weight, rank_at(scheme, _SHORTLIST_SHARE), sweeps=_SWEEPS)
        return float(relative_error(weight, scheme.compose(found)))

    return sorted(schemes, key=error)[:keep] if len(schemes) > keep else list(schemes)
