"""Calibration images, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArpHubError

Images = Tensor | Iterable[Any]
"""Calibration images: one normalised tensor ``(N, C, H, W)``, or batches of them that can be gone through repeatedly
(a list or a DataLoader; of a batch that is a tuple, the first item counts)."""
LEAST_PIXELS = 64 * 224**2
"""Pixels of all images together that second moments are taken of in any case, if there are so many."""
_BATCH_SIZE, _CPU_PIXELS, _PIXELS = 128, 5 * 2**16, 2**21
"""Images, and their pixels on a CPU and elsewhere, that bound a batch, unless told. On a CPU maps of more
would not stay in a cache, nor in memory that the process holds already: with more than six images of 224 pixels, up
to a third of the time goes on memory taken from the system and given back."""


def batches(
    images: Images,
    device: torch.device | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    pixels: int | None = None,
    most: int | None = None,
) -> Iterator[Tensor]:
    """Go through calibration images in batches.

    Args:
        images: The images.
        device: Where to put them; by default they stay where they are.
        layout: Memory layout to put them in, as `fast_layout` finds it.
        pixels: Pixels that bound a batch of a tensor, such that statistics can be taken of it; by default as many as
            passes are fast with.
        most: Images to stop at; by default all.

    Raises:
        ArpHubError: If they are not images, or there are none.
    """
    if not isinstance(images, Tensor) and isinstance(images, Iterator):
        raise ArpHubError(
            "calibration must be a tensor or something that can be gone through repeatedly (a list, a DataLoader), "
            f"got a one-pass {type(images).__name__}: wrap it in list(...)"
        )
    count = 0
    for item in _split(images, device, pixels) if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            found = f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ArpHubError(f"calibration images must be normalised float tensors (N, C, H, W), got {found}")
        batch = batch if most is None else batch[: most - count]
        count += len(batch)
        yield batch if device is None else batch.to(device, memory_format=layout)
        if count == most:
            return
    if not count:
        raise ArpHubError("there are no calibration images: pass at least one batch")


def limited(images: Images, most: int) -> Images:
    """At most ``most`` images: evenly spaced ones of a tensor, the first of batches; 0 for all."""
    if not most:
        return images
    if isinstance(images, Tensor):
        if len(images) <= most:
            return images
        return images[torch.linspace(0, len(images) - 1, most).round().long()]
    return list(batches(images, most=most))


def _split(images: Tensor, device: torch.device | None, pixels: int | None) -> Iterable[Tensor]:
    most = pixels or (_CPU_PIXELS if (device or images.device).type == "cpu" else _PIXELS)
    return images.split(max(1, min(_BATCH_SIZE, most // max(1, math.prod(images.shape[2:])))))


@torch.no_grad()
def fast_layout(model: nn.Module, images: Images) -> torch.memory_format:
    """Channels last, which convolutions on a CPU are about twice as fast with, unless the model cannot take it."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        try:
            model(next(batches(images, device, torch.channels_last))[:1])
            return torch.channels_last
        except RuntimeError:  # such as a .view() of a map
            pass
    return torch.contiguous_format
