"""The loss of a training step: cross-entropy or binary cross-entropy of mixed labels, blended with distillation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from .config import TrainConfig


class Loss:
    """The loss that the settings describe.

    Distillation compares what the loss of the labels compares: softmax outputs, or with ``bce_loss`` the sigmoid
    outputs of each class. So both parts have the same scale, and ``distill`` weighs them against each other.

    Args:
        config: The settings.
        classes: Number of classes.
    """

    def __init__(self, config: TrainConfig, classes: int) -> None:
        self.config, self.mixup = config, _mixup(config, classes)
        self.of_targets: Callable[[Tensor, Tensor], Tensor]
        if config.bce_loss:
            self.of_targets = BinaryCrossEntropy(
                smoothing=config.smoothing, target_threshold=config.bce_target_thresh, sum_classes=config.bce_sum
            )
        else:
            self.of_targets = partial(F.cross_entropy, label_smoothing=config.smoothing)

    def begin_epoch(self, epoch: int) -> None:
        """Switch mixup and cutmix off from epoch ``mixup_off_epoch`` of a phase, counted from 0."""
        if self.mixup:
            self.mixup.mixup_enabled = not self.config.mixup_off_epoch or epoch < self.config.mixup_off_epoch

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images, mixed in place, and the targets: labels ``(N,)``, or shares of the classes ``(N, classes)``."""
        return self.mixup(images, labels) if self.mixup else (images, labels)

    def distilled(self, loss: Tensor, logits: Tensor, guide: Tensor) -> Tensor:
        """The loss of the targets, blended with the distance to the teacher's logits.

        Args:
            loss: The loss of the targets.
            logits: The model's logits ``(N, classes)``.
            guide: The teacher's.
        """
        share, heat = self.config.distill, self.config.temperature
        if self.config.bce_loss:
            distance = _bernoulli_divergence(logits / heat, guide / heat, self.config.bce_sum)
        else:
            distance = F.kl_div(
                F.log_softmax(logits / heat, 1), F.log_softmax(guide / heat, 1), reduction="batchmean", log_target=True
            )
        return (1 - share) * loss + share * heat**2 * distance


def _bernoulli_divergence(logits: Tensor, guide: Tensor, summed: bool) -> Tensor:
    """The Kullback-Leibler divergence of the sigmoid outputs, averaged or ``summed`` over classes."""
    target = guide.sigmoid()
    divergence = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    divergence = divergence - F.binary_cross_entropy_with_logits(guide, target, reduction="none")
    return divergence.sum(1).mean() if summed else divergence.mean()


def _mixup(config: TrainConfig, classes: int) -> Mixup | None:
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        # timm's binary cross-entropy smooths labels, but no mixed targets
        label_smoothing=config.smoothing if config.bce_loss else 0.0,
        num_classes=classes,
    )
