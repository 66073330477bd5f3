"""How much error each way to decompose a layer makes, over its rank: what a budget is spent by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ._memory import give_back_memory
from .calibration import LEAST_PIXELS, Images, all_moments, batches, following_norms
from .costs import Floats, rank_at, useful_rank
from .fitting import fit_layer, output_scale
from .layers import effective_weight, low_rank_layer
from .linalg import tail_shares
from .moments import Regression
from .plan import LayerPlan, RankPlan
from .schemes import Factors, Scheme, energy, relative_error
from .sensitivity import OutputProbe, Substitute
from .shapes import LayerShape, degrees_of_freedom

_SHARES, _FEW_SHARES = (0.08, 0.18, 0.35, 0.6), (0.2, 0.5)
"""Parameter shares at which the error of a scheme without closed-form spectrum is measured in the metric of outputs."""
_LARGE = 1024
"""Columns of a weight, and of its second moment, beyond which the few shares must do."""
_MEASURED_SHARE, _LARGE_MEASURED_SHARE, _LEAST_SHARE = 0.4, 0.15, 0.05
"""The one share at which it is measured in the weight metric, that for so many columns, where a rank costs more (what
it gains on its bound grows linearly, so that it tells as much), and the least share of the bound that is believed."""
_SHORTLIST_SHARE = 0.3
_LEAST_SWEEPS, _SWEEP_WORK, _MOST_SWEEP_WORK = 2, 5e8, 2e10
"""Multiply-accumulates that bound the sweeps of a nearest point, but to no fewer than so many, and a bound on these."""
_ITERATIONS, _WORK, _LARGE_WORK = 25, 2e9, 5e8
"""Iterations of a fit, and the multiply-accumulates that bound them: of a small layer, and of a large one."""
_PROBED_SHARE, _LARGE_PROBED_SHARE = _SHARES[2], _FEW_SHARES[1]
"""Parameter share at which a layer alone is put into the network: one of those at which it is fitted anyway."""
_MOMENT_WORK = 3e11
"""Multiply-accumulates that bound the pass that second moments are taken in."""
_LEAST_ERROR, _LEAST_DIVERGENCE = 1e-6, 1e-12
"""The least error of its own, and divergence of the network, that are believed of a layer."""
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


def below(bound: Floats, rank: int, value: float) -> Floats:
    """A curve below ``bound``, of which one point is measured: its share of the bound falls linearly from 1 at rank 0.

    So the error of CP behaves beside that of the slices that it starts from, within a few per cent.
    """
    slope = (1 - min(value / max(bound[rank - 1], _TINY), 1)) / rank
    share = np.maximum(1 - slope * np.arange(1, len(bound) + 1), _LEAST_SHARE)
    return cast(Floats, np.minimum.accumulate(bound * share))


def shape_candidates(schemes: Sequence[Scheme]) -> list[Candidate]:
    """What stands for the error curves of a layer whose weight is not there: the degrees of freedom that a rank costs.

    As if all weights of the layer's shape were equally likely.
    """
    return [Candidate(scheme, _shape_curve(scheme)) for scheme in schemes]


def _shape_curve(scheme: Scheme) -> Floats:
    freedom = [degrees_of_freedom(scheme.convs(rank)) for rank in range(1, useful_rank(scheme) + 1)]
    return np.clip(1 - np.array(freedom) / scheme.shape.params, 0.0, 1.0)


def weight_candidates(weight: Tensor, schemes: Sequence[Scheme]) -> list[Candidate]:
    """The error curves of a layer in the metric of its weights."""
    return [Candidate(scheme, _weight_curve(scheme, weight)) for scheme in schemes]


def _weight_curve(scheme: Scheme, weight: Tensor) -> Floats:
    last = useful_rank(scheme)
    spectrum = scheme.spectrum(weight)
    if spectrum is not None:
        return _tail(spectrum)[:last]
    rank = rank_at(scheme, _MEASURED_SHARE if weight[0].numel() <= _LARGE else _LARGE_MEASURED_SHARE)
    known = scheme.cold_start(weight, rank)
    assert known is not None  # a scheme has a spectrum or a cold start
    start, bound = known[0], _floats(known[1])[:last]
    sweeps = _sweeps(scheme, weight, rank)
    if sweeps < _LEAST_SWEEPS:  # a single one gains too little
        return bound
    found = scheme.nearest(weight, rank, scheme.basis(start), sweeps)
    return below(bound, rank, float(relative_error(weight, scheme.compose(found))))


def _tail(spectrum: Tensor) -> Floats:
    """Share of the energy that a truncation to rank 1, 2, .. loses."""
    return _floats(tail_shares(spectrum.double().square().sum(0)))


def _floats(errors: Tensor) -> Floats:
    return np.maximum(errors.double().cpu().numpy(), 0.0)


def _sweeps(scheme: Scheme, weight: Tensor, rank: int) -> int:
    work = 2 * rank * weight.numel()
    least = max(1, min(_LEAST_SWEEPS, int(_MOST_SWEEP_WORK / work)))
    return max(1, min(scheme.rough_sweeps, max(least, int(_SWEEP_WORK / work))))


@dataclass(frozen=True)
class _LayerProblem:
    """What there is to fit of one layer."""

    layer: nn.Module
    weight: Tensor
    regression: Regression
    scale: Tensor
    centred: bool

    @property
    def large(self) -> bool:
        """Whether the few shares and less work must do."""
        return self.regression.moment.shape[-1] > _LARGE

    def fit(self, scheme: Scheme, rank: int) -> Factors:
        """The layer roughly decomposed."""
        sweeps = _sweeps(scheme, self.weight, rank)
        weight, problem, scale = self.weight, self.regression, self.scale
        work = _LARGE_WORK if self.large else _WORK
        return fit_layer(scheme, rank, weight, problem, scale, _ITERATIONS, work, least=0, sweeps=sweeps)

    def error(self, composed: Tensor) -> float:
        """Relative error in the metric of the layer's inputs, output channels scaled as the BatchNorm behind does."""
        lost = energy((self.weight - composed) * self.scale.view(-1, 1, 1, 1), self.regression.moment)
        return float(lost / self._energy)

    @cached_property
    def _energy(self) -> Tensor:
        scaled = self.weight * self.scale.view(-1, 1, 1, 1)
        return energy(scaled, self.regression.moment).clamp_min(torch.finfo(scaled.dtype).tiny)

    def curve(self, scheme: Scheme) -> tuple[Floats, Factors | None]:
        """The error at every rank, and the factors at the probed one, if they were fitted on the way."""
        last, moment = useful_rank(scheme), self.regression.moment
        spectrum = scheme.spectrum(self.weight * self.scale.view(-1, 1, 1, 1), moment)
        if spectrum is not None:
            return _tail(spectrum)[:last], None
        shares = _FEW_SHARES if self.large else _SHARES
        ranks, values, probed = sorted({rank_at(scheme, share) for share in shares}), [], None
        for rank in ranks:
            factors = self.fit(scheme, rank)
            values.append(self.error(scheme.compose(factors)))
            probed = factors if rank == self.probed_rank(scheme) else probed
        return interpolate(ranks, values, last), probed

    def probed_rank(self, scheme: Scheme) -> int:
        """The rank at which the layer alone is put into the network."""
        return rank_at(scheme, _LARGE_PROBED_SHARE if self.large else _PROBED_SHARE)

    def substitute(self, scheme: Scheme, rank: int, factors: Factors) -> Substitute:
        """What does the layer's work by its factors; the mean output stays right if something will see to that."""
        new = low_rank_layer(self.layer, LayerPlan(scheme.name, rank, scheme.groups))
        new.load_factors(factors, cast("Tensor | None", self.layer.bias))
        if not self.centred:
            return new
        shift = self.regression.bias(scheme.compose(factors))
        shift = shift if scheme.shape.kind == "linear" else shift[:, None, None]
        return lambda x: new(x) + shift.to(x.dtype)


class OutputErrors:
    """Error curves of many layers in the metric of their outputs, and what the layers do to the network's output.

    Args:
        model: The dense model, in evaluation mode for as long as this is used.
        layers: The layers in question by name.
        images: Calibration images; one pass is made over them, and one over a few of them for every layer.
        macs: Multiply-accumulates of one image through the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], images: Images, macs: float) -> None:
        self._layers = layers
        pixels = math.prod(next(batches(images)).shape[2:])
        most = max(math.ceil(LEAST_PIXELS / pixels), int(_MOMENT_WORK / max(macs, 1.0)))
        self._moments = all_moments(model, layers, images, roughly=True, most=most)
        self._norms = following_norms(model, layers, images)
        self._probe = OutputProbe(model, images, macs * len(layers))
        self._at_hand: tuple[str, _LayerProblem] | None = None
        self._probed: dict[str, tuple[Scheme, Factors | None]] = {}
        self._schemes: dict[tuple[str, str, int], Scheme] = {}

    def candidates(self, name: str, schemes: Sequence[Scheme], keep: int = 2) -> list[Candidate]:
        """Error curves of the most promising schemes of a layer, at the layer's own output.

        Args:
            name: The layer.
            schemes: The schemes to choose from.
            keep: How many to measure; they are shortlisted by their error in the weight metric at equal cost.
        """
        problem = self._problem(name)
        found, fitted = [], {}
        for scheme in _shortlist(problem.weight, schemes, keep):
            errors, fitted[scheme] = problem.curve(scheme)
            found.append(Candidate(scheme, errors))
        best = min(found, key=lambda one: one.errors[problem.probed_rank(one.scheme) - 1]).scheme
        self._probed[name] = best, fitted[best]
        self._schemes |= {(name, one.scheme.name, one.scheme.groups): one.scheme for one in found}
        return found

    def importance(self, name: str, plan: RankPlan) -> float:
        """How much a layer matters: the divergence of the output with it alone decomposed, over its own error.

        Args:
            name: The layer.
            plan: Which layers will stay dense: the BatchNorms behind them follow, as they do in the end.
        """
        problem, (scheme, factors) = self._problem(name), self._probed[name]
        rank = problem.probed_rank(scheme)
        factors = factors or problem.fit(scheme, rank)
        substitute = {self._layers[name]: problem.substitute(scheme, rank, factors)}
        divergence = self._probe.divergence(substitute, self._adapting({name, *plan.layers}))
        if not math.isfinite(divergence):
            return 1.0
        return max(divergence, _LEAST_DIVERGENCE) / max(problem.error(scheme.compose(factors)), _LEAST_ERROR)

    def divergence(self, plan: RankPlan) -> float:
        """How far the network's output goes with all layers of a plan roughly decomposed, each on its own."""
        substitutes = {}
        for name, layer in plan.layers.items():
            scheme, problem = self._schemes[name, layer.scheme, layer.groups], self._problem(name)
            factors = problem.fit(scheme, layer.rank)
            substitutes[self._layers[name]] = problem.substitute(scheme, layer.rank, factors)
        divergence = self._probe.divergence(substitutes, self._adapting(plan.layers))
        return divergence if math.isfinite(divergence) else math.inf

    def _problem(self, name: str) -> _LayerProblem:
        """What there is to fit of a layer, made anew unless it is at hand: all of them together take much memory."""
        if self._at_hand is None or self._at_hand[0] != name:
            was_large = self._at_hand is not None and self._at_hand[1].large
            self._at_hand = None
            if was_large:
                give_back_memory()
            layer, norm = self._layers[name], self._norms.get(name)
            centred = norm is not None or layer.bias is not None
            weight = effective_weight(layer).float()
            regression = self._moments[name].regression(weight, centred)
            self._at_hand = name, _LayerProblem(layer, weight, regression, output_scale(norm, weight), centred)
        return self._at_hand[1]

    def _adapting(self, decomposed: Iterable[str]) -> frozenset[BatchNorm]:
        """The BatchNorms that are not behind decomposed layers."""
        return self._probe.norms - {self._norms[name] for name in decomposed if name in self._norms}


def _shortlist(weight: Tensor, schemes: Sequence[Scheme], keep: int) -> list[Scheme]:
    """The schemes with the least error in the weight metric, at one common cost."""

    def error(scheme: Scheme) -> float:
        return float(_weight_curve(scheme, weight)[rank_at(scheme, _SHORTLIST_SHARE) - 1])

    return sorted(schemes, key=error)[:keep] if len(schemes) > keep else list(schemes)
