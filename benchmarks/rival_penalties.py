"""Other forms of the penalty, and what a training does with them: the rivals of `ablations.py`.

They were tried and did not win, which is why the library does not have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import arp_hub
from arp_hub.penalty import AdaptiveRankPenalty
from arp_hub.schemes import MatrixScheme

LR, RAMP = 0.03, 0.65
"""Learning rate and share of the ramp that all rivals share."""


class FixedShare(AdaptiveRankPenalty):
    """The same share of the way at every pull of the ramp, whatever the violation."""

    def _share(self, layer: Any, violation: Tensor) -> Tensor:
        return torch.full_like(violation, 0.1)


class KeepsEnergy(AdaptiveRankPenalty):
    """Every projection is scaled back to the norm that the weight had."""

    def _pull(self, holding: bool) -> None:
        before = [layer.weight.norm() for layer in self._layers]
        super()._pull(holding)
        for layer, norm in zip(self._layers, before, strict=True):
            scale = norm / layer.weight.norm()
            layer.weight.mul_(scale)
            layer.factors = (*layer.factors[:-1], layer.factors[-1] * scale)


class NuclearTail(AdaptiveRankPenalty):
    """In the ramp, soft thresholds on the singular values behind the rank, instead of one factor for all of them."""

    def _pull(self, holding: bool) -> None:
        if holding:
            return super()._pull(holding)
        for layer in self._layers:
            weight = layer.dense_weight()
            assert isinstance(layer.scheme, MatrixScheme)
            u, values, v = torch.linalg.svd(layer.scheme.fold(weight), full_matrices=False)
            kept, tail = values[:, : layer.rank], values[:, layer.rank :]
            violation = tail.square().sum() / values.square().sum()
            left = (1 - self._share(layer, violation)).square() * tail.square().sum()
            small = torch.cat([kept, (tail - _threshold(tail, left)).clamp_min(0)], 1)
            pulled = (u * small[:, None]) @ v
            layer.violation = violation
            layer.factors = layer.scheme.nearest(weight, layer.rank)
            layer.weight.copy_(pulled.view(layer.weight.shape))


def _threshold(tail: Tensor, left: Tensor) -> Tensor:
    """The threshold that leaves ``left`` of the squared sum."""
    low, high = torch.zeros(()), tail.max()
    for _ in range(40):
        middle = (low + high) / 2
        too_much = (tail - middle).clamp_min(0).square().sum() > left
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return high


class Pull:
    """What happens before and after an optimiser's step in one variant: here, the library's own penalty."""

    def __init__(self, penalty: AdaptiveRankPenalty) -> None:
        self.penalty = penalty

    def before(self, step: int) -> None:
        """Add to the gradients."""

    def after(self, step: int) -> None:
        """Change the weights."""
        self.penalty.step()

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """Decompose at the end."""
        return arp_hub.decompose(model, plan, factors=self.penalty.factors())


class InLoss(Pull):
    """The squared distance to the nearest point as a term of the loss in the ramp; then the hold."""

    strength = 0.1 / 4 / LR * (1 - 0.9)  # with momentum 0.9 and rate LR it moves as far a step as `FixedShare`

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Its gradient: the way from the nearest point."""
        if self.penalty.phase == "ramp":
            for layer in self.penalty._layers:
                weight = layer.dense_weight()
                layer.weight.grad += self.strength * (weight - layer.project(weight)).view(layer.weight.shape)

    def after(self, step: int) -> None:
        """Nothing in the ramp."""
        if self.penalty.phase == "ramp":
            self.penalty.step_count += 1
        else:
            self.penalty.step()


class NuclearNorm(InLoss):
    """The nuclear norm of the channel fold as a term of the loss (as in Trained Rank Pruning); then the hold."""

    strength = 3e-4

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Its subgradient, by a full singular value decomposition."""
        if self.penalty.phase == "ramp":
            for layer in self.penalty._layers:
                u, _, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
                layer.weight.grad += self.strength * (u @ v).view(layer.weight.shape)


class Nothing(Pull):
    """No penalty: the factors themselves are trained."""

    def __init__(self) -> None:
        pass

    def after(self, step: int) -> None:
        """Nothing."""

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """It is decomposed already."""
        return model


class Replanned(Pull):
    """Ranks are chosen anew in the middle of the ramp."""

    def __init__(self, model: nn.Module, plan: arp_hub.RankPlan, keep: float, images: Tensor, total: int) -> None:
        super().__init__(AdaptiveRankPenalty(model, plan, total_steps=total, ramp=RAMP))
        self.model, self.plan, self.keep, self.images, self.total = model, plan, keep, images, total
        self.at = int(RAMP * total / 2)

    def after(self, step: int) -> None:
        """Pull; at the middle, plan."""
        if step == self.at:
            self.plan = arp_hub.make_plan(self.model.eval(), keep_params=self.keep, calibration=self.images)
            self.model.train()
            rest = self.total - step
            ramp = (RAMP * self.total - step) / rest
            self.penalty = AdaptiveRankPenalty(self.model, self.plan, total_steps=rest, ramp=ramp)
        self.penalty.step()

    def cut(self, model: nn.Module, plan: arp_hub.RankPlan) -> nn.Module:
        """By the new plan."""
        return super().cut(model, self.plan)
