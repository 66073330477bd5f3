"""How much error each way to decompose a layer makes, over its rank: what a budget is spent by."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .calibration import Images, all_moments, batches, following_norms
from .decompose import fit_layer, output_scale
from .layers import effective_weight, plain_layer, replace_layer
from .schemes import LayerShape, Scheme, relative_error

Floats = NDArray[np.float64]

_SHARES = (0.08, 0.15, 0.25, 0.4, 0.6)
"""Parameter shares at which the error of a scheme without closed-form spectrum is measured."""
_SHORTLIST_SHARE = 0.3
_SWEEPS, _ITERATIONS = 12, 40
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
    """Error curves in the metric of a layer's outputs, and what these errors do to the network's output.

    Args:
        model: The dense model; it is copied, and left as it is.
        names: The layers in question.
        images: Calibration images.
        sensitivity_images: How many of them to run the network on, for the second question.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], images: Images, sensitivity_images: int = 256
    ) -> None:
        self._model = copy.deepcopy(model).eval()
        for name in names:
            layer = self._model.get_submodule(name)
            replace_layer(self._model, layer, plain_layer(layer))
        self._layers = {name: self._model.get_submodule(name) for name in names}
        self._moments = all_moments(self._model, self._layers, images)
        self._norms = following_norms(self._model, self._layers, images)
        device = next(self._model.parameters()).device
        self._images = _first(batches(images, device), sensitivity_images)
        self._dense = self._predictions()

    def measure(self, name: str, schemes: Sequence[Scheme], keep: int = 2) -> tuple[list[Candidate], Sensitivity]:
        """Error curves of the most promising schemes of a layer, and the network's sensitivity to that layer's error.

        Args:
            name: The layer.
            schemes: The schemes to choose from.
            keep: How many to measure; they are shortlisted by their error in the weight metric at equal cost.
        """
        layer, norm = self._layers[name], self._norms.get(name)
        weight = effective_weight(layer).double()
        centred = norm is not None or layer.bias is not None
        problem = self._moments[name].regression(weight, centred)
        scale = output_scale(norm, weight)
        rows = scale.view(-1, 1, 1, 1)

        def fit(scheme: Scheme, rank: int) -> tuple[Tensor, float]:
            fitted = scheme.compose(fit_layer(scheme, rank, weight, problem, scale, _ITERATIONS))
            return fitted, float(relative_error(problem.target * rows, fitted * rows, problem.moment))

        candidates, fits = [], []
        for scheme in _shortlist(weight, schemes, keep):
            ranks = sorted({rank_at(scheme, share) for share in _SHARES})
            fits.append([fit(scheme, rank) for rank in ranks])
            candidates.append(Candidate(scheme, interpolate(ranks, [e for _, e in fits[-1]], useful_rank(scheme))))
        best = min(fits, key=lambda fitted: sum(math.log(max(error, _TINY)) for _, error in fitted) / len(fitted))
        points = []
        for fitted, error in best:
            with _changed(layer, norm, fitted, problem.bias(fitted) if centred else None):
                points.append((error, self._divergence()))
        return candidates, Sensitivity.through(points)

    @torch.no_grad()
    def _predictions(self) -> list[Tensor]:
        return [F.log_softmax(self._model(batch).flatten(1), 1) for batch in self._images]

    def _divergence(self) -> float:
        pairs = zip(self._predictions(), self._dense, strict=True)
        total = sum(float(F.kl_div(new, dense, log_target=True, reduction="sum")) for new, dense in pairs)
        return total / sum(len(batch) for batch in self._images)


@dataclass(frozen=True)
class Sensitivity:
    """Mean Kullback-Leibler divergence of the network's predictions, in nats, over one layer's relative error.

    Straight lines in log-log between measured points, and beyond them with the slope of all.
    """

    log_errors: Floats
    log_divergences: Floats

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Sensitivity:
        """The curve through ``(error, divergence)`` points, made rising."""
        ordered = np.log(np.maximum(np.array(sorted(points), dtype=np.float64), _TINY))
        return cls(ordered[:, 0], np.maximum.accumulate(ordered[:, 1]))

    def __call__(self, errors: Floats) -> Floats:
        """Divergence at each error."""
        x, y = self.log_errors, self.log_divergences
        slope = max(1.0, float(np.polyfit(x, y, 1)[0])) if np.ptp(x) > 0.1 else 1.0
        query = np.log(np.maximum(errors, _TINY))
        value = np.interp(query, x, y)
        value = np.where(query < x[0], y[0] + slope * (query - x[0]), value)
        value = np.where(query > x[-1], y[-1] + slope * (query - x[-1]), value)
        return cast(Floats, np.exp(value))


def _shortlist(weight: Tensor, schemes: Sequence[Scheme], keep: int) -> list[Scheme]:
    """The schemes with the least error in the weight metric, at one common cost."""

    def error(scheme: Scheme) -> float:
        found = scheme.nearest(weight, rank_at(scheme, _SHORTLIST_SHARE), sweeps=_SWEEPS)
        return float(relative_error(weight, scheme.compose(found)))

    return sorted(schemes, key=error)[:keep] if len(schemes) > keep else list(schemes)


def _first(items: Iterator[Tensor], count: int) -> list[Tensor]:
    """The first ``count`` images, in batches."""
    found: list[Tensor] = []
    for batch in items:
        found.append(batch[: count - sum(map(len, found))])
        if sum(map(len, found)) >= count:
            break
    return found


@contextmanager
@torch.no_grad()
def _changed(layer: nn.Module, norm: BatchNorm | None, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Within the context, ``layer`` multiplies by ``weight`` and its output is shifted by ``bias``."""
    shifted = cast(Tensor, layer.bias if layer.bias is not None else norm and norm.running_mean)
    saved = cast(Tensor, layer.weight).clone(), None if bias is None else shifted.clone()
    cast(Tensor, layer.weight).copy_(weight.view(cast(Tensor, layer.weight).shape))
    if bias is not None:
        shifted.add_(bias if layer.bias is not None else -bias)
    try:
        yield
    finally:
        cast(Tensor, layer.weight).copy_(saved[0])
        if saved[1] is not None:
            shifted.copy_(saved[1])
