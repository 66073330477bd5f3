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

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import ArpHubError
from .layers.apply_plan import check_plan
from .layers.model import check_model
from .plan import RankPlan
from .schemes import Factors, Scheme, make_scheme, relative_error

Phase = Literal["ramp", "hold", "done"]
Method = Literal["tracking", "dual"]

_END_OF_RAMP = 1e-4
"""Target violation at the end of the ramp, relative to the one at its start."""
_DUAL_RATE, _DUAL_GROWTH, _DUAL_PROGRESS = 0.02, 1.02, 0.99
"""Dual ascent: gain per step, and its growth in steps in which the violation falls by less than 1 %."""
_METRIC_ITERATIONS = 2
_SCALARS = ("start", "violation", "strength", "rate")
"""What is remembered of each layer, beside its factors."""
_EVERY, _LEAST_PULLS = 32, 10
"""Steps from one pull to the next, and the pulls of a training that is too short for so many steps between them."""
_STACKED_WEIGHTS = 2**22
"""Weights of like layers that are pulled together, at most."""
_STREAMS = 8
"""Stacks that a GPU works on at once, at most."""
_CHECK_EVERY = 20
"""Pulls between two looks for NaN on an accelerator, where a look stops the pipeline; on a CPU every pull looks."""


@dataclass
class _Layer:
    """One planned layer."""

    name: str
    weight: nn.Parameter
    scheme: Scheme
    rank: int
    moment: Tensor | None
    factors: Factors | None


class _Stack:
    """Layers of one shape, scheme and rank as the groups of one layer, and what the penalty remembers of them.

    A scheme treats the groups of a layer alike and apart, so that one call serves the whole stack: on a GPU a pull
    of small layers takes as long as its launches.

    Args:
        layers: The layers, alike; a layer with a moment is alone, because its fit searches for its own sake.
    """

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers, first = list(layers), layers[0]
        shape, count = first.scheme.shape, len(layers)
        stacked = dataclasses.replace(
            shape,
            out_channels=count * shape.out_channels,
            in_channels=count * shape.in_channels,
            groups=count * shape.groups,
        )
        self.scheme = make_scheme(first.scheme.name, stacked, first.scheme.groups)
        self.moment = first.moment
        given = [layer.factors for layer in layers if layer.factors is not None]
        self.basis: Factors | None = self.kept_of(_joined(given)) if given else None
        self.factors: Factors | None = None
        self.start: Tensor | None = None
        self.violation: Tensor | None = None
        self.strength: Tensor | None = None
        self.rate: Tensor | None = None

    def dense_weights(self) -> Tensor:
        """The weights one below the other, ``(layers * O, I, kh, kw)``, in single precision."""
        weight = torch.cat([layer.weight.detach() for layer in self.layers]).float().contiguous()
        return weight if weight.dim() == 4 else weight[..., None, None]

    def project(self, weight: Tensor) -> Tensor:
        """Bring the factors up to date with `dense_weights` and return the point of the set that they stand for."""
        if self.basis is None:  # each by itself: how long the search for a start goes on depends on the layer
            parts = zip(self.layers, weight.chunk(len(self.layers)), strict=True)
            factors = _joined([layer.scheme.nearest(part, layer.rank) for layer, part in parts])
        elif self.moment is None:
            start = tuple(part.float() for part in self.basis)
            factors = self.scheme.nearest(weight, self.layers[0].rank, start=start)
        else:
            factors = self.basis
        if self.moment is not None:
            factors = self.scheme.fit(weight, self.moment, factors, _METRIC_ITERATIONS)
        self.basis, self.factors = self.kept_of(factors), factors
        return self.scheme.compose(factors)

    def kept_of(self, factors: Factors) -> Factors:
        """What the next pull starts from: a part of the factors, but all of them for a fit.

        A start need be no more precise than the weights' way from one pull to the next, nor of any scale.
        """
        if self.moment is not None:
            return tuple(part.contiguous() for part in factors)  # as it comes back from a checkpoint
        basis = self.scheme.basis(factors)
        largest = [part.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(part.dtype).tiny) for part in basis]
        return tuple((part / most).half().contiguous() for part, most in zip(basis, largest, strict=True))

    def violations_of(self, weight: Tensor, nearest: Tensor) -> Tensor:
        """Relative violation of every layer, ``(layers,)``."""
        if self.moment is not None:
            return relative_error(weight, nearest, self.moment)[None]
        apart, whole = (part.view(len(self.layers), -1).square().sum(1) for part in (weight - nearest, weight))
        return apart / whole.clamp_min(torch.finfo(whole.dtype).tiny)

    def move(self, weight: Tensor, nearest: Tensor, shares: Tensor | None) -> None:
        """Move each layer by its share of the way to its nearest point, all of it without shares."""
        if shares is not None:
            rows = len(weight) // len(shares)
            nearest = torch.lerp(weight, nearest, shares.repeat_interleave(rows).view(-1, 1, 1, 1))
        for layer, target in zip(self.layers, nearest.chunk(len(self.layers)), strict=True):
            layer.weight.copy_(target.view(layer.weight.shape))

    def apart(self, joined: Factors | None) -> list[Factors]:
        """The factors, or bases, of each layer; none if there are none yet."""
        parts = [part.chunk(len(self.layers)) for part in joined or ()]
        return list(zip(*parts, strict=True))


@contextmanager
def _side_by_side(streams: Sequence[torch.cuda.Stream]) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Turns that a GPU may take at once, after what it has been given before and before what it is given afterwards.

    Factorisations of small matrices leave most of a GPU idle. Without streams, turns are one after the other.
    """
    if not streams:
        yield nullcontext
        return
    current, turns = torch.cuda.current_stream(streams[0].device), itertools.cycle(streams)
    for stream in streams:
        stream.wait_stream(current)
    yield lambda: torch.cuda.stream(next(turns))
    for stream in streams:
        current.wait_stream(stream)


def _joined(factors: Sequence[Factors]) -> Factors:
    """The factors, or the basis, of a stack, from those of its layers."""
    return tuple(torch.cat(parts) for parts in zip(*factors, strict=True))


def _stacked(layers: Sequence[_Layer]) -> list[_Stack]:
    """Layers that are alike in stacks, which hold so many weights that their copies stay small beside the model."""
    alike: dict[Any, list[_Layer]] = {}
    for layer in layers:
        scheme, shape = layer.scheme, layer.scheme.shape
        kind = scheme.name, scheme.groups, layer.rank, layer.weight.shape, shape.groups, layer.weight.device
        alike.setdefault(kind if layer.moment is None else layer.name, []).append(layer)
    stacks = []
    for group in alike.values():
        most = max(1, _STACKED_WEIGHTS // group[0].weight.numel())
        stacks += [_Stack(group[start : start + most]) for start in range(0, len(group), most)]
    return stacks


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
        every: Steps from one pull to the next; by default 32, or a tenth of a shorter training. A pull makes up for the
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
        check_model(model)
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
        layers = []
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, scheme in check_plan(model, plan).items():
            weight = modules[name].weight
            if not isinstance(weight, nn.Parameter) or type(modules[name]).__name__.startswith(("Std", "Scaled")):
                raise ArpHubError(
                    f"layer '{name}' is a {type(modules[name]).__name__}, whose weight is standardised on every pass: "
                    "decompose it without the penalty, or exclude it from the plan"
                )
            layers.append(
                _Layer(
                    name,
                    weight,
                    scheme,
                    plan.layers[name].rank,
                    None if moments is None else _moment(name, scheme, moments).to(weight.device, torch.float32),
                    None if factors is None else _start_factors(name, scheme, plan, factors, weight),
                )
            )
        if not layers:
            raise ArpHubError("the plan decomposes no layer: there is nothing to pull")
        self._names = [layer.name for layer in layers]
        self._stacks = _stacked(layers)
        devices = {layer.weight.device for layer in layers}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        self._streams = [torch.cuda.Stream(device) for _ in range(_STREAMS)] if device.type == "cuda" else []

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
            self._pull(holding, keep=self.step_count == self.total_steps)

    def _pull(self, holding: bool, keep: bool = False) -> None:
        """Move every layer to its target: all of the way in the hold; keep all of its factors or only their basis."""
        self._pulls += 1
        if self._stacks[0].layers[0].weight.device.type == "cpu" or self._pulls % _CHECK_EVERY == 1:
            self._check_finite()
        with _side_by_side(self._streams) as turn:
            for stack in self._stacks:
                with turn():
                    weight = stack.dense_weights()
                    nearest = stack.project(weight)
                    violation = stack.violations_of(weight, nearest)
                    shares = None if holding else self._shares(stack, violation)
                    stack.violation = torch.zeros_like(violation) if holding else violation
                    stack.move(weight, nearest, shares)
                    stack.factors = stack.factors if keep else None
        self._off = False

    def violations(self) -> dict[str, float]:
        """Relative violation of every planned layer, between 0 and 1, as the last step found it (0 in the hold).

        Raises:
            ArpHubError: If `step` was never called, or a weight is NaN or infinite.
        """
        self._require_steps()
        self._check_finite()
        found = {
            layer.name: violation
            for stack in self._stacks
            for layer, violation in zip(stack.layers, cast(Tensor, stack.violation).tolist(), strict=True)
        }
        return {name: found[name] for name in self._names}

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """The factors of every planned layer, which reproduce its weight exactly. For `decompose`.

        The weights are brought onto the low-rank set first, unless the last step was the last of all.

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
        if self._off or any(stack.factors is None for stack in self._stacks):
            self._pull(holding=True, keep=True)
        found = {
            layer.name: layer.scheme.balance(factors)
            for stack in self._stacks
            for layer, factors in zip(stack.layers, stack.apart(stack.factors), strict=True)
        }
        return {name: found[name] for name in self._names}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs: tensors and plain numbers only."""
        layers: dict[str, dict[str, Tensor]] = {name: {} for name in self._names}
        for stack in self._stacks:
            for number, layer in enumerate(stack.layers):
                for key in _SCALARS:
                    if (values := getattr(stack, key)) is not None:
                        layers[layer.name][key] = values[number].clone()
            for layer, basis in zip(stack.layers, stack.apart(stack.basis), strict=False):
                layers[layer.name] |= {f"basis{k}": part.clone() for k, part in enumerate(basis)}
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
        if odd := set(state["layers"]) ^ set(self._names):
            raise ArpHubError(f"the saved penalty is of another plan: it differs in layer '{min(odd)}'")
        self.step_count = state["step_count"]
        self._off = self.step_count > self.ramp_steps
        for stack in self._stacks:
            device = stack.layers[0].weight.device
            saved = [
                {key: value.to(device) for key, value in state["layers"][layer.name].items()} for layer in stack.layers
            ]
            for key in _SCALARS:
                setattr(stack, key, torch.stack([one[key] for one in saved]) if key in saved[0] else None)
            bases, factors = (
                [tuple(one[key] for key in sorted(one) if key.startswith(kind)) for one in saved]
                for kind in ("basis", "factor")
            )
            stack.basis, stack.factors = _joined(bases) or None, None
            if factors[0]:  # a checkpoint of the time when all of them were kept
                stack.basis = stack.kept_of(_joined(factors))

    def _shares(self, stack: _Stack, violation: Tensor) -> Tensor:
        """The share of the way to its nearest point that each layer moves now, between 0 and 1, ``(layers,)``."""
        tiny = torch.finfo(violation.dtype).tiny
        if stack.start is None:
            stack.start = violation.clamp_min(tiny)
            stack.strength, stack.rate = torch.zeros_like(violation), torch.full_like(violation, _DUAL_RATE)
        if self.method == "tracking":
            target = stack.start * _END_OF_RAMP ** (self.step_count / self.ramp_steps)
            # Moving a share s leaves (1 - s)^2 of the violation, so this share lands on the target.
            return (1 - (target / violation.clamp_min(tiny)).sqrt()).clamp(0, 1)
        strength, rate = cast(Tensor, stack.strength), cast(Tensor, stack.rate)
        if stack.violation is not None:
            stuck = violation > _DUAL_PROGRESS * stack.violation
            rate = torch.where(stuck, rate * _DUAL_GROWTH**self.every, rate)
        stack.rate = rate
        stack.strength = strength + self.every * rate * violation / stack.start
        return stack.strength / (1 + stack.strength)  # the proximal step of strength/2 times the squared distance

    def _require_steps(self) -> None:
        if self.step_count == 0:
            raise ArpHubError("penalty.step() was never called: call it after every optimizer.step()")

    def _check_finite(self) -> None:
        layers = [layer for stack in self._stacks for layer in stack.layers]
        finite = torch.stack([layer.weight.detach().isfinite().all() for layer in layers]).tolist()
        bad = {layer.name for layer, good in zip(layers, finite, strict=True) if not good}
        if bad:
            name = next(name for name in self._names if name in bad)
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
