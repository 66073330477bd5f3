"""Errors of layers in the metric of their outputs, and what these errors do to the network's output.

The relative error of layer ``l`` is ``e_l = tr(F D C D^T) / tr(F W C W^T)`` with ``D = W - W'`` (see
`arp_hub.calibration.layer_problem`). Its *sensitivity* is the divergence of the network's predictions with this layer
alone decomposed, over ``e_l``. One pass of gradients predicts the divergences of all layers, each at a middle rank (see
`arp_hub.calibration.gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..calibration.batchnorm import following_norms
from ..calibration.gradients import Substitute, gradient_moments, predicted_divergences
from ..calibration.images import LEAST_PIXELS, Images, batches
from ..calibration.layer_problem import LayerProblem, can_shift
from ..calibration.passes import all_moments
from ..effort import Effort
from ..layers.low_rank import low_rank_layer
from ..plan import LayerPlan
from ..schemes import Factors, Scheme
from .costs import Floats, rank_at, useful_rank
from .error_curves import Candidate, interpolate, rough_sweeps, shortlist, truncation_errors


class _RoughProblem:
    """A layer's problem, solved well enough to plan by."""

    def __init__(self, problem: LayerProblem, effort: Effort) -> None:
        self.problem, self.effort = problem, effort

    def fit(self, scheme: Scheme, rank: int) -> Factors:
        """The layer roughly decomposed."""
        sweeps = rough_sweeps(scheme, self.problem.weight, rank)
        return self.problem.fit(scheme, rank, self.effort.curve_iterations, self.effort.curve_macs, sweeps=sweeps)

    def curve(self, scheme: Scheme) -> tuple[Floats, Factors | None]:
        """The relative error at every rank, and the factors at the middle rank if they were fitted on the way."""
        problem, last = self.problem, useful_rank(scheme)
        rows = problem.metric.in_blocks(scheme.blocks).apply(problem.weight / problem.unit)
        spectrum = scheme.spectrum(rows, problem.regression.moment)
        if spectrum is not None:
            return truncation_errors(spectrum)[:last], None
        ranks = sorted({rank_at(scheme, share) for share in self.effort.curve_shares})
        values, probed = [], None
        for rank in ranks:
            factors = self.fit(scheme, rank)
            values.append(problem.error(scheme.compose(factors)))
            probed = factors if rank == self.middle_rank(scheme) else probed
        return interpolate(ranks, values, last), probed

    def middle_rank(self, scheme: Scheme) -> int:
        """The rank at which the sensitivity is measured: one of those that the error is measured at."""
        shares = self.effort.curve_shares
        return rank_at(scheme, shares[len(shares) // 2])

    def middle(self, scheme: Scheme, factors: Factors | None) -> tuple[float, Substitute]:
        """Relative error and decomposed layer at the middle rank, its mean output corrected if it will be in the end.

        Args:
            scheme: The scheme.
            factors: The factors, if they are known already.
        """
        rank, layer = self.middle_rank(scheme), self.problem.layer
        factors = factors or self.fit(scheme, rank)
        composed = scheme.compose(factors)
        new = low_rank_layer(layer, LayerPlan(scheme.name, rank, scheme.groups))
        new.load_factors(factors, cast("Tensor | None", layer.bias))
        error = self.problem.error(composed)
        if not self.problem.can_shift:
            return error, new
        shift = self.problem.bias(composed)
        shift = shift if scheme.shape.kind == "linear" else shift[:, None, None]
        return error, lambda x: new(x) + shift.to(x.dtype)


class OutputErrors:
    """Error curves of many layers in the metric of their outputs, and sensitivities of the layers.

    Args:
        model: The dense model, in evaluation mode for as long as this is used.
        layers: The layers in question by name.
        images: Calibration images. One forward pass is made over them, and two with gradients.
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
        self._model, self._images, self._most = model, images, most
        self._middle: dict[str, tuple[float, Substitute]] = {}

    def candidates(self, name: str, schemes: Sequence[Scheme]) -> list[Candidate]:
        """Error curves of the most promising schemes of a layer, at the layer's own output.

        Args:
            name: The layer.
            schemes: The schemes to choose from; they are shortlisted by the error of the weight at equal cost.
        """
        # popped, because the moments of all layers together take much memory
        moments, gradients = self._moments.pop(name), self._gradients.pop(name, None)
        layer = LayerProblem.of(self._layers[name], moments, gradients, self._norms.get(name), torch.float32)
        problem = _RoughProblem(layer, self._effort)
        found, fitted = [], {}
        for scheme in shortlist(layer.weight, schemes, self._effort.schemes_measured):
            errors, fitted[scheme] = problem.curve(scheme)
            found.append(Candidate(scheme, errors))
        best = min(found, key=lambda one: one.errors[problem.middle_rank(one.scheme) - 1]).scheme
        self._middle[name] = problem.middle(best, fitted[best])
        return found

    def sensitivities(self) -> dict[str, float]:
        """The divergence of the network's predictions with one layer decomposed, over that layer's relative error.

        Layers that no gradient reaches are as sensitive as the others on average.
        """
        substitutes = {name: substitute for name, (_, substitute) in self._middle.items()}
        layers = {name: self._layers[name] for name in substitutes}
        divergences = predicted_divergences(self._model, layers, substitutes, self._images, self._most)
        # rounding alone gives about 1e-12 and 1e-6; the ratio of smaller numbers says nothing
        known = {name: max(value, 1e-12) / max(self._middle[name][0], 1e-6) for name, value in divergences.items()}
        mean = sum(known.values()) / len(known) if known else 1.0
        return {name: known.get(name, mean) for name in layers}
