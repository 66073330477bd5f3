"""The adaptive rank penalty: pulls every planned layer onto its scheme's low-rank set while a task loss trains it.

The relative violation of a layer is the squared distance of its weight to the set of weights that the scheme can
represent at its rank, over the weight's squared norm. Every few optimiser steps every layer moves a share of the way
to (an up-to-date estimate of) its nearest point in that set. The share is the layer's own and adapts to its own
violation. After the ramp comes the hold, in which the share is 1: weights stay exactly low-rank while the task loss
goes on, so that the decomposition that follows loses nothing.

The penalty depends on weights alone and is deterministic: with data parallelism every process does the same work on
the same weights and ends with the same weights, without communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import ArpHubError
from .plan import RankPlan
from .schemes import Factors, Scheme, relative_error
from .structure import check_plan

Phase = Literal["ramp", "hold", "done"]
Method = Literal["tracking", "dual"]

_END_OF_RAMP = 1e-4
"""Target violation at the end of the ramp, relative to the one at its start."""
_DUAL_RATE, _DUAL_GROWTH, _DUAL_PROGRESS = 0.02, 1.02, 0.99
"""Dual ascent: gain per step, and its growth in steps in which the violation falls by less than 1 %."""
_METRIC_ITERATIONS = 2
_EVERY, _LEAST_PULLS = 8, 10
"""Steps from one pull to the next, and the pulls of a training that is too short for so many steps between them."""
_CHECK_EVERY = 50
"""Pulls between two looks for NaN on an accelerator, where a look stops the pipeline; on a CPU every pull looks."""


@dataclass
class _Layer:
    """One planned layer and what the penalty remembers of it."""

    name: str
    weight: nn.Parameter
    scheme: Scheme
    rank: int
    moment: Tensor | None
    factors: Factors | None = None
    start: Tensor | None = None
    violation: Tensor | None = None
    strength: Tensor | None = None
    rate: Tensor | None = None

    def dense_weight(self) -> Tensor:
        weight = self.weight.detach()
        return (weight if weight.dim() == 4 else weight[..., None, None]).float()

    def project(self, weight: Tensor) -> Tensor:
        """Bring the factors up to date with ``weight`` and return the point of the set that they stand for."""
        if self.factors is None:
            self.factors = self.scheme.nearest(weight, self.rank)
        elif self.moment is None:
            self.factors = self.scheme.nearest(weight, self.rank, start=self.factors)
        if self.moment is not None:
            self.factors = self.scheme.fit(weight, self.moment, self.factors, _METRIC_ITERATIONS)
        return self.scheme.compose(self.factors)


class AdaptiveRankPenalty:
    """Pulls the planned layers of a model to their ranks, exactly so at the end.

    With ``total_steps=1000`` and ``ramp=0.65``, steps 1 to 650 are the ramp, 651 to 1000 the hold.

    Args:
        model: The dense model in training (unwrapped, if it is wrapped for data parallelism).
        plan: A plan made for it.
        total_steps: Optimiser steps of the whole training.
        ramp: Share of the steps in which the violation falls; the rest is the hold. 0 holds from the first step.
        method: How the strength adapts. ``"tracking"``: the target violation falls log-linearly to 1e-4 of its
            start; a layer above its target is pulled just as far as the target asks, one below is let go.
            ``"dual"``: dual ascent; the strength grows with the layer's violation, faster where it does not fall.
        moments: Second moments of the layers' inputs, ``(G, I kh kw, I kh kw)`` by name: measure distances in the
            layers' outputs instead of in the weights. By default the weight metric.
        factors: Factors to start from, as a fit of the same plan gives them; by default the nearest point.
        every: Steps from one pull to the next; by default 8, or a tenth of a shorter training. A pull makes up for the
            steps left out, so that only the cost changes; the hold always begins and ends with one.

    Raises:
        ArpHubError: If the plan does not fit the model, the schedule leaves no step for the hold, or ``every`` is no
            whole number of at least 1.

    Example:
        >>> penalty = AdaptiveRankPenalty(model, plan, total_steps=len(loader) * epochs)
        >>> for images, labels in loader:
        ...     loss(model(images), labels).backward()
        ...     optimizer.step()
        ...     penalty.step()
        ...     optimizer.zero_grad()
        >>> decompose(model, plan, factors=penalty.factors())
    """

    def __init__(
        self,
        model: nn.Module,
        plan: RankPlan,
        *,
        total_steps: int,
        ramp: float = 0.65,
        method: Method = "tracking",
        moments: Mapping[str, Tensor] | None = None,
        factors: Mapping[str, Factors] | None = None,
        every: int | None = None,
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ArpHubError(f"every must be a whole number of at least 1, got {every!r}")
        if method not in ("tracking", "dual"):
            raise ArpHubError(f"unknown method {method!r}: choose 'tracking' or 'dual'")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ArpHubError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if not 0 <= ramp < 1:
            raise ArpHubError(f"ramp must be at least 0 and below 1, got {ramp}: the rest of the steps is the hold")
        self.total_steps, self.ramp_steps, self.method = total_steps, math.ceil(ramp * total_steps), method
        self.every = every or min(_EVERY, max(1, total_steps // _LEAST_PULLS))
        if self.ramp_steps >= total_steps:
            raise ArpHubError(
                f"a ramp of {ramp} over {total_steps} steps leaves no step for the hold: "
                "lower ramp or train for more steps"
            )
        self.step_count = self._pulls = 0
        self._off = False
        """Whether the weights have been trained in the hold since they were last low-rank."""
        self._layers = []
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, scheme in check_plan(model, plan).items():
            weight = modules[name].weight
            if not isinstance(weight, nn.Parameter) or type(modules[name]).__name__.startswith(("Std", "Scaled")):
                raise ArpHubError(
                    f"layer '{name}' is a {type(modules[name]).__name__}, whose weight is standardised on every pass: "
                    "decompose it without the penalty, or exclude it from the plan"
                )
            self._layers.append(
                _Layer(
                    name,
                    weight,
                    scheme,
                    plan.layers[name].rank,
                    None if moments is None else _moment(name, scheme, moments).to(weight.device, torch.float32),
                    None if factors is None else _start_factors(name, scheme, plan, factors, weight),
                )
            )
        if not self._layers:
            raise ArpHubError("the plan decomposes no layer: there is nothing to pull")

    @property
    def phase(self) -> Phase:
        """Phase of the coming step."""
        if self.step_count >= self.total_steps:
            return "done"
        return "ramp" if self.step_count < self.ramp_steps else "hold"

    @torch.no_grad()
    def step(self) -> None:
        """Pull every planned layer. Call it after each step of the optimiser.

        Raises:
            ArpHubError: If a weight is NaN or infinite.
        """
        holding = self.step_count >= self.ramp_steps
        due = self.step_count % self.every == 0 or self.step_count in (self.ramp_steps, self.total_steps - 1)
        self.step_count += 1
        self._off |= holding
        if due:
            self._pull(holding)

    def _pull(self, holding: bool) -> None:
        """Move every layer to its target: all of the way in the hold."""
        self._pulls += 1
        if self._layers[0].weight.device.type == "cpu" or self._pulls % _CHECK_EVERY == 1:
            self._check_finite()
        for layer in self._layers:
            weight = layer.dense_weight()
            nearest = layer.project(weight)
            violation = relative_error(weight, nearest, layer.moment)
            share = None if holding else self._share(layer, violation)
            layer.violation = torch.zeros_like(violation) if holding else violation
            target = nearest if share is None else torch.lerp(weight, nearest, share)
            layer.weight.copy_(target.view(layer.weight.shape))
        self._off = False

    def violations(self) -> dict[str, float]:
        """Relative violation of every planned layer, between 0 and 1, as the last step found it (0 in the hold).

        Raises:
            ArpHubError: If `step` was never called, or a weight is NaN or infinite.
        """
        self._require_steps()
        self._check_finite()
        return {layer.name: float(cast(Tensor, layer.violation)) for layer in self._layers}

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """The factors of every planned layer, which reproduce its weight exactly. For `decompose`.

        Between two pulls of the hold the weights are brought back onto the low-rank set first.

        Raises:
            ArpHubError: If the hold has not begun, so that there are no exact factors yet.
        """
        self._require_steps()
        if self.step_count <= self.ramp_steps:
            raise ArpHubError(
                f"the weights are not low-rank yet: step {self.step_count} of a ramp of {self.ramp_steps}; "
                "train into the hold first"
            )
        self._check_finite()
        if self._off:
            self._pull(holding=True)
        return {layer.name: cast(Factors, layer.factors) for layer in self._layers}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs: tensors and plain numbers only."""
        layers = {}
        for layer in self._layers:
            scalars = {
                key: getattr(layer, key).clone()
                for key in ("start", "violation", "strength", "rate")
                if getattr(layer, key) is not None
            }
            factors = {f"factor{k}": factor.clone() for k, factor in enumerate(layer.factors or ())}
            layers[layer.name] = scalars | factors
        return {
            "step_count": self.step_count,
            "total_steps": self.total_steps,
            "ramp_steps": self.ramp_steps,
            "layers": layers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of a penalty with the same plan and schedule.

        Raises:
            ArpHubError: If plan or schedule differ.
        """
        for key in ("total_steps", "ramp_steps"):
            if state[key] != getattr(self, key):
                raise ArpHubError(f"the saved penalty has {key}={state[key]}, this one {getattr(self, key)}")
        if set(state["layers"]) != {layer.name for layer in self._layers}:
            odd = set(state["layers"]) ^ {layer.name for layer in self._layers}
            raise ArpHubError(f"the saved penalty is of another plan: it differs in layer '{min(odd)}'")
        self.step_count = state["step_count"]
        self._off = self.step_count > self.ramp_steps
        for layer in self._layers:
            saved = {key: value.to(layer.weight.device) for key, value in state["layers"][layer.name].items()}
            for key in ("start", "violation", "strength", "rate"):
                setattr(layer, key, saved.get(key))
            factors = tuple(saved[key] for key in sorted(saved) if key.startswith("factor"))
            layer.factors = factors or None

    def _share(self, layer: _Layer, violation: Tensor) -> Tensor:
        """The share of the way to the nearest point that a layer moves now, between 0 and 1."""
        if layer.start is None:
            layer.start = violation.clamp_min(torch.finfo(violation.dtype).tiny)
            layer.strength, layer.rate = torch.zeros_like(violation), torch.full_like(violation, _DUAL_RATE)
        if self.method == "tracking":
            target = layer.start * _END_OF_RAMP ** (self.step_count / self.ramp_steps)
            # Moving a share s leaves (1 - s)^2 of the violation, so this share lands on the target.
            return (1 - (target / violation.clamp_min(torch.finfo(violation.dtype).tiny)).sqrt()).clamp(0, 1)
        strength, rate = cast(Tensor, layer.strength), cast(Tensor, layer.rate)
        if layer.violation is not None:
            stuck = violation > _DUAL_PROGRESS * layer.violation
            rate = torch.where(stuck, rate * _DUAL_GROWTH**self.every, rate)
        layer.rate = rate
        layer.strength = strength + self.every * rate * violation / layer.start
        return layer.strength / (1 + layer.strength)  # the proximal step of strength/2 times the squared distance

    def _require_steps(self) -> None:
        if self.step_count == 0:
            raise ArpHubError("penalty.step() was never called: call it after every optimizer.step()")

    def _check_finite(self) -> None:
        flags = torch.stack([layer.weight.detach().isfinite().all() for layer in self._layers])
        if not bool(flags.all()):
            name = self._layers[int(flags.logical_not().nonzero()[0])].name
            raise ArpHubError(f"layer '{name}': its weight is NaN or infinite after step {self.step_count}")


def _moment(name: str, scheme: Scheme, moments: Mapping[str, Tensor]) -> Tensor:
    if name not in moments:
        raise ArpHubError(f"layer '{name}' is planned, but there is no second moment for it")
    columns = scheme.shape.group_in * scheme.shape.taps
    expected = (scheme.shape.groups, columns, columns)
    if tuple(moments[name].shape) != expected:
        raise ArpHubError(f"layer '{name}': its second moment has shape {tuple(moments[name].shape)}, not {expected}")
    return moments[name]


def _start_factors(
    name: str, scheme: Scheme, plan: RankPlan, factors: Mapping[str, Factors], weight: Tensor
) -> Factors:
    if name not in factors:
        raise ArpHubError(f"layer '{name}' is planned, but there are no factors for it")
    expected = [conv.weight_shape for conv in scheme.convs(plan.layers[name].rank)]
    if [tuple(factor.shape) for factor in factors[name]] != expected:
        found = [tuple(factor.shape) for factor in factors[name]]
        raise ArpHubError(f"layer '{name}': its factors have shapes {found}, the plan asks for {expected}")
    return tuple(factor.detach().to(weight.device, torch.float32).clone() for factor in factors[name])
