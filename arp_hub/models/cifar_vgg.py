"""VGG-16 for CIFAR: the thirteen convolutions of VGG-16, each with BatchNorm, and one linear layer.

Paper: `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556. The three
linear layers of the ImageNet model are replaced by one, as is usual on 32x32 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ._cifar import CifarModel, cifar_cfg, init_weights

__all__ = ["CifarVgg"]

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the convolutions of every stage; max pooling follows each stage."""


class CifarVgg(CifarModel):
    """A VGG network for 32x32 images. ``features`` is one flat sequence of layers, as in torchvision's ``vgg16_bn``.

    Args:
        widths: Widths of the convolutions, stage by stage.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Channels of the input image.
        global_pool: Pooling before the classifier, ``''`` for none.
        drop_rate: Dropout probability before the classifier.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]] = VGG16,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.feature_info = []
        layers: list[nn.Module] = []
        channels = in_chans
        for index, stage in enumerate(widths):
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False, **dd),
                    nn.BatchNorm2d(width, **dd),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            self._tap(channels, 2**index, len(layers))
            layers.append(nn.MaxPool2d(2, 2))
        self._tap(channels, 2 ** len(widths), len(layers))
        self.features = nn.Sequential(*layers)
        self.num_features = channels
        self._build_head(num_classes, global_pool, **dd)
        init_weights(self)

    def _tap(self, channels: int, reduction: int, end: int) -> None:
        self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"features.{end - 1}"})

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^features\.0", "blocks": r"^features\.(\d+)"}

    def stages(self) -> list[nn.Sequential]:
        """The convolutions of every stage, led by the pooling before them; the last stage is the last pooling."""
        ends = [0, *self._ends()]
        return [nn.Sequential(self.features[start:end]) for start, end in zip(ends, ends[1:], strict=False)]

    def keep_stages(self, count: int) -> None:
        """Remove all stages but the first ``count``."""
        self.features = self.features[: self._ends()[count - 1]]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map ``(N, num_features, h, w)``."""
        return super().forward_features(x) if self.grad_checkpointing else self.features(x)

    def _ends(self) -> list[int]:
        return [int(info["module"].rpartition(".")[2]) + 1 for info in self.feature_info]


default_cfgs = generate_default_cfgs({"cifar_vgg16": cifar_cfg(pool_size=(1, 1), first_conv="features.0")})


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """CIFAR VGG-16 with BatchNorm, 14.72 M parameters."""
    kwargs.setdefault("feature_cfg", {"out_indices": (0, 1, 2, 3, 4, 5), "flatten_sequential": True})
    return build_model_with_cfg(CifarVgg, "cifar_vgg16", pretrained, **kwargs)
