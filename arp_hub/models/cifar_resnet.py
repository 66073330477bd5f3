"""The CIFAR ResNets of He et al. (2016), section 4.2: three stages of 16, 32 and 64 channels, option-A shortcuts.

Paper: `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385

A shortcut that changes the shape has no parameters: it takes every second pixel and pads the new channels with zeros,
half of them before and half after the existing channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ._cifar import CifarModel, cifar_cfg, init_weights

__all__ = ["CifarResNet"]

WIDTHS = (16, 32, 64)
"""Channels of the three stages (He et al. 2016, section 4.2)."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut.

    Args:
        in_channels: Channels of the input map.
        channels: Channels of the output map, at least ``in_channels``.
        stride: Stride of the first convolution and of the shortcut.
        drop_path: Probability of dropping the residual branch in training.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(channels, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act2 = nn.ReLU(inplace=True)
        self.stride = stride
        new = channels - in_channels
        self.channel_pad = (new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if any(self.channel_pad):
            shortcut = F.pad(shortcut, (0, 0, 0, 0, *self.channel_pad))
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(self.drop_path(x) + shortcut)


class CifarResNet(CifarModel):
    """A ResNet of ``6 * blocks + 2`` layers for 32x32 images.

    Args:
        blocks: Residual blocks in each of the three stages.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Channels of the input image.
        global_pool: Pooling before the classifier, ``''`` for none.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth: the drop probability of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": WIDTHS[0], "reduction": 1, "module": "act1"}]
        channels, built, total = WIDTHS[0], 0, blocks * len(WIDTHS)
        for index, width in enumerate(WIDTHS):
            stage = nn.Sequential()
            for block in range(blocks):
                rate = drop_path_rate * built / max(total - 1, 1)
                stage.append(BasicBlock(channels, width, 2 if index and not block else 1, rate, **dd))
                channels, built = width, built + 1
            name = f"layer{index + 1}"
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": width, "reduction": 2**index, "module": name})
        self.num_features = channels
        self._build_head(num_classes, global_pool, **dd)
        init_weights(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def stages(self) -> list[nn.Sequential]:
        """The stem, then layer1 to layer3."""
        stem = nn.Sequential(nn.Sequential(self.conv1, self.bn1, self.act1))
        return [stem, *(cast(nn.Sequential, getattr(self, info["module"])) for info in self.feature_info[1:])]

    def keep_stages(self, count: int) -> None:
        """Empty all stages but the first ``count``."""
        for info in self.feature_info[count:]:
            setattr(self, info["module"], nn.Sequential())


def _create(variant: str, blocks: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    kwargs.setdefault("feature_cfg", {"out_indices": (0, 1, 2, 3)})
    return build_model_with_cfg(CifarResNet, variant, pretrained, blocks=blocks, **kwargs)


default_cfgs = generate_default_cfgs({f"cifar_resnet{6 * n + 2}": cifar_cfg() for n in (3, 5, 7, 9, 18)})


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-20, 0.27 M parameters."""
    return _create("cifar_resnet20", 3, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-32, 0.46 M parameters."""
    return _create("cifar_resnet32", 5, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-44, 0.66 M parameters."""
    return _create("cifar_resnet44", 7, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-56, 0.85 M parameters."""
    return _create("cifar_resnet56", 9, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-110, 1.73 M parameters."""
    return _create("cifar_resnet110", 18, pretrained, **kwargs)
