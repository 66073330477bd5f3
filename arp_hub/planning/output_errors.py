"""Errors of layers in the metric of their outputs, and what these errors do to the network's output.

The relative error of layer ``l`` is ``e_l = tr(F D C D^T) / tr(F W C W^T)`` with ``D = W - W'`` (see
`arp_hub.calibration.layer_problem`). Its *sensitivity* is the divergence of the network's output with this layer alone
decomposed, over ``e_l``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..calibration.batchnorm import following_norms
from ..calibration.images import LEAST_PIXELS, Images, batches
from ..calibration.layer_problem import LayerProblem, can_shift
from ..calibration.output_metric import gradient_moments
from ..calibration.passes import all_moments
from ..effort import Effort
from ..layers.low_rank import low_rank_layer
from ..plan import LayerPlan, RankPlan
from ..schemes import Factors, Scheme
from .costs import Floats, rank_at, useful_rank
from .error_curves import Candidate, interpolate, rough_sweeps, shortlist, truncation_errors
from .output_probe import OutputProbe, Substitute


class _RoughProblem:
    """A layer's problem, solved well enough to plan by."""

    def __init__(self, problem: LayerProblem, effort: Effort) -> None:
        self.problem, self.effort = problem, effort

    def fit(self, scheme: Scheme, rank: int) -> Factors:
        """The layer roughly decomposed."""
        sweeps = rough_sweeps(scheme, self.problem.weight, rank)
        return self.problem.fit(scheme, rank, self.effort.curve_iterations, self.effort.curve_macs, sweeps=sweeps)

    def curve(self, scheme: Scheme) -> tuple[Floats, Factors | None]:
        """The relative error at every rank, and the factors at the probed rank if they were fitted on the way."""
        problem, last = self.problem, useful_rank(scheme)
        rows = problem.metric.in_blocks(scheme.blocks).apply(problem.weight)
        spectrum = scheme.spectrum(rows, problem.regression.moment)
        if spectrum is not None:
            return truncation_errors(spectrum)[:last], None
        ranks = sorted({rank_at(scheme, share) for share in self.effort.curve_shares})
        values, probed = [], None
        for rank in ranks:
            factors = self.fit(scheme, rank)
            values.append(problem.error(scheme.compose(factors)))
            probed = factors if rank == self.probed_rank(scheme) else probed
        return interpolate(ranks, values, last), probed

    def probed_rank(self, scheme: Scheme) -> int:
        """The rank at which the sensitivity is measured: one of those that the error is measured at."""
        shares = self.effort.curve_shares
        return rank_at(scheme, shares[len(shares) // 2])

    def substitute(self, scheme: Scheme, rank: int, factors: Factors) -> Substitute:
        """The decomposed layer, with its mean output corrected if the final decomposition will correct it."""
        layer = self.problem.layer
        new = low_rank_layer(layer, LayerPlan(scheme.name, rank, scheme.groups))
        new.load_factors(factors, cast("Tensor | None", layer.bias))
        if not self.problem.can_shift:
            return new
        shift = self.problem.bias(scheme.compose(factors))
        shift = shift if scheme.shape.kind == "linear" else shift[:, None, None]
        return lambda x: new(x) + shift.to(x.dtype)


class OutputErrors:
    """Error curves of many layers in the metric of their outputs, and sensitivities of the layers.

    Args:
        model: The dense model, in evaluation mode for as long as this is used.
        layers: The layers in question by name.
        images: Calibration images. One pass is made over them, and one over a few of them for every layer.
        macs: Multiply-accumulates of one image through the model.
        effort: Bounds on the work.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], images: Images, macs: float, effort: Effort
    ) -> None:
        self._layers, self._effort = layers, effort
        pixels = math.prod(next(batches(images)).shape[2:])
        least = math.ceil(LEAST_PIXELS / pixels)
        most = max(least, int(effort.moment_macs / max(macs, 1.0)))
        self._norms = following_norms(model, layers, images)
        centred = {name for name, layer in layers.items() if can_shift(layer, self._norms.get(name))}
        self._moments = all_moments(model, layers, images, effort.curve_positions_macs, centred, most)
        most = max(least, int(effort.gradient_macs / (3 * max(macs, 1.0))))  # a backward pass costs two forward passes
        self._gradients = gradient_moments(model, layers, images, effort.curve_positions_macs, most)
        self._probe = OutputProbe(model, images, macs * len(layers), effort)
        self._at_hand: tuple[str, _RoughProblem] | None = None
        self._probed: dict[str, tuple[Scheme, Factors | None]] = {}
        self._schemes: dict[tuple[str, str, int], Scheme] = {}

    def candidates(self, name: str, schemes: Sequence[Scheme]) -> list[Candidate]:
        """Error curves of the most promising schemes of a layer, at the layer's own output.

        Args:
            name: The layer.
            schemes: The schemes to choose from; they are shortlisted by the error of the weight at equal cost.
        """
        problem = self._problem(name)
        found, fitted = [], {}
        for scheme in shortlist(problem.problem.weight, schemes, self._effort.schemes_measured):
            errors, fitted[scheme] = problem.curve(scheme)
            found.append(Candidate(scheme, errors))
        best = min(found, key=lambda one: one.errors[problem.probed_rank(one.scheme) - 1]).scheme
        self._probed[name] = best, fitted[best]
        self._schemes |= {(name, one.scheme.name, one.scheme.groups): one.scheme for one in found}
        return found

    def sensitivity(self, name: str, plan: RankPlan) -> float:
        """The divergence of the network's output with one layer decomposed, over that layer's relative error.

        Args:
            name: The layer.
            plan: Says which layers will stay dense: the BatchNorms behind these follow, as they will in the end.
        """
        problem, (scheme, factors) = self._problem(name), self._probed[name]
        rank = problem.probed_rank(scheme)
        factors = factors or problem.fit(scheme, rank)
        substitute = {self._layers[name]: problem.substitute(scheme, rank, factors)}
        divergence = self._probe.divergence(substitute, self._adapting({name, *plan.layers}))
        if not math.isfinite(divergence):
            return 1.0
        # rounding alone gives about 1e-12 and 1e-6; the ratio of smaller numbers says nothing
        return max(divergence, 1e-12) / max(problem.problem.error(scheme.compose(factors)), 1e-6)

    def divergence(self, plan: RankPlan) -> float:
        """The divergence of the network's output with all layers of a plan decomposed, each fitted on its own."""
        substitutes = {}
        for name, layer in plan.layers.items():
            scheme, problem = self._schemes[name, layer.scheme, layer.groups], self._problem(name)
            factors = problem.fit(scheme, layer.rank)
            substitutes[self._layers[name]] = problem.substitute(scheme, layer.rank, factors)
        divergence = self._probe.divergence(substitutes, self._adapting(plan.layers))
        return divergence if math.isfinite(divergence) else math.inf

    def _problem(self, name: str) -> _RoughProblem:
        """The problem of a layer. Only the last one is kept: all of them together take much memory."""
        if self._at_hand is None or self._at_hand[0] != name:
            self._at_hand = None
            problem = LayerProblem.of(
                self._layers[name],
                self._moments[name],
                self._gradients.get(name),
                self._norms.get(name),
                torch.float32,
            )
            self._at_hand = name, _RoughProblem(problem, self._effort)
        return self._at_hand[1]

    def _adapting(self, decomposed: Iterable[str]) -> frozenset[BatchNorm]:
        """The BatchNorms that are not behind decomposed layers."""
        return self._probe.norms - {self._norms[name] for name in decomposed if name in self._norms}
