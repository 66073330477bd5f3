"""Calibration images: checked, and given out in batches as a model takes them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_utils import evaluating
from ..errors import ArpHubError

Images = Tensor | Iterable[Any]
"""Calibration images: one normalised tensor ``(N, C, H, W)``, or batches that can be iterated over repeatedly, as in a
list or a DataLoader. Of a batch that is a tuple, the first item is used."""

LEAST_PIXELS = 64 * 224**2
"""Pixels, over all images, that second moments are taken of in any case: 64 images of 224 x 224."""


@dataclass(frozen=True)
class Place:
    """How a model takes its images.

    Attributes:
        device: Device of the model.
        dtype: Its floating-point type.
        layout: Memory format that it is fast with.
    """

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, images: Images) -> Place:
        """How a model takes images. On a CPU channels last, if it can: convolutions are then twice as fast."""
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        place = cls(parameter.device, parameter.dtype)
        if place.device.type == "cpu":
            fast = cls(place.device, place.dtype, torch.channels_last)
            try:
                first = next(batches(images, fast))
                with evaluating(model):
                    model(torch.cat([first[:1], first[-1:]]))  # one image alone hides strides that no view takes
                return fast
            except RuntimeError:  # such as a .view() of a map
                pass
        return place

    def take(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        return images.to(self.device, self.dtype, memory_format=self.layout)


def batches(
    images: Images, place: Place | None = None, pixels: int | None = None, most: int | None = None
) -> Iterator[Tensor]:
    """Go through calibration images in batches.

    Args:
        images: The images.
        place: How the model takes them; by default they stay as they are.
        pixels: Pixels of a batch, for statistics that need many images: batches of a loader are joined. By default
            as many as passes are fast with, or the loader's own.
        most: Images to stop after; by default all.

    Raises:
        ArpHubError: If they are not images, a pixel is not finite, or there are none.
    """
    if not isinstance(images, Tensor) and isinstance(images, Iterator):
        raise ArpHubError(
            "calibration must be a tensor or something that can be iterated over repeatedly (a list, a DataLoader), "
            f"got a one-pass {type(images).__name__}: wrap it in list(...)"
        )
    if isinstance(images, Tensor) and images.layout is not torch.strided:
        raise ArpHubError(f"calibration images must be dense tensors, got {images.layout}: call to_dense() on them")
    if not isinstance(images, Iterable):
        raise ArpHubError(f"calibration must be images (N, C, H, W) or batches of them, got {type(images).__name__}")
    found = _counted(_split(images, place, pixels) if isinstance(images, Tensor) else images, most)
    if pixels is not None and not isinstance(images, Tensor):
        found = _joined(found, pixels)
    for batch in found:
        yield batch if place is None else place.take(batch)


def _counted(found: Iterable[Any], most: int | None) -> Iterator[Tensor]:
    """Checked batches, until ``most`` images have come."""
    count = 0
    for item in found:
        batch = _checked(item[0] if isinstance(item, (tuple, list)) else item, count)
        batch = batch if most is None else batch[: most - count]
        if not len(batch):
            continue
        count += len(batch)
        yield batch
        if count == most:
            return
    if not count:
        raise ArpHubError("there are no calibration images: pass at least one")


def _joined(found: Iterable[Tensor], pixels: int) -> Iterator[Tensor]:
    """Join small batches of one image size into batches of about so many pixels."""
    held: list[Tensor] = []
    for batch in found:
        if held and batch.shape[1:] != held[0].shape[1:]:
            yield torch.cat(held)
            held = []
        held.append(batch)
        if (sum(map(len, held)) + 1) * math.prod(batch.shape[2:]) > pixels:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _checked(batch: Any, first: int) -> Tensor:
    """A batch, if it holds images; ``first`` is the number of its first image, for messages."""
    if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
        found = f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
        raise ArpHubError(f"calibration images must be normalised float tensors (N, C, H, W), got {found}")
    if batch.is_meta:
        raise ArpHubError("calibration images are on the meta device, which holds no pixels: load them first")
    if 0 in batch.shape[1:]:
        raise ArpHubError(f"calibration images must have pixels, got the shape {tuple(batch.shape)}")
    if not bool(batch.isfinite().all()):
        bad = first + int((~batch.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ArpHubError(f"calibration image {bad} holds NaN or infinite pixels: remove it")
    return batch.clone() if batch.is_inference() else batch.detach()  # autograd cannot save what inference mode made


def _split(images: Tensor, place: Place | None, pixels: int | None) -> Iterable[Tensor]:
    device = images.device if place is None else place.device
    # on a CPU six images of 224 x 224, whose maps stay in the cache; on a GPU 41
    most = pixels or (5 * 2**16 if device.type == "cpu" else 2**21)
    return images.split(max(1, min(128, most // max(1, math.prod(images.shape[2:])))))


def limited(images: Images, most: int) -> Images:
    """At most ``most`` images: evenly spaced ones of a tensor, the first of batches; 0 for all."""
    if not most:
        return images
    if isinstance(images, Tensor):
        if len(images) <= most:
            return images
        return images[torch.linspace(0, len(images) - 1, most).round().long()]
    return list(batches(images, most=most))


def image_count(images: Images) -> int:
    """The number of calibration images."""
    return len(images) if isinstance(images, Tensor) else sum(len(batch) for batch in batches(images))


@torch.no_grad()
def check_outputs(model: nn.Module, images: Images) -> None:
    """Check that the model's output on the first image is finite: nothing can be fitted to another one.

    Raises:
        ArpHubError: If it is NaN or infinite.
    """
    place = Place.of(model, images)
    with evaluating(model):
        found = model(next(batches(images, place))[:1])
    for output in found if isinstance(found, (tuple, list)) else (found,):
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            raise ArpHubError(
                "the model's output on the first calibration image is NaN or infinite: load other weights, or compute "
                "in float32"
            )


def check_normalised(images: Images, model: nn.Module) -> None:
    """Refuse images that cannot be normalised as the model expects, and warn where they may not be.

    Normalised pixels lie between ``(0 - mean) / std`` and ``(1 - mean) / std``, by the model's ``pretrained_cfg``; they
    may exceed that range by four times its width, as augmented or synthetic images do.

    Raises:
        ArpHubError: If pixels of the first batch lie farther out, as bytes between 0 and 255 do.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else getattr(config, "__dict__", {}) or {}
    mean, std = config.get("mean") or (0.5,), config.get("std") or (0.25,)
    low, high = (
        min(-m / s for m, s in zip(mean, std, strict=False)),
        max((1 - m) / s for m, s in zip(mean, std, strict=False)),
    )
    batch = next(batches(images))
    found = float(batch.min()), float(batch.max())
    if found[0] < low - 4 * (high - low) or found[1] > high + 4 * (high - low):
        way_out = "the std of model.pretrained_cfg"
        if not config.get("mean"):
            own = "model.pretrained_cfg = {'mean': (0.0,), 'std': (1 / 255,)}"
            way_out = f"the std. If the model takes such pixels, say so by {own}"
        raise ArpHubError(
            f"calibration images have pixels from {found[0]:.3g} to {found[1]:.3g}, normalised ones lie between "
            f"{low:.3g} and {high:.3g} for this model: divide bytes by 255, subtract the mean and divide by {way_out}"
        )
    if config.get("mean") and low < -0.5 and found[0] >= 0 and found[1] > 0.5:
        warnings.warn(
            "calibration images have no negative pixel: normalise them by the mean and std of model.pretrained_cfg",
            stacklevel=3,
        )
