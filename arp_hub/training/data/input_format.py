"""The images that a model takes: their size and normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import timm.data
import torch
from torch import Tensor, nn

from ...errors import ArpHubError


@dataclass(frozen=True)
class InputFormat:
    """The input of a model: ``size`` is ``(height, width)``, ``mean`` and ``std`` are of pixels in 0..1."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes ``(N, 3, H, W)`` as normalised floats."""
        mean, std = (
            sent(torch.tensor(values), pixels.device).mul(255)[:, None, None] for values in (self.mean, self.std)
        )
        return pixels.float().sub_(mean).div_(std)


def input_format(model: nn.Module) -> InputFormat:
    """Input size and normalisation of a model, by its pretrained_cfg.

    Raises:
        ArpHubError: If the model does not take images of three channels.
    """
    config = timm.data.resolve_data_config({}, model=model)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ArpHubError(f"the model takes images of {channels} channels, the data has 3: build it with in_chans=3")
    return InputFormat(
        (height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"], config["crop_pct"]
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. The copy to a GPU does not block the CPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
