"""Base class of the CIFAR models: stages, pooling, one linear classifier, and timm's methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """The pretrained_cfg of a CIFAR model. It names no weights: load a checkpoint by path."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


class CifarModel(nn.Module):
    """A classifier made of stages. A subclass builds its stages, then calls `_build_head`.

    Attributes:
        feature_info: One entry per stage, in timm's form: channels, reduction, and the module that ends the stage.
    """

    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    drop_rate: float
    feature_info: list[dict[str, Any]]
    fc: nn.Module
    global_pool: nn.Module
    grad_checkpointing = False

    def _build_head(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * cast(Any, self.global_pool).feat_mult()

    @abstractmethod
    def stages(self) -> list[nn.Sequential]:
        """The stages in the order of `feature_info`; gradient checkpointing recomputes a stage child by child."""

    @abstractmethod
    def keep_stages(self, count: int) -> None:
        """Drop all stages but the first ``count``."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms, which timm excludes by itself."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if ``global_pool`` is given."""
        like = next(self.parameters())
        pool = cast(Any, self.global_pool).pool_type if global_pool is None else global_pool
        self._build_head(num_classes, pool, device=like.device, dtype=like.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the selected stages, and of the last one.

        Args:
            x: Images ``(N, in_chans, H, W)``.
            indices: Indices of the stages; a number n selects the last n stages, None all of them.
            norm: Ignored, because there is no final norm; part of timm's interface.
            stop_early: Skip the stages after the last selected one.
            output_fmt: Only ``NCHW`` is supported.
            intermediates_only: Return only the selected outputs.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        stages = self.stages()
        chosen, last = feature_take_indices(len(stages), indices)
        intermediates = []
        for index, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = self._run(stage, x)
            if index in chosen:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that the selected stages do not need, and return the indices of those stages."""
        total = len(self.feature_info)
        chosen, last = feature_take_indices(total, indices)
        self.keep_stages(last + 1)
        if last + 1 < total:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last + 1 < total:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's feature map ``(N, num_features, h, w)``."""
        for stage in self.stages():
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply pooling, dropout and, unless ``pre_logits``, the classifier."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing and len(stage) else stage(x)


def init_weights(model: nn.Module) -> None:
    """He initialisation of the convolutions (He et al. 2015); the other layers keep torch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
