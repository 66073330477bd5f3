"""The images that a model takes: their size and normalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import timm.data
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ...errors import ArpHubError
from ...hub.load import change_config
from ...layers.model import check_bare


@dataclass(frozen=True)
class InputFormat:
    """The input of a model: ``size`` is ``(height, width)``, ``mean`` and ``std`` are of pixels in 0..1.

    ``crop_pct`` and ``crop_mode`` say how evaluation resizes and crops an image, in timm's meaning.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def uncropped(self) -> InputFormat:
        """The same for small images: the whole image is resized to the input size."""
        return replace(self, crop_pct=1.0, crop_mode="squash")

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes ``(N, 3, H, W)`` as normalised floats."""
        mean, std = (
            sent(torch.tensor(values), pixels.device).mul(255)[:, None, None] for values in (self.mean, self.std)
        )
        return pixels.float().sub_(mean).div_(std)


def input_format(model: nn.Module) -> InputFormat:
    """Input size of a model as it was built, and normalisation by its pretrained_cfg.

    Raises:
        ArpHubError: If the model does not take images of three channels, or is compiled or wrapped.
    """
    check_bare(model)
    config = timm.data.resolve_data_config({}, model=model)
    channels, height, width = get_model_input_config(model)["input_size"]  # with img_size= and in_chans= in it
    if channels != 3:
        raise ArpHubError(f"the model takes images of {channels} channels, the data has 3: build it with in_chans=3")
    return InputFormat(
        (height, width),
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
        config["crop_pct"],
        config["crop_mode"],
    )


def note_crop(model: nn.Module, form: InputFormat) -> None:
    """Note in a model's pretrained_cfg how the images of its accuracy are resized, so that it is saved with the model.

    Args:
        model: A timm model. If its config asks for the same, nothing changes.
        form: The format of the images, such as ``data.form``.

    Example:
        >>> note_crop(model, load_data("digits", model).form)  # doctest: +SKIP
    """
    ours = input_format(model)
    noted = {name: getattr(form, name) for name in ("interpolation", "crop_pct", "crop_mode")}
    if any(getattr(ours, name) != value for name, value in noted.items()):
        change_config(model, {**noted, "test_crop_pct": None, "test_input_size": None})


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. The copy to a GPU does not block the CPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
