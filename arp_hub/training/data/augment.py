"""Augmentation: crops and flips of whole batches, timm's augmentations of one image, and varied calibration copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from ...errors import ArpHubError
from .input_format import InputFormat, sent

VARIATION = v2.Compose(
    [
        v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.85, 1.15), interpolation=v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
    ]
)
"""Rotates, shifts, scales and recolours an image by as much as two photographs of one object may differ."""


def crop_and_flip(pixels: Tensor, share: slice, batch_size: int, seed: int, *, padding: int, flip: bool) -> Tensor:
    """Shift the images of a batch at random, with zero padding, and mirror half of them.

    Args:
        pixels: One process's share of a global batch, ``(N, C, H, W)``.
        share: Position of these images in the global batch.
        batch_size: Number of images in the global batch. Random numbers are drawn for all of them, so that the result
            does not depend on the number of processes.
        seed: Seed of this step.
        padding: Largest shift, in pixels.
        flip: Whether images may be mirrored; False for digits.
    """
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(0, 2 * padding + 1, (2, batch_size), generator=generator)[:, share]
    mirrored = (torch.rand(batch_size, generator=generator) < 0.5)[share]
    count, channels, height, width = pixels.shape
    device = pixels.device
    shifts, mirrored = sent(shifts, device), sent(mirrored, device)
    rows = shifts[0, :, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = columns + shifts[1, :, None]
    padded = F.pad(pixels, (padding,) * 4)
    padded = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width + 2 * padding))
    return padded.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def auto_augmentation(name: str, form: InputFormat) -> Callable[[Image.Image], Image.Image]:
    """The augmentation that timm has under this name, without crops, flips and normalisation.

    Raises:
        ArpHubError: If timm has none of this name.
    """
    try:
        _, augmentation, _ = transforms_imagenet_train(
            form.size, auto_augment=name, interpolation=form.interpolation, mean=form.mean, std=form.std, separate=True
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ArpHubError(
            f"auto_augment: timm knows no augmentation '{name}': give one like rand-m9-mstd0.5"
        ) from error
    keep_one_bit(augmentation)
    return augmentation


def keep_one_bit(transform: Any) -> None:
    """Limit posterising in timm's augmentations to at least one bit, because Pillow refuses zero bits."""
    if isinstance(transform, AugmentOp):
        if transform.name.startswith("Posterize"):
            transform.level_fn = partial(_one_bit_or_more, cast("Callable[..., Any]", transform.level_fn))
    elif isinstance(transform, list):
        for part in transform:
            keep_one_bit(part)
    else:
        for name in ("transforms", "ops", "policy"):
            keep_one_bit(getattr(transform, name, []))


def _one_bit_or_more(bits: Callable[..., Any], level: float, settings: Any) -> tuple[int]:
    return (max(1, *bits(level, settings)),)
