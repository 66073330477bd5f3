"""Errors of layers in the metric of their outputs, and what these errors do to the network's output.

The relative error of layer ``l`` is ``e_l = tr(F D C D^T) / tr(F W C W^T)`` with ``D = W - W'`` (see
`arp_hub.calibration.layer_problem`). Its *sensitivity* is the divergence of the network's predictions with this layer
alone decomposed, over ``e_l``. One pass of gradients predicts the divergences of all layers, each at a middle rank (see
`arp_hub.calibration.gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..calibration.batchnorm import following_norms
from ..calibration.gradients import Substitute, gradient_moments, predicted_divergences
from ..calibration.images import LEAST_PIXELS, Images, batches
from ..calibration.layer_problem import LayerProblem, can_shift, fitted_together
from ..calibration.passes import all_moments
from ..effort import Effort
from ..layers.low_rank import effective_weight, low_rank_layer
from ..plan import LayerPlan
from ..processes import ALONE, Processes
from ..schemes import Factors, Scheme
from ..schemes.linalg import factorising, solving_device, stack_size
from .costs import Floats, rank_at, useful_rank
from .error_curves import Candidate, interpolate, rough_sweeps, shortlist, truncation_errors


class _RoughProblems:
    """Problems of like layers, solved well enough to plan by."""

    def __init__(self, problems: Mapping[str, LayerProblem], effort: Effort) -> None:
        self.problems, self.effort = problems, effort

    def fit(self, scheme: Scheme, rank: int, names: Sequence[str]) -> dict[str, Factors]:
        """Some of the layers roughly decomposed: all in common calls, or one by one if one of them cannot be."""
        try:
            found = self._fit(scheme, rank, names)
        except torch.linalg.LinAlgError:
            found = []
            for name in names:
                with factorising(name):
                    found += self._fit(scheme, rank, [name])
        return dict(zip(names, found, strict=True))

    def _fit(self, scheme: Scheme, rank: int, names: Sequence[str]) -> list[Factors]:
        problems, effort = [self.problems[name] for name in names], self.effort
        sweeps = rough_sweeps(scheme, problems[0].weight, rank)
        return fitted_together(problems, scheme, rank, effort.curve_iterations, effort.curve_macs, sweeps=sweeps)

    def curves(self, scheme: Scheme, names: Sequence[str]) -> dict[str, tuple[Floats, Factors | None]]:
        """The relative error at every rank, and the factors at the middle rank if they were fitted on the way."""
        last = useful_rank(scheme)
        known: dict[str, tuple[Floats, Factors | None]] = {}
        for name in names:
            problem = self.problems[name]
            with factorising(name):
                rows = problem.metric.in_blocks(scheme.blocks).apply(problem.weight / problem.unit)
                spectrum = scheme.spectrum(rows, problem.regression.moment)
            if spectrum is not None:
                known[name] = truncation_errors(spectrum)[:last], None
        if known:
            return known
        ranks = sorted({rank_at(scheme, share) for share in self.effort.curve_shares})
        fits = [self.fit(scheme, rank, names) for rank in ranks]
        middle = ranks.index(self.middle_rank(scheme))
        found: dict[str, tuple[Floats, Factors | None]] = {}
        for name in names:
            values = [self.problems[name].error(scheme.compose(fit[name])) for fit in fits]
            found[name] = interpolate(ranks, values, last), fits[middle][name]
        return found

    def middle_rank(self, scheme: Scheme) -> int:
        """The rank at which the sensitivity is measured: one of those that the error is measured at."""
        shares = self.effort.curve_shares
        return rank_at(scheme, shares[len(shares) // 2])

    def middle(self, scheme: Scheme, name: str, factors: Factors | None) -> _Middle:
        """One layer decomposed at the middle rank.

        Args:
            scheme: The scheme.
            name: The layer.
            factors: The factors, if they are known already.
        """
        problem, rank = self.problems[name], self.middle_rank(scheme)
        factors = factors or self.fit(scheme, rank, [name])[name]
        composed = scheme.compose(factors)
        shift = problem.bias(composed).cpu() if problem.can_shift else None
        plan = LayerPlan(scheme.name, rank, scheme.groups)
        return _Middle(plan, tuple(factor.cpu() for factor in factors), shift, problem.error(composed))


@dataclass(frozen=True)
class _Middle:
    """A layer decomposed at its middle rank, with tensors on the CPU, as processes exchange it.

    Attributes:
        plan: How the layer is decomposed.
        factors: Its factors.
        shift: The change of its mean output that its bias, or the BatchNorm behind it, will correct; None without one.
        error: Its relative error.
    """

    plan: LayerPlan
    factors: Factors
    shift: Tensor | None
    error: float

    def substitute(self, layer: nn.Module) -> Substitute:
        """What stands in for the dense layer."""
        new = low_rank_layer(layer, self.plan)
        new.load_factors(self.factors, cast("Tensor | None", layer.bias))
        if self.shift is None:
            return new
        shift = self.shift.to(effective_weight(layer))
        shift = shift if isinstance(layer, nn.Linear) else shift[:, None, None]
        return lambda x: new(x) + shift.to(x.dtype)


_Measured = tuple[list[tuple[int, Floats]], _Middle]
"""The curves of some of a layer's schemes, by their places among all of them; and the layer decomposed by the best."""


class OutputErrors:
    """Error curves of many layers in the metric of their outputs, and sensitivities of the layers.

    Args:
        model: The dense model, in evaluation mode for as long as this is used.
        layers: The layers in question by name.
        images: Calibration images. One forward pass is made over them, and two with gradients.
        macs: Multiply-accumulates of one image through the model.
        effort: Bounds on the work.
        processes: The processes that share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        images: Images,
        macs: float,
        effort: Effort,
        processes: Processes = ALONE,
    ) -> None:
        self._layers, self._effort, self._processes = layers, effort, processes
        pixels = math.prod(next(batches(images)).shape[2:])
        least = math.ceil(LEAST_PIXELS / pixels)
        most = max(least, int(effort.moment_macs / max(macs, 1.0)))
        self._norms = following_norms(model, layers, images)
        centred = {name for name, layer in layers.items() if can_shift(layer, self._norms.get(name))}
        self._moments = all_moments(model, layers, images, effort.curve_positions_macs, centred, most, processes)
        most = max(least, int(effort.gradient_macs / (3 * max(macs, 1.0))))  # a backward pass costs two forward passes
        self._gradients = gradient_moments(model, layers, images, effort.curve_positions_macs, most, processes)
        self._model, self._images, self._most = model, images, most
        self._middle: dict[str, _Middle] = {}

    def candidates(self, schemes: Mapping[str, Sequence[Scheme]]) -> Iterator[tuple[str, list[Candidate]]]:
        """Error curves of the most promising schemes of every layer, at the layer's own output.

        Args:
            schemes: The schemes to choose from, by layer. They are shortlisted by the error of the weight at equal
                cost.
        """
        # moments of D columns are factorised in D^3 operations, and fits take as many for each row of the weight
        weights = {name: effective_weight(self._layers[name]) for name in schemes}
        costs = {name: weight.numel() / len(weight) * weight.numel() for name, weight in weights.items()}
        stacks = {stack[0]: stack for stack in _stacks(weights, schemes)}

        stack_costs = {first: sum(costs[name] for name in stack) for first, stack in stacks.items()}
        for _, found in self._processes.shared_out(stack_costs, lambda first: self._measured(stacks[first], schemes)):
            for name, (curves, middle) in found.items():
                self._middle[name] = middle
                yield name, [Candidate(schemes[name][place], errors) for place, errors in curves]
        self._moments.clear()  # of layers that other processes have measured
        self._gradients.clear()

    def _measured(self, names: Sequence[str], schemes: Mapping[str, Sequence[Scheme]]) -> dict[str, _Measured]:
        """What is measured of like layers, each with a choice of its own among their ``schemes``."""
        problems, lists = {}, {}
        for name in names:
            layer, norm, gradients = self._layers[name], self._norms.get(name), self._gradients
            with factorising(name):  # popped, because the moments of all layers together take much memory
                problems[name] = LayerProblem.of(
                    layer, self._moments.pop(name), gradients.pop(name, None), norm, torch.float32, len(names)
                )
                weight = problems[name].weight
                weight = weight.to(solving_device(weight))  # layer by layer
                lists[name] = shortlist(weight, schemes[name], self._effort.schemes_measured)
        rough = _RoughProblems(problems, self._effort)
        found: dict[str, list[tuple[int, Floats, Factors | None]]] = {name: [] for name in names}
        for place, scheme in enumerate(schemes[names[0]]):
            if chosen := [name for name in names if schemes[name][place] in lists[name]]:
                for name, (errors, factors) in rough.curves(scheme, chosen).items():
                    found[name].append((place, errors, factors))
        return {name: _best(rough, name, schemes[name], of_layer) for name, of_layer in found.items()}

    def sensitivities(self) -> dict[str, float]:
        """The divergence of the network's predictions with one layer decomposed, over that layer's relative error.

        Layers that no gradient reaches are as sensitive as the others on average.
        """
        layers = {name: self._layers[name] for name in self._middle}
        substitutes = {name: middle.substitute(layers[name]) for name, middle in self._middle.items()}
        divergences = predicted_divergences(self._model, layers, substitutes, self._images, self._most, self._processes)
        # rounding alone gives about 1e-12 and 1e-6; the ratio of smaller numbers says nothing
        known = {name: max(value, 1e-12) / max(self._middle[name].error, 1e-6) for name, value in divergences.items()}
        mean = sum(known.values()) / len(known) if known else 1.0
        return {name: known.get(name, mean) for name in layers}


def _best(
    rough: _RoughProblems, name: str, schemes: Sequence[Scheme], found: Sequence[tuple[int, Floats, Factors | None]]
) -> _Measured:
    """The curves of a layer, and the layer decomposed by the scheme with the lowest error at its middle rank."""

    def at_middle(one: tuple[int, Floats, Factors | None]) -> float:
        return float(one[1][rough.middle_rank(schemes[one[0]]) - 1])

    place, _, factors = min(found, key=at_middle)
    return [(place, errors) for place, errors, _ in found], rough.middle(schemes[place], name, factors)


def _stacks(weights: Mapping[str, Tensor], schemes: Mapping[str, Sequence[Scheme]]) -> list[list[str]]:
    """Names of layers that are fitted together: of one shape, with the same schemes, as many as the device suits."""
    stacks: list[list[str]] = []
    filling: dict[object, list[str]] = {}
    for name, choices in schemes.items():
        weight, like = weights[name], tuple((one.name, one.groups, one.shape.groups) for one in choices)
        kind = weight.shape, weight.device, like
        if kind not in filling or len(filling[kind]) >= stack_size(weight):
            filling[kind] = []
            stacks.append(filling[kind])
        filling[kind].append(name)
    return stacks
