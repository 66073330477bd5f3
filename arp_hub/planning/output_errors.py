"""Error curves of layers in the metric of their outputs, and what layers do to the network's output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .._utils.torch_utils import give_back_memory
from ..calibration.batchnorm import following_norms
from ..calibration.images import LEAST_PIXELS, Images, batches
from ..calibration.passes import all_moments
from ..calibration.regression import Regression, fit_layer, output_scale
from ..layers.low_rank import effective_weight, low_rank_layer
from ..plan import LayerPlan, RankPlan
from ..schemes import Factors, Scheme, energy
from .costs import Floats, rank_at, useful_rank
from .error_curves import LARGE, Candidate, interpolate, rough_sweeps, shortlist, truncation_errors
from .output_probe import OutputProbe, Substitute

_SHARES, _FEW_SHARES = (0.08, 0.18, 0.35, 0.6), (0.2, 0.5)
"""Parameter shares at which the error of a scheme without closed-form spectrum is measured in the metric of outputs."""
_ITERATIONS, _WORK, _LARGE_WORK = 25, 2e9, 5e8
"""Iterations of a fit, and the multiply-accumulates that bound them: of a small layer, and of a large one."""
_PROBED_SHARE, _LARGE_PROBED_SHARE = _SHARES[2], _FEW_SHARES[1]
"""Parameter share at which a layer alone is put into the network: one of those at which it is fitted anyway."""
_MOMENT_WORK = 3e11
"""Multiply-accumulates that bound the pass that second moments are taken in."""
_LEAST_ERROR, _LEAST_DIVERGENCE = 1e-6, 1e-12
"""The least error of its own, and divergence of the network, that are believed of a layer."""


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
        return self.regression.moment.shape[-1] > LARGE

    def fit(self, scheme: Scheme, rank: int) -> Factors:
        """The layer roughly decomposed."""
        sweeps = rough_sweeps(scheme, self.weight, rank)
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
            return truncation_errors(spectrum)[:last], None
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
        for scheme in shortlist(problem.weight, schemes, keep):
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
