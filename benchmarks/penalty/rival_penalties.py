"""Other forms of the penalty, and training loops without it, for `ablations.py`.

None of them is more accurate than the library's penalty, so the library does not contain them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import arp_hub
from arp_hub.penalty import AdaptiveRankPenalty
from arp_hub.schemes import MatrixScheme

LR, RAMP = 0.03, 0.65
"""Learning rate, and share of the steps in the ramp, of all rivals."""


class FixedShare(AdaptiveRankPenalty):
    """Moves a tenth of the way to the nearest low-rank point at every pull of the ramp, for any violation."""

    def _shares(self, stack: Any, violation: Tensor) -> Tensor:
        return torch.full_like(violation, 0.1)


class KeepsEnergy(AdaptiveRankPenalty):
    """Rescales every projection to the norm that the weight had before it."""

    def _pull(self, holding: bool, keep: bool = False) -> None:
        before = [_norms(stack) for stack in self._stacks]
        super()._pull(holding, keep)
        for stack, norms in zip(self._stacks, before, strict=True):
            scales = norms / _norms(stack)
            for layer, scale in zip(stack.layers, scales, strict=True):
                layer.weight.mul_(scale)
            if keep:
                rows = scales.repeat_interleave(len(stack.factors[-1]) // len(scales)).view(-1, 1, 1, 1)
                stack.factors = (*stack.factors[:-1], stack.factors[-1] * rows)


class NuclearTail(AdaptiveRankPenalty):
    """In the ramp, soft-thresholds the singular values beyond the rank, instead of scaling all by one factor."""

    def _pull(self, holding: bool, keep: bool = False) -> None:
        if holding:
            return super()._pull(holding, keep)
        for stack in self._stacks:
            weight, rank = stack.dense_weights(), stack.layers[0].rank
            assert isinstance(stack.scheme, MatrixScheme)
            u, values, v = torch.linalg.svd(stack.scheme.fold(weight), full_matrices=False)
            kept, tail = values[:, :rank], values[:, rank:]
            violation = tail.square().sum(1) / values.square().sum(1)
            left = (1 - self._shares(stack, violation)).square() * tail.square().sum(1)
            thresholds = torch.stack([_threshold(*pair) for pair in zip(tail, left, strict=True)])
            small = torch.cat([kept, (tail - thresholds[:, None]).clamp_min(0)], 1)
            pulled = (u * small[:, None]) @ v
            stack.violation = violation
            stack.basis = stack.kept_of(stack.scheme.nearest(weight, rank))
            for layer, target in zip(stack.layers, pulled, strict=True):
                layer.weight.copy_(target.view(layer.weight.shape))


def _norms(stack: Any) -> Tensor:
    """The norm of each layer's weight, ``(layers,)``."""
    return stack.dense_weights().view(len(stack.layers), -1).norm(dim=1)


def _threshold(tail: Tensor, left: Tensor) -> Tensor:
    """The soft threshold after which the squared sum of ``tail`` is ``left``."""
    low, high = torch.zeros(()), tail.max()
    for _ in range(40):
        middle = (low + high) / 2
        too_much = (tail - middle).clamp_min(0).square().sum() > left
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return high


class Pull:
    """Runs one variant before and after the optimiser's step. This base class runs the library's own penalty."""

    def __init__(self, penalty: AdaptiveRankPenalty) -> None:
        self.penalty = penalty

    def optimizer(self, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser of the training, from the one that all variants share."""
        return base

    def before(self, step: int) -> None:
        """Change the gradients, before the optimiser's step."""

    def after(self, step: int) -> None:
        """Change the weights, after the optimiser's step."""
        self.penalty.step()

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """Decompose the trained model."""
        return arp_hub.decompose(model, plan, factors=self.penalty.factors())


class InLoss(Pull):
    """Adds the squared distance to the nearest point to the loss in the ramp; then the hold."""

    strength = 0.1 / 4 / LR * (1 - 0.9)  # a step as long as that of `FixedShare`, at momentum 0.9 and rate LR

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Add the gradient: the difference from the nearest point."""
        if self.penalty.phase == "ramp":
            for stack in self.penalty._stacks:
                weight = stack.dense_weights()
                pulls = self.strength * (weight - stack.project(weight))
                for layer, pull in zip(stack.layers, pulls.chunk(len(stack.layers)), strict=True):
                    layer.weight.grad += pull.view(layer.weight.shape)

    def after(self, step: int) -> None:
        """Pull in the hold; only count the step in the ramp."""
        if self.penalty.phase == "ramp":
            self.penalty.step_count += 1
        else:
            self.penalty.step()


class NuclearNorm(InLoss):
    """Adds the nuclear norm of the channel fold to the loss (as in Trained Rank Pruning); then the hold."""

    strength = 3e-4

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Add the subgradient, from a full singular value decomposition."""
        if self.penalty.phase == "ramp":
            for layer in (layer for stack in self.penalty._stacks for layer in stack.layers):
                u, _, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
                layer.weight.grad += self.strength * (u @ v).view(layer.weight.shape)


class Nothing(Pull):
    """Trains the factors of the decomposed model, without a penalty."""

    def __init__(self) -> None:
        pass

    def after(self, step: int) -> None:
        """Do nothing."""

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """Return the model, which is decomposed from the start."""
        return model


class MinRank(Nothing):
    """torchao's `MinRankConstraint`: each step zeroes the smallest singular values of the planned weights.

    Args:
        model: The model in training.
        plan: Its ranks, for the scheme ``channel``.
        total: Steps of the training.
        scheduled: Whether the number of zeroed values grows along torchao's cubic schedule until 65 % of the steps. By
            default all are zeroed from the first step on.
    """

    def __init__(self, model: nn.Module, plan: arp_hub.RankPlan, total: int, scheduled: bool) -> None:
        self.model, self.plan, self.total, self.scheduled = model, plan, total, scheduled

    def optimizer(self, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser, with each planned weight in a group of its own."""
        from torchao.prototype.pat.optim import PruneOptimizer

        weights = {id(self.model.get_submodule(name).weight): layer for name, layer in self.plan.layers.items()}
        groups = []
        for group in base.param_groups:
            planned = [weight for weight in group["params"] if id(weight) in weights]
            group["params"] = [weight for weight in group["params"] if id(weight) not in weights]
            for weight in planned:
                count = min(weight.flatten(1).shape)
                zeroed = (count - weights[id(weight)].rank - 0.5) / count  # torchao rounds up
                rule = {"group_type": "SVDGrouper", "prox_type": "MinRankConstraint", "min_sparsity": max(0.0, zeroed)}
                rest = {key: value for key, value in group.items() if key != "params"}
                groups.append({**rest, **rule, "params": [weight], "min_sparsity_schedule": self.scheduled})
        for group in groups:
            base.add_param_group(group)
        if not self.scheduled:
            return PruneOptimizer(base)
        return PruneOptimizer(base, healing_start_step=max(1, int(RAMP * self.total)))

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """Factorise the trained weights, which have the planned ranks."""
        return arp_hub.decompose(model, self.plan)


class Replanned(Pull):
    """Chooses the ranks a second time in the middle of the ramp."""

    def __init__(self, model: nn.Module, plan: arp_hub.RankPlan, keep: float, images: Tensor, total: int) -> None:
        super().__init__(AdaptiveRankPenalty(model, plan, total_steps=total, ramp=RAMP))
        self.model, self.plan, self.keep, self.images, self.total = model, plan, keep, images, total
        self.at = int(RAMP * total / 2)

    def after(self, step: int) -> None:
        """Pull; in the middle of the ramp, plan first."""
        if step == self.at:
            self.plan = arp_hub.make_plan(self.model.eval(), keep_params=self.keep, calibration=self.images)
            self.model.train()
            rest = self.total - step
            ramp = (RAMP * self.total - step) / rest
            self.penalty = AdaptiveRankPenalty(self.model, self.plan, total_steps=rest, ramp=ramp)
        self.penalty.step()

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """Decompose by the second plan."""
        return super().cut(model, self.plan)
