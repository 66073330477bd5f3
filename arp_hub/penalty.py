"""The adaptive rank penalty: pulls every planned layer onto its scheme's low-rank set while a task loss trains it.

With ``P(W)`` the nearest weight that the scheme can represent at its rank, the relative violation of a layer is::

    v = ||W - P(W)||^2 / ||W||^2

Every few optimiser steps a layer moves a share ``a`` of the way to ``P(W)``, which leaves ``(1 - a)^2 v``. In the ramp
the share is just large enough to meet a target that falls log-linearly to 1e-4 of its start. In the hold it is 1: the
weights are exactly low rank after each pull, and drift by a few optimiser steps until the next one. The last step of
all ends with a pull, so decomposing then changes nothing.

The penalty depends on weights alone and is deterministic. Under data parallelism every process does the same work on
the same weights, without communication. Weights that FSDP2 shards are gathered for a pull, one stack of like layers at
a time. One process finds the nearest weights of a stack, while others work on other stacks, and each writes its part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ._utils.torch_utils import ambient_modes_off
from .errors import ArpHubError
from .layers.apply_plan import check_plan
from .layers.model import check_model
from .layers.sharding import all_finite, check_not_deepspeed, check_unsharded, is_sharded
from .layers.stack import LayerStack, PlannedLayer, joined, rounds, side_by_side, solved, stacked
from .plan import RankPlan
from .schemes import Factors, Scheme

Phase = Literal["ramp", "hold", "done"]

_END_OF_RAMP = 1e-4
"""Target violation at the end of the ramp over that at its start; the first pull of the hold removes the rest."""


class AdaptiveRankPenalty:
    """Pulls the planned layers of a model to their ranks, exactly so at the end.

    With ``total_steps=1000`` and ``ramp=0.65``, steps 1 to 650 are the ramp, 651 to 1000 the hold. In the hold a layer
    is exactly low rank after each pull; between two pulls the optimiser moves it away by a few steps.
    `violations` measures how far it is at any time.

    Layers whose weight does not require gradients are not pulled, because nothing trains them. `decompose` gives them
    their nearest factors.

    Args:
        model: The dense model in training, without a wrapper: pass ``accelerator.unwrap_model(model)``. FSDP2 may
            shard it before or afterwards; then all processes call every method together. DeepSpeed is refused.
        plan: A plan made for it.
        total_steps: Optimiser steps of the whole training.
        ramp: Share of the steps in which the violation falls; the rest is the hold. 0 holds from the first step.
        factors: Factors to start from, as a fit of the same plan gives them; by default the nearest point.
        every: Steps from one pull to the next; by default 32, or a tenth of a shorter training. One pull makes up for
            the steps between, so that only the cost changes. The hold always begins and ends with a pull.

    Raises:
        ArpHubError: If the plan does not fit the model, or no planned layer can be trained. If the schedule leaves
            no step for the hold, or ``every`` is not a whole number of at least 1.

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
        factors: Mapping[str, Factors] | None = None,
        every: int | None = None,
    ) -> None:
        check_model(model, sharded=True)
        check_not_deepspeed(model)
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ArpHubError(f"every must be a whole number of at least 1, got {every!r}")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ArpHubError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if isinstance(ramp, bool) or not isinstance(ramp, (int, float)) or not 0 <= ramp < 1:
            raise ArpHubError(f"ramp must be at least 0 and below 1, got {ramp!r}: the rest of the steps is the hold")
        self.total_steps, self.ramp_steps = total_steps, math.ceil(ramp * total_steps)
        # 32: on ResNet-20 rarer pulls cost no accuracy (docs/research/ablations.md); a short training has ten pulls
        self.every = every or min(32, max(1, total_steps // 10))
        if self.ramp_steps >= total_steps:
            raise ArpHubError(
                f"a ramp of {ramp} over {total_steps} steps leaves no step for the hold: "
                "lower ramp or train for more steps"
            )
        self.step_count = self._pulls = 0
        self._drifted = False
        """Whether the optimiser has moved weights in the hold since the last pull."""
        schemes = check_plan(model, plan)
        self._model, self._modules = model, {name: model.get_submodule(name) for name in schemes}
        layers = [
            PlannedLayer(
                name, weight, scheme, plan.layers[name].rank, _start_factors(name, scheme, plan, factors, weight)
            )
            for name, scheme in schemes.items()
            if (weight := _trained_weight(name, self._modules[name])).requires_grad
        ]
        if not layers:
            raise ArpHubError("the plan decomposes no layer that can be trained: there is nothing to pull")
        self._names = [layer.name for layer in layers]
        self._stacks = stacked(layers)
        devices = {layer.weight.device for layer in layers}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        # eight streams keep a GPU busy with small factorisations; more gain nothing (results/penalty_cost.json)
        self._streams = [torch.cuda.Stream(device) for _ in range(8)] if device.type == "cuda" else []

    @property
    def phase(self) -> Phase:
        """Phase of the coming step."""
        if self.step_count >= self.total_steps:
            return "done"
        return "ramp" if self.step_count < self.ramp_steps else "hold"

    @ambient_modes_off()
    @torch.no_grad()
    def step(self) -> None:
        """Pull every planned layer. Call it after each step of the optimiser.

        Raises:
            ArpHubError: If a weight is NaN or infinite, or if a layer was replaced or frozen since the penalty was
                built.
        """
        holding = self.step_count >= self.ramp_steps
        due = self.step_count % self.every == 0 or self.step_count in (self.ramp_steps, self.total_steps - 1)
        self.step_count += 1
        self._drifted |= holding
        if due:
            self._check_own(trained=True)
            self._pull(holding, keep=self.step_count == self.total_steps)

    def _pull(self, holding: bool, keep: bool = False) -> None:
        """Move every layer to its target: all of the way in the hold; keep all of its factors or only their basis."""
        self._pulls += 1
        # on a GPU a look for NaN waits for all earlier work, so only every 20th pull has one
        if self._stacks[0].layers[0].weight.device.type == "cpu" or self._pulls % 20 == 1:
            self._check_finite()
        with side_by_side(self._streams) as turn:
            for stacks in rounds(self._stacks):
                with turn():
                    for stack, solution in zip(stacks, solved(stacks), strict=True):
                        shares = None if holding else self._shares(stack, solution.violations)
                        stack.move(solution.weight, shares)
                        stack.remember(solution.factors, keep)
        self._drifted = False

    @ambient_modes_off()
    @torch.no_grad()
    def violations(self) -> dict[str, float]:
        """Relative violation of every pulled layer, between 0 and 1, measured on the weights at the time of the call.

        It costs as much as a pull and changes nothing.

        Raises:
            ArpHubError: If `step` was never called, or a weight is NaN or infinite.
        """
        self._require_steps()
        self._check_own()
        self._check_finite()
        found: dict[str, float] = {}
        for stacks in rounds(self._stacks):
            for stack, solution in zip(stacks, solved(stacks), strict=True):
                values = solution.violations.tolist()
                found |= {layer.name: value for layer, value in zip(stack.layers, values, strict=True)}
        return {name: found[name] for name in self._names}

    @ambient_modes_off()
    @torch.no_grad()
    def low_rank_copy(self, model: nn.Module) -> nn.Module:
        """A copy of a model of the same architecture, with its pulled layers at their nearest low-rank weights.

        It is what decomposing the model would give, for measuring accuracy between two pulls.

        Raises:
            ArpHubError: If the model is sharded.
        """
        check_unsharded(model)
        twin = copy.deepcopy(model)
        for stack in self._stacks:
            weights = [cast(Tensor, twin.get_submodule(layer.name).weight) for layer in stack.layers]
            nearest = stack.solve(stack.dense_weights(weights)).weight
            for weight, target in zip(weights, nearest.chunk(len(weights)), strict=True):
                weight.copy_(target.view(weight.shape))
        return twin

    @ambient_modes_off()
    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """The factors of every pulled layer, which reproduce its weight exactly. For `decompose`.

        If the optimiser has moved the weights since the last pull, they are pulled first.

        Raises:
            ArpHubError: If the hold has not begun, so that there are no exact factors yet.
        """
        self._require_steps()
        if self.step_count <= self.ramp_steps:
            raise ArpHubError(
                f"the weights are not low-rank yet: step {self.step_count} of a ramp of {self.ramp_steps}; "
                "train into the hold first"
            )
        self._check_own()
        self._check_finite()
        if self._drifted or any(stack.factors is None for stack in self._stacks):
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
                if stack.start is not None:
                    layers[layer.name]["start"] = stack.start[number].clone()
            for kind, whole in (("basis", stack.basis), ("factor", stack.factors)):
                for layer, parts in zip(stack.layers, stack.apart(whole), strict=False):
                    layers[layer.name] |= {f"{kind}{k}": part.clone() for k, part in enumerate(parts)}
        return {
            "step_count": self.step_count,
            "total_steps": self.total_steps,
            "ramp_steps": self.ramp_steps,
            "drifted": self._drifted,
            "layers": layers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict` of a penalty with the same plan and schedule.

        Raises:
            ArpHubError: If plan or schedule differ, or an entry is missing or of another shape.
        """
        for key in ("step_count", "total_steps", "ramp_steps", "layers"):
            if not isinstance(state.get(key), dict if key == "layers" else int):
                raise ArpHubError(f"the saved penalty has no {key}: pass the result of penalty.state_dict()")
        for key in ("total_steps", "ramp_steps"):
            if state[key] != getattr(self, key):
                raise ArpHubError(f"the saved penalty has {key}={state[key]}, this one {getattr(self, key)}")
        if odd := set(state["layers"]) ^ set(self._names):
            raise ArpHubError(f"the saved penalty is of another plan: it differs in layer '{min(odd)}'")
        self._check_shapes(state["layers"])
        self.step_count = state["step_count"]
        self._drifted = bool(state.get("drifted", self.step_count > self.ramp_steps))
        for stack in self._stacks:
            device = stack.layers[0].weight.device
            saved = [
                {key: value.to(device) for key, value in state["layers"][layer.name].items()} for layer in stack.layers
            ]
            stack.start = torch.stack([one["start"] for one in saved]) if "start" in saved[0] else None
            basis, factors = (
                joined([tuple(one[key] for key in sorted(one) if key.startswith(kind)) for one in saved])
                for kind in ("basis", "factor")
            )
            stack.basis, stack.factors = basis or None, factors or None

    def _check_shapes(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compare the tensors of a `state_dict` with those that this penalty would have."""
        kinds = {key.rstrip("0123456789") for one in saved.values() for key in one}
        for layer in (layer for stack in self._stacks for layer in stack.layers):
            shapes = [conv.weight_shape for conv in layer.scheme.convs(layer.rank)]
            basis = layer.scheme.basis([torch.empty(shape, device="meta") for shape in shapes])
            possible: dict[str, dict[str, tuple[int, ...]]] = {
                "start": {"start": ()},
                "basis": {f"basis{k}": tuple(part.shape) for k, part in enumerate(basis)},
                "factor": {f"factor{k}": shape for k, shape in enumerate(shapes)},
            }
            expected = {key: shape for kind in possible.keys() & kinds for key, shape in possible[kind].items()}
            found = {key: tuple(getattr(value, "shape", (0,))) for key, value in saved[layer.name].items()}
            if found != expected:
                raise ArpHubError(
                    f"the saved penalty does not fit layer '{layer.name}': it holds {found}, and the plan asks for "
                    f"{expected}: pass the state_dict of a penalty with the same plan"
                )

    def _shares(self, stack: LayerStack, violation: Tensor) -> Tensor:
        """The share of the way to its nearest point that each layer moves, between 0 and 1, ``(layers,)``."""
        tiny = torch.finfo(violation.dtype).tiny
        if stack.start is None:
            stack.start = violation.clamp_min(tiny)
        target = stack.start * _END_OF_RAMP ** (self.step_count / self.ramp_steps)
        # moving a share a leaves (1 - a)^2 of the violation, so this share lands on the target
        return (1 - (target / violation.clamp_min(tiny)).sqrt()).clamp(0, 1)

    def _require_steps(self) -> None:
        if self.step_count == 0:
            raise ArpHubError("penalty.step() was never called: call it after every optimizer.step()")

    def _check_own(self, trained: bool = False) -> None:
        """Refuse to pull parameters that the model has replaced: that would change nothing.

        FSDP2 replaces parameters when it shards a model. Those are pulled from then on.

        Args:
            trained: Refuse layers that were frozen after the penalty was built, too: a pull would move them.
        """
        own = {id(parameter) for parameter in self._model.parameters()}
        for stack in self._stacks:
            for layer in stack.layers:
                weight = self._modules[layer.name]._parameters.get("weight")
                if weight is not None and id(weight) not in own:
                    raise ArpHubError(
                        f"layer '{layer.name}' was replaced after the penalty was built: build the penalty from the "
                        "model as it is trained"
                    )
                if trained and weight is not None and not weight.requires_grad:
                    raise ArpHubError(
                        f"layer '{layer.name}' was frozen after the penalty was built: freeze it before, or take it "
                        "out of the plan"
                    )
                if weight is layer.weight:
                    continue
                if is_sharded(layer.weight):
                    raise ArpHubError(
                        f"layer '{layer.name}': its weight is gathered at the moment, and a pull of the sharded one "
                        "would be lost: call model.reshard() before penalty.step()"
                    )
                if weight is not None and is_sharded(weight) and weight.shape == layer.weight.shape:
                    layer.weight = weight
                else:
                    raise ArpHubError(
                        f"layer '{layer.name}': its weight was replaced after the penalty was built: build "
                        "the penalty from the model as it is trained"
                    )

    def _check_finite(self) -> None:
        layers = [layer for stack in self._stacks for layer in stack.layers]
        finite = all_finite([layer.weight for layer in layers])
        bad = {layer.name for layer, good in zip(layers, finite, strict=True) if not good}
        if bad:
            name = next(name for name in self._names if name in bad)
            raise ArpHubError(f"layer '{name}': its weight is NaN or infinite after step {self.step_count}")


def _trained_weight(name: str, module: nn.Module) -> nn.Parameter:
    """The weight that an optimiser trains, if the layer multiplies its input by just that."""
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or type(module).__name__.startswith(("Std", "Scaled")):
        raise ArpHubError(
            f"layer '{name}' is a {type(module).__name__}, whose weight is standardised on every pass: "
            "decompose it without the penalty, or exclude it from the plan"
        )
    return weight


def _start_factors(
    name: str, scheme: Scheme, plan: RankPlan, factors: Mapping[str, Factors] | None, weight: Tensor
) -> Factors | None:
    if factors is None:
        return None
    if name not in factors:
        raise ArpHubError(f"layer '{name}' is planned, but there are no factors for it")
    expected = [conv.weight_shape for conv in scheme.convs(plan.layers[name].rank)]
    if [tuple(factor.shape) for factor in factors[name]] != expected:
        found = [tuple(factor.shape) for factor in factors[name]]
        raise ArpHubError(f"layer '{name}': its factors have shapes {found}, the plan asks for {expected}")
    return tuple(factor.detach().to(weight.device, torch.float32).clone() for factor in factors[name])
